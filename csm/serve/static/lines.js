// The lines of a conversation: who speaks, and what.

export class Lines {
  constructor(list) {
    this.items = list;
    this.add("A");
    this.add("B");
  }

  // Another line, of the voice that did not speak last. Returns its text field.
  add(who) {
    const item = document.createElement("li");
    item.dataset.who = who || (this.items.lastElementChild?.dataset.who === "A" ? "B" : "A");
    item.append(this.button("who"), document.createElement("textarea"), this.button("remove"));
    const [speaker, field, remove] = item.children;
    field.maxLength = 2000;
    field.rows = 1;
    remove.textContent = "✕";
    speaker.addEventListener("click", () => {
      item.dataset.who = item.dataset.who === "A" ? "B" : "A";
      this.label();
    });
    remove.addEventListener("click", () => this.remove(item));
    this.items.append(item);
    this.label();
    return field;
  }

  button(name) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = name;
    return button;
  }

  remove(item) {
    const next = item.nextElementSibling || item.previousElementSibling;
    if (!next) return;
    item.remove();
    this.label();
    next.querySelector("textarea").focus();
  }

  label() {
    [...this.items.children].forEach((item, index) => {
      const [speaker, field, remove] = item.children;
      const { who } = item.dataset;
      speaker.textContent = who;
      speaker.setAttribute("aria-label", `${who} speaks line ${index + 1}: change`);
      field.setAttribute("aria-label", `Line ${index + 1}, voice ${who}`);
      remove.setAttribute("aria-label", `Remove line ${index + 1}`);
      remove.disabled = this.items.children.length === 1;
    });
  }

  list() {
    return [...this.items.children].map((item) => ({
      who: item.dataset.who,
      text: item.querySelector("textarea").value,
      line: item,
    }));
  }

  firstField() {
    return this.items.querySelector("textarea");
  }

  // The line that is being spoken, or null.
  show(line) {
    for (const item of this.items.children) item.classList.toggle("now", item === line);
  }
}
