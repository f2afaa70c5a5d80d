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
const SIGNED = {
  log_ratio: "log ratio",
  advantage: "advantage",
  rollout_difference: "difference between rollout and policy",
};
const MEASURES = {
  log_ratio: "log ratio",
  clipped: "clipped or not",
  entropy: "entropy",
  advantage: "advantage",
  rollout_difference: "difference between rollout and policy",
  layers_rerouted: "MoE layers routed differently",
};
const ABOUT_SAMPLES =
  "GMPO weighs a sample with its sequence ratio, the geometric mean of its clipped ratios. " +
  "GRPO averages the ratios arithmetically, so that one large ratio raises the whole mean; " +
  "its clip of 0.2 (last column) removes the gradient of the tokens beyond it.";

tabs.Tokens = {
  open: (place) => {
    if (place) Object.assign(tokens, { at: null, page: 0 }, place);
    return showTokens();
  },
  update: () => renewBar(state.runs[tokens.run]?.tokens, tokensBar, showTokens),
};

function tokensBar(steps) {
  const go = (place) => {
    Object.assign(tokens, { sample: null, at: null, page: 0 }, place);
    showTokens();
  };
  return stepBar(steps,
    runChoice(tokens.run, (run) => go({ run, step: null })),
    stepChoice(steps, tokens.step, (step) => go({ step })));
}

async function showTokens() {
  const steps = state.runs[tokens.run]?.tokens || [];
  const main = byId("main");
  if (!steps.length) {
    const line = "No tokens are recorded: set log.tokens_per_step to a number of samples.";
    main.replaceChildren(...[runBar(tokens, showTokens), nothing(line)].filter(Boolean));
    return;
  }
  if (tokens.step === null || !steps.includes(tokens.step)) tokens.step = steps.at(-1);
  const body = el("div", { id: "step" });
  main.replaceChildren(tokensBar(steps), body);
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
  const orders = Object.entries(ORDERS).map(([name, [shown]]) => [name, shown]);
  const reorder = (order) => {
    tokens.order = order;
    drawList();
  };
  return [
    ...problems,
    headline(found),
    el("div", { className: "bar" }, choice("Tokens with the", orders, tokens.order, reorder)),
    list,
    el("h2", { textContent: "Samples" }),
    el("p", { className: "note", textContent: ABOUT_SAMPLES }),
    sampleTable(found),
    el("div", { id: "sample" }),
    el("h2", { textContent: "Log ratios before and after the geometric mean" }),
    charts,
  ];
}

function headline(found) {
  const top = found.worst.reduce((best, t) => (t.log_ratio > best.log_ratio ? t : best));
  const about = found.header;
  const loss = about.loss ? `  The loss is ${about.loss}.` : "";
  const count = (why) => found.samples.filter((s) => s.chosen === why).length;
  const outliers = `${count("outlier")} with the largest |log ratio|`;
  const recorded = `${found.samples.length} samples are recorded: ${outliers}, ${count("random")} at random.`;
  return el("p", {},
    `The largest ratio of step ${tokens.step} is `, bold(number(Math.exp(top.log_ratio))),
    ", at the token ", el("b", { className: "text", textContent: `“${visible(top.text)}”` }),
    ` of sample ${top.sample}. It was `, bold(top.clipped ? "clipped" : "not clipped"),
    `.${loss}`,
    el("span", { className: "note", textContent: `  ${recorded}` }));
}

function worstTable(found) {
  const by = ORDERS[tokens.order][1];
  const ordered = [...found.worst].sort((a, b) => by(a) - by(b)).slice(0, 12);
  const rows = ordered.map((t, i) => {
    const text = visible(t.text);
    const cells = [
      i + 1,
      el("b", { className: "text", textContent: text }),
      Math.exp(t.log_ratio),
      t.log_ratio,
      t.clipped ? "clipped" : "not clipped",
      t.entropy ?? "–",
      found.samples.find((s) => s.sample === t.sample).advantage,
      t.rollout_difference ?? "–",
      t.layers_rerouted ?? "–",
      `${t.sample}, token ${t.at}`,
      el("span", { className: "context" },
        visible(t.before), el("mark", { textContent: text }), visible(t.after)),
    ];
    return row(cells, { className: "pick", onclick: () => pick(t.sample, t.at) });
  });
  const heads = [
    "", "token", "ratio", "log ratio", "clip", "entropy", "advantage", "policy − rollout",
    "layers rerouted", "sample", "context",
  ];
  return table(heads, rows);
}

function sampleTable(found) {
  const rows = found.samples.map((s) => {
    const cells = [
      s.sample,
      s.chosen === "outlier" ? "outlier" : "at random",
      s.prompt_id,
      s.length,
      s.reward,
      s.advantage,
      s.largest,
      s.clipped,
      s.sequence_ratio,
      s.arithmetic_mean,
      s.grpo_mean,
    ];
    return row(cells, { className: "pick", onclick: () => pick(s.sample, null) });
  });
  const heads = [
    "sample", "chosen", "prompt", "tokens", "reward", "advantage", "largest |log ratio|",
    "clipped tokens", "GMPO sequence ratio", "arithmetic mean of ratios", "GRPO mean, clip 0.2",
  ];
  return table(heads, rows);
}

function pick(sample, at) {
  Object.assign(tokens, { sample, at, page: at === null ? 0 : Math.floor(at / PAGE) });
  showSample().then(() => byId("sample").scrollIntoView({ block: "start" }));
}

async function showSample() {
  const into = byId("sample");
  if (!into) return;
  await shown(into, async () =>
    sampleParts(await load(`tokens/${tokens.run}/${tokens.step}/${tokens.sample}`)));
}

function sampleParts(record) {
  const again = (change) => {
    Object.assign(tokens, change);
    into.replaceChildren(...sampleParts(record));
  };
  const into = byId("sample");
  const count = Math.ceil(record.ids.length / PAGE);
  const last = (i) => Math.min(record.ids.length, (i + 1) * PAGE) - 1;
  const parts = Array.from({ length: count }, (_, i) => [i, `tokens ${i * PAGE} to ${last(i)}`]);
  const turnTo = (page) => again({ page: Number(page), at: null });
  const pages = count > 1 ? choice("Part", parts, tokens.page, turnTo) : null;
  const there = Object.entries(MEASURES).filter(([name]) => name === "advantage" || record[name]);
  const color = there.some(([name]) => name === tokens.color) ? tokens.color : "log_ratio";
  const box = el("div", { className: "tokens" });
  const paint = painter(record, color);
  const first = tokens.page * PAGE;
  record.ids.slice(first, first + PAGE).forEach((_, i) => {
    const at = first + i;
    const text = record.text[at].replace(/\n/g, "↵\n");
    const span = el("span", { textContent: text, className: record.clipped[at] ? "clipped" : "" });
    span.style.backgroundColor = paint(at);
    span.dataset.at = at;
    if (at === tokens.at) span.classList.add("pinned");
    if (record.turn?.[at - 1] < record.turn?.[at]) {
      box.append(el("span", { className: "note", textContent: "\n[observation]\n" }));
    }
    box.append(span);
  });
  box.onmousemove = (event) => {
    const { at } = event.target.dataset;
    if (at) tip(event, facts(record, Number(at)));
    else hideTip();
  };
  box.onmouseleave = hideTip;
  const scale = color in SIGNED ? "blue is below 0, red above" : "the darker, the larger";
  return [
    el("h2", { textContent: `Sample ${tokens.sample} of step ${tokens.step}` }),
    el("pre", { className: "prompt", textContent: record.prompt }),
    el("div", { className: "bar" },
      choice("Colour by", there, color, (name) => again({ color: name })),
      pages,
      el("span", { textContent: scale }),
      el("span", {}, "underlined: ", bold("clipped"))),
    box,
  ];
}

// Returns a function from a token's place to its colour.
function painter(record, measure) {
  if (measure === "clipped") return (at) => (record.clipped[at] ? "rgb(217 119 43 / 60%)" : "transparent");
  const values = measure === "advantage" ? null : record[measure];
  const value = (at) => (values ? values[at] : record.advantage);
  const top = values ? values.reduce((most, v) => Math.max(most, Math.abs(v)), 1e-9) : 1.5;
  const color = (v) => {
    if (!(measure in SIGNED)) return "123 94 167";
    return v < 0 ? "47 111 178" : "198 62 54";
  };
  return (at) => {
    // the square root shows small values beside one outlier
    const strength = Math.sqrt(clamp(Math.abs(value(at)) / top, 0, 1)) * 75;
    return `rgb(${color(value(at))} / ${strength.toFixed(0)}%)`;
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
  const logRatio = record.log_ratio[at];
  const clipped = record.clipped[at] ? "clipped" : "not clipped";
  const lines = [
    `token ${at}: “${visible(record.text[at])}” (id ${record.ids[at]})`,
    `ratio ${number(Math.exp(logRatio))}, log ratio ${number(logRatio)}, ${clipped}`,
  ];
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
  const share = (counts) => {
    const all = counts.reduce((a, b) => a + b, 0) || 1;
    return counts.map((c) => c / all || null);
  };
  into.replaceChildren(el("div", { className: "legend" },
    chip(COLORS[0]), "tokens (before)",
    chip(COLORS[1]), "samples (after: mean of the clipped log ratios)"));
  const paths = uPlot.paths.bars({ size: [0.9, 40] });
  const bars = (color) => ({ fill: color + "90", paths, points: { show: false } });
  const shareLabels = (_, ticks) => ticks.map((t) => (t === null ? "" : number(t, 2)));
  new uPlot({
    width: Math.min(900, byId("main").clientWidth - 40),
    height: 200,
    legend: { show: false },
    cursor: { show: false },
    scales: {
      x: { time: false, range: () => [edges[0], edges.at(-1)] },
      y: { distr: 3, range: (_, low) => [low / 3, 1] },
    },
    axes: [
      { label: "log ratio", labelSize: 18, size: 28 },
      { label: "share, log scale", labelSize: 18, size: 60, values: shareLabels },
    ],
    series: [{}, bars(COLORS[0]), bars(COLORS[1])],
  }, [centres, share(before), share(after)], into);
}
