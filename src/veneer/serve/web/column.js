// A column: which model answers, its answer as it streams, how fast, and how it ended.

import { rate } from "./metrics.js";
import { Broken, events } from "./sse.js";
import { Refusal, ask, words } from "./talk.js";

const BLEND = "blend";
const ENDINGS = {
  stop: "Finished",
  length: "Ended at max tokens",
  timeout: "The server ran out of time for it",
  cancelled: "Cancelled by the server",
};

// Values of options: models behind a mark, so that no name can be taken for BLEND.
const valueOf = (name) => `:${name}`;
const modelOf = (value) => value.slice(1);
const labels = new Map(); // of models that are called otherwise than they are asked for
const nameOf = (value) => (value === BLEND ? "Blend of two" : (labels.get(value) ?? modelOf(value)));

/** Offer these models in a select, and groups of them, and keep what is chosen; a chosen one that is gone stays, and
 * says so. */
function offer(select, entries, groups = []) {
  const chosen = select.value;
  const options = entries.map(([value, label]) => new Option(label, value));
  for (const { name, entries: own } of groups) {
    const group = Object.assign(document.createElement("optgroup"), { label: name });
    group.append(...own.map(([value, label]) => new Option(label, value)));
    options.push(group);
  }
  if (chosen && ![entries, ...groups.map((one) => one.entries)].flat().some(([value]) => value === chosen)) {
    options.push(new Option(`${nameOf(chosen)} (not on the server)`, chosen));
  }
  select.replaceChildren(...options);
  if (chosen) select.value = chosen;
}

/** One event of the stream: {text, finish, tokens}; tokens is null without usage. Throws what it says went wrong. */
function chunk(data) {
  let value;
  try {
    value = JSON.parse(data);
  } catch {
    throw new Refusal("The server sent an event that is no JSON.");
  }
  if (value.error) throw new Refusal(words(value.error) || "The server failed in the middle of the answer.");
  const choice = value.choices?.[0];
  const finish = choice?.finish_reason ?? null;
  return { text: choice?.delta?.content ?? choice?.text ?? "", finish, tokens: value.usage?.completion_tokens ?? null };
}

export class Column {
  /** `page`: {remove, again, changed, ended(column, words), refused(error)}, what the page does for a column. */
  constructor(template, page) {
    this.page = page;
    this.root = template.content.firstElementChild.cloneNode(true);
    this.at = (selector) => this.root.querySelector(selector);
    this.parts = [...this.root.querySelectorAll(".part")];
    this.weights = [...this.root.querySelectorAll(".weight")];
    this.at(".model").addEventListener("change", () => this.relabel());
    for (const input of [...this.parts, ...this.weights]) input.addEventListener("change", () => this.relabel());
    this.at(".remove").addEventListener("click", () => page.remove(this));
    this.at(".again").addEventListener("click", () => {
      this.at(".answer").focus({ preventScroll: true }); // the button is about to go
      page.again(this);
    });
  }

  /** Show a model, or a blend [[adapter, weight], …]; one that is not on the server is offered as such. */
  choose(model) {
    const pick = (select, value) => {
      if (![...select.options].some((option) => option.value === value)) {
        select.append(new Option(`${nameOf(value)} (not on the server)`, value));
      }
      select.value = value;
    };
    if (typeof model === "string") pick(this.at(".model"), valueOf(model));
    else {
      pick(this.at(".model"), BLEND);
      for (const [i, [name, weight]] of model.entries()) {
        pick(this.parts[i], valueOf(name));
        this.weights[i].value = String(weight);
      }
    }
    this.relabel();
  }

  /** What `choose` takes: the model, or the blend. */
  get choice() {
    if (!this.blends) return this.model;
    return this.parts.map((select, i) => [modelOf(select.value), this.weights[i].valueAsNumber]);
  }

  /** Offer what is in a catalog; `chosen` picks one of them. */
  offer({ base, alone, adapters, runs }, chosen) {
    const entries = adapters.map((name) => [valueOf(name), name]);
    const models = [...(alone ? [[valueOf(base), `${base} (base)`]] : []), ...entries];
    const valued = ([model, label]) => [valueOf(model), label];
    const groups = runs.map(({ name, models: own }) => ({ name, entries: own.map(valued) }));
    for (const [value, label] of groups.flatMap((one) => one.entries)) labels.set(value, label);
    offer(this.at(".model"), adapters.length > 1 ? [...models, [BLEND, "Blend of two"]] : models, groups);
    for (const [i, select] of this.parts.entries()) {
      const fresh = !select.value;
      offer(select, entries);
      if (fresh) select.selectedIndex = Math.min(i, entries.length - 1);
    }
    this.base = base;
    if (chosen === undefined) this.relabel();
    else this.choose(chosen);
  }

  get blends() {
    return this.at(".model").value === BLEND;
  }

  /** The model that is asked; null for a blend. */
  get model() {
    return this.blends ? null : modelOf(this.at(".model").value);
  }

  /** What the column is called: a model, or 0.7 french + 0.3 german. */
  get name() {
    if (!this.blends) return nameOf(this.at(".model").value);
    return this.parts.map((select, i) => `${this.weights[i].value || "?"} ${nameOf(select.value)}`).join(" + ");
  }

  /** The fields of a request that say which model answers. */
  target() {
    if (!this.blends) return { model: this.model };
    const [first, second] = this.parts.map((select) => modelOf(select.value));
    if (first === second) throw new Refusal("A blend needs two different adapters. Pick another one.");
    const numbers = this.weights.map((input) => input.valueAsNumber);
    if (!numbers.every(Number.isFinite)) throw new Refusal("Each adapter of a blend needs a weight, such as 0.5.");
    return { model: this.base, adapters: Object.fromEntries([[first, numbers[0]], [second, numbers[1]]]) };
  }

  relabel() {
    this.at(".blend").hidden = !this.blends;
    this.at(".model").setAttribute("aria-label", "Model of this column");
    this.at(".model").title = this.name; // which may be cut off
    for (const [i, word] of ["First", "Second"].entries()) {
      this.parts[i].setAttribute("aria-label", `${word} adapter of the blend`);
      this.weights[i].setAttribute("aria-label", `Weight of ${nameOf(this.parts[i].value)}`);
    }
    this.root.setAttribute("aria-label", this.name);
    this.at(".answer").setAttribute("aria-label", `Answer of ${this.name}`);
    this.at(".remove").setAttribute("aria-label", `Remove the column of ${this.name}`);
    this.page.changed();
  }

  /** Ask the column's model and show what it answers, until it ends, fails or `signal` aborts. Never throws. */
  async run(question, signal) {
    this.begin(question);
    let finish = null;
    try {
      const path = question.chat ? "v1/chat/completions" : "v1/completions";
      const response = await ask(path, { body: this.body(question), signal });
      let done = false;
      for await (const data of events(response.body)) {
        done = data === "[DONE]";
        if (done) break;
        finish = this.take(chunk(data)) ?? finish;
      }
      if (finish === "error") throw new Refusal("The server failed in the middle of the answer.");
      if (!done && !finish) throw new Broken("The connection closed before the answer was finished.");
      this.end("done", ENDINGS[finish] ?? `Ended: ${finish ?? "no reason was given"}`);
    } catch (error) {
      if (signal.aborted) this.end("stopped", "Stopped by you");
      else this.fail(error);
    }
  }

  body({ chat, system, prompt, temperature, maxTokens, seed, stop }) {
    const body = { ...this.target(), stream: true, stream_options: { include_usage: true } };
    Object.assign(body, { temperature, max_tokens: maxTokens });
    if (seed !== null) body.seed = seed;
    if (stop.length) body.stop = stop;
    if (!chat) return Object.assign(body, { prompt });
    const told = system ? [{ role: "system", content: system }] : [];
    return Object.assign(body, { messages: [...told, { role: "user", content: prompt }] });
  }

  begin(question) {
    this.root.dataset.state = "waiting";
    this.at(".given").textContent = question.chat ? "" : question.prompt;
    this.at(".text").replaceChildren((this.text = document.createTextNode("")));
    this.at(".answer").setAttribute("aria-busy", "true");
    this.at(".failure").hidden = true;
    this.at(".error").textContent = "";
    this.at(".ending").textContent = "Waiting for the first token";
    this.clock = { sent: performance.now(), first: null, last: null, tokens: 0 };
    this.count();
  }

  /** Show one event; its reason to finish, if it has one. Until the server counts, an event with text is a token. */
  take({ text, finish, tokens }) {
    if (text) {
      const box = this.at(".answer");
      const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 32;
      this.text.appendData(text);
      if (follows) box.scrollTop = box.scrollHeight;
      this.clock.last = performance.now();
      this.clock.first ??= this.clock.last;
      this.clock.tokens += 1;
      this.root.dataset.state = "streaming";
      this.at(".ending").textContent = "Answering";
    }
    if (tokens !== null) this.clock.tokens = tokens;
    this.count();
    return finish;
  }

  count() {
    const { sent, first, last, tokens } = this.clock;
    const span = (last - first) / 1000;
    this.at(".speed").textContent = span > 0 && tokens > 1 ? rate((tokens - 1) / span) : "–";
    this.at(".first").textContent = first === null ? "–" : `${Math.round(first - sent)} ms`;
    this.at(".tokens").textContent = tokens ? String(tokens) : "–";
  }

  end(state, said) {
    this.root.dataset.state = state;
    this.at(".answer").setAttribute("aria-busy", "false");
    this.at(".ending").textContent = said;
    this.page.ended(this, `${this.name}: ${said}. ${this.text.data.slice(0, 500)}`);
  }

  fail(error) {
    const known = error instanceof Refusal || error instanceof Broken;
    if (!known) console.error(error);
    this.at(".failure").hidden = false;
    this.at(".error").textContent = known ? error.message : `This page failed: ${error}`;
    this.end("failed", this.text.data ? "Broke off" : "Failed");
    this.page.refused(error);
  }
}
