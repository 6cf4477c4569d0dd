"use strict";

// Numbers and tokens as text.

const LONGEST_WORD = 16; // letters that fit the width of a phone in any font

// Small shares have a decimal, and those that would round to all of it.
const percent = (share) => {
  const fine = (share && Math.abs(share) < 0.0995) || (share >= 0.995 && share < 0.9995);
  return `${(100 * share).toFixed(fine ? 1 : 0)}\u00a0%`;
};
const signed = (share) => {
  const text = percent(Math.abs(share));
  return /[1-9]/.test(text) ? (share > 0 ? "+" : "−") + text : text;
};
const decimal = (number, digits) => number.toFixed(digits).replace("-", "−");
const count = (number) => decimal(number, Math.abs(number - Math.round(number)) < 1e-3 ? 0 : 1);
const counted = (number, one) => `${number} ${one}${number === 1 ? "" : "s"}`;

// Controls, formats, spaces other than U+0020, and letters without a shape. A variation selector is invisible
// only if nothing stands before it.
const INVISIBLE = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Zs}\u034f\u115f\u1160\u3164\uffa0]/u;
const SELECTOR = /[\ufe00-\ufe0f\u{e0100}-\u{e01ef}]/u;

const JOINED = /^(\p{P}|[^\s\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}])/u;

const hexadecimal = (letter) => letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");

// Appends a token's text; what cannot be seen of it becomes a mark.
function visible(element, token) {
  const mark = (text) => element.append(labelled("span", "mark", text));
  if (token === "") mark("∅");
  let first = true;
  for (const letter of token) {
    if (letter === "\n") mark("↵");
    else if (letter === " ") mark(first ? "·" : " ");
    else if (letter === "\t") mark("⇥");
    else if (INVISIBLE.test(letter) || (first && SELECTOR.test(letter))) mark(`U+${hexadecimal(letter)}`);
    else element.append(letter);
    first = false;
  }
}

function spoken(token) {
  return token.trim() || (token.includes("\n") ? "new line" : token ? "space" : "nothing");
}

function labelled(kind, name, text) {
  const element = document.createElement(kind);
  element.className = name;
  element.textContent = text;
  return element;
}

// Fills a box with an element per token, from `make(token, i)`. Tokens of one word share a box without line
// breaks; scripts without spaces may break anywhere. An element that is no token stands alone.
function inWords(box, tokens, make) {
  let word = null;
  return tokens.map((token, i) => {
    const element = make(token, i);
    const text = typeof token === "string" ? token : "";
    if (!word || !JOINED.test(text) || word.textContent.length + text.length > LONGEST_WORD) {
      word = document.createElement("span");
      word.className = "word";
      box.append(word);
    }
    word.append(element);
    if (text.includes("\n")) box.append(document.createElement("br"));
    if (text.includes("\n") || typeof token !== "string") word = null;
    return element;
  });
}

// A prompt with the views of one image or video, where they follow each other, as one part.
function promptParts(prompt, views) {
  const parts = [];
  for (const token of prompt) {
    const last = parts.at(-1), medium = typeof token === "number" ? views[token].medium : "";
    if (medium && last?.medium === medium) last.views += 1;
    else parts.push(medium ? { medium, view: token, views: 1 } : token);
  }
  return parts;
}

// What the ends of the veil mean, and what the outline means. The clearest region is the one that most heads
// selected; `clearest` is their fraction.
function scaleOf(clearest, head, isOneLayer) {
  const who = head >= 0 ? "layers" : isOneLayer ? "heads" : "heads and layers";
  const one = head >= 0 ? "layer" : "head";
  if (clearest === 0) return ["nothing was selected", "selected"];
  if (clearest !== 1) {
    return [`selected by no ${one} … by ${percent(clearest)} of the ${who}, the most`, "by at least half as many"];
  }
  if (head >= 0 && isOneLayer) return ["not selected … selected", "selected"];
  return [`selected by no ${one} … by all ${who}`, `by at least half of the ${who}`];
}

// What was measured of a region, in lines.
function describedRegion(region, now, { layers, heads, denseHeads }, head, isOneLayer, isDense) {
  const share = now.share[region];
  let by = ` by ${percent(share)} of the heads and layers`;
  if (isOneLayer) by = head >= 0 ? ` by head ${head}` : ` by ${Math.round(share * heads)} of ${counted(heads, "head")}`;
  else if (head >= 0) by = ` by head ${head} in ${Math.round(share * layers)} of ${counted(layers, "layer")}`;
  const score = isOneLayer && share ? [`score ${decimal(now.score[region], 2)}`] : [];
  const mean = denseHeads === heads || head < 0 ? "" : ", mean of the heads";
  const gaze = [share ? `selected${by}` : "not selected", ...score, `attention ${percent(now.attention[region])}`];
  return [`Region ${region}`, ...(isDense ? [] : gaze), `dense attention ${percent(now.dense[region])}${mean}`];
}

// --- The address: what is shown, after "#" ---

const LETTERS = { t: "token", l: "layer", h: "head", v: "view" };

// "t=5&l=2&h=3" as {token: 5, layer: 2, head: 3}, and what is wrong with it. `sizes` is {token: how many}.
function fromAddress(text, sizes) {
  const found = {}, wrong = [];
  for (const [letter, value] of new URLSearchParams(text)) {
    const name = Object.hasOwn(LETTERS, letter) ? LETTERS[letter] : null, many = sizes[name];
    if (letter === "map" && ["dense", "difference"].includes(value)) found.map = value;
    else if (["l", "h"].includes(letter) && value === "all") found[name] = -1;
    else if (name && /^\d{1,9}$/.test(value) && Number(value) < many) found[name] = Number(value);
    else if (name) {
      const all = ["l", "h"].includes(letter) ? ", or all" : "";
      wrong.push(`${letter}=${value} must be a ${name} from 0 to ${many - 1}${all}`);
    } else wrong.push(`${letter}=${value} is unknown`);
  }
  return { found, wrong };
}

function toAddress(state, following) {
  const one = (number) => (number < 0 ? "all" : number);
  const view = following ? "" : `&v=${state.view}`;
  return `t=${state.token}&l=${one(state.layer)}&h=${one(state.head)}${view}` +
    (state.map === "difference" ? "&map=difference" : "");
}
