// Quality against what it costs: every method a point with its interval, and the front of those nothing beats.

const COSTS = {
  memory: {
    title: "Memory",
    axis: "peak training memory over baseline",
    less: true,
    bytes: true,
    of: (variant) => variant.memory_bytes,
    seeds: overBaseline,
    format: formatBytes,
  },
  peak: {
    title: "Peak",
    axis: "peak memory of the whole run",
    less: true,
    bytes: true,
    of: (variant) => (variants.some((each) => each.memory_bytes !== null) ? null : variant.peak_bytes),
    seeds: (cell) => cell.memory?.peak_bytes,
    format: formatBytes,
  },
  speed: {
    title: "Speed",
    axis: "training speed in tokens per second",
    less: false,
    of: (variant) => variant.tokens_per_second,
    seeds: (cell) => cell.throughput?.tokens_per_second,
    format: (value) => `${formatCount(value)} tokens/s`,
  },
  trainable: {
    title: "Trained",
    axis: "trained parameters",
    less: true,
    of: (variant) => variant.trainable,
    seeds: () => null,
    format: (value) => `${formatCount(value)} parameters`,
  },
  size: {
    title: "Size",
    axis: "size of what is deployed",
    less: true,
    bytes: true,
    of: (variant) => variant.artifact_bytes,
    seeds: (cell) => cell.parameters?.artifact_bytes,
    format: formatBytes,
  },
  served: {
    title: "Answers",
    axis: "answers per second once deployed",
    less: false,
    of: (variant) => variant.samples_per_second,
    seeds: (cell) => servedOf(cell).samples_per_second,
    format: (value) => `${formatCount(value)} answers/s`,
  },
  energy: {
    title: "Energy",
    axis: "energy of the training steps in joules",
    less: true,
    of: (variant) => variant.energy_joules,
    seeds: (cell) => cell.energy?.joules,
    format: formatJoules,
  },
};
const MOST_LABELS = 14;

// The points that no other beats in both: cheapest first, each better than all before it.
function frontOf(points, less, low) {
  const better = (a, b) => (low ? a < b : a > b);
  const ordered = [...points].sort((a, b) => (less ? a.x - b.x : b.x - a.x) || (better(a.y, b.y) ? -1 : 1));
  const front = [];
  for (const point of ordered) {
    if (!front.length || better(point.y, front.at(-1).y)) front.push(point);
  }
  return front;
}

function showTradeoffs(open) {
  const host = section("tradeoffs");
  const scored = metricNames.filter((name) => variants.some((v) => v.metrics[name]));
  const measured = Object.keys(COSTS).filter((key) =>
    variants.some((v) => (COSTS[key].of(v) ?? 0) > 0 && scored.some((m) => v.metrics[m])),
  );
  host.append(
    ...heading(
      "tradeoffs",
      "What quality costs",
      "Each point is one method, averaged over its seeds. The line joins those that no other beats in both respects.",
    ),
  );
  if (!measured.length) {
    host.append(
      el("p", { class: "note" }, "No run has both a score and a measured cost, so there is nothing to plot."),
    );
    return;
  }
  const state = { cost: measured[0], metric: scored[0] };
  const titles = measured.map((key) => [key, COSTS[key].title]);
  const update = () => panel.update();
  const panel = chartPanel(host, state, {
    controls: [
      segments("Cost", titles, state.cost, setting(state, "cost", update)),
      metricChooser(scored, state, update),
      lookChooser(),
    ],
    key: legend((variant) => Object.keys(variant.metrics).length),
    title: () => `${metricTitle(state.metric)} against ${COSTS[state.cost].axis}`,
    description: () => {
      const { front } = placed(state);
      return `Not beaten in both respects: ${front.map((point) => point.variant.name).join(", ")}.`;
    },
    height: (width) => (width < 560 ? 400 : 460),
    draw: (c, caption) => drawTradeoffs(c, state, caption, open),
    table: () => costTable(state),
  });
}

function placed({ cost, metric }) {
  const { of, less } = COSTS[cost];
  const points = [];
  const levels = [];
  for (const variant of variants) {
    const score = variant.metrics[metric];
    if (!score || !variant.group.shown) continue;
    const x = of(variant);
    if (x > 0) points.push({ variant, x, y: score.value, score });
    else levels.push({ name: variant.name, y: score.value });
  }
  for (const [key, name] of [
    ["chance", "chance"],
    ["majority", "most common label"],
  ]) {
    const level = variants.map((v) => v.metrics[metric]?.[key]).find((value) => value !== undefined);
    if (level !== undefined) levels.push({ name, y: level });
  }
  return { points, levels, front: frontOf(points, less, lowerIsBetter(metric)) };
}

function drawTradeoffs(c, state, caption, open) {
  const cost = COSTS[state.cost];
  const low = lowerIsBetter(state.metric);
  const { points, levels, front } = placed(state);
  const area = { left: 56, right: c.width - 16, top: 34, bottom: c.height - 52 };
  if (!points.length) {
    drawNothing(c);
    return;
  }
  const ranges = points.map((point) => spread(point.variant, cost.seeds));
  const xs = [...points.map((p) => p.x), ...ranges.filter(Boolean).flat()];
  const unit = cost.bytes ? byteUnit(Math.max(...xs)) : { bytes: 1, name: "" };
  const xUnit = fittingScale(
    xs.map((x) => x / unit.bytes),
    area.left,
    area.right,
    0.12,
  );
  const x = Object.assign((value) => xUnit(value / unit.bytes), { ticks: xUnit.ticks });
  const { y, far } = heightScale(points, levels, area);
  const title = `${cost.axis}${unit.name ? ` (${unit.name})` : ""}, ${cost.less ? "less" : "more"} is better`;
  c.axes(area, {
    x: Object.assign((tick) => xUnit(tick), { ticks: xUnit.ticks }),
    y,
    xTitle: c.width < 560 ? `${cost.axis}${unit.name ? ` (${unit.name})` : ""}` : title,
    yTitle: `${metricTitle(state.metric)}, ${low ? "less" : "more"} is better`,
    xFormat: axisNumber,
    yFormat: axisNumber,
  });
  drawFront(c, front, x, y, area, { less: cost.less, low });
  for (const point of points) c.take(x(point.x), y(point.y), 8);
  drawLevels(c, levels, far, y, area);
  const marks = new Map(points.map((point, i) => [point, drawPoint(c, point, ranges[i], x, y, front.includes(point))]));
  const crowded = points.length > MOST_LABELS;
  for (const point of [...(crowded ? front : points)].sort((a, b) => y(a.y) - y(b.y))) {
    const name = cut(point.variant.name, c.width < 560 ? 130 : 220);
    c.label(x(point.x), y(point.y), name, { area, kind: colourClass(point.variant.group), optional: crowded });
  }
  for (const point of [...points].sort((a, b) => a.x - b.x)) {
    c.hit(x(point.x), y(point.y), tradeoffLines(point, state, front), {
      mark: marks.get(point),
      onclick: () => open(point.variant.cells[0]),
    });
  }
  const several = ranges.some(Boolean);
  const over = [...new Set(points.map((point) => point.score.basis))]
    .filter((basis) => basis !== "nothing")
    .join(", or ");
  caption.textContent =
    (over ? `Vertical bars: 95 % intervals over ${over}.` : "") +
    (several && state.cost !== "trainable" ? " Horizontal bars: smallest and largest seed." : "") +
    " Filled points lie on the front, pale ones are beaten." +
    (crowded
      ? " Names are given on the front where there is room; hover, or step through with the arrow keys, for the others."
      : "");
}

// The vertical axis fits the points, and the levels that lie near them.
function heightScale(points, levels, area) {
  const bounds = points.flatMap((p) => [p.y, p.score.low ?? p.y, p.score.high ?? p.y]);
  let [low, high] = [Math.min(...bounds), Math.max(...bounds)];
  const reach = 0.75 * Math.max(high - low, 0.02 * Math.abs(high), 1e-6);
  const far = levels.filter((level) => level.y < low - reach || level.y > high + reach);
  const near = levels.filter((level) => !far.includes(level)).map((level) => level.y);
  [low, high] = [Math.min(low, ...near), Math.max(high, ...near)];
  const room = 0.1 * Math.max(high - low, 0.02 * Math.abs(high), 1e-6);
  return { y: linearScale(low - room, high + room, area.bottom, area.top), far };
}

// Steps from point to point of the front; beyond its ends the line goes on to the edges.
function drawFront(c, front, x, y, area, { less, low }) {
  const worst = low ? area.top : area.bottom;
  const far = less ? area.right : area.left;
  let d = `M${x(front[0].x)} ${worst}L${x(front[0].x)} ${y(front[0].y)}`;
  for (const [i, point] of front.entries()) {
    const next = front[i + 1];
    const until = next ? x(next.x) : far;
    d += `H${until}${next ? `V${y(next.y)}` : ""}`;
    c.takeLine(x(point.x), y(point.y), until, y(point.y));
    if (next) c.takeLine(until, y(point.y), until, y(next.y));
  }
  c.add("path", { d: `${d}V${worst}Z`, class: "front-area" });
  c.add("path", { d, class: "front-line" });
}

// Dashed lines for what has no cost; those off the axis are told in words at the edge they lie beyond.
function drawLevels(c, levels, far, y, area) {
  const near = levels.filter((level) => !far.includes(level)).sort((a, b) => b.y - a.y);
  let lowest = -Infinity;
  for (const level of near) {
    const at = y(level.y);
    c.line(area.left, at, area.right, at, "level");
    const textY = Math.max(at - 5, lowest + 14);
    lowest = textY;
    const content = `${cut(level.name, 170)} ${formatScore(level.y)}`;
    c.text(area.right - 4, textY, content, { class: "level-name", "text-anchor": "end" });
    c.taken.push({ x0: area.right - 4 - 6.4 * content.length, x1: area.right, y0: textY - 11, y1: textY + 3 });
  }
  const below = far.filter((level) => y(level.y) > area.bottom);
  const above = far.filter((level) => y(level.y) < area.top);
  for (const [word, names, at] of [
    ["below", below, area.bottom - 8],
    ["above", above, area.top + 14],
  ]) {
    if (!names.length) continue;
    const content = cut(
      `${word} this axis: ${names.map((n) => `${n.name} ${formatScore(n.y)}`).join(", ")}`,
      area.right - area.left,
    );
    c.text(area.right - 4, at, content, { class: "level-name", "text-anchor": "end" });
    c.taken.push({ x0: area.right - 6.4 * content.length, x1: area.right, y0: at - 11, y1: at + 3 });
  }
}

function drawPoint(c, point, range, x, y, onFront) {
  const [at, up] = [x(point.x), y(point.y)];
  const kind = `${colourClass(point.variant.group)} point${onFront ? " on-front" : ""}`;
  const group = c.add("g", { class: kind });
  const { low, high } = point.score;
  if (low !== undefined && high !== undefined) {
    group.append(svgEl("line", { x1: at, x2: at, y1: y(low), y2: y(high), class: "whisker" }));
  }
  if (range) group.append(svgEl("line", { x1: x(range[0]), x2: x(range[1]), y1: up, y2: up, class: "whisker" }));
  group.append(svgEl("path", { d: markerPath(point.variant.group, at, up, DOT), class: "dot" }));
  return group;
}

function tradeoffLines(point, { cost, metric }, front) {
  const score = point.score;
  return [
    point.variant.name,
    `${metricTitle(metric)} ${formatEstimate(score)}`,
    `${COSTS[cost].title.toLowerCase()} ${COSTS[cost].format(point.x)}`,
    front.includes(point) ? "on the front" : "beaten by another method in both",
  ];
}

function costTable(state) {
  const { points, levels, front } = placed(state);
  const rows = points
    .sort((a, b) => a.x - b.x)
    .map((p) => [
      p.variant.name,
      formatScore(p.y),
      formatInterval(p.score.low, p.score.high),
      COSTS[state.cost].format(p.x),
      front.includes(p) ? "yes" : "no",
    ]);
  const without = levels.map((level) => [level.name, formatScore(level.y), "", NOTHING, ""]);
  const header = ["method", metricTitle(state.metric), "95 % interval", COSTS[state.cost].axis, "on the front"];
  return plainTable(header, [...rows, ...without], [1, 2, 3], "Quality and cost");
}
