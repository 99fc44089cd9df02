"""Bounds on everything that one client may send, hold or wait for, in one place.

Everything whose size a client decides has a bound. The context and the queue bound what a request
costs the engine (tokens, choices); the bounds here limit its cost before that.
"""

from __future__ import annotations

#: bytes of the names and values of all headers
HEADERS = 16 * 2**10
#: bytes of a body: several times the text of the longest context
BODY = 2**20
#: bytes of the bodies of all requests together, from the first byte until the request is answered.
#: The requests of one key (or all those without a key) may hold at most half of what is free
BODIES = 256 * 2**20
#: bytes of a body that the event loop parses itself; a thread parses larger ones
PARSED_INLINE = 16 * 2**10
#: seconds for the request line and headers to arrive, for the body to arrive, and for a client to
#: read what was written
HEAD_SECONDS, BODY_SECONDS, STALL_SECONDS = 10.0, 30.0, 30.0
#: connections that are open at one time
CONNECTIONS = 1024

#: characters that wait for the tokenizer, of all clients together (one call is always accepted),
#: and how many of them a schema counts as
READING, READING_SCHEMA = 4 * 2**20, 64 * 2**10
#: characters of a model's or an adapter's name
NAME = 256
#: messages of a chat, and parts of the content of one
MESSAGES, PARTS = 1024, 256
#: tools of a request or calls of a message, and characters of a tool's name
TOOLS, TOOL_NAME = 128, 128
#: prompts of one call, answers to each, and answers to all of them
PROMPTS, CHOICES, ANSWERS = 64, 16, 64
#: texts of one call for embeddings
INPUTS = 256
#: stop strings, and characters of one
STOPS, STOP = 16, 256
#: alternatives told with a token, and log-probabilities that are told of the prompts of one call
ALTERNATIVES, PROMPT_LOGPROBS = 20, 2**19
#: tokens of logit_bias, of stop_token_ids and of allowed_token_ids
BIASES, STOP_TOKENS, ALLOWED_TOKENS = 1024, 64, 2**15
#: words of bad_words, and characters of one
BAD_WORDS, BAD_WORD = 64, 128
#: contexts that a prompt may fill before truncate_prompt_tokens cuts it
TRUNCATED = 16
#: bytes of chat_template_kwargs as JSON, and characters of a request_id
TEMPLATE_KWARGS, REQUEST_ID = 4096, 128
#: characters of a regular expression or a grammar, and texts of a choice
GRAMMAR, OPTIONS = 8 * 2**10, 1024
#: adapters in a blend, and the size of a weight
BLEND, WEIGHT = 8, 100.0
#: bytes of a JSON schema as text, and how deep it may nest
SCHEMA, SCHEMA_DEPTH = 64 * 2**10, 32
