"use strict";
// What the page was given, its numbers as typed arrays, and how they are written and coloured.

const told = JSON.parse(document.getElementById("signature").textContent);
const at = (id) => document.getElementById(id);

function decoded(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes.buffer;
}

const broken = new Set(told.broken);
const piece = new Uint32Array(decoded(told.piece));
const tokenId = new Int32Array(decoded(told.token_id));
const ownLabel = new Uint32Array(decoded(told.label));
const position = new Int32Array(decoded(told.position));
const byteStart = new Float64Array(decoded(told.byte_start));
const byteSize = new Uint32Array(decoded(told.byte_size));
const topBegin = new Uint32Array(decoded(told.top_begin));
const topLabel = new Uint32Array(decoded(told.top_label));
const topLogprob = new Float32Array(decoded(told.top_logprob));

const kept = new Map();
// A column's numbers, decoded when first asked for; undefined where the signature has no such column.
function column(name) {
  if (!kept.has(name) && told.columns[name]) kept.set(name, new Float32Array(decoded(told.columns[name].data)));
  return kept.get(name);
}

const number = (name, row) => (column(name) ? column(name)[row] : NaN);

function shaped(scale, value) {
  if (scale.shape === "linear") return value;
  const size = Math.abs(value);
  return Math.sign(value) * (scale.shape === "sqrt" ? Math.sqrt(size) : Math.log1p(size));
}

// From 0 (no colour) to 1 (strongest) as in scale.py; NaN where unknown.
function fraction(scale, value) {
  const low = shaped(scale, scale.low);
  return Math.min(1, Math.max(0, (shaped(scale, value) - low) / (shaped(scale, scale.high) - low)));
}

function bin(scale, value) {
  const placed = fraction(scale, value);
  return Number.isNaN(placed) ? "unknown" : Math.floor(placed * (told.bins - 1) + 0.5);
}

// Numbers as text, four significant digits; what is unknown says so.
function figure(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "unknown";
  if (value === "inf" || value === Infinity) return "∞";
  if (value === "-inf" || value === -Infinity) return "−∞";
  const size = Math.abs(value);
  let text;
  if (Number.isInteger(value)) text = size.toLocaleString("en");
  else if (size >= 1e6 || size < 1e-4) text = size.toExponential(3);
  else if (size >= 1000) text = size.toLocaleString("en", { maximumFractionDigits: 0 });
  else text = size.toPrecision(4);
  return (value < 0 ? "−" : "") + text;
}

function percent(share) {
  if (share === null || Number.isNaN(share)) return "unknown";
  const hundredths = share * 100;
  if (hundredths !== 0 && hundredths < 0.001) return hundredths.toExponential(2) + " %";
  if (hundredths >= 99.95) return hundredths >= 99.9995 ? "100 %" : hundredths.toFixed(3) + " %";
  return (hundredths >= 10 ? hundredths.toFixed(1) : hundredths.toPrecision(3)) + " %";
}

const count = (value) => (value === null ? "unknown" : value.toLocaleString("en"));

// An element with properties and children; text is always text, never markup.
function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name === "class") element.className = value;
    else if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
