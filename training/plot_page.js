// The page of training/plot.py: reads the runs out of the page itself, and asks nobody for anything.
// Over 300 lines: one page, from its data to what the mouse does.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = [
  "#3b7dd8", "#e0803a", "#35a06a", "#cf4f8f", "#8a68dc", "#b8922f", "#28a3b0", "#d9534f",
];
const MARGIN = { left: 52, right: 10, top: 6, bottom: 34 }, HEIGHT = 220, DOTTED_UP_TO = 25;
const view = { axis: "step", smoothing: 2, isLog: false, hidden: new Set(), range: null };
const panels = [];
let curves = new Map(); // by run and metric, for the axis and the smoothing of the view

const colorOf = (run) => COLORS[data.runs.indexOf(run) % COLORS.length];
const shownRuns = () => data.runs.filter((run) => !view.hidden.has(run.name));

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function swatch(run) {
  const element = make("span", { className: "swatch" });
  element.style.background = colorOf(run);
  return element;
}

function format(value) {
  const size = Math.abs(value);
  if (value === 0 || value == null) return value === 0 ? "0" : "–";
  if (size >= 1e9) return `${Number((value / 1e9).toPrecision(4))}B`;
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(4))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(4))}k`;
  if (size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

function duration(seconds) {
  const [size, name] = timeUnit(seconds);
  return `${(seconds / size).toFixed(1)} ${name}`;
}

function timeUnit(seconds) {
  const units = [[3600, "hours"], [60, "minutes"]];
  return units.find(([size]) => seconds >= 2 * size) ?? [1, "seconds"];
}

// --- curves

function axisUnit() {
  if (view.axis !== "seconds") return [1, view.axis];
  const [size, name] = timeUnit(Math.max(...data.runs.map((run) => run.seconds.at(-1))));
  return [size, `${name} of training`];
}

function movingAverage(values, share) { // as `smoothed` of training/plot.py
  const sums = [0], reach = Math.floor(values.length * share);
  for (const value of values) sums.push(sums.at(-1) + value);
  return values.map((_, index) => {
    const before = Math.min(reach, index), after = Math.min(before, values.length - 1 - index);
    return (sums[index + after + 1] - sums[index - before]) / (before + after + 1);
  });
}

function curve(run, metric) {
  const key = `${run.name}\n${metric}`;
  if (!curves.has(key)) {
    const series = run.series[metric], [unit] = axisUnit();
    curves.set(key, series && {
      run,
      x: series.at.map((line) => run[view.axis][line] / unit),
      raw: series.values,
      smooth: movingAverage(series.values, view.smoothing / 100),
    });
  }
  return curves.get(key);
}

const curvesOf = (metric) => shownRuns().map((run) => curve(run, metric)).filter(Boolean);

// --- drawing

function limits(drawn) { // all of the smoothed curves, and of the raw ones but what sticks out
  let [x0, x1] = view.range ?? [Infinity, -Infinity];
  const seen = [];
  for (const { x, raw, smooth } of drawn) {
    const inside = x.map((_, index) => index).filter((index) =>
      (!view.range || (x[index] >= x0 && x[index] <= x1))
      && !(view.isLog && Math.min(smooth[index], raw[index]) <= 0));
    if (!inside.length) continue;
    const sorted = inside.map((index) => raw[index]).sort((a, b) => a - b);
    for (const share of [0.02, 0.98]) seen.push(sorted[Math.round((sorted.length - 1) * share)]);
    for (const index of inside) seen.push(smooth[index]);
    if (!view.range) [x0, x1] = [Math.min(x0, x[0]), Math.max(x1, x.at(-1))];
  }
  let [low, high] = [Infinity, -Infinity];
  for (const y of seen) [low, high] = [Math.min(low, y), Math.max(high, y)];
  if (!(x1 > x0)) [x0, x1] = seen.length ? [x0 - 1, x0 + 1] : [0, 1];
  if (!seen.length) return { x0, x1, y0: 1, y1: 2 };
  if (view.isLog) return { x0, x1, y0: low / 1.08, y1: high * 1.08 };
  const room = (high - low) * 0.06 || Math.abs(low) * 0.1 || 1;
  return { x0, x1, y0: low >= 0 ? Math.max(0, low - room) : low - room, y1: high + room };
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(n * step);
  return found;
}

function logTicks(low, high) {
  const found = [], decades = Math.log10(high / low);
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++)
    for (const factor of decades > 3 ? [1] : [1, 2, 5]) found.push(factor * 10 ** power);
  const inside = found.filter((value) => value >= low && value <= high);
  return inside.length > 1 ? inside : ticks(low, high, 4);
}

function draw(panel) {
  const { canvas, metric } = panel, width = canvas.clientWidth, ratio = window.devicePixelRatio;
  const pen = canvas.getContext("2d"), style = getComputedStyle(canvas.parentElement);
  if (!width) return; // its section is closed
  [canvas.width, canvas.height] = [width * ratio, HEIGHT * ratio];
  pen.scale(ratio, ratio);
  const drawn = curvesOf(metric), { x0, x1, y0, y1 } = limits(drawn);
  const level = view.isLog ? Math.log : (value) => value;
  const toX = (x) => MARGIN.left + ((x - x0) / (x1 - x0)) * (width - MARGIN.left - MARGIN.right);
  const room = HEIGHT - MARGIN.top - MARGIN.bottom, bottom = HEIGHT - MARGIN.bottom;
  const toY = (y) => bottom - ((level(y) - level(y0)) / (level(y1) - level(y0))) * room;
  Object.assign(panel, { drawn, x0, x1, width });
  drawAxes(pen, { x0, x1, y0, y1, toX, toY, width, bottom, style });
  pen.beginPath();
  pen.rect(MARGIN.left, MARGIN.top - 2, width - MARGIN.left - MARGIN.right + 2, room + 4);
  pen.clip();
  pen.lineJoin = "round";
  for (const { run, x, raw, smooth } of drawn) {
    pen.strokeStyle = pen.fillStyle = colorOf(run);
    pen.setLineDash(data.runs.indexOf(run) < COLORS.length ? [] : [5, 3]);
    if (view.smoothing) stroke(pen, x.map(toX), raw, toY, { alpha: 0.25, thickness: 1 });
    stroke(pen, x.map(toX), smooth, toY, { alpha: 1, thickness: 1.8 });
    if (x.length > DOTTED_UP_TO) continue;
    raw.forEach((value, index) => {
      pen.beginPath();
      pen.arc(toX(x[index]), toY(value), 2.6, 0, 7);
      pen.fill();
    });
  }
}

function drawAxes(pen, { x0, x1, y0, y1, toX, toY, width, bottom, style }) {
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = style.outlineColor; // --soft: a canvas takes no variables
  pen.strokeStyle = style.borderTopColor;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (const value of view.isLog ? logTicks(y0, y1) : ticks(y0, y1, 5)) {
    pen.fillText(format(value), MARGIN.left - 7, toY(value));
    pen.beginPath();
    pen.moveTo(MARGIN.left, toY(value));
    pen.lineTo(width - MARGIN.right, toY(value));
    pen.stroke();
  }
  pen.textAlign = "center";
  for (const value of ticks(x0, x1, width / 90))
    pen.fillText(format(value), toX(value), bottom + 11);
  pen.fillText(axisUnit()[1], (MARGIN.left + width - MARGIN.right) / 2, bottom + 26);
}

function stroke(pen, x, values, toY, { alpha, thickness }) {
  pen.globalAlpha = alpha;
  pen.lineWidth = thickness;
  pen.beginPath();
  let isDown = false;
  values.forEach((value, index) => {
    if (view.isLog && value <= 0) return void (isDown = false);
    pen[isDown ? "lineTo" : "moveTo"](x[index], toY(value));
    isDown = true;
  });
  pen.stroke();
  pen.globalAlpha = 1;
}

function redraw() {
  curves = new Map();
  panels.forEach(draw);
}

// --- pointing: values under the mouse, in all panels; dragging zooms along x

function nearest(x, at) {
  let [low, high] = [0, x.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] < at) low = middle; else high = middle;
  }
  return at - x[low] < x[high] - at ? low : high;
}

function point(panel, event) {
  const pixels = event.offsetX - MARGIN.left, span = panel.width - MARGIN.left - MARGIN.right;
  return panel.x0 + (Math.min(Math.max(pixels, 0), span) / span) * (panel.x1 - panel.x0);
}

function place(panel, element, from, to) {
  const span = panel.width - MARGIN.left - MARGIN.right, { canvas } = panel;
  const left = canvas.offsetLeft + MARGIN.left;
  const toX = (x) => left + ((x - panel.x0) / (panel.x1 - panel.x0)) * span;
  const isInside = from >= panel.x0 && from <= panel.x1;
  Object.assign(element.style, {
    display: isInside ? "block" : "none",
    left: `${toX(from)}px`,
    top: `${canvas.offsetTop + MARGIN.top}px`,
    height: `${HEIGHT - MARGIN.top - MARGIN.bottom}px`,
    width: to === undefined ? "1px" : `${toX(to) - toX(from)}px`,
  });
}

function hover(panel, event) {
  const at = point(panel, event);
  panels.forEach((each) => place(each, each.cursor, at));
  const rows = panel.drawn.map(({ run, x, raw, smooth }) => {
    const index = nearest(x, at), is = raw[index], mean = smooth[index];
    const text = view.smoothing && is !== mean ? `${format(is)} (${format(mean)})` : format(is);
    return make("div", {}, swatch(run), run.name, make("b", {}, text));
  });
  panel.tip.replaceChildren(make("div", {}, `${axisUnit()[1]}: ${format(at)}`), ...rows);
  panel.tip.style.display = "block";
  const isLeft = event.offsetX > panel.width / 2, { canvas, tip } = panel;
  tip.style.left = `${canvas.offsetLeft + event.offsetX + (isLeft ? -tip.offsetWidth - 14 : 14)}px`;
  tip.style.top = `${canvas.offsetTop + 14}px`;
}

function leave() {
  for (const { cursor, tip } of panels) cursor.style.display = tip.style.display = "none";
}

function listen(panel) {
  const { canvas, zoom } = panel;
  let start = null;
  canvas.onpointerdown = (event) => {
    start = point(panel, event);
    canvas.setPointerCapture(event.pointerId);
  };
  canvas.onpointermove = (event) => {
    hover(panel, event);
    const now = point(panel, event);
    if (start !== null) place(panel, zoom, Math.min(start, now), Math.max(start, now));
  };
  canvas.onpointerup = (event) => {
    const [low, high] = [start, point(panel, event)].sort((a, b) => a - b);
    if (start !== null && high - low > (panel.x1 - panel.x0) / 50) {
      view.range = [low, high];
      panels.forEach(draw);
    }
    start = null;
    zoom.style.display = "none";
  };
  canvas.onpointerleave = leave;
  canvas.ondblclick = () => {
    view.range = null;
    panels.forEach(draw);
  };
}

// --- the page

function table(headings, rows) {
  const head = make("tr", {}, ...headings.map((text) => make("th", {}, text)));
  const body = rows.map(([heading, ...cells]) =>
    make("tr", {}, make("th", {}, ...[heading].flat()), ...cells.map(({ text, isBest }) =>
      make("td", { className: isBest ? "best" : "" }, text))));
  const whole = make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
  return make("div", { className: "scroll" }, whole);
}

function finalTable() {
  const columns = data.final.map(({ name, isLowerBetter }) => {
    const values = data.runs.map((run) => run.final[name]).filter((value) => value != null);
    const best = isLowerBetter ? Math.min(...values) : Math.max(...values);
    return { name, best: isLowerBetter === null || values.length < 2 ? undefined : best };
  });
  const show = (name, value) => (name === "seconds" ? duration(value) : format(value));
  const rows = data.runs.map((run) => [[swatch(run), run.name], ...columns.map(({ name, best }) =>
    ({ text: show(name, run.final[name]), isBest: run.final[name] === best }))]);
  const headings = columns.map(({ name }) => (name === "seconds" ? "training time" : name));
  return table(["final values", ...headings], rows);
}

function settingsTable() {
  const rows = data.settings.map(({ name, values }) => [name, ...values.map((text) => ({ text }))]);
  return table(["settings that differ", ...data.runs.map((run) => run.name)], rows);
}

function figure(metric) {
  const parts = ["cursor", "zoom", "tip"].map((className) => make("div", { className }));
  const canvas = make("canvas"), [cursor, zoom, tip] = parts;
  const panel = { metric, canvas, cursor, zoom, tip };
  panels.push(panel);
  listen(panel);
  return make("figure", {}, make("figcaption", {}, metric), canvas, ...parts);
}

function build() {
  const main = document.querySelector("main");
  const results = make("div", {}, finalTable(), make("p", { className: "hint" }, data.finalNote));
  const tables = make("div", { className: "tables" }, results);
  if (data.settings.length) tables.append(settingsTable());
  main.append(tables);
  for (const { title, metrics } of data.sections) {
    const grid = make("div", { className: "grid" }, ...metrics.map(figure));
    const section = make("details", { open: true }, make("summary", {}, title), grid);
    section.ontoggle = () => panels.forEach(draw);
    main.append(section);
  }
  main.append(make("p", { className: "hint" }, data.note));
  document.title = data.runs.map((run) => run.name).join(", ");
}

function control() {
  const find = (id) => document.getElementById(id), root = document.documentElement;
  for (const run of data.runs) {
    const button = make("button", { ariaPressed: "true" }, swatch(run), run.name);
    button.onclick = () => {
      if (!view.hidden.delete(run.name)) view.hidden.add(run.name);
      button.ariaPressed = String(!view.hidden.has(run.name));
      panels.forEach(draw);
    };
    find("runs").append(button);
  }
  const names = { step: "step", tokens: "tokens", seconds: "training time" };
  for (const [value, text] of Object.entries(names))
    find("axis").append(make("option", { value }, text));
  find("axis").onchange = () => {
    [view.axis, view.range] = [find("axis").value, null];
    redraw();
  };
  find("smoothing").oninput = () => {
    view.smoothing = Number(find("smoothing").value);
    find("smoothing").nextSibling.value = `${view.smoothing} %`;
    redraw();
  };
  find("log").onchange = () => {
    view.isLog = find("log").checked;
    panels.forEach(draw);
  };
  const isDark = matchMedia("(prefers-color-scheme: dark)");
  find("theme").onclick = () => {
    const now = root.dataset.theme ?? (isDark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    panels.forEach(draw);
  };
  isDark.onchange = window.onresize = () => panels.forEach(draw);
}

build();
control();
document.getElementById("smoothing").oninput();
