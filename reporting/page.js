"use strict";
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
