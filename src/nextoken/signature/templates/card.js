// The card of a token: what came, how probable it was, and what else could have come.

const BESIDE = ["entropy", "varentropy", "mass_above", "margin", "kl", "against_logprob"];

function card(row, { whole }) {
  const logprob = number("logprob", row);
  const rank = number("rank", row);
  const rest = number("rest_mass", row);
  return [
    make(
      "header",
      {},
      spelled(told.labels[ownLabel[row]]),
      make(
        "span",
        { class: "quiet place" },
        `token ${count(position[row])} · bytes ${count(byteStart[row])}–${count(byteStart[row] + byteSize[row])} · id ${tokenId[row]}`,
      ),
    ),
    make(
      "dl",
      { class: "main" },
      pair("probability", Number.isNaN(logprob) ? upTo(row) : percent(Math.exp(logprob))),
      pair("logprob", figure(logprob), "nats"),
      pair("rank", figure(rank), Number.isNaN(rank) ? "" : `of ${count(told.metadata.vocab_size)}`),
    ),
    alternatives(row, logprob, rank, rest),
    make("dl", { class: "rest" }, ...beside(row, whole)),
  ];
}

const pair = (name, value, unit) =>
  make(
    "div",
    {},
    make("dt", {}, name),
    make("dd", { "data-column": name }, value, unit && value !== "unknown" ? make("small", {}, " " + unit) : null),
  );

// A token that a partial model did not tell is within the rest of the mass, and, where the list is known to hold the most
// probable tokens (only then is top1_prob known), no more probable than the last of it.
function upTo(row) {
  const last = topBegin[row + 1] - 1;
  const rest = number("rest_mass", row);
  const most = last < topBegin[row] || Number.isNaN(number("top1_prob", row)) ? rest : Math.min(rest, Math.exp(topLogprob[last]));
  return Number.isNaN(most) ? "unknown" : "≤ " + percent(most);
}

function beside(row, whole) {
  const names = Object.keys(told.columns).filter((name) => (whole ? !["logprob", "rank"].includes(name) : BESIDE.includes(name)));
  return names.map((name) => {
    if (name === "entropy" && Number.isNaN(number(name, row)) && column("entropy_upper"))
      return pair(name, `${figure(number("entropy_lower", row))} to ${figure(number("entropy_upper", row))}`, "nats");
    if (told.metadata.is_partial && Number.isNaN(number(name, row)) && !whole) return null;
    return pair(name, figure(number(name, row)), told.columns[name].scale.unit);
  });
}

// The k most probable tokens with bars as long as their probability, the one that came among them or after them, the rest.
function alternatives(row, logprob, rank, rest) {
  const list = make("ol", { class: "top" });
  let came = false;
  for (let i = topBegin[row]; i < topBegin[row + 1]; i++) {
    const isIt = !came && topLabel[i] === ownLabel[row];
    came = came || isIt;
    list.append(bar(spelled(told.labels[topLabel[i]]), Math.exp(topLogprob[i]), isIt ? "came" : ""));
  }
  if (!came && !Number.isNaN(logprob)) {
    list.append(make("li", { class: "gap", "aria-hidden": "true" }, "⋮"));
    list.append(bar(spelled(told.labels[ownLabel[row]]), Math.exp(logprob), "came"));
  }
  if (!Number.isNaN(rest)) list.append(bar(make("span", { class: "word all-else" }, "all else"), rest, "else"));
  return list;
}

function bar(word, share, kind) {
  const full = make("span", { class: "full" });
  full.style.width = Math.min(100, share * 100) + "%";
  return make(
    "li",
    { class: kind },
    word,
    make("span", { class: "track", "aria-hidden": "true" }, full),
    make("span", { class: "share" }, percent(share)),
  );
}

// What is read aloud of a token.
function sentence(row) {
  const logprob = number("logprob", row);
  const parts = [`${spoken(told.labels[ownLabel[row]])}, token ${position[row]}`];
  parts.push(Number.isNaN(logprob) ? "probability unknown" : `probability ${percent(Math.exp(logprob))}`);
  if (!Number.isNaN(number("rank", row))) parts.push(`rank ${number("rank", row)}`);
  if (topBegin[row + 1] > topBegin[row])
    parts.push(`most probable ${spoken(told.labels[topLabel[topBegin[row]]])}, ${percent(Math.exp(topLogprob[topBegin[row]]))}`);
  return parts.join("; ");
}

const floating = at("card");
let floatingRow = null;

function showCard(row, box, isPlot) {
  if (floatingRow !== row) {
    floating.replaceChildren(...card(row, { whole: false }));
    floatingRow = row;
  }
  floating.hidden = false;
  // Below the token where there is room, else above it, else beside it; always within the window.
  const { offsetWidth: width, offsetHeight: height } = floating;
  const right = document.documentElement.clientWidth - 8;
  const floor = window.innerHeight - 8;
  const ceiling = isPlot ? 8 : Math.max(8, plotBox.getBoundingClientRect().bottom);
  let left = Math.min(Math.max(8, box.left - 12), right - width);
  let top = box.bottom + 8;
  if (top + height > floor) {
    top = box.top - height - 8;
    if (top < ceiling) {
      top = Math.max(8, Math.min(box.top - 40, floor - height));
      left = box.right + 12 + width <= right ? box.right + 12 : Math.max(8, box.left - 12 - width);
    }
  }
  floating.style.left = left + "px";
  floating.style.top = top + "px";
}

function hideCard() {
  floating.hidden = true;
  floatingRow = null;
}
