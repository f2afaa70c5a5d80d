// The tab Machine: progress, ranks, servers, restarts, events.

const SILENT_S = 60;

tabs.Machine = {
  open: () => showMachine(),
  update: () => {
    const selection = getSelection();
    const selected = !selection.isCollapsed && selection.containsNode(byId("main"), true);
    if (!selected) showMachine(); // selected text stays, to be copied
  },
};

function showMachine() {
  const main = byId("main");
  const logs = () => [...main.querySelectorAll("pre[data-log]")];
  const places = new Map(logs().map((log) => [log.dataset.log, [log.scrollLeft, log.scrollTop]]));
  const boxes = state.runs.map((run, i) => (state.hidden.has(i) ? null : runBox(run))).filter(Boolean);
  main.replaceChildren(...boxes);
  for (const log of logs()) log.scrollTo(...(places.get(log.dataset.log) ?? [0, 0]));
}

function runBox(run) {
  const heading = el("h2", { textContent: run.name });
  if (run.now === undefined) return el("section", {}, heading, nothing("There is nothing to show."));
  const age = (time) => (isNumber(time) ? `${duration(run.now - time)} ago` : "–");
  const long = (text) => el("span", { className: "long", textContent: text });
  const left = el("div"), right = el("div");
  const box = el("section", {}, heading, progress(run), el("div", { className: "columns" }, left, right));
  const add = (title, rows, heads) => {
    if (rows.length) left.append(el("h2", { textContent: title }), table(heads, rows));
  };
  const list = (title, entries) => {
    if (!entries.length) return;
    const parts = entries.flatMap(([name, value]) => [
      el("dt", { textContent: name }),
      el("dd", { textContent: typeof value === "number" ? number(value) : String(value) }),
    ]);
    right.append(el("h2", { textContent: title }), el("dl", {}, ...parts));
  };

  const ranks = run.ranks.map((beat) => {
    const silent = !run.outcome && run.now - beat.time > SILENT_S;
    const cells = [
      beat.rank,
      beat.node,
      beat.step,
      beat.phase,
      duration(beat.time - beat.since),
      age(beat.time),
      isNumber(beat.memory) ? `${number(beat.memory / 2 ** 30, 3)} GiB` : "–",
    ];
    return row(cells, { className: silent ? "bad" : "" });
  });
  add("Ranks", ranks, ["rank", "node", "step", "phase", "for", "heartbeat", "memory"]);

  const bad = (rank, cell) => row([rank, cell], { className: "bad" });
  const errors = Object.entries(run.errors).map(([rank, line]) => bad(rank, long(line)));
  const stacks = run.stacks.map((rank) => bad(rank, `wrote its stacks to stacks/${rank}.txt`));
  add("Errors", [...errors, ...stacks], ["rank", "last line"]);

  const attempts = run.restarts.map((r) =>
    row([r.attempt ?? "", r.job ?? "", r.step ?? "", r.code ?? "", r.reason ?? ""]));
  add("Attempts", attempts, ["attempt", "job", "step", "exit", "reason"]);

  const written = (value) => (typeof value === "object" ? JSON.stringify(value) : value);
  const events = run.events.toReversed().slice(0, 40).map((event) => {
    const { time, event: name, step, ...rest } = event;
    const details = Object.entries(rest).map(([key, value]) => `${key} ${written(value)}`);
    return row([age(time), name, step ?? "", long(details.join(", "))]);
  });
  add("Events", events, ["", "event", "step", ""]);

  list("Newest step", Object.entries(run.machine));
  list("Settings", Object.entries(run.about));
  for (const server of run.servers) {
    right.append(
      el("h2", { textContent: `Server ${server.name}` }),
      el("div", { className: "facts", textContent: `log written ${age(server.changed)}` }),
      el("pre", { textContent: server.tail, "data-log": `${run.name} ${server.name}` }),
    );
  }
  return box;
}

function progress(run) {
  const parts = [
    el("strong", { textContent: `step ${run.done} of ${run.num_steps ?? "?"}` }),
    el("progress", { max: run.num_steps || 1, value: run.done }),
  ];
  if (run.outcome) {
    const { code, reason } = run.outcome;
    const className = code === 0 ? "good" : "bad";
    parts.push(el("span", { className, textContent: `exit ${code}: ${reason}` }));
  } else {
    parts.push(el("span", { textContent: `time left ${duration(run.seconds_left)}` }), liveness(run));
  }
  if (run.restarts.length > 1) {
    parts.push(el("span", { textContent: `${run.restarts.length - 1} restarts` }));
  }
  return el("div", { className: "bar" }, ...parts);
}

function liveness(run) {
  if (!run.ranks?.length) return el("span");
  const age = run.now - Math.max(...run.ranks.map((beat) => beat.time || 0));
  if (age > SILENT_S) return el("span", { className: "bad", textContent: `silent for ${duration(age)}` });
  return el("span", { className: "good", textContent: "running" });
}
