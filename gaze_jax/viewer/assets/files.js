"use strict";

// What is shown, as files: numbers of all regions as CSV, the pictures as PNG.

function saved(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// Rows of text as CSV (RFC 4180).
function asCsv(rows) {
  const quoted = (value) => (/[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  return rows.map((row) => row.map(quoted).join(",")).join("\r\n") + "\r\n";
}

// A header and a row per region of what was measured. `at` is the token, layer and head; `titles` are those of
// the views that a region lies in. Scores of several layers have no mean, and what is a mean of the heads does
// not compare with one head: these cells are empty.
function numbersOf(now, at, titles, hasScore, isDense) {
  const number = (value) => String(Number(value.toPrecision(6)));
  const columns = isDense ? ["dense"] : ["heads", "score", "attention", "dense", "gaze_minus_dense"];
  const rows = titles.map((title, r) => {
    const score = hasScore && now.share[r] > 0 ? number(now.score[r]) : "";
    const gaze = [number(now.share[r]), score, number(now.attention[r])];
    const dense = number(now.dense[r]), difference = now.difference ? number(now.difference[r]) : "";
    return [...at, String(r), title, ...(isDense ? [dense] : [...gaze, dense, difference])];
  });
  return [["token", "layer", "head", "region", "views", ...columns], ...rows];
}

// Lines of text that fit a width.
function wrapped(pen, text, width) {
  const lines = [];
  for (const paragraph of text.split("\n")) {
    let line = "";
    for (const letter of paragraph) {
      if (pen.measureText(line + letter).width <= width) {
        line += letter;
        continue;
      }
      const at = line.lastIndexOf(" ");
      lines.push(at > 0 ? line.slice(0, at) : line);
      line = (at > 0 ? line.slice(at + 1) : "") + letter;
    }
    lines.push(line);
  }
  return lines;
}

// A heading and lines, and below them the figures {title, canvas, ramp, note} side by side.
function asPicture(heading, lines, figures) {
  const margin = 24, face = "system-ui, sans-serif";
  const width = Math.max(...figures.map(({ canvas: one }) => one.width));
  const height = Math.max(...figures.map(({ canvas: one }) => one.height));
  const scale = Math.max(1, 480 / width), across = Math.round(width * scale), down = Math.round(height * scale);
  const whole = figures.length * (across + margin) + margin;
  const ruler = canvas(1, 1).getContext("2d");
  const set = (font, text, room) => {
    ruler.font = font;
    return wrapped(ruler, text, room).map((line) => ({ font, line }));
  };
  const above = [
    ...set(`650 22px ${face}`, heading, whole - 2 * margin),
    ...lines.flatMap((line) => set(`15px ${face}`, line, whole - 2 * margin)),
  ];
  const notes = figures.map(({ title, note }) => set(`14px ${face}`, `${title}: ${note}`, across));
  const ramp = 20; // the height of the scales
  const top = margin + above.length * 28 + 8;
  const made = canvas(whole, top + down + ramp + 22 * Math.max(...notes.map((note) => note.length)) + margin);
  const pen = made.getContext("2d");
  pen.fillStyle = "#fafaf7";
  pen.fillRect(0, 0, made.width, made.height);
  const write = ({ font, line }, x, y) => {
    pen.font = font;
    pen.fillStyle = "#212328";
    pen.fillText(line, x, y);
  };
  above.forEach((text, i) => write(text, margin, margin + 18 + 28 * i));
  figures.forEach(({ canvas: one, ramp: scaleOfOne }, i) => {
    const left = margin + i * (across + margin);
    pen.imageSmoothingEnabled = scale === 1;
    pen.drawImage(one, left, top, across, down);
    pen.drawImage(scaleOfOne, left, top + down + 10);
    notes[i].forEach((text, k) => write(text, left, top + down + ramp + 20 + 22 * k));
  });
  return new Promise((resolve) => { made.toBlob(resolve, "image/png"); });
}
