// Everything about one run, in a dialog: how it ended, the command that runs it again, recipe, environment, numbers.

function runDialog() {
  const dialog = document.getElementById("run-dialog");
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  const open = (cell) => {
    hideTip();
    dialog.replaceChildren(...runContent(cell, open, () => dialog.close()));
    dialog.scrollTop = 0;
    if (!dialog.open) dialog.showModal();
  };
  return open;
}

function runContent(cell, open, close) {
  const seeds = cell.variant.cells;
  const parts = [
    el(
      "header",
      {},
      el("h2", { id: "run-title" }, cell.variant.name),
      el("button", { type: "button", class: "quiet", onclick: close }, "Close"),
    ),
    seeds.length > 1
      ? segments(
          "Seed",
          seeds.map((each) => [String(each.place), String(each.seed)]),
          String(cell.place),
          (place) => {
            open(cells[Number(place)]);
            document.querySelector("#run-dialog input:checked").focus();
          },
        )
      : el("p", { class: "muted" }, `seed ${cell.seed}`),
    el(
      "p",
      { class: "ended" },
      badge(cell.status),
      cell.reason ? el("span", { class: "reason" }, ` ${cell.reason}`) : null,
    ),
    el("h3", {}, "Run it again"),
    copyable(cell.command, "command"),
  ];
  if (!cell.recipe)
    return [...parts, el("p", { class: "note" }, "This run has not ended, so there is nothing else to tell.")];
  const differing = Object.entries(cell.recipe);
  const yaml = yamlOf(settingsOf(report.recipe, cell.recipe));
  return [
    ...parts,
    numbersOf(cell),
    el("h3", {}, "Recipe"),
    differing.length && cells.length > 1 ? settingsTable(differing, "What is not the same in every run") : null,
    el("details", { class: "more" }, el("summary", {}, "The whole recipe"), copyable(yaml, "recipe")),
    el("h3", {}, "Environment"),
    settingsTable([...settingsOf(report.environment, cell.environment)], "Versions and machine"),
    el("p", { class: "muted" }, `peftkit folder ${cell.folder}, recipe digest ${cell.digest}`),
  ];
}

function settingsTable(entries, caption) {
  return plainTable(
    ["setting", "value"],
    entries.map(([key, value]) => [plainKey(key), settingValue(key, value)]),
    [],
    caption,
    "settings",
  );
}

function settingValue(key, value) {
  return key.endsWith("_bytes") && typeof value === "number"
    ? `${grouped(value)} (${formatBytes(value)})`
    : plainValue(value);
}

function numbersOf(cell) {
  const scores = [
    ...Object.entries(cell.metrics).map(([name, score]) => [`test ${metricTitle(name)}`, score]),
    ...Object.entries(cell.validation).map(([name, score]) => [`validation ${metricTitle(name)}`, score]),
  ];
  const measured = [
    ...Object.entries(cell.parameters),
    ...Object.entries(cell.memory).filter(([, value]) => typeof value !== "object"),
    ...Object.entries(cell.throughput),
    ...Object.entries(cell.loss).map(([name, value]) => [`loss ${name}`, value]),
    ...Object.entries(cell.inference).flatMap(([way, found]) =>
      Object.entries(found).map(([name, value]) => [`${way} ${name}`, value]),
    ),
    ...Object.entries(cell.energy).map(([name, value]) => [name === "seconds" ? "energy seconds" : name, value]),
    ...(cell.target_seconds === null ? [] : [["target_seconds", cell.target_seconds]]),
    ...(cell.wall_seconds === null ? [] : [["wall_seconds", cell.wall_seconds]]),
  ];
  return el(
    "div",
    { class: "columns" },
    scores.length
      ? el(
          "div",
          {},
          el("h3", {}, "Scores"),
          plainTable(
            ["score", "value", "95 % interval"],
            scores.map(([name, [value, low, high]]) => [name, formatScore(value), formatInterval(low, high)]),
            [1, 2],
            "Scores",
          ),
        )
      : null,
    measured.length
      ? el(
          "div",
          {},
          el("h3", {}, "Measured"),
          plainTable(
            ["measurement", "value"],
            measured.map(([name, value]) => [name.replaceAll("_", " "), measurement(name, value)]),
            [1],
            "Measured",
          ),
        )
      : null,
  );
}

function measurement(name, value) {
  if (typeof value !== "number") return String(value);
  if (name.endsWith("_bytes")) return formatBytes(value);
  if (name.includes("seconds") && !name.includes("per_second")) return formatSeconds(value);
  return Number.isInteger(value) ? grouped(value) : formatScore(value);
}

// How all of it is had again: the suite's command, what the recipes share, and the machine.
function showSetup() {
  const host = section("setup");
  host.append(
    ...heading(
      "setup",
      "Run it again",
      "Recipe, environment and command of a single run: choose its name in the table.",
    ),
  );
  if (report.command)
    host.append(
      el("h3", {}, "The whole benchmark"),
      copyable(report.command, "command"),
      el("p", { class: "muted" }, "Finished runs are kept; give another folder to --out to run everything again."),
    );
  const shared = Object.entries(report.recipe);
  if (shared.length)
    host.append(
      el(
        "details",
        { class: "more" },
        el("summary", {}, `What every recipe has in common (${plural(shared.length, "setting")})`),
        copyable(yamlOf(shared), "shared settings"),
      ),
    );
  const machines = new Map(Object.entries(report.environment).map(([key, value]) => [key, [value]]));
  for (const cell of cells) {
    for (const [key, value] of Object.entries(cell.environment ?? {})) {
      if (!machines.has(key)) machines.set(key, []);
      if (!machines.get(key).includes(value)) machines.get(key).push(value);
    }
  }
  if (machines.size)
    host.append(
      el("h3", {}, "Environment"),
      el(
        "div",
        { class: "panel flush" },
        settingsTable(
          [...machines].map(([key, values]) => [
            key,
            values.length === 1 ? values[0] : `differs: ${listed(values.map(plainValue), 6)}`,
          ]),
          "Environment of the runs",
        ),
      ),
    );
}
