// The text as tokens. Paragraphs are blocks and hold chunks; a chunk is plain text until it comes near the window, and
// then an element per token: so that a long text costs what is looked at.

const CHUNK = 200;
const textBox = at("text");
let shownText = 0;
let colour = told.colour;
let chunks = [];
const nearing = new IntersectionObserver(
  (entries) => entries.forEach((entry) => entry.isIntersecting && fill(entry.target)),
  { rootMargin: "900px 0px" },
);

function showText(index) {
  shownText = index;
  const { begin, end, prefix, suffix } = told.texts[index];
  nearing.disconnect();
  chunks = [];
  const blocks = [];
  if (prefix) blocks.push(unscored(prefix, "Not predicted: nothing stands before it"));
  let block = null;
  let words = [];
  let first = begin;
  let size = 0;
  const close = (row) => {
    if (!words.length) return;
    const chunk = make("span", { class: "chunk" }, harmless(words.join("")));
    Object.assign(chunk, { begin: first, end: row, isFull: false });
    chunks.push(chunk);
    block.append(chunk);
    words = [];
    first = row;
  };
  for (let row = begin; row < end; row++) {
    if (!block) blocks.push((block = make("div", { class: "block", dir: "auto" })));
    const text = told.pieces[piece[row]];
    words.push(text);
    const breaks = text.endsWith("\n") && !broken.has(piece[row]);
    if (words.length === CHUNK) close(row + 1);
    size += text.length;
    if (!breaks && row + 1 < end) continue;
    close(row + 1);
    // What a block will need, for as long as it is far from the window and not laid out.
    block.style.containIntrinsicBlockSize = `auto ${Math.ceil(size / 90) * 1.85}em`;
    [block, size] = [null, 0];
  }
  if (suffix) blocks.push(unscored(suffix, "Not predicted: the tokenizer drops it"));
  if (begin === end) blocks.push(make("p", { class: "quiet" }, "This text has no predicted token."));
  textBox.replaceChildren(...blocks);
  chunks.forEach((chunk) => nearing.observe(chunk));
  paintScope();
}

function unscored(text, reason) {
  const span = make("span", { class: "unscored", title: reason });
  dress(span, text, false);
  return make("div", { class: "block" }, span);
}

function fill(chunk) {
  if (chunk.isFull) return;
  chunk.isFull = true;
  nearing.unobserve(chunk);
  const tokens = [];
  for (let row = chunk.begin; row < chunk.end; row++) {
    const token = document.createElement("span");
    token.row = row;
    token.id = "t" + row;
    dress(token, told.pieces[piece[row]], broken.has(piece[row]));
    paint(token);
    tokens.push(token);
  }
  chunk.replaceChildren(...tokens);
}

function paint(token) {
  token.className = "t b" + bin(told.columns[colour].scale, column(colour)[token.row]);
}

function paintScope() {
  document.body.classList.toggle("diverging", told.columns[colour].scale.diverging);
}

function recolour(name) {
  colour = name;
  paintScope();
  for (const chunk of chunks) if (chunk.isFull) for (const token of chunk.children) paint(token);
}

function chunkOf(row) {
  let low = 0;
  let high = chunks.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (chunks[middle].end <= row) low = middle + 1;
    else high = middle;
  }
  return chunks[low];
}

// The element of a row, or null where its chunk is still plain text.
const tokenIfFilled = (row) => {
  const chunk = chunkOf(row);
  return chunk && chunk.isFull ? chunk.children[row - chunk.begin] : null;
};

function tokenAt(row) {
  fill(chunkOf(row));
  return tokenIfFilled(row);
}

function scrollToRow(row) {
  const token = tokenAt(row);
  token.scrollIntoView({ block: "center" });
  // Chunks that come into view on the way may shift the text a little: fill them, then settle.
  requestAnimationFrame(() => requestAnimationFrame(() => token.scrollIntoView({ block: "center" })));
  return token;
}

// First and last row within the window, below the bar that stays at its top.
function rowsInView() {
  const top = at("plot").getBoundingClientRect().bottom;
  const bottom = window.innerHeight;
  const before = (items, isBefore) => {
    let low = 0;
    let high = items.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (isBefore(items[middle].getBoundingClientRect())) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  const edge = (isBefore) => {
    const chunk = chunks[before(chunks, isBefore)];
    if (!chunk) return told.texts[shownText].end;
    return chunk.isFull ? chunk.begin + before(chunk.children, isBefore) : chunk.begin;
  };
  const first = edge((box) => box.bottom <= top);
  return [first, Math.max(first, edge((box) => box.top < bottom))];
}
