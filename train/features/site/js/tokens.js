/* Tokens as DOM. What cannot be seen has a sign; the character itself stays in the text, so that a copy gives it back.
   Signs are drawn by the style sheet (attr(data-sign)) and are no part of the text. */
const $ = (selector, from = document) => from.querySelector(selector);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element[name] = value;
    else if (name.startsWith("--") || name === "top" || name === "height" || name === "width" && tag !== "canvas") element.style.setProperty(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));
  return element;
}

const SIGNS = { "\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "⍽", "\u200b": "∅" };
const SPOKEN = { " ": "space", "\n": "line break", "\t": "tab", "\r": "carriage return", "\u00a0": "no-break space", "\u200b": "zero-width space" };
const UNSEEN = /^[\p{C}\p{Z}\p{Variation_Selector}\u034f\u115f\u1160\u3164\uffa0]$/u;
const WIDE = /^[\t\u00a0\u2000-\u200a\u202f\u205f\u3000]$/; // has a width that a sign can be drawn into
const code = character => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

function glyphs(text, inChip = false) {
  const nodes = [];
  let plain = "";
  for (const character of text) {
    const unseen = character === " " ? inChip : UNSEEN.test(character);
    if (!unseen) { plain += character; continue; }
    if (plain) nodes.push(plain);
    plain = "";
    const sign = character === " " ? "·" : SIGNS[character] ?? `⟨${code(character)}⟩`;
    const over = character === " " || WIDE.test(character), breaks = /[\n\r\u0085\u2028\u2029\v\f]/.test(character);
    const own = over || breaks && !inChip ? character : make("span", { class: "raw" }, character);
    nodes.push(make("i", { class: over ? "sign over" : "sign", "data-sign": sign, title: code(character) }, own));
  }
  if (plain) nodes.push(plain);
  return nodes;
}
const hexSign = bytes => make("i", { class: "sign bytes", "data-sign": `⟨${bytes.map(byte => byte.toString(16).padStart(2, "0")).join(" ")}⟩`, title: "bytes of a character that is cut" });
const bytesOf = hex => hex.match(/../g).map(byte => parseInt(byte, 16));
const wordOf = id => words.at.has(id) ? words.texts[words.at.get(id)] : null;
const rowsOf = id => words.at.has(id) ? words.rows[words.at.get(id)] : 0;
const isSpecial = id => words.at.has(id) && words.special[words.at.get(id)] === 1;

/* The characters and cut bytes in `bytes`, which follow `pending`, the bytes of a character that earlier tokens began.
   Returns nodes, the text and the bytes that are pending now. */
function pieces(pending, bytes) {
  const data = [...pending, ...bytes], nodes = [], own = pending.length;
  let at = 0, cut = [];
  const flush = () => { if (cut.length) nodes.push(hexSign(cut)); cut = []; };
  while (at < data.length) {
    const first = data[at], size = first < 0x80 ? 1 : first >= 0xc2 && first < 0xe0 ? 2 : first >= 0xe0 && first < 0xf0 ? 3 : first >= 0xf0 && first < 0xf5 ? 4 : 0;
    const rest = data.slice(at + 1, at + size);
    const sound = size && rest.every(byte => (byte & 0xc0) === 0x80);
    if (sound && at + size > data.length) {
      cut.push(...data.slice(Math.max(at, own)));
      flush();
      return { nodes, pending: data.slice(at) };
    }
    if (!sound) { if (at >= own) cut.push(first); at++; continue; }
    if (at < own) cut.push(...data.slice(own, at + size));
    flush();
    nodes.push(...glyphs(new TextDecoder().decode(new Uint8Array(data.slice(at, at + size)))));
    at += size;
  }
  flush();
  return { nodes, pending: [] };
}

/* A token alone. */
function tokenNodes(id, inChip) {
  const word = wordOf(id);
  if (word === null) return [make("i", { class: "number" }, `#${id}`)];
  if (Array.isArray(word)) return pieces([], bytesOf(word[0])).nodes;
  return word === "" ? [make("i", { class: "sign", "data-sign": "∅" })] : glyphs(word, inChip);
}
function spoken(id) {
  const word = wordOf(id);
  if (word === null) return `number ${id}`;
  if (Array.isArray(word)) return `bytes ${word[0]}`;
  return [...word].map(character => SPOKEN[character] ? ` ${SPOKEN[character]} ` : UNSEEN.test(character) ? ` ${code(character)} ` : character).join("").trim() || "empty";
}
/* A link that searches for a token. `still`: not in the order of the Tab key. */
function chip(id, sign, { still = false, found = false } = {}) {
  const side = sign === undefined ? "" : sign < 0 ? " minus" : " plus";
  return make("a", {
    class: `tok${side}${isSpecial(id) ? " special" : ""}${found ? " found" : ""}`, href: `#/?token=${id}`, dir: "auto",
    "aria-label": `token ${spoken(id)}`, title: `${spoken(id)} (token ${id}): search`, tabindex: still ? -1 : null,
  }, tokenNodes(id, true));
}

/* A context with the latent's values behind its tokens. */
function contextText(example, largest) {
  const nodes = [];
  let pending = [];
  example.tokens.forEach((id, n) => {
    const word = wordOf(id), value = n === example.peak ? example.value : example.values[n];
    let inside;
    if (Array.isArray(word)) ({ nodes: inside, pending } = pieces(pending, bytesOf(word[0])));
    else { pending = []; inside = word === null ? [make("i", { class: "number" }, `#${id} `)] : glyphs(word); }
    const strength = Math.min(1, Math.abs(value) / (largest[value < 0 ? 0 : 1] || 1));
    const classes = [value < 0 ? "minus" : value > 0 ? "plus" : "", n === example.peak ? "peak" : "", isSpecial(id) ? "special" : ""].filter(Boolean).join(" ");
    const about = value ? `${signed(value)}, ${spoken(id)}` : spoken(id);
    nodes.push(make(value ? "mark" : "span", { class: classes || null, title: about, "--a": value ? (0.14 + 0.86 * strength).toFixed(2) : null }, inside));
  });
  return nodes;
}

/* ---- numbers ---- */
const count = n => n.toLocaleString("en");
const digits = x => x === 0 ? "0" : Math.abs(x) >= 1000 ? count(Math.round(Math.abs(x))) : Math.abs(x) < 0.001 ? Math.abs(x).toExponential(1) : String(Number(Math.abs(x).toPrecision(3)));
const minused = x => (x < 0 ? "−" : "") + digits(x);
const signed = x => (x < 0 ? "−" : x > 0 ? "+" : "") + digits(x);
const fixed = (x, n = 2) => (x < 0 ? "−" : "") + Math.abs(x).toFixed(n);
const percent = x => x === 0 ? "0 %" : x < 0.001 ? "< 0.1 %" : x < 0.1 ? `${(100 * x).toFixed(1)} %` : `${Math.round(100 * x)} %`;
const signOf = sign => sign < 0 ? "−" : "+";
const sideOf = sign => sign < 0 ? "minus" : "plus";
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
