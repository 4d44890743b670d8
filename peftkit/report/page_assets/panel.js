// A chart in its panel: the choices above it, its legend and caption, and the numbers behind it.

// `picture` is what `chart` takes, its `draw` given the caption as well. `more` {most, of, count} caps what is shown,
// as long as `state.all` is not set. Returns what draws all of it anew.
function chartPanel(host, state, { controls = [], key = null, table, more = null, ...picture }) {
  const figure = el("div");
  const caption = el("p", { class: "caption" });
  const numbers = behind(table);
  const button = el("button", { type: "button", class: "quiet" });
  button.addEventListener("click", () => {
    state.all = !state.all;
    update();
  });
  const choices = [...controls, more ? button : null].filter(Boolean);
  host.append(
    choices.length ? el("div", { class: "controls" }, choices) : "",
    el("figure", { class: "panel" }, key, figure, caption, numbers.element),
  );
  const redraw = chart(figure, { ...picture, draw: (c) => picture.draw(c, caption) });
  const update = () => {
    redraw();
    numbers.refresh();
    if (!more) return;
    button.hidden = more.count() <= more.most;
    button.textContent = state.all ? `Only the best ${more.most}` : `All ${more.count()} ${more.of}`;
  };
  onVisibility(update);
  update();
  return { update, figure };
}

// A chart from which everything was hidden says so.
function drawNothing(c) {
  c.text(c.width / 2, c.height / 2, "Nothing is shown. Choose a method.", { class: "axis", "text-anchor": "middle" });
}

// Which metric the chart is about, where there is a choice.
function metricChooser(names, state, update) {
  if (names.length < 2) return null;
  const options = names.map((name) => [name, metricTitle(name)]);
  return chooser("Quality", options, state.metric, setting(state, "metric", update));
}
