/* Two conveniences. Without scripts all cards and all rows are simply there. */
document.addEventListener("DOMContentLoaded", () => {
  const input = (type, label, before, change) => {
    const field = document.createElement("input");
    field.type = type;
    field.setAttribute("aria-label", label);
    field.addEventListener("input", () => change(field));
    before.before(field);
    return field;
  };
  /* A field above folded cards, which hides those without all of the words. */
  for (const box of document.querySelectorAll("details.sts-search")) {
    const cards = [...box.querySelectorAll(".sts-latent-card")];
    const texts = cards.map((card) => card.textContent.toLowerCase());
    input("search", "Search the cards", box.querySelector(".sts-cards"), (field) => {
      const words = field.value.toLowerCase().split(/\s+/);
      cards.forEach((card, place) => { card.hidden = !words.every((word) => texts[place].includes(word)); });
    }).placeholder = "a word, a number, a kind of text";
  }
  /* A slider above a table, which shows one of its rows. */
  for (const box of document.querySelectorAll(".sts-steps")) {
    const rows = [...box.querySelectorAll("tbody tr")];
    const show = (field) => {
      rows.forEach((row, place) => { row.hidden = place !== Number(field.value); });
      field.setAttribute("aria-valuetext", rows[field.value].cells[0].textContent);
    };
    const slider = input("range", "Step through the rows", box.firstElementChild, show);
    Object.assign(slider, { min: 0, max: rows.length - 1, value: 0 });
    show(slider);
  }
});
