"use strict";
// Sorting, toggles and what is folded on paper; without scripts the page shows everything.
document.documentElement.classList.add("scripted");

const key = (cell) => {
  const raw = cell.dataset.sort ?? "";
  const value = Number(raw);
  return raw === "" ? null : Number.isNaN(value) ? raw : value;
};

const compare = (a, b) => {
  if (a === null || b === null) return (a === null) - (b === null); // what has no value stays last
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
};

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [left, right] = [key(a.cells[index]), key(b.cells[index])];
        const order = compare(left, right);
        return descending && left !== null && right !== null ? -order : order;
      });
      rows.forEach((row) => row.classList.remove("group"));
      table.tBodies[0].append(...rows);
    });
  });
}

const unfolded = [];
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details:not([open])")) {
    folded.open = true;
    unfolded.push(folded);
  }
});
addEventListener("afterprint", () => {
  for (const details of unfolded.splice(0)) details.open = false;
});

for (const button of document.querySelectorAll(".toggles button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") === "false";
    const name = button.dataset.toggle;
    for (const same of document.querySelectorAll(".toggles button")) {
      if (same.dataset.toggle === name) same.setAttribute("aria-pressed", String(shown));
    }
    for (const item of document.querySelectorAll("[data-strategy]")) {
      if (item.dataset.strategy === name) item.classList.toggle("off", !shown);
    }
  });
}
