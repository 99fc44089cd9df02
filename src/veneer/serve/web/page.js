// The page: what each part does for the others. Models say what they like here: text is only ever set as text.

import { Shelf } from "./adapters.js";
import { Column } from "./column.js";
import { read, stops, write } from "./link.js";
import { panel } from "./metrics.js";
import { Runs } from "./runs.js";
import { Refusal, get, hasKey, setKey } from "./talk.js";

// A browser opens six connections to a server. Four stream, so that two are left for everything else.
const MOST_COLUMNS = 4;
const EVERY = 2000; // ms between looks at the server
const TRAINING = "/api/v1"; // where a server that trains has its runs
// Fields of the composer by their names in a link.
const FIELDS = { system: "system", prompt: "prompt", temperature: "temperature", max_tokens: "max-tokens", seed: "seed",
  stop: "stop-strings" };

const at = (id) => document.getElementById(id);
const columns = [];
const running = new Map(); // column → AbortController
const allowed = { metrics: true, adapters: true, runs: true }; // until the server says that this key may not
let catalog = null; // {base, alone: whether the base itself may be asked, adapters: [name], runs: as Runs.models()}
let question = null; // what was asked last
let early = false; // it was sent before the models were known
let locked = false; // the server wants a key that we do not have
let trains = false; // the server does, and has runs
let chosenMode = false; // somebody chose chat or completion
let withSystem = false; // the field of the system prompt is shown

const server = panel(document);
const shelf = new Shelf(document, {
  compare,
  changed: () => readCatalog(),
  resident: (count) => server.resident(count),
  refused,
});
const runs = new Runs(document, { compare, refresh: look });

// Columns

function add(name) {
  const column = new Column(at("column-template"), {
    remove,
    again: (one) => start([one]),
    changed: arrange,
    ended: (_, said) => at("live").append(Object.assign(document.createElement("p"), { textContent: said })),
    refused,
  });
  if (columns.length >= MOST_COLUMNS) remove(columns.at(-1));
  columns.push(column);
  at("columns").append(column.root);
  column.offer(catalog, name);
  return column;
}

/** Show a model in a column; with all columns taken, in the last one. */
function compare(name) {
  if (!catalog) return; // it is being read
  focus(columns.find((one) => one.model === name) ?? add(name));
}

function focus(column) {
  column.root.scrollIntoView({ block: "nearest", inline: "nearest" });
  column.at(".model").focus();
}

function remove(column) {
  running.get(column)?.abort();
  const place = columns.indexOf(column);
  const focused = column.root.contains(document.activeElement);
  columns.splice(place, 1);
  column.root.remove();
  arrange();
  if (focused) focus(columns[Math.max(0, place - 1)]);
}

function arrange() {
  const full = columns.length >= MOST_COLUMNS;
  at("add-column").setAttribute("aria-disabled", String(full || !catalog));
  at("add-column").textContent = full ? `${MOST_COLUMNS} columns at most` : "Add column";
  for (const column of columns) column.at(".remove").hidden = columns.length === 1;
  at("copy-link").hidden = columns.length === 0;
}

/** What a column can show: the base, adapters, runs as they are now and, at last, checkpoints. */
function models() {
  const ofRuns = catalog.runs.flatMap((run) => run.models.map(([model]) => model));
  const stored = (model) => (model.endsWith("/now") ? 0 : 1);
  ofRuns.sort((a, b) => stored(a) - stored(b));
  return [...(catalog.alone ? [catalog.base] : []), ...catalog.adapters, ...ofRuns];
}

/** The next model that no column shows yet, for a new column. */
function unused() {
  const shown = new Set(columns.map((column) => column.model));
  return models().find((name) => !shown.has(name)) ?? models()[0];
}

// Prompts, and links to a comparison

const mode = () => document.querySelector("input[name=kind]:checked").value;

function setMode(name) {
  document.querySelector(`input[name=kind][value=${name}]`).checked = true;
  showSystem();
}

/** A system prompt belongs to a chat; its field is there when it is used. */
function showSystem() {
  withSystem ||= at("system").value !== "";
  at("system-field").hidden = mode() !== "chat" || !withSystem;
  at("add-system").hidden = mode() !== "chat" || withSystem;
}

/** The first columns: those of the page's link, or the base and the first adapters. */
async function openColumns() {
  const linked = read(location.hash);
  if (linked) return follow(linked);
  for (const name of models().slice(0, 3)) add(name);
  await prime();
}

/** Open as the first adapter was trained: its mode, its system prompt, a prompt of its data. */
async function prime() {
  const name = catalog.adapters.find((one) => columns.some(({ model }) => model === one)) ?? catalog.base;
  if (!catalog.adapters.includes(name) && !catalog.alone) return;
  let form;
  try {
    form = (await get(`v1/models/${encodeURIComponent(name)}`)).prompt;
  } catch (error) {
    if (error.status !== 404) throw error;
    return; // it was unloaded a moment ago
  }
  if (!chosenMode && !early) setMode(form.mode);
  at("system").value ||= form.system ?? "";
  at("prompt").value ||= form.example ?? "";
  showSystem();
}

/** Show the comparison of a link. Nothing is sent: who opens a link decides whether it is asked. */
function follow({ settings, columns: linked }) {
  stop();
  for (const column of columns.splice(0)) column.root.remove();
  for (const model of linked.slice(0, MOST_COLUMNS)) add(model);
  if (!columns.length) add(unused());
  for (const [name, id] of Object.entries(FIELDS)) at(id).value = settings[name] ?? at(id).defaultValue;
  chosenMode = true;
  setMode(settings.mode);
}

async function copyLink() {
  const settings = { mode: mode() };
  for (const [name, id] of Object.entries(FIELDS)) settings[name] = at(id).value;
  history.replaceState(null, "", write({ settings, columns: columns.map((column) => column.choice) }));
  try {
    await navigator.clipboard.writeText(location.href);
    at("link-words").textContent = "The link is copied. It holds the prompt and the settings, and no key.";
  } catch {
    at("link-words").textContent = "The link is in the address bar. It holds the prompt and the settings, and no key.";
  }
}

// Asking

function askAll() {
  if (running.size) return;
  early = !catalog; // it goes out when the models are known
  if (early) return;
  if (!at("composer").reportValidity()) return;
  question = {
    chat: mode() === "chat",
    system: at("system").value.trim(),
    prompt: at("prompt").value,
    temperature: at("temperature").valueAsNumber,
    maxTokens: at("max-tokens").valueAsNumber,
    seed: at("seed").value === "" ? null : at("seed").valueAsNumber,
    stop: stops(at("stop-strings").value),
  };
  at("live").replaceChildren();
  start(columns);
  show();
}

/** On a small screen the answers are below the prompt: bring them up, unless they are in sight. */
function show() {
  if (at("columns").getBoundingClientRect().top < innerHeight * 0.6) return;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  at("answers-title").parentElement.scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
}

function start(chosen) {
  for (const column of chosen) {
    const controller = new AbortController();
    running.set(column, controller);
    column.run(question, controller.signal).finally(() => {
      running.delete(column);
      busy();
    });
  }
  busy();
}

function stop() {
  for (const controller of running.values()) controller.abort();
}

function busy() {
  const on = running.size > 0;
  if (!on && [at("stop"), at("stop-here")].includes(document.activeElement)) at("send").focus({ preventScroll: true });
  at("send").setAttribute("aria-disabled", String(on));
  at("stop").disabled = !on;
  at("stop-here").hidden = !on;
}

// Keys

function refused(error) {
  if (error.status === 401) lock(hasKey() ? "The server does not know this key." : null);
}

function lock(why) {
  if (locked) return; // of several looks under way, the first one's refusal says why
  locked = true;
  if (hasKey()) setKey("");
  showState("locked", "A key is needed");
  openKey(why);
}

function openKey(why) {
  at("key-error").textContent = why ?? "";
  at("key-error").hidden = !why;
  at("key-forget").hidden = !hasKey();
  at("key-title").textContent = hasKey() ? "Another key" : "This server asks for a key";
  at("key").value = "";
  if (!at("key-dialog").open) at("key-dialog").showModal();
}

async function useKey() {
  const before = { locked, key: null };
  locked = true; // nobody else uses the key before it is known to be one
  try {
    before.key = setKey(at("key").value.trim());
    await readRuns();
    await readCatalog();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (before.key !== null) setKey(before.key);
    locked = before.locked;
    at("key-error").textContent = error.status === 401 ? "The server does not know this key." : error.message;
    at("key-error").hidden = false;
    at("key").select();
    return;
  }
  unlock();
}

function unlock() {
  locked = false;
  Object.assign(allowed, { metrics: true, adapters: true, runs: true });
  shelf.manage(true);
  server.say(null);
  notice(null);
  at("key-button").hidden = !hasKey();
  at("key-dialog").close();
  look();
}

function forgetKey() {
  setKey("");
  catalog = null;
  runs.close();
  unlock();
}

// The server

function notice(text, label, action) {
  at("notice").hidden = text === null;
  at("notice-words").textContent = text ?? "";
  at("notice-button").textContent = label ?? "";
  at("notice-button").onclick = action ?? null;
}

function showState(state, said) {
  at("state").dataset.state = state;
  if (at("state-words").textContent !== said) at("state-words").textContent = said; // said again is read aloud again
}

/** Which models there are: the base, and the adapters that this key may use. Throws a Refusal. */
async function readCatalog() {
  const { data } = await get("v1/models");
  if (!data.length && !runs.base) throw new Refusal("There is no model that this key may use.");
  const alone = data.find(({ parent }) => !parent);
  const adapters = data.filter(({ parent }) => parent);
  const base = alone?.id ?? adapters[0]?.parent ?? runs.base;
  catalog = { base, alone: Boolean(alone), adapters: adapters.map(({ id }) => id), runs: runs.models() };
  at("base").textContent = catalog.base;
  for (const column of columns) column.offer(catalog);
  if (!columns.length) await openColumns();
  if (early) askAll();
}

/** What clients train here, if the server trains. Throws a Refusal. */
async function readRuns() {
  if (!trains) return;
  await part("runs", async () => {
    if (!(await runs.refresh()) || !catalog) return;
    catalog.runs = runs.models();
    for (const column of columns) column.offer(catalog);
  });
}

/** One look at everything; a part that this key may not see is not asked for again. */
async function look() {
  if (locked || document.hidden) return;
  try {
    await ready();
    await part("metrics", async () => server.show(await get("metrics?adapters=0", { json: false }), performance.now()));
    await readRuns();
    if (!catalog) await readCatalog();
    await part("adapters", async () => {
      if (await shelf.refresh()) await readCatalog();
    });
    notice(null);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 401) return lock(hasKey() ? "The server does not know this key." : null);
    if (!catalog) notice(error.message, "Try again", look);
    if (!error.status) showState("lost", "Not reachable");
  }
}

async function ready() {
  try {
    const { extensions } = await get("ready");
    showState("ready", "Ready");
    const before = trains;
    trains = extensions.includes(TRAINING);
    if (before && !trains) runs.close();
  } catch (error) {
    if (error.status !== 503) throw error;
    showState("draining", "Takes no requests now");
  }
}

async function part(name, run) {
  if (!allowed[name]) return;
  try {
    await run();
  } catch (error) {
    if (![403, 404].includes(error.status)) throw error;
    allowed[name] = false;
    if (name === "metrics") {
      server.say("Only an admin's key reads the server's numbers.");
      shelf.manage(false); // and only such a key loads and unloads
    } else if (name === "adapters") shelf.close("This key may not see which adapters there are.");
    else runs.close(); // a server that does not train
  }
}

// Wires

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  askAll();
});
for (const radio of document.querySelectorAll("input[name=kind]")) {
  radio.addEventListener("change", () => {
    chosenMode = true;
    showSystem();
  });
}
at("add-system").addEventListener("click", () => {
  withSystem = true;
  showSystem();
  at("system").focus();
});
at("copy-link").addEventListener("click", copyLink);
addEventListener("hashchange", () => {
  const linked = read(location.hash);
  if (linked && catalog) follow(linked);
});
for (const id of ["stop", "stop-here"]) at(id).addEventListener("click", stop);
at("add-column").addEventListener("click", () => {
  if (at("add-column").getAttribute("aria-disabled") !== "true") focus(add(unused()));
});
at("key-button").addEventListener("click", () => openKey(null));
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey();
});
at("key-cancel").addEventListener("click", () => at("key-dialog").close());
at("key-forget").addEventListener("click", forgetKey);
at("key-dialog").addEventListener("close", () => {
  if (locked) notice("This server asks for a key.", "Enter a key", () => openKey(null));
});
document.addEventListener("keydown", (event) => {
  if (at("key-dialog").open) return;
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !at("load").contains(event.target)) {
    event.preventDefault();
    askAll();
  }
});

at("key-button").hidden = !hasKey();
arrange();
for (;;) {
  await look().catch((error) => {
    console.error(error);
    notice(`This page failed: ${error}`, "Try again", look);
  });
  await new Promise((resolve) => setTimeout(resolve, EVERY));
}
