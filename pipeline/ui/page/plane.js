// A mask or sketch: one byte for each pixel of the image, a canvas that shows it, and its history.

export class Plane {
  constructor(width, height, color) {
    this.width = width;
    this.height = height;
    this.marked = new Uint8Array(width * height); // 1 where it is painted
    this.canvas = Object.assign(document.createElement("canvas"), { width, height });
    this.context = this.canvas.getContext("2d");
    const [red, green, blue] = color;
    this.color = (255 << 24 | blue << 16 | green << 8 | red) >>> 0; // as bytes: red first
  }

  /** Set every pixel within `size` / 2 of the line from (x0, y0) to (x1, y1); returns where. */
  stroke(x0, y0, x1, y1, size, value) {
    const radius = Math.max(size / 2, 0.5);
    const left = Math.max(0, Math.floor(Math.min(x0, x1) - radius));
    const top = Math.max(0, Math.floor(Math.min(y0, y1) - radius));
    const right = Math.min(this.width, Math.ceil(Math.max(x0, x1) + radius) + 1);
    const bottom = Math.min(this.height, Math.ceil(Math.max(y0, y1) + radius) + 1);
    if (left >= right || top >= bottom) return null;
    const dx = x1 - x0, dy = y1 - y0, length = dx * dx + dy * dy;
    const near = radius * radius;
    for (let y = top; y < bottom; y++) {
      for (let x = left; x < right; x++) {
        const px = x + 0.5 - x0, py = y + 0.5 - y0;
        const along = length ? Math.min(1, Math.max(0, (px * dx + py * dy) / length)) : 0;
        const ex = px - along * dx, ey = py - along * dy;
        if (ex * ex + ey * ey <= near) this.marked[y * this.width + x] = value;
      }
    }
    const box = { left, top, right, bottom };
    this.show(box);
    return box;
  }

  /** Bring the canvas up to date inside `box`. */
  show({ left, top, right, bottom }) {
    const image = new ImageData(right - left, bottom - top);
    const colors = new Uint32Array(image.data.buffer);
    for (let y = top, at = 0; y < bottom; y++) {
      for (let x = left; x < right; x++, at++) {
        if (this.marked[y * this.width + x]) colors[at] = this.color;
      }
    }
    this.context.putImageData(image, left, top);
  }

  whole() {
    return { left: 0, top: 0, right: this.width, bottom: this.height };
  }

  /** Replace everything by `marked`. */
  set(marked) {
    this.marked = marked;
    this.show(this.whole());
  }

  cut({ left, top, right, bottom }, from = this.marked) {
    const width = right - left, part = new Uint8Array(width * (bottom - top));
    for (let y = top; y < bottom; y++) {
      const row = y * this.width;
      part.set(from.subarray(row + left, row + right), (y - top) * width);
    }
    return part;
  }

  paste({ left, top, right, bottom }, part) {
    const width = right - left;
    for (let y = top; y < bottom; y++) {
      this.marked.set(part.subarray((y - top) * width, (y - top + 1) * width), y * this.width + left);
    }
    this.show({ left, top, right, bottom });
  }

  any() {
    return this.marked.includes(1);
  }

  /** One bit a pixel, in base64: what the server reads. */
  packed() {
    const bytes = new Uint8Array(Math.ceil(this.marked.length / 8));
    for (let at = 0; at < this.marked.length; at++) {
      if (this.marked[at]) bytes[at >> 3] |= 128 >> (at & 7);
    }
    let text = "";
    for (let at = 0; at < bytes.length; at += 8190) {
      text += String.fromCharCode(...bytes.subarray(at, at + 8190));
    }
    return btoa(text);
  }
}

/** What `packed` gives, as bytes, one for each of `count` pixels. */
export function unpacked(text, count) {
  const packed = atob(text);
  const marked = new Uint8Array(count);
  for (let at = 0; at < count; at++) marked[at] = packed.charCodeAt(at >> 3) >> (7 - (at & 7)) & 1;
  return marked;
}

function joined(a, b) {
  return {
    left: Math.min(a.left, b.left), top: Math.min(a.top, b.top),
    right: Math.max(a.right, b.right), bottom: Math.max(a.bottom, b.bottom),
  };
}

const MOST_BYTES = 200e6;

/** What was painted, in steps that can be taken back. */
export class History {
  constructor() {
    this.done = [];
    this.undone = [];
    this.open = null;
  }

  /** From here on, changes of `planes` are one step. */
  begin(planes) {
    this.open = planes.map((plane) => ({ plane, before: plane.marked.slice(), box: null }));
  }

  changed(plane, box) {
    const change = box && this.open?.find((each) => each.plane === plane);
    if (change) change.box = change.box ? joined(change.box, box) : box;
  }

  end() {
    const step = (this.open || []).filter(({ box }) => box).map(({ plane, before, box }) => (
      { plane, box, before: plane.cut(box, before), after: plane.cut(box) }
    ));
    this.open = null;
    if (!step.length) return;
    this.undone = [];
    this.done.push(step);
    const bytes = (each) => each.reduce((sum, { before }) => sum + 2 * before.length, 0);
    for (let kept = this.done.reduce((sum, each) => sum + bytes(each), 0); kept > MOST_BYTES && this.done.length > 1;) {
      kept -= bytes(this.done.shift());
    }
  }

  undo() {
    this.move(this.done, this.undone, "before");
  }

  redo() {
    this.move(this.undone, this.done, "after");
  }

  move(from, to, which) {
    const step = from.pop();
    if (!step) return;
    for (const change of step) change.plane.paste(change.box, change[which]);
    to.push(step);
  }
}
