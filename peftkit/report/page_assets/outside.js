// Runs that others made: what is not comparable about them, and a table of their own beside one's runs.

// Below the title where the page is about such runs alone; null where it is not.
function importedNote() {
  const found = report.outside;
  if (!found || found.variants.length) return null;
  return el(
    "div",
    { class: "note imported" },
    el("p", {}, `Imported from ${found.source}. Read with care:`),
    caveatList(found),
  );
}

function caveatList(found) {
  return el(
    "ul",
    {},
    found.caveats.map((caveat) => el("li", {}, caveat)),
  );
}

// Without such runs the section and its link in the bar are taken away.
function showOutside() {
  const host = section("outside");
  const found = report.outside;
  if (!found || !found.variants.length) {
    host.remove();
    document.querySelector('nav a[href="#outside"]').remove();
    return;
  }
  const names = [...new Set(found.variants.flatMap((variant) => Object.keys(variant.metrics)))];
  const header = ["run", ...names.map(metricTitle), "trained", "peak memory", "tokens/s", "time", "size", "card"];
  const rows = found.variants.map((variant) => [
    variant.name,
    ...names.map((name) => scoreOrEnd(variant, name)),
    written(variant.trainable, formatCount),
    written(variant.peak_bytes, formatBytes),
    written(variant.tokens_per_second, formatCount),
    written(variant.train_seconds, formatSeconds),
    written(variant.artifact_bytes, formatBytes),
    variant.machine || NOTHING,
  ]);
  const numeric = [...names, 0, 0, 0, 0, 0].map((_, i) => i + 1);
  host.append(
    ...heading("outside", "What others measured", `From ${found.source}. Not comparable with the runs above:`),
    caveatList(found),
    el("div", { class: "panel flush" }, plainTable(header, rows, numeric, `Runs of ${found.source}`, "others")),
  );
}

function scoreOrEnd(variant, name) {
  const score = variant.metrics[name];
  if (score) return formatEstimate(score);
  return variant.status === "ok" ? NOTHING : badge(variant.status);
}
