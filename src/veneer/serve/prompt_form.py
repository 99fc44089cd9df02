"""The prompt format that a model of the API reports to clients, such as the web page: chat or
completion, and perhaps a system prompt and an example of a prompt.

An adapter's record holds the mode that the adapter was trained for; with ``veneer train
--record-example``, it also holds the two texts.

    {"mode": "chat" | "completion", "system": text | null, "example": text | null}

For the base, and for a folder without a record, the base's chat template decides the mode.
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

#: a recorded system prompt or example with more characters is left out
MAX_CHARS = 8192


def prompt_form(folder: Path | None, tokenizer: Any) -> dict[str, Any]:
    """The prompt format for the adapter in ``folder``, or for the base if it is None."""
    prompt_fields = {} if folder is None else _recorded_prompt(folder)
    mode = prompt_fields.get("mode")
    if mode not in ("chat", "completion"):
        mode = "chat" if getattr(tokenizer, "chat_template", None) else "completion"
    texts = {name: _short_text(prompt_fields.get(name)) for name in ("system", "example")}
    return {"mode": mode, **texts}


def _recorded_prompt(folder: Path) -> Mapping[str, Any]:
    """The prompt fields of an adapter's record. They are empty if there is no record, or if it is
    damaged: loading such an adapter fails and gives the reason."""
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
    """``value`` if it is a text of at most ``MAX_CHARS`` characters, else None."""
    return value if isinstance(value, str) and 0 < len(value) <= MAX_CHARS else None
