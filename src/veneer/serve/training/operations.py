"""Requests of a run besides passes and steps: begin, save, load, publish for samples, end.

The worker's thread calls them, each with the run's line and what was asked. What they return is the
answer's JSON.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from veneer.config import LoraConfig
from veneer.errors import ConfigError, DataError
from veneer.fileio.atomic import EVERYTHING, new_folder
from veneer.serve.training.encrypt import SUFFIX, encrypt_files, read_recipients
from veneer.serve.training.quotas import over_quota
from veneer.serve.training.store import NAME, Place, Store, folder_bytes, place_of
from veneer.serve.training.trainer import ADAPTER, Trainer
from veneer.serve.training.worker import Line, Worker

#: seconds that a checkpoint may be asked to stay at least and at most: an hour, ten years
LEAST_STAY, MOST_STAY = 3600, 10 * 366 * 86400


@dataclass
class Operations:
    """The operations of a worker."""

    worker: Worker
    trainer: Trainer
    store: Store
    bank: Any
    base: str

    def __post_init__(self) -> None:
        own = {
            "create": self.create, "load": self.load, "save": self.save, "sampler": self.sampler,
            "external": self.external, "unload": self.unload,
        }  # fmt: skip
        self.worker.operations.update(own)

    def create(self, line: Line, options: Mapping[str, Any]) -> dict[str, Any]:
        row = self.store.run(line.run)
        assert row is not None
        self.worker.make_room()
        self.trainer.begin(line.name, LoraConfig.from_dict(json.loads(row["config"])), row["seed"])
        return {"model_id": line.run, "type": "create_model"}

    def load(self, line: Line, options: Mapping[str, Any]) -> dict[str, Any]:
        path, folder, config = self._source(options)
        row = self.store.run(line.run)
        assert row is not None
        before = json.loads(row["config"])
        if line.next and config != before:
            expected = f"one of a run like this, of rank {before['rank']} and the same targets"
            problem = f"{path}, of rank {config['rank']}"
            raise DataError(problem, expected, "create a training client from that state")
        if line.name not in self.trainer.runs:
            self.worker.make_room()
        adapter = "" if "folder" in options else ADAPTER
        self.trainer.load(line.name, folder, optimizer=options["optimizer"], adapter=adapter)
        self.store.configured(
            line.run, self.trainer.runs[line.name].config.to_dict() if not adapter else config
        )
        return {"path": path, "model_id": line.run, "type": "load_weights"}

    def _source(self, options: Mapping[str, Any]) -> tuple[str, Path, dict[str, Any]]:
        """(path, folder, config) of what is loaded: a checkpoint, or an adapter of the server's
        folder or library. ``DataError``: it is not there, is encrypted, or lacks the optimiser that
        is asked for."""
        path = options["path"]
        if "folder" in options:
            holds, folder, config = False, Path(options["folder"]), options["config"]
        else:
            checkpoint = place_of(path)
            row = self.store.checkpoint(checkpoint)
            if row is None:
                raise DataError(
                    f"{path}, which is not there",
                    "a checkpoint that is",
                    "list the run's checkpoints",
                )
            holds, folder, config = (
                checkpoint.kind == "weights",
                self.store.files_of(checkpoint),
                json.loads(row["config"]),
            )
            if any((folder / ADAPTER).glob(f"*{SUFFIX}")):
                raise DataError(
                    f"{path}, which is encrypted",
                    "weights that are not",
                    "load what they were saved from",
                )
        if options["optimizer"] and not holds:
            problem, do = (
                f"{path}, which holds no optimizer",
                "load the weights alone: create_training_client_from_state",
            )
            raise DataError(problem, "a checkpoint of save_state", do)
        return path, folder, config

    def save(self, line: Line, options: Mapping[str, Any]) -> dict[str, Any]:
        checkpoint = self._new(line, "weights", options)
        if not self._is_saved(line, checkpoint):
            check, provenance = (
                partial(self._check_bytes, line, checkpoint, options),
                {"run": line.run, "request": line.next},
            )
            self.trainer.save(
                line.name, self.store.files_of(checkpoint), self.base, provenance, check
            )
            self._added(line, checkpoint, options)
        return {"path": checkpoint.path, "type": "save_weights"}

    def external(self, line: Line, options: Mapping[str, Any]) -> dict[str, Any]:
        checkpoint = self._new(line, "external_weights", options)
        if not self._is_saved(line, checkpoint):
            self._publish(line, checkpoint, options)
            self._added(line, checkpoint, options)
        return {"path": checkpoint.path, "type": "save_weights_external"}

    def sampler(self, line: Line, options: Mapping[str, Any]) -> dict[str, Any]:
        hidden = options.get("sampler")  # a sampling session of its own, whose weights have no name
        name = (
            options["name"]
            if hidden is None
            else "inflight"
            if options["kind"] == "inflight"
            else f"of-{line.next}"
        )
        checkpoint = self._new(
            line, "sampler_weights", {**options, "name": name, "overwrite": True}
        )
        self._publish(line, checkpoint, options)
        self.bank.put(checkpoint.path, self.store.files_of(checkpoint) / ADAPTER, line.name)
        self._added(line, checkpoint, options, hidden=hidden is not None)
        if hidden is None:
            return {"path": checkpoint.path, "type": "save_weights_for_sampler"}
        self.store.add_sampler(hidden, options["session"], line.owner, checkpoint.path)
        return {"sampling_session_id": hidden, "type": "save_weights_for_sampler"}

    def unload(self, line: Line, options: Mapping[str, Any]) -> dict[str, Any]:
        self.worker.let_go(line)
        self.store.unload(line.run)
        return {"model_id": line.run, "type": "unload_model"}

    def _new(self, line: Line, kind: str, options: Mapping[str, Any]) -> Place:
        """A place for a checkpoint. ``DataError``: a name that is none, or taken; a time to stay
        that is none."""
        name, seconds = options.get("name") or f"step-{line.next}", options.get("ttl_seconds")
        if not NAME.fullmatch(name):
            expected = "1 to 128 letters, digits and '._-', beginning with a letter or digit"
            raise DataError(f"the name {name[:200]!r}", expected, "choose another")
        if seconds is not None and not LEAST_STAY <= seconds <= MOST_STAY:
            raise DataError(
                f"ttl_seconds {seconds}", f"{LEAST_STAY} to {MOST_STAY}, or None", "change it"
            )
        checkpoint = Place(line.run, kind, name)
        taken_before = self.store.checkpoint(checkpoint) is not None and not self._is_saved(
            line, checkpoint
        )
        if taken_before and not options.get("overwrite"):
            raise DataError(
                f"{checkpoint.path}, which exists",
                "a new name",
                "choose another, or say overwrite=True",
            )
        return checkpoint

    def _is_saved(self, line: Line, checkpoint: Place) -> bool:
        """Whether this very request saved it before: the server ended, or its disk was full, before
        the answer."""
        row = self.store.checkpoint(checkpoint)
        return row is not None and row["request"] == line.next

    def _publish(self, line: Line, checkpoint: Place, options: Mapping[str, Any]) -> None:
        provenance = {"run": line.run, "request": line.next}
        recipients = read_recipients(options.get("age_encryption_recipients") or ())
        with new_folder(
            self.store.files_of(checkpoint), overwrite=True, replaces=[EVERYTHING]
        ) as folder:
            self.trainer.export(line.name, folder / ADAPTER, self.base, provenance)
            if recipients:
                encrypt_files(folder / ADAPTER, recipients)
            self._check_bytes(line, checkpoint, options, folder)

    def _check_bytes(
        self, line: Line, checkpoint: Place, options: Mapping[str, Any], folder: Path
    ) -> None:
        """``DataError``: a checkpoint that is written to a folder is more than its key may have."""
        limit, size = options.get("most_bytes"), folder_bytes(folder)
        if (
            problem := over_quota(self.store, line.owner, "bytes", limit, size, replaced=checkpoint)
        ) is not None:
            raise DataError(problem)

    def _added(
        self, line: Line, checkpoint: Place, options: Mapping[str, Any], hidden: bool = False
    ) -> None:
        row = self.store.run(line.run)
        assert row is not None
        self.store.add_checkpoint(
            checkpoint,
            line.owner,
            row["config"],
            metadata=options.get("user_metadata"),
            seconds=options.get("ttl_seconds"),
            hidden=hidden,
            request=line.next,
        )

    # as all changes of checkpoints, these are the worker's thread's

    def delete(self, checkpoint: Place) -> None:
        """A checkpoint, and the samples that could be drawn from it."""
        if checkpoint.path in self.bank:
            self.bank.remove(checkpoint.path)
        self.store.delete_checkpoint(checkpoint)

    def copy(self, source: Place, target: Place) -> None:
        """The files of a checkpoint under another run. No file of one is ever changed, so they are
        shared."""
        with new_folder(
            self.store.files_of(target), overwrite=True, replaces=[EVERYTHING]
        ) as folder:
            shutil.copytree(
                self.store.files_of(source), folder, copy_function=_link, dirs_exist_ok=True
            )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copy2(source, target)


def lora_config(model: Any, rank: int, *, attention: bool, mlp: bool, head: bool) -> LoraConfig:
    """What to attach. A head that shares the embedding's weight is not trained: it would change the
    embedding too. ``ConfigError``: nothing would be."""
    layer, head_path = model.get_output_embeddings(), None
    if head and layer is not None and layer.weight is not model.get_input_embeddings().weight:
        head_path = next(name for name, module in model.named_modules() if module is layer)
    targets = [
        *(["attention"] if attention else ()),
        *(["mlp"] if mlp else ()),
        *([head_path] if head_path else ()),
    ]
    if not targets:
        do = "set train_attn or train_mlp; a head that is tied to the embedding is not trained"
        raise ConfigError("nothing to train", "at least one kind of layers", do)
    return LoraConfig(rank=rank, targets=targets)


def tied(model: Any) -> bool:
    layer = model.get_output_embeddings()
    return layer is not None and layer.weight is model.get_input_embeddings().weight
