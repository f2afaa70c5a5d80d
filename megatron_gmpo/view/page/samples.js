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
  update: () => { if (!byId("groups")) showSamples(); else if (samples.follows) showSamples(); },
};

async function showSamples() {
  const run = state.runs[samples.run];
  const steps = run?.samples || [];
  const main = byId("main");
  if (!steps.length) {
    main.replaceChildren(...[runBar(samples, showSamples), nothing("There are no samples: the run has written no transcripts.jsonl (log.transcripts_per_step).")].filter(Boolean));
    return;
  }
  const newest = steps.at(-1);
  if (samples.step === null || !steps.includes(samples.step)) samples.step = newest;
  const groups = el("div", { id: "groups" });
  const bar = el("div", { className: "bar" }, runChoice(samples.run, (at) => { samples.run = at; samples.step = null; showSamples(); }),
    stepChoice(steps, samples.step, (step) => { samples.step = step; showSamples(); }),
    choice("Sort by", Object.entries(SORTS).map(([name, [shown]]) => [name, shown]), samples.sort, (by) => { samples.sort = by; showSamples(); }));
  main.replaceChildren(bar, groups);
  await shown(groups, async () => {
    const found = await load(`samples/${samples.run}/${samples.step}`);
    const recorded = run.tokens?.includes(samples.step) ? (await load(`tokens/${samples.run}/${samples.step}`)).samples : [];
    return samples.sort === "group" ? found.map((group) => groupBox(group, recorded)) : sorted(found, recorded);
  });
}

const runBar = (tab, again) => (state.runs.length > 1
  ? el("div", { className: "bar" }, runChoice(tab.run, (at) => { tab.run = at; tab.step = null; again(); })) : null);

function recordOf(group, sample, recorded) {
  return recorded.find((r) => r.prompt_id === group.prompt_id && r.index === sample.index);
}

function sorted(groups, recorded) {
  const flat = groups.filter((group) => group.samples).flatMap((group) => group.samples.map((sample, index) => {
    const record = recordOf(group, { index }, recorded);
    return { ...sample, index, group, record, largest: record?.largest };
  }));
  flat.sort((a, b) => SORTS[samples.sort][1](a) - SORTS[samples.sort][1](b));
  return flat.map((sample) => el("div", { className: "group" }, promptBox(sample.group), el("div", { className: "samples" }, sampleBox(sample, sample.record))));
}

function groupBox(group, recorded) {
  if (group.problem) return el("p", { className: "bad", textContent: group.problem });
  const boxes = group.samples.map((sample, index) => sampleBox(sample, recordOf(group, { index }, recorded)));
  return el("div", { className: "group" }, promptBox(group), el("div", { className: "samples" }, ...boxes));
}

function promptBox(group) {
  const bold = (content) => el("b", { textContent: content });
  const facts = el("div", { className: "facts" }, "Prompt ", bold(group.prompt_id), "  truth ", bold(group.answer));
  return el("div", {}, facts, turns(group.prompt, group.images));
}

// A prompt is text, or messages whose content is text or parts with images. An episode is messages too.
// The images without a part of their own come last.
function turns(prompt, names = []) {
  const left = names.map(picture);
  const kind = (turn) => `turn ${turn.role === "assistant" ? "sampled" : ""}`;
  const text = (content) => el("pre", { className: "prompt", textContent: content });
  const parts = (content) => Array.isArray(content) ? content.map((each) => part(each, left)) : [text(content)];
  const box = (turn) => el("div", { className: kind(turn) },
    el("div", { className: "facts", textContent: turn.role }), ...parts(turn.content));
  const boxes = Array.isArray(prompt) ? prompt.map(box) : [text(prompt)];
  return el("div", {}, ...boxes, ...left);
}

// An image of the run, by the name of its file.
function picture(name) {
  const box = el("img", { className: "picture", alt: `image ${name}` });
  const failed = (error) => box.replaceWith(nothing(`Image ${name} cannot be shown: ${error.message}`));
  load(`images/${samples.run}/${name}`).then((url) => { box.src = url; }, failed);
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
  const facts = [["reward", number(sample.reward)], ["over the mean", number(sample.over_mean)], ["tokens", number(sample.length)], ["end", sample.finish_reason]];
  if (sample.episode) facts.push(...episodeFacts(sample));
  if (record) facts.push(["largest |log ratio|", number(record.largest)], ["advantage", number(record.advantage)]);
  const line = el("div", { className: "facts" });
  for (const [name, value] of facts) line.append(`${name} `, el("b", { textContent: value }), "   ");
  const reasons = [sample.why, sample.episode?.error].filter(Boolean);
  const box = el("div", { className: `sample ${sample.reward > 0 ? "right" : "wrong"}` }, line,
    Array.isArray(sample.turns) ? turns(sample.turns) : el("pre", { className: "response", textContent: sample.text }),
    sample.extracted === null || sample.extracted === undefined ? null : el("div", { className: "facts" }, "extracted answer ", el("b", { textContent: sample.extracted })),
    el("div", { className: "facts", textContent: reasons.join(" ") }));
  if (record) box.append(el("button", { textContent: "Tokens", onclick: () => openTab("Tokens", { run: samples.run, step: samples.step, sample: record.sample }) }));
  return box;
}
