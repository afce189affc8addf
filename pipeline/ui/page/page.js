import { History, Plane, unpacked } from "./plane.js";

const $ = (id) => document.getElementById(id);
const COLORS = { hole: [230, 25, 75], sketch: [0, 200, 255] };
const TOOLS = ["hole", "sketch", "eraser"];
const LARGEST_BRUSH_PX = 512;
const ASK_EVERY_MS = 150;
const OPTIONS = ["crop_margin_px", "size_limit_px", "dilate_px", "feather_px"];

let session = sessionStorage.getItem("session") || "";
let limits = {};
let guided = {}; // by weights
let image = null; // {key, name, width, height, bitmap}
let hole = null, sketch = null;
let history = new History();
let tool = "hole";
const sizes = { hole: 40, sketch: 3, eraser: 40 };
let view = { scale: 1, left: 0, top: 0 };
let pointer = null; // in pixels of the image
let down = null; // what is held: the brush by "pointer" or "key", the image ("move"), the "split"
let job = null;
let shown = null; // the result under the slider
let results = [];

// Requests

async function ask(method, path, body) {
  const headers = { "X-Session": session };
  const answer = await fetch(path, { method, headers, body }).catch(() => {
    throw new Error("the program behind this page does not answer: start it again, then reload");
  });
  if (answer.ok) return answer;
  const fault = await answer.json().catch(() => ({ error: `the answer was ${answer.status}` }));
  throw new Error(fault.error);
}
const askJson = async (...request) => (await ask(...request)).json();

function say(text, wrong = false) {
  const line = Object.assign(document.createElement("p"), { textContent: text });
  line.classList.toggle("wrong", wrong);
  $("messages").append(line);
  while ($("messages").children.length > 30) $("messages").firstChild.remove();
  $("messages").scrollTop = $("messages").scrollHeight;
}

/** Run `work`, and show what goes wrong on the page. */
const safely = (work) => async (...given) => {
  try {
    await work(...given);
  } catch (error) {
    say(error.message, true);
  }
};

// The image

async function readFile(file) {
  if (file.size > limits.max_bytes) {
    throw new Error(`${file.name} has more bytes than this page takes, ` +
      `${Math.round(limits.max_bytes / 1e6)} MB: start it with a larger --max-mb`);
  }
  return file.arrayBuffer();
}

async function openFile(file) {
  const name = encodeURIComponent(file.name || "pasted.png");
  await showImage(await askJson("POST", `/api/image?name=${name}`, await readFile(file)));
}

async function bitmapAt(path) {
  return createImageBitmap(await (await ask("GET", path)).blob());
}

async function showImage(found) {
  const bitmap = await bitmapAt(`/api/image/${found.image}`);
  image = { key: found.image, name: found.name, width: found.width, height: found.height, bitmap };
  hole = new Plane(image.width, image.height, COLORS.hole);
  sketch = new Plane(image.width, image.height, COLORS.sketch);
  history = new History();
  shown = null;
  sizes.hole = sizes.eraser = Math.max(4, Math.round(Math.min(image.width, image.height) / 12));
  sizes.sketch = Math.max(1, Math.round(Math.min(image.width, image.height) / 200));
  pointer = null;
  $("file").textContent = `${image.name}, ${image.width} × ${image.height}`;
  choose(tool);
  fitView();
}

async function loadPlane(plane, file) {
  if (!image) throw new Error("open an image first");
  const name = encodeURIComponent(file.name);
  const path = `/api/mask?image=${image.key}&name=${name}`;
  const found = await askJson("POST", path, await readFile(file));
  for (const message of found.messages) say(message);
  replace([plane], () => unpacked(found.plane, image.width * image.height));
}

/** Give each of `planes` new pixels, as one step of the history. */
function replace(planes, pixels) {
  history.begin(planes);
  for (const plane of planes) {
    plane.set(pixels(plane));
    history.changed(plane, plane.whole());
  }
  history.end();
  edit();
}

async function propose() {
  if (!image) throw new Error("open an image first");
  $("propose").disabled = true;
  try {
    const body = JSON.stringify({
      image: image.key, mask: hole.packed(), detector: $("detector").value,
      weights: $("weights").value, strategy: $("strategy").value,
    });
    const found = await askJson("POST", "/api/proposal", body);
    replace([sketch], () => unpacked(found.plane, image.width * image.height));
    say(sketch.any() ? "The sketch is proposed: edit it with brush and eraser."
      : "Nothing was found inside the hole.");
    choose("sketch");
  } finally {
    $("propose").disabled = false;
  }
}

// Brushes

function choose(name) {
  if (name === "sketch" && !isGuided()) name = "hole";
  tool = name;
  for (const each of TOOLS) $(each).setAttribute("aria-pressed", each === name);
  $("size").value = 100 * Math.log(sizes[name]) / Math.log(LARGEST_BRUSH_PX);
  $("size-px").textContent = `${sizes[name]} px`;
  edit();
}

function resizeBrush(px) {
  sizes[tool] = Math.min(LARGEST_BRUSH_PX, Math.max(1, Math.round(px)));
  choose(tool);
}

function putDown(how) {
  down = how;
  history.begin([hole, sketch]);
  paint(pointer, pointer);
}

function lift() {
  if (down === "pointer" || down === "key") history.end();
  down = null;
  draw();
}

function paint(from, to) {
  const value = tool === "eraser" ? 0 : 1;
  const planes = tool === "eraser" ? [hole, sketch] : [tool === "hole" ? hole : sketch];
  for (const plane of planes) {
    history.changed(plane, plane.stroke(from.x, from.y, to.x, to.y, sizes[tool], value));
  }
  draw();
}

function stepThrough(back) {
  if (down) return;
  if (back) history.undo();
  else history.redo();
  edit();
}

function clearAll() {
  if (image) replace([hole, sketch], (plane) => new Uint8Array(plane.marked.length));
}

function invertHole() {
  if (image) replace([hole], (plane) => plane.marked.map((value) => 1 - value));
}

// Drawing

const canvas = $("canvas");
const context = canvas.getContext("2d");
let drawn = false;

function draw() {
  if (drawn) return;
  drawn = true;
  requestAnimationFrame(() => {
    drawn = false;
    drawNow();
  });
}

function drawNow() {
  const ratio = devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, width, height);
  $("empty").hidden = Boolean(shown || image);
  $("undo").disabled = !history.done.length;
  $("redo").disabled = !history.undone.length;
  $("comparing").hidden = $("before").hidden = $("after").hidden = !shown;
  if (!shown && !image) return;
  const place = () => context.setTransform(
    view.scale * ratio, 0, 0, view.scale * ratio, view.left * ratio, view.top * ratio,
  );
  place();
  context.imageSmoothingEnabled = view.scale < 2;
  if (shown) {
    drawComparison(ratio, place);
    return;
  }
  context.drawImage(image.bitmap, 0, 0);
  context.globalAlpha = 0.55;
  context.drawImage(hole.canvas, 0, 0);
  context.globalAlpha = 1;
  if (isGuided()) context.drawImage(sketch.canvas, 0, 0);
  if (pointer) drawBrush();
}

function drawComparison(ratio, place) {
  context.drawImage(shown.before, 0, 0);
  context.save();
  const boundary = $("split").value / 100 * shown.before.width;
  context.beginPath();
  context.rect(boundary, 0, shown.before.width, shown.before.height);
  context.clip();
  context.drawImage(shown.after, 0, 0);
  context.restore();
  context.setTransform(1, 0, 0, 1, 0, 0);
  const x = (view.left + boundary * view.scale) * ratio;
  context.fillStyle = "#000";
  context.fillRect(x - 2 * ratio, 0, 4 * ratio, canvas.height);
  context.fillStyle = "#fff";
  context.fillRect(x - ratio, 0, 2 * ratio, canvas.height);
  place();
}

function drawBrush() {
  context.beginPath();
  context.arc(pointer.x, pointer.y, sizes[tool] / 2, 0, 2 * Math.PI);
  for (const [color, width] of [["#000", 3], ["#fff", 1]]) {
    context.strokeStyle = color;
    context.lineWidth = width / view.scale;
    context.stroke();
  }
}

function fitView() {
  const whole = shown || image;
  if (!whole) return;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const scale = Math.min(width / whole.width, height / whole.height, 8);
  view = { scale, left: (width - scale * whole.width) / 2, top: (height - scale * whole.height) / 2 };
  draw();
}

function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const scale = Math.min(32, Math.max(0.02, view.scale * factor));
  const ratio = scale / view.scale;
  view = { scale, left: x - (x - view.left) * ratio, top: y - (y - view.top) * ratio };
  draw();
}

function edit() {
  compare(null);
}

// Fill

function options() {
  const strategy = $("strategy").value;
  const chosen = { strategy };
  const unused = { full: ["crop_margin_px", "size_limit_px"], resize: ["crop_margin_px"] }[strategy] || [];
  for (const name of OPTIONS) {
    if ($(name).value !== "" && !unused.includes(name)) chosen[name] = Number($(name).value);
  }
  return chosen;
}

async function fill() {
  if (job) return;
  if (!image) throw new Error("open an image first");
  job = "asked";
  busy(true);
  try {
    let found = await askJson("POST", "/api/fill", JSON.stringify({
      image: image.key, mask: hole.packed(), sketch: sketch.packed(),
      weights: $("weights").value, device: $("device").value, options: options(),
    }));
    job = found.job;
    for (let said = 0; ; await new Promise((done) => setTimeout(done, ASK_EVERY_MS))) {
      for (; said < found.messages.length; said++) {
        const last = found.state === "failed" && said === found.messages.length - 1;
        say(found.messages[said], last);
      }
      $("progress").value = found.progress;
      if (!["waiting", "running"].includes(found.state)) break;
      found = await askJson("GET", `/api/fill/${job}`);
    }
    if (found.state === "canceled") say("Canceled: nothing was filled.");
    if (found.result) {
      say(`Filled in ${found.result.seconds.toFixed(1)} s.`);
      await keep(found.result);
      compare(results[0]);
    }
  } finally {
    job = null;
    busy(false);
  }
}

async function cancel() {
  if (job && job !== "asked") await ask("POST", `/api/fill/${job}/cancel`);
}

function busy(now) {
  $("fill").disabled = now;
  $("cancel").disabled = !now;
  $("progress").value = 0;
  document.body.setAttribute("aria-busy", now);
}

// Results

const KEPT = 8; // as many as the server keeps

async function keep(result) {
  const [before, after] = await Promise.all(
    ["before", "after"].map((file) => bitmapAt(`/api/result/${result.result}/${file}`)),
  );
  results = [{ ...result, before, after }, ...results].slice(0, KEPT);
  listResults();
}

function listResults() {
  $("none").hidden = results.length > 0;
  $("results").replaceChildren(...results.map((result) => {
    const button = document.createElement("button");
    const small = document.createElement("canvas");
    const scale = Math.min(1, 240 / result.width, 160 / result.height);
    Object.assign(small, { width: Math.max(1, scale * result.width), height: Math.max(1, scale * result.height) });
    small.getContext("2d").drawImage(result.after, 0, 0, small.width, small.height);
    const note = document.createElement("small");
    const settings = Object.entries(result.settings).map(([name, value]) => `${name} ${value}`);
    note.textContent = `${settings.join(", ")}, ${result.seconds.toFixed(1)} s`;
    button.append(small, note);
    button.addEventListener("click", safely(() => compare(result)));
    return button;
  }));
}

/** Show `result` under the slider; null goes back to the hole. */
function compare(result) {
  const [old, now] = [shown || image, result || image];
  shown = result;
  if (now && (old?.width !== now.width || old.height !== now.height)) fitView();
  draw();
}

async function save(event) {
  event.preventDefault();
  if (!shown) return;
  const file = await (await ask("GET", `/api/result/${shown.result}/file`)).blob();
  const link = Object.assign(document.createElement("a"), {
    href: URL.createObjectURL(file), download: `${shown.name}.png`,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

async function useResult() {
  if (!shown) return;
  await showImage(await askJson("POST", `/api/result/${shown.result}/open`));
  say("The result is the image to fill now: paint the next hole.");
}

// Settings

const isGuided = () => guided[$("weights").value] ?? false;

function addWeights({ source, guided: sketches }) {
  if (!(source in guided)) {
    if (![...$("weights").options].some((each) => each.value === source)) {
      $("weights").append(new Option(source, source));
    }
    guided[source] = sketches;
  }
}

async function openWeights(source) {
  const before = $("weights").dataset.chosen;
  try {
    say(`Opening ${source}`);
    const found = await askJson("POST", "/api/weights", JSON.stringify({ source }));
    addWeights(found);
    $("weights").value = found.source;
    say(`${found.source} is open.`);
  } catch (error) {
    $("weights").value = before;
    throw error;
  } finally {
    showSettings();
  }
}

function showSettings() {
  $("weights").dataset.chosen = $("weights").value;
  for (const each of document.querySelectorAll(".guided")) each.hidden = !isGuided();
  $("kind").textContent = isGuided() ? "These weights follow a sketch."
    : "These weights take no sketch.";
  const strategy = $("strategy").value;
  document.querySelector(".scaled").hidden = strategy === "full";
  document.querySelector(".cropped").hidden = strategy !== "crop";
  if (tool === "sketch" && !isGuided()) choose("hole");
  draw();
}

const STRATEGIES = {
  full: "the whole image as it is", crop: "around each hole", resize: "the whole image, smaller",
};

async function start() {
  const found = await askJson("POST", "/api/session");
  session = found.session;
  sessionStorage.setItem("session", session);
  limits = found;
  for (const source of found.sources) $("weights").append(new Option(source, source));
  addWeights(found.weights);
  $("weights").value = found.weights.source;
  for (const [device, name] of Object.entries(found.devices)) $("device").append(new Option(name, device));
  for (const name of found.strategies) {
    $("strategy").append(new Option(`${name}: ${STRATEGIES[name] || ""}`, name));
  }
  $("others").hidden = !found.any_source;
  showSettings();
  if (found.image) await showImage(found.image);
  for (const result of found.results) await keep(result);
  choose("hole");
  document.body.dataset.ready = "yes";
}

// Events

const at = (event) => {
  const box = canvas.getBoundingClientRect();
  return {
    x: (event.clientX - box.left - view.left) / view.scale,
    y: (event.clientY - box.top - view.top) / view.scale,
  };
};

function moveSplit(event) {
  $("split").value = 100 * at(event).x / shown.width;
}

canvas.addEventListener("pointerdown", (event) => {
  if (!image && !shown) return;
  canvas.focus({ focusVisible: false });
  if (event.button === 1 || event.altKey) {
    down = "move";
  } else if (shown) {
    down = "split";
    moveSplit(event);
  } else if (event.button === 0 && !down) {
    pointer = at(event);
    putDown("pointer");
  } else {
    return;
  }
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  if (down === "move") {
    view.left += event.movementX;
    view.top += event.movementY;
  } else if (down === "split") {
    moveSplit(event);
  } else if (image && !shown) {
    const to = at(event);
    if (down === "pointer") paint(pointer, to);
    pointer = to;
  }
  draw();
});
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, lift);
canvas.addEventListener("pointerleave", () => {
  if (!down) pointer = null;
  draw();
});
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const box = canvas.getBoundingClientRect();
  zoom(Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top);
}, { passive: false });

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
canvas.addEventListener("keydown", (event) => {
  if (!image || shown) return;
  const arrow = ARROWS[event.key];
  if (arrow) {
    event.preventDefault();
    const from = pointer || { x: image.width / 2, y: image.height / 2 };
    const far = event.shiftKey ? 1 : Math.max(1, Math.round(sizes[tool] / 4));
    const inside = (value, most) => Math.min(most, Math.max(0, value));
    pointer = {
      x: inside(from.x + far * arrow[0], image.width), y: inside(from.y + far * arrow[1], image.height),
    };
    if (down === "key") paint(from, pointer);
    draw();
  } else if (event.key === " ") {
    event.preventDefault();
    pointer ||= { x: image.width / 2, y: image.height / 2 };
    if (down === "key") lift();
    else if (!down) putDown("key");
  }
});
canvas.addEventListener("blur", () => {
  if (down === "key") lift();
});

const KEYS = {
  h: () => choose("hole"), s: () => choose("sketch"), e: () => choose("eraser"),
  "[": () => resizeBrush(sizes[tool] / 1.25 - 0.5), "]": () => resizeBrush(sizes[tool] * 1.25 + 0.5),
  "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: fitView,
};
document.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase();
  if (key === "escape") safely(cancel)();
  if (event.target.matches("input:not([type=range], [type=file]), select")) return;
  if (event.ctrlKey || event.metaKey) {
    if (key === "enter") safely(fill)();
    else if (key === "z") stepThrough(!event.shiftKey);
    else if (key === "y") stepThrough(false);
    else return;
    event.preventDefault();
  } else if (!event.altKey && KEYS[key]) {
    event.preventDefault();
    KEYS[key]();
  }
});

const firstFile = (list) => [...list || []].find((file) => file.type.startsWith("image/") || file.name);
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("stage").classList.add("over");
});
document.addEventListener("dragleave", () => $("stage").classList.remove("over"));
document.addEventListener("drop", safely(async (event) => {
  event.preventDefault();
  $("stage").classList.remove("over");
  const file = firstFile(event.dataTransfer.files);
  if (!file) throw new Error("that is no file: drop an image from this machine");
  await openFile(file);
}));
document.addEventListener("paste", safely(async (event) => {
  const file = firstFile(event.clipboardData.files);
  if (file) await openFile(file);
}));

const onFile = (id, work) => $(id).addEventListener("change", safely(async () => {
  const [file] = $(id).files;
  $(id).value = ""; // so that the same file can be chosen again
  if (file) await work(file);
}));
onFile("open", openFile);
onFile("load-hole", (file) => loadPlane(hole, file));
onFile("load-sketch", (file) => loadPlane(sketch, file));
for (const name of TOOLS) $(name).addEventListener("click", () => choose(name));
$("size").addEventListener("input", () => resizeBrush(LARGEST_BRUSH_PX ** ($("size").value / 100)));
$("split").addEventListener("input", draw);
$("settings").addEventListener("submit", safely(async (event) => {
  event.preventDefault();
  await fill();
}));
$("weights").addEventListener("change", safely(async () => {
  const source = $("weights").value;
  if (source in guided) showSettings();
  else await openWeights(source);
}));
$("open-weights").addEventListener("click", safely(() => openWeights($("source").value.trim())));
$("source").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  $("open-weights").click();
});
for (const [id, work] of Object.entries({
  undo: () => stepThrough(true), redo: () => stepThrough(false), clear: clearAll, invert: invertHole, propose, cancel, save,
  use: useResult, edit, fit: fitView, in: () => zoom(1.25), out: () => zoom(0.8),
})) $(id).addEventListener("click", safely(work));
$("strategy").addEventListener("change", showSettings);
new ResizeObserver(fitView).observe(canvas);
safely(start)();
