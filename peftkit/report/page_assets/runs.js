// The table: a line a method or a line a run, sorted by any column, filtered by words and by how runs ended.

function showRuns(open) {
  const host = section("runs");
  const lead =
    "Sort by a column's header. Choose a name for its recipe, its environment and the command that runs it again.";
  host.append(...heading("runs", "Every number", lead));
  const table = new RunTable(open);
  const views = [
    ["methods", "Method"],
    ["runs", "Run"],
  ];
  host.append(
    el(
      "div",
      { class: "controls" },
      segments(
        "One line for each",
        views,
        table.view,
        setting(table, "view", () => table.rebuild()),
      ),
      filterBox(table),
      statusFilters(table),
      metricNames.length > 1 ? everyMetricBox(table) : null,
      table.count,
    ),
    el(
      "div",
      { class: "scroller panel", tabindex: 0, role: "region", "aria-label": "Table of methods and runs" },
      table.element,
    ),
  );
  onRegroup(() => table.rebuild());
  table.rebuild();
}

class RunTable {
  view = "methods";
  every = false;
  words = "";
  statuses = new Set();
  key = metricNames.length ? `metric ${metricNames[0]}` : "name";
  down = metricNames.length > 0 && !lowerIsBetter(metricNames[0]);
  rows = [];
  columns = [];
  body = el("tbody");
  head = el("tr");
  count = el("p", { class: "muted count", role: "status" });

  constructor(open) {
    this.open = open;
    const caption = el("caption", { class: "unseen" }, "Methods and runs; the buttons in the header sort");
    this.element = el("table", { class: "runs" }, caption, el("thead", {}, this.head), this.body);
  }

  rebuild() {
    const found = this.view === "methods" ? variants.map(methodRow) : cells.map(runRow);
    this.columns = tableColumns(this.view, this.every);
    if (!this.columns.some((column) => column.key === this.key)) this.key = "name";
    this.head.replaceChildren(...this.columns.map((column) => headerCell(column, () => this.sortBy(column))));
    this.rows = found.map((row) => ({ ...row, open: this.open, haystack: haystackOf(row), scale: scoreScale() }));
    for (const row of this.rows) row.element = el("tr", {}, rowCells(row, this.columns));
    this.sort();
    this.filter();
  }

  // The other way round where the column is sorted by already; else its best first.
  sortBy(column) {
    this.down = this.key === column.key ? !this.down : column.better === "more";
    this.key = column.key;
    this.sort();
  }

  sort() {
    const column = this.columns.find(({ key }) => key === this.key);
    this.body.replaceChildren(...sorted(this.rows, column, this.down).map((row) => row.element));
    for (const [i, cell] of [...this.head.children].entries()) {
      const order = this.down ? "descending" : "ascending";
      cell.setAttribute("aria-sort", this.columns[i] === column ? order : "none");
    }
  }

  filter() {
    const words = this.words.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = (cell) => !this.statuses.size || this.statuses.has(cell.status);
    for (const row of this.rows) {
      row.element.hidden = !(words.every((word) => row.haystack.includes(word)) && row.cells.some(wanted));
    }
    const shown = this.rows.filter((row) => !row.element.hidden).length;
    const all = plural(this.rows.length, this.view === "methods" ? "method" : "run");
    this.count.textContent = shown === this.rows.length ? all : `${grouped(shown)} of ${all}`;
  }
}

function headerCell(column, onclick) {
  return el(
    "th",
    { scope: "col", class: column.number ? "number" : null, "aria-sort": "none" },
    el(
      "button",
      { type: "button", class: "sorter", "data-key": column.key, onclick },
      column.title,
      el("span", { class: "arrow", "aria-hidden": "true" }),
    ),
  );
}

// What is not known comes last, whichever way the rest goes.
function sorted(rows, column, down) {
  const sign = down ? -1 : 1;
  return rows
    .map((row, place) => ({ row, place, value: column.value(row) }))
    .sort((a, b) => {
      const missing = (a.value === null || a.value === undefined) - (b.value === null || b.value === undefined);
      if (missing || a.value === b.value || a.value === null || a.value === undefined)
        return missing || a.place - b.place;
      return sign * (a.value < b.value ? -1 : 1);
    })
    .map(({ row }) => row);
}

// Chips for the ways in which runs ended, when there is more than one.
function statusFilters(table) {
  const counts = new Map();
  for (const cell of cells) counts.set(cell.status, (counts.get(cell.status) ?? 0) + 1);
  if (counts.size < 2) return null;
  const chips = [...counts].map(([status, count]) => {
    const chip = el(
      "button",
      { type: "button", class: "chip", "aria-pressed": "false", "data-status": status },
      badge(status),
      el("span", { class: "muted" }, grouped(count)),
    );
    chip.addEventListener("click", () => {
      const chosen = !table.statuses.delete(status);
      if (chosen) table.statuses.add(status);
      chip.setAttribute("aria-pressed", String(chosen));
      table.filter();
    });
    return chip;
  });
  return el(
    "div",
    { class: "field", role: "group", "aria-label": "Only runs that ended like this" },
    el("span", {}, "Ended"),
    el("div", { class: "legend only" }, chips),
  );
}

function everyMetricBox(table) {
  const box = el("input", { type: "checkbox", id: "every-metric" });
  box.addEventListener("change", () => {
    table.every = box.checked;
    table.rebuild();
  });
  return el("label", { class: "check", for: "every-metric" }, box, " All metrics");
}

function filterBox(table) {
  const look = { id: "filter", placeholder: "lora rank=8", autocomplete: "off", spellcheck: "false" };
  const box = el("input", { type: "search", ...look });
  box.addEventListener("input", () => {
    table.words = box.value;
    table.filter();
  });
  return el("label", { class: "field", for: "filter" }, el("span", {}, "Filter"), box);
}
