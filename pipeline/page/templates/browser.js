// The browser of rows: controls, the list, and one prompt with its answers side by side.
// Sampled texts enter the page as text nodes alone, and what acts without being seen is written out.

const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
const KEPT = "\n\t\u200c\u200d"; // the last two join letters in Persian and emoji

/** `text` with every character that is not seen but acts written out, as \x1b or \u202e. */
function visible(text) {
  return text.replace(UNSEEN, (character) => {
    if (KEPT.includes(character)) return character;
    const code = character.codePointAt(0).toString(16);
    return code.length < 3 ? `\\x${code.padStart(2, "0")}` : `\\u${code.padStart(4, "0")}`;
  });
}

function element(kind, classes, ...children) {
  const made = document.createElement(kind);
  if (classes) made.className = classes;
  made.append(...children.map((child) => (typeof child === "string" ? visible(child) : child)));
  return made;
}

function textBox(text) {
  if (!text) return element("div", "empty", "(empty)");
  const box = element("div", "text", text);
  box.dir = "auto";
  return box;
}

const figure = (value) =>
  Math.abs(value) >= 1000 || (value && Math.abs(value) < 0.01) ? value.toPrecision(3) : value.toFixed(2);

const counted = (count) => count.toLocaleString("en");

function saidBy(role, text) {
  return element("div", "said", element("b", "", role), textBox(text));
}

function answerBox([text, reward, mark, numTokens, finish, rewards]) {
  const told = element("div", "told");
  if (mark) told.append(element("b", "mark", `${mark === "chosen" ? "✓" : "✗"} ${mark}`));
  told.append(element("span", "", "reward ", element("b", "", reward === null ? "none" : figure(reward))));
  for (const [name, value, role] of rewards) {
    if (role !== "main" || rewards.length > 1)
      told.append(element("span", "", `${name} ${value === null ? "none" : figure(value)} (${role})`));
  }
  told.append(element("span", "", `${numTokens} tokens, ${finish}`));
  return element("li", `candidate ${mark}`, told, textBox(text));
}

function columnBox([title, where, fate, detail, margin, answers], here) {
  const about = [fate, margin === null ? "" : `margin ${figure(margin)}`].filter(Boolean).join(", ");
  const head = element("h4", "", title);
  const box = element("section", where === here ? "column here" : "column", head);
  box.setAttribute("aria-label", title);
  if (about || detail) box.append(element("p", "about", [about, detail].filter(Boolean).join(": ")));
  const list = element("ol", "answers", ...answers.map(answerBox));
  box.append(answers.length ? list : element("p", "empty", "no answers"));
  return box;
}

/** Row number `row` in words, for the list. */
function rowTold(rows, row) {
  const heldOut = rows.wheres[rows.where[row]] === "held out";
  const told = [rows.wheres[rows.where[row]], rows.fates[rows.fate[row]]];
  const sign = heldOut && rows.margin[row] > 0 ? "+" : "";
  if (!Number.isNaN(rows.margin[row])) told.push(`${heldOut ? "gain" : "margin"} ${sign}${figure(rows.margin[row])}`);
  if (!Number.isNaN(rows.reward[row])) told.push(`${heldOut ? "reward" : "best"} ${figure(rows.reward[row])}`);
  return told.filter(Boolean).join(" · ");
}

class Browser {
  constructor(root, rows) {
    Object.assign(this, { root, rows, asked: 0, looked: null });
    const find = (name) => root.querySelector(`[data-is="${name}"]`);
    [this.where, this.fate, this.sort, this.search, this.status, this.detail] = [
      "where", "fate", "sort", "search", "status", "detail",
    ].map(find);
    rows.wheres.forEach((name, code) => this.where.append(new Option(visible(name), code)));
    rows.fates.forEach((name, code) => name && this.fate.append(new Option(visible(name), code)));
    this.where.closest("label").hidden = rows.wheres.length < 2;
    this.fate.closest("label").hidden = rows.fates.length < 2;
    const fill = (option, row) => {
      const title = element("bdi", "", rows.title(row) || "(empty)");
      option.append(element("span", "title", title), element("span", "what", rowTold(rows, row)));
    };
    this.list = new List(find("list"), fill, (row) => this.look(row));
    for (const select of [this.where, this.fate, this.sort]) select.addEventListener("change", () => this.filter());
    let typed;
    this.search.addEventListener("input", () => {
      clearTimeout(typed);
      typed = setTimeout(() => this.filter(), 150);
    });
    find("list").addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.detail.focus();
    });
    this.detail.addEventListener("keydown", (event) => {
      if (event.key === "Escape") find("list").focus();
    });
    root.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  }

  async filter() {
    const mine = ++this.asked;
    const wanted = {
      where: Number(this.where.value),
      fate: Number(this.fate.value),
      order: this.sort.value,
      text: this.search.value,
    };
    const found = await this.rows.select(
      wanted,
      () => mine === this.asked,
      (share) => { this.status.textContent = `searching, ${Math.round(100 * share)}%`; },
    );
    if (found === null || mine !== this.asked) return;
    this.status.textContent = `${counted(found.length)} of ${counted(this.rows.count)} rows`;
    this.list.show(found);
  }

  /** Show a row's prompt with its answers, one column a round. */
  async look(row) {
    if (row === this.looked) return;
    this.looked = row;
    if (row === null) {
      this.detail.replaceChildren(element("p", "empty", "No row has all of that."));
      return;
    }
    const [id, said, truth, columns] = await this.rows.content(row);
    if (row !== this.looked) return;
    const place = this.rows.wheres[this.rows.where[row]];
    const here = columns.every((column) => column[1] === place) ? null : place;
    const side = element("div", "columns", ...columns.map((column) => columnBox(column, here)));
    side.tabIndex = 0;
    side.setAttribute("role", "group");
    side.setAttribute("aria-label", "Answers side by side");
    const trace = element("p", "kicker", element("code", "", `${this.root.dataset.trace} `, element("span", "id", id)));
    this.detail.replaceChildren(...said.map(([role, text]) => saidBy(role, text)));
    if (truth !== null) this.detail.append(saidBy("ground truth", truth));
    if (columns.length > 2) this.detail.append(element("p", "kicker", `${columns.length} side by side`));
    this.detail.append(side);
    if (this.root.dataset.trace) this.detail.append(trace);
    this.detail.scrollTop = 0;
    const now = side.querySelector(".here");
    if (now) side.scrollLeft = now.offsetLeft - side.offsetLeft;
  }

  /** Prepare searching while nobody asks for anything. */
  async warm() {
    for (const piece of this.rows.rowsOf.keys()) {
      await this.rows.prepare(piece);
      await new Promise((resolve) => (window.requestIdleCallback ?? setTimeout)(resolve));
    }
    this.root.dataset.warm = "yes";
  }
}

async function start() {
  const root = document.getElementById("browser");
  if (!root) return;
  if (typeof DecompressionStream === "undefined") {
    document.getElementById("no-browser").textContent =
      "This web browser is too old to open the packed rows; those of 2023 and later do." + root.dataset.instead;
    return;
  }
  const browser = new Browser(root, new Rows(await unpack("index")));
  document.getElementById("no-browser").remove();
  root.hidden = false;
  await browser.filter();
  root.dataset.ready = "yes";
  await browser.warm();
}

start();
