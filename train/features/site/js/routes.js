/* Addresses: #/?filters  #/latent/214?show=plus  #/compare/214/655  #/text?q=words */
let visit = 0;
let shownView = "";

async function route() {
  const mine = ++visit, fresh = () => mine !== visit;
  const [, path, query] = /^#?([^?]*)\??(.*)$/s.exec(location.hash), params = new URLSearchParams(query);
  const parts = path.split("/").filter(Boolean), view = parts.join("/");
  stopListening?.();
  stopListening = null;
  step = null;
  const latents = parts.slice(1).map(part => /^\d{1,15}$/.test(part) ? Number(part) : null);
  try {
    if (!parts.length) { listAddress = location.hash || "#/"; await index(params, fresh); }
    else if (parts[0] === "latent" && parts.length === 2 && latents[0] !== null) { check(latents); await latentPage(latents[0], params, fresh); }
    else if (parts[0] === "compare" && parts.length === 3 && !latents.includes(null)) { check(latents); await comparePage(...latents, fresh); }
    else if (view === "text") await textPage(params, fresh);
    else throw new Error(`There is no page at ${location.hash.slice(0, 80)}.`);
  } catch (error) {
    if (fresh()) return;
    document.title = "Not found – sagsae";
    $("#main").replaceChildren(make("h1", { tabindex: -1 }, "Not found"), make("p", { class: "empty" }, `${error.message} `, make("a", { href: "#/" }, "All latents")));
    if (!/^There is no|is missing|is damaged/m.test(error.message)) console.error(error);
  }
  if (fresh()) return;
  if (shownView !== view) {
    if (parts.length) scrollTo(0, 0);
    if (shownView !== "first") { $("#main h1")?.focus({ preventScroll: true }); announce(document.title); }
  }
  shownView = view;
}
function check(latents) {
  for (const latent of latents) if (latent >= facts.d_sae) throw new Error(`There is no latent ${latent}. They are numbered 0 to ${count(facts.d_sae - 1)}.`);
}
function announce(text) { $("#announcement").textContent = text; }

function searchFor(text) {
  const asked = text.trim();
  if (/^\d+$/.test(asked) && Number(asked) < facts.d_sae) location.hash = `#/latent/${Number(asked)}`;
  else location.hash = asked ? `#/?${new URLSearchParams({ word: asked })}` : "#/";
}

async function begin() {
  if (!("DecompressionStream" in window)) throw new Error("This browser is too old for this page: it cannot unpack gzip. Firefox 113, Chrome 80, Safari 16.4 and later can.");
  takeIndex(await load("data/index.js"));
  $("#what").textContent = [facts.sae, [facts.model, facts.hook_name ?? facts.hook].filter(Boolean).join(", ")].filter(Boolean).join(" · ");
  $("#foot").replaceChildren(make("p", {}, "Counts and maxima are exact over these tokens; bands are a uniform sample. Keys: ", make("kbd", {}, "/"), " search, ", make("kbd", {}, "j"), " ", make("kbd", {}, "k"), " next and previous, ", make("kbd", {}, "t"), " table. The Parquet files beside this page have every number."));
  $("#jump").addEventListener("submit", event => { event.preventDefault(); $("#q").blur(); searchFor($("#q").value); });
  addEventListener("hashchange", route);
  addEventListener("keydown", event => {
    if (event.target.matches("input, select, textarea")) { if (event.key === "Escape") event.target.blur(); return; }
    if (event.metaKey || event.ctrlKey || event.altKey) return;
    if (event.key === "/") { event.preventDefault(); $("#q").focus(); $("#q").select(); }
    if (event.key === "j") step?.(1);
    if (event.key === "k") step?.(-1);
    if (event.key === "t") location.hash = listAddress;
  });
  $(".skip").addEventListener("click", event => { event.preventDefault(); $("#main").focus(); });
  history.scrollRestoration = "manual";
  shownView = "first";
  await route();
}
begin().catch(error => $("#main").replaceChildren(make("h1", {}, "The page cannot be shown"), make("p", { class: "empty" }, error.message)));
