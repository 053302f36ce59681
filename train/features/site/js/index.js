/* The table of all latents. Only the rows in view are in the DOM. */
const BOTH = 0.1; // share of the energy on the weaker side from which a latent counts as two-sided
const TALLEST = 12e6; // pixels that a browser scrolls without trouble
const scrolled = new Map(); // where the table of an address was
let listed = null; // latents in the order of the last table

function columnsOfTable() {
  const two = facts.sides === 2;
  const tokens = (latent, sign, state) => make("span", { class: "chips" }, listedOf(latent, sign).map(id => chip(id, two ? sign : undefined, { still: true, found: state.matches?.has(id) })));
  const f1 = (latent, sign) => columns.firings[poleOf(latent, sign)] ? fixed(f1Of(latent, sign)) : "–";
  return [
    { name: "latent", title: "Latent", key: latent => latent, up: true, cell: latent => make("a", { href: `#/latent/${latent}` }, String(latent)) },
    { name: "firings", title: "Firings", number: true, key: firingsOf, cell: (latent, state) => state.on ? onToken(state.on.get(latent), firingsOf(latent)) : count(firingsOf(latent)) },
    two && { name: "balance", title: "Energy − | +", key: latent => shareOf(latent, 1) - (firingsOf(latent) ? 0 : 1), cell: balance },
    two && { name: "minus", title: "Tokens of −", wide: true, key: null, cell: (latent, state) => tokens(latent, -1, state) },
    { name: "plus", title: two ? "Tokens of +" : "Tokens", wide: true, key: null, cell: (latent, state) => tokens(latent, 1, state) },
    two && { name: "f1minus", title: "F1 −", number: true, hint: "of the few tokens that best tell when the pole fires", key: latent => f1Of(latent, -1), cell: latent => f1(latent, -1) },
    { name: two ? "f1plus" : "name", title: two ? "F1 +" : "F1", number: true, hint: "of the few tokens that best tell when the pole fires", key: latent => f1Of(latent, 1), cell: latent => f1(latent, 1) },
    two && { name: "energy", title: "Weaker side", number: true, hint: "share of the energy on the weaker side", key: weakerShare, cell: latent => percent(weakerShare(latent)) },
    { name: "opposite", title: "Most opposite", number: true, up: true, hint: "latent with the most opposite direction, and the cosine", key: latent => oppositeOf(latent) < 0 ? 2 : cosineOf(latent),
      cell: latent => oppositeOf(latent) < 0 ? "–" : make("a", { class: isPair(latent) ? "pair" : null, href: `#/compare/${latent}/${oppositeOf(latent)}`, tabindex: -1, title: `compare with latent ${oppositeOf(latent)}` }, `${oppositeOf(latent)} `, make("small", {}, fixed(cosineOf(latent)))) },
    facts.dials && { name: "dial", title: "Dial slope", number: true, hint: "nats for a unit of dial; ✓: it exceeds the control directions", key: latent => facts.dials[latent]?.[0] ?? -1e9, cell: latent => facts.dials[latent] ? `${fixed(facts.dials[latent][0])}${facts.dials[latent][1] ? " ✓" : ""}` : "–" },
  ].filter(Boolean);
}
/* Firings on the token that is searched for, and their share of all firings. */
function onToken(some, all) {
  return make("span", { title: `${plural(some, "firing")} on the token, of ${count(all)}` }, `${count(some)} `, make("small", {}, percent(some / all)));
}
const HIDDEN_KEYS = { named: weakerName, name: strongerName };

/* The part of the address behind #/? as numbers and words, and back. */
function stateOf(params) {
  const number = (name, usual) => /^\d{1,10}$/.test(params.get(name) ?? "") ? Number(params.get(name)) : usual;
  const state = { both: facts.sides === 2 && params.get("both") === "1", pairs: params.get("pairs") === "1", dial: Boolean(facts.dials) && params.get("dial") === "1", least: number("least", SEEN), token: number("token", null), word: params.get("word") ?? "", sort: params.get("sort") ?? "", dir: params.get("dir") };
  const usual = state.token !== null ? "on" : facts.sides === 2 ? "energy" : "name";
  const known = [...columnsOfTable().filter(column => column.key).map(column => column.name), ...Object.keys(HIDDEN_KEYS), ...state.token !== null ? ["on"] : []];
  if (!known.includes(state.sort)) state.sort = usual;
  const rising = columnsOfTable().find(column => column.name === state.sort)?.up;
  state.dir = ["up", "down"].includes(state.dir) ? state.dir : rising ? "up" : "down";
  return state;
}
function addressOf(state) {
  const params = new URLSearchParams();
  if (state.both) params.set("both", "1");
  if (state.pairs) params.set("pairs", "1");
  if (state.dial) params.set("dial", "1");
  if (state.least !== SEEN) params.set("least", state.least);
  params.set("sort", state.sort);
  params.set("dir", state.dir);
  if (state.token !== null) params.set("token", state.token);
  if (state.word) params.set("word", state.word);
  return `#/?${params}`;
}

/* Latents that pass the filters, in order. */
function passing(state) {
  const found = [];
  const { tokens } = columns, poles = columns.firings.length;
  const named = latent => {
    for (let at = latent * facts.sides; at < (latent + 1) * facts.sides; at++) for (let n = at; n < tokens.length; n += poles) if (tokens[n] && state.matches.has(tokens[n] - 1)) return true;
    return false;
  };
  for (let latent = 0; latent < facts.d_sae; latent++) {
    if (firingsOf(latent) < state.least) continue;
    if (state.both && weakerShare(latent) < BOTH) continue;
    if (state.pairs && !isPair(latent)) continue;
    if (state.dial && !facts.dials[latent]) continue;
    if (state.on ? !state.on.has(latent) : state.word && !named(latent)) continue;
    found.push(latent);
  }
  const column = columnsOfTable().find(each => each.name === state.sort);
  const key = state.sort === "on" ? latent => state.on.get(latent) ?? 0 : column?.key ?? HIDDEN_KEYS[state.sort];
  const values = new Map(found.map(latent => [latent, key(latent)])), turn = state.dir === "up" ? 1 : -1;
  return found.sort((a, b) => turn * (values.get(a) - values.get(b)) || a - b);
}

/* What the filters by token and by word need: `on`, firings on the token by latent; `matches`, the tokens that are meant. */
async function searched(state) {
  if (state.token !== null) {
    const script = state.token % facts.token_scripts, { arrays } = await load(`data/tokens/${String(script).padStart(2, "0")}.js`);
    const starts = offsets(arrays.lengths), at = arrays.token.indexOf(state.token);
    state.on = new Map();
    state.matches = new Set([state.token]);
    state.poles = at < 0 ? 0 : arrays.all[at];
    for (let n = at < 0 ? 0 : starts[at]; at >= 0 && n < starts[at + 1]; n++) {
      const latent = Math.floor(arrays.pole[n] / facts.sides);
      state.on.set(latent, (state.on.get(latent) ?? 0) + arrays.count[n]);
    }
    state.kept = at < 0 ? 0 : arrays.lengths[at];
  } else if (state.word) {
    const part = state.word.toLowerCase();
    state.matches = new Set([...words.ids].filter((id, at) => typeof words.texts[at] === "string" && words.texts[at].toLowerCase().includes(part)));
  }
  return state;
}

async function index(params, fresh) {
  const state = stateOf(params);
  if (state.token !== null || state.word) await searched(state);
  if (fresh()) return;
  const rows = listed = passing(state);
  document.title = `Latents – ${facts.sae}`;
  const plain = !state.both && !state.pairs && !state.dial && state.token === null && !state.word && state.least === SEEN;
  const heading = make("h1", { tabindex: -1 }, rows.length === facts.d_sae ? `All ${plural(facts.d_sae, "latent")}` : `${count(rows.length)} of ${plural(facts.d_sae, "latent")}`);
  const table = tableOf(rows, state);
  $("#main").replaceChildren(heading, subject(state), plain && !params.get("sort") ? overview() : "", filters(state, rows), rows.length ? table.element : make("p", { class: "empty" }, "No latent passes these filters. ", make("a", { href: "#/?least=0" }, "Show all")));
  table.start();
  announce(heading.textContent);
}

/* The line below the heading. */
function subject(state) {
  if (state.token !== null) {
    const cut = state.kept < state.poles ? ` Shown are the ${count(state.kept)} that it tells most about; pairs.parquet has all.` : "";
    return make("p", { class: "note" }, "They fire on ", chip(state.token), ` (token ${state.token}, read ${count(rowsOf(state.token))} times). ${plural(state.poles, "pole")} with at least 3 firings on it.${cut}`);
  }
  if (state.word) {
    const tokens = [...state.matches], shown = tokens.slice(0, 24);
    return make("p", { class: "note" }, `${plural(tokens.length, "token")} with “${state.word}”: `, shown.map(id => chip(id)), tokens.length > shown.length ? " …" : "", " The table has the latents with one of them among their first tokens; click a token for all that fire on it.");
  }
  return make("p", { class: "note wide" }, `Counted on ${count(facts.rows)} tokens of ${facts.store || "the store"}, L0 ${digits(facts.l0)}.`, facts.sides === 2 ? " A latent has two poles: values below and above zero. Energy is the sum of squared values." : " This architecture has no values below zero: a latent has one pole.", facts.lens ? "" : " There is no logit lens.");
}

function filters(state, rows) {
  const go = changes => { location.hash = addressOf({ ...state, ...changes }); };
  const box = (name, text, hint) => make("label", { title: hint }, make("input", { type: "checkbox", name, checked: state[name], onchange: event => go({ [name]: event.target.checked }) }), text);
  const least = make("input", { type: "number", name: "least", min: 0, value: state.least, inputmode: "numeric", onchange: event => go({ least: Math.max(0, Math.floor(Number(event.target.value) || 0)) }) });
  const choice = make("select", { name: "sort", onchange: event => go({ sort: event.target.value, dir: null }) },
    [...state.token !== null ? [["on", "firings on the token"]] : [], ...columnsOfTable().filter(column => column.key).map(column => [column.name, column.title.toLowerCase()]), ...facts.sides === 2 ? [["named", "both poles named"], ["name", "one pole named"]] : []].map(([value, text]) => make("option", { value, selected: value === state.sort }, text)));
  return make("form", { class: "filters", onsubmit: event => event.preventDefault(), "aria-label": "Filters" },
    facts.sides === 2 && box("both", "both poles", "at least 10 % of the energy on the weaker side"),
    box("pairs", "antipodal pairs", "most opposite direction with a cosine below −0.9"),
    facts.dials && box("dial", "dial tested", "sagsae dial has tested them"),
    make("label", {}, "at least ", least, " firings"),
    make("label", {}, "by ", choice),
    make("button", { type: "button", class: "plain", title: state.dir === "up" ? "rising; turn round" : "falling; turn round", "aria-label": state.dir === "up" ? "rising order, turn round" : "falling order, turn round", onclick: () => go({ dir: state.dir === "up" ? "down" : "up" }) }, state.dir === "up" ? "↑" : "↓"),
    make("button", { type: "button", class: "plain", disabled: !rows.length, onclick: () => { location.hash = `#/latent/${rows[Math.floor(Math.random() * rows.length)]}`; } }, "Any one"),
    state.token !== null || state.word || state.both || state.pairs || state.dial || state.least !== SEEN ? make("a", { class: "plain", href: "#/" }, "Clear") : null);
}

function tableOf(rows, state) {
  const shown = columnsOfTable(), here = location.hash, phone = matchMedia("(max-width: 860px)");
  const heads = make("div", { class: "heads", role: "row", "aria-rowindex": 1 }, shown.map(column => {
    const sorted = column.name === state.sort ? (state.dir === "up" ? "ascending" : "descending") : null;
    const next = sorted ? (state.dir === "up" ? "down" : "up") : column.up ? "up" : "down";
    const text = column.hint ? { title: column.hint } : {};
    return make("span", { role: "columnheader", class: `c-${column.name}${column.number ? " num" : ""}`, "aria-sort": sorted },
      column.key ? make("button", { type: "button", ...text, onclick: () => { location.hash = addressOf({ ...state, sort: column.name, dir: next }); } }, column.title) : make("span", text, column.title));
  }));
  const body = make("div", { class: "rows", role: "rowgroup" });
  const element = make("div", { class: `grid${facts.sides === 1 ? " single" : facts.dials ? " dialed" : ""}`, role: "table", "aria-label": "Latents", "aria-rowcount": rows.length + 1, "aria-colcount": shown.length, tabindex: 0 }, make("div", { role: "rowgroup", class: "head" }, heads), body);
  let first = -1, last = -1;
  const height = () => phone.matches ? (facts.sides === 2 ? 116 : 84) : 40;
  const view = () => phone.matches ? [Math.max(0, -body.getBoundingClientRect().top), innerHeight] : [element.scrollTop, element.clientHeight];
  const geometry = () => { const whole = rows.length * height(), tall = Math.min(whole, TALLEST); return { tall, factor: tall > 0 ? Math.max(1, (whole - view()[1]) / Math.max(1, tall - view()[1])) : 1 }; };
  const row = at => make("div", { class: "row", role: "row", "aria-rowindex": at + 2, "data-latent": rows[at], onclick: event => { if (!event.target.closest("a") && !String(getSelection())) location.hash = `#/latent/${rows[at]}`; } },
    shown.map(column => make("span", { role: "cell", class: `c-${column.name}${column.number ? " num" : ""}` }, column.cell(rows[at], state))));
  function paint(force) {
    const [top, size] = view(), { tall, factor } = geometry(), begin = top * factor;
    body.style.height = `${tall}px`;
    const from = Math.max(0, Math.floor(begin / height()) - 4), to = Math.min(rows.length, Math.ceil((begin + size) / height()) + 4);
    if (force || factor > 1 || from !== first || to !== last) {
      const active = document.activeElement?.closest?.(".row")?.dataset.latent;
      [first, last] = [from, to];
      body.replaceChildren(...Array.from({ length: to - from }, (_, n) => { const each = row(from + n); each.style.top = `${(from + n) * height() - begin + top}px`; return each; }));
      if (active !== undefined) body.querySelector(`[data-latent="${active}"] a`)?.focus({ preventScroll: true });
    }
    scrolled.set(here, phone.matches ? scrollY : top);
  }
  let waiting = false;
  const later = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; if (element.isConnected) paint(false); }); } };
  element.onscroll = later;
  const force = () => { if (element.isConnected) paint(true); };
  function start() {
    if (!element.isConnected) return;
    stopListening?.();
    addEventListener("scroll", later, { passive: true });
    addEventListener("resize", force);
    stopListening = () => { removeEventListener("scroll", later); removeEventListener("resize", force); };
    const before = scrolled.get(here) ?? 0;
    paint(true);
    if (phone.matches) scrollTo(0, before); else { scrollTo(0, 0); element.scrollTop = before; }
    paint(true);
  }
  step = by => {
    const at = rows.indexOf(Number(document.activeElement?.closest?.(".row")?.dataset.latent ?? -1)), next = Math.max(0, Math.min(rows.length - 1, at < 0 ? first + (first ? 4 : 0) : at + by));
    const { factor } = geometry(), target = next * height() / factor, [top, size] = view();
    if (phone.matches) scrollTo(0, target + body.getBoundingClientRect().top + scrollY - size / 2);
    else if (target < top || target > top + size - 2 * height()) element.scrollTop = target - size / 2;
    paint(true);
    body.querySelector(`[data-latent="${rows[next]}"] a`)?.focus({ preventScroll: true });
  };
  return { element, start };
}
let step = null; // moves by one in what is shown
let stopListening = null;
