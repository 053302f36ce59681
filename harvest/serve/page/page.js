/* Keeps the parts of a page up to date, says the plan of a request before it is sent, and copies commands. Everything
   also works without it: the parts are then as old as the page, and the plan has a button. */
"use strict";

document.documentElement.classList.add("js");

/* ---- Live parts: the server sends the HTML of each part that changed, with the revision of its state. */
const live = document.body.dataset.live;
const offline = document.querySelector(".offline");
let source = null, revision = document.body.dataset.revision, waiting = 0, pause = 1000;

function connect() {
  clearTimeout(waiting);
  if (source || document.hidden) return;
  source = new EventSource(`${live}${live.includes("?") ? "&" : "?"}after=${encodeURIComponent(revision)}`);
  source.addEventListener("open", () => { offline.hidden = true; pause = 1000; });
  source.addEventListener("parts", event => {
    revision = event.lastEventId;
    for (const [name, html] of Object.entries(JSON.parse(event.data))) replacePart(name, html);
  });
  source.addEventListener("error", () => {
    offline.hidden = false;
    if (source.readyState === EventSource.CLOSED) later();   // an error's answer: the browser does not try again
  });
}

function disconnect() {
  source?.close();
  source = null;
}

/* Tries again after a second, then after two, … at most 15. */
function later() {
  disconnect();
  waiting = setTimeout(connect, pause * (0.75 + Math.random() / 2));
  pause = Math.min(15000, pause * 2);
}

/* Replaces a part, and keeps what a person does in it: the focus, the place in a scrolled box, what is folded out. */
function replacePart(name, html) {
  const part = document.querySelector(`[data-part="${CSS.escape(name)}"]`);
  if (!part || part.dataset.html === html) return;
  part.dataset.html = html;
  const before = states(part), focused = pathOf(part, document.activeElement), selected = !getSelection().isCollapsed;
  if (selected && part.contains(getSelection().anchorNode)) { delete part.dataset.html; return; }
  const open = [...part.querySelectorAll("details[id]")].map(each => [each.id, each.open]);
  const follow = part.scrollHeight - part.scrollTop - part.clientHeight < 24;
  const across = part.querySelector(".scroll")?.scrollLeft ?? 0;
  const fresh = document.createElement("template");
  fresh.innerHTML = html;
  moveBars(part, fresh.content);
  part.replaceChildren(fresh.content);
  for (const [id, shown] of open) document.getElementById(id)?.toggleAttribute("open", shown);
  if (part.matches("pre") && follow) part.scrollTop = part.scrollHeight;
  if (across) part.querySelector(".scroll").scrollLeft = across;
  if (focused) part.querySelector(focused)?.focus({ preventScroll: true });
  announce(before, states(part));
}

/* Progress bars stay the same elements, so that they move and do not jump. */
function moveBars(part, fresh) {
  for (const bar of fresh.querySelectorAll("progress")) {
    const old = [...part.querySelectorAll("progress")].find(each => each.ariaLabel === bar.ariaLabel);
    if (old) {
      old.value = bar.value;
      bar.replaceWith(old);
    }
  }
}

/* A selector of the focused element inside the part, by its name or its address. */
function pathOf(part, element) {
  if (!part.contains(element)) return null;
  for (const name of ["aria-label", "href", "id"]) {
    const value = element.getAttribute(name);
    if (value) return `${element.localName}[${name}="${CSS.escape(value)}"]`;
  }
  return null;
}

function states(part) {
  return new Map([...part.querySelectorAll("[data-job]")].map(({ dataset }) => [dataset.job, dataset.state]));
}

/* Says to a screen reader which job changed its state; progress itself is not read out. */
function announce(before, after) {
  const news = [...after].filter(([job, state]) => before.has(job) && before.get(job) !== state);
  if (news.length) {
    document.getElementById("announcement").textContent = news.map(([job, state]) => `Job ${job} is ${state}.`).join(" ");
  }
}

if (live) {
  connect();
  document.addEventListener("visibilitychange", () => document.hidden ? disconnect() : connect());
  addEventListener("pagehide", disconnect);
  addEventListener("pageshow", connect);
}

/* ---- The form: the layers and hooks of the chosen model, and the plan of what was entered. */
const form = document.getElementById("ask");
let planning = null, planTimer = 0;

async function part(address, options) {
  const answer = await fetch(address, options);
  return answer.headers.get("content-type")?.startsWith("text/html") ? answer.text() : null;
}

function entered() {
  return new URLSearchParams(new FormData(form));
}

async function plan() {
  planning?.abort();
  planning = new AbortController();
  const line = document.getElementById("plan");
  line.setAttribute("aria-busy", "true");
  try {
    const html = await part("/plan?part=plan", { method: "POST", body: entered(), signal: planning.signal });
    if (html !== null) line.innerHTML = html;
  } catch (error) {
    if (error.name !== "AbortError") line.textContent = "The plan cannot be had now: the server does not answer.";
    return;
  } finally {
    line.removeAttribute("aria-busy");
  }
}

function planSoon() {
  clearTimeout(planTimer);
  planTimer = setTimeout(plan, 500);
}

async function chooseModel() {
  const model = form.elements.model.value;
  const html = await part(`/?part=sites&model=${encodeURIComponent(model)}`).catch(() => null);
  if (html !== null && form.elements.model.value === model) form.querySelector("[data-sites]").innerHTML = html;
}

/* What was not ready when the page was made. */
async function fetchTexts(box) {
  const html = await part(location.pathname + box.dataset.texts).catch(() => null);
  if (html !== null) box.innerHTML = html;
}

for (const box of document.querySelectorAll("[data-texts]")) {
  if (box.querySelector("[data-pending]")) fetchTexts(box);
}

if (form) {
  if (form.querySelector("[data-sites] [data-pending]")) chooseModel();
  form.addEventListener("change", async event => {
    if (event.target.name === "model") await chooseModel();
    planSoon();
  });
  form.addEventListener("input", event => event.target.matches("input:not([type=checkbox])") && planSoon());
  form.querySelector("[data-plan]").addEventListener("click", event => { event.preventDefault(); plan(); });
}

/* ---- Commands to copy, where the browser allows it. */
if (navigator.clipboard) {
  for (const box of document.querySelectorAll("[data-copy]")) {
    const button = document.createElement("button");
    const text = box.textContent;
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    box.append(button);
  }
}
