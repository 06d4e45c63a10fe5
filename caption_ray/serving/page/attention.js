'use strict';
// Where the model looked: a word lights its regions, and a region the words that looked there.

let pinned = -1;         // the word that was clicked or tapped
let pointed = -1;        // the word under the pointer or with the keyboard's focus
let pinnedRegion = -1;   // the same for regions of the picture, by the index of their cell
let pointedRegion = -1;

const REGIONS = 'Picture. The arrow keys move over its regions and name the words that looked there.';

const attentionNow = () => current?.captions[current.chosen]?.attention ?? null;
const wordElements = () => [...$('caption').querySelectorAll('button.word')];

function lookAway() {
  pinned = pointed = pinnedRegion = pointedRegion = -1;
}

// What is pointed at comes before what is pinned.
function look() {
  const attention = attentionNow(), words = wordElements();
  const isShown = attention && words.length > 0;
  const word = isShown ? pointed >= 0 ? pointed : pointedRegion >= 0 ? -1 : pinned : -1;
  const region = isShown && word < 0 ? pointedRegion >= 0 ? pointedRegion : pinnedRegion : -1;
  words.forEach((element, i) => {
    element.classList.toggle('shown', i === word);
    element.classList.remove('lit');
    element.setAttribute('aria-pressed', i === pinned);
  });
  $('frame').classList.toggle('regions', Boolean(isShown));
  if (isShown) {
    $('frame').tabIndex = 0;
    $('frame').setAttribute('role', 'application');
    $('frame').setAttribute('aria-label', REGIONS);
  } else {
    for (const name of ['tabindex', 'role', 'aria-label']) $('frame').removeAttribute(name);
  }
  $('region').hidden = region < 0;
  const before = $('stage').classList.contains('looking');
  $('stage').classList.toggle('looking', word >= 0);
  if (word >= 0) showWord(attention, word, words[word].textContent, before);
  else if (region >= 0) showRegion(attention, region, words);
  else $('legend').textContent = isShown ? `${touch ? 'Tap' : 'Point at'} a word, or a place in the picture.` : '';
}

// ---- from a word to its regions --------------------------------------------------------------

const side = $('heatmap').width;
const pen = $('heatmap').getContext('2d');
const DARKEST = .74;  // opacity of the veil over what was not looked at
let clear = new Float32Array(side * side).fill(1);  // for each pixel how little it is dimmed
let frame = 0;

// Cubic B-splines: smooth without the star shapes that a browser's own scaling makes of few cells.
function spread(weights, rows, columns) {
  const taps = cells => Array.from({ length: side }, (_, pixel) => {
    const place = (pixel + .5) / side * cells - .5, cell = Math.floor(place), t = place - cell;
    return [(1 - t) ** 3, 3 * t ** 3 - 6 * t * t + 4, 1 + 3 * t + 3 * t * t - 3 * t ** 3, t ** 3]
      .map((share, k) => [Math.min(cells - 1, Math.max(0, cell + k - 1)), share]);
  });
  const across = taps(columns), down = taps(rows), result = new Float32Array(side * side);
  const lines = Array.from({ length: rows }, (_, row) =>
    across.map(tap => tap.reduce((sum, [cell, share]) => sum + share * weights[row * columns + cell], 0)));
  down.forEach((tap, y) => across.forEach((_, x) => {
    result[y * side + x] = tap.reduce((sum, [cell, share]) => sum + share * lines[cell][x], 0);
  }));
  const most = result.reduce((a, b) => Math.max(a, b), 1e-12);
  return result.map(value => value / most);
}

// Only dims, so that what was looked at keeps the colours of the photograph.
function paint() {
  const image = pen.createImageData(side, side);
  clear.forEach((value, i) => { image.data[4 * i + 3] = 255 * DARKEST * (1 - value); });
  pen.putImageData(image, 0, 0);
}

function glide(target, atOnce) {
  cancelAnimationFrame(frame);
  const from = clear, start = performance.now();
  const step = now => {
    const t = atOnce ? 1 : Math.min(1, Math.max(0, now - start) / 220), eased = t * (2 - t);
    clear = target.map((value, i) => from[i] + (value - from[i]) * eased);
    paint();
    if (t < 1) frame = requestAnimationFrame(step);
  };
  step(start);
}

const PLACES = [
  ['upper left', 'top', 'upper right'], ['left', 'centre', 'right'], ['lower left', 'bottom', 'lower right'],
];
const third = value => Math.min(2, Math.max(0, Math.floor(value * 3)));
const placeOf = (x, y) => PLACES[third(y)][third(x)];

const boxOf = attention => attention.box ?? [0, 0, 1, 1];

function lay(element, [left, top, right, bottom]) {
  const parts = { left, top, width: right - left, height: bottom - top };
  for (const [name, part] of Object.entries(parts)) element.style[name] = `${100 * part}%`;
}

function showWord(attention, index, text, before) {
  const { rows, columns, weights } = attention;
  const [left, top, right, bottom] = boxOf(attention);
  // How many times the average weight the strongest cell has. Scaled to its own maximum only,
  // uniform attention would dim at random, as if one place mattered most.
  const focus = Math.max(...weights[index]) * rows * columns;
  const target = spread(weights[index], rows, columns);
  const peak = target.indexOf(1);
  const x = left + (right - left) * (peak % side + .5) / side;
  const y = top + (bottom - top) * (Math.floor(peak / side) + .5) / side;
  $('legend').textContent = `“${text}” · looked ${focus < 2 ? 'all over' : `most at the ${placeOf(x, y)}`}`;
  lay($('heatmap'), [left, top, right, bottom]);
  const strength = Math.min(1, Math.max(.4, focus / 4));
  glide(target.map(value => 1 - strength * (1 - value)), still.matches || !before);
}

// ---- from a region to its words --------------------------------------------------------------

function showRegion(attention, cell, words) {
  const { rows, columns, weights } = attention;
  const [left, top, right, bottom] = boxOf(attention);
  const row = Math.floor(cell / columns), column = cell % columns;
  const width = (right - left) / columns, height = (bottom - top) / rows;
  const x = left + column * width, y = top + row * height;
  lay($('region'), [x, y, x + width, y + height]);
  // How many times the weight that a word had here if it looked everywhere alike.
  const lifts = words.map((_, i) => weights[i][cell] * rows * columns);
  const most = Math.max(...lifts);
  words.forEach((element, i) => {
    element.classList.add('lit');
    element.style.setProperty('--share', (lifts[i] / Math.max(4, most)).toFixed(3));
  });
  const order = lifts.map((_, i) => i).sort((a, b) => lifts[b] - lifts[a]);
  const strongest = order.filter(i => lifts[i] >= Math.max(1.1, most / 2)).slice(0, 3);
  const named = strongest.map(i => `“${words[i].textContent}”`);
  const list = [named.slice(0, -1).join(', '), named.at(-1)].filter(Boolean).join(' and ');
  const place = placeOf(x + width / 2, y + height / 2).replace(/^./, letter => letter.toUpperCase());
  $('legend').textContent = `${place} · ${list ? `most looked at for ${list}` : 'no word looked here in particular'}`;
}

function regionAt({ clientX, clientY }) {
  const attention = attentionNow();
  if (!attention || !wordElements().length) return -1;
  const { rows, columns } = attention, [left, top, right, bottom] = boxOf(attention);
  const shown = $('frame').getBoundingClientRect();
  const across = ((clientX - shown.left) / shown.width - left) / (right - left);
  const down = ((clientY - shown.top) / shown.height - top) / (bottom - top);
  if (across < 0 || across >= 1 || down < 0 || down >= 1) return -1;
  return Math.floor(down * rows) * columns + Math.floor(across * columns);
}

// ---- pointers and keys -----------------------------------------------------------------------

const wordAt = event => wordElements().indexOf(event.target.closest?.('button.word'));

function point(index) {
  if (index === pointed) return;
  pointed = index;
  look();
}

function pointRegion(cell) {
  if (cell === pointedRegion) return;
  pointedRegion = cell;
  look();
}

// Touch screens have no hover: there a tap, which is a click, does it all.
// Between two words the first stays highlighted, or the picture would flicker.
const isMouse = event => event.pointerType === 'mouse';
$('caption').addEventListener('pointerover', event => {
  if (isMouse(event) && wordAt(event) >= 0) point(wordAt(event));
});
$('caption').addEventListener('pointerleave', event => { if (isMouse(event)) point(-1); });
$('caption').addEventListener('focusin', event => {
  if (event.target.matches('.word:focus-visible')) point(wordAt(event));
});
$('caption').addEventListener('focusout', () => point(-1));
$('caption').addEventListener('click', event => {
  const index = wordAt(event);
  if (index < 0) return;
  const next = pinned === index ? -1 : index;
  lookAway();
  pinned = next;
  look();
});
$('caption').addEventListener('keydown', event => {
  const words = wordElements(), index = wordAt(event);
  const next = {
    ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1, ArrowUp: index - 1, Home: 0,
    End: words.length - 1,
  }[event.key];
  if (index < 0 || next === undefined || !words[next]) return;
  event.preventDefault();
  words[index].tabIndex = -1;
  words[next].tabIndex = 0;
  words[next].focus();
});

$('frame').addEventListener('pointermove', event => { if (isMouse(event)) pointRegion(regionAt(event)); });
$('frame').addEventListener('pointerleave', event => { if (isMouse(event)) pointRegion(-1); });
$('frame').addEventListener('click', event => {
  const cell = regionAt(event), next = pinnedRegion === cell ? -1 : cell;
  lookAway();
  pinnedRegion = next;
  look();
});
$('frame').addEventListener('blur', () => {
  pinnedRegion = -1;
  look();
});
$('frame').addEventListener('keydown', event => {
  const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
  const attention = attentionNow();
  if (!step || !attention) return;
  event.preventDefault();
  const { rows, columns } = attention;
  const from = pinnedRegion >= 0 ? pinnedRegion : Math.floor(rows / 2) * columns + Math.floor(columns / 2);
  const move = pinnedRegion >= 0 ? step : [0, 0];  // the first key shows where one is
  const row = Math.min(rows - 1, Math.max(0, Math.floor(from / columns) + move[0]));
  const column = Math.min(columns - 1, Math.max(0, from % columns + move[1]));
  lookAway();
  pinnedRegion = row * columns + column;
  look();
});
addEventListener('keydown', event => {
  if (event.key !== 'Escape') return;
  notify('');
  lookAway();
  look();
});
