/* Draws the plots in the page's colours, builds their legends and sorts the table. Makes no network requests. */
"use strict";

const figures = JSON.parse(document.getElementById("plots").textContent);
const touch = matchMedia("(pointer: coarse)").matches;
const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };
const markers = {
  circle: "M15 2a4 4 0 1 0 .01 0z", diamond: "M15 1l5 5-5 5-5-5z", square: "M11 2h8v8h-8z",
  "triangle-up": "M15 1l5 9H10z", cross: "M13.5 1h3v3.5H20v3h-3.5V11h-3V7.5H10v-3h3.5z", star: "M15 0l2 4 4 1-3 3 1 4-4-2-4 2 1-4-3-3 4-1z",
  "triangle-down": "M10 2h10l-5 9z", hexagon: "M15 1l4.3 2.5v5L15 11l-4.3-2.5v-5z",
};
const dashes = { solid: "", dash: "6 4", dot: "2 3", dashdot: "6 3 2 3", longdash: "10 4", longdashdot: "10 3 2 3",
  "8px,2px,2px,2px,2px,2px": "8 2 2 2 2 2", "10px,2px,2px,2px": "10 2 2 2" };

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

/* Returns the colours of one plot as arguments of Plotly.update: one value per trace, and those of the layout. */
function paint(data) {
  const colours = data.map(trace => colour(trace.meta.arch));
  const traces = { "line.color": colours, "marker.color": colours, "marker.line.color": colours.map(() => colour("surface")) };
  const layout = { "font.color": colour("muted"), "hoverlabel.bgcolor": colour("surface"),
    "hoverlabel.bordercolor": colour("line"), "hoverlabel.font.color": colour("ink"),
    "modebar.bgcolor": "rgba(0,0,0,0)", "modebar.color": colour("muted"), "modebar.activecolor": colour("ink") };
  for (const axis of ["xaxis", "yaxis"]) {
    layout[axis + ".gridcolor"] = colour("line");
    layout[axis + ".title.font.color"] = colour("ink");
  }
  return [traces, layout];
}

function repaint() {
  for (const plot of document.querySelectorAll(".plot")) Plotly.update(plot, ...paint(plot.data));
}

async function draw(plot) {
  const { data, layout } = figures[plot.id];
  layout.dragmode = touch ? false : "zoom";
  await Plotly.newPlot(plot, data, layout, config);
  await Plotly.update(plot, ...paint(plot.data));
}

/* Builds one row per group (architecture and width). A group whose only entry is "" has one button. Another group has a
   button for itself, without data-entry, and one for each entry. */
function buildLegend(figure) {
  const traces = [...figure.querySelectorAll(".plot")].flatMap(plot => figures[plot.id].data);
  const groups = new Map();
  for (const trace of traces) {
    const { group, entry } = trace.meta;
    if (!groups.has(group)) groups.set(group, new Map());
    groups.get(group).set(entry, { ...groups.get(group).get(entry), ...trace });
  }
  const legend = figure.querySelector(".legend");
  for (const [group, entries] of groups) {
    const row = legend.appendChild(document.createElement("div"));
    if (!entries.has("")) row.append(legendButton(figure, group, null, entries.values().next().value));
    for (const [entry, trace] of entries) row.append(legendButton(figure, group, entry, trace));
  }
}

function legendButton(figure, group, entry, trace) {
  const button = document.createElement("button");
  button.type = "button";
  button.ariaPressed = "true";
  Object.assign(button.dataset, { group, ...(entry !== null && { entry }) });
  button.append(swatch(trace, entry), entry || group);
  button.addEventListener("click", event => choose(figure, button, event.shiftKey));
  return button;
}

function swatch(trace, entry) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const shape = trace.marker ? `<path d="${markers[trace.marker.symbol]}" fill="currentColor"/>` : "";
  svg.setAttribute("viewBox", "0 0 30 12");
  svg.setAttribute("aria-hidden", "true");
  svg.innerHTML = `<path d="M1 6h28" stroke="currentColor" stroke-width="2" stroke-dasharray="${dashes[trace.line.dash]}"/>${shape}`;
  svg.style.color = `var(--${trace.meta.arch})`;
  svg.style.opacity = entry ? trace.opacity : 1;
  return svg;
}

/* Shows or hides what a button names. With Shift it shows that alone, or everything again. */
function choose(figure, button, alone) {
  const { group, entry } = button.dataset;
  const buttons = [...figure.querySelectorAll(".legend button")];
  const named = other => other.dataset.group === group && (entry === undefined || other.dataset.entry === entry);
  const on = button.ariaPressed !== "true";
  const leaves = buttons.filter(other => other.dataset.entry !== undefined);
  const isolated = leaves.every(other => (other.ariaPressed === "true") === named(other));
  for (const other of leaves) {
    if (alone) other.ariaPressed = String(isolated || named(other));
    else if (named(other)) other.ariaPressed = String(on);
  }
  summarise(buttons);
  show(figure, buttons);
}

/* Sets the state of each group's button: pressed when any of its entries is. */
function summarise(buttons) {
  for (const head of buttons.filter(button => button.dataset.entry === undefined)) {
    const entries = buttons.filter(other => other.dataset.entry && other.dataset.group === head.dataset.group);
    head.ariaPressed = String(entries.some(entry => entry.ariaPressed === "true"));
  }
}

function show(figure, buttons) {
  const hidden = ({ meta }) => buttons.some(({ dataset, ariaPressed }) =>
    dataset.group === meta.group && dataset.entry === meta.entry && ariaPressed === "false");
  for (const plot of figure.querySelectorAll(".plot")) {
    Plotly.restyle(plot, { visible: plot.data.map(trace => !hidden(trace)) });
  }
}

function sortTable(button) {
  const head = button.closest("th"), column = head.cellIndex, body = head.closest("table").tBodies[0];
  const sign = head.ariaSort === "ascending" ? -1 : 1, isNumber = head.classList.contains("number");
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.ariaSort = sign === 1 ? "ascending" : "descending";
  const key = row => row.cells[column].dataset.value;
  const compare = (a, b) => isNumber ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true });
  body.append(...[...body.rows].sort((a, b) =>
    (key(a) === "") - (key(b) === "") || sign * compare(key(a), key(b))));
}

/* Says that the table can be scrolled, where it is wider than its box. */
function hint() {
  const box = document.querySelector(".scroll");
  document.querySelector(".sideways").toggleAttribute("data-needed", box.scrollWidth > box.clientWidth);
}

/* Prints light and narrow, whatever the screen is. */
async function paper(printing) {
  document.documentElement.toggleAttribute("data-paper", printing);
  for (const plot of document.querySelectorAll(".plot")) {
    Plotly.relayout(plot, printing ? { autosize: false, width: 620, height: 300 } : { autosize: true, width: null, height: null });
  }
  repaint();
}

for (const plot of document.querySelectorAll(".plot")) draw(plot);
for (const figure of document.querySelectorAll("figure")) buildLegend(figure);
for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => sortTable(button));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
hint();
addEventListener("resize", hint);
addEventListener("beforeprint", () => paper(true));
addEventListener("afterprint", () => paper(false));
