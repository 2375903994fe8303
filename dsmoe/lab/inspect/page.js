"use strict";
// Everything on the page is drawn from the report that dsmoe.lab.inspect.report made. Nothing is fetched.

const report = JSON.parse(document.getElementById("report").textContent);
const models = report.models;

// Light to dark on paper, dark to light on a dark ground: lightness alone tells values apart, for every kind of sight.
const RAMPS = {
  light: ["#fbfbe2", "#e4f2bf", "#bfe3bb", "#85ccbb", "#4bb3c3", "#2590bf", "#2265a8", "#233a8e", "#0c1f5c"],
  dark: ["#1c2733", "#1f3a57", "#235278", "#2a6f8e", "#358d90", "#5aab88", "#94c77c", "#d0de7f", "#ffffb8"],
};
const darkness = matchMedia("(prefers-color-scheme: dark)");
const redraw = []; // functions that draw again when width or theme change

// ---------------------------------------------------------------- elements

function make(space, tag, attributes, children) {
  const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
const el = (tag, attributes, ...children) => make(null, tag, attributes, children);
const svg = (tag, attributes, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);

function drawn(draw, attributes) {
  const place = el("div", attributes);
  const again = () => { if (place.isConnected) place.replaceChildren(draw(Math.max(240, place.clientWidth))); };
  redraw.push(again);
  return place;
}

function card(title, note, ...children) {
  const found = el("section", { class: "card" }, el("h2", {}, title), note ? el("p", { class: "note" }, note) : null, ...children);
  document.getElementById("main").append(found);
  return found;
}

// One column for each model; its name above it where there are two.
function columns(draw) {
  return el("div", { class: "columns" }, ...models.map((model, place) =>
    el("div", {}, models.length > 1 ? el("div", { class: "model" }, title(model)) : null, ...[draw(model, place)].flat())));
}

// Side by side where there is room.
const tiles = (...parts) => el("div", { class: "columns" }, ...parts.map((part) => el("div", {}, ...[part].flat())));

function table(headings, rows) {
  const cell = (value) => (value instanceof Node ? el("td", { class: "words" }, value) : el("td", {}, value));
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, ...headings.map((text) => el("th", {}, text)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell))))));
}

// A choice of layer, and what is drawn for it.
function byLayer(model, draw) {
  const body = el("div");
  const choice = el("select", { "aria-label": "layer", onchange: () => fill() },
    ...model.layers.map((number, place) => el("option", { value: place }, `layer ${number}`)));
  choice.value = String(model.layers.length >> 1);
  const fill = () => { body.replaceChildren(...[draw(Number(choice.value))].flat()); refresh(); };
  body.append(...[draw(Number(choice.value))].flat());
  return [el("div", { class: "controls" }, el("label", {}, "layer", choice)), body];
}

// ---------------------------------------------------------------- numbers, words, colours

const largest = (values) => values.reduce((most, value) => Math.max(most, value), -Infinity); // of any number of them
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length);
const fixed = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const percent = (value, digits = 0) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)} %`);
const count = (value) => value.toLocaleString("en");
const short = (path) => path.split("/").filter(Boolean).slice(-2).join("/") || path;
const title = (model) => short(model.name) + (model.step === null ? "" : `, step ${count(model.step)}`);
const visible = (text) => (text === "" ? "⋯" : text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣"));

function mix(from, to, share) {
  const parts = [1, 3, 5].map((at) => {
    const [a, b] = [from, to].map((colour) => parseInt(colour.slice(at, at + 2), 16));
    return Math.round(a + (b - a) * share).toString(16).padStart(2, "0");
  });
  return `#${parts.join("")}`;
}

function colour(share) {
  const ramp = RAMPS[darkness.matches ? "dark" : "light"];
  const place = Math.min(1, Math.max(0, share)) * (ramp.length - 1);
  const low = Math.min(ramp.length - 2, Math.floor(place));
  return mix(ramp[low], ramp[low + 1], place - low);
}

function luminance(hex) {
  const [r, g, b] = [1, 3, 5].map((at) => {
    const value = parseInt(hex.slice(at, at + 2), 16) / 255;
    return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
const inkOn = (hex) => (luminance(hex) > 0.19 ? "#0b1117" : "#ffffff");
const gradient = () => `linear-gradient(90deg, ${RAMPS[darkness.matches ? "dark" : "light"].join(", ")})`;

// ---------------------------------------------------------------- charts

const text = (x, y, content, attributes) => svg("text", { x, y, ...attributes }, content);

function scale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

function ticks(low, high, most) {
  const rough = (high - low) / Math.max(1, most);
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-6; at++) found.push(Number((at * step).toPrecision(10)));
  return found;
}
const tickLabel = (value) => String(Number(value.toPrecision(6)));

function frame(width, height, label, ...children) {
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...children);
}

// Horizontal bars, each with its name before and its value behind it. rows: {name, value, label}; most: value of a bar
// as long as there is room
function bars(width, label, rows, most = 0) {
  const size = 24, left = Math.min(width * 0.42, 12 + 7 * Math.max(...rows.map((row) => row.name.length))), right = 92;
  const high = Math.max(1e-9, most, ...rows.map((row) => row.value));
  const x = scale(0, high, left, width - right);
  return frame(width, rows.length * size + 4, label, ...rows.flatMap((row, place) => {
    const y = place * size;
    return [
      text(left - 8, y + 16, row.name, { "text-anchor": "end" }),
      svg("rect", { class: "bar", x: left, y: y + 4, width: Math.max(1, x(row.value) - left), height: size - 8, rx: 2 }),
      text(x(row.value) + 6, y + 16, row.label, { class: "value" }),
    ];
  }));
}

// Points over x with a line through them. series: {name, points: [[x, y, label?, error?]], second, plain}
function lines(width, label, xTitle, yTitle, series, options = {}) {
  const height = options.height || 230, left = 46, right = options.right || 20, top = 22, bottom = 38;
  const points = series.flatMap((one) => one.points);
  const ys = points.flatMap(([, y, , error]) => [y - (error || 0), y + (error || 0)]);
  let [low, high] = options.range || [Math.min(...ys), Math.max(...ys)];
  if (!options.range) { const gap = (high - low) * 0.12 || Math.abs(high) * 0.1 || 1; low -= gap; high += gap; }
  const xs = points.map(([x]) => x);
  const x = scale(Math.min(...xs), Math.max(...xs), left + 12, width - right - 12), y = scale(low, high, height - bottom, top);
  const parts = [text(0, 10, yTitle), text(width, height - 4, xTitle, { "text-anchor": "end" })];
  for (const tick of ticks(low, high, 5)) {
    if (tick < low || tick > high) continue;
    parts.push(svg("line", { class: "axis", x1: left, x2: width - right, y1: y(tick), y2: y(tick), "stroke-width": tick === 0 ? 1.5 : 0.6 }));
    parts.push(text(left - 6, y(tick) + 4, tickLabel(tick), { "text-anchor": "end" }));
  }
  const xTicks = options.xTicks || ticks(Math.min(...xs), Math.max(...xs), Math.max(2, Math.floor(width / 90)));
  for (const tick of xTicks) parts.push(text(x(tick), height - bottom + 16, (options.xLabel || tickLabel)(tick), { "text-anchor": "middle" }));
  for (const one of series) {
    const second = one.second ? " second" : "";
    if (one.band) {
      const edge = [...one.band.map(([at, a]) => [at, a]), ...one.band.map(([at, , b]) => [at, b]).reverse()];
      parts.push(svg("polygon", { class: "band", points: edge.map(([at, value]) => `${x(at)},${y(value)}`).join(" ") }));
    }
    if (!one.plain) parts.push(svg("polyline", { class: one.second ? "second" : "line", points: one.points.map(([at, value]) => `${x(at)},${y(value)}`).join(" ") }));
    one.points.forEach(([at, value, name, error, below], place) => {
      if (error) parts.push(svg("line", { class: "error", x1: x(at), x2: x(at), y1: y(value - error), y2: y(value + error) }));
      parts.push(svg("circle", { class: `dot${second}`, cx: x(at), cy: y(value), r: 4 }));
      if (name) {
        const anchor = place === 0 ? "start" : place === one.points.length - 1 ? "end" : "middle";
        parts.push(text(x(at), y(value + (error && !below ? error : 0)) + (below ? 18 : -8), name, { class: "value", "text-anchor": anchor }));
      }
    });
    if (one.name) {
      const [at, value] = one.points[one.points.length - 1];
      parts.push(text(x(at) + 8, y(value) + 4, one.name, { class: one.second ? "second" : "value" }));
    }
  }
  return frame(width, height, label, ...parts);
}

// Cells in the colour of their value, with the value in them where there is room.
// rows: [name, [value, ...]]; options: low, high, digits, xTitle, tip(row, column, value)
function heat(width, label, rows, options) {
  const left = Math.min(width * 0.34, 14 + 7 * Math.max(...rows.map(([name]) => name.length))), top = 18;
  const number = rows[0][1].length, cell = (width - left - 4) / number;
  const high = Math.min(26, Math.max(rows.length > 40 ? 8 : 14, cell)), share = scale(options.low, options.high, 0, 1);
  const every = Math.max(1, Math.ceil(24 / cell));
  const parts = [];
  for (let column = 0; column < number; column += every)
    parts.push(text(left + (column + 0.5) * cell, 11, String(column), { "text-anchor": "middle" }));
  rows.forEach(([name, values], row) => {
    const y = top + row * high;
    if (high >= 12 || row % 4 === 0) parts.push(text(left - 6, y + high / 2 + 4, name, { "text-anchor": "end" }));
    values.forEach((value, column) => {
      const fill = value === null ? "none" : colour(share(value));
      const tip = svg("title", {}, options.tip(row, column, value));
      parts.push(svg("rect", { x: left + column * cell, y, width: Math.max(0.5, cell - (cell > 6 ? 1 : 0)), height: high - 1, fill }, tip));
      if (value !== null && cell >= 30 && high >= 14)
        parts.push(text(left + (column + 0.5) * cell, y + high / 2 + 4, fixed(value, options.digits), { "text-anchor": "middle", style: `fill: ${inkOn(fill)}; pointer-events: none` }));
    });
  });
  const end = top + rows.length * high;
  parts.push(text(left, end + 16, options.xTitle));
  return frame(width, end + 22, label, ...parts);
}

function legend(low, high, unit) {
  const bar = el("i");
  const again = () => { bar.style.background = gradient(); };
  redraw.push(again);
  return el("div", { class: "legend" }, el("span", {}, low), bar, el("span", {}, `${high} ${unit}`));
}

// ---------------------------------------------------------------- the text

const MODES = {
  experts: "experts of a token",
  effective: "effective experts of a token",
  loss: "loss of a token, nats",
};

function textCard() {
  const state = { layer: 0, mode: models[0].k === null ? "experts" : "effective", text: 0 };
  const layers = Math.max(...models.map((model) => model.layers.length));
  const label = el("output", { id: "layer-name", for: "layer" }, "all layers");
  const slider = el("input", { type: "range", id: "layer", min: 0, max: layers, value: 0, step: 1, oninput: () => { state.layer = Number(slider.value); paint(); } });
  const mode = el("select", { id: "mode", onchange: () => { state.mode = mode.value; paint(); } },
    ...Object.entries(MODES).map(([value, name]) => el("option", { value }, name)));
  mode.value = state.mode;
  const which = el("select", { id: "which", onchange: () => { state.text = Number(which.value); fill(); } },
    ...report.texts.map((one, place) => el("option", { value: place }, one.name)));
  const panes = models.map((model, place) => new Pane(model, place, state));
  const fill = () => { panes.forEach((pane) => pane.fill()); paint(); };
  const paint = () => {
    label.value = state.layer === 0 ? "all layers" : `layer ${models[0].layers[Math.min(state.layer, models[0].layers.length) - 1]}`;
    const [low, high] = bounds(panes, state);
    panes.forEach((pane) => pane.paint(low, high));
  };
  card("The text", "Hover, tap, or use the arrow keys: which experts a token took, with which weights, and how hard it was.",
    el("div", { class: "controls" },
      el("label", { for: "layer" }, "layer", slider, label),
      el("label", {}, "colour", mode),
      report.texts.length > 1 ? el("label", {}, "text", which) : null),
    el("div", { class: "columns" }, ...panes.map((pane) => pane.element)));
  fill();
  redraw.push(paint);
}

// Of the colours, the same for both models. A layer's begin at 0 experts; of means, of effective experts, and of losses
// but for the few largest, the range is used up.
function bounds(panes, { mode, layer }) {
  const known = panes.flatMap((pane) => pane.spans.map((span) => pane.value(Number(span.dataset.token)))).filter((value) => value !== null).sort((a, b) => a - b);
  const low = mode === "loss" || (layer > 0 && mode === "experts") ? 0 : known[0];
  let high = mode === "loss" ? known[Math.floor(0.95 * (known.length - 1))] : known[known.length - 1];
  if (layer > 0 && mode === "experts") high = largest(models.map((model) => largest(model.per_token.experts.map(largest))));
  return [low, high > low ? high : low + 1];
}

class Pane {
  constructor(model, place, state) {
    Object.assign(this, { model, state, chosen: null, pinned: false });
    this.body = el("div", {
      class: "text", tabindex: 0, id: `text-${place}`, role: "group", "aria-label": `tokens of ${title(model)}`,
      onpointerover: (event) => { if (!this.pinned && event.pointerType !== "touch") this.choose(event.target); },
      onclick: (event) => { if (event.target.dataset.token) { this.pinned = this.chosen !== event.target.dataset.token || !this.pinned; this.choose(event.target); } },
      onkeydown: (event) => this.step(event),
    });
    this.details = el("div", { class: "details", id: `details-${place}`, "aria-live": "polite" }, "No token chosen yet.");
    this.low = el("span"); this.high = el("span"); this.bar = el("i");
    this.element = el("div", {}, models.length > 1 ? el("div", { class: "model" }, title(model)) : null, this.body,
      el("div", { class: "legend" }, this.low, this.bar, this.high), el("div", { style: "height: .5rem" }), this.details);
  }

  fill() {
    const tokens = this.model.per_token, first = tokens.text.indexOf(this.state.text);
    this.spans = [];
    for (let at = first; at < tokens.text.length && tokens.text[at] === this.state.text; at++) {
      const shown = tokens.token[at].replaceAll("\n", "↵\n") || "⋯";
      this.spans.push(el("span", { "data-token": at }, shown));
    }
    this.body.replaceChildren(...this.spans);
    this.chosen = null; this.pinned = false;
    this.details.replaceChildren("No token chosen yet.");
  }

  // Of a token, in the layer that is chosen; of all layers the mean.
  value(at) {
    const { mode, layer } = this.state, tokens = this.model.per_token;
    if (mode === "loss") return tokens.loss[at];
    const columns = tokens[mode];
    return layer === 0 ? mean(columns.map((column) => column[at])) : columns[Math.min(layer, columns.length) - 1][at];
  }

  paint(low, high) {
    const values = this.spans.map((span) => this.value(Number(span.dataset.token)));
    const share = scale(low, high, 0, 1);
    this.spans.forEach((span, place) => {
      const fill = values[place] === null ? null : colour(share(values[place]));
      span.style.background = fill || "none";
      span.style.color = fill ? inkOn(fill) : "inherit";
    });
    this.low.textContent = fixed(low, 1);
    this.high.textContent = `${fixed(high, 1)}${this.state.mode === "loss" ? " or more" : ""} ${MODES[this.state.mode]}${this.state.mode !== "loss" && this.state.layer === 0 ? ", mean over layers" : ""}`;
    this.bar.style.background = gradient();
    if (this.chosen !== null) this.describe(Number(this.chosen));
  }

  choose(span) {
    if (!span.dataset || !span.dataset.token) return;
    this.body.querySelector(".chosen")?.classList.remove("chosen");
    span.classList.add("chosen");
    this.chosen = span.dataset.token;
    this.describe(Number(this.chosen));
  }

  step(event) {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const now = this.spans.findIndex((span) => span.dataset.token === this.chosen);
    const span = this.spans[Math.min(this.spans.length - 1, Math.max(0, now + move))];
    this.pinned = true;
    this.choose(span);
    span.scrollIntoView({ block: "nearest" });
  }

  describe(at) {
    const tokens = this.model.per_token, chosen = this.state.layer - 1;
    const heaviest = largest([1e-9, ...tokens.routes.flatMap((layer) => layer[at].map(([, weight]) => weight))]);
    const rows = this.model.layers.map((number, layer) => el("tr", { class: layer === chosen ? "chosen" : null },
      el("td", {}, `layer ${number}`), el("td", {}, String(tokens.experts[layer][at])),
      el("td", { class: "words" }, ...(tokens.routes[layer][at].length ? tokens.routes[layer][at].map(([expert, weight]) =>
        el("span", { class: "route" }, `expert ${expert}`, el("i", { style: `width: ${(1.2 * weight / heaviest).toFixed(2)}rem` }), fixed(weight)))
        : ["no expert"]))));
    if (chosen >= 0) rows.unshift(rows.splice(chosen, 1)[0]);
    this.details.replaceChildren(
      el("code", {}, visible(tokens.token[at])), ` ${tokens.kind[at]}, position ${tokens.position[at]}; its loss `,
      el("b", {}, tokens.loss[at] === null ? "unknown (nothing before it)" : `${fixed(tokens.loss[at])} nats`),
      ", of the next token ", el("b", {}, tokens.next_loss[at] === null ? "unknown" : `${fixed(tokens.next_loss[at])} nats`),
      el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, ""), el("th", {}, "experts"), el("th", { style: "text-align: left; white-space: normal" }, "which, with weight"))), el("tbody", {}, ...rows))));
  }
}

// ---------------------------------------------------------------- figures

function facts() {
  const header = document.querySelector("header");
  for (const model of models) {
    const found = [
      ["model", title(model)], ["router", model.router], ["experts a layer", model.num_experts], ["MoE layers", model.layers.length],
      ["tokens read", count(model.tokens)], ["loss", `${fixed(model.loss, 3)} nats`], ["experts a token", fixed(model.experts_per_token)],
    ];
    header.append(el("ul", { class: "facts" }, ...found.map(([name, value]) => el("li", {}, `${name} `, el("b", {}, String(value))))));
  }
}

function comparisonCard() {
  const found = report.comparison;
  if (!found) return;
  const [first, second] = models.map(title);
  const rows = [["loss, nats a token", fixed(models[0].loss, 4), fixed(models[1].loss, 4)],
    ["nats a character", fixed(models[0].nats_per_character, 4), fixed(models[1].nats_per_character, 4)],
    ["experts a token", fixed(models[0].experts_per_token), fixed(models[1].experts_per_token)],
    ["effective experts", fixed(models[0].effective_experts), fixed(models[1].effective_experts)],
    ["max / mean load, worst layer", ...models.map((model) => fixed(Math.max(...model.load.map((layer) => layer.max_over_mean || 0))))],
    ["dead experts", ...models.map((model) => String(model.load.reduce((sum, layer) => sum + layer.dead.length, 0)))]];
  if (found.same_tokens) {
    const interval = (entry) => `${fixed(entry.mean, 3)} (95 % ${fixed(entry.low, 3)} to ${fixed(entry.high, 3)})`;
    rows[0].push(interval(found.loss_difference)); rows[2].push(interval(found.experts_difference));
  }
  const width = found.same_tokens ? 4 : 3;
  rows.forEach((row) => { while (row.length < width) row.push(""); });
  const notes = found.same_tokens
    ? ["Differences are second minus first, over the same tokens; their intervals are for these texts, not for other seeds of the training."]
    : ["The two cut the texts into other tokens, so losses are compared by character."];
  if (found.experts_alike && found.experts_alike.rho !== null) notes.push(` How many experts a token has in one follows the other with a rank correlation of ${fixed(found.experts_alike.rho)}.`);
  card("The two side by side", notes.join(""), table(["", first, second, "difference"].slice(0, width), rows),
    found.same_tokens ? el("h3", {}, "Where the second loses or gains") : null,
    found.same_tokens ? drawn((w) => lines(w, "loss difference by difficulty", "tenth of the tokens, by loss in the first (easy to hard)", "loss, second minus first", [{ points: found.by_difficulty.map((entry, place) => [place + 1, entry.difference]) }], { xTicks: found.by_difficulty.map((_, place) => place + 1) })) : null);
}

function claim(model) {
  const found = model.hardness.next.experts;
  if (model.k !== null) return `Every token has ${model.k} experts, so their number cannot follow the loss. Effective experts, exp(entropy) of the weights, can.`;
  if (found.rho === null) return "Too few tokens, or all alike, to tell.";
  if (found.low <= 0 && found.high >= 0) return "These texts give no sign that harder tokens take more experts.";
  const said = `In these texts harder tokens take ${found.rho > 0 ? "more" : "fewer"} experts`, within = model.hardness.next.within_kind;
  if (within.rho === null) return `${said}.`;
  if (within.low <= 0 && within.high >= 0) return `${said}, but kinds of tokens explain it: inside a kind there is no sign of it.`;
  if (within.rho > 0 === found.rho > 0) return `${said}, inside kinds of tokens as well.`;
  return `${said}, but inside a kind of token it is the other way round: kinds explain it.`;
}

function hardnessCard() {
  const what = (model) => (model.k === null ? "experts" : "effective");
  // The same axis for both readings and both models.
  const ends = models.flatMap((model) => ["next", "own"].flatMap((which) => model.hardness[which].deciles.flatMap((group) => {
    const error = what(model) === "experts" ? group.error || 0 : 0;
    return [group[what(model)] - error, group[what(model)] + error];
  })));
  const gap = 0.12 * (Math.max(...ends) - Math.min(...ends)) || 0.5, range = [Math.max(0, Math.min(...ends) - gap), Math.max(...ends) + gap];
  const rho = (entry) => (entry.rho === null ? "rank correlation: none" : `rank correlation ${fixed(entry.rho)} (95 % ${fixed(entry.low)} to ${fixed(entry.high)}, ${count(entry.tokens)} tokens)`);
  card("Do harder tokens take more experts?", `Tokens in ten groups of equal size by their loss, easy to hard${models.every((model) => model.k !== null) ? "" : "; bars are standard errors"}. Intervals come from a block bootstrap (blocks of 16 tokens in a row).`,
    columns((model) => {
      const chart = (which, name) => [el("h3", {}, name), drawn((width) => lines(width, name, "tenth of the tokens, easy to hard", MODES[what(model)],
        [{ points: model.hardness[which].deciles.map((group, place) => [place + 1, group[what(model)], width > 420 || place % 3 === 0 ? fixed(group[what(model)]) : null, what(model) === "experts" ? group.error : null]) }],
        { range, xTicks: model.hardness[which].deciles.map((_, place) => place + 1) })), el("p", { class: "note" }, rho(model.hardness[which][what(model)])),
        model.k === null ? el("p", { class: "note" }, `inside kinds of tokens: ${rho(model.hardness[which].within_kind)}`) : null];
      return [el("p", { class: "claim" }, claim(model)), tiles(chart("next", "by the loss of the next token, which the position works at"),
        chart("own", "by the loss of the token itself: how much it surprised"))];
    }),
    models.every((model) => model.k !== null) ? null : columns((model) => {
      if (model.k !== null) return [];
      const kinds = Object.entries(model.hardness.next.by_kind).filter(([, entry]) => entry.rho !== null);
      const known = model.hardness.next.by_layer.map((entry, place) => [model.layers[place], entry]).filter(([, entry]) => entry.rho !== null);
      return [el("h3", {}, "rank correlation with the next token's loss, by layer and inside each kind of token"), table(["", "rho", "95 %", "tokens"], [
        ...known.map(([number, entry]) => [`layer ${number}`, fixed(entry.rho), `${fixed(entry.low)} to ${fixed(entry.high)}`, count(entry.tokens)]),
        ...kinds.map(([kind, entry]) => [kind, fixed(entry.rho), "", count(entry.tokens)])])];
    }));
}

function whereCard() {
  const value = (model) => (model.k === null ? "experts" : "effective");
  const byLayer = (model) => (model.k === null ? model.load.map((layer) => layer.experts_per_token) : model.effective_by_layer);
  const most = largest(models.flatMap((model) => [...byLayer(model), ...[...model.by_kind, ...model.by_position].map((row) => row[value(model)])]));
  card("Where experts go", "Experts per token by layer, kind of token and position in the window.", columns((model) => {
    const what = value(model), unit = model.k === null ? "experts" : "effective experts";
    const layers = byLayer(model).map((experts, place) => ({ name: `layer ${model.layers[place]}`, value: experts, label: fixed(experts) }));
    return tiles(
      [el("h3", {}, `${unit} by layer`), drawn((width) => bars(width, `${unit} by layer`, layers, most))],
      [el("h3", {}, `${unit} by kind of token`), drawn((width) => bars(width, `${unit} by kind`, model.by_kind.map((row) => ({ name: row.kind, value: row[what], label: `${fixed(row[what])} (${count(row.tokens)})` })), most))],
      [el("h3", {}, `${unit} by position`), drawn((width) => bars(width, `${unit} by position`, model.by_position.map((row) => ({ name: row.first === row.last ? `${row.first}` : `${row.first}–${row.last}`, value: row[what], label: fixed(row[what]) })), most))],
    );
  }));
}

function loadCard() {
  card("Load of the experts", "Tokens of each expert over the mean of its layer: 1 is even, 0 is an expert without a token of these texts. MaxVio is max/mean - 1; exp(H)/E is the effective share of experts.",
    columns((model) => {
      const rows = model.load.map((layer, place) => {
        const even = mean(layer.counts);
        return [`layer ${model.layers[place]}`, layer.counts.map((tokens) => (even ? tokens / even : 0))];
      });
      const high = Math.max(2, ...rows.flatMap(([, values]) => values));
      return [drawn((width) => heat(width, "load of experts", rows, { low: 0, high, digits: 1, xTitle: "expert", tip: (row, column, value) => `layer ${model.layers[row]}, expert ${column}: ${count(model.load[row].counts[column])} tokens, ${fixed(value)} of the mean` })),
        legend("0", fixed(high, 1), "times the mean load"), el("div", { style: "height: .6rem" }),
        table(["layer", "experts a token", "no expert", "max/mean", "MaxVio", "CV", "exp(H)/E", "dead"], model.load.map((layer, place) => [String(model.layers[place]), fixed(layer.experts_per_token), percent(layer.no_expert), fixed(layer.max_over_mean), fixed(layer.max_violation), fixed(layer.cv), fixed(layer.entropy), layer.dead.length ? `${layer.dead.length}: ${layer.dead.slice(0, 8).join(", ")}${layer.dead.length > 8 ? " …" : ""}` : "0"]))];
    }));
}

function specializationCard() {
  card("What experts are for", "Typical tokens: those that the expert takes more than its rate, with the share of their occurrences that it takes. Known: how much of whether it is active the token alone tells (0 to 1), and how much it seems to by chance.",
    columns((model) => byLayer(model, (layer) => {
      const special = model.specialization[layer];
      return el("div", { class: "experts" }, ...special.experts.map((expert, number) => el("div", {},
        el("div", {}, el("b", {}, `expert ${number}`), el("span", { class: "note" }, ` ${count(model.load[layer].counts[number])} tokens; known ${fixed(expert.vocabulary)}, by chance ${fixed(expert.vocabulary_chance)}`)),
        ...(expert.typical.length ? expert.typical.map((one) => el("span", { class: "word", title: `${one.count} occurrences` }, visible(one.token), el("small", {}, ` ${percent(one.share)}`))) : [el("span", { class: "note" }, "no token")]))));
    })));
  if (report.texts.length > 1) {
    card("Experts by text", "Of each text's tokens the share that an expert takes. Rows that look alike mean that routing does not see which text it reads.",
      columns((model) => byLayer(model, (layer) => {
        const rows = model.texts.map((one, place) => [one.name.slice(0, 18), model.specialization[layer].domains[place]]);
        const high = Math.max(0.01, ...rows.flatMap(([, values]) => values));
        return [drawn((width) => heat(width, "share of each text by expert", rows, { low: 0, high, digits: 2, xTitle: "expert", tip: (row, column, value) => `${rows[row][0]}, expert ${column}: ${percent(value, 1)}` })), legend("0", percent(high), "of the text's tokens")];
      })));
  }
}

function togetherCard() {
  card("Who works together", "Of the tokens of the expert in a row, the share that the expert in a column takes as well.",
    columns((model) => byLayer(model, (layer) => {
      const { together, pairs } = model.specialization[layer];
      const rows = together.map((row, first) => [String(first), row.map((both, second) => (first === second || !row[first] ? null : both / row[first]))]);
      return [drawn((width) => heat(Math.min(width, 520), "co-activation", rows, { low: 0, high: 1, digits: 2, xTitle: "expert", tip: (row, column, value) => (value === null ? `expert ${row}` : `${percent(value)} of the tokens of expert ${row} are taken by expert ${column} too`) })),
        legend("0", "100 %", "of the row's tokens"),
        el("h3", {}, "Most often together"), pairs.length ? table(["experts", "tokens", "of the first", "of the second"], pairs.slice(0, 5).map((pair) => [pair.experts.join(" + "), count(pair.tokens), percent(pair.of_first), percent(pair.of_second)])) : el("p", { class: "note" }, "No token has two experts here.")];
    })));
}

function redundancyCard() {
  card("Experts that do the same", "Every expert was applied to the same tokens; cells are the cosine of two experts' outputs. Above 0.9 a pair is one to merge; what a merge costs has to be measured.",
    columns((model) => {
      const merge = model.redundancy.flatMap((layer, place) => layer.merge.map((pair) => `layer ${model.layers[place]}: ${pair.join(" + ")}`));
      return [el("p", { class: "claim" }, merge.length ? `Pairs to merge: ${merge.slice(0, 12).join("; ")}${merge.length > 12 ? ` and ${merge.length - 12} more` : ""}.` : "No pair of experts is alike enough to merge."),
        ...byLayer(model, (layer) => {
          const found = model.redundancy[layer];
          if (!found.pairs.length) return el("p", { class: "note" }, "A layer of one expert has no pairs.");
          const rows = found.cosine.map((row, first) => [String(first), row.map((value, second) => (first === second ? null : value))]);
          return [drawn((width) => heat(Math.min(width, 520), "cosine of outputs", rows, { low: 0, high: 1, digits: 2, xTitle: "expert", tip: (row, column, value) => `experts ${row} and ${column}: ${fixed(value)}` })),
            legend("0", "1", "cosine of outputs"), el("h3", {}, "Most alike"),
            table(["experts", "outputs", "CKA", "weights", "tokens"], found.pairs.slice(0, 5).map((pair) => [pair.experts.join(" + "), fixed(pair.output_cosine), fixed(pair.output_cka), fixed(pair.weights), pair.tokens.map(count).join(" + ")])),
            el("p", { class: "note" }, `Random weights of that shape reach ${fixed(found.weights_chance)} in the column weights.`)];
        })];
    }));
}

function saturationCard() {
  if (!models.some((model) => model.saturation.length)) return;
  card("When routing settled", "Routes that an earlier checkpoint shares with the last one: saturation, over the routes of the last; Jaccard, over the routes of either. Mean over layers, and saturation's range over layers.",
    columns((model) => {
      const of = (entry, name) => entry.layers.map((layer) => layer[name]).filter((value) => value !== null);
      const earlier = model.saturation.filter((entry) => of(entry, "saturation").length);
      if (!earlier.length) return el("p", { class: "note" }, "No earlier checkpoint with which routes could be compared.");
      const points = (name) => [...earlier.map((entry) => [entry.step, mean(of(entry, name))]), [model.step, 1]];
      const band = [...earlier.map((entry) => [entry.step, Math.min(...of(entry, "saturation")), Math.max(...of(entry, "saturation"))]), [model.step, 1, 1]];
      const last = earlier[earlier.length - 1];
      return [drawn((width) => lines(width, "saturation of routing", "step", "share of routes", [{ points: points("saturation"), band }, { points: points("jaccard"), second: true }],
        { range: [0, 1.05], xTicks: width > 380 ? [...earlier.map((entry) => entry.step), model.step] : [earlier[0].step, model.step] })),
      el("p", { class: "note" }, el("span", { style: "color: var(--mark); font-weight: 600" }, "● saturation "), fixed(mean(of(last, "saturation"))), el("span", { style: "color: var(--other); font-weight: 600" }, "  ● Jaccard "), fixed(mean(of(last, "jaccard"))), ` at step ${count(last.step)}`)];
    }));
}

function sweepCard() {
  if (!models.some((model) => model.sweeps.length)) return;
  card("Fewer or more experts at inference", "Each setting on the same tokens. A setting that is the router's own option changes what it chooses; others drop routes that it chose.",
    columns((model) => model.sweeps.flatMap((sweep) => {
      const name = (entry) => (entry.trained ? "as trained" : `${sweep.name}=${Number(entry.value.toPrecision(3))}`);
      const sorted = [...sweep.settings].sort((a, b) => a.experts_per_token - b.experts_per_token);
      const command = `dsmoe export ${model.name} OUT --set ${sweep.name}=VALUE`;
      return [el("h3", {}, `${sweep.name}, ${sweep.is_option ? "the router's own option" : "dropping routes"}`),
        drawn((width) => lines(width, `sweep of ${sweep.name}`, "experts a token", "loss, nats", [{ points: sorted.map((entry, place) => [entry.experts_per_token, entry.loss, width > 420 || place === 0 || entry.trained ? name(entry) : null, 0, place % 2 === 1]) }])),
        table(["setting", "experts a token", "loss", "against trained"], sweep.settings.map((entry) => [name(entry), fixed(entry.experts_per_token), fixed(entry.loss, 4), entry.trained ? "" : `${entry.loss >= sweep.settings[0].loss ? "+" : ""}${fixed(entry.loss - sweep.settings[0].loss, 4)}`])),
        sweep.is_option && model.kind === "run" ? el("p", { class: "note" }, "An export with one of them: ", el("code", {}, command)) : null];
    })));
}

// ---------------------------------------------------------------- the page

function refresh() { redraw.forEach((again) => again()); }

facts();
comparisonCard();
textCard();
hardnessCard();
whereCard();
loadCard();
specializationCard();
togetherCard();
redundancyCard();
saturationCard();
sweepCard();
document.getElementById("main").append(el("p", { class: "note" }, `Made by dsmoe ${report.dsmoe} inspect. Figures are of these texts alone: ${report.texts.map((one) => one.name).join(", ")}. Definitions and sources: docs/inspect.md.`));
refresh();
darkness.addEventListener("change", refresh);
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; refresh(); } });
