// Learning curves: one line a run, training loss or what the validation split scored.

const MOST_CURVES = 12;

function curveSeries() {
  const names = new Set();
  for (const cell of cells) {
    for (const name of Object.keys(cell.curves?.validation ?? {})) if (name !== "step") names.add(name);
  }
  const found = cells.some((cell) => cell.curves?.training) ? [["training", "training loss"]] : [];
  return [...found, ...[...names].map((name) => [name, `validation ${metricTitle(name)}`])];
}

// [[x, y], ...] of one run; steps, or epochs where the log says how long one is.
function curveOf(cell, { series, unit }) {
  const part = series === "training" ? cell.curves?.training : cell.curves?.validation;
  const values = series === "training" ? part?.loss : part?.[series];
  if (!values) return [];
  const scale = unit === "epoch" ? (cell.curves.epochs_per_step ?? null) : 1;
  if (scale === null) return [];
  return values.map((value, i) => [part.step[i] * scale, value]).filter(([, value]) => value !== null);
}

function showCurves() {
  const host = section("curves");
  const lead = "How the runs got there. One line is one run; seeds of a method share its look.";
  host.append(...heading("curves", "Learning curves", lead));
  const series = curveSeries();
  if (!series.length) {
    host.append(el("p", { class: "note" }, "No run left a log or a validation history."));
    return;
  }
  const preferred = series.find(([name]) => name === mainMetric?.replace("validation ", "")) ?? series[0];
  const state = { series: series[0][0] === "training" ? "training" : preferred[0], unit: "step", all: false };
  const title = () => series.find(([name]) => name === state.series)[1];
  const lengths = [
    ["step", "Steps"],
    ["epoch", "Epochs"],
  ];
  const epochs = cells.some((cell) => cell.curves?.epochs_per_step);
  const walker = el("button", {
    type: "button",
    class: "walker",
    "aria-label": "Walk along the curves: left and right along one, up and down to the next",
  });
  const update = () => panel.update();
  const panel = chartPanel(host, state, {
    controls: [
      chooser("Shown", series, state.series, setting(state, "series", update)),
      epochs ? segments("Along", lengths, state.unit, setting(state, "unit", update)) : null,
    ],
    key: legend((variant) => variant.cells.some((cell) => cell.curves?.training || cell.curves?.validation)),
    more: { most: MOST_CURVES, of: "methods", count: () => curvedVariants(state, true).length },
    title,
    description: () =>
      curvedVariants(state)
        .map((variant) => endInWords(variant, state))
        .join("; "),
    height: (width) => (width < 560 ? 340 : 420),
    draw: (c, caption) => drawCurves(c, state, title(), walker, caption),
    table: () => curveTable(state),
  });
  panel.figure.append(walker);
}

// Shown methods that have this series, best first; the first few unless all are asked for.
function curvedVariants(state, every = state.all) {
  const found = variants.filter((v) => v.group.shown && v.cells.some((cell) => curveOf(cell, state).length));
  return every ? found : found.slice(0, MOST_CURVES);
}

function endInWords(variant, state) {
  const ends = variant.cells.map((cell) => curveOf(cell, state).at(-1)?.[1]).filter((value) => value !== undefined);
  return `${variant.name} ends at ${ends.map(formatScore).join(", ")}`;
}

function drawCurves(c, state, title, walker, caption) {
  const shown = curvedVariants(state);
  const lines = shown
    .flatMap((variant) => variant.cells.map((cell) => ({ cell, points: curveOf(cell, state) })))
    .filter((line) => line.points.length);
  walker.hidden = !lines.length;
  if (!lines.length) {
    drawNothing(c);
    return;
  }
  const own = (variant) => lines.filter((line) => line.cell.variant === variant);
  const trends = shown.map((variant) => trendOf(variant, own(variant))).filter(Boolean);
  for (const line of lines) line.trend = trends.some((trend) => trend.variant === line.cell.variant);
  const named = c.width >= 640 && shown.length <= MOST_CURVES;
  const room = named ? Math.min(210, 20 + 6.9 * Math.max(...shown.map((v) => v.name.length))) : 16;
  const area = { left: 56, right: c.width - room, top: 34, bottom: c.height - 52 };
  const { x, y } = curveScales(lines, state, area);
  c.axes(area, {
    x,
    y,
    xTitle: state.unit === "epoch" ? "epoch" : "optimizer step",
    yTitle: title,
    xFormat: axisNumber,
    yFormat: axisNumber,
  });
  for (const line of lines) drawRun(c, line, x, y);
  for (const trend of trends) drawTrend(c, trend, x, y);
  if (named) nameEnds(c, shown, lines, trends, area);
  walk(walker, lines, c.add("circle", { r: 6, class: "cursor", visibility: "hidden" }), c, state);
  caption.textContent = curveCaption(state, trends.length > 0, curvedVariants(state, true).length - shown.length);
}

// Losses on a logarithmic axis where they spread widely.
function curveScales(lines, state, area) {
  const xs = lines.flatMap((line) => [line.points[0][0], line.points.at(-1)[0]]);
  const ys = lines.flatMap((line) => line.points.map(([, value]) => value));
  const bottom = ys.reduce((a, b) => Math.min(a, b));
  const top = ys.reduce((a, b) => Math.max(a, b));
  const room = 0.06 * (top - bottom || 0.1);
  const isLoss = lowerIsBetter(state.series) || state.series === "training";
  return {
    x: linearScale(Math.min(0, ...xs), Math.max(...xs), area.left, area.right),
    y: isLoss
      ? fittingScale([bottom, top], area.bottom, area.top, 0.05)
      : linearScale(bottom - room, top + room, area.bottom, area.top),
  };
}

function drawRun(c, line, x, y) {
  const { group } = line.cell.variant;
  line.pixels = line.points.map(([a, b]) => [x(a), y(b)]);
  line.element = c.add("g", { class: `${colourClass(group)} curve` });
  const look = { class: `run-line ${line.trend ? "pale" : ""}`, "stroke-dasharray": line.trend ? null : dashOf(group) };
  line.element.append(svgEl("path", { d: pathOf(line.pixels), ...look }));
  if (line.pixels.length > 12) return;
  for (const [a, b] of line.pixels) {
    line.element.append(svgEl("path", { d: markerPath(group, a, b, 4), class: "dot" }));
  }
}

function drawTrend(c, trend, x, y) {
  const { group } = trend.variant;
  const pixels = trend.points.map(([a, b]) => [x(a), y(b)]);
  trend.end = pixels.at(-1);
  const look = { class: `run-line trend ${colourClass(group)}`, "stroke-dasharray": dashOf(group) };
  c.add("path", { d: pathOf(pixels), ...look });
}

function curveCaption(state, smoothed, hidden) {
  const source =
    state.series === "training"
      ? "Loss of the steps that are in the log; of more than 200, neighbours are averaged."
      : "Scored on the validation split during training.";
  const trend = " Pale: the runs. Strong: the mean of a method's seeds, over neighbouring points where there are many.";
  const rest = ` The best ${MOST_CURVES} methods; ${hidden} more are hidden.`;
  return source + (smoothed ? trend : "") + (hidden > 0 ? rest : "");
}

const SMOOTHED_ABOVE = 30;

// The mean of a method's seeds, smoothed where lines are long; null for one short line, and for seeds logged unalike.
function trendOf(variant, lines) {
  const count = lines[0]?.points.length ?? 0;
  if (!count || lines.some((line) => line.points.length !== count) || (lines.length < 2 && count <= SMOOTHED_ABOVE))
    return null;
  const means = lines[0].points.map((_, i) => mean(lines.map((line) => line.points[i][1])));
  const reach = count > SMOOTHED_ABOVE ? Math.round(count / 30) : 0;
  const points = lines[0].points.map(([at], i) => {
    return [at, mean(means.slice(Math.max(0, i - reach), i + reach + 1))];
  });
  return { variant, points };
}

function pathOf(pixels) {
  return `M${pixels.map(([a, b]) => `${a.toFixed(1)} ${b.toFixed(1)}`).join("L")}`;
}

// Each method's name at the end of its lines, pushed apart where they end together.
function nameEnds(c, shown, lines, trends, area) {
  const ends = shown
    .map((variant) => {
      const trend = trends.find((each) => each.variant === variant);
      const own = trend
        ? [trend.end]
        : lines.filter((line) => line.cell.variant === variant).map((line) => line.pixels.at(-1));
      return { variant, at: mean(own.map(([, py]) => py)), x: Math.max(...own.map(([px]) => px)) };
    })
    .sort((a, b) => a.at - b.at);
  let last = area.top - 10;
  for (const end of ends) {
    end.y = Math.max(end.at, last + 15);
    last = end.y;
  }
  const over = Math.max(0, last - area.bottom);
  for (const end of ends) {
    c.text(area.right + 10, end.y - over + 4, cut(end.variant.name, 192), {
      class: `name ${colourClass(end.variant.group)}`,
    });
  }
}

// The pointer finds the nearest point; arrow keys walk along a line and from line to line.
function walk(walker, lines, dot, c, state) {
  const place = { line: 0, point: -1 };
  const mark = (line, point) => {
    for (const other of lines) other.element.classList.toggle("faded", other !== line);
    const [px, py] = line.pixels[point];
    dot.setAttribute("cx", px);
    dot.setAttribute("cy", py);
    dot.setAttribute("class", `cursor ${colourClass(line.cell.variant.group)}`);
    dot.setAttribute("visibility", "visible");
    const box = c.svg.getBoundingClientRect();
    const [at, value] = line.points[point];
    const words = [
      `${line.cell.variant.name}, seed ${line.cell.seed}`,
      `${state.unit} ${axisNumber(Number(at.toPrecision(4)))}`,
      formatScore(value),
    ];
    showTip(words, box.left + (px * box.width) / c.width, box.top + (py * box.height) / c.height);
    return words;
  };
  const leave = () => {
    for (const line of lines) line.element.classList.remove("faded");
    dot.setAttribute("visibility", "hidden");
    hideTip();
  };
  walker.onpointermove = (event) => {
    const box = c.svg.getBoundingClientRect();
    const [mx, my] = [
      ((event.clientX - box.left) * c.width) / box.width,
      ((event.clientY - box.top) * c.height) / box.height,
    ];
    let best = null;
    for (const line of lines) {
      line.pixels.forEach(([px, py], i) => {
        const far = (px - mx) ** 2 + (py - my) ** 2;
        if (best === null || far < best.far) best = { far, line, i };
      });
    }
    if (best.far < 60 ** 2) mark(best.line, best.i);
    else leave();
  };
  walker.onpointerleave = leave;
  walker.onblur = leave;
  walker.onkeydown = (event) => {
    const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (event.key === "Escape") leave();
    if (!steps) return;
    event.preventDefault();
    place.line = (place.line + steps[0] + lines.length) % lines.length;
    const points = lines[place.line].points.length;
    place.point = Math.max(0, Math.min(points - 1, place.point + steps[1]));
    announce(mark(lines[place.line], place.point).join(", "));
  };
}

function curveTable(state) {
  const rows = curvedVariants(state).flatMap((variant) =>
    variant.cells.flatMap((cell) => {
      const points = curveOf(cell, state);
      if (!points.length) return [];
      const values = points.map(([, value]) => value);
      return [
        [
          variant.name,
          String(cell.seed),
          String(points.length),
          formatScore(values[0]),
          formatScore(Math.min(...values)),
          formatScore(Math.max(...values)),
          formatScore(values.at(-1)),
        ],
      ];
    }),
  );
  return plainTable(
    ["method", "seed", "points", "first", "least", "most", "last"],
    rows,
    [1, 2, 3, 4, 5, 6],
    "Learning curves",
  );
}
