// A list of any length of which only what is in sight is in the page: one stop of the keyboard, arrows inside.

const ROW_PX = 58;

class List {
  /** `fill` puts row number `row` into an element; `chosen` is called with the row that is looked at. */
  constructor(box, fill, chosen) {
    Object.assign(this, { box, fill, chosen, rows: [], at: -1, shown: new Map() });
    this.room = document.createElement("div");
    this.room.className = "room";
    this.room.setAttribute("role", "presentation");
    box.replaceChildren(this.room);
    let waiting = false;
    const draw = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        this.draw();
      });
    };
    box.addEventListener("scroll", draw, { passive: true });
    new ResizeObserver(draw).observe(box);
    box.addEventListener("keydown", (event) => this.key(event));
    this.room.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.go(Number(option.dataset.at));
    });
  }

  show(rows, at = rows.length ? 0 : -1) {
    this.rows = rows;
    this.room.style.height = `${rows.length * ROW_PX}px`;
    this.clear();
    this.box.scrollTop = 0;
    this.go(at);
  }

  clear() {
    for (const option of this.shown.values()) option.remove();
    this.shown.clear();
  }

  go(at) {
    this.at = Math.max(Math.min(at, this.rows.length - 1), this.rows.length ? 0 : -1);
    const top = this.at * ROW_PX;
    const { scrollTop, clientHeight } = this.box;
    if (this.at >= 0 && top < scrollTop) this.box.scrollTop = top;
    else if (top + ROW_PX > scrollTop + clientHeight) this.box.scrollTop = top + ROW_PX - clientHeight;
    this.draw();
    this.chosen(this.at >= 0 ? this.rows[this.at] : null);
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW_PX) - 4);
    const last = Math.min(this.rows.length, first + Math.ceil(this.box.clientHeight / ROW_PX) + 8);
    for (const [at, option] of this.shown) {
      if ((at < first || at >= last) && at !== this.at) {
        option.remove();
        this.shown.delete(at);
      }
    }
    for (let at = first; at < last; at++) this.option(at);
    if (this.at >= 0) this.box.setAttribute("aria-activedescendant", this.option(this.at).id);
    else this.box.removeAttribute("aria-activedescendant");
    for (const [at, option] of this.shown) option.setAttribute("aria-selected", String(at === this.at));
  }

  option(at) {
    if (!this.shown.has(at)) {
      const option = document.createElement("div");
      option.id = `row-${at}`;
      option.className = "option";
      option.dataset.at = at;
      option.setAttribute("role", "option");
      option.setAttribute("aria-setsize", this.rows.length);
      option.setAttribute("aria-posinset", at + 1);
      option.style.top = `${at * ROW_PX}px`;
      this.fill(option, this.rows[at]);
      const after = [...this.shown.keys()].filter((other) => other > at).sort((a, b) => a - b)[0];
      this.room.insertBefore(option, after === undefined ? null : this.shown.get(after));
      this.shown.set(at, option);
    }
    return this.shown.get(at);
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.box.clientHeight / ROW_PX) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.altKey || event.ctrlKey || event.metaKey || !(event.key in steps)) return;
    event.preventDefault();
    const to = this.at + steps[event.key];
    this.go(to === Infinity ? this.rows.length - 1 : to === -Infinity ? 0 : to);
  }
}
