/* Reads the scripts of data/. Everything is a classic script, because file:// allows no other: a script of data/ calls
   sagsae.NAME with gzip in base64, and the load event that follows hands the content to whoever asked for it. */
const sagsae = {};
const loading = new Map();
const KEPT = 48; // scripts in memory
let arrived = null;
for (const name of ["index", "shard", "tokens"]) {
  sagsae[name] = text => { arrived = unpack(text); arrived.catch(() => {}); };
}

const KINDS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i1: Int8Array, i2: Int16Array, f4: Float32Array, f8: Float64Array };
const HALVES = new Float32Array(1 << 16); // every float16, by its bits
for (let bits = 0; bits < 1 << 15; bits++) {
  const exponent = bits >> 10, fraction = bits & 1023;
  const size = exponent === 31 ? (fraction ? NaN : Infinity) : exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction;
  HALVES[bits] = size;
  HALVES[bits | 1 << 15] = -size;
}

/* The header's content and the arrays of a script; see train/features/site/pack.py. */
async function unpack(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let at = 0; at < raw.length; at++) bytes[at] = raw.charCodeAt(at);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  let at = 4 + new DataView(buffer).getUint32(0, true);
  const about = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, at - 4))), arrays = {};
  for (const [name, kind, length] of about.arrays) {
    const type = kind === "f2" ? Uint16Array : KINDS[kind], end = at + length * type.BYTES_PER_ELEMENT;
    const values = new type(buffer.slice(at, end));
    arrays[name] = kind === "f2" ? Float32Array.from(values, bits => HALVES[bits]) : values;
    at = end;
  }
  return { ...about, arrays };
}

/* Loads a script of data/ once. Rejects with a sentence. */
function load(path) {
  if (!loading.has(path)) {
    loading.set(path, new Promise((resolve, reject) => {
      const fail = what => { loading.delete(path); reject(new Error(`${path} ${what}. Copy the whole folder again, or make the page again with sagsae features.`)); };
      const script = document.createElement("script");
      script.onload = () => {
        const content = arrived;
        arrived = null;
        script.remove();
        if (content) content.then(resolve, () => fail("is damaged"));
        else fail("is damaged");
      };
      script.onerror = () => { script.remove(); fail("is missing"); };
      script.src = path;
      document.head.append(script);
    }));
    if (loading.size > KEPT) loading.delete([...loading.keys()][1]); // the first one is the index
  }
  return loading.get(path);
}

/* The first entry of each list, and the end of the last one. */
function offsets(lengths) {
  const starts = new Uint32Array(lengths.length + 1);
  for (let at = 0; at < lengths.length; at++) starts[at + 1] = starts[at] + lengths[at];
  return starts;
}

/* ---- what the page knows, once the index is read ---- */
let facts, columns, words;

function takeIndex({ about, words: texts, arrays }) {
  facts = about;
  columns = arrays;
  words = { texts, ids: arrays.word, rows: arrays.word_rows, special: arrays.special, at: new Map() };
  arrays.word.forEach((id, at) => words.at.set(id, at));
}
const poleOf = (latent, sign) => latent * facts.sides + (sign < 0 ? 1 : 0);
const signs = () => facts.sides === 2 ? [-1, 1] : [1];
const firingsOf = latent => columns.firings[poleOf(latent, 1)] + (facts.sides === 2 ? columns.firings[poleOf(latent, -1)] : 0);
const shareOf = (latent, sign) => columns.share[poleOf(latent, sign)] / facts.shares;
const weakerShare = latent => facts.sides === 2 ? Math.min(shareOf(latent, 1), shareOf(latent, -1)) : 0;
const f1Of = (latent, sign) => columns.f1[poleOf(latent, sign)] / facts.shares;
const cosineOf = latent => columns.cosine[latent] / facts.shares; // with the most opposite latent
const oppositeOf = latent => columns.far[latent] - 1;
function listedOf(latent, sign) { // tokens that name a pole
  const poles = columns.firings.length, found = [];
  for (let n = 0; n * poles < columns.tokens.length; n++) {
    const token = columns.tokens[n * poles + poleOf(latent, sign)];
    if (token) found.push(token - 1);
  }
  return found;
}

/* Everything about one latent. */
async function cardOf(latent) {
  const number = Math.floor(latent / facts.per_shard);
  const shard = await load(`data/latents/${String(number).padStart(5, "0")}.js`);
  shard.starts ??= Object.fromEntries(Object.keys(shard.arrays).filter(name => name.endsWith(".lengths")).map(name => [name.slice(0, -8), offsets(shard.arrays[name])]));
  const dial = shard.dial?.[latent];
  return { latent, dial, poles: signs().map(sign => poleCard(shard, poleOf(latent - shard.first, sign), sign)) };
}
function poleCard(shard, pole, sign) {
  const { arrays, starts } = shard;
  const list = (name, ...members) => {
    const found = [];
    for (let at = starts[name][pole]; at < starts[name][pole + 1]; at++) found.push(Object.fromEntries(members.map(member => [member, arrays[`${name}.${member}`][at]])));
    return found;
  };
  const one = Object.fromEntries(["firings", "mass", "energy", "max", "mean", "q50", "q95", "share", "rule_f1"].map(name => [name, arrays[name][pole]]));
  const bins = arrays.hist.length / arrays.firings.length;
  return {
    ...one, sign,
    hist: arrays.hist.subarray(pole * bins, (pole + 1) * bins),
    on: list("on", "token", "count"), before: list("before", "token", "count"), after: list("after", "token", "count"),
    lens: list("lens", "token", "logit"),
    rule: [...arrays.rule.subarray(starts.rule[pole], starts.rule[pole + 1])],
    near: list("near", "latent", "cosine"), far: list("far", "latent", "cosine"),
    cofire: list("cofire", "latent", "sign", "jaccard", "lift"),
    drawn: [...arrays.drawn.subarray(4 * pole, 4 * pole + 4)],
    examples: examplesOf(shard, pole),
  };
}
function examplesOf({ arrays, starts }, pole) {
  const at = starts.example, found = [];
  starts.window ??= offsets(arrays["example.size"]);
  for (let n = at[pole]; n < at[pole + 1]; n++) {
    const [first, last] = [starts.window[n], starts.window[n + 1]];
    found.push({
      group: arrays["example.group"][n], value: arrays["example.value"][n], context: arrays["example.context"][n],
      position: arrays["example.position"][n], peak: arrays["example.before"][n],
      tokens: arrays["example.token"].subarray(first, last), values: arrays["example.values"].subarray(first, last),
    });
  }
  return found;
}
