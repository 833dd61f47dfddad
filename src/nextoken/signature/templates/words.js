// Tokens as a person can see them: spaces, line breaks and characters without a shape get a mark, and nothing is obeyed.

const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu;
const PLAIN = /^(?! *$)[^\u0000-\u001f\u007f-\u00a0\u00ad\u0300-\u036f\u061c\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]*$/u;

function codeName(character) {
  const code = character.codePointAt(0);
  if (code === 0x0d) return "\\r";
  if (code < 0x80) return "\\x" + code.toString(16).padStart(2, "0");
  return "U+" + code.toString(16).toUpperCase().padStart(4, "0");
}

const mark = (kind, text) => make("i", { class: kind }, text);

// Put a token's text into an element as it stands in the text: line breaks break, blanks are marked if they are all.
function dress(element, text, isBroken) {
  if (isBroken) return element.append(mark("code", text));
  if (PLAIN.test(text)) return element.append(text);
  if (text === "") return element.append(mark("part", ""));
  const blank = /^[ \u00a0]+$/.test(text);
  for (const part of text.split(/(\n|\t)/)) {
    if (part === "\n") element.append(mark("newline", ""), "\n");
    else if (part === "\t") element.append(mark("tab", "\t"));
    else if (blank) for (const space of part) element.append(mark("space", space));
    else coded(element, part);
  }
}

function coded(element, text) {
  let from = 0;
  for (const found of text.matchAll(HIDDEN)) {
    if (found.index > from) element.append(text.slice(from, found.index));
    element.append(mark("code", codeName(found[0])));
    from = found.index + found[0].length;
  }
  if (from < text.length) element.append(text.slice(from));
}

// A token on its own, every blank marked: for cards and lists.
function spelled(label) {
  const word = make("span", { class: "word" });
  if (label === "") word.append(mark("blank", "(nothing)"));
  for (const part of label.split(/([ \n\t\u00a0])/)) {
    if (part === " ") word.append(mark("blank", "␣"));
    else if (part === "\n") word.append(mark("blank", "⏎"));
    else if (part === "\t") word.append(mark("blank", "⇥"));
    else if (part === "\u00a0") word.append(mark("blank", "⍽"));
    else if (part) coded(word, part);
  }
  return word;
}

// The same as one plain string, for what is read aloud.
function spoken(label) {
  const named = label
    .replace(HIDDEN, (found) => ` ${codeName(found)} `)
    .replace(/\n/g, " line break ")
    .replace(/\t/g, " tab ");
  return named.trim() === "" ? (named === "" ? "nothing" : "space") : named.trim();
}

// A stretch of text that is not yet made into tokens: nothing in it may act on its surroundings.
const harmless = (text) => text.replace(HIDDEN, codeName);
