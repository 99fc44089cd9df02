// Requests to the server that this page came from, with the key, and what it refuses in words.

const PLACE = "veneer-key";
let key = "";
try {
  key = sessionStorage.getItem(PLACE) ?? "";
} catch {
  // storage is switched off in this browser: the key lives as long as the page
}

/** What the server refused, or that it cannot be reached. `message` is for people; `status` is 0 without an answer. */
export class Refusal extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const hasKey = () => key !== "";

/** Keep a key for this tab (the empty one forgets it); the key before. Throws a Refusal if no header can carry it. */
export function setKey(value) {
  if (!/^[\x21-\x7e]*$/.test(value)) throw new Refusal("A key has no spaces, accents or line breaks. Copy it again.");
  const before = key;
  key = value;
  try {
    if (key) sessionStorage.setItem(PLACE, key);
    else sessionStorage.removeItem(PLACE);
  } catch {
    // as above
  }
  return before;
}

/** GET a path, or POST `body` to it as JSON. Throws a Refusal for every answer that is no 2xx. */
export async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refusal("The server cannot be reached. Check that it is still running.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** GET a path that answers at once: its body, as JSON or (`json: false`) as text. */
export async function get(path, { json = true } = {}) {
  const signal = AbortSignal.timeout(10_000);
  try {
    const response = await ask(path, { signal });
    return await (json ? response.json() : response.text());
  } catch (error) {
    if (error instanceof Refusal) throw error;
    if (signal.aborted) throw new Refusal("The server has not answered for 10 s.");
    throw new Refusal(`What the server answered at /${path} cannot be read.`);
  }
}

/** The words of an error as OpenAI's API writes it, or as FastAPI does, or none. */
export function words(error) {
  const found = [error?.message, error?.detail, error].find((value) => typeof value === "string" && value.trim());
  return found ? found.trim().slice(0, 2000) : "";
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  let said = "";
  try {
    const value = JSON.parse(text);
    said = words(value.error ?? value);
  } catch {
    said = response.headers.get("content-type")?.startsWith("text/plain") ? text.slice(0, 2000) : "";
  }
  const wait = response.headers.get("retry-after");
  said ||= `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  if (wait && /^\d+$/.test(wait)) said += ` Try again in ${wait} s.`;
  return new Refusal(said, response.status);
}
