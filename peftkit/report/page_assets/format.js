// Numbers as people read them, the way the tables of peftkit write them.

const NOTHING = "–";
const MINUS = "\u2212";

function written(value, how) {
  return value === null || value === undefined ? NOTHING : how(value);
}

function formatBytes(size) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(size) < 1024) return unit === "B" ? `${size.toFixed(0)} B` : `${size.toFixed(1)} ${unit}`;
    size /= 1024;
  }
  return `${size.toFixed(1)} TiB`;
}

function threeDigits(value) {
  return String(Number(value.toPrecision(3)));
}

function formatCount(count) {
  for (const [limit, unit] of [
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (Math.abs(count) >= limit * (1 - 5e-4)) return threeDigits(count / limit) + unit;
  }
  return Number.isInteger(count) || Math.abs(count) >= 100 ? count.toFixed(0) : threeDigits(count);
}

function formatSeconds(seconds) {
  if (seconds > 0 && seconds < 0.1) return `${(seconds * 1000).toPrecision(2)}ms`;
  if (seconds < 10) return `${seconds.toFixed(1)}s`;
  const minutes = Math.floor(Math.round(seconds) / 60);
  const rest = Math.round(seconds) % 60;
  if (minutes >= 60) return `${Math.floor(minutes / 60)}h${String(minutes % 60).padStart(2, "0")}m`;
  return minutes ? `${minutes}m${String(rest).padStart(2, "0")}s` : `${rest}s`;
}

function formatJoules(joules) {
  if (joules >= 3.6e5) return `${threeDigits(joules / 3.6e6)} kWh`;
  return joules >= 1000 ? `${threeDigits(joules / 1000)} kJ` : `${threeDigits(joules)} J`;
}

function formatScore(value) {
  if (Math.abs(value) < 10) return value.toFixed(3).replace("-", MINUS);
  return (Math.abs(value) < 1000 ? value.toFixed(1) : String(Number(value.toPrecision(4)))).replace("-", MINUS);
}

function formatSigned(value) {
  const text = formatScore(Math.abs(value));
  return Number(text) === 0 ? text : (value < 0 ? MINUS : "+") + text;
}

function formatInterval(low, high, how = formatScore) {
  return low === undefined || low === null || high === undefined || high === null ? "" : `[${how(low)}, ${how(high)}]`;
}

function formatEstimate(score) {
  return `${formatScore(score.value)} ${formatInterval(score.low, score.high)}`.trim();
}

function formatP(p) {
  return p < 0.001 ? "< 0.001" : p.toFixed(3);
}

function formatPercent(part) {
  const text = `${Math.abs(100 * part).toFixed(1)} %`;
  return part < 0 ? MINUS + text : `+${text}`;
}

function grouped(count) {
  return String(count).replace(/\B(?=(\d{3})+(?!\d))/g, ",");
}

function plural(count, word) {
  return `${grouped(count)} ${word}${count === 1 ? "" : "s"}`;
}

// "a", "a and b", "a, b and c", "a, b and 7 more".
function listed(names, most = 6) {
  const kept = names.length > most ? [...names.slice(0, most - 1), `${names.length - most + 1} more`] : names;
  return kept.length < 2 ? kept.join("") : `${kept.slice(0, -1).join(", ")} and ${kept.at(-1)}`;
}
