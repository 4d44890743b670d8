// The document of the report, its parts joined to one another, and the questions that charts ask of it.

const report = JSON.parse(document.getElementById("data").textContent);
const SEPARATOR = "\u001f";
const variants = report.variants.map((variant, place) => ({ ...variant, place, cells: [] }));
const cells = report.cells.map((cell, place) => ({ ...cell, place, variant: variants[cell.variant] }));
for (const cell of cells) cell.variant.cells.push(cell);

const mainMetric = (() => {
  const names = new Set(variants.filter((v) => v.main !== null).map((v) => v.main));
  return names.size === 1 ? [...names][0] : null;
})();
const metricNames = [...new Set(variants.flatMap((v) => Object.keys(v.metrics)))].sort(
  (a, b) => (b === mainMetric) - (a === mainMetric),
);

// Metrics of the validation split carry its name in front.
function lowerIsBetter(metric) {
  return report.lower_is_better.includes(metric.split(" ").pop());
}

function metricTitle(metric) {
  return metric.replaceAll("_", " ");
}

function scoreOf(variant, metric = mainMetric ?? variant.main) {
  return variant.metrics[metric] ?? null;
}

function statusCounts(variant) {
  const counts = new Map();
  for (const cell of variant.cells) counts.set(cell.status, (counts.get(cell.status) ?? 0) + 1);
  return counts;
}

function overBaseline(cell) {
  const { peak_bytes: peak, baseline_bytes: held } = cell.memory ?? {};
  return peak === undefined || held === undefined ? null : Math.max(0, peak - held);
}

// What was measured of the inference that would be deployed.
function servedOf(cell) {
  const { merged, adapter, base } = cell.inference ?? {};
  return merged ?? adapter ?? base ?? {};
}

function mean(values) {
  const measured = values.filter((value) => value !== null && value !== undefined);
  return measured.length ? measured.reduce((sum, value) => sum + value, 0) / measured.length : null;
}

// Smallest and largest over the seeds that ended well; null with fewer than two.
function spread(variant, measure) {
  const values = variant.cells
    .filter((cell) => cell.status === "ok")
    .map(measure)
    .filter((value) => value !== null && value !== undefined);
  return values.length < 2 ? null : [Math.min(...values), Math.max(...values)];
}

// Every setting of a cell: what all share, then its own. Keys are joined by SEPARATOR.
function settingsOf(shared, own) {
  return new Map([...Object.entries(shared), ...Object.entries(own ?? {})]);
}

function plainKey(key) {
  return key.split(SEPARATOR).join(".");
}

// The values of one recipe key over all cells, each once.
function recipeValues(...path) {
  const key = path.join(SEPARATOR);
  const found = new Set();
  for (const cell of cells) {
    if (!cell.recipe) continue;
    const value = cell.recipe[key] ?? report.recipe[key];
    if (value !== undefined && value !== null) found.add(plainValue(value));
  }
  return [...found];
}

function plainValue(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

// Block YAML of flattened settings; scalars as JSON, which YAML reads as they are.
function yamlOf(settings) {
  const tree = new Map();
  for (const [key, value] of settings) {
    const path = key.split(SEPARATOR);
    let node = tree;
    for (const part of path.slice(0, -1)) {
      if (!node.has(part)) node.set(part, new Map());
      node = node.get(part);
    }
    node.set(path.at(-1), value);
  }
  const lines = [];
  const write = (node, indent) => {
    for (const [key, value] of node) {
      const name =
        /^[A-Za-z_][\w-]*$/.test(key) && !/^(true|false|null|yes|no|on|off|y|n)$/i.test(key)
          ? key
          : JSON.stringify(key);
      if (value instanceof Map) {
        lines.push(`${indent}${name}:`);
        write(value, `${indent}  `);
      } else {
        lines.push(`${indent}${name}: ${JSON.stringify(value)}`);
      }
    }
  };
  write(tree, "");
  return `${lines.join("\n")}\n`;
}

const WIDTHS = { B: Uint8Array, H: Uint16Array, I: Uint32Array, f: Float32Array };

// Numbers from base64; see page_examples.py for the kinds.
function unpack(kind, text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new WIDTHS[kind](bytes.buffer);
}
