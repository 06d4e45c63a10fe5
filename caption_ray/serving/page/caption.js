'use strict';
// The caption of the picture that is shown, word by word, and its alternatives.

const attached = word => /^(?:[,.;:!?%)\]}’']|n't$)/.test(word);
const parted = word => info?.model?.tokenizer !== 'characters' && !attached(word);
const joined = words => words.reduce((text, word) => text + (text && parted(word) ? ' ' : '') + word, '');

function wordsOf({ generated_text: text, words }) {
  return words?.length ? words : info?.model?.tokenizer === 'characters' ? [...text] : text.split(' ');
}

// The elements that `dress` makes of the words, with spaces between them.
const spaced = (words, dress) =>
  words.flatMap((word, i) => i && parted(word) ? [' ', dress(word, i)] : [dress(word, i)]);

function write(words, attention = null, fresh = true) {
  const old = $('caption').classList.contains('waiting') ? 0 : $('caption').querySelectorAll('.word').length;
  $('caption').className = '';
  $('caption').replaceChildren(...spaced(words, (word, index) => {
    const element = make(attention ? 'button' : 'span', { className: 'word', textContent: word });
    if (attention) Object.assign(element, { type: 'button', tabIndex: index ? -1 : 0 });
    if (fresh && index >= old) {
      element.classList.add('fresh');
      element.style.setProperty('--turn', index - old);
    }
    return element;
  }));
}

function showWaiting(text) {
  $('caption').className = 'waiting';
  $('caption').textContent = text;
}

// Shows one of the entry's captions.
function choose(entry, index, fresh = false) {
  entry.chosen = index;
  const caption = entry.captions[index], words = wordsOf(caption);
  const { attention } = caption;
  lookAway();
  write(words, attention?.weights?.length >= words.length ? attention : null, fresh);
  $('picture').alt = joined(words);
  showAlternatives(entry);
  look();
}

function percent(share) {
  if (share < .0001) return '<0.01\u00a0%';
  const value = share * 100;
  return `${value >= 10 ? Math.round(value) : Number(value.toPrecision(value >= 1 ? 2 : 1))}\u00a0%`;
}

// Which of `words` are not in the longest common subsequence with `others`.
function differing(words, others) {
  const lengths = Array.from({ length: words.length + 1 }, () => new Array(others.length + 1).fill(0));
  for (let i = words.length - 1; i >= 0; i--) {
    for (let k = others.length - 1; k >= 0; k--) {
      lengths[i][k] = words[i] === others[k]
        ? 1 + lengths[i + 1][k + 1] : Math.max(lengths[i + 1][k], lengths[i][k + 1]);
    }
  }
  const differs = new Array(words.length).fill(true);
  for (let i = 0, k = 0; i < words.length && k < others.length;) {
    if (words[i] === others[k]) {
      differs[i++] = false;
      k++;
    } else if (lengths[i + 1][k] >= lengths[i][k + 1]) i++;
    else k++;
  }
  return differs;
}

function showAlternatives(entry) {
  const { captions, chosen } = entry;
  $('others').hidden = captions.length < 2;
  const best = Math.max(...captions.map(caption => caption.log_prob));
  const shown = captions.length ? wordsOf(captions[chosen]) : [];
  // The buttons stay, since one of them may have the focus.
  const buttons = captions.map((_, index) => $('alternatives').querySelectorAll('button')[index]
    ?? make('button', { type: 'button', onclick: () => choose(current, index) }));
  buttons.forEach((button, index) => {
    const words = wordsOf(captions[index]), differs = differing(words, shown);
    const bar = make('span', { className: 'bar' });
    bar.style.width = `${100 * Math.exp(captions[index].log_prob - best)}%`;
    button.replaceChildren(
      make('span', {}, ...spaced(words, (word, i) => differs[i] ? make('mark', {}, word) : word)),
      make('span', { className: 'share' }, percent(Math.exp(captions[index].log_prob))), bar);
    button.setAttribute('aria-pressed', index === chosen);
  });
  if ($('alternatives').children.length !== buttons.length) {
    $('alternatives').replaceChildren(...buttons.map(button => make('li', {}, button)));
  }
}

const escaped = text => text.replace(/[&<>"]/g, character => `&#${character.charCodeAt()};`);

$('copy').onclick = ({ target }) => copyText($('picture').alt, target);
$('copy-alt').onclick = ({ target }) => copyText(`alt="${escaped($('picture').alt)}"`, target);
