'use strict';
// The model, the examples and the token; and the page's first requests.

function load() {
  infoIsKnown = loadInfo();
  return infoIsKnown.then(loadExamples);
}

async function loadInfo() {
  try {
    const response = await ask('info');
    if (response.status === 401) {
      // If a picture has been sent, its own answer reports this.
      if (!current) showProblem(await problemOf(response));
      return;
    }
    if (!response.ok) return;
    info = await response.json();
    describe(info);
    written = null;  // since the model says how words are joined
    if (current) changed(current);
  } catch { /* Without it the page still captions; sending a picture will say what is wrong. */ }
}

function describe({ model = {}, checkpoint = {} }) {
  const last = uri => uri.split('/').filter(Boolean).pop();
  const name = String(checkpoint.uri ?? '').split(',').map(last).join(', ');
  const { step, epoch, uri = '' } = checkpoint;
  const steps = [step != null && `step ${step.toLocaleString('en')}`, epoch != null && `epoch ${epoch}`];
  const when = steps.filter(Boolean).join(', ');
  const facts = [model.encoder, model.decoder && `${model.decoder} attention`, name && name + (when && ` (${when})`)];
  $('model').textContent = facts.filter(Boolean).join(' · ');
  $('model').title = uri;
}

async function loadExamples() {
  const answer = await ask('examples').catch(() => null);
  if (answer?.ok) showExamples((await answer.json()).examples ?? []);
}

// Fetched, as <img> could not send the token; and a click can then send the bytes at once.
async function showExamples(examples) {
  const buttons = await Promise.all(examples.map(async ({ name, title, url }, index) => {
    const response = await ask(url).catch(() => null);
    if (!response?.ok) return null;
    const data = await response.blob();
    const file = new File([data], name, { type: data.type });
    const text = `Example ${index + 1}${title ? `: ${title}` : ''}`;
    const image = make('img', { src: URL.createObjectURL(file), alt: text, title: text, draggable: false });
    return make('button', { type: 'button', file, onclick: () => tryExample(file) }, image);
  }));
  const found = buttons.filter(Boolean);
  $('examples').querySelector('ul').dataset.count = found.length;
  $('examples').querySelector('ul').replaceChildren(...found.map(button => make('li', {}, button)));
  $('examples').hidden = !found.length;
}

// One that was tried before is among the pictures of this visit.
function tryExample(file) {
  const known = entries.find(entry => entry.file === file);
  if (!known) return take([file]);
  select(known);
  scrollTo({ top: 0, behavior: pace() });
}

// ---- the token -------------------------------------------------------------------------------

function changeToken(value) {
  keepToken(value);
  $('forget').hidden = !token;
  if (current?.state === 'done') showCode();
}

$('token-form').onsubmit = event => {
  event.preventDefault();
  changeToken($('token').value.trim());
  $('token').value = '';
  notify('');
  isLocked = false;
  hideProblem();
  load();
  for (const entry of entries) {
    if (entry.problem?.status === 401) Object.assign(entry, { state: 'waiting', problem: null });
  }
  sendNext();
};
$('forget').onclick = () => {
  changeToken('');
  notify('The token is forgotten.');
  $('file').focus();
};

$('retry').onclick = () => caption(current);
$('another').onclick = () => $('file').click();
$('docs').href = at('docs');
changeToken(token);
load();
