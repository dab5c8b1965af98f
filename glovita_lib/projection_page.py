"""The page that shows points: style and program, without the data."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
* { box-sizing: border-box }
body { margin: 0; height: 100vh; display: flex; flex-direction: column; background: #fff;
  color: #222; font: 14px/1.4 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
header { padding: 12px 16px 8px; border-bottom: 1px solid #e4e4e4 }
h1 { font-size: 17px; margin: 0 }
header p { margin: 1px 0 0; color: #666; font-size: 12.5px }
main { flex: 1; display: flex; min-height: 0 }
#stage { flex: 1; position: relative; min-width: 0; overflow: hidden }
canvas { position: absolute; inset: 0; width: 100%; height: 100%; cursor: grab;
  touch-action: none }
canvas.moving { cursor: grabbing }
#zoom { position: absolute; left: 12px; bottom: 12px; display: flex; gap: 4px }
button, select, input { font: inherit; color: inherit; background: #fff; border: 1px solid #ccc;
  border-radius: 5px; padding: 3px 9px }
button { cursor: pointer }
button:hover { background: #f2f2f2 }
aside { width: 250px; border-left: 1px solid #e4e4e4; padding: 12px; display: flex;
  flex-direction: column; gap: 8px; min-height: 0 }
aside select, aside input { width: 100% }
#legend { overflow: auto; flex: 1; margin: 0 -4px }
.row { display: flex; align-items: center; gap: 7px; width: 100%; border: 0; padding: 2px 4px;
  text-align: left }
.row span { flex: 1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.row b { font-weight: 400; color: #888; font-size: 12px }
.row.off { opacity: .35 }
.row svg { flex: none }
#bar { height: 12px; border-radius: 3px; margin: 4px }
#ends { display: flex; justify-content: space-between; margin: 0 4px; font-size: 12px }
#hint { color: #888; font-size: 12px; margin: 0 }
#card { position: absolute; pointer-events: none; background: #fff; border: 1px solid #ccc;
  border-radius: 6px; box-shadow: 0 2px 10px #0003; padding: 7px 9px; max-width: 300px;
  font-size: 12.5px; display: none; z-index: 2 }
#card div { overflow-wrap: anywhere }
#card canvas { position: static; display: block; width: 96px; height: 96px; margin-bottom: 5px;
  image-rendering: pixelated }
#card i { font-style: normal; color: #777 }
@media (max-width: 640px) {
  main { flex-direction: column }
  aside { width: auto; height: 34%; border-left: 0; border-top: 1px solid #e4e4e4 }
}
</style>
</head>
<body>
<header><h1>{{title}}</h1><p>{{subtitle}}</p></header>
<main>
<div id="stage">
<canvas id="plot" aria-label="points"></canvas>
<div id="zoom">
<button id="in" title="closer">+</button>
<button id="out" title="farther">&minus;</button>
<button id="home" title="everything">reset</button>
</div>
<div id="card"></div>
</div>
<aside>
<select id="by" aria-label="colour"></select>
<input id="find" type="search" placeholder="find an id" aria-label="find an id">
<div id="legend"></div>
<p id="hint"></p>
</aside>
</main>
<script type="application/json" id="data">{{data}}</script>
<script>
(() => {
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const canvas = at("plot"), stage = at("stage"), card = at("card"), pen = canvas.getContext("2d");
const count = data.ids.length, order = shuffled(count);
let coloring = 0, hidden = new Set(), lit = -1, hover = -1, found = null;
let zoom = 1, shiftX = 0, shiftY = 0, width = 1, height = 1, ratio = 1, queued = false;

// ---- geometry: the data fill the stage at zoom 1, with equal scales

const extent = values => values.reduce(
  ([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
const [left, right] = extent(data.x), [bottom, top_] = extent(data.y);
const middleX = (left + right) / 2, middleY = (bottom + top_) / 2;
const unit = () => 0.92 * Math.min(
  width / (right - left || 1), height / (top_ - bottom || 1)) * zoom;
const screenX = i => width / 2 + shiftX + (data.x[i] - middleX) * unit();
const screenY = i => height / 2 + shiftY - (data.y[i] - middleY) * unit();
const radius = () => Math.max(1.6, 5.5 - Math.log10(count + 1)) * Math.pow(zoom, 0.25);

function shuffled(n) { // no class lies on top of the others
  const rows = Array.from({ length: n }, (_, i) => i);
  let state = 1;
  for (let i = n - 1; i > 0; i--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const j = Math.floor(state / 4294967296 * (i + 1));
    [rows[i], rows[j]] = [rows[j], rows[i]];
  }
  return rows;
}

// ---- colours

const current = () => data.colorings[coloring];
const classStyle = code => data.styles[code % data.styles.length];
let range = [0, 1];

function colourOf(i) {
  const shown = current();
  if (!shown) return classStyle(0)[0];
  if (shown.values) {
    const value = shown.values[i];
    if (value === null) return data.unknown;
    const part = range[1] > range[0] ? (value - range[0]) / (range[1] - range[0]) : 0.5;
    return data.scale[Math.round(part * (data.scale.length - 1))];
  }
  return shown.codes[i] < 0 ? data.unknown : classStyle(shown.codes[i])[0];
}

function markerOf(i) {
  const shown = current();
  return !shown || shown.values || shown.codes[i] < 0 ? "circle" : classStyle(shown.codes[i])[1];
}

const classOf = i => current() && current().codes ? current().codes[i] : 0;
const visible = i => !hidden.has(classOf(i));

// ---- drawing

function trace(target, marker, x, y, r) {
  target.beginPath();
  if (marker === "circle") target.arc(x, y, r, 0, 2 * Math.PI);
  const corners = {
    triangle: [[0, -1.25], [1.15, 0.85], [-1.15, 0.85]],
    square: [[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]],
    diamond: [[0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]],
    cross: [[-1.1, -0.5], [-0.5, -1.1], [0, -0.6], [0.5, -1.1], [1.1, -0.5], [0.6, 0],
      [1.1, 0.5], [0.5, 1.1], [0, 0.6], [-0.5, 1.1], [-1.1, 0.5], [-0.6, 0]],
  }[marker] || [];
  corners.forEach(([a, b], k) => target[k ? "lineTo" : "moveTo"](x + a * r, y + b * r));
  if (corners.length) target.closePath();
}

function draw() {
  queued = false;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const r = radius();
  pen.lineWidth = 0.5;
  pen.strokeStyle = "#fff";
  const faint = i => (lit >= 0 && classOf(i) !== lit) || (found !== null && !found.has(i));
  for (const front of [false, true]) {
    for (const i of order) {
      if (!visible(i) || faint(i) === front) continue;
      const x = screenX(i), y = screenY(i);
      if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
      pen.globalAlpha = front ? 0.88 : 0.1;
      pen.fillStyle = colourOf(i);
      trace(pen, markerOf(i), x, y, r);
      pen.fill();
      pen.stroke();
    }
  }
  pen.globalAlpha = 1;
  if (hover >= 0 && visible(hover)) {
    pen.lineWidth = 2;
    pen.strokeStyle = "#111";
    trace(pen, markerOf(hover), screenX(hover), screenY(hover), r + 2);
    pen.stroke();
  }
}

function redraw() {
  if (!queued) { queued = true; requestAnimationFrame(draw) }
}

function resize() {
  const box = stage.getBoundingClientRect();
  width = Math.max(1, box.width); height = Math.max(1, box.height);
  ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
  redraw();
}

// ---- legend

function symbol(code) {
  const [colour, marker] = code < 0 ? [data.unknown, "circle"] : classStyle(code);
  const points = [];
  let arc = "";
  trace({ beginPath() {}, closePath() {}, arc() { arc = "y" },
    moveTo(a, b) { points.push(a + "," + b) }, lineTo(a, b) { points.push(a + "," + b) } },
    marker, 7, 7, 4.5);
  const shape = arc ? '<circle cx="7" cy="7" r="5"/>' : `<polygon points="${points.join(" ")}"/>`;
  return `<svg width="14" height="14" fill="${colour}">${shape}</svg>`;
}

function row(code, name, number) {
  const line = document.createElement("button"), label = document.createElement("span");
  const amount = document.createElement("b");
  line.className = "row";
  line.innerHTML = symbol(code);
  label.textContent = name; label.title = name;
  amount.textContent = number.toLocaleString("en");
  line.append(label, amount);
  line.dataset.code = code;
  line.onclick = () => toggle(code, false);
  line.ondblclick = () => toggle(code, true);
  line.onpointerenter = () => { lit = code; redraw() };
  line.onpointerleave = () => { lit = -1; redraw() };
  return line;
}

function toggle(code, alone) {
  const codes = [...at("legend").children].map(line => +line.dataset.code);
  const others = codes.filter(other => other !== code);
  if (alone) {
    const already = !hidden.has(code) && others.every(other => hidden.has(other));
    hidden = new Set(already ? [] : others);
  }
  else if (!hidden.delete(code)) hidden.add(code);
  if (codes.every(other => hidden.has(other))) hidden.clear();
  for (const line of at("legend").children) {
    line.classList.toggle("off", hidden.has(+line.dataset.code));
  }
  redraw();
}

function legend() {
  const shown = current(), box = at("legend");
  box.replaceChildren();
  hidden.clear();
  lit = -1;
  at("hint").textContent = "drag to move, wheel to zoom";
  if (!shown) return;
  if (shown.values) {
    range = extent(shown.values.filter(value => value !== null));
    if (!(range[0] <= range[1])) range = [0, 1];
    box.innerHTML = '<div id="bar"></div><div id="ends"><span></span><span></span></div>';
    at("bar").style.background = `linear-gradient(to right, ${data.scale.join(",")})`;
    range.forEach((value, k) => { at("ends").children[k].textContent = value });
    const unknown = shown.values.filter(value => value === null).length;
    if (unknown) box.insertAdjacentHTML("beforeend", '<div class="row">' + symbol(-1)
      + "<span>not known</span><b>" + unknown.toLocaleString("en") + "</b></div>");
    return;
  }
  const sizes = new Map();
  for (const code of shown.codes) sizes.set(code, (sizes.get(code) || 0) + 1);
  shown.names.forEach((name, code) => box.append(row(code, name, sizes.get(code) || 0)));
  if (sizes.has(-1)) box.append(row(-1, "not known", sizes.get(-1)));
  at("hint").textContent += "; click a class to hide it, double-click to see it alone";
}

function chooseColoring(index) { coloring = index; legend(); redraw() }

// ---- the sample below the pointer

const sheets = data.thumbnails ? data.thumbnails.sheets.map(source => {
  const image = new Image();
  image.src = source;
  return image;
}) : [];

function thumbnail(i) {
  const { cell, columns, perSheet } = data.thumbnails, k = i % perSheet;
  const small = document.createElement("canvas");
  small.width = small.height = cell;
  small.getContext("2d").drawImage(sheets[Math.floor(i / perSheet)],
    (k % columns) * cell, Math.floor(k / columns) * cell, cell, cell, 0, 0, cell, cell);
  return small;
}

function valueOf(shown, i) {
  if (shown.values) return shown.values[i] === null ? "not known" : String(shown.values[i]);
  return shown.codes[i] < 0 ? "not known" : shown.names[shown.codes[i]];
}

function line(title, value) {
  const entry = document.createElement("div"), name = document.createElement("i");
  name.textContent = title + " ";
  entry.append(name, value);
  return entry;
}

function nearest(x, y) {
  let best = -1, limit = Math.pow(Math.max(radius() + 3, 8), 2);
  for (let i = 0; i < count; i++) {
    if (!visible(i)) continue;
    const distance = Math.pow(screenX(i) - x, 2) + Math.pow(screenY(i) - y, 2);
    if (distance < limit) { limit = distance; best = i }
  }
  return best;
}

function show(i, x, y) {
  if (i !== hover) { hover = i; redraw() }
  card.style.display = i < 0 ? "none" : "block";
  if (i < 0) return;
  card.replaceChildren(...(data.thumbnails ? [thumbnail(i)] : []), line("id", data.ids[i]),
    ...data.colorings.map(shown => line(shown.title, valueOf(shown, i))));
  const { offsetWidth: w, offsetHeight: h } = card;
  card.style.left = Math.max(4, x + 16 + w > width ? x - w - 16 : x + 16) + "px";
  card.style.top = Math.max(4, Math.min(y + 12, height - h - 4)) + "px";
}

// ---- moving about

function zoomAt(x, y, factor) {
  const before = zoom;
  zoom = Math.min(500, Math.max(0.5, zoom * factor));
  const grown = zoom / before;
  shiftX = (x - width / 2) * (1 - grown) + shiftX * grown;
  shiftY = (y - height / 2) * (1 - grown) + shiftY * grown;
  redraw();
}

const pointers = new Map();
const place = event => {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};
canvas.addEventListener("pointerdown", event => {
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, place(event));
  canvas.classList.add("moving");
});
canvas.addEventListener("pointermove", event => {
  const [x, y] = place(event), old = pointers.get(event.pointerId);
  if (!old) return show(nearest(x, y), x, y);
  if (pointers.size === 2) { // two fingers
    const [a, b] = [...pointers.entries()].find(([id]) => id !== event.pointerId)[1];
    const apart = Math.hypot(old[0] - a, old[1] - b) || 1;
    zoomAt((a + x) / 2, (b + y) / 2, Math.hypot(x - a, y - b) / apart);
  } else { shiftX += x - old[0]; shiftY += y - old[1] }
  pointers.set(event.pointerId, [x, y]);
  show(-1);
  redraw();
});
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, event => {
    pointers.delete(event.pointerId);
    if (!pointers.size) canvas.classList.remove("moving");
    const [x, y] = place(event);
    if (event.type === "pointerup") show(nearest(x, y), x, y);
  });
}
canvas.addEventListener("pointerleave", () => { if (!pointers.size) show(-1) });
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  const lines = event.deltaMode === 1 ? 16 : 1;
  zoomAt(...place(event), Math.exp(-event.deltaY * lines * 0.0015));
}, { passive: false });
at("in").onclick = () => zoomAt(width / 2, height / 2, 1.5);
at("out").onclick = () => zoomAt(width / 2, height / 2, 1 / 1.5);
at("home").onclick = () => { zoom = 1; shiftX = shiftY = 0; redraw() };
at("find").oninput = event => {
  const text = event.target.value.trim().toLowerCase();
  found = text ? new Set(order.filter(i => data.ids[i].toLowerCase().includes(text))) : null;
  at("hint").textContent = found ? found.size.toLocaleString("en") + " found" : "";
  redraw();
};

data.colorings.forEach((shown, k) => at("by").append(new Option("colour: " + shown.title, k)));
at("by").style.display = data.colorings.length > 1 ? "" : "none";
at("by").onchange = event => chooseColoring(+event.target.value);
window.addEventListener("resize", resize);
legend();
resize();
})();
</script>
</body>
</html>
"""
