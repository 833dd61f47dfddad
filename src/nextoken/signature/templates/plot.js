// Surprisal and entropy along the text, on a canvas: bars where there is room for one per token, else for each pixel the
// mean (dark) and the greatest (light) of its tokens.

const plotBox = at("plot");
const canvas = at("curve");
const EDGE = { left: 30, right: 6, top: 18, bottom: 18 };
let extent = [0, 0];
let isZoomed = false;

const plotWidth = () => plotBox.clientWidth - EDGE.left - EDGE.right;
const xOf = (row) => EDGE.left + ((row - extent[0]) / Math.max(1, extent[1] - extent[0])) * plotWidth();

function setExtent() {
  const { begin, end } = told.texts[shownText];
  extent = [begin, end];
  if (!isZoomed || begin === end) return;
  const [first, last] = rowsInView();
  extent = [Math.max(begin, first), Math.min(end, Math.max(last, first + 20))];
}

function drawPlot() {
  setExtent();
  const width = plotBox.clientWidth;
  const height = plotBox.clientHeight;
  const dense = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * dense);
  canvas.height = Math.round(height * dense);
  const pen = canvas.getContext("2d");
  pen.scale(dense, dense);
  pen.clearRect(0, 0, width, height);
  const style = getComputedStyle(document.documentElement);
  const ink = (name) => style.getPropertyValue(name).trim();
  const logprob = column("logprob");
  const entropy = column("entropy");
  const [begin, end] = extent;
  if (begin === end) return moveWindow();

  let greatest = 8;
  const text = told.texts[shownText];
  for (let row = text.begin; row < text.end; row++) if (-logprob[row] > greatest) greatest = -logprob[row];
  const ceiling = Math.min(20, Math.ceil(greatest / 4) * 4);
  const floor = height - EDGE.bottom;
  const yOf = (nats) => floor - (Math.min(nats, ceiling) / ceiling) * (floor - EDGE.top);

  pen.font = "11px " + ink("--sans");
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (let nats = 0; nats <= ceiling; nats += 4) {
    pen.fillStyle = ink("--line");
    pen.fillRect(EDGE.left, Math.round(yOf(nats)), plotWidth(), 1);
    pen.fillStyle = ink("--quiet");
    pen.fillText(String(nats), EDGE.left - 8, yOf(nats));
  }
  pen.textBaseline = "alphabetic";
  pen.textAlign = "left";
  pen.fillText("nats", 0, 9);
  const step = pleasant((end - begin) / Math.max(2, plotWidth() / 110));
  const origin = position[begin] - begin;
  for (let row = Math.ceil((begin + origin) / step) * step - origin; row < end; row += step) {
    pen.textAlign = row === begin ? "left" : "center";
    if (xOf(row) < width - 24) pen.fillText(count(row + origin), xOf(row), height - 3);
  }

  const columns = Math.min(Math.floor(plotWidth()), end - begin);
  const pitch = plotWidth() / columns;
  const gap = pitch > 4 ? Math.min(2, pitch * 0.2) : 0;
  const curve = new Path2D();
  const lower = column("entropy_lower");
  const upper = column("entropy_upper");
  let isDown = false;
  for (let i = 0; i < columns; i++) {
    const first = begin + Math.floor((i * (end - begin)) / columns);
    const last = begin + Math.floor(((i + 1) * (end - begin)) / columns);
    let most = 0, sum = 0, known = 0, spread = 0, spreadKnown = 0, low = 0, high = 0, bounded = 0;
    for (let row = first; row < last; row++) {
      const surprisal = Math.min(-logprob[row], ceiling);
      if (surprisal === surprisal) { known++; sum += surprisal; if (surprisal > most) most = surprisal; }
      if (entropy[row] === entropy[row]) { spreadKnown++; spread += entropy[row]; }
      if (upper && upper[row] === upper[row]) { bounded++; low += lower[row]; high += upper[row]; }
    }
    const x = EDGE.left + i * pitch;
    if (bounded && !spreadKnown) {
      pen.fillStyle = ink("--entropy-band");
      pen.fillRect(x, yOf(high / bounded), pitch, Math.max(1, yOf(low / bounded) - yOf(high / bounded)));
    }
    if (known) {
      pen.fillStyle = ink(last - first > 1 ? "--surprisal-light" : "--surprisal");
      pen.fillRect(x, yOf(most), Math.max(0.5, pitch - gap), floor - yOf(most));
      if (last - first > 1) {
        pen.fillStyle = ink("--surprisal");
        pen.fillRect(x, yOf(sum / known), pitch, floor - yOf(sum / known));
      }
    }
    if (spreadKnown) {
      const y = yOf(spread / spreadKnown);
      if (isDown) curve.lineTo(x + pitch / 2, y);
      else curve.moveTo(x + pitch / 2, y);
      isDown = true;
    } else isDown = false;
  }
  pen.strokeStyle = ink("--entropy");
  pen.lineWidth = columns < end - begin ? 1 : 1.5;
  pen.lineJoin = "round";
  pen.stroke(curve);
  moveWindow();
}

// 1, 2 or 5 times a power of ten, at least as great.
function pleasant(size) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, size)));
  return [1, 2, 5, 10].map((times) => times * power).find((step) => step >= size);
}

// Shade what the window shows of the text.
function moveWindow() {
  const { begin, end } = told.texts[shownText];
  const shade = at("window");
  if (begin === end || isZoomed) return (shade.hidden = true);
  const [first, last] = rowsInView();
  shade.hidden = first <= begin && last >= end;
  shade.style.left = xOf(first) + "px";
  shade.style.width = Math.max(2, xOf(last) - xOf(first)) + "px";
}

function moveCursor(row) {
  const cursor = at("cursor");
  cursor.hidden = row === null || row < extent[0] || row >= extent[1];
  if (!cursor.hidden) cursor.style.left = xOf(row + 0.5) + "px";
}

// The row under a place of the plot: of several in one pixel, the most surprising.
function rowUnder(x) {
  const [begin, end] = extent;
  if (begin === end) return null;
  const span = end - begin;
  const columns = Math.min(Math.floor(plotWidth()), span);
  const i = Math.min(columns - 1, Math.max(0, Math.floor(((x - EDGE.left) / plotWidth()) * columns)));
  let best = begin + Math.floor((i * span) / columns);
  const last = begin + Math.floor(((i + 1) * span) / columns);
  for (let row = best + 1; row < last; row++) if (number("logprob", row) < number("logprob", best)) best = row;
  return best;
}
