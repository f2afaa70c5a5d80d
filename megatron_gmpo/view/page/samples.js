// The tab Samples: the groups of a step, side by side.

const samples = { run: 0, step: null, sort: "group" };
const SORTS = {
  group: ["in groups", null],
  reward: ["reward", (s) => -s.reward],
  length: ["length", (s) => -s.length],
  advantage: ["advantage (reward over the group's mean)", (s) => -s.over_mean],
  loss: ["advantage, lowest first", (s) => s.over_mean],
  ratio: ["largest |log ratio| (recorded samples)", (s) => -(s.largest ?? -1)],
};

tabs.Samples = {
  open: () => showSamples(),
  update: () => renewBar(state.runs[samples.run]?.samples, samplesBar, showSamples),
};

function samplesBar(steps) {
  const go = (place) => {
    Object.assign(samples, place);
    showSamples();
  };
  const sorts = Object.entries(SORTS).map(([name, [shown]]) => [name, shown]);
  return stepBar(steps,
    runChoice(samples.run, (at) => go({ run: at, step: null })),
    stepChoice(steps, samples.step, (step) => go({ step })),
    choice("Sort by", sorts, samples.sort, (by) => go({ sort: by })));
}

async function showSamples() {
  const run = state.runs[samples.run];
  const steps = run?.samples || [];
  const main = byId("main");
  if (!steps.length) {
    const line = "There are no samples: the run has written no transcripts.jsonl (log.transcripts_per_step).";
    main.replaceChildren(...[runBar(samples, showSamples), nothing(line)].filter(Boolean));
    return;
  }
  const newest = steps.at(-1);
  if (samples.step === null || !steps.includes(samples.step)) samples.step = newest;
  const groups = el("div", { id: "groups" });
  main.replaceChildren(samplesBar(steps), groups);
  await shown(groups, async () => {
    const found = await load(`samples/${samples.run}/${samples.step}`);
    const recorded = await stepRecords(run);
    if (samples.sort !== "group") return sorted(found, recorded);
    return found.map((group) => groupBox(group, recorded));
  });
}

// Returns the records of the step that is shown; a step without recorded tokens has none.
async function stepRecords(run) {
  if (!run.tokens?.includes(samples.step)) return [];
  const found = await load(`tokens/${samples.run}/${samples.step}`);
  return found.samples;
}

function runBar(tab, again) {
  if (state.runs.length < 2) return null;
  const change = (at) => {
    Object.assign(tab, { run: at, step: null });
    again();
  };
  return el("div", { className: "bar" }, runChoice(tab.run, change));
}

function recordOf(group, sample, recorded) {
  return recorded.find((r) => r.prompt_id === group.prompt_id && r.index === sample.index);
}

function sorted(groups, recorded) {
  const readable = groups.filter((group) => group.samples);
  const flat = readable.flatMap((group) => group.samples.map((sample, index) => {
    const record = recordOf(group, { index }, recorded);
    return { ...sample, index, group, record, largest: record?.largest };
  }));
  flat.sort((a, b) => SORTS[samples.sort][1](a) - SORTS[samples.sort][1](b));
  return flat.map((sample) => el("div", { className: "group" },
    promptBox(sample.group),
    el("div", { className: "samples" }, sampleBox(sample, sample.record))));
}

function groupBox(group, recorded) {
  if (group.problem) return el("p", { className: "bad", textContent: group.problem });
  const boxes = group.samples.map((sample, index) => sampleBox(sample, recordOf(group, { index }, recorded)));
  return el("div", { className: "group" }, promptBox(group), el("div", { className: "samples" }, ...boxes));
}

function promptBox(group) {
  const facts = el("div", { className: "facts" },
    "Prompt ", bold(group.prompt_id), "  truth ", bold(group.answer));
  return el("div", {}, facts, turns(group.prompt, group.images));
}

// A prompt is text, or messages whose content is text or parts with images. An episode is messages too.
// The images without a part of their own come last.
function turns(prompt, names = []) {
  const left = names.map(picture);
  const kind = (turn) => `turn ${turn.role === "assistant" ? "sampled" : ""}`;
  const text = (content) => el("pre", { className: "prompt", textContent: content });
  const parts = (content) =>
    Array.isArray(content) ? content.map((each) => part(each, left)) : [text(content)];
  const box = (turn) => el("div", { className: kind(turn) },
    el("div", { className: "facts", textContent: turn.role }),
    ...parts(turn.content));
  const boxes = Array.isArray(prompt) ? prompt.map(box) : [text(prompt)];
  return el("div", {}, ...boxes, ...left);
}

// An image of the run, by the name of its file.
function picture(name) {
  const box = el("img", { className: "picture", alt: `image ${name}` });
  const failed = (error) => box.replaceWith(nothing(`Image ${name} cannot be shown: ${error.message}`));
  const loaded = (url) => {
    box.src = url;
  };
  load(`images/${samples.run}/${name}`).then(loaded, failed);
  return box;
}

// What the environment says of an episode.
function episodeFacts(sample) {
  const { ended, name, success, tool_calls, tool_errors, seconds } = sample.episode;
  const sampled = sample.turns.filter((turn) => turn.role === "assistant");
  const said = [["turns", number(sampled.length)], ["episode", ended]];
  if (name) said.push(["of", name]);
  if (success !== null) said.push(["success", success ? "yes" : "no"]);
  if (tool_calls) said.push(["tool calls", number(tool_calls)], ["failed", number(tool_errors)]);
  return [...said, ["environment", `${number(seconds, 3)} s`]];
}

function part(content, pictures) {
  if (content?.type === "image" && pictures.length) return pictures.shift();
  if (/^[0-9a-f]{32}\.[a-z]+$/.test(content?.image)) return picture(content.image); // of an observation
  const url = content?.image_url?.url ?? content?.image;
  const shown = typeof url === "string" && /^data:image\/(png|jpeg|webp|gif);base64,/.test(url);
  if (shown) return el("img", { src: url, alt: "image of the prompt" });
  return el("pre", { textContent: content?.text ?? (url ? `image ${url}` : JSON.stringify(content)) });
}

function sampleBox(sample, record) {
  const facts = [
    ["reward", number(sample.reward)],
    ["over the mean", number(sample.over_mean)],
    ["tokens", number(sample.length)],
    ["end", sample.finish_reason],
  ];
  if (sample.episode) facts.push(...episodeFacts(sample));
  if (record) {
    facts.push(["largest |log ratio|", number(record.largest)]);
    facts.push(["advantage", number(record.advantage)]);
  }
  const line = el("div", { className: "facts" });
  for (const [name, value] of facts) line.append(`${name} `, bold(value), "   ");
  const answer = sample.extracted ?? null;
  const reasons = [sample.why, sample.episode?.error].filter(Boolean);
  const box = el("div", { className: `sample ${sample.reward > 0 ? "right" : "wrong"}` },
    line,
    Array.isArray(sample.turns)
      ? turns(sample.turns)
      : el("pre", { className: "response", textContent: sample.text }),
    answer === null ? null : el("div", { className: "facts" }, "extracted answer ", bold(answer)),
    el("div", { className: "facts", textContent: reasons.join(" ") }));
  if (record) {
    const show = () => openTab("Tokens", { run: samples.run, step: samples.step, sample: record.sample });
    box.append(el("button", { textContent: "Tokens", onclick: show }));
  }
  return box;
}
