"use strict";

// What a page embeds, and what is computed from it. `page` is {data, numbers}: the JSON and its arrays;
// `state` is {token, layer, head}, where -1 means all layers or all heads.

const KINDS = { f4: Float32Array, i4: Int32Array, i2: Int16Array, u1: Uint8Array };

async function unpacked(data) {
  const text = atob(data.arrays);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const arrays = {};
  for (const [name, [kind, offset, count]] of Object.entries(data.layout)) {
    arrays[name] = new KINDS[kind](buffer, offset, count);
  }
  return arrays;
}

async function decoded(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

const sum = (values, which) => which.reduce((total, r) => total + values[r], 0);
const total = (values) => values.reduce((a, b) => a + b, 0);
const largest = (values) => values.reduce((a, b) => Math.max(a, b), 0);

function chosen(one, count) {
  return one >= 0 ? [one] : Array.from({ length: count }, (_, i) => i);
}

// Calls with each region that a head selected, its place in `scores`, and the head's attention on it.
function eachSelected({ data, numbers }, token, layer, head, call) {
  const { layers, heads, selectors, slots } = data, query = token * layers + layer;
  const from = (query * selectors + Math.floor(head * selectors / heads)) * slots;
  const to = (query * heads + head) * slots;
  const step = numbers.attentionLargest[query * heads + head] / 255;
  for (let j = 0; j < slots; j++) {
    const region = numbers.selected[from + j];
    if (region < 0) break;
    call(region, from + j, numbers.attention[to + j] * step);
  }
}

// Per region, means over the chosen layers and heads: the fraction of heads that selected it, their score,
// and the fraction of attention that it received and would receive under dense attention.
function measured(page, state) {
  const { data, numbers } = page, { layers, heads, denseHeads, slots, regions } = data;
  const share = new Float32Array(regions), attention = new Float32Array(regions);
  const score = new Float32Array(regions), dense = new Float32Array(regions);
  const someLayers = chosen(state.layer, layers), someHeads = chosen(state.head, heads);
  const queries = someLayers.length * someHeads.length;
  for (const layer of someLayers) {
    for (const head of slots ? someHeads : []) {
      eachSelected(page, state.token, layer, head, (region, slot, part) => {
        share[region] += 1;
        score[region] += numbers.scores[slot] * numbers.scoreLargest[layer] / 32767;
        attention[region] += part;
      });
    }
    const someDense = denseHeads === 1 ? [0] : someHeads;
    for (const head of someDense) {
      const row = (state.token * layers + layer) * denseHeads + head, from = row * regions;
      const step = numbers.denseLargest[row] / 255 / someLayers.length / someDense.length;
      for (let r = 0; r < regions; r++) dense[r] += numbers.dense[from + r] * step;
    }
  }
  for (let r = 0; r < regions; r++) {
    score[r] /= share[r] || 1;
    share[r] /= queries;
    attention[r] /= queries;
  }
  const difference = isComparable(page, state) ? attention.map((part, r) => part - dense[r]) : null;
  return { share, attention, score, dense, difference };
}

// Whether attention and dense attention are of the same heads: a large page holds the latter as a mean.
const isComparable = ({ data }, { head }) => data.slots > 0 && (data.denseHeads === data.heads || head < 0);

// Visual, newline, context and text keys per query, means over the chosen layers. The visual keys are those
// of the chosen head, if there is one and the trace tells them; else a mean over the heads.
function entriesOf(page, state) {
  const { data, numbers } = page, some = chosen(state.layer, data.layers), mean = [0, 0, 0, 0];
  for (const layer of some) {
    const from = (state.token * data.layers + layer) * 4;
    for (let kind = 0; kind < 4; kind++) mean[kind] += numbers.entries[from + kind];
  }
  if (countsHeads(page) && state.head >= 0) {
    mean[0] = 0;
    for (const layer of some) {
      eachSelected(page, state.token, layer, state.head, (region) => { mean[0] += numbers.regionKeys[region]; });
    }
  }
  return mean.map((sum) => sum / some.length);
}

const countsHeads = ({ data, numbers }) => data.slots > 0 && numbers.regionKeys !== undefined;

// For one token, [layers * columns]: the fraction of a head's attention on what it selected; in a dense run
// on all regions, in one column if the page holds means over the heads.
function overviewOf(page, token) {
  const { data, numbers } = page, { layers, heads, denseHeads, slots, regions } = data;
  const columns = slots ? heads : denseHeads, values = new Float32Array(layers * columns);
  for (let layer = 0; layer < layers; layer++) {
    for (let column = 0; column < columns; column++) {
      const cell = layer * columns + column;
      if (slots) eachSelected(page, token, layer, column, (_, __, part) => { values[cell] += part; });
      else {
        const row = token * values.length + cell;
        const bytes = total(numbers.dense.subarray(row * regions, (row + 1) * regions));
        values[cell] = bytes * numbers.denseLargest[row] / 255;
      }
    }
  }
  return { columns, values };
}
