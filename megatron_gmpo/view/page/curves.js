// The tab Curves: one uPlot chart a panel.

const curves = {
  smooth: 0,
  log: false,
  first: null,
  last: null,
  marks: true,
  data: null,
  plots: [],
  seen: "",
  call: null,
};
const STRONG = {
  collapse: "#b3261e",
  rollback: "#b3261e",
  nonfinite: "#b3261e",
  hang: "#b3261e",
  restart: "#7b5ea7",
  resume: "#7b5ea7",
  fall_back: "#7b5ea7",
};
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];

tabs.Curves = {
  async open() {
    byId("main").replaceChildren(curveBar(), el("div", { id: "panels", className: "panels" }));
    await loadCurves();
  },
  async update() {
    const now = JSON.stringify(state.runs.map((run) => [run.done, (run.events || []).length]));
    if (now !== curves.seen) await loadCurves();
  },
};

function curveBar() {
  const apply = (change) => {
    Object.assign(curves, change);
    drawCurves();
  };
  const range = { type: "range", min: 0, max: 100, value: curves.smooth, ariaLabel: "Smoothing" };
  const slider = el("input", range);
  slider.oninput = () => apply({ smooth: Number(slider.value) });
  return el("div", { className: "bar" },
    el("label", {}, "Smoothing ", slider),
    toggle("log scale", curves.log, (on) => apply({ log: on })),
    toggle("event marks", curves.marks, (on) => apply({ marks: on })),
    el("button", { textContent: "All steps", onclick: () => zoom(null, null) }),
    el("span", { className: "note", textContent: "Drag over a chart to zoom in on steps." }));
}

async function loadCurves() {
  curves.seen = JSON.stringify(state.runs.map((run) => [run.done, (run.events || []).length]));
  const range = curves.first === null ? "" : `?first=${curves.first}&last=${curves.last}`;
  const call = (curves.call = {});
  const answer = await load("curves" + range).catch((error) => error);
  if (curves.call !== call) return; // a later call has begun
  if (answer instanceof Error) {
    curves.seen = ""; // the next refresh tries again
    byId("panels")?.replaceChildren(nothing(`The curves cannot be shown: ${answer.message}`));
    return;
  }
  curves.data = answer;
  drawCurves();
}

function zoom(first, last) {
  [curves.first, curves.last] = [first, last];
  loadCurves();
}

function drawCurves() {
  const into = byId("panels");
  if (!into || !curves.data) return;
  curves.plots.forEach((plot) => plot.destroy());
  curves.plots = [];
  into.replaceChildren();
  if (!curves.data.panels.length) into.append(nothing("There are no figures yet."));
  for (const panel of curves.data.panels) drawPanel(into, panel);
  document.documentElement.dataset.drawn = curves.plots.length;
}

function smoothed(values) {
  const half = Math.round((values.length * curves.smooth) / 1000);
  if (!half) return values;
  const sums = [0];
  for (const value of values) sums.push(sums.at(-1) + value);
  return values.map((_, i) => {
    const low = Math.max(0, i - half), high = Math.min(values.length, i + half + 1);
    return (sums[high] - sums[low]) / (high - low);
  });
}

// Each entry is one line: {x, y, label, color, dash, width}.
function linesOf(panel) {
  const found = [];
  const alone = state.runs.filter((_, i) => !state.hidden.has(i)).length === 1;
  curves.data.runs.forEach((points, run) => {
    if (state.hidden.has(run)) return;
    Object.entries(panel.metrics).forEach(([metric, name], i) => {
      const p = points[metric];
      if (!p) return;
      const color = COLORS[(alone ? i : run) % COLORS.length];
      const dash = alone ? [] : DASHES[i % DASHES.length];
      const names = [alone ? "" : state.runs[run]?.name, name || metric.split("/").at(-1)];
      const label = names.filter(Boolean).join(" ");
      if (p.low) {
        found.push({ x: p.x, y: p.low, label: "", color, edge: "low" });
        found.push({ x: p.x, y: p.high, label: "", color, edge: "high" });
      }
      const smooth = curves.smooth > 0 && panel.kind === "lines" && p.y.length > 20;
      if (smooth) found.push({ x: p.x, y: p.y, label: "", color: color + "40", dash, width: 1 });
      found.push({ x: p.x, y: smooth ? smoothed(p.y) : p.y, label, color, dash, width: 1.6 });
    });
  });
  return found;
}

function drawPanel(into, panel) {
  const lines = linesOf(panel);
  if (!lines.length) return;
  const legend = el("div", { className: "legend" });
  const box = el("div", { className: "panel" }, el("h3", { textContent: panel.title }), legend);
  into.append(box);
  const log = (curves.log || panel.log) && lines.every((line) => line.y.some((y) => y > 0));
  const stack = panel.kind === "stack" && lines.length > 1 && !log;
  let data = uPlot.join(lines.map((line) => [line.x, line.y]));
  const raw = data;
  if (log) data = [data[0], ...data.slice(1).map((ys) => ys.map((y) => (y > 0 ? y : null)))];
  const series = lines.map((line) => ({
    stroke: line.color,
    dash: line.dash,
    width: line.edge ? 0.01 : line.width,
    spanGaps: true,
    points: { show: line.x.length < 30 && !line.edge, size: 5 },
  }));
  const bands = [];
  if (stack) {
    let sum = data[0].map(() => 0);
    data = [data[0], ...data.slice(1).map((ys) => (sum = sum.map((s, i) => s + (ys[i] || 0))))];
    series.forEach((s, i) => {
      s.width = 0.5;
      if (i === 0) s.fill = lines[0].color + "d0";
      else bands.push({ series: [i + 1, i], fill: lines[i].color + "d0" });
    });
  } else if (panel.kind === "band" && lines.length % 2 === 0) {
    for (let i = 0; i < lines.length; i += 2) {
      bands.push({ series: [i + 2, i + 1], fill: lines[i].color + "30" });
    }
    lines.forEach((line, i) => {
      series[i].stroke = lines[i - (i % 2)].color;
    });
  }
  lines.forEach((line, i) => {
    if (line.edge === "high") bands.push({ series: [i + 1, i], fill: line.color + "30" });
  });
  const show = (at) => writeLegend(legend, lines, raw, at);
  const stepLabels = (_, ticks) => ticks.map((t) => (Number.isInteger(t) ? String(t) : ""));
  const valueLabels = (_, ticks) => ticks.map((t) => (t === null ? "" : number(t, 3)));
  const plot = new uPlot({
    width: Math.max(200, box.clientWidth),
    height: 190,
    legend: { show: false },
    series: [{}, ...series],
    bands,
    scales: {
      x: { time: false },
      y: log ? { distr: 3 } : { range: (_, low, high) => span(low, high, stack) },
    },
    axes: [
      { size: 28, stroke: "#66707b", grid: { show: false }, values: stepLabels },
      { size: 56, stroke: "#66707b", grid: { stroke: "#e8ebee", width: 1 }, values: valueLabels },
    ],
    cursor: { sync: { key: "steps" }, drag: { x: true, y: false, setScale: false }, points: { show: false } },
    hooks: { draw: [drawMarks], setCursor: [(u) => show(u.cursor.idx)], setSelect: [(u) => select(u)] },
  }, data, box);
  plot.over.title = "";
  plot.over.addEventListener("mousemove", (event) => tipMark(plot, event));
  plot.over.addEventListener("mouseleave", hideTip);
  plot.over.addEventListener("dblclick", () => zoom(null, null));
  curves.plots.push(plot);
  show(null);
}

// The range of the y axis, with some room above and below, also around a constant.
function span(low, high, stack) {
  if (low === null) return [0, 1];
  const room = 0.06 * (high - low) || 0.1 * Math.abs(high) || 0.1;
  return stack ? [0, high + room] : [low - room, high + room];
}

function writeLegend(legend, lines, data, at) {
  const parts = [];
  if (isNumber(at)) parts.push(el("span", { textContent: `step ${data[0][at]}` }));
  lines.forEach((line, i) => {
    if (!line.label) return;
    const value = isNumber(at) ? data[i + 1][at] : undefined;
    const newest = value === undefined || value === null ? line.y.findLast(isNumber) : value;
    parts.push(el("span", {}, chip(line.color), `${line.label} ${number(newest)}`));
  });
  legend.replaceChildren(...parts);
}

function select(plot) {
  const { left, width } = plot.select;
  plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
  if (width < 6) return;
  const first = Math.floor(plot.posToVal(left, "x")), last = Math.ceil(plot.posToVal(left + width, "x"));
  if (EMBEDDED) curves.plots.forEach((other) => other.setScale("x", { min: first, max: last }));
  else zoom(Math.max(0, first), Math.max(0, last));
}

function marks() {
  const found = [];
  state.runs.forEach((run, i) => {
    if (state.hidden.has(i)) return;
    for (const event of run.events || []) {
      if (!isNumber(event.step)) continue;
      found.push({ step: event.step, name: String(event.event), event, run });
    }
  });
  return found;
}

// Checkpoints are short ticks at the bottom; what broke or restarted the run is a line over the whole height.
function drawMarks(plot) {
  if (!curves.marks) return;
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  for (const mark of marks()) {
    const x = Math.round(plot.valToPos(mark.step, "x", true));
    const strong = STRONG[mark.name];
    ctx.strokeStyle = strong || "#8a939c";
    ctx.setLineDash(strong ? [5, 4] : []);
    ctx.lineWidth = strong ? 1.5 : 1;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top + bbox.height);
    ctx.lineTo(x, strong ? bbox.top : bbox.top + bbox.height - 8);
    ctx.stroke();
  }
  ctx.restore();
}

function tipMark(plot, event) {
  const near = marks().filter((mark) => Math.abs(plot.valToPos(mark.step, "x") - plot.cursor.left) < 4);
  if (!curves.marks || !near.length) return hideTip();
  const lines = near.slice(0, 6).map((mark) => {
    const reason = mark.event.reason ? `: ${mark.event.reason}` : "";
    return `${mark.name} at step ${mark.step}${reason}`;
  });
  tip(event, lines.join("\n"));
}
