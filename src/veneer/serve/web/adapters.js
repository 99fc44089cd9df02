// The shelf: every adapter of the server, what it costs, and the buttons that load, pin, unload and compare it.

import { bytes } from "./metrics.js";
import { Refusal, ask, get } from "./talk.js";

const SHOWN = 50; // rows on the page at once; the filter finds the others

/** What a row says of an adapter: rank 8 · lora · 9.4 MiB · in memory · pinned. */
export function facts({ resident, bytes: size, pinned, users, rank, variant }) {
  const said = [rank ? `rank ${rank}` : null, variant, size ? bytes(size) : null, resident ? "in memory" : "on disk"];
  return [...said, pinned ? "pinned" : null, users ? `${users} in use` : null].filter(Boolean).join(" · ");
}

export class Shelf {
  /**
   * `page`: {compare(name), changed(), resident(bytes | null), refused(error)}, what the page does for it; changed()
   * when an adapter came or went by a button.
   */
  constructor(root, page) {
    this.page = page;
    this.at = (id) => root.getElementById(id);
    this.rows = new Map();
    this.listed = [];
    this.turn = 0; // counts the questions, so that an old answer is known as such
    this.at("filter").addEventListener("input", () => this.draw());
    this.at("load").addEventListener("submit", (event) => {
      event.preventDefault();
      this.load();
    });
  }

  /** Ask the server for its adapters and show them; whether others than before are there. Throws a Refusal. */
  async refresh() {
    const turn = ++this.turn;
    const listed = await get("v1/adapters");
    if (turn !== this.turn) return false; // a later one was asked for meanwhile, after a button changed something
    const before = this.listed.map(({ name }) => name);
    this.listed = listed;
    const same = this.listed.length === before.length && this.listed.every(({ name }, i) => name === before[i]);
    this.say(this.listed.length ? null : "There is none yet.");
    this.page.resident(this.listed.reduce((sum, { resident, bytes: size }) => sum + (resident ? (size ?? 0) : 0), 0));
    this.draw();
    return !same;
  }

  /** Forget what was listed and say why. */
  close(text) {
    this.listed = [];
    this.page.resident(null);
    this.draw();
    this.at("load-details").hidden = true;
    this.say(text);
  }

  /** Show the buttons that change what is loaded, or do not. */
  manage(may) {
    this.at("load-details").hidden = !may;
    this.at("adapters").classList.toggle("fixed", !may);
  }

  say(text) {
    this.at("adapters-words").textContent = text ?? "";
    this.at("adapters-words").hidden = text === null;
  }

  /** Rows are changed in place, never made anew: the focus stays where it is. */
  draw() {
    const wanted = this.at("filter").value.trim().toLowerCase();
    const found = this.listed.filter(({ name }) => name.toLowerCase().includes(wanted));
    const shown = found.slice(0, SHOWN);
    const names = new Set(shown.map(({ name }) => name));
    for (const [name, row] of this.rows) if (!names.has(name)) this.drop(name, row);
    shown.forEach((status, i) => {
      const row = this.rows.get(status.name) ?? this.make(status.name);
      const there = this.at("adapters").children[i] ?? null;
      if (there !== row) this.at("adapters").insertBefore(row, there);
      row.querySelector(".facts").textContent = facts(status);
      row.dataset.resident = String(Boolean(status.resident));
      row.querySelector(".pin").setAttribute("aria-pressed", String(Boolean(status.pinned)));
      row.querySelector(".pin").textContent = status.pinned ? "Pinned" : "Pin";
    });
    const all = this.listed.length;
    this.at("filter-label").hidden = all <= 8 && !wanted;
    this.at("adapters-count").textContent = shown.length === all ? `${all || ""}` : `${shown.length} of ${all}`;
  }

  make(name) {
    const row = this.at("adapter-template").content.firstElementChild.cloneNode(true);
    row.querySelector(".name").textContent = name;
    for (const [kind, word] of [["compare", "Compare"], ["pin", "Pin"], ["unload", "Unload"]]) {
      row.querySelector(`.${kind}`).setAttribute("aria-label", `${word} ${name}`);
    }
    row.querySelector(".compare").addEventListener("click", () => this.page.compare(name));
    row.querySelector(".pin").addEventListener("click", (event) => this.pin(name, row, event.currentTarget));
    row.querySelector(".unload").addEventListener("click", (event) => this.unload(name, row, event.currentTarget));
    this.rows.set(name, row);
    return row;
  }

  drop(name, row) {
    const focused = row.contains(document.activeElement);
    const next = row.nextElementSibling ?? row.previousElementSibling;
    row.remove();
    this.rows.delete(name);
    if (focused) (next?.querySelector(".unload") ?? this.at("adapters-title")).focus();
  }

  /** One request of a button: no second one meanwhile, its error under it, what it did in words below the list. */
  async act(button, errorAt, path, body, said) {
    if (button.getAttribute("aria-disabled") === "true") return false;
    button.setAttribute("aria-disabled", "true");
    errorAt.hidden = true;
    try {
      await (await ask(path, { body })).text();
      this.at("adapters-said").textContent = said;
      await this.page.changed();
      await this.refresh();
      return true;
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      errorAt.textContent = error.message;
      errorAt.hidden = false;
      this.page.refused(error);
      return false;
    } finally {
      button.setAttribute("aria-disabled", "false");
    }
  }

  async load() {
    const name = this.at("load-name").value.trim();
    const body = { lora_name: name, lora_path: this.at("load-path").value.trim() || name };
    if (this.at("load-pin").checked) body.pin = true;
    const button = this.at("load-button");
    button.textContent = "Loading";
    const done = await this.act(button, this.at("load-error"), "v1/load_lora_adapter", body, `${name} is loaded.`);
    button.textContent = "Load";
    if (done) {
      this.at("load").reset();
      this.at("load-name").focus();
    }
  }

  async pin(name, row, button) {
    const pin = button.getAttribute("aria-pressed") !== "true";
    const said = pin ? `${name} stays in memory.` : `${name} may leave the memory when room is needed.`;
    await this.act(button, row.querySelector(".error"), "v1/load_lora_adapter", { lora_name: name, pin }, said);
  }

  async unload(name, row, button) {
    const said = `${name} is unloaded. Its files stay where they are.`;
    await this.act(button, row.querySelector(".error"), "v1/unload_lora_adapter", { lora_name: name }, said);
  }
}
