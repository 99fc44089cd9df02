"""An adapter that a run trains further (`adapter` of the configuration), such as an sft adapter
that dpo continues.

The adapter's files define its targets, rank and variant; the run defines the data, the loss and the
learning rate. If the loss compares with a reference policy, that reference is the adapter in its
initial state, as in TRL. The run attaches this state to the same base as a second, frozen adapter
(``as_reference``), and the loss selects it for the reference (``tasks/_base.reference``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from veneer.adapter_files import read
from veneer.adapter_files.file_names import content_hash
from veneer.attach import ModelIndex, detach, fresh_head, use
from veneer.errors import ConfigError, VeneerError, listing
from veneer.handle import Handle, load
from veneer.store.library import resolve

#: names of the adapters of a run: the one that trains, and its initial state as the reference
TRAINED_ADAPTER, REFERENCE_ADAPTER = "default", "reference"


class InitialAdapter(NamedTuple):
    """An adapter to train further.

    Fields:
        folder: its adapter folder.
        hash: the hash of its files.
        task: the record of the task that trained the adapter, from the adapter's metadata; empty if
            there is none.
        invocation_tokens: the ids of the tokens from which on the adapter acts (aLoRA), or ().
    """

    folder: Path
    hash: str
    task: Mapping[str, Any]
    invocation_tokens: tuple[int, ...]


def read_initial_adapter(adapter: str | None) -> InitialAdapter | None:
    """Read the adapter that a run trains further. ``adapter``: its folder, library:NAME, or a
    remote address such as s3://… (``TrainConfig.adapter``). Returns None for None, which stands for
    a run that trains a new adapter. Raises ``AdapterError`` for a damaged or missing adapter, and
    ``ConfigError`` for one that trains tokens, since the base's embeddings may lack rows for these
    tokens."""
    if adapter is None:
        return None
    folder = resolve(adapter)
    adapter_files = read(folder)
    if adapter_files.tokens:
        raise ConfigError(
            f"adapter {adapter}, which trains tokens",
            "changes of weights alone",
            "merge it (`veneer merge`), and train on the merged base",
        )
    task_record = adapter_files.metadata.get("provenance", {}).get("task")
    return InitialAdapter(
        folder,
        content_hash(folder),
        task_record if isinstance(task_record, dict) else {},
        tuple(adapter_files.config.invocation_tokens),
    )


def must_lie_outside(initial_adapter: InitialAdapter | None, output: Path) -> None:
    """Raise ``ConfigError`` if the adapter to train further lies in the folder ``output`` of the
    run, which removes an earlier run's adapter and checkpoints when it begins."""
    if initial_adapter is not None and initial_adapter.folder.resolve().is_relative_to(
        output.resolve()
    ):
        raise ConfigError(
            f"adapter {initial_adapter.folder} in output {output}, whose files the run replaces",
            "another output folder",
            "choose one, or copy the adapter elsewhere first",
        )


def read_reference(folder: Path) -> tuple[InitialAdapter | None, str | None]:
    """The adapter from which a run trained the adapter in ``folder`` further, which is the
    reference of its loss, or None; and its name in the run's configuration, or None if the run
    began with a new adapter. The adapter is None, too, if it is not at that place any more, or if
    its files have changed."""
    provenance = read(folder).metadata.get("provenance", {})
    name = provenance.get("config", {}).get("adapter")
    if name is None:
        return None, None
    try:
        initial_adapter = read_initial_adapter(name)
    except (VeneerError, OSError):
        return None, name
    is_same = initial_adapter is not None and initial_adapter.hash == provenance.get(
        "data", {}
    ).get("adapter")
    return initial_adapter if is_same else None, name


def load_to_train(model: Any, initial_adapter: InitialAdapter) -> Handle:
    """Attach an adapter to train it further. Raises ``ConfigError``, with nothing attached, if
    the base has a new head of random weights that the adapter does not train. Other errors are
    those of ``veneer.load``."""
    model_index = ModelIndex(model)
    new_head_parameters = fresh_head(model_index, model_index.fresh_parameters().values())
    handle = load(model, initial_adapter.folder, name=TRAINED_ADAPTER, trainable=True)
    adapted_layers = handle.layers
    untrained_paths = [
        path
        for path, parameter_name in new_head_parameters
        if path not in adapted_layers
        or parameter_name
        not in (*adapted_layers[path].changes, *adapted_layers[path].full._parameters)
    ]
    if untrained_paths:
        handle.detach()
        raise ConfigError(
            f"{listing(sorted({*untrained_paths}))}, of random weights, which the adapter"
            f" {initial_adapter.folder} does not train",
            "an adapter of this task",
            "name one, or merge this one and train on the merged base",
        )
    return handle


@contextmanager
def as_reference(
    model: Any,
    initial_adapter: InitialAdapter | None,
    needs_reference: bool,
    verify_base: bool = True,
) -> Iterator[None]:
    """A block around the steps of a run. If the loss compares the model with the initial adapter
    (`needs_reference`), the block attaches a second, frozen copy of that adapter
    (`REFERENCE_ADAPTER`). The trained adapter stays selected. ``verify_base``: as for ``load``."""
    if initial_adapter is None or not needs_reference:
        yield
        return
    load(model, initial_adapter.folder, name=REFERENCE_ADAPTER, verify_base=verify_base)
    try:
        with use(model, TRAINED_ADAPTER):
            yield
    finally:
        detach(model, REFERENCE_ADAPTER)
