"""How a model is prompted: the mode that an adapter was trained for, from its record, and the
system prompt and example that its record may hold (``veneer train --record-example``).

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

#: most characters of a recorded system prompt or example that are passed on
LONGEST = 8192


def prompt_form(folder: Path | None, tokenizer: Any) -> dict[str, Any]:
    """The form of a prompt for the adapter of a folder; None: for the base."""
    recorded = {} if folder is None else _recorded_prompt(folder)
    mode = recorded.get("mode")
    if mode not in ("chat", "completion"):
        mode = "chat" if getattr(tokenizer, "chat_template", None) else "completion"
    texts = {name: _text(recorded.get(name)) for name in ("system", "example")}
    return {"mode": mode, **texts}


def _recorded_prompt(folder: Path) -> Mapping[str, Any]:
    """The prompt fields of the record; empty without a record or with a damaged one, which is
    refused with the reason when the adapter is loaded."""
    if not (folder / RECORD).is_file():
        return {}
    try:
        provenance = read_json(folder / RECORD).get("provenance")
    except (AdapterError, OSError) as error:
        log.warning("The record of %s cannot be read: %s", folder.name, error)
        return {}
    prompt = provenance.get("prompt") if isinstance(provenance, dict) else None
    return prompt if isinstance(prompt, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= LONGEST else None
