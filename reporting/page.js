"use strict";
// Sort the table by the column whose button is pressed, first downwards for numbers and upwards for text.
for (const button of document.querySelectorAll(".results th button")) {
  button.addEventListener("click", () => {
    const th = button.parentNode, heads = [...th.parentNode.children], body = th.closest("table").tBodies[0];
    const key = row => row.cells[heads.indexOf(th)].dataset.key;
    const empty = [...body.rows].filter(row => key(row) === "");  // last, whatever the direction
    const rows = [...body.rows].filter(row => key(row) !== "");
    const numeric = rows.every(row => !isNaN(key(row)));
    const was = th.getAttribute("aria-sort");
    const down = was === "ascending" || was === "none" && numeric;
    for (const other of heads) other.setAttribute("aria-sort", "none");
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    rows.sort((a, b) => numeric ? key(a) - key(b) : key(a).localeCompare(key(b), undefined, {numeric: true}));
    body.append(...(down ? rows.reverse() : rows), ...empty);
  });
}

// A query's nearest images: copies of those shown above it, of related classes, or of the support.
for (const near of document.querySelectorAll(".near")) {
  const episode = near.closest(".episode"), related = episode.querySelectorAll(".related img");
  const images = related.length ? related : episode.querySelectorAll(".shots img");
  for (const n of near.dataset.near.split(" ")) {
    const span = document.createElement("span");
    span.append(images[n].cloneNode(), images[n].closest("li, .class").querySelector(".name").textContent);
    near.append(span);
  }
}
