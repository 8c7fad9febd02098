// Charts as SVG, drawn by hand: a line with a band, and bars. Each has a text for screen readers, can be read with
// the arrow keys, and can be shown as a table.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 190;
const ROOM = { left: 48, right: 10, top: 10, bottom: 24 };

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  return filled(made, attributes, children);
}

function drawn(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  return filled(made, attributes, children);
}

function filled(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** Round numbers between two others, about as many as asked for. */
export function ticks(from, to, about) {
  if (!(to > from)) return [from];
  const raw = (to - from) / about;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((times) => times * size >= raw) * size;
  const first = Math.ceil(from / step - 1e-9) * step;
  const result = [];
  for (let at = first; at <= to + step * 1e-9; at += step) result.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return result;
}

/** One chart in a figure. `show` says what is drawn: see `line` and `bars`. */
export class Chart {
  constructor(figure, { title, series, unit, formatY, empty }) {
    this.figure = figure;
    this.title = title;
    this.unit = unit;
    this.formatY = formatY;
    this.empty = empty;
    this.points = [];
    this.at = null;
    figure.classList.add(`s-${series}`);
    this.readout = element("output", { "aria-live": "off" });
    const label = `${figure.id}-label`;
    this.name = element("span", { id: label }, title);
    this.svg = drawn("svg", { class: "chart", role: "img", tabindex: "0", "aria-labelledby": label, "aria-describedby": `${figure.id}-text` });
    this.text = element("p", { class: "hidden", id: `${figure.id}-text` });
    this.body = element("tbody");
    this.header = element("tr");
    this.table = element("details", {}, element("summary", {}, "As a table"), element("table", {}, element("thead", {}, this.header), this.body));
    this.table.addEventListener("toggle", () => this.fillTable());
    figure.append(element("figcaption", {}, this.name, this.readout), this.svg, this.text, this.table);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.select(null));
    this.svg.addEventListener("blur", () => this.select(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  /** Shows points {x, y, low, high}. `formatX` writes an x, `nameX` says what it is. */
  line(points, { formatX, nameX, from, title, formatY }) {
    Object.assign(this, { kind: "line", points, formatX, nameX, from });
    this.named(title, formatY);
  }

  /** Shows bars {x, y, label}. */
  bars(points, { nameX }) {
    Object.assign(this, { kind: "bars", points, formatX: (x, point) => point?.label ?? `${x}`, nameX, from: 0 });
    this.named();
  }

  named(title = this.title, formatY = this.formatY) {
    this.title = title;
    this.formatY = formatY;
    this.name.textContent = title;
    this.text.textContent = this.describe();
    if (this.at !== null && this.at >= this.points.length) this.at = null;
    this.draw();
    if (this.table.open) this.fillTable();
  }

  describe() {
    const { points } = this;
    if (points.length === 0) return this.empty;
    const last = points[points.length - 1];
    if (this.kind === "bars") {
      const largest = points.reduce((a, b) => (b.y > a.y ? b : a));
      return `${points.length} bars. Most are at ${this.nameX} ${this.formatX(largest.x, largest)}: ${this.formatY(largest.y)}. Use the arrow keys to read them.`;
    }
    const low = points.reduce((a, b) => (b.y < a.y ? b : a));
    const high = points.reduce((a, b) => (b.y > a.y ? b : a));
    return `From ${this.formatY(points[0].y)} to ${this.formatY(last.y)} at ${this.nameX} ${this.formatX(last.x, last)}. Lowest ${this.formatY(low.y)}, highest ${this.formatY(high.y)}. Use the arrow keys to read the points.`;
  }

  scales() {
    const width = Math.max(this.svg.clientWidth || 480, 120);
    const { points } = this;
    const xs = points.map((point) => point.x);
    let [fromX, toX] = [Math.min(...xs), Math.max(...xs)];
    if (this.kind === "bars") [fromX, toX] = [-0.5, Math.max(points.length, 4) - 0.5];
    if (!(toX > fromX)) [fromX, toX] = [fromX - 1, toX + 1];
    let low = Math.min(...points.map((point) => point.low ?? point.y));
    let high = Math.max(...points.map((point) => point.high ?? point.y));
    if (this.from !== undefined) low = Math.min(this.from, low);
    if (!(high > low)) [low, high] = [low, low + Math.max(Math.abs(low) * 0.1, 1e-6)];
    const room = (high - low) * 0.06;
    if (low !== this.from) low -= room;
    high += room;
    const inner = { width: width - ROOM.left - ROOM.right, height: HEIGHT - ROOM.top - ROOM.bottom };
    return {
      width, fromX, toX, low, high,
      x: (value) => ROOM.left + ((value - fromX) / (toX - fromX)) * inner.width,
      y: (value) => ROOM.top + (1 - (value - low) / (high - low)) * inner.height,
      inner,
    };
  }

  draw() {
    const { points, svg } = this;
    if (points.length === 0) {
      const width = Math.max(svg.clientWidth || 480, 120);
      svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
      svg.replaceChildren(drawn("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, this.empty));
      this.readout.textContent = "";
      return;
    }
    const scale = this.scales();
    this.scale = scale;
    svg.setAttribute("viewBox", `0 0 ${scale.width} ${HEIGHT}`);
    const parts = [];
    const bottom = HEIGHT - ROOM.bottom;
    for (const at of ticks(scale.low, scale.high, 4)) {
      const y = scale.y(at);
      parts.push(drawn("line", { class: "grid", x1: ROOM.left, x2: scale.width - ROOM.right, y1: y, y2: y }));
      parts.push(drawn("text", { x: ROOM.left - 6, y: y + 4, "text-anchor": "end" }, this.formatY(at, true)));
    }
    parts.push(drawn("line", { class: "axis-line", x1: ROOM.left, x2: scale.width - ROOM.right, y1: bottom, y2: bottom }));
    if (this.kind === "bars") {
      const wide = Math.max(scale.inner.width / Math.max(points.length, 4) - 3, 1);
      const every = Math.ceil(points.length / Math.max(Math.floor(scale.inner.width / 34), 1));
      points.forEach((point, index) => {
        const y = scale.y(point.y);
        parts.push(drawn("rect", { class: "bar", x: scale.x(index) - wide / 2, width: wide, y, height: Math.max(bottom - y, point.y > 0 ? 1 : 0), rx: 2 }));
        if (index % every === 0 || index === points.length - 1 && points.length - 1 - Math.floor((points.length - 1) / every) * every > every / 2) {
          parts.push(drawn("text", { x: scale.x(index), y: HEIGHT - 8, "text-anchor": "middle" }, this.formatX(point.x, point)));
        }
      });
    } else {
      for (const at of ticks(scale.fromX, scale.toX, Math.max(Math.floor(scale.inner.width / 90), 2))) {
        parts.push(drawn("text", { x: scale.x(at), y: HEIGHT - 8, "text-anchor": "middle" }, this.formatX(at)));
      }
      const place = (point, value) => `${scale.x(point.x).toFixed(1)},${scale.y(value).toFixed(1)}`;
      if (points.some((point) => point.high > point.low)) {
        const upper = points.map((point) => place(point, point.high));
        const lower = points.map((point) => place(point, point.low)).reverse();
        parts.push(drawn("polygon", { class: "band", points: [...upper, ...lower].join(" ") }));
      }
      parts.push(drawn("polyline", { class: "line", points: points.map((point) => place(point, point.y)).join(" ") }));
      const last = points[points.length - 1];
      parts.push(drawn("circle", { class: "dot", cx: scale.x(last.x), cy: scale.y(last.y), r: 3.5 }));
    }
    if (this.at !== null) {
      const point = points[this.at];
      const x = this.kind === "bars" ? scale.x(this.at) : scale.x(point.x);
      parts.push(drawn("line", { class: "cross", x1: x, x2: x, y1: ROOM.top, y2: bottom }));
      parts.push(drawn("circle", { class: "dot", cx: x, cy: scale.y(point.y), r: 4.5 }));
    }
    svg.replaceChildren(...parts);
    const shown = this.at === null ? points[points.length - 1] : points[this.at];
    this.readout.textContent = this.kind === "bars" && this.at === null ? "" : this.sentence(shown);
  }

  sentence(point) {
    return `${this.nameX} ${this.formatX(point.x, point)}: ${this.formatY(point.y)}${this.unit ?? ""}`;
  }

  select(index) {
    if (index === this.at) return;
    this.at = index;
    this.draw();
  }

  point(event) {
    if (this.points.length === 0 || !this.scale) return;
    const box = this.svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.scale.width;
    let best = 0;
    this.points.forEach((point, index) => {
      const place = (at, i) => this.scale.x(this.kind === "bars" ? i : at.x);
      if (Math.abs(place(point, index) - x) < Math.abs(place(this.points[best], best) - x)) best = index;
    });
    this.select(best);
  }

  key(event) {
    const last = this.points.length - 1;
    if (last < 0) return;
    const step = Math.max(Math.round(last / 40), 1);
    const at = this.at ?? last;
    const next = { ArrowLeft: at - step, ArrowRight: at + step, Home: 0, End: last, Escape: null }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    // Only what somebody asks for by key is read out.
    this.readout.setAttribute("aria-live", "polite");
    this.select(next === null ? null : Math.min(Math.max(next, 0), last));
    setTimeout(() => this.readout.setAttribute("aria-live", "off"), 500);
  }

  fillTable() {
    if (!this.table.open) return;
    const { points } = this;
    this.header.replaceChildren(element("th", { scope: "col" }, this.nameX ?? ""), element("th", { scope: "col" }, this.title));
    const most = 12;
    const every = Math.max((points.length - 1) / (most - 1), 1);
    const rows = [];
    for (let at = 0; Math.round(at) < points.length; at += every) {
      const point = points[Math.round(at)];
      rows.push(element("tr", {}, element("td", {}, this.formatX(point.x, point)), element("td", {}, this.formatY(point.y))));
    }
    this.body.replaceChildren(...rows);
  }
}

/** A bar of parts that together are 1. */
export function sharesBar(parts) {
  const svg = drawn("svg", { viewBox: "0 0 100 1", preserveAspectRatio: "none", "aria-hidden": "true" });
  let at = 0;
  for (const [name, part] of parts) {
    svg.append(drawn("rect", { class: name, x: 100 * at, y: 0, width: Math.max(100 * part, 0), height: 1 }));
    at += part;
  }
  return svg;
}
