// Read along: the sentences as they are spoken, the current one marked.

export class ReadAlong {
  constructor(region, lines) {
    this.region = region;
    this.lines = lines;
    this.reset();
  }

  reset() {
    this.sentences = [];
    this.current = null;
    this.region.replaceChildren();
    this.region.hidden = true;
    this.lines.show(null);
  }

  // A turn begins at this second of the audio; who: A or B in a conversation.
  turn(start, who, line) {
    this.start = start;
    this.line = line;
    this.paragraph = document.createElement("p");
    if (!who) return;
    const name = document.createElement("span");
    name.className = "turn";
    name.textContent = who;
    this.paragraph.append(name);
  }

  add(clause) {
    const element = document.createElement("span");
    element.className = "sentence";
    element.textContent = clause.text;
    this.paragraph.append(element, " ");
    this.region.append(this.paragraph);
    this.region.hidden = false;
    this.sentences.push({ element, start: this.start + clause.start, line: this.line });
  }

  // Mark the sentence at this second; below 0 none.
  show(position) {
    const now = this.sentences.findLast((sentence) => sentence.start <= position) || null;
    if (now === this.current) return;
    this.current = now;
    for (const sentence of this.sentences) {
      sentence.element.classList.toggle("now", sentence === now);
      if (sentence === now) sentence.element.setAttribute("aria-current", "true");
      else sentence.element.removeAttribute("aria-current");
    }
    this.lines.show(now?.line || null);
    if (now) this.scroll(now.element);
  }

  // Within the region only: the page itself must not move under a reader.
  scroll(element) {
    const bottom = element.offsetTop + element.offsetHeight - this.region.offsetTop;
    this.region.scrollTop = Math.max(this.region.scrollTop, bottom - this.region.clientHeight);
  }
}
