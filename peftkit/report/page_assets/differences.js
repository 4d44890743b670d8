// Paired differences: variant minus reference over the same examples, with intervals, tests and what could be found.

// Every difference to one reference by one metric.
function differencesTo(reference, metric) {
  return report.differences.filter((d) => d.metric === metric && d.reference === reference);
}

const MOST_DIFFERENCES = 16;
const OUTCOMES = {
  better: { mark: "▲", word: "better" },
  worse: { mark: "▼", word: "worse" },
  undecided: { mark: "●", word: "not told apart" },
};

function showDifferences() {
  const host = section("differences");
  host.append(
    ...heading(
      "differences",
      "Which differences are real",
      "Both methods answered the same test examples, so they are compared pair by pair: the difference in score, and what chance alone could make of it.",
    ),
  );
  if (!report.differences.length) {
    host.append(
      el(
        "p",
        { class: "note" },
        "No two methods were compared: that takes at least two that ended well and left predictions for the same examples.",
      ),
      leftOut(),
    );
    return;
  }
  const metrics = [...new Set(report.differences.map((d) => d.metric))].sort(
    (a, b) => (b === mainMetric) - (a === mainMetric),
  );
  const references = [...new Set(report.differences.map((d) => d.reference))];
  const state = { metric: metrics[0], reference: references[0], all: false };
  const named = references.map((name) => [name, name]);
  const update = () => panel.update();
  const panel = chartPanel(host, state, {
    controls: [
      metricChooser(metrics, state, update),
      references.length > 1
        ? chooser("Compared with", named, state.reference, setting(state, "reference", update))
        : null,
    ],
    more: {
      most: MOST_DIFFERENCES,
      of: "comparisons",
      count: () => chosenDifferences({ ...state, all: true }).length,
    },
    title: () => `Differences in ${metricTitle(state.metric)} to ${state.reference}`,
    description: () => {
      const words = chosenDifferences(state).map((d) => `${d.variant}: ${formatSigned(d.value)}, ${d.verdict}`);
      return words.join("; ");
    },
    height: (width) => 74 + chosenDifferences(state).length * (width < 640 ? 46 : 34),
    draw: (c, caption) => drawDifferences(c, state, caption),
    table: () => differenceTable(chosenDifferences(state)),
  });
  host.append(leftOut());
}

// Who was not compared, and why.
function leftOut() {
  const entries = Object.entries(report.left_out);
  if (!entries.length) return "";
  const items = entries.map(([name, reason]) => el("li", {}, el("b", {}, name), `: ${reason}`));
  return el(
    "details",
    { class: "more" },
    el("summary", {}, `Not compared: ${plural(entries.length, "method")}`),
    el("ul", {}, items),
  );
}

// What is shown: the best first, and only so many of them unless all are asked for.
function chosenDifferences({ metric, reference, all }) {
  const hidden = new Set(variants.filter((v) => !v.group.shown).map((v) => v.name));
  return differencesTo(reference, metric)
    .filter((d) => !hidden.has(d.variant))
    .sort((a, b) => (lowerIsBetter(metric) ? a.value - b.value : b.value - a.value))
    .slice(0, all ? Infinity : MOST_DIFFERENCES);
}

function drawDifferences(c, state, caption) {
  const found = chosenDifferences(state);
  if (!found.length) {
    drawNothing(c);
    return;
  }
  const narrow = c.width < 640;
  const names = narrow ? 0 : Math.min(240, 14 + 6.9 * Math.max(...found.map((d) => d.variant.length)));
  const area = { left: narrow ? 14 : names + 10, right: c.width - (narrow ? 14 : 300), top: 14, bottom: c.height - 52 };
  const bounds = found.flatMap((d) => [d.value, d.low, d.high, 0, d.detectable, -d.detectable]);
  const room = 0.06 * (Math.max(...bounds) - Math.min(...bounds) || 0.01);
  const x = linearScale(Math.min(...bounds) - room, Math.max(...bounds) + room, area.left, area.right);
  const less = lowerIsBetter(state.metric);
  c.axes(area, {
    x,
    xTitle: `${metricTitle(state.metric)} minus that of ${cut(state.reference, 200)}${narrow ? "" : `, ${less ? "less" : "more"} is better`}`,
    xFormat: (tick) => (tick > 0 ? "+" : "") + axisNumber(tick),
  });
  const step = (area.bottom - area.top) / found.length;
  found.forEach((d, i) => {
    const [from, to] = [x(-d.detectable), x(d.detectable)];
    c.add("rect", {
      x: from,
      y: area.top + (i + (narrow ? 0.5 : 0.22)) * step,
      width: to - from,
      height: step * (narrow ? 0.36 : 0.56),
      rx: 3,
      class: "undetectable",
    });
  });
  c.line(x(0), area.top, x(0), area.bottom, "zero");
  found.forEach((d, i) =>
    drawDifference(c, d, { area, x, narrow, at: area.top + (i + (narrow ? 0.68 : 0.5)) * step, step }),
  );
  const bases = [...new Set(found.map((d) => d.basis))].join(" or ");
  caption.textContent =
    `Bars: 95 % intervals over ${bases}. ▲ better, ▼ worse, ● not told apart, at 0.05 after Holm's correction for all comparisons with ${state.reference}. Shaded: true differences that would be seen less often than four times in five.` +
    (chosenDifferences({ ...state, all: true }).length > found.length ? ` The best ${found.length} are shown.` : "");
}

function drawDifference(c, d, { area, x, narrow, at, step }) {
  const { outcome } = d;
  const group = c.add("g", { class: `difference ${outcome}` });
  group.append(svgEl("line", { x1: x(d.low), x2: x(d.high), y1: at, y2: at, class: "whisker wide" }));
  const markers = { better: 2, worse: 4, undecided: 0 };
  group.append(svgEl("path", { d: markerPath({ place: markers[outcome] }, x(d.value), at, 5.5), class: "dot" }));
  const words = `${formatSigned(d.value)} ${formatInterval(d.low, d.high, formatSigned)}`;
  if (narrow) {
    c.text(area.left, at - 15, cut(d.variant, area.right - area.left - 120), { class: "row-name" });
    c.text(area.right, at - 15, `${OUTCOMES[outcome].mark} ${formatSigned(d.value)}`, {
      class: `row-value ${outcome}`,
      "text-anchor": "end",
    });
  } else {
    c.text(area.left - 14, at + 4, cut(d.variant, 208), { class: "row-name", "text-anchor": "end" });
    c.text(area.right + 14, at + 4, words, { class: "row-value" });
    c.text(c.width - 2, at + 4, `${OUTCOMES[outcome].mark} ${OUTCOMES[outcome].word}`, {
      class: `row-value ${outcome}`,
      "text-anchor": "end",
    });
  }
  c.hit(x(d.value), at, differenceLines(d), { mark: group, height: Math.min(30, step) });
}

function differenceLines(d) {
  return [
    `${d.variant} minus ${d.reference}`,
    `${metricTitle(d.metric)} ${formatSigned(d.value)} ${formatInterval(d.low, d.high, formatSigned)}`,
    d.verdict,
    `p ${formatP(d.p_value)}, adjusted ${formatP(d.adjusted_p)}`,
    `${plural(d.num_examples, "example")}, ${plural(d.num_seeds, "seed")}`,
    `seen four times in five from ${formatScore(d.detectable)} on`,
  ];
}

function differenceTable(found) {
  const header = [
    "method",
    "reference",
    "difference",
    "95 % interval",
    "p",
    "adjusted p",
    "examples",
    "seeds",
    "detectable",
    "verdict",
  ];
  const rows = found.map((d) => [
    d.variant,
    d.reference,
    formatSigned(d.value),
    formatInterval(d.low, d.high, formatSigned),
    formatP(d.p_value),
    formatP(d.adjusted_p),
    grouped(d.num_examples),
    String(d.num_seeds),
    formatScore(d.detectable),
    d.verdict,
  ]);
  return plainTable(header, rows, [2, 3, 4, 5, 6, 7, 8], "Paired differences");
}
