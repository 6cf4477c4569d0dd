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
    $("notice").hidden = true;
    show();
    if (!$("tip").hidden) pointAgain();
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
    if ("layer" in found) $("opened").hidden = true;
    $("follow").checked = !("view" in found);
    // What an address does not say is as at first, so that one address always shows the same.
    Object.assign(state, { token: 0, layer: data.layer, head: -1, view: 0, map: "dense" }, found);
    $("notice").textContent = `This page does not have what the address asks for: ${wrong.join("; ")}.`;
    $("notice").hidden = wrong.length === 0;
  }

  let pointAgain = () => {}; // what the pointer rests on has other numbers when something else is chosen

  function pointAt(event) {
    const place = placeIn(event), { clientX, clientY } = event;
    pointAgain = () => {
      const region = regionAt(views[state.view], ...place), listed = state.region === region;
      ui.point(region);
      if (!listed) ui.showTable();
      const lines = describedRegion(region, ui.shown.now, data, state.head, ui.isOneLayer(), isDense);
      hint($("tip"), { clientX, clientY }, lines);
    };
    pointAgain();
  }

  function pointAway() {
    $("tip").hidden = true;
    if (state.region < 0) return;
    ui.point(-1);
    ui.showTable();
  }

  for (const target of [$("gaze"), $("dense")]) {
    target.addEventListener("pointermove", pointAt);
    target.addEventListener("click", pointAt); // a finger does not move
    target.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") pointAway(); });
  }
  document.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "touch" && !event.target.closest(".picture, #rows")) pointAway();
  });
  $("rows").addEventListener("pointerover", (event) => {
    ui.point(Number(event.target.closest("tr")?.dataset.region ?? -1));
  });
  $("rows").addEventListener("pointerleave", () => ui.point(-1));

  function cellAt(event) {
    const { columns, values } = ui.shown.overview, [x, y] = placeIn(event), rows = values.length / columns;
    const column = within(Math.floor(x * columns), 0, columns - 1);
    const layer = within(Math.floor(y * rows), 0, rows - 1);
    return { layer, column, isOfHead: columns === heads };
  }

  $("overview").addEventListener("pointermove", (event) => {
    const { layer, column, isOfHead } = cellAt(event), { clientX, clientY } = event;
    pointAgain = () => {
      const { columns, values } = ui.shown.overview;
      const name = `Layer ${layer}, ${isOfHead ? `head ${column}` : "all heads"}`;
      hint($("tip"), { clientX, clientY }, [name, `attention ${percent(values[layer * columns + column])}`]);
    };
    pointAgain();
  });
  $("overview").addEventListener("pointerleave", () => { $("tip").hidden = true; });
  $("overview").addEventListener("click", (event) => {
    const { layer, column, isOfHead } = cellAt(event);
    const again = layer === state.layer && column === state.head;
    ui.go(isOfHead ? { layer, head: again ? -1 : column } : { layer });
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

  const compare = () => {
    if (!$("map").options[1].disabled) ui.go({ map: state.map === "dense" ? "difference" : "dense" });
  };
  const all = (number) => (number < 0 ? "all" : String(number));
  const fileName = () => `gaze-t${state.token}-l${all(state.layer)}-h${all(state.head)}`;

  function saveNumbers() {
    const at = [String(state.token), all(state.layer), all(state.head)];
    const titles = ui.homes.map((home) => home.map((view) => view.title).join("; "));
    const table = numbersOf(ui.shown.now, at, titles, ui.isOneLayer(), isDense);
    saved(new Blob([asCsv(table)], { type: "text/csv" }), `${fileName()}.csv`);
  }

  async function savePictures() {
    const where = `layer ${all(state.layer)}, head ${all(state.head)}`;
    const word = `Word ${state.token + 1} of ${tokens.length}: ${spoken(tokens[state.token])}`;
    const lines = [`${data.model}, ${$("budget").textContent}`, `${word}; ${where}; ${views[state.view].title}`];
    const text = (id) => $(id).textContent, colours = state.map === "dense" ? "" : text("colours");
    const legend = `${text("least")} to ${text("most")} in a region${colours}`;
    const scale = `${text("clearest")}; outlined: ${text("outlined")}`;
    const gaze = { title: "Gaze", canvas: $("gaze"), ramp: $("veil"), note: `${text("gaze-note")}; ${scale}` };
    const note = `${text("dense-note")}; ${legend}`;
    const map = { title: text("map-title"), canvas: $("dense"), ramp: $("heat"), note };
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
    ",": () => { if (views.length > 1) ui.go({ view: state.view - 1 }); },
    ".": () => { if (views.length > 1) ui.go({ view: state.view + 1 }); },
    d: compare,
    t: turn,
    "?": () => $("keys").showModal(),
    " ": () => play(!timer),
  };

  // Words and frames are selected with Enter, because the space bar always starts and stops playing.
  const onChoice = (at) => at.closest("#answer, #strip") !== null;

  // Keys that an element with the focus uses itself.
  function ownKeys(at) {
    if (at instanceof HTMLSelectElement) return /^(Arrow(Up|Down)|Home|End|[ d])$/; // letters choose by name
    if (at.closest("[type=range]")) return /^(Arrow.*|Home|End)$/;
    if (at.matches(".scroll")) return /^(Arrow.*|Home|End| )$/;
    return at.closest("summary") ? /^ $/ : null;
  }

  document.addEventListener("keydown", (event) => {
    const at = event.target;
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if ($("keys").open) {
      if (event.key === "?") $("keys").close();
      return;
    }
    if (ownKeys(at)?.test(event.key)) return;
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
