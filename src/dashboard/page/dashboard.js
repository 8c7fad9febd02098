// Shows the state of a training as it comes, and sends what the user wants to change.
import { Chart, element, sharesBar } from "./charts.js";

const $ = (id) => document.getElementById(id);
const text = (id, value) => {
  const there = $(id);
  if (there.textContent !== value) there.textContent = value;
};

// ---- Numbers as text ----

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

function number(value, isTick) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (isTick) return size >= 1e4 ? compact.format(value) : size < 1e-3 ? value.toExponential(0) : `${Number(value.toPrecision(3))}`;
  if (size >= 1e6) return compact.format(value);
  if (size >= 100) return whole.format(value);
  if (size < 1e-3) return value.toExponential(2);
  return value.toPrecision(3);
}
const percent = (part) => `${(100 * part).toFixed(1)} %`;
const count = (value) => (value >= 1e6 ? compact.format(value) : whole.format(value));
const many = (value, one, more = `${one}s`) => `${count(value)} ${value === 1 ? one : more}`;

function duration(seconds) {
  if (seconds < 100) return `${Math.max(Math.round(seconds), 0)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 100) return `${minutes} min`;
  return `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")} h`;
}
function clock(seconds) {
  const s = Math.max(Math.floor(seconds), 0);
  const [h, m] = [Math.floor(s / 3600), Math.floor((s % 3600) / 60)];
  const two = (n) => String(n).padStart(2, "0");
  return h > 0 ? `${h}:${two(m)}:${two(s % 60)}` : `${m}:${two(s % 60)}`;
}
function bytes(value) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 1000 || unit === "GB") return `${value < 10 && unit !== "B" ? value.toFixed(1) : Math.round(value)} ${unit}`;
    value /= 1000;
  }
}

// ---- Theme ----

const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = $("theme");
try { theme.value = localStorage.getItem("ps-theme") ?? "auto"; } catch { /* No storage: as the system. */ }
function paint() {
  const wanted = theme.value === "auto" ? (dark.matches ? "dark" : "light") : theme.value;
  document.documentElement.dataset.theme = wanted;
}
theme.addEventListener("change", () => {
  try { localStorage.setItem("ps-theme", theme.value); } catch { /* It holds for this page. */ }
  paint();
});
dark.addEventListener("change", paint);
paint();

// ---- Charts ----

const charts = {
  loss: new Chart($("chart-loss"), { title: "Loss of the batches", series: "loss", formatY: number, empty: "No step yet" }),
  accuracy: new Chart($("chart-accuracy"), { title: "Accuracy on the test data", series: "accuracy", formatY: number, empty: "Not evaluated yet" }),
  rate: new Chart($("chart-rate"), { title: "Gradients per second, all workers", series: "rate", formatY: number, empty: "No step yet" }),
  staleness: new Chart($("chart-staleness"), { title: "Staleness of the applied gradients", series: "staleness", unit: " gradients", formatY: (value, isTick) => (isTick ? compact.format(value) : count(value)), empty: "No gradient yet" }),
};
const curves = { loss: [], accuracy: [], rate: [] };
let state = null;

function drawCurves() {
  const overTime = document.querySelector('input[name="axis"]:checked').value === "time";
  const axis = overTime
    ? { formatX: clock, nameX: "time" }
    : { formatX: (value) => (Number.isInteger(value) ? count(value) : ""), nameX: "update" };
  const points = (curve, keep = (y) => y) => curve.map(([version, time, mean, low, high]) => ({ x: overTime ? time : version, y: keep(mean), low: keep(low), high: keep(high) }));
  charts.loss.line(points(curves.loss), axis);
  const isAccuracy = state?.evaluation?.accuracy !== null;
  charts.accuracy.line(points(curves.accuracy, isAccuracy ? (y) => 100 * y : undefined), {
    ...axis,
    title: isAccuracy ? "Accuracy on the test data" : "Loss on the test data",
    formatY: isAccuracy ? (value, isTick) => (isTick ? `${Number(value.toPrecision(4))} %` : `${value.toFixed(1)} %`) : number,
  });
  charts.rate.line(points(curves.rate), { ...axis, from: 0 });
}
for (const radio of document.querySelectorAll('input[name="axis"]')) radio.addEventListener("change", drawCurves);

function drawStaleness({ counts, is_cut: isCut }) {
  const bars = counts.map((y, x) => ({ x, y, label: isCut && x === counts.length - 1 ? `${x}+` : `${x}` }));
  charts.staleness.bars(bars, { nameX: "staleness" });
}

// ---- The state ----

const WORDS = { starting: "starting", training: "training", paused: "paused", recovering: "servers lost, recovering", ended: "finished", interrupted: "interrupted", failed: "failed" };

/** Replaces the rows only if they have changed, so that a selection and a screen reader stay where they are. */
function fill(there, items, key) {
  const now = JSON.stringify(key);
  if (there.dataset.shown === now) return;
  there.dataset.shown = now;
  there.replaceChildren(...items());
}

function show() {
  const { run } = state;
  const model = run.name || (run.model.split("::").pop() || "Training").replace(/<.*/, "");
  text("title", model);
  const chip = $("status");
  if (chip.dataset.status !== state.status) announce(`The training: ${WORDS[state.status]}.`);
  chip.dataset.status = state.status;
  text("status", WORDS[state.status]);

  const part = state.steps_all > 0 ? Math.min(state.steps_done / state.steps_all, 1) : 0;
  $("progress").setAttribute("aria-valuenow", Math.floor(100 * part));
  $("progress-bar").style.width = `${100 * part}%`;
  const left = state.evaluating !== null ? `, evaluating: ${Math.floor(100 * state.evaluating)} %` : state.seconds_left === null ? "" : `, about ${duration(state.seconds_left)} left`;
  const progress = state.steps_all > 0 ? `${Math.floor(100 * part)} %: ${count(state.steps_done)} of ${many(state.steps_all, "step")}` : many(state.steps_done, "step");
  text("progress-text", `${progress} in ${clock(state.seconds)}${left}`);
  $("progress").setAttribute("aria-valuetext", `${progress}${left}`);
  document.title = `${state.steps_all > 0 ? `${Math.floor(100 * part)} % ` : ""}${WORDS[state.status]}: ${model}`;
  $("progress").hidden = state.steps_all === 0;

  const problem = $("problem");
  problem.hidden = !state.error;
  text("problem", state.error ? `The training has failed: ${state.error}` : "");
  const straggler = $("straggler");
  straggler.hidden = !state.straggler;
  text("straggler", state.straggler ? `Straggler: ${state.straggler.text}` : "");

  text("n-loss", number(state.loss));
  const { evaluation } = state;
  const isAccuracy = !evaluation || evaluation.accuracy !== null;
  text("n-accuracy-name", isAccuracy ? "Accuracy" : "Test loss");
  text("n-accuracy", !evaluation ? "–" : isAccuracy ? percent(evaluation.accuracy) : number(evaluation.loss));
  text("n-accuracy-more", !evaluation ? "not evaluated yet" : `at update ${count(evaluation.version)}${evaluation.best_accuracy ? `, best ${percent(evaluation.best_accuracy)}` : ""}`);
  text("n-rate", number(state.gradients_per_second));
  text("n-version", count(state.version));
  text("n-version-more", `${state.consistency}, learning rate ${state.learning_rate ?? "–"}`);
  text("n-staleness", state.staleness.mean.toFixed(2));
  text("n-staleness-more", `mean; largest ${count(state.staleness.max)}`);
  const live = state.workers.filter((worker) => worker.state === "live").length;
  const listed = state.workers.length === state.num_workers;
  text("n-workers", listed ? count(live) : count(state.num_workers - state.num_workers_lost));
  const words = [`of ${count(state.num_workers)} at work`];
  if (state.num_workers_lost > 0) words.push(`${count(state.num_workers_lost)} lost`);
  if (state.num_pending > 0 && state.awaited.length > 0 && state.awaited.length < 4) words.push(`waiting for ${state.awaited.join(", ")}`);
  text("n-workers-more", words.join("; "));

  drawStaleness(state.staleness);
  showWorkers();
  showServers();
  showLists();
  showRun();
  showControls();
}

function showWorkers() {
  const slow = state.straggler?.worker;
  fill($("workers").tBodies[0], () => state.workers.map((worker) => {
    const names = ["data", "compute", "wire", "waiting", "apply"];
    const cell = (label, attributes, ...children) => element("td", { "data-label": label, ...attributes }, ...children);
    const parts = worker.shares?.map((share, index) => [names[index], share]);
    const shares = parts
      ? cell("", { class: "shares" }, sharesBar(parts), element("span", {}, parts.map(([name, share]) => `${name} ${Math.round(100 * share)} %`).join(" · ")))
      : cell("", { class: "shares" }, element("span", {}, "not known"));
    const notes = [];
    if (worker.num_losses > 0) notes.push(`lost ${many(worker.num_losses, "time")}`);
    if (worker.num_moves > 0) notes.push(`moved ${many(worker.num_moves, "time")}`);
    if (worker.num_late > 0) notes.push(`${count(worker.num_late)} late`);
    if (worker.num_refused > 0) notes.push(`${count(worker.num_refused)} refused`);
    return element("tr", { class: worker.worker === slow ? "slow" : null },
      element("th", { scope: "row" }, `worker ${worker.worker}`),
      cell("", {}, element("span", { class: "state", "data-state": worker.state }, worker.state), notes.length ? element("span", { class: "notes" }, notes.join(", ")) : ""),
      cell("steps", { class: "num" }, count(worker.steps)),
      cell("gradients/s", { class: "num" }, number(worker.gradients_per_second)),
      shares,
      cell("staleness", { class: "num" }, `${worker.mean_staleness.toFixed(2)}, max ${count(worker.max_staleness)}`),
      cell("on", { class: "on" }, worker.place));
  }), [state.workers, slow]);
  const more = state.num_workers - state.workers.length;
  text("workers-more", more > 0 ? `and ${many(more, "more worker")}, which took more steps` : "");
}

function showServers() {
  const weights = state.run.num_weights;
  // A driver's own loop may not say how many there are.
  const where = weights > 0 ? `${many(weights, "weight")} (${bytes(4 * weights)}) on ` : "";
  text("servers-text", `${where}${many(state.num_servers, "server")}. The first one decides.`);
  fill($("servers").tBodies[0], () => state.servers.map((server, index) => element("tr", {},
    element("th", { scope: "row" }, index === 0 ? "0, first" : `${index}`),
    element("td", {}, server.place),
    element("td", { class: "num" }, count(server.version)),
    element("td", { class: "num" }, count(server.num_weights)),
    element("td", { class: "num" }, bytes(server.bytes)),
    element("td", { class: "num" }, count(server.num_staged)),
    element("td", { class: "num" }, count(server.num_waiting)))), state.servers);
  // Workers over HTTP, and those of a driver's own loop, do not say where they are.
  const isKnown = state.workers.every((worker) => worker.place !== "");
  const alone = isKnown ? "servers and workers are in the driver" : "the servers are in the driver; nobody says where the workers are";
  const nodes = state.nodes.length ? state.nodes : [{ node: "one process", host: alone, num_workers: null }];
  fill($("nodes"), () => nodes.map(({ node, host, num_workers: workers }) => element("li", {}, element("span", {}, node), element("span", {}, workers === null ? host : `${host}: ${many(workers, "worker")}`))), nodes);
}

function showLists() {
  const kinds = { fault: "Fault: ", repair: "Repaired: ", control: "Changed: ", notice: "" };
  fill($("incidents"), () => (state.incidents.length
    ? state.incidents.map(({ time, kind, text: what }) => element("li", { "data-kind": kind }, element("time", {}, clock(time)), element("span", {}, element("b", {}, kinds[kind]), what)))
    : [element("li", {}, "", "Nothing yet.")]), state.incidents);
  const fault = state.incidents.find(({ kind }) => kind === "fault" || kind === "repair");
  if (fault && fault.time > (showLists.told ?? -1)) {
    if (showLists.told !== undefined) announce(fault.text);
    showLists.told = fault.time;
  }
  showLists.told ??= -1;
  const { num_checkpoints: saved, num_checkpoints_failed: failed } = state;
  text("checkpoints-text", state.control.saves_checkpoints || saved > 0 ? `${count(saved)} saved, ${count(failed)} failed or skipped` : "This training has no directory for checkpoints.");
  fill($("checkpoints"), () => state.checkpoints.map((one) => element("li", { "data-kind": one.problem ? "fault" : "repair" },
    element("time", {}, clock(one.time)),
    one.problem ? element("span", {}, element("b", {}, "Not saved: "), one.problem) : element("span", {}, element("b", {}, `Update ${count(one.version)}`), `, ${bytes(one.bytes)} in ${duration(one.seconds) === "0 s" ? `${Math.round(1000 * one.seconds)} ms` : duration(one.seconds)}, ${one.path}`))), state.checkpoints);
  text("log-text", logged());
}

/** Says what there is of the update log. */
function logged() {
  const { log } = state;
  // Nobody looks at the server of a driver's own loop.
  if (state.looked === null) return "";
  if (!log) return state.control.saves_checkpoints ? "Updates between checkpoints are not logged." : "";
  const there = log.since === null ? "empty" : `updates from ${count(log.since)} on, ${bytes(log.bytes)} in ${many(log.num_segments, "file")}`;
  const failed = log.num_failures > 0 ? `, failed ${many(log.num_failures, "time")}` : "";
  return `Update log: ${there}${failed}${log.is_written ? "" : "; nothing is written to it until the next checkpoint"}.`;
}

function showRun() {
  const { run } = state;
  const started = new Date(1000 * run.started);
  const known = (value) => (value > 0 ? count(value) : "");
  const rows = [["Model", run.model], ["Weights", known(run.num_weights)], ["Examples", known(run.num_examples)], ["Batch size", known(run.batch_size)], ["Optimizer", run.optimizer], ["Reduction", run.reduction], ["Device", run.device], ["Seed", `${run.seed}`], ["Started", run.started ? started.toLocaleString() : "–"], ["Went on from update", run.first_version ? count(run.first_version) : "–"], ["Versions", `ps ${run.ps}, burn ${run.burn}`]];
  fill($("run"), () => rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value || "–")]), rows);
}

// ---- Controls ----

const token = $("token"); // Its value is nowhere else.
let isBusy = false;
let sure = null;

function showControls() {
  const { control } = state;
  const isOver = ["ended", "failed", "interrupted"].includes(state.status);
  let note = "";
  if (connection === "needs-token") note = HIDDEN;
  else if (!control.is_allowed) note = "This page is read-only, so the controls are disabled. Start the training with --dashboard-token-file FILE, or with PS_DASHBOARD_TOKEN in its environment, to control it from here.";
  else if (isOver) note = "The training is over, so the controls are disabled.";
  else if (!control.is_running) note = state.status === "starting" ? "The training has not begun yet." : "This program has a loop of its own, which takes no controls.";
  else if (!token.value) note = "Type the token to use the controls.";
  text("control-note", note);
  $("token-row").hidden = !control.is_allowed && connection !== "needs-token";
  $("controls").disabled = note !== "" || isBusy || connection !== "live";
  const focused = document.activeElement;
  $("pause").disabled = control.is_paused;
  $("resume").disabled = !control.is_paused;
  // One of the two can be used. It gets the focus if the other one had it.
  if (focused === $("pause") && control.is_paused) $("resume").focus();
  if (focused === $("resume") && !control.is_paused) $("pause").focus();
  $("checkpoint").disabled = !control.saves_checkpoints;
  $("checkpoint").title = control.saves_checkpoints ? "" : "This training has no directory for checkpoints.";
  for (const id of ["mode", "set-mode"]) $(id).disabled = !control.changes_consistency;
  for (const id of ["who", "remove"]) $(id).disabled = !control.removes_workers;
  $("end").disabled = !control.can_end;
  const missing = [];
  if (!control.changes_consistency) missing.push("when gradients are applied, so the consistency mode cannot be changed here");
  if (!control.removes_workers) missing.push("which workers there are, so none can be removed here");
  if (!control.can_end) missing.push("when it ends");
  const isMissing = control.is_running && missing.length > 0;
  $("control-missing").hidden = !isMissing;
  text("control-missing", isMissing ? `This program decides itself ${missing.join(", and ")}.` : "");
  for (const [field, value] of [["rate", state.learning_rate], ["mode", state.consistency]]) {
    // What the user types stays.
    if (document.activeElement !== $(field) && !$(field).dataset.typed) $(field).value = value ?? "";
  }
  const there = state.workers.filter((worker) => ["live", "lost", "fenced", "starting"].includes(worker.state)).map((worker) => worker.worker);
  const chosen = $("who").value;
  fill($("who"), () => there.map((worker) => element("option", { value: worker }, `worker ${worker}`)), there);
  if (there.includes(Number(chosen)) && chosen !== "") $("who").value = chosen;
}
for (const field of ["rate", "mode"]) $(field).addEventListener("input", () => { $(field).dataset.typed = "yes"; });

/** Says why something is not done. A screen reader reads it, too. */
function refuse(why) {
  $("result").dataset.ok = "no";
  $("result").textContent = why;
}

async function change(path, body) {
  const result = $("result");
  isBusy = true;
  if (state) showControls();
  result.dataset.ok = "";
  result.textContent = "Asking.";
  try {
    const response = await fetch(`api/${path}`, {
      method: "POST", mode: "same-origin", credentials: "omit", redirect: "error", cache: "no-store",
      headers: { "content-type": "application/json", "x-ps-dashboard": "1", authorization: `Bearer ${token.value}` },
      body: JSON.stringify(body),
    });
    const answer = await response.text();
    let said = answer.trim();
    try { const read = JSON.parse(answer); said = read.done ?? read.error ?? said; } catch { /* It is plain text. */ }
    if (!response.ok) {
      refuse(`Not done: ${said}`);
      return false;
    }
    result.dataset.ok = "yes";
    result.textContent = said;
    return true;
  } catch (error) {
    refuse("Not done: the training cannot be reached.");
    return false;
  } finally {
    isBusy = false;
    if (state) showControls();
  }
}

/** Calls a handler, and keeps the focus although the button is disabled meanwhile. */
function onClick(id, handler) {
  $(id).addEventListener("click", async () => {
    await handler();
    const next = { pause: "resume", resume: "pause" }[id] ?? id;
    const wanted = $(id).disabled ? $(next) : $(id);
    if ([document.body, $(id)].includes(document.activeElement)) wanted.focus();
  });
}
onClick("pause", async () => { if (await change("pause", {})) { state.control.is_paused = true; showControls(); } });
onClick("resume", async () => { if (await change("resume", {})) { state.control.is_paused = false; showControls(); } });
onClick("checkpoint", () => change("checkpoint", {}));
const set = (field, path, body) => async () => { if (await change(path, body())) delete $(field).dataset.typed; };
async function setRate() {
  const typed = $("rate").value.trim().replace(",", ".");
  const rate = Number(typed);
  // An empty text would be 0.
  if (typed === "" || !Number.isFinite(rate)) return refuse("Not done: type the learning rate as a number, such as 0.01.");
  await set("rate", "learning-rate", () => ({ learning_rate: rate }))();
}
const setMode = set("mode", "consistency", () => ({ consistency: $("mode").value.trim() }));
onClick("set-rate", setRate);
onClick("set-mode", setMode);
$("rate").addEventListener("keydown", (event) => { if (event.key === "Enter") setRate(); });
$("mode").addEventListener("keydown", (event) => { if (event.key === "Enter") setMode(); });
function ask(worker) {
  sure = worker;
  $("remove-no").hidden = worker === null;
  $("remove").classList.toggle("sure", worker !== null);
  text("remove", worker === null ? "Remove for good" : `Really remove worker ${worker}?`);
}
onClick("remove", async () => {
  if ($("who").value === "") return;
  const worker = Number($("who").value);
  if (sure !== worker) return ask(worker);
  ask(null);
  await change("remove-worker", { worker });
});
onClick("remove-no", () => { ask(null); $("remove").focus(); });
$("who").addEventListener("change", () => ask(null));
function askEnd(isAsked) {
  $("end-no").hidden = !isAsked;
  $("end").classList.toggle("sure", isAsked);
  text("end", isAsked ? "Really end it?" : "End the training");
}
onClick("end", async () => {
  if ($("end-no").hidden) return askEnd(true);
  askEnd(false);
  await change("end", {});
});
onClick("end-no", () => { askEnd(false); $("end").focus(); });
$("who").addEventListener("keydown", (event) => { if (event.key === "Escape") ask(null); });

// ---- The stream of events ----

const HIDDEN = "Other hosts can reach this dashboard, so it shows nothing without the token.";
let connection = "connecting";
let lastId = null;
let runId = null;
let wake = () => {};

function announce(what) { $("announce").textContent = what; }

function connected(now) {
  if (now === connection) return;
  const isOver = state && ["ended", "failed", "interrupted"].includes(state.status);
  const words = { connecting: "connecting", live: "live", lost: isOver ? "the training has ended" : "disconnected, reconnecting", "needs-token": "needs the token" };
  if (connection === "live" || now === "live") announce(words[now]);
  if (connection === "needs-token") $("result").textContent = "";
  connection = now;
  $("connection").dataset.state = now === "lost" && isOver ? "over" : now;
  text("connection", words[now]);
  if (now === "needs-token") {
    $("token-row").hidden = false;
    text("control-note", HIDDEN);
  }
  if (state) showControls();
}

function take({ run_id: id, state: now, curves: fresh }) {
  if (id !== runId) {
    // The driver was started again, or it is the first time.
    runId = id;
    for (const name of Object.keys(curves)) curves[name] = [];
    showLists.told = undefined;
  }
  let isNew = false;
  for (const [name, { replaces, points }] of Object.entries(fresh)) {
    if (replaces) curves[name] = [];
    curves[name].push(...points);
    isNew ||= replaces || points.length > 0;
  }
  state = now;
  connected("live");
  show();
  if (isNew) drawCurves();
}

/** Reads server-sent events from a response until it ends. */
async function read(response, stop) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let quiet = setTimeout(stop, 15000);
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(quiet);
      // The server says something every five seconds.
      quiet = setTimeout(stop, 15000);
      rest += value;
      const events = rest.split("\n\n");
      rest = events.pop();
      for (const event of events) {
        let data = "";
        for (const line of event.split("\n")) {
          if (line.startsWith("id: ")) lastId = line.slice(4);
          if (line.startsWith("data: ")) data += line.slice(6);
        }
        if (data) take(JSON.parse(data));
      }
    }
  } finally {
    clearTimeout(quiet);
  }
}

const pause = (ms) => new Promise((resolve) => { const timer = setTimeout(resolve, ms); wake = () => { clearTimeout(timer); resolve(); }; });

async function follow() {
  let tries = 0;
  for (;;) {
    const abort = new AbortController();
    try {
      const headers = { accept: "text/event-stream" };
      if (lastId !== null) headers["last-event-id"] = lastId;
      if (token.value) headers.authorization = `Bearer ${token.value}`;
      const response = await fetch("api/events", { headers, cache: "no-store", credentials: "omit", mode: "same-origin", signal: abort.signal });
      if (response.status === 401) {
        connected("needs-token");
        if (token.value) refuse("This is not the dashboard's token.");
        await pause(3600000); // Until the token is typed.
        continue;
      }
      if (response.ok) {
        tries = 0;
        await read(response, () => abort.abort());
      }
    } catch { /* It cannot be reached, or is silent. */ }
    abort.abort();
    connected("lost");
    tries += 1;
    await pause(Math.min(1000 * 1.6 ** Math.min(tries, 5), 8000) * (0.8 + 0.4 * Math.random()));
  }
}
token.addEventListener("input", () => {
  // A screen reader reads the same message again only if it was gone.
  if (connection === "needs-token") $("result").textContent = "";
  if (state) showControls();
});
token.addEventListener("change", () => { if (connection === "needs-token") wake(); });
token.addEventListener("keydown", (event) => { if (event.key === "Enter" && connection === "needs-token") wake(); });
addEventListener("online", () => wake());
document.addEventListener("visibilitychange", () => { if (!document.hidden && connection === "lost") wake(); });
follow();
