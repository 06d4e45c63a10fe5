'use strict';
// Programs that send the picture that is shown to this endpoint, with the settings of the page.

const LANGUAGES = ['curl', 'python', 'javascript'];
let language = 'curl';

// Strings as literals. JSON's are also Python's and JavaScript's.
const quoted = text => JSON.stringify(text);
const shellQuoted = text => `'${text.replaceAll("'", "'\\''")}'`;

// The token itself is never shown: the programs take it from the environment.
const programs = {
  curl: (url, file) => [
    `curl ${shellQuoted(url)} \\`,
    ...token ? ['  -H "Authorization: Bearer $TOKEN" \\'] : [],
    `  --data-binary ${shellQuoted('@' + file)}`,
  ],
  python: (url, file) => [
    'import json',
    ...token ? ['import os'] : [],
    'from pathlib import Path',
    'from urllib.request import Request, urlopen',
    '',
    `url = ${quoted(url)}`,
    `picture = Path(${quoted(file)}).read_bytes()`,
    'request = Request(url, data=picture)',
    ...token ? ['request.add_header("Authorization", "Bearer " + os.environ["TOKEN"])'] : [],
    'captions = json.load(urlopen(request))',
    'print(captions[0]["generated_text"])',
  ],
  javascript: (url, file) => [
    "import { readFile } from 'node:fs/promises';",
    '',
    `const url = ${quoted(url)};`,
    `const body = await readFile(${quoted(file)});`,
    'const response = await fetch(url, {',
    "  method: 'POST',",
    ...token ? ['  headers: { Authorization: `Bearer ${process.env.TOKEN}` },'] : [],
    '  body,',
    '});',
    'const captions = await response.json();',
    'console.log(captions[0].generated_text);',
  ],
};

function showCode() {
  if (!current) return;
  const url = at(`caption?${parametersOf(settings)}`);
  $('program').textContent = programs[language](url, current.name).join('\n');
  const limit = info?.limits?.max_body_bytes;
  $('code-note').textContent = [
    token && 'TOKEN is a variable of the environment with your access token.',
    current.shrunk && 'This page made the picture smaller before sending it; a program sends it as it is'
      + (limit && current.file.size > limit ? `, and the endpoint takes at most ${megabytes(limit)}.` : '.'),
  ].filter(Boolean).join(' ');
  for (const name of LANGUAGES) {
    const isShown = name === language;
    $(`tab-${name}`).setAttribute('aria-selected', isShown);
    $(`tab-${name}`).tabIndex = isShown ? 0 : -1;
  }
  $('program').setAttribute('aria-labelledby', `tab-${language}`);
}

function turnTo(name) {
  language = name;
  showCode();
}

LANGUAGES.forEach((name, index) => {
  const tab = $(`tab-${name}`);
  tab.onclick = () => turnTo(name);
  tab.onkeydown = event => {
    const next = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: LANGUAGES.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    turnTo(LANGUAGES[(next + LANGUAGES.length) % LANGUAGES.length]);
    $(`tab-${language}`).focus();
  };
});
$('copy-code').onclick = ({ target }) => copyText($('program').textContent, target);
