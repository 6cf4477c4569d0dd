"use strict";

// What a reader does with the page: choosing, pointing, playing, saving, and the address.

const PACE = 900; // milliseconds per word

function controlled(ui) {
  const { data, views, state, isDense, words, frames, show } = ui;
  const { layers, heads, tokens } = data;

  const within = (value, low, high) => Math.min(Math.max(value, low), high);

  ui.go = (change) => {
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
    state.head = within(state.head, -1, heads - 1);
    state.view = within(state.view, 0, views.length - 1);
    if ("layer" in change) $("opened").hidden = true;
    show();
    remember();
  };

  // Browsers limit how often the address may change, so it waits until a key is no longer held down.
  let late = 0;

  function remember() {
    clearTimeout(late);
    late = setTimeout(() => {
      // A page in a notebook's frame has no address of its own.
      if (location.protocol === "about:") return;
      history.replaceState(null, "", `#${toAddress(state, $("follow").checked)}`);
    }, 150);
  }

  function recall() {
    const sizes = { token: tokens.length, layer: layers, head: heads, view: views.length };
    const { found, wrong } = fromAddress(location.hash.slice(1), sizes);
    if (found.map === "difference" && isDense) delete found.map;
    if ("view" in found) $("follow").checked = false;
    if ("layer" in found) $("opened").hidden = true;
    Object.assign(state, found);
    $("notice").textContent = `This page does not have what the address asks for: ${wrong.join("; ")}.`;
    $("notice").hidden = wrong.length === 0;
  }

  for (const target of [$("gaze"), $("dense")]) {
    target.addEventListener("pointermove", (event) => {
      const region = regionAt(views[state.view], ...placeIn(event)), listed = state.region === region;
      ui.point(region);
      if (!listed) ui.showTable();
      const many = chosen(state.head, heads).length;
      const lines = describedRegion(region, ui.shown.now, state.head, many, ui.isOneLayer(), isDense);
      hint($("tip"), event, lines);
    });
    target.addEventListener("pointerleave", () => {
      $("tip").hidden = true;
      ui.point(-1);
      ui.showTable();
    });
  }
  $("rows").addEventListener("pointerover", (event) => {
    ui.point(Number(event.target.closest("tr")?.dataset.region ?? -1));
  });
  $("rows").addEventListener("pointerleave", () => ui.point(-1));

  function cellAt(event) {
    const { columns, values } = ui.shown.overview, [x, y] = placeIn(event), rows = values.length / columns;
    const head = within(Math.floor(x * columns), 0, columns - 1);
    const layer = within(Math.floor(y * rows), 0, rows - 1);
    return { layer, head: columns === heads ? head : -1, value: values[layer * columns + head] };
  }

  $("overview").addEventListener("pointermove", (event) => {
    const { layer, head, value } = cellAt(event);
    const name = `Layer ${layer}, ${head < 0 ? "all heads" : `head ${head}`}`;
    hint($("tip"), event, [name, `attention ${percent(value)}`]);
  });
  $("overview").addEventListener("pointerleave", () => { $("tip").hidden = true; });
  $("overview").addEventListener("click", (event) => {
    const { layer, head } = cellAt(event);
    ui.go({ layer, head: layer === state.layer && head === state.head ? -1 : head });
  });

  let timer = 0;

  function play(on) {
    clearInterval(timer);
    if (on && state.token === tokens.length - 1) state.token = 0;
    ui.quiet = on; // a screen reader cannot keep up
    timer = on ? setInterval(() => {
      ui.go({ token: state.token + 1 });
      if (state.token === tokens.length - 1) play(false);
    }, PACE) : 0;
    $("play").setAttribute("aria-pressed", String(on));
    $("play").setAttribute("aria-label", on ? "Pause" : "Play");
    $("play").title = on ? "Pause (space)" : "Play (space)";
    ui.go({});
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const paint = (theme) => { document.documentElement.dataset.theme = theme; };
  const follow = () => paint(dark.matches ? "dark" : "light");

  function turn() {
    dark.removeEventListener("change", follow);
    paint(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  }

  const compare = () => { if (!isDense) ui.go({ map: state.map === "dense" ? "difference" : "dense" }); };
  const all = (number) => (number < 0 ? "all" : String(number));
  const fileName = () => `gaze-t${state.token}-l${all(state.layer)}-h${all(state.head)}`;

  function saveNumbers() {
    const at = [String(state.token), all(state.layer), all(state.head)];
    const titles = ui.homes.map((home) => home.map((view) => view.title).join("; "));
    const table = numbersOf(ui.shown.now, at, titles, state.layer >= 0, isDense);
    saved(new Blob([asCsv(table)], { type: "text/csv" }), `${fileName()}.csv`);
  }

  async function savePictures() {
    const where = `layer ${all(state.layer)}, head ${all(state.head)}`;
    const word = `Word ${state.token + 1} of ${tokens.length}: ${spoken(tokens[state.token])}`;
    const lines = [`${data.model}, ${$("budget").textContent}`, `${word}; ${where}; ${views[state.view].title}`];
    const legend = `${$("least").textContent} to ${$("most").textContent} in a region`;
    const text = (id) => $(id).textContent;
    const map = { title: text("map-title"), canvas: $("dense"), note: `${text("dense-note")}; ${legend}` };
    const gaze = { title: "Gaze", canvas: $("gaze"), note: `${text("gaze-note")}; ${text("clearest")}` };
    saved(await asPicture(data.question, lines, isDense ? [map] : [gaze, map]), `${fileName()}.png`);
  }

  const KEYS = {
    ArrowLeft: () => ui.go({ token: state.token - 1 }),
    ArrowRight: () => ui.go({ token: state.token + 1 }),
    ArrowUp: () => ui.go({ layer: state.layer - 1 }),
    ArrowDown: () => ui.go({ layer: state.layer + 1 }),
    "Shift ArrowUp": () => ui.go({ head: state.head - 1 }),
    "Shift ArrowDown": () => ui.go({ head: state.head + 1 }),
    Home: () => ui.go({ token: 0 }),
    End: () => ui.go({ token: tokens.length - 1 }),
    ",": () => ui.go({ view: state.view - 1 }),
    ".": () => ui.go({ view: state.view + 1 }),
    d: compare,
    t: turn,
    "?": () => $("keys").showModal(),
    " ": () => play(!timer),
  };

  // Words and frames are selected with Enter, because the space bar always starts and stops playing.
  const onChoice = (at) => at.closest("#answer, #strip") !== null;

  document.addEventListener("keydown", (event) => {
    const at = event.target;
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if ($("keys").open) {
      if (event.key === "?") $("keys").close();
      return;
    }
    // Selects, sliders and scrolling boxes use these keys themselves, and buttons the space bar.
    if (at instanceof HTMLSelectElement || at.closest(".scroll, [type=range], summary")) return;
    const button = at instanceof HTMLButtonElement || at instanceof HTMLInputElement;
    if (event.key === " " && button && !onChoice(at)) return;
    const key = event.shiftKey && event.key.startsWith("Arrow") ? `Shift ${event.key}` : event.key;
    if (!Object.hasOwn(KEYS, key)) return;
    event.preventDefault();
    KEYS[key]();
  });
  document.addEventListener("keyup", (event) => {
    if (event.key === " " && onChoice(event.target)) event.preventDefault(); // Firefox would click
  });
  $("back").addEventListener("click", KEYS.ArrowLeft);
  $("next").addEventListener("click", KEYS.ArrowRight);
  $("play").addEventListener("click", () => play(!timer));
  $("layer").addEventListener("change", () => ui.go({ layer: Number($("layer").value) }));
  $("head").addEventListener("change", () => ui.go({ head: Number($("head").value) }));
  $("map").addEventListener("change", () => ui.go({ map: $("map").value }));
  $("opacity").addEventListener("input", ui.showStage);
  $("follow").addEventListener("change", () => ui.go({}));
  $("png").addEventListener("click", savePictures);
  $("csv").addEventListener("click", saveNumbers);
  $("theme").addEventListener("click", turn);
  $("help").addEventListener("click", KEYS["?"]);
  $("strip").addEventListener("scroll", ui.drawThumbs, { passive: true });
  addEventListener("resize", ui.drawThumbs);
  addEventListener("hashchange", () => {
    recall();
    show();
  });

  follow();
  dark.addEventListener("change", follow);
  recall();
  $("problem").hidden = true;
  $("main").hidden = false;
  show();
}

filled().then((ui) => { if (ui) controlled(ui); });
