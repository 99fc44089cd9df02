"""An adapter that a run trains further (`adapter` of the configuration), such as sft's before dpo.

The adapter's files define its targets, rank and variant; the run defines the data, the loss and the
learning rate. If the loss compares with a reference, the adapter in its initial state is the
reference, as in TRL: a second, frozen adapter on the same base (``as_reference``), which the loss
selects (``tasks/_base.reference``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from veneer.adapter_files import read
from veneer.adapter_files.file_names import content_hash
from veneer.attach import Names, detach, fresh_head, use
from veneer.errors import ConfigError, listing
from veneer.handle import Handle, load
from veneer.store.library import resolve

#: names of the adapters of a run
OWN, REFERENCE = "default", "reference"


class InitialAdapter(NamedTuple):
    """The folder of an adapter to train further, the hash of its files, and its record of the task
    that trained it."""

    folder: Path
    hash: str
    task: Mapping[str, Any]


def read_initial_adapter(adapter: str | None) -> InitialAdapter | None:
    """The start of a run from an adapter; None if the run trains a new one. Raises ``AdapterError``
    for a damaged or missing adapter, and ``ConfigError`` for an adapter that trains tokens, because
    the base may not have rows for them yet."""
    if adapter is None:
        return None
    folder = resolve(adapter)
    files = read(folder)
    if files.tokens:
        problem, remedy = (
            f"adapter {adapter}, which trains tokens",
            "merge it (`veneer merge`), and train on the merged base",
        )
        raise ConfigError(problem, "changes of weights alone", remedy)
    task = files.metadata.get("provenance", {}).get("task")
    return InitialAdapter(folder, content_hash(folder), task if isinstance(task, dict) else {})


def load_to_train(model: Any, start: InitialAdapter) -> Handle:
    """Attach the adapter. Raises ``ConfigError`` if the base has a new head of random weights that
    the adapter does not train; otherwise raises as ``veneer.load``."""
    names = Names(model)
    heads = fresh_head(names, names.fresh_parameters().values())
    handle = load(model, start.folder, name=OWN, trainable=True)
    layers = handle.layers
    lacking = [
        path
        for path, name in heads
        if path not in layers or name not in (*layers[path].changes, *layers[path].full._parameters)
    ]
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
def as_reference(model: Any, start: InitialAdapter | None, refers: bool) -> Iterator[None]:
    """A block around the steps of a run. If the loss compares with the initial adapter (`refers`),
    that adapter is attached as a second one in the block, but not selected."""
    if start is None or not refers:
        yield
        return
    load(model, start.folder, name=REFERENCE)
    try:
        with use(model, OWN):
            yield
    finally:
        detach(model, REFERENCE)
