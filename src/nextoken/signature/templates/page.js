// Everything together: what is shown at first, and what pointer and keys do.

const FIGURES = [
  ["bits_per_byte", "bits per byte", figure],
  ["perplexity", "perplexity", figure],
  ["mean_entropy", "mean entropy", entropyFigure, "nats"],
  ["top1", "top-1", percent],
  ["top10", "top-10", percent],
  ["mean_kl", "mean KL", figure, "nats"],
  ["against_bits_per_byte", "bits per byte, second", figure],
  ["tokens", "tokens", count],
  ["bytes", "bytes", count],
];
const GROUPS = [
  ["The token that came", ["logprob", "rank", "mass_above"]],
  ["Two models", ["kl", "reverse_kl", "js", "cross_entropy", "against_logprob"]],
  ["The distribution", ["entropy", "entropy_lower", "entropy_upper", "varentropy", "top1_prob", "margin", "rest_mass"]],
];
let keptRow = null;
let pointed = null;
let current = null;

function start() {
  const { metadata } = told;
  at("source").append(
    make("strong", {}, metadata.model),
    ` · ${count(metadata.vocab_size)} tokens in its vocabulary · ${metadata.dtype}`,
    metadata.against ? ` · beside ${metadata.against}` : "",
  );
  for (const [index, text] of told.texts.entries()) {
    const bits = text.figures.bits_per_byte;
    at("text-select").append(new Option(bits === null ? text.name : `${text.name} · ${figure(bits)} bits/byte`, index));
  }
  at("text-choice").hidden = told.texts.length < 2;
  at("text-select").value = told.first_text;
  colourOptions();
  making();
  notices();
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  if (!told.texts.length) return at("text").append(make("p", { class: "quiet" }, "There is no text in this signature."));
  openText(told.first_text);
  listen();
}

function colourOptions() {
  const select = at("colour-select");
  const given = Object.keys(told.columns);
  const grouped = new Set(GROUPS.flatMap(([, names]) => names));
  for (const [label, names] of [...GROUPS, ["More", given.filter((name) => !grouped.has(name))]]) {
    const group = make("optgroup", { label });
    for (const name of names) if (told.columns[name]) group.append(new Option(name, name));
    if (group.children.length) select.append(group);
  }
  select.value = colour;
}

function openText(index) {
  drop();
  current = null;
  showText(index);
  const { figures, name } = told.texts[index];
  if (told.texts.length > 1) at("text").setAttribute("data-name", name);
  at("figures").replaceChildren(
    ...FIGURES.filter(([key]) => key in figures).map(([key, label, write, unit]) =>
      make(
        "div",
        { "data-figure": key },
        make("dt", {}, label),
        make("dd", {}, write(figures[key], figures), unit && write(figures[key], figures) !== "unknown" ? make("small", {}, " " + unit) : null),
      ),
    ),
  );
  surprises(index);
  legend();
  drawPlot();
}

// Where the model is partial, between its bounds.
function entropyFigure(value, figures) {
  if (value !== null || !("mean_entropy_upper" in figures)) return figure(value);
  return `${figure(figures.mean_entropy_lower)} to ${figure(figures.mean_entropy_upper)}`;
}

function surprises(index) {
  const { begin, end } = told.texts[index];
  const logprob = column("logprob");
  const rows = [];
  // The ten least probable, by one pass: a list this short is cheaper to keep in order than the text is to sort.
  for (let row = begin; row < end; row++) {
    if (Number.isNaN(logprob[row]) || (rows.length === 10 && logprob[row] >= logprob[rows[9]])) continue;
    let i = rows.length;
    while (i && logprob[rows[i - 1]] > logprob[row]) i--;
    rows.splice(i, 0, row);
    if (rows.length > 10) rows.pop();
  }
  const list = make("ol", {});
  for (const row of rows) {
    const button = make("button", { type: "button", class: "surprise" }, make("span", { class: "words" }, before(row, begin), spelled(told.labels[ownLabel[row]])));
    button.append(make("span", { class: "share" }, figure(-logprob[row])));
    button.row = row;
    list.append(make("li", {}, button));
  }
  at("surprises").replaceChildren(
    make("h2", {}, "Most surprising", make("small", {}, " nats")),
    rows.length ? list : make("p", { class: "quiet" }, "None is known."),
  );
}

// A few words that a token follows.
function before(row, begin) {
  let text = "";
  for (let i = row - 1; i >= begin && text.length < 16; i--) text = told.pieces[piece[i]] + text;
  const line = harmless([...text].slice(-16).join("")).replace(/\s/g, " ");
  return line ? make("span", { class: "context" }, line) : null;
}

function making() {
  const { metadata } = told;
  const versions = Object.entries(metadata.versions).map(([name, version]) => `${name} ${version}`);
  const lines = [
    ["model", metadata.model],
    ["weights", metadata.model_digest || "unknown"],
    ["vocabulary", metadata.tokenizer_digest],
    ["second model", metadata.against],
    ["its weights", metadata.against_digest],
    ["context", metadata.context_length === null ? "unlimited" : `${count(metadata.context_length)} tokens`],
    ["before each text", metadata.bos_text === null ? "nothing" : metadata.bos_text],
    ["made with", versions.join(", ")],
  ];
  at("making").append(
    make("h2", {}, "Made with"),
    make("dl", {}, ...lines.filter(([, value]) => value).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])),
  );
}

function notices() {
  const say = (...text) => at("notices").append(make("p", { class: "notice" }, ...text));
  if (told.metadata.is_partial)
    say(
      make("strong", {}, "Partial: "),
      `the model told only its ${told.metadata.top} most probable tokens. Numbers are bounds or unknown where that is not enough; `,
      "entropy is given as the least and the greatest that what is known allows, and tokens of unknown colour are hatched.",
    );
  if (told.left_out)
    say(`The first ${count(told.rows)} tokens; ${count(told.left_out)} more are left out here. to_html(path) makes a page of them all.`);
  const replaced = told.texts.reduce((sum, text) => sum + text.replaced, 0);
  if (replaced) say(`${count(replaced)} bytes were not UTF-8 and were read as U+FFFD.`);
}

function legend() {
  const { scale, about } = told.columns[colour];
  const strip = make("span", { class: "strip", "aria-hidden": "true" });
  for (let i = 0; i < told.bins; i++) strip.append(make("i", { class: "b" + i }));
  const ticks = make("span", { class: "ticks", "aria-hidden": "true" });
  for (const value of scale.ticks) {
    const tick = make("span", {}, figure(value).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, ""));
    tick.style.left = fraction(scale, value) * 100 + "%";
    ticks.append(tick);
  }
  at("legend").replaceChildren(strip, ticks, make("span", { class: "unit quiet" }, scale.unit));
  at("legend").setAttribute("aria-label", `Scale of ${colour}: from ${figure(scale.low)}, no colour, to ${figure(scale.high)} ${scale.unit}, strongest`);
  at("about").textContent = about + (scale.is_fitted ? "; scale fitted to these texts" : "");
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  at("theme").textContent = theme === "dark" ? "Light" : "Dark";
  at("theme").setAttribute("aria-label", `Switch to ${theme === "dark" ? "light" : "dark"} colours`);
}

// Show the card of the token under the pointer: beside the token, or beside a place of the plot.
function point(row, box) {
  if (pointed !== null && pointed !== row) tokenIfFilled(pointed)?.classList.remove("pointed");
  pointed = row;
  moveCursor(row ?? keptRow);
  if (row === null) return hideCard();
  const token = tokenIfFilled(row);
  token?.classList.add("pointed");
  showCard(row, box || token.getClientRects()[0], token === null || !token.matches(":hover, :focus"));
}

function keep(row) {
  drop();
  keptRow = row;
  tokenAt(row).classList.add("kept");
  const close = make("button", { type: "button", class: "button small close", "aria-label": "Drop this card" }, "×");
  close.addEventListener("click", drop);
  at("kept").replaceChildren(close, ...card(row, { whole: true }));
  at("kept").hidden = false;
  hideCard();
  moveCursor(row);
}

function drop() {
  if (keptRow !== null) tokenIfFilled(keptRow)?.classList.remove("kept");
  keptRow = null;
  at("kept").hidden = true;
  moveCursor(null);
}

// Make a token the one that keys move from; only it can be reached by Tab.
function setCurrent(row) {
  if (current !== null) tokenIfFilled(current)?.removeAttribute("tabindex");
  current = row;
  const token = tokenAt(row);
  token.tabIndex = 0;
  token.setAttribute("role", "button");
  token.setAttribute("aria-label", sentence(row));
  return token;
}

function goTo(row) {
  const token = setCurrent(row);
  const box = token.getBoundingClientRect();
  if (box.top < at("plot").getBoundingClientRect().bottom + 8 || box.bottom > window.innerHeight - 8) scrollToRow(row);
  token.focus({ preventScroll: true });
}

// The token above or below: nearest in x on the next line that has any.
function beyond(row, step) {
  const { begin, end } = told.texts[shownText];
  const here = tokenAt(row).getClientRects()[0];
  const middle = here.left + here.width / 2;
  let best = row;
  let nearest = Infinity;
  let line = null;
  for (let next = row + step; next >= begin && next < end; next += step) {
    const box = tokenAt(next).getClientRects()[0];
    if (!box || Math.abs(box.top - here.top) < here.height / 2) continue;
    if (line === null) line = box.top;
    if (Math.abs(box.top - line) > here.height / 2) break;
    const away = Math.max(box.left - middle, middle - box.right, 0);
    if (away < nearest) [best, nearest] = [next, away];
  }
  return best;
}

function onKey(event) {
  if (event.key === "Escape") {
    point(null);
    drop();
    return;
  }
  const row = event.target.row;
  if (row === undefined || !event.target.classList.contains("t") || event.altKey || event.ctrlKey || event.metaKey) return;
  const { begin, end } = told.texts[shownText];
  const moves = {
    ArrowRight: () => Math.min(end - 1, row + 1),
    ArrowLeft: () => Math.max(begin, row - 1),
    ArrowDown: () => beyond(row, 1),
    ArrowUp: () => beyond(row, -1),
    Home: () => begin,
    End: () => end - 1,
  };
  if (event.key in moves) goTo(moves[event.key]());
  else if (event.key === "Enter" || event.key === " ") keptRow === row ? drop() : keep(row);
  else return;
  event.preventDefault();
}

function listen() {
  const tokenOf = (target) => (target instanceof Element ? target.closest(".t") : null);
  textBox.addEventListener("pointerover", (event) => {
    const token = tokenOf(event.target);
    if (!token || event.pointerType === "touch") return;
    const boxes = [...token.getClientRects()];
    point(token.row, boxes.find((box) => event.clientY >= box.top && event.clientY <= box.bottom) || boxes[0]);
  });
  textBox.addEventListener("pointerleave", () => point(null));
  textBox.addEventListener("click", (event) => {
    const token = tokenOf(event.target);
    if (!token || String(getSelection())) return;
    setCurrent(token.row);
    if (token.row === keptRow) drop();
    else keep(token.row);
  });
  textBox.addEventListener("focusin", (event) => {
    const token = tokenOf(event.target);
    if (!token || !token.matches(":focus-visible")) return;
    point(token.row);
    at("spoken").textContent = sentence(token.row);
  });
  textBox.addEventListener("focusout", () => point(null));
  document.addEventListener("keydown", onKey);
  at("surprises").addEventListener("click", (event) => {
    const button = event.target.closest(".surprise");
    if (!button) return;
    goTo(button.row);
    keep(button.row);
  });

  plotBox.addEventListener("pointermove", (event) => {
    if (event.target.closest(".key")) return point(null);
    const box = plotBox.getBoundingClientRect();
    const row = rowUnder(event.clientX - box.left);
    if (row !== null && row !== pointed) point(row, new DOMRect(event.clientX, box.top, 1, box.height));
  });
  plotBox.addEventListener("pointerleave", () => point(null));
  plotBox.addEventListener("click", (event) => {
    if (event.target.closest(".key")) return;
    const row = rowUnder(event.clientX - plotBox.getBoundingClientRect().left);
    if (row === null) return;
    point(null);
    scrollToRow(row);
    keep(row);
  });

  at("text-select").addEventListener("change", (event) => {
    point(null);
    openText(Number(event.target.value));
    ready();
  });
  at("colour-select").addEventListener("change", (event) => {
    recolour(event.target.value);
    legend();
  });
  at("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    drawPlot();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => {
    setTheme(event.matches ? "dark" : "light");
    drawPlot();
  });
  at("extent").addEventListener("click", () => {
    isZoomed = !isZoomed;
    at("extent").setAttribute("aria-pressed", String(isZoomed));
    at("extent").textContent = isZoomed ? "whole text" : "zoom to view";
    drawPlot();
  });
  let isWaiting = false;
  const later = (draw) => () => {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      draw();
    });
  };
  addEventListener("scroll", later(() => (isZoomed ? drawPlot() : moveWindow())), { passive: true });
  new ResizeObserver(later(() => {
    // In a narrow window only the plot stays at the top, and what stands above it scrolls away.
    at("bar").style.top = innerWidth > 900 ? "" : `${6 - plotBox.offsetTop}px`;
    drawPlot();
  })).observe(plotBox);
  ready();
}

// The first token can be reached by Tab as soon as there is one.
function ready() {
  const { begin, end } = told.texts[shownText];
  if (begin < end) setCurrent(begin);
}

start();
