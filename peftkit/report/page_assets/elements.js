// Making elements: text goes in as text, never as markup. And the two things that speak: tooltip and announcer.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

// el("p", {class: "note"}, "text", child): strings become text nodes.
function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svgEl(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function section(id) {
  return document.getElementById(id);
}

// The heading of a section and a sentence that says how to read it.
function heading(id, title, lead) {
  return [el("h2", { id: `${id}-title` }, title), lead ? el("p", { class: "lead" }, lead) : null];
}

let lastId = 0;
function newId(word) {
  lastId += 1;
  return `${word}-${lastId}`;
}

// Keeps what is chosen in `state[key]`, then does what follows from it.
function setting(state, key, then) {
  return (value) => {
    state[key] = value;
    then();
  };
}

// A labelled select. `options` are [value, text] pairs.
function chooser(label, options, chosen, onchange, attributes = {}) {
  const id = newId("choose");
  const select = el(
    "select",
    { id, ...attributes, onchange: () => onchange(select.value) },
    options.map(([value, text]) => el("option", { value, selected: value === chosen }, text)),
  );
  return el("label", { class: "field", for: id }, el("span", {}, label), select);
}

// One of a few, side by side: radio buttons that look like one switch.
function segments(label, options, chosen, onchange) {
  const name = newId("segment");
  return el(
    "fieldset",
    { class: "segments" },
    el("legend", {}, label),
    options.map(([value, text]) => {
      const id = newId("segment");
      const input = el("input", { type: "radio", id, name, value, onchange: () => onchange(value) });
      input.checked = value === chosen;
      return el("span", {}, input, el("label", { for: id }, text));
    }),
  );
}

// A plain table. Cells are strings or elements; numeric columns are the ones named in `numeric`.
function plainTable(header, rows, numeric = [], caption = "", style = null) {
  const kind = (i) => (numeric.includes(i) ? "number" : null);
  return el(
    "div",
    { class: "scroller", tabindex: 0, role: "region", "aria-label": caption || "Table" },
    el(
      "table",
      { class: style },
      caption ? el("caption", { class: "unseen" }, caption) : null,
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          header.map((text, i) => el("th", { scope: "col", class: kind(i) }, text)),
        ),
      ),
      el(
        "tbody",
        {},
        rows.map((row) =>
          el(
            "tr",
            {},
            row.map((cell, i) =>
              i === 0 ? el("th", { scope: "row", class: kind(i) }, cell) : el("td", { class: kind(i) }, cell),
            ),
          ),
        ),
      ),
    ),
  );
}

// The numbers behind a chart, built when they are asked for.
function behind(makeTable) {
  const details = el("details", { class: "behind" }, el("summary", {}, "The numbers as a table"));
  details.addEventListener("toggle", () => {
    if (details.open) details.replaceChildren(details.firstChild, makeTable());
  });
  return { element: details, refresh: () => details.open && details.replaceChildren(details.firstChild, makeTable()) };
}

function announce(text) {
  document.getElementById("announcer").textContent = text;
}

const tip = document.getElementById("tip");

// Show lines of text beside a place of the window; the first is the title.
function showTip(lines, x, y) {
  tip.replaceChildren(...lines.map((line, i) => el("div", { class: i === 0 ? "tip-title" : null }, line)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 14 + box.width > window.innerWidth - 8 ? x - box.width - 14 : x + 14;
  tip.style.left = `${Math.max(8, Math.min(left, window.innerWidth - box.width - 8))}px`;
  tip.style.top = `${Math.max(8, Math.min(y - box.height / 2, window.innerHeight - box.height - 8))}px`;
}

function hideTip() {
  tip.hidden = true;
}

// A command or a text with a button that copies it; where copying is not allowed, it is selected instead.
function copyable(text, label) {
  const code = el("code", {}, text);
  const button = el("button", { type: "button", class: "copy", "aria-label": `Copy ${label}` }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    announce(`${label}: ${button.textContent.toLowerCase()}`);
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return el("div", { class: "copyable" }, el("pre", { tabindex: 0 }, code), button);
}
