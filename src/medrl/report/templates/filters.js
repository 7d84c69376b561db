"use strict";
// Filters and sorts test items. What data and models wrote is compared as text and never becomes markup.
for (const gallery of document.querySelectorAll(".gallery")) {
  const bar = gallery.querySelector(".filters"), groups = gallery.querySelector(".groups");
  const found = gallery.querySelector(".found"), said = gallery.querySelector(".said");
  const items = [...groups.querySelectorAll(".item")];
  const homes = items.map((item) => [item.parentNode, item.nextSibling]);
  const choices = [...bar.querySelectorAll("select[data-by]")], order = bar.querySelector("select.order");

  const show = () => {
    const chosen = choices.filter((choice) => choice.value);
    const fits = (item) => chosen.every(({ dataset: { by }, value }) =>
      item.dataset[by] === value || (by === "verdict" && value === "wrong" && item.dataset.verdict !== "right"));
    const sign = { shortest: 1, longest: -1 }[order.value] || 0;
    // Back home, last first, so that every next sibling is there already.
    for (let i = items.length - 1; i >= 0; i--) homes[i][0].insertBefore(items[i], homes[i][1]);
    const flat = chosen.length > 0 || sign !== 0;
    groups.hidden = flat;
    if (flat) {
      const kept = items.filter(fits);
      kept.sort((a, b) => sign * (a.dataset.length - b.dataset.length));
      found.append(...kept);
      said.textContent = kept.length + " of " + items.length + " items shown";
    } else said.textContent = items.length + " items";
  };
  bar.addEventListener("change", show);
  bar.querySelector("button").addEventListener("click", () => {
    for (const choice of [...choices, order]) choice.selectedIndex = 0;
    show();
  });
  bar.hidden = false;
  show();
}
