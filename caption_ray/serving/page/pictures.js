'use strict';
// The pictures of this visit: how they come in, the strip of thumbnails, and which one is shown.

let preparing = Promise.resolve();  // one after the other, as large photos take much memory

// Takes picture files; the first of them is shown.
function take(files) {
  if (!files.length) return;
  const added = files.map(file => {
    const entry = {
      file, name: file.name || 'picture.jpg', settings, state: 'waiting', problem: null, due: 0, timer: 0,
      controller: null, retried: false, wantsFocus: true, source: '', body: file, isPrepared: false,
      shrunk: false, words: [], captions: [], chosen: 0, isFresh: false, latency: '',
    };
    entry.tile = makeTile(entry);
    entry.prepared = preparing = Promise.all([preparing, infoIsKnown])
      .then(() => prepare(entry)).then(() => changed(entry)).catch(() => {});
    return entry;
  });
  entries.push(...added);
  $('history').querySelector('ul').append(...added.map(entry => make('li', {}, entry.tile)));
  // A strip of one would only repeat the picture beside it.
  $('history').hidden = entries.length < 2;
  select(added[0]);
  scrollTo({ top: 0, behavior: pace() });
}

function select(entry) {
  notify('');
  current = entry;
  settings = entry.settings;
  for (const { tile } of entries) tile.setAttribute('aria-current', tile === entry.tile);
  for (const button of $('examples').querySelectorAll('button')) {
    button.setAttribute('aria-pressed', button.file === entry.file);
  }
  const strip = $('history').querySelector('ul'), { tile } = entry;
  strip.scrollTo({ left: tile.offsetLeft - (strip.clientWidth - tile.offsetWidth) / 2, behavior: pace() });
  $('announcement').textContent = '';
  show();
  sendNext();
}

// To be called whenever an entry's state, result or source has changed.
function changed(entry) {
  showTile(entry);
  if (entry === current) show();
}

// ---- the picture that is shown ---------------------------------------------------------------

let written = null;  // the captions that the page shows

function show() {
  const entry = current, { state, problem } = entry;
  document.body.classList.add('working');
  $('result').setAttribute('aria-label', 'Caption');  // a landmark, now that there is something in it
  $('stage').hidden = Boolean(problem) && entry.isPrepared && !entry.source;  // there is nothing to see
  showPicture(entry);
  showSettings();
  $('caption').hidden = Boolean(problem);
  $('caption').setAttribute('aria-busy', state === 'working');
  $('facts').hidden = state !== 'done';
  $('code').hidden = state !== 'done';
  // Where other settings cannot help.
  $('settings').hidden ||= [401, 413, 415, 422, 'unreadable'].includes(problem?.status);
  if (!problem) hideProblem();
  else if (problem !== shownProblem) showProblem(problem, entry);
  if (state === 'done') {
    $('latency').textContent = `Captioned in ${entry.latency}`;
    showCode();
    if (written === entry.captions) return;  // else a word would lose the pointer and the focus
    written = entry.captions;
    choose(entry, entry.chosen, entry.isFresh);
    entry.isFresh = false;
    return;
  }
  written = null;
  $('picture').alt = 'Your picture';
  $('others').hidden = true;
  lookAway();
  if (entry.words.length) write(entry.words, null, false);
  else showWaiting(state === 'waiting' ? 'Waiting for its turn…' : 'Looking…');
  look();
}

function showPicture({ source, isPrepared }) {
  const picture = $('picture');
  const isUnknown = isPrepared && !source;
  picture.hidden = !source;
  $('placeholder').hidden = !isUnknown;
  if (source && picture.src !== source) picture.src = source;
  if (isUnknown) document.body.style.setProperty('--ratio', 1.5);
}

$('picture').onload = ({ target }) =>
  document.body.style.setProperty('--ratio', target.naturalWidth / target.naturalHeight || 1.5);

// ---- the strip of thumbnails -----------------------------------------------------------------

const STATES = { waiting: 'Waiting', working: 'Looking…', failed: 'Failed' };

function makeTile(entry) {
  const picture = make('img', { alt: entry.name, hidden: true, draggable: false });
  const kind = make('span', { className: 'kind', textContent: entry.name.split('.').pop().slice(0, 5) });
  const label = make('span', { className: 'label', textContent: STATES.waiting });
  const tile = make('button', { type: 'button', className: 'tile', title: entry.name, onclick: () => select(entry) },
    make('span', { className: 'thumbnail' }, picture, kind), label);
  tile.dataset.state = 'waiting';
  return tile;
}

function showTile({ tile, source, state, problem, captions }) {
  const picture = tile.querySelector('img');
  picture.hidden = !source;
  tile.querySelector('.kind').hidden = Boolean(source);
  if (source && picture.src !== source) picture.src = source;
  tile.dataset.state = state;
  tile.querySelector('.label').textContent = state === 'done' ? joined(wordsOf(captions[0]))
    : state === 'failed' ? `${STATES.failed}: ${explain(problem.status)[0].toLowerCase()}` : STATES[state];
}

// ---- choosing, pasting and dropping ----------------------------------------------------------

for (const input of [$('file'), $('camera')]) {
  input.onchange = () => {
    take([...input.files]);
    input.value = '';  // so that choosing the same file again fires a change event
  };
}

addEventListener('paste', event => {
  if (event.target === $('token')) return;
  receiveTransfer(event.clipboardData);
});
for (const kind of ['dragenter', 'dragover']) {
  addEventListener(kind, event => {
    event.preventDefault();
    document.body.classList.add('dragging');
  });
}
addEventListener('dragleave', ({ relatedTarget }) => {
  if (!relatedTarget) document.body.classList.remove('dragging');
});
addEventListener('drop', event => {
  event.preventDefault();
  document.body.classList.remove('dragging');
  receiveTransfer(event.dataTransfer);
});

// Takes the pictures that were pasted or dropped, or says why there are none.
function receiveTransfer(transfer) {
  if (!transfer) return;
  if (transfer.files.length) return take([...transfer.files]);
  const text = (transfer.getData('text/uri-list') || transfer.getData('text/plain')).trim();
  const file = fileFrom(text);
  if (file) return take([file]);
  if (!text) return notify('There was no picture in that. Copy the picture itself and paste it, or choose its file.');
  notify(/^(?:[a-z][\w+.-]*:\/\/|www\.)\S+$/i.test(text)
    ? 'That was a link, not a picture, and this page opens no links. '
      + 'Copy the picture itself and paste it, or save it and choose its file.'
    : 'That was text, not a picture. Copy a picture and paste it, or choose its file.');
}

// The picture in a data: URL; null if it is none. The page's policy keeps fetch from reading them.
function fileFrom(url) {
  const [, type, base64, data] = /^data:(image\/[\w.+-]+)[^,]*?(;base64)?,(.*)$/is.exec(url) ?? [];
  if (!type) return null;
  try {
    const text = base64 ? atob(decodeURIComponent(data)) : decodeURIComponent(data);
    const bytes = base64 ? Uint8Array.from(text, character => character.charCodeAt()) : text;
    return new File([bytes], `picture.${type.replace(/^image\/|\+.*/gi, '').replace('jpeg', 'jpg')}`, { type });
  } catch {
    return null;
  }
}
