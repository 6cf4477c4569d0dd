"use strict";

// Draws views {corners, grid, regions, own} of images, and values per region, on canvases.

const GAZE_OUTLINE = "rgb(0, 133, 202)";

function canvas(width, height) {
  const made = document.createElement("canvas");
  made.width = width;
  made.height = height;
  return made;
}

// Scratch canvases, one per use and size: their content is copied elsewhere immediately.
const spare = new Map();

function scratch(use, width, height) {
  const key = `${use} ${width} ${height}`;
  if (!spare.has(key)) spare.set(key, canvas(width, height));
  return spare.get(key);
}

// The rectangle that a view's grid covers, clear, veiled and grey. Larger pictures shrink to `most` pixels, tiny
// ones are enlarged by an integer factor, up to `least`. Padding is black.
function prepared(image, view, least, most) {
  const [x0, y0, x1, y1] = view.corners;
  const width = (x1 - x0) * image.naturalWidth, height = (y1 - y0) * image.naturalHeight;
  const longest = Math.max(width, height);
  let scale = Math.min(1, most / longest);
  if (longest < least) scale = Math.max(1, Math.floor(least / longest));
  const clear = canvas(Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale)));
  const pen = clear.getContext("2d", { willReadFrequently: true });
  pen.fillStyle = "black";
  pen.fillRect(0, 0, clear.width, clear.height);
  pen.imageSmoothingEnabled = scale <= 1;
  pen.imageSmoothingQuality = "high";
  const sx = clear.width / (x1 - x0), sy = clear.height / (y1 - y0);
  pen.drawImage(image, -x0 * sx, -y0 * sy, sx, sy);
  const veiled = canvas(clear.width, clear.height), grey = canvas(clear.width, clear.height);
  const pixels = pen.getImageData(0, 0, clear.width, clear.height), veil = pixels.data;
  const other = new ImageData(clear.width, clear.height), dim = other.data;
  for (let i = 0; i < veil.length; i += 4) {
    const luma = 0.299 * veil[i] + 0.587 * veil[i + 1] + 0.114 * veil[i + 2];
    // The same veil as in the PNG sheets: 36 % of the brightness, 15 % of the colour.
    for (let c = i; c < i + 3; c++) {
      dim[c] = 0.58 * luma;
      veil[c] = 0.36 * (0.15 * veil[c] + 0.85 * luma);
    }
    dim[i + 3] = 255;
  }
  veiled.getContext("2d").putImageData(pixels, 0, 0);
  grey.getContext("2d").putImageData(other, 0, 0);
  return { clear, veiled, grey };
}

// The grid of a view as a small picture, one pixel per token.
function gridded(view, colour) {
  const [height, width] = view.grid;
  const small = scratch("grid", width, height), pixels = new ImageData(width, height);
  const colours = new Map(view.own.map((region) => [region, colour(region)]));
  view.regions.forEach((region, i) => pixels.data.set(colours.get(region), 4 * i));
  small.getContext("2d").putImageData(pixels, 0, 0);
  return small;
}

// Regions are as clear as `clear` says, from 0 to 1, and veiled by the rest.
function drawGaze(target, view, picture, clear) {
  const { width, height } = picture.clear;
  if (target.width !== width || target.height !== height) Object.assign(target, { width, height });
  const pen = target.getContext("2d");
  const lit = scratch("lit", width, height), light = lit.getContext("2d");
  light.globalCompositeOperation = "copy";
  light.drawImage(picture.clear, 0, 0);
  light.globalCompositeOperation = "destination-in";
  light.imageSmoothingEnabled = false;
  light.drawImage(gridded(view, (r) => [0, 0, 0, Math.round(255 * clear(r))]), 0, 0, width, height);
  pen.drawImage(picture.veiled, 0, 0);
  pen.drawImage(lit, 0, 0);
}

// Outlines the regions that `chosen` names, from outside, so that the line hides nothing of them.
function outline(target, view, chosen, line, colour) {
  const [rows, columns] = view.grid;
  const { width, height } = target;
  const pen = target.getContext("2d");
  const within = (y, x) => y >= 0 && x >= 0 && y < rows && x < columns;
  const inside = (y, x) => within(y, x) && chosen(view.regions[y * columns + x]);
  const across = (x) => Math.round(x * width / columns), down = (y) => Math.round(y * height / rows);
  pen.fillStyle = colour;
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++) {
      if (inside(y, x)) continue;
      const left = across(x), top = down(y), right = across(x + 1), bottom = down(y + 1);
      if (inside(y, x - 1)) pen.fillRect(left, top, line, bottom - top);
      if (inside(y, x + 1)) pen.fillRect(right - line, top, line, bottom - top);
      if (inside(y - 1, x)) pen.fillRect(left, top, right - left, line);
      if (inside(y + 1, x)) pen.fillRect(left, bottom - line, right - left, line);
      for (const [dy, dx] of [[-1, -1], [-1, 1], [1, -1], [1, 1]]) {
        if (!inside(y + dy, x + dx)) continue;
        pen.fillRect(dx < 0 ? left : right - line, dy < 0 ? top : bottom - line, line, line);
      }
    }
  }
}

// From dark over red and orange to light yellow; brightness increases too.
const STOPS = [[20, 11, 53], [101, 21, 110], [188, 55, 84], [237, 105, 37], [252, 180, 40], [252, 255, 164]];

const LESS = [236, 112, 20], MORE = [40, 150, 245];
const limited = (value) => Math.min(Math.max(value, 0), 1);

// Colours of a value from 0 to 1, and of one from -1 to 1. Small values are more transparent, so that the
// picture stays visible where there is little to see.
function heat(value, opacity) {
  const at = limited(value) * (STOPS.length - 1);
  const low = Math.min(Math.floor(at), STOPS.length - 2), part = at - low;
  const colour = STOPS[low].map((from, c) => Math.round(from + part * (STOPS[low + 1][c] - from)));
  return [...colour, Math.round(255 * opacity * Math.sqrt(limited(value)))];
}

function lessOrMore(value, opacity) {
  return [...(value < 0 ? LESS : MORE), Math.round(255 * opacity * Math.sqrt(limited(Math.abs(value))))];
}

// A map of colours over the picture, which is dimmed as far as the map is opaque.
function drawMap(target, view, picture, colour, opacity) {
  const { width, height } = picture.clear;
  if (target.width !== width || target.height !== height) Object.assign(target, { width, height });
  const pen = target.getContext("2d");
  pen.drawImage(picture.clear, 0, 0);
  pen.globalAlpha = opacity;
  pen.drawImage(picture.grey, 0, 0);
  pen.globalAlpha = 1;
  pen.imageSmoothingEnabled = false;
  pen.drawImage(gridded(view, colour), 0, 0, width, height);
}

// The region at a place of a picture, as fractions of its width and height.
function regionAt(view, x, y) {
  const [rows, columns] = view.grid;
  const row = Math.min(Math.max(Math.floor(y * rows), 0), rows - 1);
  return view.regions[row * columns + Math.min(Math.max(Math.floor(x * columns), 0), columns - 1)];
}

// A row of cells per layer and a column per head, with a frame around the chosen ones.
function drawOverview(target, { columns, values }, layer, head, most) {
  const rows = values.length / columns;
  const width = Math.min(Math.max(Math.floor(220 / columns), 3), 40);
  const height = Math.min(Math.max(Math.floor(420 / rows), 4), 26);
  const scale = 2; // for sharp edges on dense screens
  Object.assign(target, { width: columns * width * scale, height: rows * height * scale });
  target.style.width = `${columns * width}px`;
  const pen = target.getContext("2d");
  pen.scale(scale, scale);
  pen.fillStyle = `rgb(${STOPS[0].join(" ")})`;
  pen.fillRect(0, 0, columns * width, rows * height);
  values.forEach((value, i) => {
    const [red, green, blue] = heat(value / (most || 1), 1);
    pen.fillStyle = `rgb(${red} ${green} ${blue})`;
    pen.fillRect(i % columns * width, Math.floor(i / columns) * height, width - 0.5, height - 0.5);
  });
  const [top, down] = layer < 0 ? [0, rows] : [layer, 1];
  const [left, across] = head < 0 || columns === 1 ? [0, columns] : [head, 1];
  for (const [colour, line] of [["black", 4], ["white", 2]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = line;
    pen.strokeRect(left * width + 1, top * height + 1, across * width - 2, down * height - 2);
  }
}

// The scales below the pictures, as if over a light and over a grey one.
function drawLegends(map, opacity) {
  const over = (below, [red, green, blue, alpha]) =>
    [red, green, blue].map((c) => below + (c - below) * alpha / 255);
  const veil = (x) => [206, 200, 180].map((c) => 0.36 * 206 + x * 0.64 * c);
  const below = 206 + (0.58 * 206 - 206) * opacity;
  const warmth = (x) => over(below, map === "dense" ? heat(x, opacity) : lessOrMore(2 * x - 1, opacity));
  for (const [id, colour] of [["veil", veil], ["heat", warmth]]) {
    const pen = document.getElementById(id).getContext("2d");
    for (let x = 0; x < 96; x++) {
      pen.fillStyle = `rgb(${colour(x / 95).map(Math.round).join(" ")})`;
      pen.fillRect(x, 0, 1, 12);
    }
  }
}
