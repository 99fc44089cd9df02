"""Requests of a run besides passes and steps: begin, save, load, publish for samples, end.

The worker's thread calls each operation with the run's line and the fields of the request. The
operation returns the JSON of the answer.
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
from veneer.serve.training.run_trainer import ADAPTER, Trainer
from veneer.serve.training.store import NAME, Checkpoint, Store, folder_bytes, parse_checkpoint_path
from veneer.serve.training.worker import Line, Worker


@dataclass
class Operations:
    """Executes the requests of runs other than passes and steps, in the thread of ``worker``."""

    worker: Worker
    trainer: Trainer
    store: Store
    bank: Any
    base: str

    def __post_init__(self) -> None:
        self.worker.operations |= {
            "create": self.create,
            "load": self.load,
            "save": self.save,
            "sampler": self.sampler,
            "external": self.external,
            "unload": self.unload,
        }

    def create(self, line: Line, options: Mapping[str, Any]) -> dict[str, Any]:
        row = self.store.run(line.run)
        assert row is not None
        self.worker.memory.make_room()
        self.trainer.begin(line.name, LoraConfig.from_dict(json.loads(row["config"])), row["seed"])
        return {"model_id": line.run, "type": "create_model"}

    def load(self, line: Line, options: Mapping[str, Any]) -> dict[str, Any]:
        path, folder, config = self._source(options)
        row = self.store.run(line.run)
        assert row is not None
        run_config = json.loads(row["config"])
        if line.next and config != run_config:
            expected = f"one of a run like this, of rank {run_config['rank']} and the same targets"
            problem = f"{path}, of rank {config['rank']}"
            raise DataError(problem, expected, "create a training client from that state")
        if line not in self.worker.memory:
            self.worker.memory.make_room()
        adapter = "" if "folder" in options else ADAPTER
        self.trainer.load(line.name, folder, optimizer=options["optimizer"], adapter=adapter)
        self.store.set_config(
            line.run, self.trainer.runs[line.name].config.to_dict() if not adapter else config
        )
        return {"path": path, "model_id": line.run, "type": "load_weights"}

    def _source(self, options: Mapping[str, Any]) -> tuple[str, Path, dict[str, Any]]:
        """(path, folder, config) of the weights to load: a checkpoint, or an adapter in the
        server's folder or library. ``DataError``: it does not exist, is encrypted, or lacks the
        requested optimiser."""
        path = options["path"]
        if "folder" in options:
            has_optimizer, folder, config = False, Path(options["folder"]), options["config"]
        else:
            checkpoint = parse_checkpoint_path(path)
            row = self.store.checkpoint(checkpoint)
            if row is None:
                raise DataError(
                    f"{path}, which does not exist",
                    "a checkpoint of a run",
                    "list the run's checkpoints",
                )
            has_optimizer = checkpoint.kind == "weights"
            folder, config = self.store.files_of(checkpoint), json.loads(row["config"])
            if any((folder / ADAPTER).glob(f"*{SUFFIX}")):
                raise DataError(
                    f"{path}, which is encrypted",
                    "weights that are not",
                    "load the checkpoint from which they were saved",
                )
        if options["optimizer"] and not has_optimizer:
            problem = f"{path}, which holds no optimizer"
            do = "load the weights alone: create_training_client_from_state"
            raise DataError(problem, "a checkpoint of save_state", do)
        return path, folder, config

    def save(self, line: Line, options: Mapping[str, Any]) -> dict[str, Any]:
        checkpoint = self._new_checkpoint(line, "weights", options)
        if not self._is_saved(line, checkpoint):
            check = partial(self._check_bytes, line, checkpoint, options)
            provenance = {"run": line.run, "request": line.next}
            self.trainer.save(
                line.name, self.store.files_of(checkpoint), self.base, provenance, check
            )
            self._record(line, checkpoint, options)
        return {"path": checkpoint.path, "type": "save_weights"}

    def external(self, line: Line, options: Mapping[str, Any]) -> dict[str, Any]:
        checkpoint = self._new_checkpoint(line, "external_weights", options)
        if not self._is_saved(line, checkpoint):
            self._publish(line, checkpoint, options)
            self._record(line, checkpoint, options)
        return {"path": checkpoint.path, "type": "save_weights_external"}

    def sampler(self, line: Line, options: Mapping[str, Any]) -> dict[str, Any]:
        sampler = options.get("sampler")  # the id of a new sampling session, for unnamed weights
        name = options.get("name")
        if sampler is not None:
            name = "inflight" if options["kind"] == "inflight" else f"of-{line.next}"
        checkpoint = self._new_checkpoint(
            line, "sampler_weights", {**options, "name": name, "overwrite": True}
        )
        self._publish(line, checkpoint, options)
        self.bank.put(checkpoint.path, self.store.files_of(checkpoint) / ADAPTER, line.name)
        self._record(line, checkpoint, options, hidden=sampler is not None)
        if sampler is None:
            return {"path": checkpoint.path, "type": "save_weights_for_sampler"}
        self.store.add_sampler(sampler, options["session"], line.owner, checkpoint.path)
        return {"sampling_session_id": sampler, "type": "save_weights_for_sampler"}

    def unload(self, line: Line, options: Mapping[str, Any]) -> dict[str, Any]:
        self.worker.memory.let_go(line)
        self.store.unload(line.run)
        return {"model_id": line.run, "type": "unload_model"}

    def _new_checkpoint(self, line: Line, kind: str, options: Mapping[str, Any]) -> Checkpoint:
        """The address of a new checkpoint. ``DataError``: an invalid or used name."""
        name = options.get("name") or f"step-{line.next}"
        if not NAME.fullmatch(name):
            expected = "1 to 128 letters, digits and '._-', beginning with a letter or digit"
            raise DataError(f"the name {name[:200]!r}", expected, "choose another")
        checkpoint = Checkpoint(line.run, kind, name)
        exists = self.store.checkpoint(checkpoint) is not None
        if exists and not self._is_saved(line, checkpoint) and not options.get("overwrite"):
            raise DataError(
                f"{checkpoint.path}, which exists",
                "a new name",
                "choose another, or say overwrite=True",
            )
        return checkpoint

    def _is_saved(self, line: Line, checkpoint: Checkpoint) -> bool:
        """Whether this request saved the checkpoint already, but could not be answered: the server
        ended, or its disk was full."""
        row = self.store.checkpoint(checkpoint)
        return row is not None and row["request"] == line.next

    def _publish(self, line: Line, checkpoint: Checkpoint, options: Mapping[str, Any]) -> None:
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
        self, line: Line, checkpoint: Checkpoint, options: Mapping[str, Any], folder: Path
    ) -> None:
        """``DataError``: the files of a checkpoint in ``folder`` exceed the quota of its key."""
        limit, size = options.get("most_bytes"), folder_bytes(folder)
        if (
            problem := over_quota(self.store, line.owner, "bytes", limit, size, replaced=checkpoint)
        ) is not None:
            raise DataError(problem)

    def _record(
        self, line: Line, checkpoint: Checkpoint, options: Mapping[str, Any], hidden: bool = False
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

    # the worker's thread alone calls these, as it makes all changes of checkpoints

    def delete(self, checkpoint: Checkpoint) -> None:
        """Delete a checkpoint, and remove it from the bank of samples."""
        if checkpoint.path in self.bank:
            self.bank.remove(checkpoint.path)
        self.store.delete_checkpoint(checkpoint)

    def copy(self, source: Checkpoint, target: Checkpoint) -> None:
        """Copy a checkpoint to another run by hard links, since the files of checkpoints are never
        changed."""
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
    """The config of a new run's adapter. A head that shares the embedding's weight is not trained,
    because it would change the embedding too. ``ConfigError``: nothing would be trained."""
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


def has_tied_head(model: Any) -> bool:
    """Whether the output head is the embedding's weight."""
    layer = model.get_output_embeddings()
    return layer is not None and layer.weight is model.get_input_embeddings().weight
