/* One latent: both poles side by side. */
async function latentPage(latent, params, fresh) {
  const card = await cardOf(latent);
  if (fresh()) return;
  const two = facts.sides === 2, alive = card.poles.filter(pole => pole.firings), firings = alive.reduce((sum, pole) => sum + pole.firings, 0);
  document.title = `Latent ${latent} – ${facts.sae}`;
  const order = neighboursInList(latent);
  const turn = (to, text, label, key) => to === null ? make("span", { class: "plain off", "aria-hidden": "true" }, text) : make("a", { class: "plain", href: `#/latent/${to}`, "aria-label": label, title: `${label} (${key})` }, text);
  const head = make("div", { class: "top" },
    make("h1", { tabindex: -1 }, `Latent ${latent}`), make("p", { class: "badge" }, badge(card)),
    make("nav", { "aria-label": "Latents" }, turn(order.previous, "←", "previous latent", "k"), turn(order.next, "→", "next latent", "j"), make("a", { class: "plain", href: listAddress }, "Table")));
  const page = [head];
  if (!firings) page.push(make("p", { class: "empty" }, `It never fires on these ${count(facts.rows)} tokens, so there is nothing to show but its direction.`));
  else {
    page.push(factsOf(card, firings));
    page.push(make("section", { class: "card values" }, make("h2", {}, two ? "Values, to both sides of zero" : "Values", make("small", {}, "logarithmic scale; height: firings")), histogram(card.poles)));
  }
  const asked = params.get("show"), stronger = two && card.poles[1].energy > card.poles[0].energy ? "plus" : "minus";
  const show = ["plus", "minus"].includes(asked) ? asked : stronger;
  const poles = make("div", { class: two ? "poles" : "poles single", "data-show": two ? show : null }, card.poles.map(pole => poleSection(pole, card)));
  if (two) page.push(tabs(card, poles, show, latent));
  page.push(poles);
  if (firings) page.push(dialPanel(card), livePanel(card));
  page.push(make("div", { class: "two" }, directions(card), firings ? together(card) : null));
  $("#main").replaceChildren(...page);
  step = by => { const to = by > 0 ? order.next : order.previous; if (to !== null) location.hash = `#/latent/${to}`; };
}

/* Before and after it in the order of the last table, or by number. */
let listAddress = "#/";
function neighboursInList(latent) {
  const at = listed ? listed.indexOf(latent) : -1;
  if (at >= 0) return { previous: listed[at - 1] ?? null, next: listed[at + 1] ?? null };
  return { previous: latent > 0 ? latent - 1 : null, next: latent + 1 < facts.d_sae ? latent + 1 : null };
}

function badge(card) {
  const alive = card.poles.filter(pole => pole.firings);
  if (!alive.length) return "never fires";
  if (facts.sides === 1) return "one pole: this architecture has no values below zero";
  if (alive.length === 1) return `only its ${signOf(alive[0].sign)} pole fires`;
  const share = Math.min(...card.poles.map(pole => pole.share));
  return share >= BOTH ? `both poles: ${percent(share)} of the energy on the weaker side` : `mostly one pole: ${percent(share)} of the energy on the weaker side`;
}

function factsOf(card, firings) {
  const both = text => card.poles.map((pole, n) => [n ? " | " : "", make("span", { class: facts.sides === 2 ? `sign ${sideOf(pole.sign)}` : null }, text(pole))]);
  const entries = [
    ["fires on", [`${count(firings)} of ${count(facts.rows)} tokens, ${percent(firings / facts.rows)}`]],
    facts.sides === 2 && ["firings", both(pole => `${signOf(pole.sign)} ${count(pole.firings)}`)],
    facts.sides === 2 && ["energy", both(pole => `${signOf(pole.sign)} ${percent(pole.share)}`)],
    ["largest", both(pole => pole.firings ? signed(pole.sign * pole.max) : "–")],
    ["median", both(pole => pole.firings ? signed(pole.sign * pole.q50) : "–")],
  ].filter(Boolean);
  return make("dl", { class: "facts" }, entries.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

/* On a phone, one pole at a time. */
function tabs(card, poles, show, latent) {
  const buttons = card.poles.map(pole => make("button", { type: "button", class: sideOf(pole.sign), "aria-pressed": String(sideOf(pole.sign) === show), onclick: () => choose(sideOf(pole.sign)) }, make("b", { class: "sign" }, `${signOf(pole.sign)} pole`), ` ${count(pole.firings)}`));
  const choose = side => {
    poles.dataset.show = side;
    buttons.forEach((button, n) => button.setAttribute("aria-pressed", String(sideOf(card.poles[n].sign) === side)));
    history.replaceState(null, "", `#/latent/${latent}?show=${side}`);
  };
  return make("div", { class: "tabs", role: "group", "aria-label": "Pole to show" }, buttons);
}

const largestOf = card => facts.sides === 2 ? card.poles.map(pole => pole.max) : [0, card.poles[0].max];

function poleSection(pole, card) {
  const side = sideOf(pole.sign), name = facts.sides === 2 ? `${signOf(pole.sign)} pole` : "Pole";
  const title = make("header", {}, make("h2", { class: "sign" }, name), make("span", { class: "note" }, pole.firings ? `${plural(pole.firings, "firing")}, mean ${digits(pole.mean)}${facts.sides === 2 ? `, ${percent(pole.share)} of the energy` : ""}` : `never fires on these ${count(facts.rows)} tokens`));
  const lens = pole.lens.length ? lensList(pole) : null;
  if (!pole.firings) return make("section", { class: `card pole ${side}`, "data-pole": side }, title, lens ? make("div", { class: "lists" }, lens) : null);
  return make("section", { class: `card pole ${side}`, "data-pole": side }, title, ruleLine(pole),
    make("div", { class: "lists" }, onList(pole), nextTo(pole, "before", "Comes before"), nextTo(pole, "after", "Then comes"), lens),
    examplesOfPole(pole, card));
}

/* The few tokens that best tell when the pole fires: a name without a language model. */
function ruleLine(pole) {
  if (!pole.rule.length) return make("p", { class: "rule" }, "No token has 3 firings of it, so it has no name.");
  const how = pole.rule_f1 >= 0.5 ? "Well named by" : pole.rule_f1 >= 0.2 ? "Partly told by" : "Hardly told by";
  return make("p", { class: "rule" }, `${how} `, pole.rule.map(id => chip(id, pole.sign)), make("span", { class: "f1", title: "F1 of: it fires exactly on these tokens" }, ` F1 ${fixed(pole.rule_f1)}`));
}

function listOf(title, hint, entries) {
  return make("section", {}, make("h3", { title: hint }, title), entries.length ? make("ol", {}, entries.map(([token, ...values]) => make("li", {}, token, make("span", {}, ...values)))) : make("p", { class: "note" }, "–"));
}
function onList(pole) {
  return listOf("Fires on", "share of its firings, and share of all these tokens on which it fires", pole.on.map(({ token, count: n }) => [chip(token, pole.sign), make("b", { title: `${plural(n, "firing")} on it` }, percent(n / pole.firings)), rowsOf(token) ? make("small", { title: `it fires on ${count(n)} of the ${count(rowsOf(token))} tokens of this kind` }, ` ${percent(Math.min(1, n / rowsOf(token)))} of it`) : ""]));
}
function nextTo(pole, kind, title) {
  return listOf(title, "share of its firings, and how many times as frequent as in all of the text", pole[kind].map(({ token, count: n }) => {
    const usual = rowsOf(token) / facts.rows, lift = usual ? n / pole.firings / usual : null;
    return [chip(token, pole.sign), make("b", { title: `${plural(n, "firing")}` }, percent(n / pole.firings)), lift === null ? "" : make("small", {}, ` × ${lift >= 10 ? count(Math.round(lift)) : lift.toFixed(1)}`)];
  }));
}
function lensList(pole) {
  return listOf("Direction raises", "logit lens: the tokens that this direction raises most at the model’s output", pole.lens.map(({ token, logit }) => [chip(token, pole.sign), make("b", {}, signed(logit))]));
}

const BAND_NAMES = ["", "up to 25 % of its largest", "25 to 50 %", "50 to 75 %", "75 to 100 % of its largest"];
function examplesOfPole(pole, card) {
  const drawn = pole.drawn.reduce((sum, n) => sum + n, 0), parts = [];
  const best = pole.examples.filter(example => example.group === 0);
  parts.push(make("div", { class: "bandhead" }, make("h3", {}, "Strongest"), make("span", {}, "best of each context, over all tokens")), exampleList(best, card));
  for (let group = 4; group >= 1; group--) {
    const some = pole.examples.filter(example => example.group === group);
    if (!some.length) continue;
    const share = pole.drawn[group - 1] / drawn;
    parts.push(make("div", { class: "bandhead" }, make("h3", {}, BAND_NAMES[group]), make("span", { title: `${pole.drawn[group - 1]} of ${drawn} firings that were drawn` }, make("i", { class: "meter", "aria-hidden": "true" }, make("i", { width: `${100 * share}%` })), ` ${drawn < pole.firings ? "≈ " : ""}${percent(share)} of its firings`)), exampleList(some, card));
  }
  return make("div", { class: "examples" }, parts);
}
function exampleList(examples, card) {
  const largest = largestOf(card);
  return make("ol", {}, examples.map(example => make("li", { class: "text" },
    make("span", { class: "value", title: `context ${example.context}, position ${example.position}` }, signed(example.value)),
    make("span", { class: "window", dir: "auto" }, contextText(example, largest)))));
}

/* ---- directions, co-firing, dial ---- */
function directions(card) {
  const pole = card.poles[card.poles.length - 1]; // the one above zero
  const rows = (list, word) => list.slice(0, 6).map(({ latent, cosine }) => make("tr", {}, make("td", {}, make("a", { href: `#/latent/${latent}` }, String(latent))), make("td", { class: "num" }, fixed(cosine)), make("td", {}, word), make("td", { class: "chips" }, miniature(latent)), make("td", {}, make("a", { href: `#/compare/${card.latent}/${latent}`, "aria-label": `compare with latent ${latent}` }, "compare"))));
  const found = [...rows(pole.near.filter(each => each.cosine > 0), "alike"), ...rows(pole.far.filter(each => each.cosine < 0), "opposite")];
  return make("section", { class: "card" }, make("h2", {}, "Directions", make("small", {}, "cosine of the decoder rows")), found.length ? make("table", {}, make("thead", { class: "hidden" }, make("tr", {}, ["latent", "cosine", "kind", "tokens", "compare"].map(text => make("th", { scope: "col" }, text)))), make("tbody", {}, found)) : make("p", { class: "note" }, "There is no other latent to compare with."));
}
function miniature(latent) {
  if (!firingsOf(latent)) return [make("span", { class: "note" }, "never fires")];
  return signs().map((sign, n) => [n ? make("span", { class: "bar-between" }, "|") : null, listedOf(latent, sign).slice(0, 2).map(id => chip(id, facts.sides === 2 ? sign : undefined))]);
}
function together(card) {
  const rows = card.poles.flatMap(pole => pole.cofire.map(other => ({ ...other, own: pole.sign }))).sort((a, b) => b.jaccard - a.jaccard).slice(0, 12);
  const body = rows.map(({ latent, sign, jaccard, lift, own }) => make("tr", {}, make("td", {}, make("a", { href: `#/latent/${latent}` }, String(latent))),
    facts.sides === 2 ? make("td", {}, make("span", { class: "wide-only" }, "our "), make("b", { class: `sign ${sideOf(own)}` }, signOf(own)), " with ", make("span", { class: "wide-only" }, "its "), make("b", { class: `sign ${sideOf(sign)}` }, signOf(sign))) : null,
    make("td", { class: "num", title: "tokens on which both fire, over those on which at least one does" }, percent(jaccard)), make("td", { class: "num", title: "times as often as independent poles would" }, `× ${lift >= 10 ? count(Math.round(lift)) : lift.toFixed(1)}`),
    make("td", { class: "chips" }, listedOf(latent, sign).slice(0, 3).map(id => chip(id, facts.sides === 2 ? sign : undefined)))));
  const heads = ["latent", ...facts.sides === 2 ? ["signs"] : [], "overlap", "times chance", "tokens"];
  return make("section", { class: "card" }, make("h2", {}, "Fires together with", make("small", {}, "overlap of their tokens; times chance")), rows.length ? make("table", {}, make("thead", { class: "hidden" }, make("tr", {}, heads.map(text => make("th", { scope: "col" }, text)))), make("tbody", {}, body)) : make("p", { class: "note" }, "No other pole was seen on the same tokens."));
}
/* Whether the latent's values steer the next tokens, from dial.json. */
function dialPanel(card) {
  const title = make("h2", {}, "Dial"), dial = card.dial;
  if (!dial) return make("section", { class: "card dial", id: "dial" }, title, make("p", {}, "Whether turning this latent turns what the model says next was not tested. To test it: ", make("code", {}, `sagsae dial RUN --sae ${facts.sae} --latent ${card.latent}`), "."));
  const said = dial.passes === null ? "No verdict: a verdict needs at least 40 control directions." : dial.passes ? "The dial holds: its slope exceeds those of the control directions." : "The dial does not hold: control directions of the same length do as much.";
  const size = Math.sqrt(dial.controls.reduce((sum, slope) => sum + slope * slope, 0) / (dial.controls.length || 1));
  const numbers = `Slope ${fixed(dial.slope, 3)} [${fixed(dial.interval[0], 3)}, ${fixed(dial.interval[1], 3)}] nats for a unit of dial, ${digits(dial.unit)}; ${plural(dial.controls.length, "control direction")} ${fixed(size, 3)} (root mean square)${dial.p === null ? "" : `; p = ${digits(dial.p)}`}. KL at the ends: ${digits(dial.kl[0])} and ${digits(dial.kl[dial.kl.length - 1])} nats.`;
  const words = [["T+", dial.plus, 1], ["T−", dial.minus, -1]].map(([name, ids, sign]) => make("p", {}, `${name} `, ids.slice(0, 12).map(id => chip(id, sign))));
  return make("section", { class: "card dial", id: "dial" }, title, make("div", { class: "chart" }, dialChart(dial), make("div", {}, make("p", {}, make("b", {}, said)), make("p", {}, numbers), make("p", { class: "note" }, "The curve is log p(T+) − log p(T−) with the latent held at so many units; the dashed lines are the control directions."), words)));
}
function dialChart(dial) {
  const grid = facts.dial_grid, W = 520, H = 220, ends = [grid[0], grid[grid.length - 1]];
  const middle = dial.y[grid.indexOf(0)] ?? dial.clean, rays = dial.controls.slice(0, 60).map(slope => ends.map(end => middle + slope * end));
  const all = [...dial.y, ...rays.flat()], low = Math.min(...all), high = Math.max(...all);
  const x = value => 58 + (value - ends[0]) / (ends[1] - ends[0]) * (W - 74), y = value => H - 34 - (value - low) / (high - low || 1) * (H - 50);
  const label = `Response to the dial from ${minused(ends[0])} to ${minused(ends[1])}: ${dial.y.map(value => fixed(value)).join(", ")}`;
  return draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label },
    draw("line", { class: "zero", x1: x(0), x2: x(0), y1: 10, y2: H - 30 }),
    rays.map(([a, b]) => draw("line", { class: "ray", x1: x(ends[0]), y1: y(a), x2: x(ends[1]), y2: y(b) })),
    draw("path", { class: "curve", d: `M${grid.map((value, n) => `${x(value).toFixed(1)} ${y(dial.y[n]).toFixed(1)}`).join("L")}` }),
    grid.map(value => draw("text", { x: x(value), y: H - 14, "text-anchor": "middle" }, signed(value))),
    draw("text", { x: 50, y: y(high) + 4, "text-anchor": "end" }, fixed(high)), draw("text", { x: 50, y: y(low) + 4, "text-anchor": "end" }, fixed(low)));
}
