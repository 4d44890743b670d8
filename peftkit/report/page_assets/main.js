// Draws the page and wires what belongs to all of it: the theme, and the mark that it is done.

function themeButton() {
  const button = document.getElementById("theme");
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => button.setAttribute("aria-pressed", String(isDark()));
  const kept = remembered();
  if (kept) root.dataset.theme = kept;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  show();
}

// Storage can be forbidden; then the choice lasts as long as the page.
function remembered() {
  try {
    const theme = localStorage.getItem("peftkit-theme");
    return theme === "dark" || theme === "light" ? theme : null;
  } catch {
    return null;
  }
}

function remember(theme) {
  try {
    localStorage.setItem("peftkit-theme", theme);
  } catch {
    return;
  }
}

themeButton();
const openRun = runDialog();
showHeadline(openRun);
showTradeoffs(openRun);
showDifferences();
showRuns(openRun);
showCurves();
showMemory();
showExamples();
showOutside();
showSetup();
document.getElementById("foot").textContent =
  `Written by peftkit ${report.version}. This page is one file and loads nothing else.`;
// On paper nothing can be opened: what explains the benchmark and its recipes is open there.
const opened = [];
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("main details.more:not([open])")) {
    details.open = true;
    opened.push(details);
  }
});
window.addEventListener("afterprint", () => {
  for (const details of opened.splice(0)) details.open = false;
});
// A focused point keeps its tooltip while the page scrolls it into view.
window.addEventListener(
  "scroll",
  () => {
    const focused = document.activeElement;
    if (focused?.classList.contains("hit")) focused.dispatchEvent(new Event("focus"));
    else hideTip();
  },
  { passive: true },
);
document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
requestAnimationFrame(() =>
  requestAnimationFrame(() => {
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
  }),
);
