// The columns of the table, and its lines: one for each method, or one for each run.

function numberColumn(key, title, of, how, better) {
  return { key, title, number: true, value: of, cell: (row) => written(of(row), how), better };
}

// A column of what only some machines and suites measure: none where no method has it.
function besides(key, title, of, how, better) {
  const measured = variants.map(methodRow).some((row) => of(row) !== null && of(row) !== undefined);
  return measured ? numberColumn(key, title, of, how, better) : null;
}

function tableColumns(view, everyMetric) {
  const metrics = everyMetric ? metricNames : metricNames.slice(0, 1);
  return [
    {
      key: "name",
      title: view === "methods" ? "Method" : "Run",
      value: (row) => row.name.toLowerCase(),
      cell: nameCell,
      better: "less",
    },
    view === "runs" ? numberColumn("seed", "Seed", (row) => row.seed, String, "less") : null,
    {
      key: "status",
      title: view === "methods" ? "Seeds" : "Status",
      value: statusOrder,
      cell: statusCell,
      better: "less",
    },
    ...metrics.map((name) => ({
      key: `metric ${name}`,
      title: metricTitle(name),
      number: true,
      value: (row) => row.metrics[name]?.value ?? null,
      cell: (row) => scoreCell(row, name),
      better: lowerIsBetter(name) ? "less" : "more",
    })),
    numberColumn("trainable", "Trained", (row) => row.trainable, formatCount, "less"),
    numberColumn("memory", "Memory", (row) => row.memory, formatBytes, "less"),
    numberColumn("peak", "Peak", (row) => row.peak, formatBytes, "less"),
    numberColumn("speed", "Tokens/s", (row) => row.speed, formatCount, "more"),
    numberColumn("seconds", "Time", (row) => row.seconds, formatSeconds, "less"),
    numberColumn("size", "Size", (row) => row.size, formatBytes, "less"),
    besides("served", "Answers/s", (row) => row.served, formatCount, "more"),
    besides("latency", "Latency", (row) => row.latency, formatSeconds, "less"),
    besides("energy", "Energy", (row) => row.energy, formatJoules, "less"),
    besides("target", "To target", (row) => row.target, formatSeconds, "less"),
  ].filter(Boolean);
}

function methodRow(variant) {
  return {
    name: variant.name,
    variant,
    cell: variant.cells[0],
    cells: variant.cells,
    metrics: variant.metrics,
    trainable: variant.trainable,
    memory: variant.memory_bytes,
    peak: variant.peak_bytes,
    speed: variant.tokens_per_second,
    seconds: variant.train_seconds,
    size: variant.artifact_bytes,
    served: variant.samples_per_second,
    latency: variant.latency_seconds,
    energy: variant.energy_joules,
    target: variant.target_seconds,
  };
}

function runRow(cell) {
  const scores = Object.keys(cell.metrics ?? {}).length ? cell.metrics : prefixed(cell.validation ?? {});
  const metrics = Object.entries(scores).map(([name, [value, low, high]]) => [name, { value, low, high }]);
  return {
    name: cell.variant.name,
    variant: cell.variant,
    cell,
    cells: [cell],
    seed: cell.seed,
    metrics: cell.status === "ok" ? Object.fromEntries(metrics) : {},
    trainable: cell.parameters?.trainable ?? null,
    memory: overBaseline(cell),
    peak: cell.memory?.peak_bytes ?? null,
    speed: cell.throughput?.tokens_per_second ?? null,
    seconds: cell.throughput?.train_seconds ?? null,
    size: cell.parameters?.artifact_bytes ?? null,
    served: servedOf(cell).samples_per_second ?? null,
    latency: servedOf(cell).latency_seconds_p50 ?? null,
    energy: cell.energy?.joules ?? null,
    target: cell.target_seconds ?? null,
  };
}

function prefixed(scores) {
  return Object.fromEntries(Object.entries(scores).map(([name, score]) => [`validation ${name}`, score]));
}

function statusOrder(row) {
  return `${row.cells.filter((cell) => cell.status !== "ok").length / row.cells.length} ${row.cells[0].status}`;
}

// A line's cells. Where nothing was measured, how it ended takes the place of the numbers.
function rowCells(row, columns) {
  const cellOf = (column, i, span) =>
    el(
      i ? "td" : "th",
      { scope: i ? null : "row", class: column.number ? "number" : null, colspan: span },
      column.cell(row),
    );
  const status = columns.findIndex((column) => column.key === "status");
  const measured = Object.keys(row.metrics).length || row.memory !== null || row.speed !== null;
  if (measured || row.cells.every((cell) => cell.status === "ok"))
    return columns.map((column, i) => cellOf(column, i, null));
  return columns
    .slice(0, status + 1)
    .map((column, i) => cellOf(column, i, i === status ? columns.length - status : null));
}

// What the words of the filter are looked for in: name, method, seed, end, reason and the settings that differ.
function haystackOf(row) {
  const settings = row.cells.flatMap((cell) =>
    Object.entries(cell.recipe ?? {}).map(([key, value]) => `${plainKey(key)}=${plainValue(value)}`),
  );
  const own = row.cells.flatMap((cell) => [cell.label ?? "", `seed=${cell.seed}`, cell.status, cell.reason]);
  return [row.name, ...own, ...settings].join("\n").toLowerCase();
}

function nameCell(row) {
  return el("button", { type: "button", class: "plain", onclick: () => row.open(row.cell) }, row.name);
}

function statusCell(row) {
  if (row.seed !== undefined) return statusWords(row.cell);
  const counts = statusCounts(row.variant);
  const ended = counts.get("ok") ?? 0;
  const bad = [...counts].filter(([status]) => status !== "ok");
  if (!bad.length) return String(ended);
  const reasons = [...new Set(row.cells.filter((cell) => cell.reason).map((cell) => cell.reason))];
  return el(
    "div",
    { class: "status" },
    el("span", {}, `${ended}/${row.cells.length}`),
    bad.map(([status, count]) => badge(status, count)),
    reasonText(reasons),
  );
}

function statusWords(cell) {
  return el("div", { class: "status" }, badge(cell.status), reasonText(cell.reason ? [cell.reason] : []));
}

function reasonText(reasons) {
  return reasons.length ? el("span", { class: "reason clamped" }, reasons.join("; ")) : null;
}

let tinyScale = null;
// One scale for the small intervals of the main metric in every line.
function scoreScale() {
  if (tinyScale === null) {
    const bounds = [...variants, ...cells.map(runRow)].flatMap((each) => {
      const score = each.metrics[metricNames[0]];
      return score ? [score.value, score.low ?? score.value, score.high ?? score.value] : [];
    });
    tinyScale = linearScale(
      bounds.reduce((a, b) => Math.min(a, b), Infinity),
      bounds.reduce((a, b) => Math.max(a, b), -Infinity),
      4,
      80,
    );
  }
  return tinyScale;
}

function scoreCell(row, name) {
  const score = row.metrics[name];
  if (!score) return NOTHING;
  if (name !== metricNames[0]) return formatScore(score.value);
  const x = row.scale;
  const bar =
    score.low === undefined || score.low === null
      ? null
      : svgEl("line", { x1: x(score.low), x2: x(score.high), y1: 8, y2: 8, class: "whisker" });
  const picture = svgEl(
    "svg",
    {
      class: `tiny ${colourClass(row.variant.group)}`,
      viewBox: "0 0 84 16",
      width: 84,
      height: 16,
      "aria-hidden": "true",
    },
    svgEl("line", { x1: 0, x2: 84, y1: 8, y2: 8, class: "grid" }),
    bar,
    svgEl("path", { d: markerPath(row.variant.group, x(score.value), 8, 3.4), class: "dot" }),
  );
  return el(
    "div",
    { class: "score" },
    picture,
    el(
      "span",
      {},
      el("b", {}, formatScore(score.value)),
      el("span", { class: "muted interval" }, ` ${formatInterval(score.low, score.high)}`),
    ),
  );
}
