// What to take, why, and what is given up: the sentences that peftkit wrote.

function adviceCards() {
  return report.advice.map(adviceCard);
}

function adviceCard(found, i) {
  const parts = [
    ["Why", found.why],
    ["Given up", found.given_up],
    ["Caution", found.cautions],
  ].filter(([, sentences]) => sentences.length);
  return el(
    "section",
    { class: "advice", "aria-labelledby": `advice-${i}` },
    el("h2", { id: `advice-${i}` }, found.headline),
    el(
      "dl",
      {},
      parts.map(([name, sentences]) =>
        el(
          "div",
          {},
          el("dt", {}, name),
          sentences.map((sentence) => el("dd", {}, sentence)),
        ),
      ),
    ),
  );
}
