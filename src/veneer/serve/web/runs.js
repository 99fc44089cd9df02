// Runs that clients train on this server: losses, who shares the batch, checkpoints, and what of them can be asked.

import { bytes, rate } from "./metrics.js";
import { get } from "./talk.js";

const FIRST = 8; // runs on the page, those used last; a button shows more of them
const MORE = 24;
const MOST = 100; // the server's own limit
const NOW = 5; // seconds after which a batch is of the past
const [WIDE, HIGH] = [200, 48]; // the viewBox of a curve

/** A loss in words: four digits. */
export function number(loss) {
  const size = Math.abs(loss);
  return size && (size >= 1e4 || size < 1e-3) ? loss.toExponential(2) : loss.toPrecision(4);
}

/** A time that has passed, in words. */
export function ago(seconds) {
  const units = [[86400, "days"], [3600, "h"], [60, "min"], [1, "s"]];
  const [size, unit] = units.find(([most]) => seconds >= most) ?? [1, "s"];
  return `${Math.max(1, Math.round(seconds / size))} ${unit}`;
}

const list = (words) => (words.length > 1 ? `${words.slice(0, -1).join(", ")} and ${words.at(-1)}` : words.join(""));

/** Who shares the batch; `named` gives a run's name. */
export function sharing(batch, named) {
  if (!batch) return "Nothing was trained since the server started.";
  const { runs, others, seconds_ago: past } = batch;
  const foreign = others ? [`${others} ${others === 1 ? "run" : "runs"} of other keys`] : [];
  const who = list([...runs.map(named), ...foreign]);
  if (past > NOW) return `Nothing is trained now. The last batch, ${ago(past)} ago, was of ${who || "none"}.`;
  return runs.length + others > 1 ? `Sharing the batch now: ${who}.` : `In the batch now: ${who}, alone.`;
}

/** The path of losses [[step, loss]] in the box of a curve, and what lies at its top and bottom. */
export function path(losses) {
  const values = losses.map(([, loss]) => loss);
  const [most, least] = [Math.max(...values), Math.min(...values)];
  const [first, last] = [losses[0][0], losses.at(-1)[0]];
  const x = (step) => (last > first ? ((step - first) / (last - first)) * WIDE : WIDE);
  const y = (loss) => (most > least ? 3 + ((most - loss) / (most - least)) * (HIGH - 6) : HIGH / 2);
  const points = losses.map(([step, loss]) => `${x(step).toFixed(1)} ${y(loss).toFixed(1)}`);
  return { most, least, line: `M${points.join("L")}${points.length > 1 ? "" : "h0"}` };
}

/** What a row says of a run: rank 8 · 12,400 tokens · in memory. Targets, where they are not the usual ones. */
export function facts(run, shares) {
  const { rank, targets, tokens, metadata, waiting, unloaded, in_memory: held } = run;
  const where = shares ? "in the batch" : unloaded ? "ended" : held ? "in memory" : "on disk";
  const parts = ["attention", "mlp"].every((one) => targets.includes(one)) ? [] : [`${targets.join(", ")} alone`];
  const said = [`rank ${rank}`, ...parts, `${tokens.toLocaleString("en")} tokens`, where];
  if (waiting > 1) said.push(`${waiting} requests wait`);
  return [...said, ...Object.entries(metadata).map(([name, value]) => `${name} ${value}`)].join(" · ");
}

const KINDS = { training: "training state", sampler: "sampler weights", external: "adapter folder" };
const time = (seconds) => new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

export class Runs {
  /** `page`: {compare(model)}, what the page does for it. */
  constructor(root, page) {
    this.page = page;
    this.at = (id) => root.getElementById(id);
    this.rows = new Map();
    this.limit = FIRST;
    this.close();
    this.at("runs-more").addEventListener("click", () => {
      this.limit = Math.min(MOST, this.limit + MORE);
      this.page.refresh();
    });
  }

  /** Ask the server for its runs and show them; whether other models than before can be asked. Throws a Refusal. */
  async refresh() {
    const limit = this.limit;
    const found = await get(`api/v1/live?limit=${limit}`);
    if (limit !== this.limit) return false; // more are asked for meanwhile
    const before = JSON.stringify(this.models());
    this.base = found.base;
    this.runs = arranged(found.runs);
    const names = this.runs.map(({ name }) => name);
    const twice = names.filter((name, i) => names.indexOf(name) !== i);
    const short = (id) => `${id.slice(0, 8)} · ${id.slice(id.lastIndexOf(":") + 1)}`;
    for (const run of this.runs) if (twice.includes(run.name)) run.name += ` (${short(run.id)})`;
    this.draw(found);
    return JSON.stringify(this.models()) !== before;
  }

  /** Forget what was shown: this server trains nothing, or another key is used. */
  close() {
    Object.assign(this, { runs: [], base: null });
    for (const id of this.rows.keys()) this.drop(id);
    this.at("training").hidden = true;
  }

  /** What can be asked, as [{name, models: [[model, label]]}]: of each run it as it is now, and its checkpoints. */
  models() {
    return this.runs.map(({ id, name, steps, in_memory: held, checkpoints }) => {
      const kind = (one) => (one.kind === "training" ? "" : ` (${one.kind})`);
      const stored = checkpoints.map((one) => [one.path, `${name}, ${one.name}${kind(one)}`]);
      return { name, models: [...(steps || held ? [[`tinker://${id}/now`, `${name}, now`]] : []), ...stored] };
    });
  }

  /** Rows are changed in place, never made anew: the focus stays where it is. */
  draw({ batch, total_count: total }) {
    const named = new Map(this.runs.map(({ id, name }) => [id, name]));
    const sharers = new Set(batch && batch.seconds_ago <= NOW ? batch.runs.map(({ id }) => id) : []);
    this.at("training").hidden = false;
    this.at("runs-count").textContent = total > this.runs.length ? `${this.runs.length} of ${total}` : `${total || ""}`;
    this.at("runs-more").hidden = total <= this.runs.length || this.limit >= MOST;
    this.at("runs-words").hidden = total > 0;
    const address = new URL(".", location.href).href.replace(/\/$/, "");
    this.at("runs-address").textContent = `tinker.ServiceClient(base_url="${address}")`;
    this.at("runs-batch").textContent = total ? sharing(batch, ({ id, name }) => named.get(id) ?? name) : "";
    for (const id of this.rows.keys()) if (!named.has(id)) this.drop(id);
    this.runs.forEach((run, i) => {
      const row = this.rows.get(run.id) ?? this.make(run.id);
      const there = this.at("runs").children[i] ?? null;
      if (there !== row) this.at("runs").insertBefore(row, there);
      show(row, run, sharers.has(run.id));
      this.checkpoints(row, run);
    });
  }

  make(id) {
    const row = this.at("run-template").content.firstElementChild.cloneNode(true);
    row.querySelector(".compare").addEventListener("click", () => this.page.compare(`tinker://${id}/now`));
    this.rows.set(id, row);
    return row;
  }

  drop(id) {
    const row = this.rows.get(id);
    const focused = row.contains(document.activeElement);
    row.remove();
    this.rows.delete(id);
    if (focused) this.at("training-title").focus();
  }

  checkpoints(row, { name, checkpoints, checkpoints_count: count }) {
    const at = row.querySelector(".checkpoints ul");
    row.querySelector(".checkpoints").hidden = !checkpoints.length;
    const shown = checkpoints.length < count ? `, ${checkpoints.length} of them here` : "";
    row.querySelector("summary").textContent = `${count} ${count === 1 ? "checkpoint" : "checkpoints"}${shown}`;
    const rows = new Map([...at.children].map((one) => [one.dataset.path, one]));
    checkpoints.forEach((one, i) => {
      const item = rows.get(one.path) ?? this.item(one);
      rows.delete(one.path);
      const until = one.expires ? `until ${time(one.expires)}` : null;
      const said = [KINDS[one.kind], bytes(one.bytes), time(one.created), until].filter(Boolean);
      item.querySelector(".facts").textContent = said.join(" · ");
      item.querySelector(".compare").setAttribute("aria-label", `Compare ${one.name} of ${name}`);
      if (at.children[i] !== item) at.insertBefore(item, at.children[i] ?? null);
    });
    for (const gone of rows.values()) {
      if (gone.contains(document.activeElement)) row.querySelector("summary").focus();
      gone.remove();
    }
  }

  item({ path: model, name }) {
    const item = this.at("checkpoint-template").content.firstElementChild.cloneNode(true);
    item.dataset.path = model;
    item.querySelector(".name").textContent = name;
    item.querySelector(".path").textContent = model;
    item.querySelector(".compare").addEventListener("click", () => this.page.compare(model));
    return item;
  }
}

/** The newest sessions first, runs of a session in their order: they stay where they are while they train. */
function arranged(runs) {
  const session = ({ id }) => id.slice(0, id.lastIndexOf(":"));
  const newest = new Map();
  for (const run of runs) newest.set(session(run), Math.max(run.created, newest.get(session(run)) ?? 0));
  return runs.sort((a, b) => newest.get(session(b)) - newest.get(session(a)) || a.created - b.created);
}

function show(row, run, shares) {
  const { name, steps, losses, tokens_per_second: speed, in_memory: held } = run;
  const at = (selector) => row.querySelector(selector);
  row.dataset.resident = String(held);
  row.dataset.shares = String(shares);
  at(".name").textContent = name;
  at(".loss").title = "of the last step, a token";
  at(".facts").textContent = facts(run, shares);
  at(".compare").setAttribute("aria-label", `Compare ${name} as it is now`);
  at(".compare").hidden = !steps && !held;
  at(".steps").textContent = steps.toLocaleString("en");
  at(".speed").textContent = speed ? rate(speed) : "–";
  at(".losses").hidden = !losses.length;
  at(".loss").textContent = losses.length ? number(losses.at(-1)[1]) : "–";
  if (!losses.length) return;
  const { most, least, line } = path(losses);
  at(".line").setAttribute("d", line);
  at(".most").textContent = number(most);
  at(".least").textContent = most > least ? number(least) : "";
  const words = `Loss of ${name} over ${steps} steps: from ${number(losses[0][1])} to ${number(losses.at(-1)[1])}, `;
  at(".curve").setAttribute("aria-label", `${words}lowest ${number(least)}`);
}
