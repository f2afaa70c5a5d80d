// The tab Machine: progress, ranks, servers, restarts, events.

const SILENT_S = 60;

tabs.Machine = { open: () => showMachine(), update: () => showMachine() };

function showMachine() {
  const boxes = state.runs.map((run, i) => (state.hidden.has(i) ? null : runBox(run))).filter(Boolean);
  byId("main").replaceChildren(...boxes);
}

function runBox(run) {
  if (run.now === undefined) return el("section", {}, el("h2", { textContent: run.name }), nothing("There is nothing to show."));
  const age = (time) => (isNumber(time) ? `${duration(run.now - time)} ago` : "–");
  const left = el("div"), right = el("div");
  const box = el("section", {}, el("h2", { textContent: run.name }), progress(run), el("div", { className: "columns" }, left, right));
  const add = (into, title, rows, heads) => { if (rows.length) into.append(el("h2", { textContent: title }), table(heads, rows)); };
  const list = (title, entries) => { if (entries.length) right.append(el("h2", { textContent: title }), el("dl", {}, ...entries.flatMap(([name, value]) => [el("dt", { textContent: name }), el("dd", { textContent: typeof value === "number" ? number(value) : String(value) })]))); };
  add(left, "Ranks", run.ranks.map((beat) => row([beat.rank, beat.node, beat.step, beat.phase, duration(beat.time - beat.since), age(beat.time), isNumber(beat.memory) ? `${number(beat.memory / 2 ** 30, 3)} GiB` : "–"],
    { className: !run.outcome && run.now - beat.time > SILENT_S ? "bad" : "" })), ["rank", "node", "step", "phase", "for", "heartbeat", "memory"]);
  add(left, "Errors", [...Object.entries(run.errors).map(([rank, line]) => row([rank, el("span", { className: "long", textContent: line })], { className: "bad" })), ...run.stacks.map((rank) => row([rank, `wrote its stacks to stacks/${rank}.txt`], { className: "bad" }))], ["rank", "last line"]);
  add(left, "Attempts", run.restarts.map((r) => row([r.attempt ?? "", r.job ?? "", r.step ?? "", r.code ?? "", r.reason ?? ""])), ["attempt", "job", "step", "exit", "reason"]);
  add(left, "Events", run.events.toReversed().slice(0, 40).map((event) => {
    const { time, event: name, step, ...rest } = event;
    return row([age(time), name, step ?? "", el("span", { className: "long", textContent: Object.entries(rest).map(([key, value]) => `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ") })]);
  }), ["", "event", "step", ""]);
  list("Newest step", Object.entries(run.machine));
  list("Settings", Object.entries(run.about));
  for (const server of run.servers) right.append(el("h2", { textContent: `Server ${server.name}` }), el("div", { className: "facts", textContent: `log written ${age(server.changed)}` }), el("pre", { textContent: server.tail }));
  return box;
}

function progress(run) {
  const parts = [el("strong", { textContent: `step ${run.done} of ${run.num_steps ?? "?"}` }), el("progress", { max: run.num_steps || 1, value: run.done })];
  if (run.outcome) parts.push(el("span", { className: run.outcome.code === 0 ? "good" : "bad", textContent: `exit ${run.outcome.code}: ${run.outcome.reason}` }));
  else parts.push(el("span", { textContent: `time left ${duration(run.seconds_left)}` }), liveness(run));
  if (run.restarts.length > 1) parts.push(el("span", { textContent: `${run.restarts.length - 1} restarts` }));
  return el("div", { className: "bar" }, ...parts);
}

function liveness(run) {
  if (!run.ranks?.length) return el("span");
  const age = run.now - Math.max(...run.ranks.map((beat) => beat.time || 0));
  return age > SILENT_S ? el("span", { className: "bad", textContent: `silent for ${duration(age)}` }) : el("span", { className: "good", textContent: "running" });
}
