'use strict';
// How captions are generated. null is the checkpoint's own setting, which is not sent.

const RETURNED = 3;
const DEFAULTS = { beams: null, temperature: null, words: null };
let settings = DEFAULTS;  // of the picture that is shown; those that follow start with them

function defaults() {
  const { beam_size: beams = RETURNED, temperature = 0, max_length: words = 20 } = info?.search ?? {};
  return { beams: Math.max(beams, RETURNED), temperature, words };
}

const isSampling = ({ temperature }) => (temperature ?? defaults().temperature) > 0;

// The parameters of POST caption.
function parametersOf(settings) {
  const { beams, temperature, words } = settings, parameters = new URLSearchParams();
  const sampling = isSampling(settings);
  // There are no more captions than beams.
  parameters.set('num_return_sequences', sampling ? RETURNED : Math.min(RETURNED, beams ?? RETURNED));
  if (beams !== null && !sampling) parameters.set('num_beams', beams);
  if (temperature > 0) parameters.set('temperature', temperature);
  else if (temperature !== null) parameters.set('do_sample', 'false');
  if (words !== null) parameters.set('max_new_tokens', words);
  return parameters;
}

const controls = ['beams', 'temperature', 'words'];

let applied = [];

function showSettings() {
  $('settings').hidden = !info;
  // A control that is being moved must not be moved back by an answer that arrives.
  if (!info || applied[0] === info && applied[1] === settings) return;
  applied = [info, settings];
  const { max_beams: beams = 10, max_new_tokens: words = 50 } = info.limits ?? {};
  Object.assign($('beams'), { max: beams, disabled: isSampling(settings) });
  Object.assign($('words'), { min: Math.max(1, info.search?.min_length ?? 1), max: words });
  for (const name of controls) {
    $(name).value = settings[name] ?? defaults()[name];
    showValue(name);
  }
  $('defaults').disabled = controls.every(name => settings[name] === null);
}

function showValue(name) {
  const value = Number($(name).value);
  $(`${name}-value`).textContent = {
    beams: $('beams').disabled ? 'not used while words are drawn' : `${value} ${value === 1 ? 'beam' : 'beams'}`,
    temperature: value ? value.toFixed(1) : 'none',
    words: `${value} ${value === 1 ? 'word' : 'words'}`,
  }[name];
}

let settling = 0;

function changeSettings(changed) {
  settings = changed;
  showSettings();
  // A key that is held down changes a control many times a second.
  clearTimeout(settling);
  const entry = current;
  settling = setTimeout(() => captionAnew(entry, changed), 300);
}

for (const name of controls) {
  $(name).oninput = () => showValue(name);
  $(name).onchange = ({ target }) => {
    const value = Number(target.value);
    changeSettings({ ...settings, [name]: value === defaults()[name] ? null : value });
  };
}
$('defaults').onclick = () => {
  changeSettings(DEFAULTS);
  $('beams').focus();  // as the button, now disabled, would lose it to nowhere
};
