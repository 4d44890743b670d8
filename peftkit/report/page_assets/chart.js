// A chart: an SVG picture with a title and a description, drawn for the width it has, and buttons over its points.

const DOT = 6;

function linearScale(low, high, from, to) {
  const span = high - low || 1;
  const scale = (value) => from + ((value - low) / span) * (to - from);
  scale.ticks = (count) => {
    const rough = span / Math.max(1, count);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * (1 - 1e-9));
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
      ticks.push(Number((i * step).toPrecision(12)));
    return ticks;
  };
  return scale;
}

function logScale(low, high, from, to) {
  const a = Math.log10(low);
  const span = Math.log10(high) - a || 1;
  const scale = (value) => from + ((Math.log10(value) - a) / span) * (to - from);
  scale.ticks = (count) => {
    for (const steps of [[1, 2, 5], [1, 3], [1]]) {
      const ticks = [];
      for (let power = Math.floor(a); power <= Math.ceil(a + span); power++) {
        for (const step of steps) {
          const value = Number((step * 10 ** power).toPrecision(12));
          if (value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9)) ticks.push(value);
        }
      }
      if (ticks.length <= count || steps.length === 1) {
        const stride = Math.ceil(ticks.length / Math.max(1, count));
        return ticks.filter((_, i) => i % stride === 0);
      }
    }
    return [];
  };
  return scale;
}

// Logarithmic where positive values spread over more than a factor of ten.
function fittingScale(values, from, to, margin) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  if (low > 0 && high > 10 * low) {
    const room = (high / low) ** margin;
    return logScale(low / room, high * room, from, to);
  }
  const room = margin * Math.max(high - low, 0.05 * Math.abs(high), 1e-9);
  return linearScale(Math.max(low >= 0 ? 0 : -Infinity, low - room), high + room, from, to);
}

// A chart in `host`. `draw(c)` adds to it; it runs again whenever the width changes or `redraw` is called.
function chart(host, { title, description, height, draw }) {
  const titleId = newId("chart");
  const svg = svgEl("svg", { role: "img", "aria-labelledby": `${titleId}-t ${titleId}-d` });
  const hits = el("div", {
    class: "hits",
    role: "group",
    "aria-label": "Points of the chart; arrow keys step through them",
  });
  host.classList.add("chart");
  host.append(svg, hits);
  let width = 0;
  const redraw = () => {
    if (!width) return;
    hideTip();
    const tall = height(width);
    svg.setAttribute("viewBox", `0 0 ${width} ${tall}`);
    svg.replaceChildren(
      svgEl("title", { id: `${titleId}-t` }, typeof title === "function" ? title() : title),
      svgEl("desc", { id: `${titleId}-d` }, typeof description === "function" ? description() : description),
    );
    hits.replaceChildren();
    draw(new Canvas(svg, hits, width, tall));
    const first = hits.querySelector("button");
    if (first) first.tabIndex = 0;
    hits.hidden = !first;
  };
  const resize = (wide) => {
    const next = Math.round(wide);
    if (next && next !== width) {
      width = next;
      redraw();
    }
  };
  new ResizeObserver((entries) => resize(entries.at(-1).contentRect.width)).observe(host);
  hits.addEventListener("keydown", stepThrough);
  // What is printed is laid out for paper: about 180 mm at 96 pixels an inch.
  window.addEventListener("beforeprint", () => resize(690));
  window.addEventListener("afterprint", () => resize(host.clientWidth));
  return redraw;
}

// Arrow keys move between the points of a chart, Home and End to its ends, Escape puts the tooltip away.
function stepThrough(event) {
  const buttons = [...event.currentTarget.querySelectorAll("button")];
  const at = buttons.indexOf(document.activeElement);
  const next = {
    ArrowRight: at + 1,
    ArrowDown: at + 1,
    ArrowLeft: at - 1,
    ArrowUp: at - 1,
    Home: 0,
    End: buttons.length - 1,
  }[event.key];
  if (event.key === "Escape") hideTip();
  if (next === undefined || at < 0) return;
  event.preventDefault();
  const target = buttons[(next + buttons.length) % buttons.length];
  for (const button of buttons) button.tabIndex = button === target ? 0 : -1;
  target.focus();
}

class Canvas {
  constructor(svg, hits, width, height) {
    Object.assign(this, { svg, hits, width, height, taken: [] });
  }

  add(tag, attributes, ...children) {
    const element = svgEl(tag, attributes, ...children);
    this.svg.append(element);
    return element;
  }

  line(x1, y1, x2, y2, kind, more = {}) {
    return this.add("line", { x1, y1, x2, y2, class: kind, ...more });
  }

  text(x, y, content, more = {}) {
    return this.add("text", { x, y, ...more }, content);
  }

  // Axis lines, ticks, grid and titles around the plot area {left, right, top, bottom}.
  axes(area, { x, y, xTitle, yTitle, xFormat, yFormat }) {
    if (y) {
      for (const tick of y.ticks(Math.max(3, (area.bottom - area.top) / 50))) {
        this.line(area.left, y(tick), area.right, y(tick), "grid");
        this.text(area.left - 8, y(tick) + 4, yFormat(tick), { class: "tick", "text-anchor": "end" });
      }
      if (yTitle) this.text(area.left, area.top - 12, yTitle, { class: "axis" });
    }
    for (const tick of x.ticks(Math.max(2, (area.right - area.left) / 95))) {
      this.line(x(tick), area.top, x(tick), area.bottom, "grid");
      this.text(x(tick), area.bottom + 18, xFormat(tick), { class: "tick", "text-anchor": "middle" });
    }
    this.line(area.left, area.bottom, area.right, area.bottom, "edge");
    if (xTitle)
      this.text((area.left + area.right) / 2, area.bottom + 38, xTitle, { class: "axis", "text-anchor": "middle" });
  }

  // A button over a point: hovering and focusing it tell the lines, clicking opens what `onclick` says.
  hit(x, y, lines, { onclick = null, width = 24, height = 24, mark = null } = {}) {
    const button = el("button", {
      type: "button",
      class: "hit",
      tabindex: -1,
      "aria-label": lines.join(", "),
      onclick,
    });
    Object.assign(button.style, {
      left: `${(100 * (x - width / 2)) / this.width}%`,
      top: `${(100 * (y - height / 2)) / this.height}%`,
      width: `${(100 * width) / this.width}%`,
      height: `${(100 * height) / this.height}%`,
    });
    const show = () => {
      const box = button.getBoundingClientRect();
      showTip(lines, box.left + box.width / 2, box.top + box.height / 2);
      mark?.classList.add("marked");
    };
    const hide = () => {
      hideTip();
      mark?.classList.remove("marked");
    };
    for (const event of ["pointerenter", "focus"]) button.addEventListener(event, show);
    for (const event of ["pointerleave", "blur"]) button.addEventListener(event, hide);
    this.hits.append(button);
  }

  // Put a name beside a point where it covers least; one that is optional only where it covers next to nothing.
  label(x, y, content, { area, kind = "", optional = false }) {
    const wide = 7.4 * content.length + 2;
    let best = null;
    for (let ring = 0; ring < 6; ring++) {
      for (let turn = 0; turn < 16; turn++) {
        const angle = (Math.PI * turn) / 8;
        const reach = 10 + 8 * ring;
        const cx = x + Math.cos(angle) * (reach + wide / 2);
        const cy = y + Math.sin(angle) * (reach + 6);
        const box = { x0: cx - wide / 2, x1: cx + wide / 2, y0: cy - 7, y1: cy + 7 };
        const outside =
          wide * 14 - shared(box, { x0: area.left + 2, x1: area.right - 2, y0: area.top, y1: area.bottom - 2 });
        const covered = this.taken.reduce((sum, other) => sum + shared(box, other), 0);
        const cost = 3 * covered + 9 * outside + 4 * reach + 0.5 * (turn % 8);
        if (best === null || cost < best.cost) best = { cost, box, reach, cx, cy, covered };
      }
    }
    if (optional && best.covered > 40) return;
    this.taken.push(best.box);
    if (best.reach > 20) {
      const edgeX = Math.max(best.box.x0, Math.min(x, best.box.x1));
      const edgeY = Math.max(best.box.y0, Math.min(y, best.box.y1));
      this.line(x, y, edgeX, edgeY, `leader ${kind}`);
    }
    this.text(best.cx, best.cy + 4, content, { class: `name ${kind}`, "text-anchor": "middle" });
  }

  // Keep names off a line that is level or upright.
  takeLine(x0, y0, x1, y1) {
    this.taken.push({
      x0: Math.min(x0, x1) - 2,
      x1: Math.max(x0, x1) + 2,
      y0: Math.min(y0, y1) - 2,
      y1: Math.max(y0, y1) + 2,
    });
  }

  take(x, y, reach) {
    this.taken.push({ x0: x - reach, x1: x + reach, y0: y - reach, y1: y + reach });
  }
}

function shared(one, other) {
  const wide = Math.min(one.x1, other.x1) - Math.max(one.x0, other.x0);
  const high = Math.min(one.y1, other.y1) - Math.max(one.y0, other.y0);
  return wide > 0 && high > 0 ? wide * high : 0;
}

// The unit that a byte axis counts in, so that its ticks are round numbers.
function byteUnit(largest) {
  const power = Math.max(0, Math.min(4, Math.floor(Math.log(largest) / Math.log(1024) - 0.2)));
  return { bytes: 1024 ** power, name: ["B", "KiB", "MiB", "GiB", "TiB"][power] };
}

// A name in so many pixels: `learning_rate=` becomes `lr=`, then its middle goes, as names of a grid differ at the end.
function cut(name, pixels) {
  const most = Math.max(5, Math.floor(pixels / 6.9));
  if (name.length <= most) return name;
  const short = name.replace(/[a-z]+(?:_[a-z]+)+(?==)/g, (key) =>
    key
      .split("_")
      .map((word) => word[0])
      .join(""),
  );
  if (short.length <= most) return short;
  const tail = Math.floor((most - 1) / 2);
  return `${short.slice(0, most - 1 - tail)}…${short.slice(short.length - tail)}`;
}

function axisNumber(value) {
  if (Number.isInteger(value) && Math.abs(value) < 10000) return (value < 0 ? MINUS : "") + grouped(Math.abs(value));
  if (value !== 0 && Math.abs(value) < 1000) return String(Number(value.toPrecision(4))).replace("-", MINUS);
  return formatCount(value).replace("-", MINUS);
}
