// The tab Tokens: the recorded tokens of a step.

const tokens = { run: 0, step: null, sample: null, at: null, order: "largest", color: "log_ratio", page: 0 };
const PAGE = 3000; // tokens that are shown at a time
const ORDERS = {
  largest: ["largest ratio", (t) => -t.log_ratio],
  smallest: ["smallest ratio", (t) => t.log_ratio],
  size: ["largest |log ratio|", (t) => -Math.abs(t.log_ratio)],
  difference: ["largest difference between rollout and policy", (t) => -Math.abs(t.rollout_difference ?? 0)],
  entropy: ["largest entropy", (t) => -(t.entropy ?? 0)],
  layers: ["most layers routed differently", (t) => -(t.layers_rerouted ?? 0)],
};
const SIGNED = { log_ratio: "log ratio", advantage: "advantage", rollout_difference: "difference between rollout and policy" };
const MEASURES = { log_ratio: "log ratio", clipped: "clipped or not", entropy: "entropy", advantage: "advantage", rollout_difference: "difference between rollout and policy", layers_rerouted: "MoE layers routed differently" };

tabs.Tokens = {
  open: (place) => { if (place) Object.assign(tokens, { at: null, page: 0 }, place); return showTokens(); },
  update: () => { if (!byId("step")) return showTokens(); },
};

async function showTokens() {
  const steps = state.runs[tokens.run]?.tokens || [];
  const main = byId("main");
  if (!steps.length) {
    main.replaceChildren(...[runBar(tokens, showTokens), nothing("No tokens are recorded: set log.tokens_per_step to a number of samples.")].filter(Boolean));
    return;
  }
  if (tokens.step === null || !steps.includes(tokens.step)) tokens.step = steps.at(-1);
  const go = (place) => { Object.assign(tokens, { sample: null, at: null, page: 0 }, place); showTokens(); };
  const bar = el("div", { className: "bar" }, runChoice(tokens.run, (run) => go({ run, step: null })), stepChoice(steps, tokens.step, (step) => go({ step })));
  const body = el("div", { id: "step" });
  main.replaceChildren(bar, body);
  await shown(body, async () => stepParts(await load(`tokens/${tokens.run}/${tokens.step}`)));
  if (tokens.sample !== null) await showSample();
}

function stepParts(found) {
  const problems = found.problems.map((line) => el("p", { className: "bad", textContent: line }));
  if (!found.samples.length) return [...problems, nothing("This step has no readable record.")];
  const list = el("div", { id: "worst" });
  const drawList = () => list.replaceChildren(worstTable(found));
  drawList();
  const charts = el("div");
  requestAnimationFrame(() => drawHistograms(charts, found));
  return [...problems, headline(found),
    el("div", { className: "bar" }, choice("Tokens with the", Object.entries(ORDERS).map(([name, [shown]]) => [name, shown]), tokens.order, (order) => { tokens.order = order; drawList(); })),
    list,
    el("h2", { textContent: "Samples" }), el("p", { className: "note", textContent: "GMPO weighs a sample with its sequence ratio, the geometric mean of its clipped ratios. GRPO averages the ratios arithmetically, so that one large ratio raises the whole mean; its clip of 0.2 (last column) removes the gradient of the tokens beyond it." }),
    sampleTable(found), el("div", { id: "sample" }),
    el("h2", { textContent: "Log ratios before and after the geometric mean" }), charts];
}

function headline(found) {
  const top = found.worst.reduce((best, t) => (t.log_ratio > best.log_ratio ? t : best));
  const about = found.header;
  const loss = about.loss ? `  The loss is ${about.loss}.` : "";
  return el("p", {}, `The largest ratio of step ${tokens.step} is `, el("b", { textContent: number(Math.exp(top.log_ratio)) }), ", at the token ",
    el("b", { className: "text", textContent: `“${visible(top.text)}”` }), ` of sample ${top.sample}. It was `,
    el("b", { textContent: top.clipped ? "clipped" : "not clipped" }), `.${loss}`,
    el("span", { className: "note", textContent: `  ${found.samples.length} samples are recorded: ${["outlier", "random"].map((why) => `${found.samples.filter((s) => s.chosen === why).length} ${why === "outlier" ? "with the largest |log ratio|" : "at random"}`).join(", ")}.` }));
}

function worstTable(found) {
  const ordered = [...found.worst].sort((a, b) => ORDERS[tokens.order][1](a) - ORDERS[tokens.order][1](b)).slice(0, 12);
  const rows = ordered.map((t, i) => {
    const context = el("span", { className: "context" }, visible(t.before), el("mark", { textContent: visible(t.text) }), visible(t.after));
    return row([i + 1, el("b", { className: "text", textContent: visible(t.text) }), Math.exp(t.log_ratio), t.log_ratio, t.clipped ? "clipped" : "not clipped",
      t.entropy ?? "–", found.samples.find((s) => s.sample === t.sample).advantage, t.rollout_difference ?? "–", t.layers_rerouted ?? "–", `${t.sample}, token ${t.at}`, context],
    { className: "pick", onclick: () => pick(t.sample, t.at) });
  });
  return table(["", "token", "ratio", "log ratio", "clip", "entropy", "advantage", "policy − rollout", "layers rerouted", "sample", "context"], rows);
}

function sampleTable(found) {
  const rows = found.samples.map((s) => row([s.sample, s.chosen === "outlier" ? "outlier" : "at random", s.prompt_id, s.length, s.reward, s.advantage, s.largest, s.clipped, s.sequence_ratio, s.arithmetic_mean, s.grpo_mean],
    { className: "pick", onclick: () => pick(s.sample, null) }));
  return table(["sample", "chosen", "prompt", "tokens", "reward", "advantage", "largest |log ratio|", "clipped tokens", "GMPO sequence ratio", "arithmetic mean of ratios", "GRPO mean, clip 0.2"], rows);
}

function pick(sample, at) {
  Object.assign(tokens, { sample, at, page: at === null ? 0 : Math.floor(at / PAGE) });
  showSample().then(() => byId("sample").scrollIntoView({ block: "start" }));
}

async function showSample() {
  const into = byId("sample");
  if (into) await shown(into, async () => sampleParts(await load(`tokens/${tokens.run}/${tokens.step}/${tokens.sample}`)));
}

function sampleParts(record) {
  const again = (change) => { Object.assign(tokens, change); into.replaceChildren(...sampleParts(record)); };
  const into = byId("sample");
  const count = Math.ceil(record.ids.length / PAGE);
  const pages = count > 1 ? choice("Part", Array.from({ length: count }, (_, i) => [i, `tokens ${i * PAGE} to ${Math.min(record.ids.length, (i + 1) * PAGE) - 1}`]), tokens.page, (page) => again({ page: Number(page), at: null })) : null;
  const there = Object.entries(MEASURES).filter(([name]) => name === "advantage" || record[name]);
  const color = there.some(([name]) => name === tokens.color) ? tokens.color : "log_ratio";
  const box = el("div", { className: "tokens" });
  const paint = painter(record, color);
  const first = tokens.page * PAGE;
  record.ids.slice(first, first + PAGE).forEach((_, i) => {
    const at = first + i;
    const span = el("span", { textContent: record.text[at].replace(/\n/g, "↵\n"), className: record.clipped[at] ? "clipped" : "" });
    span.style.backgroundColor = paint(at);
    span.dataset.at = at;
    if (at === tokens.at) span.classList.add("pinned");
    if (record.turn?.[at - 1] < record.turn?.[at]) {
      box.append(el("span", { className: "note", textContent: "\n[observation]\n" }));
    }
    box.append(span);
  });
  box.onmousemove = (event) => (event.target.dataset.at ? tip(event, facts(record, Number(event.target.dataset.at))) : hideTip());
  box.onmouseleave = hideTip;
  return [el("h2", { textContent: `Sample ${tokens.sample} of step ${tokens.step}` }),
    el("pre", { className: "prompt", textContent: record.prompt }),
    el("div", { className: "bar" }, choice("Colour by", there, color, (name) => again({ color: name })), pages,
      el("span", { textContent: color in SIGNED ? "blue is below 0, red above" : "the darker, the larger" }), el("span", {}, "underlined: ", el("b", { textContent: "clipped" }))), box];
}

// Returns a function from a token's place to its colour.
function painter(record, measure) {
  if (measure === "clipped") return (at) => (record.clipped[at] ? "rgb(217 119 43 / 60%)" : "transparent");
  const values = measure === "advantage" ? null : record[measure];
  const value = (at) => (values ? values[at] : record.advantage);
  const top = values ? values.reduce((most, v) => Math.max(most, Math.abs(v)), 1e-9) : 1.5;
  return (at) => {
    // the square root shows small values beside one outlier
    const strength = Math.sqrt(clamp(Math.abs(value(at)) / top, 0, 1)) * 75;
    return `rgb(${measure in SIGNED ? (value(at) < 0 ? "47 111 178" : "198 62 54") : "123 94 167"} / ${strength.toFixed(0)}%)`;
  };
}

// The factors of a token's gradient: rho / n of GMPO, ratio / n of GRPO; 0 where the loss clips the token.
function gradientWeights(record, at) {
  const ratio = Math.exp(record.log_ratio[at]), n = record.ids.length;
  const outside = record.advantage > 0 ? ratio > 1.2 : ratio < 0.8;
  return { gmpo: record.clipped[at] ? 0 : record.sequence_ratio / n, grpo: outside ? 0 : ratio / n };
}

function facts(record, at) {
  const weights = gradientWeights(record, at);
  const lines = [`token ${at}: “${visible(record.text[at])}” (id ${record.ids[at]})`, `ratio ${number(Math.exp(record.log_ratio[at]))}, log ratio ${number(record.log_ratio[at])}, ${record.clipped[at] ? "clipped" : "not clipped"}`];
  if (record.entropy) lines.push(`entropy ${number(record.entropy[at])} nats`);
  lines.push(`advantage ${number(record.advantage)}, sequence ratio ${number(record.sequence_ratio)}`);
  lines.push(`weight in the gradient: GMPO ${number(weights.gmpo)}, GRPO ${number(weights.grpo)}`);
  if (record.rollout_difference) lines.push(`policy − rollout ${number(record.rollout_difference[at])}`);
  if (record.turn) lines.push(`turn ${record.turn[at]}`);
  if (record.layers_rerouted) lines.push(`${record.layers_rerouted[at]} MoE layers routed differently`);
  return lines.join("\n");
}

function drawHistograms(into, found) {
  const { edges, tokens: before, sequences: after } = found.histograms;
  const centres = before.map((_, i) => (edges[i] + edges[i + 1]) / 2);
  const share = (counts) => { const all = counts.reduce((a, b) => a + b, 0) || 1; return counts.map((c) => c / all || null); };
  into.replaceChildren(el("div", { className: "legend" }, el("i", { className: "chip", style: { background: COLORS[0] } }), "tokens (before)", el("i", { className: "chip", style: { background: COLORS[1] } }), "samples (after: mean of the clipped log ratios)"));
  const bars = uPlot.paths.bars({ size: [0.9, 40] });
  new uPlot({ width: Math.min(900, byId("main").clientWidth - 40), height: 200, legend: { show: false }, cursor: { show: false },
    scales: { x: { time: false, range: () => [edges[0], edges.at(-1)] }, y: { distr: 3, range: (_, low) => [low / 3, 1] } },
    axes: [{ label: "log ratio", labelSize: 18, size: 28 }, { label: "share, log scale", labelSize: 18, size: 60, values: (_, ticks) => ticks.map((t) => (t === null ? "" : number(t, 2))) }],
    series: [{}, { fill: COLORS[0] + "90", paths: bars, points: { show: false } }, { fill: COLORS[1] + "90", paths: bars, points: { show: false } }],
  }, [centres, share(before), share(after)], into);
}
