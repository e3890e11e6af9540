"use strict";
// Sort a table by the column whose button is pressed, first downwards for numbers and upwards for text.
for (const button of document.querySelectorAll(".results th button")) {
  button.addEventListener("click", () => {
    const th = button.closest("th"), table = th.closest("table"), body = table.tBodies[0];
    const column = [...th.parentNode.children].indexOf(th), numeric = th.dataset.type === "number";
    const was = th.getAttribute("aria-sort");
    const direction = was === "descending" ? "ascending" : was === "ascending" || numeric ? "descending" : "ascending";
    for (const other of th.parentNode.children) other.setAttribute("aria-sort", other === th ? direction : "none");
    const sign = direction === "ascending" ? 1 : -1;
    const key = row => row.cells[column].dataset.key;
    const compare = (a, b) => (numeric ? key(a) - key(b) : key(a).localeCompare(key(b), undefined, {numeric: true}));
    const rows = [...body.rows];
    const empty = rows.filter(row => key(row) === "");  // last, whatever the direction
    body.append(...rows.filter(row => key(row) !== "").sort((a, b) => sign * compare(a, b)), ...empty);
  });
}

// A query's nearest images: copies of those shown above it, which are lit while the query has the pointer or the focus.
for (const near of document.querySelectorAll(".query .near")) {
  const query = near.closest(".query"), summary = query.querySelector("summary");
  const nearest = () => (near.dataset.near ? near.dataset.near.split(" ") : []).map(id => document.getElementById(id));
  const light = on => {
    if (on && near.dataset.near && !near.querySelector("img")) {
      for (const image of nearest()) {
        const span = document.createElement("span"), copy = image.cloneNode();
        copy.removeAttribute("id");
        span.append(copy, image.dataset.class);
        near.append(span);
      }
    }
    for (const image of nearest()) image.classList.toggle("lit", on);
  };
  for (const [event, on] of [["mouseenter", true], ["mouseleave", false], ["focus", true], ["blur", false]]) {
    summary.addEventListener(event, () => light(on));
  }
  query.addEventListener("toggle", () => query.open && light(true));
}

// Show the queries of one kind.
for (const filters of document.querySelectorAll(".filters")) {
  filters.hidden = false;
  filters.addEventListener("click", event => {
    const pressed = event.target.closest("button");
    if (!pressed) return;
    for (const button of filters.children) button.setAttribute("aria-pressed", String(button === pressed));
    for (const query of filters.nextElementSibling.children) {
      query.hidden = pressed.dataset.kind !== "" && query.dataset.kind !== pressed.dataset.kind;
    }
  });
}
