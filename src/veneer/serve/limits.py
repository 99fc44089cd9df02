"""Limits on what a client may send, keep in the server's memory, or wait for. The comment above a
constant says what it limits. A limit that only one file uses may be defined in that file.

The limits here bound the cost of a request before it reaches the engine. In the engine, the context
length and the length of the queue bound it.
"""

from __future__ import annotations

#: bytes of the names and values of all headers of a request
HEADERS = 16 * 2**10
#: bytes of a request body: several times those of a text that fills the longest context
BODY = 2**20
#: bytes of the bodies of all requests together. A body counts from its first byte until the request
#: is answered. The bodies of one key, or of all requests without a valid key, may take at most half
#: of the bytes that the other bodies leave free. A server without keys has only the limit on all
#: bodies
BODIES = 256 * 2**20
#: bytes of a body that the event loop parses itself; larger bodies are parsed in a thread
PARSED_INLINE = 16 * 2**10
#: time limits in seconds: for the request line and headers to arrive, for the body to arrive, and
#: for a client to read what the server has written
HEAD_SECONDS, BODY_SECONDS, STALL_SECONDS = 10.0, 30.0, 30.0
#: the most connections that are open at one time
CONNECTIONS = 1024

#: WAITING_CHARS: characters of the texts that wait for the tokenizer, of all clients together. If
#: no text waits, a text of any length is accepted. SCHEMA_WAITING_CHARS: a schema counts as this
#: many characters, because it waits for the same thread, which compiles it
WAITING_CHARS, SCHEMA_WAITING_CHARS = 4 * 2**20, 64 * 2**10
#: characters of a model's or an adapter's name
NAME = 256
#: messages of a chat, and content parts of a message
MESSAGES, PARTS = 1024, 256
#: tools of a request or tool calls of a message, and characters of a tool's name
TOOLS, TOOL_NAME = 128, 128
#: prompts of a request, answers to each prompt, and answers to all prompts together
PROMPTS, CHOICES, ANSWERS = 64, 16, 64
#: texts of a request for embeddings
INPUTS = 256
#: stop strings of a request, and characters of each
STOPS, STOP = 16, 256
#: alternatives that are returned with a token, and log-probabilities of prompt tokens in a response
ALTERNATIVES, PROMPT_LOGPROBS = 20, 2**19
#: token ids in logit_bias, in stop_token_ids and in allowed_token_ids
BIASES, STOP_TOKENS, ALLOWED_TOKENS = 1024, 64, 2**15
#: words in bad_words, and characters of each
BAD_WORDS, BAD_WORD = 64, 128
#: a prompt to which truncate_prompt_tokens applies may have this many times the tokens of the
#: context
TRUNCATED = 16
#: bytes of chat_template_kwargs as JSON, and characters of a request_id
TEMPLATE_KWARGS, REQUEST_ID = 4096, 128
#: characters of a regular expression or a grammar, and texts in a list of choices
GRAMMAR, OPTIONS = 8 * 2**10, 1024
#: adapters in a blend, and the largest magnitude of a weight
BLEND, WEIGHT = 8, 100.0
#: bytes of a JSON schema as text, and levels of nesting
SCHEMA, SCHEMA_DEPTH = 64 * 2**10, 32
