// Per-example disagreements of two runs: who is right where, and the answers side by side.

const EXAMPLES_AT_ONCE = 50;

// The kinds of agreement. Where answers are numbers there is no right or wrong, only nearer.
const KINDS = {
  both: "both right",
  first: "only A right",
  second: "only B right",
  neither: "both wrong",
  nearer: "A nearer",
  farther: "B nearer",
  equal: "equally near",
};

function kindOf(one, other, i) {
  if (one.right === null) {
    const gap = one.truth(i) - other.truth(i);
    return gap > 0 ? "nearer" : gap < 0 ? "farther" : "equal";
  }
  return one.right(i) ? (other.right(i) ? "both" : "first") : other.right(i) ? "second" : "neither";
}

function showExamples() {
  const host = section("examples");
  const lead =
    "Choose two runs. Row numbers count from 0 in the test data; the texts themselves are not part of a report.";
  host.append(...heading("examples", "Where two methods disagree", lead));
  const able = variants.flatMap((variant) => variant.cells.filter((cell) => cell.examples));
  if (able.length < 2) {
    host.append(el("p", { class: "note" }, "Fewer than two runs left predictions for each example."));
    return;
  }
  const body = el("div", { class: "panel", id: "disagreements" });
  const choices = el("div", { class: "controls" });
  host.append(choices, body);
  if (report.example_stride > 1) {
    const kept = `To stay small, this page holds one example in ${report.example_stride}.`;
    host.append(el("p", { class: "caption" }, `${kept} predictions.jsonl of each run has them all.`));
  }
  const second = partnerOf(able[0], able) ?? able[1];
  const state = { first: able[0], second, kind: null, order: "gap", shown: EXAMPLES_AT_ONCE };
  showPair(able, state, choices, body);
}

// The choosers of both runs and, below them, their examples.
function showPair(able, state, choices, body) {
  const comparable = able.filter((cell) => cell.examples.set === state.first.examples.set);
  const again = (letter) => {
    state.kind = null;
    state.shown = EXAMPLES_AT_ONCE;
    showPair(able, state, choices, body);
    choices.querySelector(`[data-run="${letter}"]`).focus();
  };
  const chooseFirst = (cell) => {
    state.first = cell;
    if (state.second.examples.set !== cell.examples.set || state.second === cell) {
      state.second = partnerOf(cell, able) ?? cell;
    }
    again("A");
  };
  const orders = [
    ["gap", "Largest difference first"],
    ["row", "Row number"],
  ];
  const render = () => renderExamples(body, state);
  choices.replaceChildren(
    runChooser("A", able, state.first, chooseFirst),
    runChooser(
      "B",
      comparable,
      state.second,
      setting(state, "second", () => again("B")),
    ),
    chooser("Order", orders, state.order, setting(state, "order", render)),
  );
  render();
}

// The best run of another method over the same examples: of the same seed where there is one.
function partnerOf(cell, ordered) {
  const others = ordered.filter((other) => other !== cell && other.examples.set === cell.examples.set);
  return (
    others.find((o) => o.variant !== cell.variant && o.seed === cell.seed) ??
    others.find((o) => o.variant !== cell.variant) ??
    others[0]
  );
}

function runChooser(letter, options, chosen, choose) {
  const several = new Set(cells.map((cell) => cell.seed)).size > 1;
  const named = options.map((cell) => [
    String(cell.place),
    several ? `${cell.variant.name} · seed ${cell.seed}` : cell.variant.name,
  ]);
  return chooser(letter, named, String(chosen.place), (place) => choose(cells[Number(place)]), { "data-run": letter });
}

function renderExamples(body, state) {
  const [one, other] = [decoded(state.first), decoded(state.second)];
  const scored = one.right !== null;
  const entries = Array.from({ length: one.size }, (_, i) => ({
    i,
    kind: kindOf(one, other, i),
    gap: one.truth(i) - other.truth(i),
  }));
  const wanted = state.kind ? [state.kind] : scored ? ["first", "second"] : ["nearer", "farther"];
  const kept = entries.filter((entry) => wanted.includes(entry.kind));
  if (state.order === "gap") kept.sort((a, b) => Math.abs(b.gap) - Math.abs(a.gap) || a.i - b.i);
  const again = () => renderExamples(body, state);
  const order = scored ? ["both", "first", "second", "neither"] : ["nearer", "equal", "farther"];
  const tiles = order.map((kind) => {
    const count = entries.filter((entry) => entry.kind === kind).length;
    return kindTile(kind, count, one.size, wanted.includes(kind), () => {
      state.kind = state.kind === kind ? null : kind;
      state.shown = EXAMPLES_AT_ONCE;
      again();
      body.querySelector(`[data-kind="${kind}"]`).focus();
    });
  });
  const look = {
    class: `tiles ${scored ? "four" : "three"}`,
    role: "group",
    "aria-label": "Only examples of this kind",
  };
  body.replaceChildren(
    el("div", look, tiles),
    exampleTable(kept.slice(0, state.shown), one, other, state),
    moreExamples(kept.length, state, again),
    el("p", { class: "caption" }, `A over B: how much better A does on this example, by ${one.measure}.`),
  );
  announce(`${plural(kept.length, "example")}: ${wanted.map((kind) => KINDS[kind]).join(", ")}`);
}

function exampleTable(entries, one, other, state) {
  if (!entries.length) return el("p", { class: "note" }, "No example is of this kind.");
  const rows = entries.map(({ i, kind, gap }) => [
    String(one.row(i)),
    one.label(i),
    answerCell(one, i),
    answerCell(other, i),
    KINDS[kind],
    formatSigned(gap),
  ]);
  const right = one.kind === "tokens" ? "answer" : "right answer";
  const names = [`A: ${state.first.variant.name}`, `B: ${state.second.variant.name}`];
  return plainTable(["row", right, ...names, "", "A over B"], rows, [0, 5], "Examples");
}

function moreExamples(count, state, again) {
  if (count <= state.shown) return "";
  const button = el("button", { type: "button", class: "quiet" }, `More of ${grouped(count)}`);
  button.addEventListener("click", () => {
    state.shown += EXAMPLES_AT_ONCE;
    again();
  });
  return button;
}

function kindTile(kind, count, size, chosen, onclick) {
  return el(
    "button",
    { type: "button", class: `tile ${kind}`, "aria-pressed": String(chosen), "data-kind": kind, onclick },
    el("b", {}, grouped(count)),
    el("span", {}, KINDS[kind]),
    el("span", { class: "muted" }, `${((100 * count) / size).toFixed(1)} %`),
  );
}

function answerCell(reader, i) {
  const [answer, score] = reader.answer(i);
  const kind = reader.right === null ? "" : reader.right(i) ? "is-right" : "is-wrong";
  const mark = reader.right === null ? "" : reader.right(i) ? "✓ " : "✗ ";
  return el("span", { class: kind }, mark, answer, " ", el("span", { class: "muted" }, score));
}
