'use strict';
// What went wrong, in a person's words; what the server said is folded below.

class Problem extends Error {
  constructor(status, text = '', request = '', wait = null) {
    super(text);
    Object.assign(this, { status, request, wait });
  }
}

// A proxy in front of the server may answer in plain text or HTML: only the former is worth showing.
async function problemOf(response) {
  const body = await response.text().catch(() => '');
  let text = '';
  try { text = String(JSON.parse(body).error ?? ''); } catch {
    if (!/^\s*</.test(body)) text = body.trim().slice(0, 300);
  }
  return new Problem(response.status, text, response.headers.get('X-Request-ID') ?? '',
    Number(response.headers.get('Retry-After')) || null);
}

const megabytes = bytes => bytes < 1048576
  ? `${Math.max(1, Math.round(bytes / 1024))}\u00a0kB` : `${+(bytes / 1048576).toFixed(1)}\u00a0MB`;

function explain(status, size) {
  const { max_body_bytes: bytes, max_pixels: pixels, formats } = info?.limits ?? {};
  const listed = formats?.length ? `${formats.slice(0, -1).join(', ')} or ${formats.at(-1)}` : 'JPEG or PNG';
  switch (status) {
    case 0: return ['The server cannot be reached', 'Check your connection, then try again.'];
    case 'broken': return ['The answer broke off', 'The connection ended before the caption was complete.'];
    case 'unreadable': return ['This file cannot be opened', 'It may have been moved or changed, or be a folder.'];
    case 400: return ['The server did not understand this', 'Try another picture, or go back to the default settings.'];
    case 401: return token ? ['This token was not accepted', 'Check it and enter it again.']
      : ['This endpoint asks for a token', 'It is kept until you close this tab.'];
    case 413: return ['This picture is too large', (size ? `It has ${megabytes(size)}, `
      + 'and this browser cannot make it smaller. ' : '')
      + (bytes ? `The limit is ${megabytes(bytes)}.` : 'Choose a smaller one.')];
    case 415: return ['This is not a picture we can read', `Choose a ${listed} file.`];
    case 422: return ['This picture cannot be read', 'The file is damaged'
      + (pixels ? `, or has more than ${Math.round(pixels / 1e6)} megapixels.` : ' or has too many pixels.')];
    case 429: return ['Many pictures are waiting', 'The server is busy.'];
    case 503: return ['No captioner is ready', 'It may be starting. Try again in a moment.'];
    case 504: return ['This took too long', 'The server may be busy. Try again in a moment.'];
    default: return status >= 500
      ? ['Something went wrong on the server', 'If it happens again, send its operator the request id in the details.']
      : ['The server refused this', 'Try another picture.'];
  }
}

const isTemporary = ({ status }) => [0, 'broken', 429].includes(status) || status >= 500;

// Seconds after which a picture is sent again without being asked for; null: never.
function patience(problem) {
  const { status } = problem;
  const wait = problem.wait ?? (status === 429 ? 5 : null);
  return (status === 429 || status === 503) && wait !== null && wait <= 120 ? wait : null;
}

let shownProblem = null;

function showProblem(problem, entry) {
  shownProblem = problem;
  const { status, message, request } = problem;
  const [title, text] = explain(status, entry?.body?.size);
  const again = entry && isTemporary(problem);
  document.querySelector('main').classList.add('failed');
  // Not live: inside an alert, screen readers would announce every tick.
  const countdown = make('span', { id: 'countdown' }, status === 429 ? 'Try again in a moment.' : '');
  countdown.setAttribute('aria-live', 'off');
  const facts = [message, request && !message.includes(request) && `Request ${request}`].filter(Boolean);
  const details = make('details', {}, make('summary', {}, 'Technical details'), make('p', {}, facts.join(' · ')));
  $('error').replaceChildren(
    make('strong', {}, title), make('span', {}, text, ' ', countdown), ...facts.length ? [details] : []);
  $('retry').hidden = !again;
  $('another').hidden = again || !entry || status === 401;
  $('retry').textContent = entry?.due ? 'Try now' : 'Try again';
  $('token-form').hidden = status !== 401;
  if (status === 401) $('token').focus();
  if (entry?.due) showCountdown(entry);
}

function showCountdown(entry) {
  if (entry !== current || !$('countdown')) return;
  const seconds = Math.max(0, Math.ceil((entry.due - performance.now()) / 1000));
  $('countdown').textContent = `Trying again in ${seconds}\u00a0s.`;
}

function hideProblem() {
  shownProblem = null;
  document.querySelector('main').classList.remove('failed');
  $('error').replaceChildren();
  $('retry').hidden = $('another').hidden = $('token-form').hidden = true;
}
