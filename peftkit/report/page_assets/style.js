// Who looks how: colour, marker and dash of a group of variants, and which groups are shown.

const MOST_GROUPS = 16;
const MARKERS = ["circle", "square", "triangle", "diamond", "down", "cross", "star", "hexagon"];
const DASHES = [null, "7 3", "2 3", "9 3 2 3"];

// Up to sixteen variants look each their own way; more share the look of their method, or of a setting that varies.
const groupings = (() => {
  if (variants.length <= MOST_GROUPS) return [];
  const methodOf = (variant) => variant.cells.find((cell) => cell.label)?.label ?? "none";
  const keys = new Set(cells.flatMap((cell) => Object.keys(cell.recipe ?? {})));
  keys.delete("seed");
  const settings = [...keys].map((key) => [
    plainKey(key),
    (variant) => plainValue(variant.cells.find((cell) => cell.recipe)?.recipe[key] ?? "none"),
  ]);
  return [["method", methodOf], ...settings].filter(([, of]) => {
    const values = new Set(variants.map(of));
    return values.size > 1 && values.size <= MOST_GROUPS;
  });
})();

let groups = [];
function regroup(nameOf) {
  const names = [...new Set(variants.map(nameOf))];
  if (names.every((name) => name !== "" && Number.isFinite(Number(name)))) names.sort((a, b) => a - b);
  groups = names.map((name, place) => ({ name, place, variants: [], shown: true }));
  for (const variant of variants) {
    variant.group = groups[names.indexOf(nameOf(variant))];
    variant.group.variants.push(variant);
  }
}
regroup(groupings.length ? groupings[0][1] : variants.length > MOST_GROUPS ? () => "all" : (variant) => variant.name);

function colourClass(group) {
  return `c${group.place % 8}`;
}

function dashOf(group) {
  return DASHES[group.place % DASHES.length];
}

function markerPath(group, x, y, r) {
  const p = (...points) =>
    `M${points.map(([dx, dy]) => `${(x + dx * r).toFixed(1)} ${(y + dy * r).toFixed(1)}`).join("L")}Z`;
  switch (MARKERS[(group.place + Math.floor(group.place / 8)) % MARKERS.length]) {
    case "square":
      return p([-0.88, -0.88], [0.88, -0.88], [0.88, 0.88], [-0.88, 0.88]);
    case "triangle":
      return p([0, -1.15], [1.1, 0.8], [-1.1, 0.8]);
    case "diamond":
      return p([0, -1.25], [1.05, 0], [0, 1.25], [-1.05, 0]);
    case "down":
      return p([0, 1.15], [1.1, -0.8], [-1.1, -0.8]);
    case "cross":
      return p(
        [-0.4, -1.1],
        [0.4, -1.1],
        [0.4, -0.4],
        [1.1, -0.4],
        [1.1, 0.4],
        [0.4, 0.4],
        [0.4, 1.1],
        [-0.4, 1.1],
        [-0.4, 0.4],
        [-1.1, 0.4],
        [-1.1, -0.4],
        [-0.4, -0.4],
      );
    case "star":
      return p(
        ...Array.from({ length: 10 }, (_, i) => {
          const reach = i % 2 ? 0.55 : 1.3;
          const turn = (Math.PI * i) / 5;
          return [reach * Math.sin(turn), -reach * Math.cos(turn)];
        }),
      );
    case "hexagon":
      return p(
        ...Array.from({ length: 6 }, (_, i) => [
          1.12 * Math.cos((Math.PI * i) / 3),
          1.12 * Math.sin((Math.PI * i) / 3),
        ]),
      );
    default: {
      const at = (dx) => `${(x + dx * r).toFixed(1)} ${y.toFixed(1)}`;
      return `M${at(-1)}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`;
    }
  }
}

function swatch(group) {
  return svgEl(
    "svg",
    { class: `swatch ${colourClass(group)}`, viewBox: "0 0 26 14", width: 26, height: 14, "aria-hidden": "true" },
    svgEl("line", {
      x1: 0,
      x2: 26,
      y1: 7,
      y2: 7,
      stroke: "currentColor",
      "stroke-width": 2,
      "stroke-dasharray": dashOf(group),
    }),
    svgEl("path", { d: markerPath(group, 13, 7, 5), class: "dot" }),
  );
}

const listeners = { shown: [], grouped: [] };
function onVisibility(redraw) {
  listeners.shown.push(redraw);
}

function onRegroup(rebuild) {
  listeners.grouped.push(rebuild);
}

function tell(what) {
  for (const listener of listeners[what]) listener();
}

// What colours and markers stand for, where there are more variants than looks.
function lookChooser() {
  if (groupings.length < 2) return null;
  const names = groupings.map(([name]) => [name, name]);
  return chooser("Colour by", names, groupings[0][0], (chosen) => {
    regroup(groupings.find(([name]) => name === chosen)[1]);
    tell("grouped");
    tell("shown");
  });
}

// Chips that show and hide groups in every chart at once; only those with a variant that is wanted.
function legend(wanted) {
  const host = el("div", { class: "legend", role: "group", "aria-label": "Show or hide in the charts" });
  const build = () => {
    const useful = groups.filter((group) => group.variants.some(wanted));
    host.replaceChildren(...(useful.length < 2 ? [] : useful.map(legendChip)));
    host.hidden = useful.length < 2;
  };
  onRegroup(build);
  onVisibility(() => {
    for (const chip of host.children) chip.setAttribute("aria-pressed", String(chip.group.shown));
  });
  build();
  return host;
}

function legendChip(group) {
  const count = group.variants.length;
  const chip = el(
    "button",
    {
      type: "button",
      class: "chip",
      "aria-pressed": String(group.shown),
      onclick: () => {
        group.shown = !group.shown;
        tell("shown");
      },
    },
    swatch(group),
    el("span", {}, group.name),
    count > 1 ? el("span", { class: "muted" }, ` ${count}`) : null,
  );
  chip.group = group;
  return chip;
}
