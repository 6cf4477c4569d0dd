"use strict";

// Places: in scrolling boxes, and of the pointer.

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

// The pointer's place in an element, as fractions of its width and height.
function placeIn(event) {
  const box = event.currentTarget.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

// Shows lines in a box beside the pointer, inside the window.
function hint(tip, event, lines) {
  tip.replaceChildren(...lines.map((line) => labelled("p", "", line)));
  tip.hidden = false;
  const right = event.clientX + 16, before = event.clientX - 12 - tip.offsetWidth;
  const left = right + tip.offsetWidth > innerWidth ? before : right;
  const top = Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 4);
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}
