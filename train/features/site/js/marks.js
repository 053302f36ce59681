/* Small drawings. */
function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) element.setAttribute(name, value);
  element.append(...children.flat(Infinity).filter(Boolean));
  return element;
}

/* The energy of both poles to the two sides of a line: a latent that uses both is symmetric. */
function balance(latent) {
  const [minus, plus] = [shareOf(latent, -1), shareOf(latent, 1)];
  const label = `energy: ${percent(minus)} below zero, ${percent(plus)} above`;
  return make("span", { class: "balance", role: "img", "aria-label": label, title: label },
    make("span", { class: "minus", width: `${50 * minus}%` }), make("span", { class: "plus", width: `${50 * plus}%` }));
}

/* One histogram through zero: magnitudes are on the same logarithmic scale to both sides. */
function histogram(poles) {
  const used = poles.flatMap(pole => [...pole.hist].map((n, bin) => n ? bin : -1)).filter(bin => bin >= 0);
  if (!used.length) return null;
  const [low, high] = [Math.max(0, Math.min(...used) - 1), Math.min(47, Math.max(...used) + 1)], many = high - low + 1;
  const both = poles.length === 2, W = Math.max(280, $("#main").clientWidth - 84), H = 150, gap = both ? 34 : 24, step = Math.min(56, ((both ? W / 2 : W) - gap - 24) / many);
  const top = Math.max(...poles.flatMap(pole => [...pole.hist]));
  const place = (sign, bin) => both ? W / 2 + sign * (gap + (bin - low) * step) : gap + (bin - low) * step;
  const edge = bin => facts.scale * 2 ** (bin / 4 - 8);
  const bars = poles.map(pole => [...pole.hist].map((n, bin) => {
    if (!n) return null;
    const height = Math.max(1.5, n / top * (H - 12)), x = both && pole.sign < 0 ? place(-1, bin + 1) : place(1, bin);
    const title = draw("title", {}, `${signOf(pole.sign)}${digits(edge(bin))} to ${signOf(pole.sign)}${digits(edge(bin + 1))}: ${plural(n, "firing")}`);
    return draw("rect", { x: (x + 0.75).toFixed(1), y: (H - height).toFixed(1), width: (step - 1.5).toFixed(1), height: height.toFixed(1), rx: 1.5, class: sideOf(pole.sign) }, title);
  }));
  const every = 4 * Math.ceil(13 / step); // an octave is 4 bins; a label takes 52 pixels
  const ticks = [];
  for (let bin = low; bin <= high + 1; bin += every) for (const pole of poles) {
    ticks.push(draw("text", { x: place(both ? pole.sign : 1, bin), y: H + 17, "text-anchor": "middle" }, (both ? signOf(pole.sign) : "") + digits(edge(bin))));
  }
  const words = poles.map(pole => `${signOf(pole.sign)} ${plural(pole.firings, "firing")}, median ${digits(pole.q50)}, largest ${digits(pole.max)}`).join("; ");
  return draw("svg", { class: "hist", viewBox: `0 0 ${W} ${H + 24}`, role: "img", "aria-label": `Histogram of the values. ${words}` },
    draw("line", { class: "axis", x1: 0, x2: W, y1: H, y2: H }), both ? draw("line", { class: "zero", x1: W / 2, x2: W / 2, y1: 0, y2: H }) : null, bars, ticks,
    both ? draw("text", { x: W / 2, y: H + 17, "text-anchor": "middle" }, "0") : null);
}
