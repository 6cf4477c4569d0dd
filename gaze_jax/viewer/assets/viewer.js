(async () => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const { layers, heads, denseHeads, selectors, slots, regions, views, tokens } = data;
  const isDense = slots === 0;
  const PACE = 900; // milliseconds per word
  const ROWS = 8;
  const LONGEST_WORD = 16; // letters that fit the width of a phone in any font

  // --- Embedded data ---

  const KINDS = { f4: Float32Array, i4: Int32Array, i2: Int16Array, u1: Uint8Array };

  async function unpacked() {
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

  let numbers, images;
  try {
    numbers = await unpacked();
    images = await Promise.all(data.pictures.map(decoded));
  } catch (error) {
    // In a browser that is too old, the page already shows the message for it.
    if (error instanceof ReferenceError) throw error;
    $("problem").textContent = `This page is damaged (${error.message}); generate it again.`;
    return;
  }
  let cells = 0;
  for (const view of views) {
    view.cells = view.grid[0] * view.grid[1];
    view.regions = numbers.grids.subarray(cells, cells + view.cells);
    view.own = [...new Set(view.regions)];
    cells += view.cells;
  }

  // --- State ---

  const state = { token: 0, layer: data.layer, head: -1, view: 0, timer: 0 };

  function chosen(one, count) {
    return one >= 0 ? [one] : Array.from({ length: count }, (_, i) => i);
  }

  // Per region, means over the chosen layers and heads: the fraction of heads that selected it, their score,
  // and the fraction of attention that it received and would receive under dense attention.
  function measured() {
    const share = new Float32Array(regions), attention = new Float32Array(regions);
    const score = new Float32Array(regions), dense = new Float32Array(regions);
    const someLayers = chosen(state.layer, layers), someHeads = chosen(state.head, heads);
    const perSelector = heads / selectors;
    const queries = someLayers.length * someHeads.length;
    for (const layer of someLayers) {
      const query = state.token * layers + layer;
      for (const head of isDense ? [] : someHeads) {
        const from = (query * selectors + Math.floor(head / perSelector)) * slots;
        const to = (query * heads + head) * slots;
        const step = numbers.attentionLargest[query * heads + head] / 255;
        for (let j = 0; j < slots; j++) {
          const region = numbers.selected[from + j];
          if (region < 0) break;
          share[region] += 1;
          score[region] += numbers.scores[from + j] * numbers.scoreLargest[layer] / 32767;
          attention[region] += numbers.attention[to + j] * step;
        }
      }
      const someDense = denseHeads === 1 ? [0] : someHeads;
      for (const head of someDense) {
        const row = query * denseHeads + head, from = row * regions;
        const step = numbers.denseLargest[row] / 255 / someLayers.length / someDense.length;
        for (let r = 0; r < regions; r++) dense[r] += numbers.dense[from + r] * step;
      }
    }
    for (let r = 0; r < regions; r++) {
      score[r] /= share[r] || 1;
      share[r] /= queries;
      attention[r] /= queries;
    }
    return { share, attention, score, dense };
  }

  function entries() {
    const some = chosen(state.layer, layers), mean = [0, 0, 0, 0];
    for (const layer of some) {
      const from = (state.token * layers + layer) * 4;
      for (let kind = 0; kind < 4; kind++) mean[kind] += numbers.entries[from + kind] / some.length;
    }
    return mean;
  }

  const sum = (values, which) => which.reduce((total, r) => total + values[r], 0);
  const total = (values) => values.reduce((a, b) => a + b, 0);
  const percent = (share) => `${(100 * share).toFixed(share && share < 0.0995 ? 1 : 0)}\u00a0%`;
  const count = (number) => (Number.isInteger(number) ? String(number) : number.toFixed(1));

  // --- Parts of the page ---

  const INVISIBLE = /[\u0000-\u001f\u007f-\u00a0\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/;

  const JOINED = /^(\p{P}|[^\s\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}])/u;

  const hexadecimal = (letter) => letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");

  function visible(button, token) {
    const mark = (text) => {
      const span = document.createElement("span");
      span.className = "mark";
      span.textContent = text;
      button.append(span);
    };
    if (token === "") mark("∅");
    let first = true;
    for (const letter of token) {
      if (letter === "\n") mark("↵");
      else if (letter === " ") mark(first ? "·" : " ");
      else if (letter === "\t") mark("⇥");
      else if (INVISIBLE.test(letter)) mark(`U+${hexadecimal(letter)}`);
      else button.append(letter);
      first = false;
    }
  }

  function spoken(token) {
    return token.trim() || (token.includes("\n") ? "new line" : token ? "space" : "nothing");
  }

  // Tokens of one word share a box without line breaks; scripts without spaces may break anywhere.
  let word = null;
  const words = tokens.map((token, i) => {
    const button = document.createElement("button");
    button.type = "button";
    visible(button, token);
    if (!token.trim()) button.setAttribute("aria-label", spoken(token));
    button.addEventListener("click", () => go({ token: i }));
    if (!word || !JOINED.test(token) || word.textContent.length + token.length > LONGEST_WORD) {
      word = document.createElement("span");
      word.className = "word";
      $("answer").append(word);
    }
    word.append(button);
    if (token.includes("\n")) {
      $("answer").append(document.createElement("br"));
      word = null;
    }
    return button;
  });

  const frames = views.map((view, i) => {
    const button = document.createElement("button"), name = document.createElement("span");
    const share = document.createElement("span"), warm = document.createElement("span");
    button.type = "button";
    const image = images[view.picture], [x0, y0, x1, y1] = view.corners;
    // Set the shape before drawing, so that the layout does not move later.
    const shape = (x1 - x0) * image.naturalWidth / ((y1 - y0) * image.naturalHeight);
    view.thumb = canvas(Math.max(1, Math.round(90 * shape)), 90);
    name.className = "name";
    name.textContent = view.short;
    [share.className, warm.className] = ["share", "share warm"];
    share.append(document.createElement("span"));
    warm.append(document.createElement("span"));
    button.append(view.thumb, name, ...(isDense ? [warm] : [share, warm]));
    button.addEventListener("click", () => go({ view: i }));
    $("strip").append(button);
    return button;
  });

  function options(select, first, names) {
    [first, ...names].forEach((name, i) => select.append(new Option(name, String(i - 1))));
  }

  function fill() {
    const perSelector = heads / selectors;
    const names = Array.from({ length: heads }, (_, h) =>
      data.selectPer === "kv_head" ? `${h} (kv head ${Math.floor(h / perSelector)})` : String(h));
    options($("layer"), "all layers", Array.from({ length: layers }, (_, l) => String(l)));
    options($("head"), "all heads", names);
    document.title = `Gaze: ${data.question}`;
    $("question").textContent = data.question;
    $("model").textContent = data.model;
    $("budget").textContent = isDense ? "dense" :
      `${data.topK} of ${regions} regions per query, chosen per ${data.selectPer === "kv_head" ? "kv head" : "head"}`;
    $("gaze-figure").hidden = isDense;
    $("stage").classList.toggle("alone", isDense);
    for (const cell of document.querySelectorAll("th.gaze")) cell.hidden = isDense;
    for (const id of ["strip", "strip-keys", "bars", "of-view"]) $(id).hidden = views.length === 1;
    document.querySelector("th.in").hidden = views.length === 1;
    $("gaze-bar").hidden = isDense;
    $("mean-note").hidden = denseHeads === heads;
    drawLegends();
  }

  let stage = { view: -1 };

  function showStage(now, most) {
    const view = views[state.view];
    if (stage.view !== state.view) stage = { view: state.view, picture: prepared(images[view.picture], view, 560, Infinity) };
    const { picture } = stage;
    const line = Math.max(2, Math.round(picture.clear.width / 280));
    const got = sum(now.attention, view.own), would = sum(now.dense, view.own);
    $("view").textContent = view.title;
    const part = views.length > 1 ? `, ${percent(got)} here` : "";
    const densePart = views.length > 1 ? `, ${percent(would)} here` : "";
    $("gaze-note").textContent = `${percent(total(now.attention))} of attention on what was selected${part}`;
    const mean = denseHeads === heads || state.head < 0 ? "" : ", mean of all heads";
    const whole = percent(total(now.dense));
    $("dense-note").textContent = `${whole} of attention on all regions${densePart}${mean}`;
    $("most").textContent = percent(most);
    if (!isDense) {
      drawGaze($("gaze"), view, picture, now.share);
      outline($("gaze"), view, now.share, line);
      const some = view.own.filter((r) => now.share[r] > 0).length;
      $("gaze").setAttribute("aria-label", `${view.title}: ${some} of ${view.own.length} regions selected`);
    }
    drawDense($("dense"), view, picture, now.dense, most);
    $("dense").setAttribute("aria-label", `${view.title}: dense attention, ${percent(would)} of it here`);
  }

  function showStrip(now, most) {
    if (views.length === 1) return;
    const gaze = views.map((view) => sum(now.attention, view.own)), most1 = Math.max(...gaze);
    const dense = views.map((view) => sum(now.dense, view.own)), most2 = Math.max(...dense);
    views.forEach((view, i) => {
      const current = i === state.view, bars = frames[i].querySelectorAll(".share span");
      const widths = isDense ? [dense[i] / (most2 || 1)] : [gaze[i] / (most1 || 1), dense[i] / (most2 || 1)];
      widths.forEach((width, k) => { bars[k].style.width = `${100 * width}%`; });
      frames[i].setAttribute("aria-current", String(current));
      frames[i].tabIndex = current ? 0 : -1;
      const shares = isDense ? percent(dense[i]) : `Gaze ${percent(gaze[i])}, dense ${percent(dense[i])}`;
      frames[i].setAttribute("aria-label", `${view.title}: ${shares}`);
      frames[i].title = `${view.title}: ${shares}`;
    });
    reveal($("strip"), frames[state.view]);
    waiting = { now, most, views: new Set(views.keys()) };
    drawThumbs();
  }

  // A long video has many frames, few of them visible: draw only those.
  let waiting = { views: new Set() };

  function drawThumbs() {
    const { now, most } = waiting, box = $("strip"), width = box.clientWidth;
    const seen = [...waiting.views].filter((i) => {
      const left = frames[i].offsetLeft - box.scrollLeft;
      return left < 2 * width && left + frames[i].offsetWidth > -width;
    });
    for (const i of seen) {
      const view = views[i];
      waiting.views.delete(i);
      view.small ??= prepared(images[view.picture], view, 0, 248);
      if (isDense) drawDense(view.thumb, view, view.small, now.dense, most);
      else {
        drawGaze(view.thumb, view, view.small, now.share);
        outline(view.thumb, view, now.share, 3);
      }
    }
  }

  // Scrolls the box, never the page.
  function reveal(box, item) {
    if (item.offsetTop < box.scrollTop) box.scrollTop = item.offsetTop - 8;
    const below = item.offsetTop + item.offsetHeight - box.clientHeight;
    if (below > box.scrollTop) box.scrollTop = below + 8;
    const left = item.offsetLeft - box.scrollLeft;
    if (left < 0 || left + item.offsetWidth > box.clientWidth) {
      box.scrollLeft = item.offsetLeft + item.offsetWidth / 2 - box.clientWidth / 2;
    }
  }

  function showCounter() {
    const [visual, newline, context, text] = entries(), all = numbers.visual[state.token];
    $("visual").textContent = count(visual);
    $("visual-of").textContent = `of ${all} visual keys`;
    $("percent").textContent = all ? percent(visual / all) : "none yet";
    $("fill").style.width = `${all ? 100 * visual / all : 0}%`;
    $("newline").textContent = count(newline);
    $("context").textContent = count(context);
    $("text").textContent = count(text);
    $("summed").textContent = state.layer < 0 && layers > 1 ? " and the layers" : "";
  }

  function showTable(now) {
    const one = state.layer >= 0, by = isDense ? now.dense : now.attention;
    const ranked = [...by.keys()].filter((r) => by[r] > 0).sort((a, b) => by[b] - by[a]).slice(0, ROWS);
    document.querySelector("th.score").hidden = isDense || !one;
    $("rows").replaceChildren(...ranked.map((r) => {
      const row = document.createElement("tr"), homes = views.filter((view) => view.own.includes(r));
      const home = homes.length > 1 ? `${homes[0].short} to ${homes.at(-1).short}` : homes[0]?.short ?? "";
      const score = one ? [now.score[r].toFixed(2)] : [];
      const gaze = isDense ? [] : [percent(now.share[r]), ...score, percent(now.attention[r])];
      for (const text of [String(r), ...(views.length > 1 ? [home] : []), ...gaze, percent(now.dense[r])]) {
        const cell = document.createElement("td");
        if (text === home) cell.className = "in";
        cell.textContent = text;
        row.append(cell);
      }
      return row;
    }));
  }

  function show() {
    const now = measured();
    const most = now.dense.reduce((a, b) => Math.max(a, b), 0);
    if ($("follow").checked) {
      const by = isDense ? now.dense : now.attention;
      const sums = views.map((view) => sum(by, view.own));
      state.view = sums.indexOf(Math.max(...sums));
    }
    words.forEach((word, i) => {
      word.setAttribute("aria-current", String(i === state.token));
      word.tabIndex = i === state.token ? 0 : -1;
    });
    reveal($("answer"), words[state.token]);
    $("place").textContent = `${state.token + 1} of ${tokens.length}`;
    $("layer").value = String(state.layer);
    $("head").value = String(state.head);
    showCounter();
    showStage(now, most);
    showStrip(now, most);
    showTable(now);
    if (!state.timer) {
      const word = `Word ${state.token + 1} of ${tokens.length}, ${spoken(tokens[state.token])}`;
      $("status").textContent = `${word}: ${$("visual").textContent} ${$("visual-of").textContent}`;
    }
  }

  // --- Interaction ---

  const within = (value, low, high) => Math.min(Math.max(value, low), high);

  function go(change) {
    if ("view" in change) $("follow").checked = false;
    if ("token" in change && document.activeElement?.closest("#answer")) {
      words[within(change.token, 0, tokens.length - 1)].focus({ preventScroll: true });
    }
    if ("view" in change && document.activeElement?.closest("#strip")) {
      frames[within(change.view, 0, views.length - 1)].focus({ preventScroll: true });
    }
    Object.assign(state, change);
    state.token = within(state.token, 0, tokens.length - 1);
    state.layer = within(state.layer, -1, layers - 1);
    state.view = within(state.view, 0, views.length - 1);
    show();
  }

  function play(on) {
    clearInterval(state.timer);
    if (on && state.token === tokens.length - 1) state.token = 0;
    state.timer = on ? setInterval(() => {
      go({ token: state.token + 1 });
      if (state.token === tokens.length - 1) play(false);
    }, PACE) : 0;
    $("play").setAttribute("aria-pressed", String(on));
    $("play").setAttribute("aria-label", on ? "Pause" : "Play");
    $("play").title = on ? "Pause (space)" : "Play (space)";
    show();
  }

  const KEYS = {
    ArrowLeft: () => go({ token: state.token - 1 }),
    ArrowRight: () => go({ token: state.token + 1 }),
    ArrowUp: () => go({ layer: state.layer + 1 }),
    ArrowDown: () => go({ layer: state.layer - 1 }),
    Home: () => go({ token: 0 }),
    End: () => go({ token: tokens.length - 1 }),
    ",": () => go({ view: state.view - 1 }),
    ".": () => go({ view: state.view + 1 }),
    " ": () => play(!state.timer),
  };

  // Words and frames are selected with Enter, because the space bar always starts and stops playing.
  const onChoice = (at) => at.closest("#answer, #strip") !== null;

  document.addEventListener("keydown", (event) => {
    const at = event.target;
    // Selects and scrolling boxes use the arrow keys themselves, and buttons the space bar.
    if (event.ctrlKey || event.altKey || event.metaKey || at instanceof HTMLSelectElement) return;
    if (at.closest(".scroll")) return;
    const button = at instanceof HTMLButtonElement || at instanceof HTMLInputElement;
    if (event.key === " " && button && !onChoice(at)) return;
    if (!Object.hasOwn(KEYS, event.key)) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  document.addEventListener("keyup", (event) => {
    if (event.key === " " && onChoice(event.target)) event.preventDefault(); // Firefox would click
  });
  $("back").addEventListener("click", KEYS.ArrowLeft);
  $("next").addEventListener("click", KEYS.ArrowRight);
  $("play").addEventListener("click", () => play(!state.timer));
  $("layer").addEventListener("change", () => go({ layer: Number($("layer").value) }));
  $("head").addEventListener("change", () => go({ head: Number($("head").value) }));
  $("follow").addEventListener("change", show);
  $("strip").addEventListener("scroll", drawThumbs, { passive: true });
  addEventListener("resize", drawThumbs);

  fill();
  $("problem").hidden = true;
  $("main").hidden = false;
  show();
})();
