"""The prompt format that the server reports to clients for each model, such as for the web page:
chat or completion, and if known a system prompt and an example of a prompt.

    {"mode": "chat" | "completion", "system": text | null, "example": text | null}

Training writes the mode into the adapter's record (the JSON file beside its weights), and with
``veneer train --record-example`` also the system prompt and an example. For the base, and for an
adapter without a record, the mode is "chat" if the base has a chat template.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.adapter_files.record import RECORD
from veneer.errors import AdapterError
from veneer.fileio.untrusted import read_json

log = logging.getLogger("veneer.serve")

#: a recorded system prompt or example with more characters is not reported
MAX_CHARS = 8192


def prompt_form(folder: Path | None, tokenizer: Any) -> dict[str, Any]:
    """The prompt format, as in the module docstring, for the adapter in ``folder``, or for the base
    if ``folder`` is None."""
    prompt_fields = {} if folder is None else _recorded_prompt(folder)
    mode = prompt_fields.get("mode")
    if mode not in ("chat", "completion"):
        mode = "chat" if getattr(tokenizer, "chat_template", None) else "completion"
    texts = {name: _short_text(prompt_fields.get(name)) for name in ("system", "example")}
    return {"mode": mode, **texts}


def _recorded_prompt(folder: Path) -> Mapping[str, Any]:
    """The field ``provenance.prompt`` of an adapter's record; empty without a record. It is empty
    too if the record is damaged, which is only logged here, since the client gets the reason when
    it uses the adapter and loading fails."""
    if not (folder / RECORD).is_file():
        return {}
    try:
        provenance = read_json(folder / RECORD).get("provenance")
    except (AdapterError, OSError) as error:
        log.warning("The record of %s cannot be read: %s", folder.name, error)
        return {}
    prompt = provenance.get("prompt") if isinstance(provenance, dict) else None
    return prompt if isinstance(prompt, dict) else {}


def _short_text(value: Any) -> str | None:
    """``value`` if it is a text of 1 to ``MAX_CHARS`` characters, else None."""
    return value if isinstance(value, str) and 0 < len(value) <= MAX_CHARS else None
