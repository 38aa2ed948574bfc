"use strict";

// The theme: the system's until the switch is used, then what was chosen, where that can be kept.
const root = document.documentElement, theme = document.getElementById("theme"), KEY = "thanos-deploy-theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const kept = (use) => { try { return use(localStorage); } catch { return null; } };
const isDark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
const tell = () => theme.setAttribute("aria-pressed", String(isDark()));
const chosen = kept((storage) => storage.getItem(KEY));
if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
theme.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  kept((storage) => storage.setItem(KEY, root.dataset.theme));
  tell();
});
system.addEventListener("change", tell);
tell();

// A table is sorted by the column whose heading is pressed; pressed again, the other way round.
// What has no value stays last.
const key = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent.trim() : cell.dataset.value === "" ? null : Number(cell.dataset.value);
};
const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b));
for (const button of document.querySelectorAll("th > button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement, column = heading.cellIndex, body = heading.closest("table").tBodies[0];
    const way = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => (a === null ? (b === null ? 0 : 1) : b === null ? -1 : way * compare(a, b)));
    body.append(...rows.map(([, row]) => row));
  });
}

// A folded model is printed all the same; a link to it unfolds it.
addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("details.model")) details.open = true; });
const unfold = () => { const details = document.getElementById(location.hash.slice(1))?.parentElement.querySelector("details.model"); if (details) details.open = true; };
addEventListener("hashchange", unfold);
unfold();
