// A comparison as the fragment of the page's address: models, mode, settings and prompts. It never leaves the browser.
//
// #mode=chat&prompt=…&temperature=0.7&model=french&blend=[["french",0.7],["german",0.3]]

const SETTINGS = ["mode", "system", "prompt", "temperature", "max_tokens", "seed", "stop"];

/** The fragment of a comparison: {settings: {name: text}, columns: [model name or [[adapter, weight], …]]}. */
export function write({ settings, columns }) {
  const fields = new URLSearchParams();
  for (const name of SETTINGS) if (settings[name]) fields.append(name, settings[name]);
  for (const column of columns) {
    if (typeof column === "string") fields.append("model", column);
    else fields.append("blend", JSON.stringify(column));
  }
  return `#${fields}`;
}

/** The comparison of a fragment; null for one that holds none, such as #prompt. Unknown fields are left out. */
export function read(fragment) {
  const settings = {};
  const columns = [];
  for (const [name, text] of new URLSearchParams(fragment.replace(/^#/, ""))) {
    if (name === "model" && text) columns.push(text);
    else if (name === "blend") columns.push(...blends(text));
    else if (SETTINGS.includes(name)) settings[name] = text;
  }
  return ["chat", "completion"].includes(settings.mode) ? { settings, columns } : null;
}

/** A blend in JSON, as a list of one; an empty list for anything else. */
function blends(text) {
  let parts;
  try {
    parts = JSON.parse(text);
  } catch {
    return []; // an address that somebody changed by hand
  }
  const pair = (part) => Array.isArray(part) && typeof part[0] === "string" && Number.isFinite(part[1]);
  return Array.isArray(parts) && parts.length === 2 && parts.every(pair) ? [parts] : [];
}

/** Stop strings as one types them: one a line, with \n, \t and \\ for what a line cannot hold. */
export function stops(text) {
  const marks = { n: "\n", r: "\r", t: "\t", "\\": "\\" };
  return text
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => line.replace(/\\([nrt\\])/g, (_, mark) => marks[mark]));
}
