/* What needs a language model: `sagsae view` serves the page with one, and prints an address with a key. The key moves
   from the address into this tab's memory. Without one (a double click, another web server) nothing is asked. */
const liveKey = takeKey();
const live = { asked: null, prompt: "", text: "", dial: 1, mode: "clamp", at: "all", tokens: 64, temperature: 0 };

function takeKey() {
  if (!location.protocol.startsWith("http")) return null;
  const query = new URLSearchParams(location.search), given = query.get("key");
  try {
    if (given) {
      sessionStorage.setItem("sagsae key", given);
      query.delete("key");
      history.replaceState(null, "", `${location.pathname}${query.size ? `?${query}` : ""}${location.hash}`);
    }
    return given ?? sessionStorage.getItem("sagsae key");
  } catch { return given; } // no storage: the key lasts until the page is left
}

/* GET /api/about, once: { live, missing, most_new_tokens, … }, or null where the page is not served by sagsae view. */
function aboutLive() {
  live.asked ??= !liveKey ? Promise.resolve(null) : fetch("api/about").then(answer => answer.ok ? answer.json() : null).catch(() => null);
  return live.asked;
}

/* Asks a question. Rejects with a sentence. */
async function ask(what, question, signal) {
  const answer = await fetch(`api/${what}`, { method: "POST", signal, headers: { "Content-Type": "application/json", Authorization: `Bearer ${liveKey}` }, body: JSON.stringify(question) })
    .catch(error => { throw error.name === "AbortError" ? error : new Error("The server does not answer. Is sagsae view still running?"); });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Error(sentenceOf(said.error ?? `the server answers ${answer.status}`));
}
const sentenceOf = text => `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

/* The lines of a streamed answer, as they come. */
async function* linesOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

/* Tokens that the index does not know, with their text. */
function learn(list = []) {
  for (const [id, text, special] of list) {
    if (words.at.has(id)) continue;
    words.at.set(id, words.texts.length);
    words.texts.push(text);
    if (special) learned.add(id);
  }
}
const learned = new Set(); // special ones
const specialToken = id => isSpecial(id) || learned.has(id);

/* Tokens one after another: characters that tokens cut are put together. */
class TokenText {
  constructor() { this.pending = []; this.element = make("span", { class: "window", dir: "auto" }); }
  add(id, attributes = {}) {
    const word = wordOf(id), cut = Array.isArray(word) || this.pending.length > 0;
    let inside;
    if (word !== null && cut) {
      const bytes = Array.isArray(word) ? bytesOf(word[0]) : [...new TextEncoder().encode(word)];
      ({ nodes: inside, pending: this.pending } = pieces(this.pending, bytes));
    } else { this.pending = []; inside = word === null ? [make("i", { class: "number" }, `#${id} `)] : glyphs(word); }
    const node = make(attributes.tag ?? "span", { title: spoken(id), ...attributes, tag: null, class: [attributes.class, specialToken(id) ? "special" : ""].filter(Boolean).join(" ") || null }, inside);
    this.element.append(node);
    return node;
  }
}

function serveHint(what) {
  return make("p", {}, `${what} needs the language model: `, make("code", {}, `sagsae view RUN --sae ${facts.sae}`), ", then open the address that it prints.");
}
const field = (name, control) => make("label", {}, make("span", {}, name), control);
const choice = (value, entries, attributes) => { const found = make("select", attributes, entries.map(([name, text]) => make("option", { value: name }, text))); found.value = value; return found; };

/* ---- steering ---- */
function livePanel(card) {
  const panel = make("section", { class: "card live", id: "live" }, make("h2", {}, "Steer", make("small", {}, "what the model writes while this latent is held")));
  aboutLive().then(about => {
    if (!panel.isConnected) return;
    if (!about) panel.append(serveHint("Steering"));
    else if (!about.live) panel.append(make("p", {}, sentenceOf(`Steering is not possible: ${about.missing}`)));
    else panel.append(...steering(card, about));
  });
  return panel;
}

function steering(card, about) {
  const state = make("p", { class: "note state", role: "status" }), result = make("div", { class: "steered" });
  const prompt = make("textarea", { name: "prompt", rows: 2, maxlength: about.most_characters, placeholder: "A text for the model to continue", spellcheck: "false" });
  const output = make("output", { for: "dial-slider" });
  const slider = make("input", { type: "range", id: "dial-slider", name: "dial", min: -2, max: 2, step: 0.25 });
  const mode = choice(live.mode, [["clamp", "hold at"], ["add", "add"], ["ablate", "remove"]], { name: "mode" });
  const at = choice(live.at, [["all", "all positions"], ["last", "last of the prompt"]], { name: "at" });
  const tokens = make("input", { type: "number", name: "tokens", min: 1, max: about.most_new_tokens, value: live.tokens });
  const temperature = make("input", { type: "number", name: "temperature", min: 0, max: 2, step: 0.1, value: live.temperature });
  const button = make("button", { type: "submit", class: "plain" }, "Write"), form = make("form", { class: "ask" },
    field("Prompt", prompt),
    make("div", { class: "knobs" }, field("Dial", make("span", { class: "slide" }, make("span", { class: "sign minus", "aria-hidden": "true" }, "−"), slider, make("span", { class: "sign plus", "aria-hidden": "true" }, "+"), output)), field("Mode", mode), field("Where", at), field("New tokens", tokens), field("Temperature", temperature), button));
  prompt.value = live.prompt || "In the morning";
  slider.value = live.dial;
  let running = null, ran = false;
  const show = () => {
    output.value = signed(Number(slider.value));
    slider.disabled = mode.value === "ablate";
    slider.setAttribute("aria-valuetext", `${output.value} dial units`);
  };
  const stop = () => { running?.abort(); running = null; };
  const run = async () => {
    stop();
    const mine = running = new AbortController();
    Object.assign(live, { prompt: prompt.value, dial: Number(slider.value), mode: mode.value, at: at.value, tokens: tokens.valueAsNumber, temperature: temperature.valueAsNumber });
    const question = { latent: card.latent, prompt: live.prompt, mode: live.mode, at: live.at, new_tokens: live.tokens, temperature: live.temperature, ...(live.mode === "ablate" ? {} : { dial: live.dial }) };
    ran = true;
    button.textContent = "Stop";
    try {
      state.textContent = "Waiting for the model …";
      await showSteered(await ask("steer", question, mine.signal), live, result, state);
    } catch (error) {
      if (running !== mine) return;
      state.textContent = error.name === "AbortError" ? "Stopped." : error.message;
    }
    if (running === mine) { running = null; button.textContent = "Write"; }
  };
  form.addEventListener("submit", event => {
    event.preventDefault();
    if (running) { stop(); button.textContent = "Write"; state.textContent = "Stopped."; } else run();
  });
  slider.addEventListener("input", show);
  for (const each of [slider, mode, at]) each.addEventListener("change", () => { show(); if (ran) run(); });
  prompt.addEventListener("keydown", event => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); run(); } });
  stopListening = stop; // another page is opened
  show();
  return [form, state, result];
}

/* Shows the lines of an answer as they come. */
async function showSteered(answer, asked, result, state) {
  const side = asked.mode === "ablate" || !asked.dial ? "" : sideOf(asked.dial);
  const texts = [new TokenText(), new TokenText()], names = ["Unsteered", asked.mode === "ablate" ? "Removed" : `${asked.mode === "add" ? "Added" : "Held at"} ${signed(asked.dial)}`];
  const columns = names.map((name, n) => make("section", { class: n ? side : null }, make("h3", {}, name), make("p", { class: "written" }, make("span", { class: "before" }, asked.prompt), texts[n].element)));
  const table = make("div", { class: "next" });
  result.replaceChildren(make("div", { class: "columns" }, columns), table);
  let head = "", steps = 0, whole = false;
  for await (const line of linesOf(answer)) {
    learn(line.words);
    if (line.error) throw new Error(sentenceOf(line.error));
    if (line.unit) head = `${asked.mode === "ablate" ? "" : `Dial ${signed(asked.dial)} is ${signed(line.value)}; a unit is ${digits(line.unit)}, ${fixed(line.unit_rms)} of the layer’s rms. `}${line.changed ? "" : "No position of this prompt is one that the run trains on, so it is not changed. "}`;
    if (line.next) table.replaceChildren(nextTable(line, names[1]));
    if (line.new) {
      line.new.forEach((id, n) => { if (id !== null) texts[n].add(id, { class: n && id !== line.new[0] ? "other" : null }); });
      state.textContent = `${head}${plural(++steps, "token")} …`;
    }
    if (line.steps) {
      whole = true;
      columns.forEach((column, n) => { if (line.ended[n]) column.append(make("p", { class: "note" }, "The text ends here.")); });
      state.textContent = `${head}${plural(line.steps, "token")} in ${fixed(line.seconds, 1)} s.`;
    }
  }
  if (!whole) throw new Error("The answer ended in the middle. Is sagsae view still running?");
}

function nextTable({ next, kl }, name) {
  const shift = (before, after) => { const by = Math.log(after / before); return Number.isFinite(by) ? `× ${fixed(after / before, after / before < 10 ? 2 : 0)}` : "–"; };
  const rows = next.map(([id, before, after]) => make("tr", {}, make("td", {}, chip(id, after === before ? undefined : after - before)), make("td", { class: "num" }, percent(before)), make("td", { class: "num" }, percent(after)), make("td", { class: "num" }, shift(before, after))));
  return make("table", {}, make("caption", {}, `The next token. KL ${fixed(kl, 4)} nats`), make("thead", {}, make("tr", {}, ["Token", "Unsteered", name, "Ratio"].map((text, n) => make("th", { scope: "col", class: n ? "num" : null }, text)))), make("tbody", {}, rows));
}

/* ---- a text ---- */
async function textPage(params, fresh) {
  const about = await aboutLive();
  if (fresh()) return;
  const text = params.get("q") ?? "";
  document.title = `Text – ${facts.sae}`;
  const head = make("div", { class: "top" }, make("h1", { tabindex: -1 }, "Latents of a text"), make("nav", { "aria-label": "Latents" }, make("a", { class: "plain", href: listAddress }, "Table")));
  if (!about?.live) {
    $("#main").replaceChildren(head, about ? make("p", { class: "empty" }, sentenceOf(`A text cannot be encoded: ${about.missing}`)) : serveHint("Encoding a text"));
    return;
  }
  const input = make("textarea", { name: "text", rows: 3, maxlength: about.most_characters, placeholder: "A text", spellcheck: "false" });
  const state = make("p", { class: "note state", role: "status" }), result = make("div", { class: "encoded" });
  const form = make("form", { class: "ask" }, field("Text", input), make("button", { type: "submit", class: "plain" }, "Encode"));
  input.value = text;
  const open = () => { if (input.value.trim()) location.hash = `#/text?${new URLSearchParams({ q: input.value })}`; };
  form.addEventListener("submit", event => { event.preventDefault(); open(); });
  input.addEventListener("keydown", event => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); open(); } });
  $("#main").replaceChildren(head, form, state, result);
  if (!text) { input.focus(); return; }
  const stopping = new AbortController();
  stopListening = () => stopping.abort();
  state.textContent = "Waiting for the model …";
  ask("encode", { text, top: 128 }, stopping.signal).then(answer => answer.json()).then(found => {
    state.textContent = "";
    result.replaceChildren(...encodedText(found));
  }).catch(error => { if (error.name !== "AbortError") state.textContent = error.message; });
}

/* Latents by energy, and the text in the colours of one of them or with what fires on one token. */
function encodedText(found) {
  learn(found.words);
  const latents = new Map(), at = found.tokens.map(() => []);
  for (const [position, latent, value] of found.firings) {
    if (!latents.has(latent)) latents.set(latent, { latent, energy: 0, values: new Map() });
    const each = latents.get(latent);
    each.energy += value * value;
    each.values.set(position, value);
    at[position].push([latent, value]);
  }
  const order = [...latents.values()].sort((a, b) => b.energy - a.energy), whole = order.reduce((sum, each) => sum + each.energy, 0);
  const text = new TokenText(), counted = found.counted.filter(Boolean).length;
  const nodes = found.tokens.map((id, n) => text.add(id, { tag: "button", type: "button", class: found.counted[n] ? null : "uncounted", tabindex: -1, "aria-pressed": "false", "aria-label": `token ${n}: ${spoken(id)}, ${plural(found.active[n], "latent")}`, onclick: () => pick(n) }));
  const side = make("section", { class: "card here", "aria-live": "polite" }), rows = new Map();
  const colour = latent => {
    const values = latents.get(latent).values, largest = Math.max(...[...values.values()].map(Math.abs));
    nodes.forEach((node, n) => {
      const value = values.get(n) ?? 0;
      node.classList.toggle("plus", value > 0);
      node.classList.toggle("minus", value < 0);
      node.style.setProperty("--a", value ? (0.14 + 0.86 * Math.abs(value) / largest).toFixed(2) : "0");
      node.title = value ? `${signed(value)}, ${spoken(found.tokens[n])}` : spoken(found.tokens[n]);
    });
    for (const [each, row] of rows) row.setAttribute("aria-pressed", String(each === latent));
    caption.replaceChildren("Coloured by ", make("a", { href: `#/latent/${latent}` }, `latent ${latent}`), ". Choose a token to see what fires on it.");
  };
  const caption = make("p", { class: "note" });
  const pick = n => {
    nodes.forEach((node, each) => { node.setAttribute("aria-pressed", String(each === n)); node.tabIndex = each === n ? 0 : -1; });
    const top = Math.max(...at[n].map(([, value]) => Math.abs(value)));
    side.replaceChildren(make("h2", {}, "On ", chip(found.tokens[n]), make("small", {}, found.counted[n] ? `${plural(found.active[n], "latent")}, the strongest first` : "the run does not train on this position")),
      make("ol", { class: "fires" }, at[n].slice(0, 32).map(([latent, value]) => make("li", { class: sideOf(value) }, make("a", { href: `#/latent/${latent}` }, String(latent)), make("span", { class: "track" }, make("i", { width: `${50 * Math.abs(value) / top}%` })), make("span", { class: "value" }, signed(value)), make("span", { class: "chips" }, listedOf(latent, value).slice(0, 2).map(id => chip(id, facts.sides === 2 ? value : undefined)))))));
  };
  const list = make("section", { class: "card" }, make("h2", {}, "Strongest on this text", make("small", {}, "share of the energy")), make("ol", { class: "fires all" }, order.slice(0, 24).map(({ latent, energy, values }) => {
    const all = [...values.values()], button = make("button", { type: "button", class: "plain", "aria-pressed": "false", onclick: () => colour(latent) }, "colour");
    rows.set(latent, button);
    return make("li", {}, make("a", { href: `#/latent/${latent}` }, String(latent)), make("span", { class: "num" }, percent(energy / whole)),
      make("span", { class: "ends" }, make("span", { class: "sign minus" }, Math.min(...all) < 0 ? signed(Math.min(...all)) : ""), make("span", { class: "sign plus" }, Math.max(...all) > 0 ? signed(Math.max(...all)) : "")),
      make("span", { class: "chips" }, miniature(latent)), button);
  })));
  const l0 = counted ? found.active.reduce((sum, n) => sum + n, 0) / counted : 0;
  text.element.addEventListener("keydown", event => {
    const to = nodes.indexOf(event.target) + ({ ArrowRight: 1, ArrowLeft: -1 }[event.key] ?? 0);
    if (nodes[to] && nodes[to] !== event.target) { event.preventDefault(); pick(to); nodes[to].focus(); }
  });
  const box = make("section", { class: "card tokens" }, text.element, caption);
  if (order.length) { colour(order[0].latent); pick([...order[0].values].reduce((a, b) => Math.abs(b[1]) > Math.abs(a[1]) ? b : a)[0]); }
  return [make("p", { class: "note" }, `${plural(found.tokens.length, "token")}, ${counted} of which count; L0 ${digits(l0)}.`), box, make("div", { class: "two" }, list, side)];
}

/* A link to it where the page is live. */
aboutLive().then(about => { if (about?.live) $("#jump").before(make("a", { class: "to-text", href: "#/text" }, "Encode a text")); });
