"use strict";
// What the tabs share: data, elements, numbers, tooltip. All text goes through textContent.

const COLORS = ["#2f6fb2", "#d9772b", "#3a9a5c", "#b8405e", "#7b5ea7", "#8a6d3b", "#3aa6a6", "#6b6b6b"];
const EMBEDDED = JSON.parse(document.getElementById("data").textContent);
const state = { runs: [], hidden: new Set(), tab: "Curves" };
const tabs = {}; // name -> {open(place), update()}

async function load(path) {
  if (EMBEDDED) {
    const [plain] = path.split("?");
    if (!(plain in EMBEDDED)) throw new Error("this exported page does not contain it");
    return EMBEDDED[plain];
  }
  const response = await fetch("data/" + path);
  if (!response.ok) throw new Error((await response.text()).trim());
  return response.json();
}

function el(tag, properties, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name === "style") Object.assign(made.style, value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const byId = (id) => document.getElementById(id);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const isNumber = (value) => typeof value === "number" && isFinite(value);

function number(value, digits = 4) {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : String(value);
  if (Number.isInteger(value)) return Math.abs(value) < 1e6 ? String(value) : value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(digits - 2);
  return String(Number(value.toPrecision(digits)));
}

function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  const s = Math.max(0, Math.round(seconds)), m = Math.floor(s / 60), h = Math.floor(m / 60);
  return h ? `${h} h ${m % 60} min` : m ? `${m} min ${s % 60} s` : `${s} s`;
}

// A token's text with marks for what cannot be seen.
const visible = (text) => String(text).replace(/\n/g, "↵").replace(/\t/g, "⇥");

function tip(event, text) {
  const box = byId("tip");
  box.textContent = text;
  box.hidden = false;
  const wide = box.offsetWidth, high = box.offsetHeight;
  box.style.left = `${clamp(event.clientX + 14, 0, innerWidth - wide - 4)}px`;
  const below = event.clientY + 18, above = event.clientY - high - 10;
  box.style.top = `${below + high > innerHeight ? above : below}px`;
}

const hideTip = () => {
  byId("tip").hidden = true;
};

function table(heads, rows) {
  const cells = heads.map((h) => (h instanceof Node ? el("th", {}, h) : el("th", { textContent: h })));
  const head = el("tr", {}, ...cells);
  return el("div", { className: "wide" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
}

function row(cells, properties = {}) {
  return el("tr", properties, ...cells.map((cell) => {
    if (cell instanceof Node) return el("td", {}, cell);
    if (typeof cell === "number") return el("td", { textContent: number(cell), className: "n" });
    return el("td", { textContent: cell });
  }));
}

function choice(label, values, value, change) {
  const select = el("select", { ariaLabel: label, onchange: () => change(select.value) });
  for (const [name, shown] of values) {
    const selected = String(name) === String(value);
    select.append(el("option", { value: name, textContent: shown, selected }));
  }
  return el("label", {}, label + " ", select);
}

function toggle(label, on, change) {
  const box = el("input", { type: "checkbox", checked: on, onchange: () => change(box.checked) });
  return el("label", {}, box, " " + label);
}

// A field for a step with buttons to the step before and after, over the steps that exist.
function stepChoice(steps, step, change) {
  const nearest = (wanted) =>
    steps.reduce((best, s) => (Math.abs(s - wanted) < Math.abs(best - wanted) ? s : best));
  const at = steps.indexOf(nearest(step)); // a rollback may have removed the step
  const go = (where) => change(steps[clamp(where, 0, steps.length - 1)]);
  const range = { min: steps[0], max: steps.at(-1) };
  const field = el("input", { type: "number", value: step, ariaLabel: "Step", ...range });
  field.onchange = () => change(nearest(Number(field.value)));
  const there = `  ${steps.length} steps, ${steps[0]} to ${steps.at(-1)}`;
  return el("span", {},
    el("label", {}, "Step ", field), " ",
    el("button", { textContent: "‹", ariaLabel: "Step before", onclick: () => go(at - 1) }), " ",
    el("button", { textContent: "›", ariaLabel: "Step after", onclick: () => go(at + 1) }), " ",
    el("button", { textContent: "Newest", onclick: () => go(steps.length - 1) }),
    el("span", { className: "note", textContent: there }));
}

function runChoice(at, change) {
  if (state.runs.length < 2) return null;
  const names = state.runs.map((run, i) => [i, run.name]);
  return choice("Run", names, at, (value) => change(Number(value)));
}

const nothing = (line) => el("p", { className: "empty", textContent: line });
const bold = (content) => el("b", { textContent: content });
const chip = (color) => el("i", { className: "chip", style: { background: color } });

// Shows the parts that `make` returns, unless a later call for the same element has begun meanwhile.
async function shown(into, make) {
  const call = (into.call = {});
  const failed = (error) => [nothing(`This cannot be shown: ${error.message}`)];
  const parts = await make().catch(failed);
  if (into.call === call) into.replaceChildren(...parts);
}

// Returns the bar of a tab that shows one step of a run.
function stepBar(steps, ...children) {
  return el("div", { className: "bar", id: "bar", "data-newest": steps.at(-1) }, ...children);
}

// Replaces the bar if the run has new steps, unless someone uses it. What the tab shows stays. A tab that
// shows no step is shown anew.
function renewBar(steps, make, show) {
  const bar = byId("bar");
  if (!bar || !steps?.length) return show();
  if (bar.dataset.newest === String(steps.at(-1)) || bar.contains(document.activeElement)) return;
  bar.replaceWith(make(steps));
}
