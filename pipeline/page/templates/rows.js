// The rows of the page: unpacking, filtering, sorting and searching them. Nothing here touches what is shown.
// Long work is done in slices, so that the page answers while it goes on.

const SLICE_MS = 10;

const pause = () => new Promise((resolve) => setTimeout(resolve, 0));

/** A block of the page: base64 of gzip of JSON. */
async function unpack(name) {
  const text = document.querySelector(`script[data-block="${name}"]`).textContent.trim();
  let bytes;
  if (Uint8Array.fromBase64) bytes = Uint8Array.fromBase64(text);
  else {
    const binary = atob(text);
    bytes = new Uint8Array(binary.length);
    for (let at = 0; at < binary.length; at++) bytes[at] = binary.charCodeAt(at);
  }
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

/** All rows: columns of the index, and the prompts' pieces, opened when they are needed. */
class Rows {
  constructor(index) {
    Object.assign(this, { wheres: index.wheres, fates: index.fates, titles: index.titles });
    this.prompt = Int32Array.from(index.prompt);
    this.where = Int16Array.from(index.where);
    this.fate = Int16Array.from(index.fate);
    this.margin = Float64Array.from(index.margin, (value) => value ?? NaN);
    this.reward = Float64Array.from(index.reward, (value) => value ?? NaN);
    this.count = this.prompt.length;
    this.promptsAPiece = index.prompts_a_piece;
    this.pieces = new Map();
    this.orders = new Map();
    this.hay = new Array(this.count);
    this.rowsOf = new Map();
    for (let row = 0; row < this.count; row++) {
      const piece = this.pieceOf(row);
      if (!this.rowsOf.has(piece)) this.rowsOf.set(piece, []);
      this.rowsOf.get(piece).push(row);
    }
  }

  pieceOf(row) {
    return Math.floor(this.prompt[row] / this.promptsAPiece);
  }

  title(row) {
    return this.titles[this.prompt[row]];
  }

  /** A row's prompt with all its columns. The pieces opened last are kept. */
  async content(row) {
    const prompts = await this.open(this.pieceOf(row));
    return prompts[this.prompt[row] % this.promptsAPiece];
  }

  async open(piece) {
    const found = this.pieces.get(piece) ?? unpack(piece);
    this.pieces.delete(piece);
    this.pieces.set(piece, found);
    if (this.pieces.size > 8) this.pieces.delete(this.pieces.keys().next().value);
    return found;
  }

  /** The texts of a piece's rows in small letters, for searching: the prompt's, and the answers' of that place. */
  async prepare(piece) {
    const rows = this.rowsOf.get(piece) ?? [];
    if (!rows.length || this.hay[rows[0]] !== undefined) return;
    const prompts = await unpack(piece);
    for (const row of rows) {
      const [id, said, truth, columns] = prompts[this.prompt[row] % this.promptsAPiece];
      const here = columns.filter((column) => column[1] === this.wheres[this.where[row]]);
      const texts = [id, ...said.map(([, text]) => text), truth ?? ""];
      for (const column of here) texts.push(column[3], ...column[5].map((answer) => answer[0]));
      this.hay[row] = texts.join("\n").toLowerCase();
    }
  }

  /** Row numbers in an order; the ends of figures that are not known come last. */
  order(name) {
    if (!this.orders.has(name)) this.orders.set(name, this.sorted(name));
    return this.orders.get(name);
  }

  sorted(name) {
    const numbers = Array.from({ length: this.count }, (_, row) => row);
    const [column, direction] = name.split(" ");
    if (column === "table") return numbers;
    if (column === "prompt") {
      const keys = this.titles.map((title) => title.toLowerCase());
      const key = (row) => keys[this.prompt[row]];
      return numbers.sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : a - b));
    }
    const sign = direction === "down" ? -1 : 1;
    const values = this[column].map((value) => (Number.isNaN(value) ? Infinity : sign * value));
    return numbers.sort((a, b) => (values[a] === values[b] ? a - b : values[a] - values[b]));
  }

  /**
   * The numbers of the rows that are wanted, in the order asked for; null if `goesOn` said stop.
   * `told` hears how far a search is, from 0 to 1.
   */
  async select({ where, fate, text, order }, goesOn, told) {
    const wanted = new Uint8Array(this.count);
    const needle = text.trim().toLowerCase();
    for (let row = 0; row < this.count; row++) {
      wanted[row] = (where < 0 || this.where[row] === where) && (fate < 0 || this.fate[row] === fate);
    }
    let since = performance.now();
    if (needle) {
      let done = 0;
      for (const [piece, rows] of this.rowsOf) {
        await this.prepare(piece);
        for (const row of rows) wanted[row] &&= this.hay[row].includes(needle);
        done += 1;
        if (performance.now() - since > SLICE_MS) {
          told(done / this.rowsOf.size);
          await pause();
          since = performance.now();
          if (!goesOn()) return null;
        }
      }
    }
    return this.order(order).filter((row) => wanted[row]);
  }
}
