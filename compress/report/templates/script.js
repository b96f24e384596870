"use strict";
document.documentElement.classList.add("js");

const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Sorting: the first click on a number sorts the largest first, on a text alphabetically.
for (const head of all("table.sortable thead th")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => sort(head));
}

function sort(head) {
  const table = head.closest("table");
  const column = head.cellIndex;
  const numeric = head.classList.contains("num");
  const was = head.getAttribute("aria-sort");
  const ascending = was ? was === "descending" : !numeric;
  for (const other of all("thead th", table)) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const key = (row) => {
    const cell = row.cells[column];
    if (!numeric) return cell.textContent.trim();
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  };
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [key(row), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null); // not measured: last
    const order = numeric ? a - b : a.localeCompare(b, undefined, { numeric: true });
    return ascending ? order : -order;
  });
  body.append(...rows.map(([, row]) => row));
}

// Filtering: each box narrows the rows of the table it names to those that hold its text.
for (const box of all("[data-filters]")) {
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase();
    for (const row of document.getElementById(box.dataset.filters).tBodies[0].rows)
      row.hidden = !row.textContent.toLowerCase().includes(words);
  });
}

// The chart of one runtime, device and thread count, and one batch size.
const runtime = document.getElementById("choose-runtime");
const batch = document.getElementById("choose-batch");
const charts = all(".chart");
if (runtime && batch) {
  const choose = () => {
    const possible = charts.filter((chart) => chart.dataset.runtime === runtime.value);
    for (const option of batch.options)
      option.disabled = !possible.some((chart) => chart.dataset.batch === option.value);
    if (batch.selectedOptions[0]?.disabled) batch.value = possible[0].dataset.batch;
    for (const chart of charts)
      chart.hidden = !(possible.includes(chart) && chart.dataset.batch === batch.value);
  };
  runtime.addEventListener("change", choose);
  batch.addEventListener("change", choose);
  choose();
}

// The box beside a point: by mouse, touch or keyboard.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
for (const point of all("[data-tip]")) {
  point.querySelector("title")?.remove(); // the browser would show it as well
  const show = () => {
    tip.textContent = point.dataset.tip;
    tip.hidden = false;
    const mark = point.getBoundingClientRect();
    const left = Math.min(mark.right + 8, innerWidth - tip.offsetWidth - 8);
    const above = mark.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 8 ? above : mark.bottom + 8}px`;
  };
  const hide = () => (tip.hidden = true);
  point.addEventListener("mouseenter", show);
  point.addEventListener("focus", show);
  point.addEventListener("mouseleave", hide);
  point.addEventListener("blur", hide);
}
addEventListener("scroll", () => (tip.hidden = true), { passive: true });
addEventListener("keydown", (event) => event.key === "Escape" && (tip.hidden = true));

// Tables that do not fit say that they go on.
const tell = () => {
  for (const place of all(".scroll")) {
    const note = place.previousElementSibling;
    if (!note?.classList.contains("aside")) continue;
    note.classList.toggle("needed", place.scrollWidth > place.clientWidth + 1);
  }
};
addEventListener("resize", tell);
addEventListener("toggle", tell, true);
tell();

// On paper everything is open.
addEventListener("beforeprint", () => {
  for (const part of all("details:not([open])")) {
    part.open = true;
    part.dataset.closed = "";
  }
});
addEventListener("afterprint", () => {
  for (const part of all("details[data-closed]")) part.open = false;
});
