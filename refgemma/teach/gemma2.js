// Gemma 2 in JavaScript: one text, float32, no library. The order is that of refgemma's ops.py, layers.py and
// model.py. `refgemma check` checks the trace that this program writes (tests/browser/test_live_page.py).
//
// An array is a Float32Array in row-major order; the comments give its axes. `settings` has the numbers of the model,
// and the switches that introduce bugs.
"use strict";

// --- operations -------------------------------------------------------------------------------------------------------

/** Project: (seq, in) with a weight (out, in) to (seq, out). Sums are float64 and are rounded once. */
function linear(x, weight, seq) {
  const width = x.length / seq, out = weight.length / width, y = new Float32Array(seq * out);
  for (let s = 0; s < seq; s++) {
    for (let o = 0; o < out; o++) y[s * out + o] = dot(x, s * width, weight, o * width, width);
  }
  return y;
}

/** The product of two rows. Four sums side by side do not wait for each other. */
function dot(x, a, y, b, length) {
  let p = 0, q = 0, r = 0, t = 0, i = 0;
  for (; i + 3 < length; i += 4) {
    p += x[a + i] * y[b + i];
    q += x[a + i + 1] * y[b + i + 1];
    r += x[a + i + 2] * y[b + i + 2];
    t += x[a + i + 3] * y[b + i + 3];
  }
  for (; i < length; i++) p += x[a + i] * y[b + i];
  return p + q + (r + t);
}

/** Divide each row by its root mean square, then multiply by 1 + weight. */
function rmsNorm(x, weight, settings) {
  const width = weight.length, y = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += width) {
    let squares = 0;
    for (let i = 0; i < width; i++) squares += x[start + i] ** 2;
    const factor = 1 / Math.sqrt(squares / width + settings.eps);
    for (let i = 0; i < width; i++) y[start + i] = x[start + i] * factor * (settings.normOffset + weight[i]);
  }
  return y;
}

/** Cosines and sines of the angles position * theta ** (-2 i / headDim): two arrays (seq, headDim), each angle twice. */
function rotaryTables(positions, settings) {
  const { headDim, theta } = settings, cos = [], sin = [];
  for (const position of positions) {
    for (let i = 0; i < headDim; i++) {
      const frequency = Math.fround(1 / Math.fround(theta ** ((2 * (i % (headDim / 2))) / headDim)));
      const angle = Math.fround((position + settings.firstPosition) * frequency);
      cos.push(Math.cos(angle));
      sin.push(Math.sin(angle));
    }
  }
  return [Float32Array.from(cos), Float32Array.from(sin)];
}

/** Rotate each pair (x[i], x[i + headDim / 2]) of (heads, seq, headDim) by its angle. */
function rotate(x, cos, sin, settings) {
  const { headDim, neighbours } = settings, half = headDim / 2, y = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += headDim) {
    const table = start % cos.length; // all heads have the same angles
    for (let pair = 0; pair < half; pair++) {
      const [a, b] = neighbours ? [start + 2 * pair, start + 2 * pair + 1] : [start + pair, start + pair + half];
      y[a] = x[a] * cos[table + pair] - x[b] * sin[table + pair];
      y[b] = x[b] * cos[table + pair] + x[a] * sin[table + pair];
    }
  }
  return y;
}

/** Limit smoothly to plus and minus cap: cap * tanh(x / cap). Without a cap, return x. */
function softCap(x, cap) {
  return cap === null ? x : x.map((value) => cap * Math.tanh(value / cap));
}

/** The tanh form of GELU; SiLU is what Llama uses. */
function activation(x, settings) {
  if (settings.silu) return x.map((value) => value / (1 + Math.exp(-value)));
  return x.map((v) => 0.5 * v * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (v + 0.044715 * v ** 3))));
}

/** True if a query may see a key: its own place and before; in a sliding layer, only the last `window` keys. */
function mayBeSeen(query, key, sliding, settings) {
  return key <= query && (!sliding || key > query - settings.window);
}

// --- a block ----------------------------------------------------------------------------------------------------------

/** Reshape (seq, heads * headDim) to (heads, seq, headDim). */
function splitHeads(x, seq, headDim) {
  const heads = x.length / seq / headDim, y = new Float32Array(x.length);
  for (let h = 0; h < heads; h++) {
    for (let s = 0; s < seq; s++) {
      y.set(x.subarray((s * heads + h) * headDim, (s * heads + h + 1) * headDim), (h * seq + s) * headDim);
    }
  }
  return y;
}

/** Append the new keys or values (heads, seq, headDim) to the past ones. */
function extend(past, fresh, heads) {
  if (!past) return fresh;
  const y = new Float32Array(past.length + fresh.length), old = past.length / heads, added = fresh.length / heads;
  for (let h = 0; h < heads; h++) {
    y.set(past.subarray(h * old, (h + 1) * old), h * (old + added));
    y.set(fresh.subarray(h * added, (h + 1) * added), h * (old + added) + old);
  }
  return y;
}

/** Mix the values of all visible tokens: softmax(mask(cap(scale * q k))) v, projected back to `hidden`. */
function attention(x, weights, past, call) {
  const { seq, start, cos, sin, settings, sliding, record } = call, { headDim, heads, kvHeads } = settings;
  const keys = start + seq;
  const q = splitHeads(linear(x, weights.q_proj, seq), seq, headDim);
  const k = splitHeads(linear(x, weights.k_proj, seq), seq, headDim);
  const v = splitHeads(linear(x, weights.v_proj, seq), seq, headDim);
  const qRot = rotate(q, cos, sin, settings), kRot = rotate(k, cos, sin, settings);
  const present = { keys: extend(past?.keys, kRot, kvHeads), values: extend(past?.values, v, kvHeads) };

  const owner = (h) => (settings.tiledHeads ? h % kvHeads : Math.floor(h / (heads / kvHeads))); // of a query head
  const scores = new Float32Array(heads * seq * keys);
  for (let h = 0; h < heads; h++) {
    for (let s = 0; s < seq; s++) {
      const query = (h * seq + s) * headDim, row = (h * seq + s) * keys, first = owner(h) * keys * headDim;
      for (let j = 0; j < keys; j++) {
        scores[row + j] = dot(qRot, query, present.keys, first + j * headDim, headDim) * settings.scale;
      }
    }
  }
  const capped = softCap(scores, settings.attentionCap);
  const probs = new Float32Array(heads * seq * keys);
  const mixed = new Float32Array(seq * heads * headDim); // (seq, heads, headDim): the heads side by side
  for (let h = 0; h < heads; h++) {
    for (let s = 0; s < seq; s++) {
      const row = (h * seq + s) * keys, to = (s * heads + h) * headDim, first = owner(h) * keys;
      const visible = [];
      for (let j = 0; j < keys; j++) if (mayBeSeen(start + s, j, sliding, settings)) visible.push(j);
      const largest = visible.reduce((most, j) => Math.max(most, capped[row + j]), -Infinity);
      const sum = visible.reduce((total, j) => total + Math.exp(capped[row + j] - largest), 0);
      for (const j of visible) {
        const share = Math.exp(capped[row + j] - largest) / sum, value = (first + j) * headDim;
        probs[row + j] = share;
        for (let i = 0; i < headDim; i++) mixed[to + i] += share * present.values[value + i];
      }
    }
  }
  const out = linear(mixed, weights.o_proj, seq);

  record("attention.q", [heads, seq, headDim], q);
  record("attention.k", [kvHeads, seq, headDim], k);
  record("attention.v", [kvHeads, seq, headDim], v);
  record("attention.q_rot", [heads, seq, headDim], qRot);
  record("attention.k_rot", [kvHeads, seq, headDim], kRot);
  record("attention.scores", [heads, seq, keys], scores);
  record("attention.capped", [heads, seq, keys], capped);
  record("attention.probs", [heads, seq, keys], probs);
  record("attention.mixed", [seq, heads * headDim], mixed);
  record("attention.out", [seq, out.length / seq], out);
  return { out, present };
}

/** The gated feed-forward layer: down(gelu(gate(x)) * up(x)). */
function feedForward(x, weights, { seq, settings, record }) {
  const gate = linear(x, weights.gate_proj, seq), up = linear(x, weights.up_proj, seq);
  const gelu = activation(gate, settings);
  const product = gelu.map((value, i) => value * up[i]);
  const out = linear(product, weights.down_proj, seq);
  for (const [name, value] of Object.entries({ gate, up, gelu, product, out })) {
    record(`feed_forward.${name}`, [seq, value.length / seq], value);
  }
  return out;
}

/** One layer: middle = hidden + norm(attention(norm(hidden))), out = middle + norm(feedForward(norm(middle))). */
function block(hidden, weights, past, call) {
  const { seq, settings, record } = call, width = hidden.length / seq;
  const keep = (name, value) => { record(name, [seq, width], value); return value; };
  const norm = (name, x) => keep(name, rmsNorm(x, weights[name], settings));

  const attended = attention(norm("input_layernorm", hidden), weights, past, call);
  const first = norm("post_attention_layernorm", attended.out);
  const middle = keep("middle", hidden.map((value, i) => value + first[i]));

  const fed = feedForward(norm("pre_feedforward_layernorm", middle), weights, call);
  const second = norm("post_feedforward_layernorm", fed);
  const out = keep("out", middle.map((value, i) => value + second[i]));
  return { out, present: attended.present };
}

// --- the model --------------------------------------------------------------------------------------------------------

/** Return the logits of token ids. `cache` has a pair (keys, values) per layer, for the `start` tokens before them. */
function forward(ids, weights, settings, cache = [], start = 0) {
  const seq = ids.length, trace = new Map(), present = [], { hidden } = settings;
  const record = (name, shape, data) => trace.set(name, { shape: [1, ...shape], data });
  const positions = ids.map((_, i) => start + i);
  const [cos, sin] = rotaryTables(positions, settings);
  record("cos", [1, seq, settings.headDim], cos);
  record("sin", [1, seq, settings.headDim], sin);

  let stream = new Float32Array(seq * hidden);
  ids.forEach((id, s) => stream.set(weights.embed_tokens.subarray(id * hidden, (id + 1) * hidden), s * hidden));
  stream = stream.map((value) => value * settings.embedScale);
  record("embedded", [seq, hidden], stream);

  weights.layers.forEach((layer, n) => {
    const sliding = settings.sliding[n];
    const call = { seq, start, cos, sin, settings, sliding, record: (name, ...rest) => record(`layers.${n}.${name}`, ...rest) };
    const made = block(stream, layer, cache[n], call);
    stream = made.out;
    present.push(made.present);
  });
  const norm = rmsNorm(stream, weights.norm, settings);
  const raw = linear(norm, weights.embed_tokens, seq);
  const logits = softCap(raw, settings.finalCap);
  record("norm", [seq, hidden], norm);
  record("raw_logits", [seq, settings.vocab], raw);
  record("logits", [seq, settings.vocab], logits);
  return { trace, logits: logits.subarray((seq - 1) * settings.vocab), cache: present, length: start + seq };
}

/** The settings of a configuration (config.json), without bugs. */
function rightSettings(config) {
  const layers = [...Array(config.num_hidden_layers).keys()];
  return {
    hidden: config.hidden_size, vocab: config.vocab_size, heads: config.num_attention_heads,
    kvHeads: config.num_key_value_heads, headDim: config.head_dim, eps: config.rms_norm_eps, normOffset: 1,
    embedScale: Math.fround(Math.sqrt(config.hidden_size)), scale: config.query_pre_attn_scalar ** -0.5,
    attentionCap: config.attn_logit_softcapping, finalCap: config.final_logit_softcapping,
    window: config.sliding_window, sliding: layers.map((n) => n % 2 === 0), theta: config.rope_theta,
    firstPosition: 0, neighbours: false, tiledHeads: false, silu: false,
  };
}

/** Known bugs of ports: refgemma's name, a description, and the settings that cause it. */
const BUGS = {
  "attn-softcap-missing": ["no soft cap of scores", () => ({ attentionCap: null })],
  "final-softcap-missing": ["no soft cap of logits", () => ({ finalCap: null })],
  "scale-head-dim": ["scores divided by √head_dim", (s) => ({ scale: s.headDim ** -0.5 })],
  "gqa-tile": ["key heads in the order 0 1 0 1", () => ({ tiledHeads: true })],
  "norm-without-one": ["norms multiply by w, not 1 + w", () => ({ normOffset: 0 })],
  "embed-scale-missing": ["the embedding is not scaled", () => ({ embedScale: 1 })],
  "rope-interleaved": ["rotation of adjacent pairs", () => ({ neighbours: true })],
  "rope-theta-1e6": ["rotation with theta 1000000", () => ({ theta: 1e6 })],
  "rope-position-from-1": ["positions count from 1", () => ({ firstPosition: 1 })],
  "swa-window-plus-one": ["a window one token too wide", (s) => ({ window: s.window + 1 })],
  "swa-layer-parity-swapped": ["full layers first, sliding layers second", (s) => ({ sliding: s.sliding.map((x) => !x) })],
  "swa-all-global": ["all layers are global", (s) => ({ sliding: s.sliding.map(() => false) })],
  "silu-instead-of-gelu": ["SiLU instead of GELU", () => ({ silu: true })],
};

// --- text -------------------------------------------------------------------------------------------------------------

/** Token ids of a text: <bos>, then characters; the pair with the highest score is merged until no pair is left. */
function encode(text, pieces, scores) {
  const number = new Map(pieces.map((piece, id) => [piece, id]));
  const parts = [...text.replaceAll(" ", "▁")];
  for (;;) {
    let best = -1, score = -Infinity;
    for (let i = 0; i + 1 < parts.length; i++) {
      const id = number.get(parts[i] + parts[i + 1]);
      if (id !== undefined && scores[id] !== null && scores[id] > score) [best, score] = [i, scores[id]];
    }
    if (best < 0) break;
    parts.splice(best, 2, parts[best] + parts[best + 1]);
  }
  const bytes = (part) => [...new TextEncoder().encode(part.replaceAll("▁", " "))]
    .map((byte) => number.get(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`));
  return [2, ...parts.flatMap((part) => (scores[number.get(part)] ?? null) !== null ? [number.get(part)] : bytes(part))];
}

/** The text of token ids. */
function decode(ids, pieces) {
  const bytes = [];
  for (const id of ids) {
    const byte = /^<0x(..)>$/.exec(pieces[id]);
    if (byte) bytes.push(parseInt(byte[1], 16));
    else if (!/^<(bos|eos|pad)>$/.test(pieces[id])) bytes.push(...new TextEncoder().encode(pieces[id].replaceAll("▁", " ")));
  }
  return new TextDecoder().decode(new Uint8Array(bytes));
}

/** Probabilities of logits, at a temperature. */
function softmax(logits, temperature = 1) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  const shares = logits.map((z) => Math.exp((z - largest) / temperature)), sum = shares.reduce((a, b) => a + b);
  return shares.map((share) => share / sum);
}

/** A random number between 0 and 1 from a seed and a step (mulberry32), so that two runs draw alike. */
function draw(seed, step) {
  let t = (seed * 7919 + step * 0x6d2b79f5) | 0;
  t = Math.imul(t ^ (t >>> 15), t | 1);
  t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
  return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
}

/** The next token: the most likely at temperature 0, otherwise drawn from the 40 most likely. */
function choose(logits, temperature, random) {
  const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a]).slice(0, 40);
  if (!temperature) return order[0];
  const shares = softmax(order.map((id) => logits[id]), temperature);
  let sum = 0;
  return order[shares.findIndex((share) => (sum += share) > random)] ?? order[0];
}

// --- files ------------------------------------------------------------------------------------------------------------

/** Read a safetensors file of bfloat16 numbers: the weights, by their short names. */
function readWeights(buffer, config) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const read = (name) => {
    const [begin, end] = header[name].data_offsets, halves = new Uint16Array(buffer.slice(8 + length + begin, 8 + length + end));
    const words = Uint32Array.from(halves, (half) => half << 16); // bfloat16 is the upper half of float32
    return new Float32Array(words.buffer);
  };
  const layer = (n) => {
    const names = Object.keys(header).filter((name) => name.startsWith(`model.layers.${n}.`));
    return Object.fromEntries(names.map((name) => [name.split(".").at(-2), read(name)]));
  };
  return {
    embed_tokens: read("model.embed_tokens.weight"), norm: read("model.norm.weight"),
    layers: [...Array(config.num_hidden_layers).keys()].map(layer),
  };
}

/** Write a trace as a safetensors file that `refgemma check` reads. */
function writeTrace(ids, trace) {
  const tensors = [["input_ids", "I64", [1, ids.length], BigInt64Array.from(ids, BigInt)],
    ...[...trace].map(([name, { shape, data }]) => [name, "F32", shape, data])];
  let offset = 0;
  const header = { __metadata__: { format: "refgemma-trace/1", dtype: "float32", implementation: "gemma2.js" } };
  for (const [name, dtype, shape, data] of tensors) {
    header[name] = { dtype, shape, data_offsets: [offset, offset + data.byteLength] };
    offset += data.byteLength;
  }
  let text = JSON.stringify(header);
  text += " ".repeat((8 - (text.length % 8)) % 8);
  const file = new Uint8Array(8 + text.length + offset);
  new DataView(file.buffer).setBigUint64(0, BigInt(text.length), true);
  file.set(new TextEncoder().encode(text), 8);
  let at = 8 + text.length;
  for (const [, , , data] of tensors) {
    file.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
    at += data.byteLength;
  }
  return file;
}

// --- the worker -------------------------------------------------------------------------------------------------------

let model = null; // {weights, config, pieces, scores}

const answers = {
  load({ weights, config, pieces, scores }) {
    model = { weights: readWeights(weights, config), config, pieces, scores };
    return { bugs: Object.entries(BUGS).map(([name, [text]]) => [name, text]), settings: rightSettings(config) };
  },
  run({ text, bug, changes }) {
    const began = performance.now(), ids = limit(encode(text, model.pieces, model.scores));
    const settings = settingsOf(bug, changes), unchanged = settingsOf("");
    const made = forward(ids, model.weights, settings), { trace } = made, milliseconds = performance.now() - began;
    const right = JSON.stringify(settings) === JSON.stringify(unchanged) ? made : forward(ids, model.weights, unchanged);
    const [shares, rightShares] = [made, right].map(({ logits }) => softmax(logits));
    const [order, [best]] = [shares, rightShares].map((p) => [...p.keys()].sort((a, b) => p[b] - p[a]).slice(0, 10));
    const layers = [...model.weights.layers.keys()];
    return {
      ids, tokens: ids.map((id) => model.pieces[id]), milliseconds,
      differs: differ(trace.get("logits").data, right.trace.get("logits").data),
      best: [model.pieces[best], rightShares[best]],
      next: order.map((id) => [model.pieces[id], shares[id], rightShares[id]]),
      windows: layers.map((n) => (settings.sliding[n] ? settings.window : null)),
      probs: layers.map((n) => trace.get(`layers.${n}.attention.probs`).data),
      streams: [trace.get("embedded").data, ...layers.map((n) => trace.get(`layers.${n}.out`).data)].map((x) => {
        const width = x.length / ids.length;
        return ids.map((_, s) => Math.sqrt(x.subarray(s * width, (s + 1) * width).reduce((a, v) => a + v * v, 0) / width));
      }),
    };
  },
  *story({ text, bug, changes, temperature, seed, count }) {
    let ids = limit(encode(text, model.pieces, model.scores));
    const settings = settingsOf(bug, changes), all = [...ids];
    let step = { cache: [], length: 0 };
    yield { text: decode(all, model.pieces), tokens: 0 };
    for (let n = 0; n < count && all.length < model.config.max_position_embeddings; n++) {
      step = forward(ids, model.weights, settings, step.cache, step.length);
      const next = choose(step.logits, temperature, draw(seed, n));
      if (next === model.config.eos_token_id) break;
      all.push(next);
      ids = [next];
      yield { text: decode(all, model.pieces), tokens: n + 1 };
    }
  },
  trace({ text, bug, changes }) {
    const ids = limit(encode(text, model.pieces, model.scores));
    return { file: writeTrace(ids, forward(ids, model.weights, settingsOf(bug, changes)).trace) };
  },
};

/**
 * True if two models differ in a logit by more than rounding. Rounding changes a logit by up to 3e-5 (positions from 1,
 * 320 tokens); the smallest effect of a bug is 2e-3 (no cap of scores, "A king").
 */
function differ(logits, others) {
  return logits.some((value, i) => Math.abs(value - others[i]) > 2e-4);
}

function limit(ids) {
  return ids.slice(0, model.config.max_position_embeddings);
}

function settingsOf(bug, changes = {}) {
  const settings = { ...rightSettings(model.config), ...changes };
  return bug ? { ...settings, ...BUGS[bug][1](settings) } : settings;
}

// A story waits for messages after every token, so that a newer task can replace it.
const newest = {};
globalThis.onmessage = async ({ data }) => {
  const { job, task, lane = task } = data;
  newest[lane] = job;
  const made = answers[task](data);
  if (made?.[Symbol.iterator] && task === "story") {
    for (const part of made) {
      postMessage({ job, lane, ...part });
      await new Promise((resume) => setTimeout(resume));
      if (newest[lane] !== job) return;
    }
    postMessage({ job, lane, done: true });
  } else postMessage({ job, lane, ...made });
};
