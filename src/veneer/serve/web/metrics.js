// The server's numbers: Prometheus text → tiles and a line over the last minutes.

const KEPT = 60; // samples in the line

/** Sums of the samples of each name in Prometheus' text format, over all labels: Map of name → number. */
export function parse(text) {
  const sums = new Map();
  const sample = /^([a-zA-Z_:][\w:]*)(?:\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\})?[ \t]+(\S+)/;
  for (const line of text.split("\n")) {
    const found = sample.exec(line);
    const value = found ? Number(found[2]) : NaN;
    if (Number.isFinite(value)) sums.set(found[1], (sums.get(found[1]) ?? 0) + value);
  }
  return sums;
}

/** Bytes in words: 1536 → "1.5 KiB". */
export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${unit === 0 || count >= 100 ? Math.round(count) : count.toFixed(1)} ${units[unit]}`;
}

/** A rate in words: one digit after the point below 100. */
export const rate = (number) => (number < 99.95 ? number.toFixed(1) : Math.round(number).toString());

/** The panel of the server: `show(text)` takes what /metrics says, `resident(bytes)` what the adapters hold. */
export function panel(root) {
  const at = (id) => root.getElementById(id);
  const rates = [];
  let last = null;

  /** Tokens a second since the last sample; null for the first one and after a restart of the server. */
  function speed(tokens, now) {
    const before = last;
    last = { tokens, now };
    if (!before || tokens < before.tokens || now <= before.now) return null;
    return (tokens - before.tokens) / ((now - before.now) / 1000);
  }

  function draw() {
    const top = Math.max(...rates, 1);
    const right = (i) => 120 - (rates.length - 1 - i) * (120 / (KEPT - 1));
    const points = rates.map((value, i) => [right(i), 30 - (value / top) * 27]);
    const line = points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
    at("spark").querySelector(".line").setAttribute("d", `M${line}`);
    at("spark").querySelector(".area").setAttribute("d", `M${points[0][0].toFixed(1)} 32L${line}L120 32Z`);
    const now = rate(rates.at(-1));
    at("spark").setAttribute("aria-label", `Tokens per second: ${now} now, at most ${rate(Math.max(...rates))} lately`);
  }

  return {
    show(text, now) {
      const sums = parse(text);
      for (const [id, name] of [["running", "veneer_running"], ["waiting", "veneer_waiting"]]) {
        at(id).textContent = sums.has(name) ? String(sums.get(name)) : "–";
      }
      const tokens = sums.get("veneer_generated_tokens_total");
      const value = tokens === undefined ? null : speed(tokens, now);
      at("rate").textContent = value === null ? "–" : rate(value);
      if (value !== null) {
        rates.push(value);
        if (rates.length > KEPT) rates.shift();
        draw();
      }
    },
    resident(count) {
      at("memory").textContent = count === null ? "–" : bytes(count);
    },
    /** Say why there are no numbers; null clears it. */
    say(text) {
      at("server-words").textContent = text ?? "";
      at("server-words").hidden = text === null;
      if (text === null) return;
      for (const id of ["running", "waiting", "rate"]) at(id).textContent = "–";
      last = null;
    },
  };
}
