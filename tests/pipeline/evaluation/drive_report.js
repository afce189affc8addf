"use strict"; // run inside the page by test_report.py
const out = { errors: [] };
window.addEventListener("error", (event) => out.errors.push(event.message));
const $ = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
// Without a screen and with its own clock, the browser draws hardly any frames.
window.requestAnimationFrame = (draw) => setTimeout(draw, 0);
const wait = () => new Promise((done) => setTimeout(done, 50));
const set = (selector, value, kind) => {
  $(selector).value = value;
  $(selector).dispatchEvent(new Event(kind, { bubbles: true }));
};
const column = (name) => all("#metrics thead button").find((button) => button.textContent === name);
const firsts = () => all("#metrics > div > div:first-child tbody tr").map((row) => row.firstChild.textContent);
const inked = (canvas) => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height)
  .data.filter((value, index) => index % 4 === 3 && value).length;
const content = (canvas) => canvas.toDataURL();
const moves = () => new Set(all(".stage img, .frame img").map((image) => image.style.transform));
(async () => {
  await wait();
  out.verdict = $(".verdict .text").textContent;
  out.scrolls = document.documentElement.scrollWidth > innerWidth;
  column("Difference [95 %]").click(); out.down = firsts();
  column("Difference [95 %]").click(); out.up = firsts();
  out.sorted = column("Difference [95 %]").parentElement.getAttribute("aria-sort");
  set("#metrics input", "psnr", "input"); out.filtered = firsts();
  set("#metrics input", "nothing like that", "input"); out.none = firsts();
  out.ink = all(".chart canvas").map(inked);
  const before = content($(".chart canvas"));
  set("#axis", "images", "change"); await wait(); out.axis = before !== content($(".chart canvas"));
  const shown = content($(".chart canvas"));
  $(".legend button").click(); await wait(); out.hidden = shown !== content($(".chart canvas"));
  set("#smooth", 0, "input"); set("#log", "on", "change"); await wait(); out.logged = inked($(".chart canvas"));
  const chart = $(".chart canvas");
  const at = (kind, x) => chart.dispatchEvent(new PointerEvent(kind, { clientX: chart.getBoundingClientRect().left + x, clientY: chart.getBoundingClientRect().top + 50, bubbles: true }));
  at("pointermove", 200); await wait(); out.readout = $(".chart output").textContent;
  out.fit = [...moves()];
  $(".closer").click(); $(".closer").click(); out.closer = [...moves()];
  const box = $(".stage").getBoundingClientRect();
  $(".stage").dispatchEvent(new WheelEvent("wheel", { deltaY: -300, clientX: box.left + 1, clientY: box.top + 1, cancelable: true }));
  out.wheel = [...moves()];
  $(".frame").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" })); out.moved = [...moves()];
  out.percent = $(".zoom").textContent;
  $(".fit").click(); out.back = [...moves()];
  set("#slider", .25, "input"); out.clip = $(".over").style.clipPath;
  out.worst = $("#key").value; set("#order", "best", "change"); out.best = $("#key").value;
  $("#next").click(); out.next = $("#key").value;
  set("#left", "original", "change"); out.left = $(".over img").alt;
  const dark = getComputedStyle(document.body).backgroundColor;
  $("#theme").click(); out.theme = dark !== getComputedStyle(document.body).backgroundColor;
  out.requests = performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("data:")).map((entry) => entry.name);
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(out);
  document.body.replaceChildren(result);
})();
