// Server-sent events, read from a fetch: EventSource can neither POST nor send a key.

/** A stream that ended by itself, in the middle: the server died, or the network did. */
export class Broken extends Error {}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Broken("The connection broke off in the middle of the answer.");
  }
}

/**
 * The data of each event of a response's body, in order.
 *
 * Bytes come in chunks that end anywhere: within a character (the decoder keeps its first bytes), within a line (`rest`
 * does), or between the two characters of a CRLF (a CR at the very end waits for what follows it). Whoever stops
 * reading early closes the connection.
 */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await read(reader);
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      if (done && rest.endsWith("\r")) rest += "\n";
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
      if (done) return;
    }
  } finally {
    await reader.cancel().catch(() => {}); // already closed, or broken: the reader's own error is the one that counts
  }
}
