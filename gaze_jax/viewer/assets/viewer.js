"use strict";

// The parts of the page, filled from its data and shown for a state. What a reader does is in controls.js.

const $ = (id) => document.getElementById(id);

// Reads the data, fills the page and returns what controls.js needs; null if the page is damaged.
async function filled() {
  const data = JSON.parse($("data").textContent);
  const { layers, heads, denseHeads, selectors, slots, regions, views, tokens } = data;
  const isDense = slots === 0;
  const ROWS = 8;

  let page, images;
  try {
    page = { data, numbers: await unpacked(data) };
    images = await Promise.all(data.pictures.map(decoded));
  } catch (error) {
    // In a browser that is too old, the page already shows the message for it.
    if (error instanceof ReferenceError) throw error;
    $("problem").textContent = `This page is damaged (${error.message}); generate it again.`;
    return null;
  }
  const { numbers } = page;
  let cells = 0;
  for (const view of views) {
    view.cells = view.grid[0] * view.grid[1];
    view.regions = numbers.grids.subarray(cells, cells + view.cells);
    view.own = [...new Set(view.regions)];
    cells += view.cells;
  }
  const homes = Array.from({ length: regions }, () => []); // the views that each region lies in
  for (const view of views) for (const region of view.own) homes[region].push(view);

  // --- State ---

  const state = { token: 0, layer: data.layer, head: -1, view: 0, region: -1, map: "dense" };
  const ui = { data, views, homes, state, isDense, shown: null, quiet: false };

  const isOneLayer = () => state.layer >= 0 || layers === 1;

  // --- Parts of the page ---

  const words = inWords($("answer"), tokens, (token, i) => {
    const button = document.createElement("button");
    button.type = "button";
    visible(button, token);
    if (!token.trim()) button.setAttribute("aria-label", spoken(token));
    if (numbers.probabilities) {
      button.className = "likely";
      button.style.setProperty("--likely", `${100 * numbers.probabilities[i]}%`);
      button.title = `probability ${percent(numbers.probabilities[i])}`;
    }
    button.addEventListener("click", () => ui.go({ token: i }));
    return button;
  });

  function fillPrompt() {
    inWords($("read"), promptParts(data.prompt, views), (part) => {
      if (typeof part === "string") {
        const token = labelled("span", "token", "");
        visible(token, part);
        return token;
      }
      const button = labelled("button", "medium", part.views > 1 ? `${part.medium} × ${part.views}` : part.medium);
      button.type = "button";
      button.addEventListener("click", () => ui.go({ view: part.view }));
      return button;
    });
    const text = data.prompt.filter((token) => typeof token === "string").length;
    $("prompt-size").textContent = `${counted(text, "token")} of text, ${counted(data.prompt.length - text, "view")}`;
    $("prompt").hidden = data.prompt.length === 0;
  }

  const frames = views.map((view, i) => {
    const button = document.createElement("button");
    const share = labelled("span", "share", ""), warm = labelled("span", "share warm", "");
    button.type = "button";
    const image = images[view.picture], [x0, y0, x1, y1] = view.corners;
    // Set the shape before drawing, so that the layout does not move later.
    view.shape = (x1 - x0) * image.naturalWidth / ((y1 - y0) * image.naturalHeight);
    view.thumb = canvas(Math.max(1, Math.round(90 * view.shape)), 90);
    share.append(document.createElement("span"));
    warm.append(document.createElement("span"));
    button.append(view.thumb, labelled("span", "name", view.short), ...(isDense ? [warm] : [share, warm]));
    button.addEventListener("click", () => ui.go({ view: i }));
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
    const budget = Array.isArray(data.topK) ? [...new Set(data.topK)].sort((a, b) => a - b) : [data.topK];
    const often = budget.length > 1 ? `${budget[0]} to ${budget.at(-1)}` : budget[0];
    $("budget").textContent = isDense ? "dense" :
      `${often} of ${regions} regions per query, chosen per ${data.selectPer === "kv_head" ? "kv head" : "head"}`;
    $("stage").classList.toggle("alone", isDense);
    for (const part of document.querySelectorAll(".gaze, #gaze-figure, #gaze-bar, #map-label")) part.hidden = isDense;
    for (const id of ["strip", "bars", "of-view"]) $(id).hidden = views.length === 1;
    for (const part of document.querySelectorAll("th.in, #keys .views")) part.hidden = views.length === 1;
    $("mean-note").hidden = denseHeads === heads;
    $("chooser").hidden = layers === 1 && heads === 1;
    // A page in a notebook's frame has no address of its own.
    $("address-note").hidden = location.protocol === "about:";
    $("probability-note").hidden = $("probability").hidden = !numbers.probabilities;
    fillPrompt();
  }

  let stage = { view: -1 };

  function showStage() {
    const { now, most, clearest, least } = ui.shown, view = views[state.view], { map } = state;
    const opacity = Number($("opacity").value) / 100;
    if (stage.view !== state.view) {
      stage = { view: state.view, picture: prepared(images[view.picture], view, 560, Infinity) };
      $("stage").style.setProperty("--shape", String(view.shape));
    }
    const { picture } = stage;
    const line = Math.max(2, Math.round(picture.clear.width / 280));
    const got = sum(now.attention, view.own), would = sum(now.dense, view.own);
    const here = (part) => (views.length > 1 ? `, ${part < 0 ? signed(part) : percent(part)} here` : "");
    $("view").textContent = view.title;
    $("gaze-note").textContent = `${percent(total(now.attention))} of attention on what was selected${here(got)}`;
    const mean = denseHeads === heads || state.head < 0 ? "" : ", mean of all heads";
    const isMap = map === "dense";
    $("map-title").textContent = isMap ? "Dense" : "Gaze minus dense";
    const note = isMap ? `${percent(total(now.dense))} of attention on all regions${here(would)}` :
      `${signed(total(now.difference))} of attention${here(got - would)}`;
    $("dense-note").textContent = note + mean;
    $("least").textContent = isMap ? "0" : signed(-most);
    $("colours").hidden = isMap;
    $("most").textContent = isMap ? percent(most) : signed(most);
    if (!isDense) {
      drawGaze($("gaze"), view, picture, (r) => now.share[r] / (clearest || 1));
      outline($("gaze"), view, (r) => clearest > 0 && now.share[r] >= least, line, GAZE_OUTLINE);
      const some = view.own.filter((r) => now.share[r] > 0).length;
      $("gaze").setAttribute("aria-label", `${view.title}: ${some} of ${view.own.length} regions selected`);
      [$("clearest").textContent, $("outlined").textContent] = scaleOf(clearest, state.head, isOneLayer());
    }
    const colour = isMap ? (r) => heat(now.dense[r] / (most || 1), opacity) :
      (r) => lessOrMore(now.difference[r] / (most || 1), opacity);
    drawMap($("dense"), view, picture, colour, opacity);
    $("dense").setAttribute("aria-label", `${view.title}: ${$("map-title").textContent}, ${note}`);
    drawLegends(map, opacity);
    for (const target of [$("gaze"), $("dense")]) {
      const is = (r) => r === state.region;
      if (state.region >= 0) outline(target, view, is, line + 2, "black");
      if (state.region >= 0) outline(target, view, is, line, "white");
    }
  }

  function showStrip() {
    if (views.length === 1) return;
    const { now } = ui.shown;
    const gaze = views.map((view) => sum(now.attention, view.own)), most1 = largest(gaze);
    const dense = views.map((view) => sum(now.dense, view.own)), most2 = largest(dense);
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
    waiting = new Set(views.keys());
    drawThumbs();
  }

  // A long video has many frames, few of them visible: draw only those.
  let waiting = new Set();

  function drawThumbs() {
    const box = $("strip"), width = box.clientWidth;
    const seen = [...waiting].filter((i) => {
      const left = frames[i].offsetLeft - box.scrollLeft;
      return left < 2 * width && left + frames[i].offsetWidth > -width;
    });
    for (const i of seen) {
      const view = views[i], { now, clearest, least, mostDense } = ui.shown;
      waiting.delete(i);
      view.small ??= prepared(images[view.picture], view, 0, 248);
      if (isDense) drawMap(view.thumb, view, view.small, (r) => heat(now.dense[r] / (mostDense || 1), 0.7), 0.7);
      else {
        drawGaze(view.thumb, view, view.small, (r) => now.share[r] / (clearest || 1));
        outline(view.thumb, view, (r) => clearest > 0 && now.share[r] >= least, 3, GAZE_OUTLINE);
      }
    }
  }

  function showCounter() {
    const [visual, newline, context, text] = entriesOf(page, state), all = numbers.visual[state.token];
    const own = countsHeads(page) && state.head >= 0;
    $("visual").textContent = count(visual);
    $("visual-of").textContent = `of ${all} visual keys`;
    $("whose").textContent = own ? ` of head ${state.head}` : " per query";
    $("percent").textContent = all ? percent(visual / all) : "none yet";
    $("fill").style.width = `${all ? 100 * visual / all : 0}%`;
    $("newline").textContent = count(newline);
    $("context").textContent = count(context);
    $("text").textContent = count(text);
    const over = [...(own ? [] : ["heads"]), ...(state.layer < 0 && layers > 1 ? ["layers"] : [])];
    $("counts-note").textContent = over.length ? `Counts of keys are means over the ${over.join(" and the ")}.` :
      `Counts of keys are those of head ${state.head} in layer ${Math.max(state.layer, 0)}.`;
  }

  const homeOf = ([first, ...more]) => (more.length ? `${first.short} to ${more.at(-1).short}` : first?.short ?? "");

  function showTable() {
    const { now } = ui.shown, one = isOneLayer(), by = isDense ? now.dense : now.attention;
    const ranked = [...by.keys()].filter((r) => by[r] > 0).sort((a, b) => by[b] - by[a]).slice(0, ROWS);
    if (state.region >= 0 && !ranked.includes(state.region)) ranked.push(state.region);
    document.querySelector("th.score").hidden = isDense || !one;
    $("dense-head").textContent = denseHeads === heads || state.head < 0 ? "Dense" : "Dense (mean of heads)";
    const focused = document.activeElement?.closest("#rows button")?.textContent;
    $("nothing").hidden = ranked.length > 0;
    $("rows").replaceChildren(...ranked.map((r) => {
      const row = document.createElement("tr"), cell = document.createElement("td");
      const button = labelled("button", "region", String(r));
      const score = one ? [now.share[r] > 0 ? decimal(now.score[r], 2) : ""] : [];
      const gaze = isDense ? [] : [percent(now.share[r]), ...score, percent(now.attention[r])];
      const difference = isDense ? [] : [now.difference ? signed(now.difference[r]) : ""];
      button.type = "button";
      button.addEventListener("click", () => {
        if (homes[r].length && !homes[r].includes(views[state.view])) ui.go({ view: views.indexOf(homes[r][0]) });
      });
      button.addEventListener("focus", () => point(r));
      button.addEventListener("blur", () => point(-1));
      cell.append(button);
      row.dataset.region = String(r);
      row.append(cell);
      if (views.length > 1) row.append(labelled("td", "in", homeOf(homes[r])));
      row.append(...[...gaze, percent(now.dense[r]), ...difference].map((text) => labelled("td", "", text)));
      return row;
    }));
    for (const button of focused ? $("rows").querySelectorAll("button") : []) {
      if (button.textContent === focused) button.focus({ preventScroll: true });
    }
    light();
  }

  // Points at a region, or at none: -1.
  function point(region) {
    if (region === state.region) return;
    state.region = region;
    showStage();
    light();
  }

  // Marks the region that is pointed at, in the table and the strip.
  function light() {
    for (const row of $("rows").children) row.classList.toggle("lit", Number(row.dataset.region) === state.region);
    views.forEach((view, i) => frames[i].classList.toggle("lit", view.own.includes(state.region)));
  }

  function showOverview() {
    const overview = overviewOf(page, state.token), most = largest(overview.values);
    drawOverview($("overview"), overview, state.layer, state.head, most);
    ui.shown.overview = overview;
    const what = isDense ? "all regions" : "what it selected";
    const whose = overview.columns === heads ? "a head’s attention" : "attention, mean of the heads,";
    const how = overview.columns === heads ? "Click to choose, again for all heads." : "Click to choose a layer.";
    $("overview-note").textContent = `Dark to light: 0 to ${percent(most)} of ${whose} on ${what}. ${how}`;
    $("overview").setAttribute("aria-label", `Attention of ${layers} layers and ${overview.columns} heads on ${what}`);
  }

  function measure() {
    if (!isComparable(page, state)) state.map = "dense";
    $("map").options[1].disabled = !isComparable(page, state);
    const now = measured(page, state), mostDense = largest(now.dense);
    const most = state.map === "dense" ? mostDense : largest(now.difference.map(Math.abs));
    const clearest = largest(now.share);
    ui.shown = { now, most, mostDense, clearest, least: clearest / 2 };
  }

  function show() {
    measure();
    const { now } = ui.shown;
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
    const likely = numbers.probabilities?.[state.token];
    // Not disabled: that would take the focus and its keys away.
    $("back").setAttribute("aria-disabled", String(state.token === 0));
    $("next").setAttribute("aria-disabled", String(state.token === tokens.length - 1));
    $("place").textContent = `${state.token + 1} of ${tokens.length}`;
    $("probability").textContent = likely === undefined ? "" : `probability ${percent(likely)}`;
    for (const name of ["layer", "head", "map"]) $(name).value = String(state[name]);
    showCounter();
    showStage();
    showStrip();
    showTable();
    showOverview();
    if (!ui.quiet) {
      const word = `Word ${state.token + 1} of ${tokens.length}, ${spoken(tokens[state.token])}`;
      $("status").textContent = `${word}: ${$("visual").textContent} ${$("visual-of").textContent}`;
    }
  }

  fill();
  $("opened").textContent = data.opened;
  $("opened").hidden = data.opened === "";
  return Object.assign(ui, { words, frames, show, showStage, showTable, drawThumbs, point, isOneLayer });
}
