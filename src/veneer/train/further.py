"""An adapter that a run trains further (`adapter` of the configuration), such as sft's before dpo.

What it changes and how is its own; the run says on which rows, with which loss and at which rate.
Of a task that is measured from a reference, that adapter as it was is the reference, as in TRL: a
second adapter, frozen, on the same base (``as_reference``), which the loss selects
(``tasks/_base.reference``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from veneer.adapter_files import read
from veneer.adapter_files.file_names import content_hash
from veneer.attach.fresh_weights import fresh_parameters
from veneer.attach.install import detach
from veneer.attach.select import use
from veneer.attach.targets import Names, fresh_head
from veneer.errors import ConfigError, listing
from veneer.handle import Handle, load
from veneer.store.library import resolve

#: names of the adapters of a run
OWN, REFERENCE = "default", "reference"


class Start(NamedTuple):
    """The folder of an adapter to train further, the hash of its files, and what its record says of
    its task."""

    folder: Path
    hash: str
    task: Mapping[str, Any]


def start_of(adapter: str | None) -> Start | None:
    """Look at the adapter; None: the run makes one. ``AdapterError``: it is damaged, or there is
    none. ``ConfigError``: it trains tokens, of which a base has no rows before it is grown for a
    run."""
    if adapter is None:
        return None
    folder = resolve(adapter)
    files = read(folder)
    if files.tokens:
        problem, do = (
            f"adapter {adapter}, which trains tokens",
            "merge it (`veneer merge`), and train on the merged base",
        )
        raise ConfigError(problem, "changes of weights alone", do)
    task = files.metadata.get("provenance", {}).get("task")
    return Start(folder, content_hash(folder), task if isinstance(task, dict) else {})


def load_to_train(model: Any, start: Start) -> Handle:
    """Attach the adapter. ``ConfigError``: the base has a new head, of random weights, which the
    adapter does not train; else as ``veneer.load``."""
    names = Names(model)
    heads = fresh_head(names, fresh_parameters(names).values())
    handle = load(model, start.folder, name=OWN, trainable=True)
    layers = handle.layers
    lacking = [
        path for path, name in heads
        if path not in layers or name not in (*layers[path].changes, *layers[path].full._parameters)
    ]  # fmt: skip
    if lacking:
        handle.detach()
        problem = (
            f"{listing(sorted({*lacking}))}, of random weights, which the adapter {start.folder}"
            " does not train"
        )
        raise ConfigError(
            problem,
            "an adapter of this task",
            "name one, or merge this one and train on the merged base",
        )
    return handle


@contextmanager
def as_reference(model: Any, start: Start | None, refers: bool) -> Iterator[None]:
    """Around the steps of a run: where its loss refers to the adapter as it was, that is there, and
    not selected."""
    if start is None or not refers:
        yield
        return
    load(model, start.folder, name=REFERENCE)
    try:
        with use(model, OWN):
            yield
    finally:
        detach(model, REFERENCE)
