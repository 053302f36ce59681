/* What is rare, before the table: a map of all latents, and the most two-sided, named and opposite ones. */
const SEEN = 20; // firings of the weaker pole from which a share says something
const SHELF = 4;

const weakerFirings = latent => facts.sides === 2 ? Math.min(...signs().map(sign => columns.firings[poleOf(latent, sign)])) : firingsOf(latent);
const weakerName = latent => Math.min(...signs().map(sign => f1Of(latent, sign)));
const strongerName = latent => Math.max(...signs().map(sign => f1Of(latent, sign)));
const isPair = latent => oppositeOf(latent) >= 0 && cosineOf(latent) < -0.9;

/* The `many` latents of largest score among those that pass. */
function leaders(passes, score, many = SHELF) {
  const best = [];
  for (let latent = 0; latent < facts.d_sae; latent++) {
    if (!passes(latent)) continue;
    const value = score(latent);
    if (best.length === many && value <= best[many - 1][0]) continue;
    best.push([value, latent]);
    best.sort((a, b) => b[0] - a[0] || a[1] - b[1]);
    best.length = Math.min(best.length, many);
  }
  return best.map(([, latent]) => latent);
}

function overview() {
  const two = facts.sides === 2, alive = latent => firingsOf(latent) >= SEEN;
  const shelves = two ? [
    shelf("Most two-sided", "by the energy on the weaker side", "sort=energy&both=1&least=100", leaders(latent => weakerFirings(latent) >= SEEN, weakerShare), latent => percent(weakerShare(latent))),
    shelf("Both poles named", "few tokens tell each pole; F1 of the worse", "sort=named", leaders(latent => weakerFirings(latent) >= SEEN, weakerName), latent => fixed(weakerName(latent))),
    shelf("One pole named best", "few tokens tell when it fires; F1", "sort=name", leaders(alive, strongerName), latent => fixed(strongerName(latent))),
  ] : [shelf("Best named", "few tokens tell when it fires; F1", "sort=name", leaders(alive, strongerName, 8), latent => fixed(strongerName(latent)))];
  return make("section", { class: two ? "overview" : "overview single", "aria-label": "What is rare" }, map(two), ...shelves, pairShelf(alive));
}

function shelf(title, subtitle, query, latents, value) {
  if (!latents.length) return null;
  const rows = latents.map(latent => make("li", {},
    make("a", { class: "id", href: `#/latent/${latent}` }, String(latent)),
    signs().map(sign => make("span", { class: `side ${sideOf(sign)}` }, listedOf(latent, sign).slice(0, 2).map(id => chip(id, facts.sides === 2 ? sign : undefined, { still: true })))),
    make("b", {}, value(latent))));
  return make("section", { class: "card shelf" }, make("h2", {}, make("a", { href: `#/?${query}` }, title)), make("p", { class: "note" }, subtitle), make("ol", {}, rows));
}

/* Two latents whose directions are opposite do the work of one signed latent. */
function pairShelf(alive) {
  const known = latent => oppositeOf(latent) >= 0 && alive(latent) && alive(oppositeOf(latent));
  const first = latent => !(oppositeOf(oppositeOf(latent)) === latent && oppositeOf(latent) < latent);
  const latents = leaders(latent => known(latent) && first(latent), latent => -cosineOf(latent), SHELF);
  if (!latents.length) return null;
  let pairs = 0;
  for (let latent = 0; latent < facts.d_sae; latent++) if (isPair(latent)) pairs++;
  const rows = latents.map(latent => make("li", {}, make("a", { class: "id", href: `#/compare/${latent}/${oppositeOf(latent)}` }, `${latent} | ${oppositeOf(latent)}`),
    make("span", { class: "side one" }, listedOf(latent, 1).slice(0, 2).map(id => chip(id, 1, { still: true }))),
    make("span", { class: "side" }, listedOf(oppositeOf(latent), 1).slice(0, 2).map(id => chip(id, 1, { still: true }))),
    make("b", {}, fixed(cosineOf(latent)))));
  const said = pairs ? `${plural(pairs, "latent")} with a cosine below −0.9` : "none has a cosine below −0.9";
  return make("section", { class: "card shelf pairs" }, make("h2", {}, make("a", { href: pairs ? "#/?pairs=1&sort=opposite&dir=up" : "#/?sort=opposite&dir=up" }, "Most opposite directions")), make("p", { class: "note" }, said), make("ol", {}, rows));
}

/* Every latent as a dot: to the right what is two-sided, up what has a name (on both poles). */
function map(two) {
  const label = two
    ? "Each dot is a latent. To the right: more energy on its weaker side. Up: its less well named pole has a better name. Top right is a nameable opposition. The table has every number."
    : "Each dot is a latent. To the right: more firings. Up: a better name. The table has every number.";
  const canvas = make("canvas", { role: "img", "aria-label": label }), tip = make("p", { class: "tip", "aria-hidden": "true" });
  const figure = make("section", { class: "card map" }, make("h2", {}, two ? "Two-sided and named" : "Named"), make("p", { class: "note" }, two ? "top right: both poles, each with a name" : "up: few tokens tell when it fires"), make("div", { class: "plot" }, canvas, tip));
  const most = Math.log(Math.max(2, ...leaders(() => true, firingsOf, 1).map(firingsOf)));
  const x = latent => two ? 2 * weakerShare(latent) : Math.log(Math.max(1, firingsOf(latent))) / most;
  const y = latent => Math.sqrt(two ? weakerName(latent) : strongerName(latent));
  const within = latent => (two ? weakerFirings(latent) : firingsOf(latent)) >= (two ? SEEN : 1);
  const highest = Math.sqrt([0.25, 0.5, 0.75, 1].find(f1 => leaders(within, y, 1).every(latent => y(latent) ** 2 <= f1 - 0.02)) ?? 1);
  let dots = [];
  const paint = () => {
    const [width, height] = [canvas.clientWidth, canvas.clientHeight], scale = devicePixelRatio || 1;
    if (!width) return;
    canvas.width = width * scale; canvas.height = height * scale;
    const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement), colour = name => style.getPropertyValue(name).trim();
    pen.scale(scale, scale);
    const [left, right, above, below] = [30, 8, 8, 38], across = width - left - right, up = height - above - below;
    pen.strokeStyle = colour("--line"); pen.fillStyle = colour("--muted"); pen.font = "11px system-ui, sans-serif";
    for (const f1 of [0, 0.1, 0.25, 0.5, 0.75, 1].filter(each => Math.sqrt(each) <= highest)) {
      const at = above + up * (1 - Math.sqrt(f1) / highest);
      pen.beginPath(); pen.moveTo(left, at); pen.lineTo(width - right, at); pen.stroke();
      pen.textAlign = "right"; pen.fillText(String(f1), left - 5, at + 4);
    }
    pen.textAlign = "center";
    if (two) for (const share of [0, 10, 20, 30, 40, 50]) pen.fillText(`${share} %`, Math.min(width - 14, left + across * share / 50), height - 22);
    else for (let tens = 0; tens * Math.LN10 <= most; tens++) pen.fillText(count(10 ** tens), Math.min(width - 14, left + across * tens * Math.LN10 / most), height - 22);
    pen.textAlign = "right"; pen.fillText(two ? "energy on the weaker side →" : "firings →", width - right, height - 4);
    dots = [];
    pen.fillStyle = colour("--accent");
    const shown = [];
    for (let latent = 0; latent < facts.d_sae; latent++) if (within(latent)) shown.push(latent);
    const many = shown.length > 8000;
    pen.globalAlpha = many ? 0.25 : shown.length > 1500 ? 0.4 : 0.6;
    for (const latent of shown) {
      const [px, py] = [left + across * x(latent), above + up * (1 - y(latent) / highest)];
      dots.push([px, py, latent]);
      const size = many ? 1.2 : 1.5 + 1.5 * Math.log(firingsOf(latent)) / most;
      pen.beginPath(); pen.arc(px, py, size, 0, 7); pen.fill();
    }
    pen.globalAlpha = 1;
    pen.fillStyle = colour("--ink"); pen.textAlign = "left"; pen.font = "600 11px system-ui, sans-serif";
    const labels = []; // the ones farthest out, where there is space
    for (const [px, py, latent] of dots.toSorted((a, b) => (two ? x(b[2]) * y(b[2]) - x(a[2]) * y(a[2]) : y(b[2]) - y(a[2]))).slice(0, 12)) {
      const size = pen.measureText(String(latent)).width, begin = px > width - size - 14 ? px - 6 - size : px + 6;
      if (labels.length > 5 || labels.some(([start, end, at]) => begin < end + 6 && begin + size + 6 > start && Math.abs(at - py) < 14)) continue;
      labels.push([begin, begin + size, py]);
      pen.fillText(String(latent), begin, py + 4);
    }
  };
  const nearest = event => {
    const box = canvas.getBoundingClientRect(), [mx, my] = [event.clientX - box.left, event.clientY - box.top];
    let best = null, least = 14 ** 2;
    for (const dot of dots) {
      const distance = (dot[0] - mx) ** 2 + (dot[1] - my) ** 2;
      if (distance < least) [best, least] = [dot, distance];
    }
    return best;
  };
  canvas.onmousemove = event => {
    const dot = nearest(event);
    canvas.style.cursor = dot ? "pointer" : "";
    tip.replaceChildren(...dot ? [make("b", {}, `${dot[2]} `), ...signs().flatMap((sign, n) => [n ? " | " : "", ...listedOf(dot[2], sign).slice(0, 3).map(id => chip(id, two ? sign : undefined, { still: true }))])] : []);
  };
  canvas.onclick = event => { const dot = nearest(event); if (dot) location.hash = `#/latent/${dot[2]}`; };
  new ResizeObserver(paint).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").onchange = paint;
  return figure;
}
