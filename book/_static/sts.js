/* Two conveniences. Without scripts all cards and all texts are simply there. */
document.addEventListener("DOMContentLoaded", () => {
  /* A field above folded cards, which hides those without all of the words. */
  for (const box of document.querySelectorAll("details.sts-search")) {
    const field = document.createElement("input");
    field.type = "search";
    field.placeholder = "a word, a number or a kind of text";
    field.setAttribute("aria-label", "Search the cards");
    const cards = [...box.querySelectorAll(".sts-latent-card")];
    const texts = cards.map((card) => card.textContent.toLowerCase());
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/);
      cards.forEach((card, place) => { card.hidden = !words.every((word) => texts[place].includes(word)); });
    });
    box.querySelector("summary").after(field);
  }
  /* A slider above texts, which shows one of them. */
  for (const box of document.querySelectorAll(".sts-steps")) {
    const texts = [...box.querySelectorAll("section")], slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: 0, max: texts.length - 1, value: 0 });
    slider.setAttribute("aria-label", "Step through the texts");
    const show = () => {
      texts.forEach((text, place) => { text.hidden = place !== Number(slider.value); });
      slider.setAttribute("aria-valuetext", texts[slider.value].querySelector("h4").textContent);
    };
    slider.addEventListener("input", show);
    box.prepend(slider);
    show();
  }
});
