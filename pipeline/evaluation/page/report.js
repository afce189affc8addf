"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
// Okabe and Ito's colors that stand out from white and black alike. A recipe has a color; dashes
// distinguish its seeds, and recipes beyond the seventh.
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c00"];
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [14, 4], [4, 2, 1, 2]];
const STYLES = (() => {
  const names = [...new Set(DATA.runs.map((run) => run.group || run.label))], seen = {};
  return DATA.runs.map((run) => {
    const name = run.group || run.label, color = names.indexOf(name);
    const dash = Math.floor(color / 7) + (seen[name] = (seen[name] ?? -1) + 1);
    return { color: COLORS[color % 7], dash: DASHES[dash % DASHES.length] };
  });
})();
const style = (run) => STYLES[run];
const draws = []; // every canvas draws itself again when the theme or the width changes

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}
const place = (id) => document.querySelector(`#${id} > div`);
const number = (x, digits = 4) =>
  x == null ? "–" : Math.abs(x) >= 1e5 || (x !== 0 && Math.abs(x) < 1e-3) ? x.toExponential(2)
    : Number(x.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits });
const signed = (x) => (x == null ? "∞" : (x > 0 ? "+" : "") + number(x, 3));
const metric = (name) => DATA.metrics.find((m) => m.name === name) || { label: name, unit: "" };
const titled = (m) => m.label + (m.unit ? ` (${m.unit})` : "");

/* A table with a filter and columns that sort. A cell is a text, or {text, sort, node, class}. */
function table(columns, rows, options = {}) {
  const body = el("tbody");
  const head = el("tr");
  const count = el("span", { class: "soft", role: "status" });
  const state = { column: options.sort ?? -1, down: options.down ?? false, words: [] };
  const cell = (value) => (value !== null && typeof value === "object" ? value : { text: value });
  const key = (value) => { const c = cell(value); return c.sort !== undefined ? c.sort : c.text; };
  const shown = rows.map((row) => {
    const tr = el("tr");
    row.cells.forEach((value, index) => {
      const c = cell(value);
      const kind = [columns[index].number ? "number" : "", c.class || ""].join(" ").trim();
      const td = el(index ? "td" : "th", { class: kind, scope: index ? null : "row" });
      td.append(c.node ? c.node : String(c.text ?? "–"));
      tr.append(td);
    });
    if (row.click) tr.addEventListener("click", row.click);
    return { ...row, tr, find: tr.textContent.toLowerCase() };
  });
  function draw() {
    [...head.children].forEach((th, index) => th.setAttribute("aria-sort",
      index !== state.column ? "none" : state.down ? "descending" : "ascending"));
    const order = shown.filter((row) => state.words.every((word) => row.find.includes(word)));
    if (state.column >= 0) {
      order.sort((one, other) => {
        const [a, b] = [key(one.cells[state.column]), key(other.cells[state.column])];
        if (a == null || b == null) return (a == null) - (b == null);
        const less = typeof a === "number" && typeof b === "number" ? a - b
          : String(a).localeCompare(String(b), "en", { numeric: true });
        return state.down ? -less : less;
      });
    }
    body.replaceChildren(...order.map((row) => row.tr));
    count.textContent = `${order.length} of ${rows.length} rows`;
  }
  columns.forEach((column, index) => head.append(el("th",
    { class: column.number ? "number" : null, scope: "col", "aria-sort": "none" },
    el("button", {
      type: "button", text: column.name, onclick: () => {
        state.down = state.column === index ? !state.down : Boolean(column.number);
        state.column = index;
        draw();
      },
    }))));
  const search = el("input", {
    type: "search", placeholder: "Filter", "aria-label": `Filter ${options.label || "rows"}`,
    oninput: (event) => {
      state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      draw();
    },
  });
  draw();
  return el("div", {}, rows.length > 3 ? el("div", { class: "bar" }, search, count) : null,
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": options.label },
      el("table", {}, el("thead", {}, head), body)));
}

function verdicts() {
  const section = document.getElementById("verdict");
  for (const verdict of DATA.verdicts) {
    section.append(el("div", { class: `verdict ${verdict.outcome}` },
      el("p", { class: "text", text: verdict.text }),
      el("p", { class: "scope", text: verdict.scope })));
  }
  if (!DATA.verdicts.length) {
    section.append(el("div", { class: "verdict unknown" },
      el("p", { class: "text", text: "No verdict: there is nothing that can be compared." })));
  }
  if (DATA.apart.length) {
    section.append(el("h3", { text: "Set apart" }),
      el("ul", {}, ...DATA.apart.map((a) => el("li", { text: `${a.label}: ${a.reason}` }))));
  }
}

function differs() {
  const names = Object.keys(DATA.settings);
  const rows = names.map((name) => ({
    cells: [name, ...DATA.settings[name].map((value) => value == null ? "–" : String(value))],
  }));
  place("differs").append(rows.length
    ? table([{ name: "Setting" }, ...DATA.runs.map((run) => ({ name: run.label }))], rows,
      { label: "what differs" })
    : el("p", { text: "Configuration, code and dataset are equal." }));
}

/* An interval on an axis that its metric shares; the line in the middle is no difference. */
function forest(finding, reach) {
  const ns = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(ns, "svg");
  const at = (x) => 85 + 80 * Math.max(-1, Math.min(1, x / reach));
  const add = (tag, attributes) => {
    const node = document.createElementNS(ns, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    svg.append(node);
  };
  svg.setAttribute("class", "forest " + (finding.claimed ? finding.way : "soft"));
  svg.setAttribute("viewBox", "0 0 170 20");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", interval(finding));
  add("line", { x1: 85, x2: 85, y1: 1, y2: 19, stroke: "currentColor", opacity: .4 });
  add("line", { x1: at(finding.low ?? -reach), x2: at(finding.high ?? reach), y1: 10, y2: 10, stroke: "currentColor", "stroke-width": 2 });
  add("circle", { cx: at(finding.difference), cy: 10, r: 4, fill: "currentColor" });
  return svg;
}
const interval = (f) => `${signed(f.difference)} [${signed(f.low)}, ${signed(f.high)}]`;

function findings(id, chosen, label) {
  const rows = DATA.findings.filter(chosen);
  if (!rows.length) {
    place(id).append(el("p", { class: "soft", text: "No comparable values." }));
    return;
  }
  const reach = {};
  for (const f of rows) {
    const ends = [f.low, f.high, f.difference].filter((x) => x != null).map(Math.abs);
    reach[f.metric] = Math.max(reach[f.metric] || 1e-12, ...ends);
  }
  const several = DATA.groups.length > 2;
  const columns = [
    { name: "Metric" }, ...(several ? [{ name: "Compared" }] : []), { name: "Images" },
    { name: DATA.baseline, number: true }, { name: several ? "Its mean" : DATA.groups[1].label, number: true },
    { name: "Difference [95 %]", number: true }, { name: "Interval" }, { name: "Corrected p", number: true },
    { name: "Claim" }, { name: "n", number: true },
  ];
  place(id).append(table(columns, rows.map((f) => {
    const kind = f.claimed ? f.way : "";
    const primary = f.metric === DATA.primary.name && f.kind === "all";
    return { cells: [
      titled(metric(f.metric)) + (primary ? " – primary" : ""), ...(several ? [f.group] : []), f.part,
      { text: number(f.a), sort: f.a }, { text: number(f.b), sort: f.b },
      { text: interval(f), sort: f.difference, class: kind },
      { node: forest(f, reach[f.metric]), sort: f.difference / reach[f.metric] },
      { text: f.p < 1e-4 ? "< 0.0001" : number(f.p, 2), sort: f.p },
      { text: f.claimed ? kind : "–", class: kind }, f.n,
    ] };
  }), { label }));
}

function means() {
  if (!DATA.metrics.length) return;
  const rows = DATA.metrics.map((m) => ({
    cells: [titled(m) + (m.better ? `, ${m.better} is better` : ""),
      ...m.means.map((x) => ({ text: number(x), sort: x }))],
  }));
  place("metrics").append(el("h3", { text: "Means of each run" }), table(
    [{ name: "Metric" }, ...DATA.runs.map((run) => ({ name: run.label, number: true }))], rows,
    { label: "means of each run" }));
}

/* Curves: thinned on storage's side to the least and greatest of each stretch. */
function decode(text, kind) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new kind(bytes.buffer);
}
function imagesAt(run, step) {
  const known = DATA.runs[run].images_at;
  for (let i = 1; i < known.length; i++) {
    const [[from, seen], [to, then]] = [known[i - 1], known[i]];
    if (seen == null || then == null) return NaN;
    if (step <= to || i === known.length - 1) return seen + (then - seen) * (step - from) / ((to - from) || 1);
  }
  return NaN;
}
const view = { axis: "steps", smooth: .9, log: false, hidden: new Set(), range: null };
const AXES = { steps: "steps", images: "images", hours: "hours of training" };

const FEW = 100; // points are shown one by one, and as they are
function smoothed(values, weight) {
  if (!weight || values.length < FEW) return values;
  let mean = NaN, share = 0;
  return Float32Array.from(values, (value) => {
    if (!Number.isFinite(value)) return value;
    mean = Number.isNaN(mean) ? value * (1 - weight) : mean * weight + value * (1 - weight);
    share = share * weight + (1 - weight);
    return mean / share;
  });
}
function ticks(low, high, most, log) {
  if (log) {
    const found = [];
    const every = Math.max(1, Math.ceil((high - low) / most));
    for (let power = Math.ceil(low); power <= high; power += every) found.push(power);
    if (found.length > 1) return found;
  }
  const raw = (high - low) / most || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((m) => m >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(at);
  return found;
}
const short = (x, digits = 3) => Math.abs(x) >= 1e6 ? `${number(x / 1e6, digits)}M` : Math.abs(x) >= 1e4 ? `${number(x / 1e3, digits)}k` : number(Math.abs(x) < 1e-12 ? 0 : x, digits);
/* Digits that distinguish neighboring ticks. */
const enough = (marks) => marks.length < 2 ? 4
  : Math.max(3, 1 + Math.ceil(Math.log10(Math.max(...marks.map(Math.abs)) / Math.abs(marks[1] - marks[0]))));

function chart(data) {
  const series = data.series.map((s) => {
    const steps = decode(s.steps, Uint32Array);
    return {
      run: s.run, values: decode(s.values, Float32Array), points: s.points,
      x: { steps, hours: decode(s.hours, Float32Array), images: Float64Array.from(steps, (step) => imagesAt(s.run, step)) },
    };
  });
  const canvas = el("canvas", { tabindex: "0", role: "img", "aria-label": `${data.metric} of ${series.map((s) => DATA.runs[s.run].label).join(", ")}` });
  const output = el("output");
  const box = { left: 52, right: 8, top: 6, bottom: 24 };
  let scale = null, pointer = null, drag = null;

  function draw() {
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const pen = canvas.getContext("2d");
    const theme = getComputedStyle(document.documentElement);
    pen.scale(ratio, ratio);
    pen.font = "11px system-ui, sans-serif";
    const visible = series.filter((s) => !view.hidden.has(s.run));
    let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
    const up = (value) => (view.log ? Math.log10(value) : value);
    for (const s of visible) {
      s.line = smoothed(s.values, view.smooth);
      const x = s.x[view.axis];
      for (let i = 0; i < x.length; i++) {
        if (!Number.isFinite(x[i])) continue;
        if (view.range && (x[i] < view.range[0] || x[i] > view.range[1])) continue;
        x0 = Math.min(x0, x[i]); x1 = Math.max(x1, x[i]);
        const y = up(s.values[i]);
        if (Number.isFinite(y)) { y0 = Math.min(y0, y); y1 = Math.max(y1, y); }
      }
    }
    if (view.range) [x0, x1] = view.range;
    if (!(y0 <= y1) || !(x0 <= x1)) {
      scale = null;
      pen.fillStyle = theme.getPropertyValue("--soft");
      pen.fillText(visible.length ? `no values against ${AXES[view.axis]}` : "no run is shown", box.left, height / 2);
      return;
    }
    if (y0 === y1) { const room = Math.abs(y0) * .1 || 1; y0 -= room; y1 += room; }
    if (x0 === x1) { x0 -= 1; x1 += 1; }
    const px = (x) => box.left + (x - x0) / (x1 - x0) * (width - box.left - box.right);
    const py = (y) => box.top + (y1 - y) / (y1 - y0) * (height - box.top - box.bottom);
    scale = { px, x: (p) => x0 + (p - box.left) / (width - box.left - box.right) * (x1 - x0), x0, x1 };
    pen.strokeStyle = theme.getPropertyValue("--line");
    pen.fillStyle = theme.getPropertyValue("--soft");
    pen.lineWidth = 1;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const rows = ticks(y0, y1, 5, view.log), digits = view.log ? 3 : enough(rows);
    for (const y of rows) {
      pen.beginPath(); pen.moveTo(box.left, py(y)); pen.lineTo(width - box.right, py(y)); pen.stroke();
      pen.fillText(short(view.log ? 10 ** y : y, digits), box.left - 5, py(y));
    }
    pen.textBaseline = "top";
    pen.textAlign = "center";
    for (const x of ticks(x0, x1, Math.max(2, width / 90), false)) {
      pen.fillText(short(x), Math.min(width - 16, px(x)), height - box.bottom + 6);
    }
    pen.save();
    pen.beginPath(); pen.rect(box.left, 0, width - box.left - box.right, height - box.bottom + 1); pen.clip();
    function trace(x, values) {
      pen.beginPath();
      let open = false;
      for (let i = 0; i < x.length; i++) {
        const y = up(values[i]);
        const there = Number.isFinite(y) && Number.isFinite(x[i]);
        if (there && open) pen.lineTo(px(x[i]), py(y));
        else if (there) pen.moveTo(px(x[i]), py(y));
        else if (Number.isFinite(x[i]) && !Number.isFinite(values[i])) pen.fillText("✕", px(x[i]), box.top);
        open = there;
      }
      pen.stroke();
    }
    for (const faint of [true, false]) {
      for (const s of visible) {
        const x = s.x[view.axis], { color, dash } = style(s.run);
        if (faint && s.line === s.values) continue;
        pen.strokeStyle = pen.fillStyle = color;
        pen.globalAlpha = faint ? .18 : 1;
        pen.setLineDash(faint ? [] : dash);
        pen.lineWidth = faint ? 1 : 1.8;
        trace(x, faint ? s.values : s.line);
        if (x.length < FEW / 2) {
          for (let i = 0; i < x.length; i++) {
            pen.beginPath(); pen.arc(px(x[i]), py(up(s.line[i])), 2.5, 0, 7); pen.fill();
          }
        }
      }
    }
    pen.globalAlpha = 1;
    pen.setLineDash([]);
    pen.restore();
    if (drag && drag.to != null) {
      pen.fillStyle = "#0072b233";
      pen.fillRect(Math.min(drag.from, drag.to), box.top, Math.abs(drag.to - drag.from), height - box.top - box.bottom);
    } else if (pointer != null) {
      pen.strokeStyle = theme.getPropertyValue("--soft");
      pen.beginPath(); pen.moveTo(pointer, box.top); pen.lineTo(pointer, height - box.bottom); pen.stroke();
    }
  }
  function nearest(values, x) {
    let low = 0, high = values.length - 1;
    while (low < high) { const middle = (low + high) >> 1; if (values[middle] < x) low = middle + 1; else high = middle; }
    return low > 0 && x - values[low - 1] < values[low] - x ? low - 1 : low;
  }
  function read() {
    if (pointer == null || !scale) { output.textContent = ""; return; }
    const x = scale.x(pointer);
    output.textContent = `at ${short(x)} ${AXES[view.axis]}: ` + series.filter((s) => !view.hidden.has(s.run) && s.values.length)
      .map((s) => `${DATA.runs[s.run].label} ${number(s.line ? s.line[nearest(s.x[view.axis], x)] : null)}`).join(" · ");
  }
  canvas.addEventListener("pointermove", (event) => {
    pointer = event.offsetX;
    if (drag) drag.to = event.offsetX;
    draw(); read();
  });
  canvas.addEventListener("pointerleave", () => { pointer = null; draw(); read(); });
  canvas.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "mouse") { drag = { from: event.offsetX, to: null }; canvas.setPointerCapture(event.pointerId); }
  });
  canvas.addEventListener("pointerup", () => {
    if (drag && drag.to != null && Math.abs(drag.to - drag.from) > 6 && scale) {
      view.range = [scale.x(drag.from), scale.x(drag.to)].sort((a, b) => a - b);
      canvas.dispatchEvent(new Event("zoomed", { bubbles: true }));
      drag = null;
      redraw();
    }
    drag = null;
  });
  canvas.addEventListener("dblclick", () => { view.range = null; redraw(); });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -10, ArrowRight: 10 }[event.key];
    if (!move) return;
    event.preventDefault();
    pointer = Math.max(box.left, Math.min(canvas.clientWidth - box.right, (pointer ?? canvas.clientWidth / 2) + move));
    draw(); read();
  });
  draws.push(draw);
  return el("div", { class: "chart" }, el("h3", { text: data.metric }), canvas, output);
}
function redraw() { requestAnimationFrame(() => draws.forEach((draw) => draw())); }

function sample(run) {
  const { color, dash } = style(run);
  const svg = new DOMParser().parseFromString(
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 30 10" aria-hidden="true"><line x1="0" x2="30" y1="5" y2="5" stroke="${color}" stroke-width="3" stroke-dasharray="${dash.join(" ")}"/></svg>`, "image/svg+xml");
  return document.importNode(svg.documentElement, true);
}
function curves() {
  const root = place("curves");
  if (!DATA.charts.length) {
    root.append(el("p", { class: "soft", text: "These runs have no metrics on storage." }));
    return;
  }
  const legend = el("div", { class: "legend", role: "group", "aria-label": "Runs shown" }, ...DATA.runs.map((run, index) => el("button", {
    type: "button", "aria-pressed": "true", onclick: (event) => {
      const hide = !view.hidden.has(index);
      if (hide) view.hidden.add(index); else view.hidden.delete(index);
      event.currentTarget.setAttribute("aria-pressed", String(!hide));
      redraw();
    },
  }, sample(index), run.label)));
  const axis = el("select", { id: "axis", onchange: (event) => { view.axis = event.target.value; view.range = null; redraw(); } },
    ...Object.entries(AXES).map(([value, text]) => el("option", { value, text })));
  const smooth = el("input", { type: "range", id: "smooth", min: 0, max: 0.99, step: 0.01, value: view.smooth, oninput: (event) => { view.smooth = Number(event.target.value); redraw(); } });
  const log = el("input", { type: "checkbox", id: "log", onchange: (event) => { view.log = event.target.checked; redraw(); } });
  const whole = el("button", { type: "button", id: "whole", text: "Whole range", onclick: () => { view.range = null; redraw(); } });
  const find = el("input", { type: "search", placeholder: "Filter metrics", "aria-label": "Filter metrics", oninput: (event) => {
    for (const box of root.querySelectorAll(".chart")) box.hidden = !box.textContent.toLowerCase().includes(event.target.value.toLowerCase());
    redraw();
  } });
  root.append(
    el("div", { class: "bar" }, el("label", {}, "against", axis), el("label", {}, "smooth", smooth), el("label", {}, log, "log scale"), whole, find),
    legend,
    el("p", { class: "soft", text: "Drag in a chart to enlarge a stretch of all of them; double-click for the whole. Faint lines are the values, smoothed above them; long curves keep the least and the greatest value of each stretch." }),
    el("div", { class: "charts" }, ...DATA.charts.map(chart)));
}

/* Images: all frames share one zoom. */
const zoom = { scale: 1, x: 0, y: 0 };
const frames = new Set();
function showZoom() {
  const text = `translate(${zoom.x * 100}%, ${zoom.y * 100}%) scale(${zoom.scale})`;
  for (const frame of frames) {
    frame.classList.toggle("zoomed", zoom.scale > 1.5);
    for (const image of frame.querySelectorAll("img")) image.style.transform = text;
  }
  for (const output of document.querySelectorAll(".zoom")) output.textContent = `${Math.round(zoom.scale * 100)} %`;
}
function zoomBy(factor, u = .5, v = .5) {
  const scale = Math.max(1, Math.min(32, zoom.scale * factor));
  zoom.x = u - (u - zoom.x) * scale / zoom.scale;
  zoom.y = v - (v - zoom.y) * scale / zoom.scale;
  zoom.scale = scale;
  moveBy(0, 0);
}
function moveBy(dx, dy) {
  zoom.x = Math.min(0, Math.max(1 - zoom.scale, zoom.x + dx));
  zoom.y = Math.min(0, Math.max(1 - zoom.scale, zoom.y + dy));
  showZoom();
}
function linked(frame) {
  frames.add(frame);
  const held = new Map();
  frame.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && zoom.scale === 1 && event.deltaY > 0) return; // the page scrolls on
    event.preventDefault();
    const box = frame.getBoundingClientRect();
    zoomBy(Math.exp(-event.deltaY / 300), (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  }, { passive: false });
  frame.addEventListener("pointerdown", (event) => { held.set(event.pointerId, event); frame.setPointerCapture(event.pointerId); });
  frame.addEventListener("pointermove", (event) => {
    const before = held.get(event.pointerId);
    if (!before) return;
    const box = frame.getBoundingClientRect();
    const other = [...held].find(([id]) => id !== event.pointerId);
    if (other) {
      const far = (one) => Math.hypot(one.clientX - other[1].clientX, one.clientY - other[1].clientY) || 1;
      zoomBy(far(event) / far(before), ((event.clientX + other[1].clientX) / 2 - box.left) / box.width, ((event.clientY + other[1].clientY) / 2 - box.top) / box.height);
    } else moveBy((event.clientX - before.clientX) / box.width, (event.clientY - before.clientY) / box.height);
    held.set(event.pointerId, event);
  });
  for (const end of ["pointerup", "pointercancel"]) frame.addEventListener(end, (event) => held.delete(event.pointerId));
  frame.tabIndex = 0;
  frame.addEventListener("keydown", (event) => {
    const act = { "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), 0: () => zoomBy(1 / 32),
      ArrowLeft: () => moveBy(.1, 0), ArrowRight: () => moveBy(-.1, 0), ArrowUp: () => moveBy(0, .1), ArrowDown: () => moveBy(0, -.1) }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  return frame;
}
function zoomBar() {
  return el("div", { class: "bar" },
    el("button", { type: "button", class: "closer", text: "+", "aria-label": "Enlarge", onclick: () => zoomBy(1.5) }),
    el("button", { type: "button", class: "farther", text: "−", "aria-label": "Reduce", onclick: () => zoomBy(1 / 1.5) }),
    el("button", { type: "button", class: "fit", text: "Fit", onclick: () => zoomBy(1 / 32) }),
    el("output", { class: "zoom soft", text: "100 %" }),
    el("span", { class: "soft", text: "wheel, pinch or + and − enlarge; drag or arrows move; all images move together" }));
}
function images() {
  const root = place("images"), { runs, rows, shown } = DATA.images;
  if (!rows.length && !DATA.sheets.length) {
    root.append(el("p", { class: "soft", text: "No image was measured for two of these runs." }));
    return;
  }
  let select = () => {};
  if (shown.length) select = viewer(root, shown, rows, runs);
  if (rows.length) imageTable(root, rows, runs, select, new Set(shown.map((image) => image.key)));
  if (DATA.sheets.length) sheets(root);
  showZoom();
}
const better = (x) => (DATA.primary.better === "lower" ? -x : x);

function imageTable(root, rows, runs, select, stored) {
  const groupOf = (label) => DATA.runs.find((run) => run.label === label).group;
  const other = DATA.groups.length > 1 ? DATA.groups[1].label : "";
  const mean = (row, group) => {
    const found = row.values.filter((_, index) => groupOf(runs[index]) === group);
    return found.some((x) => x == null) ? null : found.reduce((a, b) => a + b, 0) / found.length;
  };
  const columns = [{ name: "Image" }, { name: "Hole %", number: true }, { name: "Family" },
    ...runs.map((name) => ({ name, number: true })),
    ...(other ? [{ name: `${other} − ${DATA.baseline}`, number: true }] : [])];
  const heading = el("h3", { text: `${titled(DATA.primary)} of each image` });
  root.append(heading, table(columns, rows.map((row) => {
    const by = other ? (() => { const [a, b] = [mean(row, DATA.baseline), mean(row, other)]; return a == null || b == null ? null : b - a; })() : null;
    return {
      click: () => select(row.key),
      cells: [
        stored.has(row.key) ? { node: el("button", { type: "button", text: row.key, onclick: () => select(row.key) }), text: row.key } : row.key,
        { text: number(row.hole, 3), sort: row.hole }, row.family,
        ...row.values.map((x) => ({ text: number(x), sort: x })),
        ...(other ? [{ text: signed(by), sort: by, class: !by ? "" : better(by) > 0 ? "better" : "worse" }] : []),
      ],
    };
  }), { label: "images", sort: columns.length - 1, down: DATA.primary.better === "lower" }));
}

function viewer(root, shown, rows, runs) {
  const layers = [...new Set(shown.flatMap((image) => Object.keys(image.sources)))];
  const name = (layer) => layer.replace(/^run:/, "");
  const of = layers.filter((layer) => layer.startsWith("run:"));
  const values = new Map(rows.map((row) => [row.key, row]));
  const state = { key: shown[0].key, left: of[0], right: of.at(-1), at: .5 };
  const pick = (id, text, side) => el("label", {}, text, el("select", { id, onchange: (event) => { state[side] = event.target.value; show(); } },
    ...layers.map((layer) => el("option", { value: layer, text: name(layer), selected: state[side] === layer }))));
  const difference = (key) => {
    const row = values.get(key), value = (layer) => row && row.values[runs.indexOf(name(layer))];
    const [a, b] = [value(state.left), value(state.right)];
    return a == null || b == null ? null : b - a;
  };
  const order = el("select", { id: "order", onchange: () => { arrange(); show(); } },
    el("option", { value: "worst", text: "right side worst first" }), el("option", { value: "best", text: "right side best first" }), el("option", { value: "key", text: "by name" }));
  const key = el("select", { id: "key", onchange: (event) => { state.key = event.target.value; show(); } });
  const step = (by) => { key.selectedIndex = (key.selectedIndex + by + key.length) % key.length; state.key = key.value; show(); };
  function arrange() {
    const sign = order.value === "best" ? -1 : 1;
    const sorted = [...shown].sort((one, other) => order.value === "key" ? one.key.localeCompare(other.key)
      : sign * (better(difference(one.key) ?? 0) - better(difference(other.key) ?? 0)));
    key.replaceChildren(...sorted.map((image) => el("option", { value: image.key, text: image.key })));
    state.key = key.value = sorted[0].key;
  }
  const under = el("img", { alt: "" }), above = el("img", { alt: "" });
  const over = el("div", { class: "over" }, above), edge = el("div", { class: "edge" });
  const [leftName, rightName] = [el("span", { class: "name", style: "left:6px" }), el("span", { class: "name", style: "right:6px" })];
  const stage = linked(el("div", { class: "stage", role: "group", "aria-label": "Before and after" }, under, over, edge, leftName, rightName));
  const slider = el("input", { type: "range", class: "slider", id: "slider", min: 0, max: 1, step: .005, value: .5, "aria-label": "From the left to the right image", oninput: (event) => { state.at = Number(event.target.value); cut(); } });
  const caption = el("p", { class: "soft" });
  const tiles = el("div", { class: "tiles" });
  function cut() {
    over.style.clipPath = `inset(0 ${100 * (1 - state.at)}% 0 0)`;
    edge.style.left = `${100 * state.at}%`;
  }
  function show() {
    const image = shown.find((each) => each.key === state.key);
    const row = values.get(state.key), by = difference(state.key);
    const [left, right] = [image.sources[state.left], image.sources[state.right]];
    above.src = left || ""; under.src = right || "";
    above.alt = name(state.left); under.alt = name(state.right);
    leftName.textContent = name(state.left); rightName.textContent = name(state.right);
    caption.textContent = (row ? `hole ${number(row.hole, 3)} %${row.family ? `, ${row.family}` : ""}; ` : "")
      + (by == null ? "" : `${titled(DATA.primary)}: ${signed(by)} from left to right`);
    for (const frame of tiles.querySelectorAll(".frame")) frames.delete(frame);
    tiles.replaceChildren(...layers.filter((layer) => image.sources[layer]).map((layer) => {
      const value = row && row.values[runs.indexOf(name(layer))];
      return el("figure", { class: "tile" }, linked(el("div", { class: "frame" }, el("img", { src: image.sources[layer], alt: name(layer) }))),
        el("figcaption", { text: name(layer) + (value == null ? "" : ` – ${DATA.primary.label} ${number(value)} ${DATA.primary.unit}`) }));
    }));
    cut(); showZoom();
  }
  root.append(el("div", { class: "viewer" },
    el("div", { class: "bar" }, el("label", {}, "order", order), el("button", { type: "button", id: "previous", text: "‹", "aria-label": "Previous image", onclick: () => step(-1) }),
      key, el("button", { type: "button", id: "next", text: "›", "aria-label": "Next image", onclick: () => step(1) }), pick("left", "left", "left"), pick("right", "right", "right")),
    zoomBar(), el("div", { class: "beside" }, el("div", {}, stage, slider, caption), tiles)));
  arrange(); show();
  return (wanted) => {
    if (!shown.some((image) => image.key === wanted)) return;
    state.key = key.value = wanted;
    show();
    stage.scrollIntoView({ block: "center" });
  };
}

function sheets(root) {
  const tiles = DATA.sheets.map((sheet) => el("figure", { class: "tile" },
    linked(el("div", { class: "frame" }, el("img", { src: sheet.source, alt: `samples of ${sheet.run}` }))), el("figcaption", { text: sheet.run })));
  root.append(el("h3", { text: "Sheets of samples" }), ...(DATA.images.shown.length ? [] : [zoomBar()]),
    el("div", { class: "sheets" }, el("div", { class: "tiles" }, ...tiles)));
}

function costs() {
  place("cost").append(table(
    [{ name: "Run" }, { name: "Group" }, { name: "Hours", number: true }, { name: "GPU hours", number: true }, { name: "Rank hours", number: true }, { name: "Training %", number: true }, { name: "Ranks" },
      { name: "Steps", number: true }, { name: "Images", number: true }, { name: "Images/s", number: true }, { name: "Attempts", number: true }, { name: "Commit" }, { name: "Dataset" }],
    DATA.runs.map((run) => ({ cells: [run.label, run.group || "set apart", ...[run.cost.hours, run.cost.gpu_hours, run.cost.rank_hours, run.cost.goodput_percent].map((x) => ({ text: number(x, 3), sort: x })),
      run.cost.devices || "–", { text: number(run.cost.steps, 6), sort: run.cost.steps }, { text: number(run.cost.images, 4), sort: run.cost.images }, { text: number(run.cost.images_per_s, 3), sort: run.cost.images_per_s },
      run.attempts, run.commit || "–", run.dataset || "–"] })), { label: "cost" }),
    el("p", { class: "soft", text: "From the first to the last value of every attempt, with the steps that a restart repeated. Training % is the share of the wall time that was no saving, validation, restart or wait for data. Images/s is the median." }));
  const damaged = DATA.runs.filter((run) => run.damaged);
  if (damaged.length) place("cost").append(el("p", { text: `Damaged lines left out: ${damaged.map((run) => `${run.label} ${run.damaged}`).join(", ")}.` }));
}

function method() {
  for (const text of [
    `Every value is paired by image: ${DATA.images.rows.length ? "all runs filled the same holes of the same images" : "no two runs were measured on the same images"}. Differences are a group's mean minus that of ${DATA.baseline || "the baseline"}, the first one named.`,
    "Each interval on its own holds 95 %. For single runs they are over images, with the tails of a studentized bootstrap; for groups of two or more seeds they are over seeds and images, and the fewer seeds the wider.",
    `A claim is made where the corrected p is below 0.05. All questions on this page are one family (Holm): at most 5 in 100 such pages claim anything false. ${titled(DATA.primary)} over all images has four fifths of that allowance, since it was declared before looking. An interval that leaves out 0 without a claim is a hint, no more.`,
    "Values that are not a number are named under the verdict, and their metric is not compared for that run. Parts of fewer than 10 images carry no interval.",
  ]) place("method").append(el("p", { text }));
  place("method").append(el("p", { class: "soft", text: `Made ${DATA.made} by python -m pipeline compare. ${DATA.runs.map((run) => run.url).join(" · ")}` }));
}

const themes = ["light", "dark"];
function theme(name) {
  document.documentElement.dataset.theme = name;
  document.getElementById("theme").textContent = name === "dark" ? "Light" : "Dark";
  redraw();
}
document.getElementById("theme").addEventListener("click", () => theme(themes.find((name) => name !== document.documentElement.dataset.theme)));
document.getElementById("subtitle").textContent = `${DATA.runs.map((run) => run.label).join(", ")} on ${DATA.pack}; primary metric ${titled(DATA.primary)}`;
verdicts();
differs();
findings("metrics", (f) => f.kind === "all", "metrics over all images");
means();
findings("parts", (f) => f.kind !== "all", "parts of the images");
curves();
images();
costs();
method();
theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
window.addEventListener("resize", redraw);
