// The header and the refresh.

const REFRESH_MS = 3000;

// Returns how a run ended, or how much time it has left.
function ending(run) {
  if (run.outcome) return run.outcome.code === 0 ? "finished" : `ended with exit code ${run.outcome.code}`;
  return isNumber(run.seconds_left) ? `${duration(run.seconds_left)} left` : "";
}

// Makes the tabs and the names of the runs. A refresh that replaced them would lose a click and the focus.
function makeHeader() {
  const several = state.runs.length > 1;
  byId("tabs").append(...Object.keys(tabs).map((name) => el("button", {
    textContent: name,
    role: "tab",
    onclick: () => openTab(name),
  })));
  byId("runs").append(...state.runs.map((run, i) => {
    const box = el("input", { type: "checkbox", checked: true, hidden: !several });
    box.onchange = () => {
      state.hidden[box.checked ? "delete" : "add"](i);
      redraw();
    };
    return el("label", {},
      box,
      several ? chip(COLORS[i % COLORS.length]) : null,
      el("strong", { textContent: run.name }),
      el("span"));
  }));
}

function drawHeader() {
  for (const tab of byId("tabs").children) {
    tab.setAttribute("aria-selected", tab.textContent === state.tab);
  }
  state.runs.forEach((run, i) => {
    const done = `  step ${run.done} of ${run.num_steps ?? "?"}  ${ending(run)}`;
    byId("runs").children[i].lastChild.textContent = run.now === undefined ? "" : done;
  });
  const lines = state.runs.flatMap((run) =>
    run.problems.map((line) => (state.runs.length > 1 ? `${run.name}: ${line}` : line)));
  byId("problems").replaceChildren(...lines.map((line) => el("p", { textContent: line })));
}

function redraw() {
  drawHeader();
  if (state.tab === "Curves") drawCurves();
  else if (state.tab === "Machine") showMachine();
}

async function openTab(name, place) {
  hideTip();
  state.tab = name;
  drawHeader();
  await tabs[name].open(place);
}

async function refresh() {
  try {
    state.runs = await load("state");
  } catch (error) {
    const line = `The server does not answer (${error.message}). The page shows its last data.`;
    byId("problems").replaceChildren(el("p", { textContent: line }));
    return;
  }
  drawHeader();
  await tabs[state.tab].update();
}

function refreshLater() {
  setTimeout(() => refresh().finally(refreshLater), REFRESH_MS);
}

async function start() {
  try {
    state.runs = await load("state");
  } catch (error) {
    byId("problems").replaceChildren(el("p", { textContent: `The run cannot be shown: ${error.message}` }));
    return;
  }
  document.title = `${state.runs.map((run) => run.name).join(", ")} – megatron_gmpo`;
  makeHeader();
  await openTab("Curves");
  if (!EMBEDDED) refreshLater();
  addEventListener("resize", () => {
    clearTimeout(state.resize);
    state.resize = setTimeout(() => state.tab === "Curves" && drawCurves(), 200);
  });
}

start();
