// The result in words: what was compared on what, the best, what can't be told apart from it, and what failed.

function showHeadline(open) {
  const host = section("headline");
  const best = variants.find((variant) => mainMetric !== null && scoreOf(variant));
  const compared = best ? differencesTo(best.name, mainMetric) : [];
  const tied = asGoodAsBest(compared);
  const parts = [el("p", { class: "eyebrow" }, "Benchmark report"), el("h1", { id: "headline-title" }, report.suite)];
  const [first, ...rest] = report.description ? report.description.split(/\n\s*\n/) : [""];
  if (first) parts.push(el("p", { class: "about" }, first));
  if (rest.length)
    parts.push(
      el(
        "details",
        { class: "more" },
        el("summary", {}, "More about this benchmark"),
        rest.map((text) => el("p", {}, text)),
      ),
    );
  parts.push(facts(best));
  parts.push(importedNote(), ...adviceCards());
  if (best) parts.push(verdict(best, compared, open), picks(best, tied, open));
  else
    parts.push(
      el(
        "p",
        { class: "note" },
        variants.some((v) => scoreOf(v))
          ? "The methods were scored by different metrics, so there is no best one."
          : "No run has a score yet.",
      ),
    );
  const failed = failures(open);
  if (failed) parts.push(failed);
  host.append(...parts.filter(Boolean));
}

// The strip of facts below the title.
function facts(best) {
  const ended = cells.filter((cell) => cell.status === "ok").length;
  const score = best ? scoreOf(best) : null;
  const found = [
    ["methods", grouped(variants.length)],
    ["runs", ended === cells.length ? grouped(ended) : `${grouped(ended)} of ${grouped(cells.length)} have results`],
    ["backbone", listed(recipeValues("backbone", "name"), 2)],
    ["task", listed(recipeValues("task", "kind"), 2)],
    [
      best && mainMetric.startsWith("validation ") ? "validation data" : "test data",
      listed(recipeValues("data", best && mainMetric.startsWith("validation ") ? "validation" : "test"), 2),
    ],
    ["scored on", score ? plural(score.n, "example") : ""],
    ["chance", score?.chance === undefined ? "" : formatScore(score.chance)],
    ["most common label", score?.majority === undefined ? "" : formatScore(score.majority)],
  ];
  return el(
    "dl",
    { class: "facts" },
    found.filter(([, value]) => value).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
  );
}

function verdict(best, compared, open) {
  const score = scoreOf(best);
  const [first] = report.differences.filter((difference) => difference.metric === mainMetric);
  const several = new Set(variants.map((variant) => variant.test_data)).size > 1;
  const lines = compared.length
    ? againstBest(compared, open)
    : first
      ? againstReference(first.reference, open)
      : variants.filter((v) => scoreOf(v)).length > 1
        ? [
            el(
              "p",
              {},
              "No other method was compared with it pair by pair, so read the intervals before calling it the best.",
            ),
          ]
        : [];
  return el(
    "div",
    { class: "verdict" },
    el(
      "p",
      { class: "winner" },
      el("button", { type: "button", class: "plain", onclick: () => open(best.cells[0]) }, best.name),
      ` has the ${lowerIsBetter(mainMetric) ? "lowest" : "highest"} ${metricTitle(mainMetric)}${several ? ` on ${best.test_data}` : ""}: `,
      el("b", { class: "nowrap" }, formatScore(score.value)),
      " ",
      el("span", { class: "muted nowrap" }, formatInterval(score.low, score.high)),
    ),
    lines,
  );
}

// The names of the others, best first.
function inOrder(compared) {
  const place = new Map(variants.map((variant) => [variant.name, variant.place]));
  return compared.map(({ variant }) => variant).sort((a, b) => place.get(a) - place.get(b));
}

// Not told apart by a test for this difference alone. The correction for many keeps from calling a method worse in
// error; here the error would be to call it as good.
function asGoodAlone({ outcome, p_value }) {
  return outcome === "undecided" && p_value >= 0.05;
}

// Seeds that differ widely cannot be told from anything: nobody counts who scores below one that is told apart.
function asGoodAsBest(compared) {
  const order = inOrder(compared).map((name) => compared.find(({ variant }) => variant === name));
  const first = order.findIndex((difference) => !asGoodAlone(difference));
  return first < 0 ? order : order.slice(0, first);
}

function againstBest(compared, open) {
  const tied = compared.filter(asGoodAlone);
  const alone = compared.filter((difference) => difference.outcome === "undecided" && !asGoodAlone(difference));
  const apart = compared.filter(({ outcome }) => outcome !== "undecided");
  const lines = [
    tied.length
      ? el("p", {}, el("strong", {}, "Not told apart from it: "), names(inOrder(tied), open), ".")
      : alone.length
        ? null
        : el("p", {}, "Every other method that was compared is told apart from it."),
  ];
  if (alone.length) {
    const title = `Told apart if compared alone, not as one of ${grouped(compared.length)}: `;
    lines.push(el("p", {}, el("strong", {}, title), names(inOrder(alone), open), "."));
  }
  if (apart.length) lines.push(el("p", {}, el("strong", {}, "Told apart: "), names(inOrder(apart), open), "."));
  if (tied.length) {
    const reach = Math.max(...tied.map(({ detectable }) => detectable));
    lines.push(
      el(
        "p",
        { class: "muted" },
        `On ${plural(tied[0].num_examples, "example")}, ${reachable(reach)} would have been seen four times in five.`,
      ),
    );
  }
  return lines;
}

// Two seeds may not show any difference that shares can have.
function reachable(difference) {
  const shares = report.shares.includes(mainMetric.split(" ").pop());
  return shares && difference >= 1 ? "no difference" : `a true difference of ${formatScore(difference)}`;
}

// Where the best one is not what the others were compared with.
function againstReference(reference, open) {
  const found = differencesTo(reference, mainMetric);
  const words = { better: "Better than", undecided: "Not told apart from", worse: "Worse than" };
  return Object.entries(words).flatMap(([outcome, word]) => {
    const those = found.filter((difference) => difference.outcome === outcome);
    return those.length
      ? [el("p", {}, el("strong", {}, `${word} ${reference}: `), names(inOrder(those), open), ".")]
      : [];
  });
}

function names(found, open) {
  const known = new Map(variants.map((variant) => [variant.name, variant]));
  const most = mean(found.map((name) => name.length)) > 16 ? 5 : 10;
  const kept = found.length > most ? found.slice(0, most - 1) : found;
  const parts = kept.flatMap((name, i) => [
    i === 0 ? "" : i === found.length - 1 ? " and " : ", ",
    el("button", { type: "button", class: "plain", onclick: () => open(known.get(name).cells[0]) }, name),
  ]);
  return kept.length < found.length ? [...parts, ` and ${found.length - kept.length} more`] : parts;
}

// Of those as good as the best as far as the data can say: the one that is cheapest, cost by cost.
function picks(best, tied, open) {
  const candidates = [
    best,
    ...tied.map((difference) => variants.find(({ name }) => name === difference.variant)),
  ].filter(Boolean);
  if (!tied.length) return null;
  const titles = {
    memory: "Least memory",
    speed: "Fastest to train",
    trainable: "Fewest trained",
    size: "Smallest to ship",
  };
  const cards = Object.entries(titles).map(([key, title]) => {
    const { of, less, format } = COSTS[key];
    const measured = candidates.filter((variant) => of(variant) > 0);
    if (!measured.length) return null;
    const chosen = measured.reduce((a, b) => ((less ? of(b) < of(a) : of(b) > of(a)) ? b : a));
    const ratio = chosen === best || !(of(best) > 0) ? null : less ? of(best) / of(chosen) : of(chosen) / of(best);
    return el(
      "div",
      { class: "card" },
      el("h3", {}, title),
      el(
        "p",
        { class: `card-name ${chosen.name.length > 16 ? "long" : ""}` },
        variants.length > MOST_GROUPS ? null : swatch(chosen.group),
        el("button", { type: "button", class: "plain", onclick: () => open(chosen.cells[0]) }, chosen.name),
      ),
      el("p", {}, format(of(chosen))),
      el(
        "p",
        { class: "muted" },
        ratio === null
          ? "the best one itself"
          : less
            ? `${cut(best.name, 150)} needs ${threeDigits(ratio)}× as much`
            : `${threeDigits(ratio)}× as fast as ${cut(best.name, 150)}`,
      ),
    );
  });
  return el(
    "div",
    {},
    el("p", { class: "kicker" }, "Cheapest of those as good as the best, as far as the data can say"),
    el("div", { class: "cards" }, cards),
  );
}

// What did not end well, seeds with the same reason together.
function failures(open) {
  const found = new Map();
  for (const cell of cells) {
    if (cell.status === "ok") continue;
    const key = [cell.variant.place, cell.status, cell.reason].join(SEPARATOR);
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(cell);
  }
  if (!found.size) return null;
  const most = 8;
  const items = [...found.values()]
    .slice(0, most)
    .map((same) =>
      el(
        "li",
        {},
        badge(same[0].status),
        " ",
        el("button", { type: "button", class: "plain", onclick: () => open(same[0]) }, same[0].variant.name),
        el(
          "span",
          { class: "muted" },
          ` seed${same.length > 1 ? "s" : ""} ${listed(same.map((cell) => String(cell.seed)))}: `,
        ),
        el("span", { class: "reason" }, same[0].reason),
      ),
    );
  const left = found.size - items.length;
  return el(
    "div",
    { class: "failures" },
    el("h2", {}, failureTitle(cells.filter((cell) => cell.status !== "ok").length)),
    el("ul", {}, items, left > 0 ? el("li", { class: "muted" }, `and ${left} more; the table has them all.`) : null),
  );
}

function failureTitle(count) {
  return `${plural(count, "run")} ${count === 1 ? "has" : "have"} no result`;
}

function badge(status, count = null) {
  return el("span", { class: `badge ${status}` }, count === null ? status : `${count} ${status}`);
}
