/* Two latents. Where their directions are opposite, the − pole of one faces the + pole of the other. */
async function comparePage(a, b, fresh) {
  const [one, other] = await Promise.all([cardOf(a), cardOf(b)]);
  if (fresh()) return;
  document.title = `Latents ${a} and ${b} – ${facts.sae}`;
  const plus = card => card.poles[card.poles.length - 1];
  const known = [...plus(one).near, ...plus(one).far].find(each => each.latent === b) ?? [...plus(other).near, ...plus(other).far].find(each => each.latent === a);
  const cosine = a === b ? 1 : known?.cosine, opposite = cosine !== undefined && cosine < 0;
  const said = cosine === undefined ? "Neither is among the 16 directions that the page knows of the other." : `Cosine of their directions: ${fixed(cosine)}. ${cosine < -0.9 ? "They are an antipodal pair: one signed latent could replace both." : opposite && facts.sides === 2 ? "They are opposite, so each pole faces the other’s pole of the other sign." : ""}`;
  const facing = one.poles.map(pole => [pole, facts.sides === 2 && opposite ? other.poles.find(each => each.sign === -pole.sign) : other.poles.find(each => each.sign === pole.sign)]);
  const link = latent => make("a", { href: `#/latent/${latent}` }, `Latent ${latent}`);
  $("#main").replaceChildren(
    make("div", { class: "top" }, make("h1", { tabindex: -1 }, `Latents ${a} and ${b}`), make("nav", { "aria-label": "Latents" }, make("a", { class: "plain", href: `#/compare/${b}/${a}` }, "Swap"), make("a", { class: "plain", href: listAddress }, "Table"))),
    make("p", { class: "note" }, said),
    make("div", { class: "poles compare heads-of-two" }, make("h2", {}, link(a)), make("h2", {}, link(b))),
    facing.map(([left, right]) => [sharedLine(left, right), make("div", { class: "poles compare" }, brief(left, one, right), brief(right, other, left))]).flat().filter(Boolean).reduce((box, element) => { box.append(element); return box; }, make("div", {})));
  step = null;
}
const tokensOf = pole => new Set([...pole.rule, ...pole.on.map(each => each.token)]);
function sharedLine(left, right) {
  const theirs = tokensOf(right), both = [...tokensOf(left)].filter(id => theirs.has(id));
  const names = facts.sides === 2 ? `${signOf(left.sign)} and ${signOf(right.sign)}` : "Both";
  return make("p", { class: "shared" }, both.length ? [`${names} both fire on `, both.map(id => chip(id))] : `${names}: none of their listed tokens is the same.`);
}
function brief(pole, card, facing) {
  const side = sideOf(pole.sign), theirs = tokensOf(facing);
  const title = make("header", {}, make("h2", { class: "sign" }, facts.sides === 2 ? `${signOf(pole.sign)} pole of ${card.latent}` : `Latent ${card.latent}`), make("span", { class: "note" }, pole.firings ? `${plural(pole.firings, "firing")}, ${percent(pole.share)} of the energy` : "never fires"));
  if (!pole.firings) return make("section", { class: `card pole ${side}` }, title);
  const marked = onList(pole);
  marked.querySelectorAll(".tok").forEach((element, n) => { if (theirs.has(pole.on[n].token)) element.classList.add("found"); });
  return make("section", { class: `card pole ${side}` }, title, ruleLine(pole), make("div", { class: "lists" }, marked, nextTo(pole, "after", "Then comes"), pole.lens.length ? lensList(pole) : null), make("div", { class: "examples" }, exampleList(pole.examples.filter(example => example.group === 0).slice(0, 4), card)));
}
