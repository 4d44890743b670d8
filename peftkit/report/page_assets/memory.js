// Memory by term: what the process held, what the training steps added, and tensors as measured and as predicted.

const MOST_BARS = 12;
const BAR = 15;

// One variant's bars: [{label, parts: [{term, bytes, kind}]}], means over its seeds.
function memoryBars(variant) {
  const measured = variant.cells.filter((cell) => cell.status === "ok" && cell.memory).map((cell) => cell.memory);
  const averaged = (key) => mean(measured.map((memory) => memory[key]));
  const [held, peak, tensors, predicted] = [
    "baseline_bytes",
    "peak_bytes",
    "tensor_peak_bytes",
    "predicted_tensor_peak_bytes",
  ].map(averaged);
  const bars = [];
  if (peak !== null && held !== null) {
    const what = measured[0].kind === "rss" ? "process" : "card";
    bars.push({
      label: what,
      parts: [
        { term: "before training", bytes: Math.min(held, peak), kind: "held" },
        { term: "added by training", bytes: Math.max(0, peak - held), kind: "added" },
      ],
    });
  }
  if (peak !== null && held === null)
    bars.push({ label: "card", parts: [{ term: "peak of the whole run", bytes: peak, kind: "added" }] });
  if (tensors !== null)
    bars.push({ label: "tensors", parts: [{ term: "tensors, measured", bytes: tensors, kind: "measured" }] });
  const terms = predictedTerms(measured);
  if (terms.length) bars.push({ label: "predicted", parts: terms });
  else if (predicted !== null)
    bars.push({ label: "predicted", parts: [{ term: "tensors, predicted", bytes: predicted, kind: "predicted" }] });
  const error = tensors !== null && predicted !== null ? predicted / tensors - 1 : null;
  return { variant, bars, error, tensors, predicted, held, peak };
}

// What the plan said the tensors would be, term by term, where the record keeps it.
function predictedTerms(measured) {
  const names = [...new Set(measured.flatMap((memory) => Object.keys(memory.predicted_terms ?? {})))];
  return names
    .map((term) => ({
      term,
      bytes: mean(measured.map(({ predicted_terms: terms }) => (terms ? (terms[term] ?? 0) : null))),
      kind: `term ${termClass(term)}`,
    }))
    .filter((part) => part.bytes > 0);
}

// Terms of one family have shades of one hue: weights blue, activations green, what trains orange, the rest grey.
const FAMILIES = {
  weights: "w0",
  "weights, quantized": "w1",
  "quantization scales": "w2",
  "dequantized weights": "w3",
  "activations: attention": "a0",
  "activations: feed-forward": "a1",
  "activations: other": "a2",
  "activation gradients": "a3",
  "logits and loss": "l0",
  adapters: "o0",
  gradients: "o1",
  "optimizer state": "o2",
};

function termClass(term) {
  return `t-${FAMILIES[term] ?? (term.startsWith("activation") ? "a2" : "g0")}`;
}

function showMemory() {
  const host = section("memory");
  host.append(
    ...heading(
      "memory",
      "Memory by term",
      "Peaks of the training steps: what was held before them, what they added, and the tensors among it, as measured and as planned beforehand.",
    ),
  );
  const found = variants.map(memoryBars).filter((entry) => entry.bars.length);
  if (!found.length) {
    host.append(el("p", { class: "note" }, "No run measured its memory."));
    return;
  }
  const state = { all: false };
  const shown = () => {
    const visible = found.filter((entry) => entry.variant.group.shown);
    return state.all ? visible : visible.slice(0, MOST_BARS);
  };
  chartPanel(host, state, {
    key: memoryLegend(found),
    more: { most: MOST_BARS, of: "methods", count: () => found.length },
    title: "Memory by term",
    description: () => shown().map(barsInWords).join("; "),
    height: (width) => 58 + shown().reduce((sum, entry) => sum + rowHeight(entry, width), 0),
    draw: (c, caption) => {
      caption.textContent = memoryCaption(found);
      drawMemory(c, shown());
    },
    table: () => memoryTable(shown()),
  });
}

function barsInWords(entry) {
  const parts = entry.bars.flatMap((bar) => bar.parts);
  return `${entry.variant.name}: ${parts.map((part) => `${part.term} ${formatBytes(part.bytes)}`).join(", ")}`;
}

function memoryCaption(found) {
  if (found.every((entry) => entry.predicted === null))
    return "No run here recorded the peak of its tensors beside a prediction of it, so only what the process or card held is shown.";
  const errors = found.filter((entry) => entry.error !== null).map((entry) => Math.abs(entry.error));
  if (!errors.length) return "These records hold predictions but no measured peak of tensors to compare them with.";
  return `Percentages: predicted against measured peak of tensors. The mean of their sizes is ${formatPercent(mean(errors)).slice(1)} over ${plural(errors.length, "method")}.`;
}

function memoryLegend(found) {
  const kinds = new Map();
  for (const entry of found)
    for (const bar of entry.bars) for (const part of bar.parts) kinds.set(part.term, part.kind);
  return el(
    "ul",
    { class: "legend static" },
    [...kinds].map(([term, kind]) =>
      el(
        "li",
        {},
        svgEl(
          "svg",
          { class: "swatch", viewBox: "0 0 14 14", width: 14, height: 14, "aria-hidden": "true" },
          svgEl("rect", { x: 1, y: 1, width: 12, height: 12, class: `bar-part ${kind}` }),
        ),
        el("span", {}, term),
      ),
    ),
  );
}

function rowHeight(entry, width) {
  return entry.bars.length * (BAR + 5) + (width < 640 ? 34 : 16);
}

function drawMemory(c, shown) {
  if (!shown.length) {
    drawNothing(c);
    return;
  }
  const narrow = c.width < 640;
  const names = narrow ? 0 : Math.min(230, 14 + 6.9 * Math.max(...shown.map((entry) => entry.variant.name.length)));
  const area = { left: names + 76, right: c.width - (narrow ? 128 : 150), top: 6, bottom: c.height - 52 };
  const largest = Math.max(
    ...shown.flatMap((entry) => entry.bars.map((bar) => bar.parts.reduce((sum, part) => sum + part.bytes, 0))),
  );
  const unit = byteUnit(largest);
  const x = linearScale(0, (largest / unit.bytes) * 1.02, area.left, area.right);
  c.axes(area, { x, xTitle: `peak memory (${unit.name})`, xFormat: axisNumber });
  let top = area.top + 6;
  for (const entry of shown) {
    if (narrow) c.text(2, top + 11, cut(entry.variant.name, c.width - 4), { class: "row-name" });
    else
      c.text(names, top + (entry.bars.length * (BAR + 5)) / 2 + 2, cut(entry.variant.name, 0.88 * names), {
        class: "row-name",
        "text-anchor": "end",
      });
    entry.bars.forEach((bar, i) =>
      drawBar(c, entry, bar, { x, unit, area, at: top + (narrow ? 18 : 0) + i * (BAR + 5) }),
    );
    top += rowHeight(entry, c.width);
  }
}

function drawBar(c, entry, bar, { x, unit, area, at }) {
  c.text(area.left - 8, at + 12, bar.label, { class: "tick", "text-anchor": "end" });
  let sum = 0;
  for (const part of bar.parts) {
    const [from, to] = [x(sum / unit.bytes), x((sum + part.bytes) / unit.bytes)];
    const wide = Math.max(1, to - from);
    const mark = c.add("rect", { x: from, y: at, width: wide, height: BAR, class: `bar-part ${part.kind}` });
    c.hit(from + wide / 2, at + BAR / 2, [entry.variant.name, `${part.term}: ${formatBytes(part.bytes)}`], {
      width: Math.max(6, wide),
      height: BAR,
      mark,
    });
    sum += part.bytes;
  }
  const added = bar.parts.find((part) => part.kind === "added");
  const error = bar.label === "predicted" && entry.error !== null ? ` (${formatPercent(entry.error)})` : "";
  c.text(x(sum / unit.bytes) + 6, at + 12, added ? `+${formatBytes(added.bytes)}` : `${formatBytes(sum)}${error}`, {
    class: "bar-value",
  });
}

function memoryTable(shown) {
  const rows = shown.map((entry) => [
    entry.variant.name,
    written(entry.held, formatBytes),
    written(entry.peak, formatBytes),
    written(entry.variant.memory_bytes, formatBytes),
    written(entry.tensors, formatBytes),
    written(entry.predicted, formatBytes),
    written(entry.error, formatPercent),
  ]);
  return plainTable(
    ["method", "before training", "peak", "over baseline", "tensors measured", "tensors predicted", "error"],
    rows,
    [1, 2, 3, 4, 5, 6],
    "Memory",
  );
}
