'use strict';
// Sending pictures: one after the other, except that the one shown never waits for the others.

let isLocked = false;  // until a token is entered, the others need not be sent
let infoIsKnown = Promise.resolve();  // or known to be out of reach

function sendNext() {
  if (current?.state === 'waiting' && !current.due) return caption(current);
  if (isLocked) return;
  // One that a busy server told to come back later keeps the others waiting, too.
  if (entries.some(entry => entry.state === 'working' || entry.due)) return;
  const next = entries.find(entry => entry.state === 'waiting');
  if (next) caption(next);
}

function stop(entry) {
  entry.controller?.abort();
  clearTimeout(entry.timer);
  entry.due = 0;
}

async function caption(entry) {
  stop(entry);
  const { signal } = entry.controller = new AbortController();
  Object.assign(entry, { state: 'working', problem: null, words: [], captions: [], chosen: 0 });
  changed(entry);
  try {
    await receive(entry, signal);
    if (signal.aborted) return;
    entry.state = 'done';
    entry.isFresh = true;
  } catch (error) {
    if (signal.aborted) return;
    fail(entry, error instanceof Problem ? error : new Problem('broken'));
  }
  changed(entry);
  if (entry === current) {
    if (entry.state === 'done') $('announcement').textContent = $('picture').alt;
    moveFocus(entry);
  }
  if (!info && entry.state === 'done') load();
  sendNext();
}

function fail(entry, problem) {
  entry.state = 'failed';
  entry.problem = problem;
  if (problem.status === 401) isLocked = true;
  const wait = patience(problem);
  if (wait === null || entry.retried) return;
  entry.retried = true;
  entry.state = 'waiting';
  entry.due = performance.now() + wait * 1000;
  const tick = () => {
    if (performance.now() >= entry.due) return caption(entry);
    showCountdown(entry);
    entry.timer = setTimeout(tick, 250);
  };
  entry.timer = setTimeout(tick, 250);
}

// To the result, if the user has not gone elsewhere meanwhile.
function moveFocus(entry) {
  if (!entry.wantsFocus || entry.state !== 'done') return;
  entry.wantsFocus = false;
  const from = document.activeElement;
  const isElsewhere = from !== document.body && !from.closest('#pick, #examples, #token-form, #retry, #another');
  if (!isElsewhere) $('caption').focus({ preventScroll: true });
}

async function receive(entry, signal) {
  await infoIsKnown;
  const limit = info?.limits?.max_body_bytes ?? Infinity;
  await entry.prepared;
  // The limit may not have been known before.
  if (entry.body.size > limit) await (entry.prepared = prepare(entry));
  if (signal.aborted) return;
  changed(entry);  // it can be shown now
  if (entry.body.size > limit) throw new Problem(/^(?!image\/)./.test(entry.file.type) ? 415 : 413);
  // Read here, since fetch would report a vanished file as a network error.
  const body = await entry.body.arrayBuffer().catch(() => { throw new Problem('unreadable'); });
  const start = performance.now();
  const query = `caption?${parametersOf(entry.settings)}&return_attention=true&stream=true`;
  const response = await ask(query, { method: 'POST', body, signal }).catch(() => { throw new Problem(0); });
  if (!response.ok) throw await problemOf(response);
  const request = response.headers.get('X-Request-ID') ?? '';
  for await (const [event, data] of events(response.body)) {
    if (signal.aborted) return;
    if (event === 'words') {
      entry.words.push(...data.words);
      if (entry === current) write(entry.words);
    } else if (event === 'captions') {
      entry.captions = data;
      break;
    } else if (event === 'error') {
      throw new Problem(data.status ?? 500, data.error, request);
    }
  }
  if (!entry.captions.length) throw new Problem('broken', '', request);
  const spent = performance.now() - start;
  entry.latency = spent < 10000 ? `${Math.round(spent)}\u00a0ms` : `${(spent / 1000).toFixed(1)}\u00a0s`;
}

// EventSource cannot POST, so the stream is parsed here.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  try {
    for (;;) {
      const { done, value } = await reader.read();
      text = (text + (value ?? '')).replace(/\r\n/g, '\n') + (done ? '\n\n' : '');
      const blocks = text.split('\n\n');
      text = blocks.pop();
      for (const block of blocks) {
        const fields = block.split('\n').map(line => /^([^:]*):? ?(.*)$/.exec(line));
        const event = fields.findLast(field => field[1] === 'event')?.[2];
        const data = fields.filter(field => field[1] === 'data').map(field => field[2]).join('\n');
        if (event && data) yield [event, JSON.parse(data)];
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function captionAnew(entry, settings) {
  entry.settings = settings;
  entry.retried = false;
  caption(entry);
}
