'use strict';
// What all other scripts use: elements, addresses, the token, and what the page knows.

const $ = id => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
// Behind a route prefix the page may be requested without its trailing slash; the browser would
// then resolve relative URLs one folder too high.
const base = location.origin + location.pathname.replace(/\/?$/, '/');
const at = path => new URL(path, base).href;
const still = matchMedia('(prefers-reduced-motion: reduce)');
const pace = () => still.matches ? 'auto' : 'smooth';  // of scrolling
const touch = matchMedia('(hover: none)').matches;

const TOKEN_KEY = 'caption_ray.token';
let token = '';
try { token = sessionStorage.getItem(TOKEN_KEY) ?? ''; } catch { /* storage is blocked */ }

function keepToken(value) {
  token = value;
  try {
    if (token) sessionStorage.setItem(TOKEN_KEY, token);
    else sessionStorage.removeItem(TOKEN_KEY);
  } catch { /* the token lasts as long as the page */ }
}

const ask = (path, options = {}) => fetch(at(path), {
  ...options, headers: token ? { Authorization: `Bearer ${token}` } : {},
});

let info = null;      // the answer of GET info
let entries = [];     // the pictures of this visit, as pictures.js makes them; kept nowhere else
let current = null;   // the one that is shown

function notify(text) {
  $('notice').textContent = text;
}

// Browsers give the clipboard only to pages loaded over https or from the own machine; the older
// command works everywhere.
async function copyText(text, button) {
  const label = button.dataset.label ??= button.textContent;
  let copied = false;
  try {
    await navigator.clipboard.writeText(text);
    copied = true;
  } catch {
    const field = make('textarea', { value: text, className: 'unseen' });
    document.body.append(field);
    field.select();
    copied = document.execCommand('copy');
    field.remove();
    button.focus();
  }
  button.textContent = copied ? 'Copied' : 'Cannot copy';
  clearTimeout(button.timer);
  button.timer = setTimeout(() => { button.textContent = label; }, 1500);
}
