"""Compute the requests of a run that are neither passes (forward and backward) nor optimizer steps:
create, load, save, save for samples, save for other servers, unload.

The training thread calls the operation of each request with the run and the fields of the request.
The operation returns the answer as a dict, for JSON. A run is one LoRA adapter that a client
trains.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from veneer.config import LoraConfig
from veneer.errors import ConfigError, DataError, SelectionError
from veneer.fileio.atomic import EVERYTHING, new_folder
from veneer.serve.training.active_runs import ActiveRun
from veneer.serve.training.encrypt import ENCRYPTED_SUFFIX, encrypt_files, read_recipients
from veneer.serve.training.quotas import quota_problem
from veneer.serve.training.run_trainer import ADAPTER_FOLDER, widen_config
from veneer.serve.training.store import (
    CHECKPOINT_NAME,
    Checkpoint,
    Store,
    folder_bytes,
    parse_checkpoint_path,
)
from veneer.serve.training.worker import Worker

#: the last component of tinker://RUN/now, the name of a run's current weights in the bank
CURRENT_WEIGHTS = "now"


class Operations:
    """The operations, which are registered with ``worker`` and called in its thread. ``bank``: the
    adapters from which the engine samples; ``base_name``: the name of the base model.

    Each operation takes ``options``, the fields of the request, and returns the fields of the
    answer. If it raises an error of Veneer, the error's text is the answer."""

    def __init__(
        self, worker: Worker, bank: Any, base_name: str, record_use: Callable[[str], None]
    ) -> None:
        self.worker, self.trainer, self.store = worker, worker.trainer, worker.store
        self.bank, self.base, self.record_use = bank, base_name, record_use
        worker.operations |= {
            "create": self.create,
            "load": self.load,
            "save": self.save,
            "sampler": self.save_for_sampler,
            "external": self.save_external,
            "unload": self.unload,
        }

    def create(self, active_run: ActiveRun, options: Mapping[str, Any]) -> dict[str, Any]:
        run_row = self.store.existing_run(active_run.run_id)
        self.worker.memory.make_room()
        config = LoraConfig.from_dict(json.loads(run_row["config"]))
        self.trainer.begin(active_run.adapter_name, config, run_row["seed"])
        return {"model_id": active_run.run_id, "type": "create_model"}

    def load(self, active_run: ActiveRun, options: Mapping[str, Any]) -> dict[str, Any]:
        path, weights_folder, config = self._weights_source(options)
        run_row = self.store.existing_run(active_run.run_id)
        run_config = widen_config(LoraConfig.from_dict(json.loads(run_row["config"])))
        if active_run.next_seq and widen_config(LoraConfig.from_dict(config)) != run_config:
            raise DataError(
                f"{path}, of rank {config['rank']}",
                f"one of a run like this, of rank {run_config.rank} and the same targets",
                "create a training client from that state",
            )
        if active_run not in self.worker.memory:
            self.worker.memory.make_room()
        subfolder = "" if "folder" in options else ADAPTER_FOLDER
        self.trainer.load(
            active_run.adapter_name,
            weights_folder,
            optimizer=options["optimizer"],
            subfolder=subfolder,
        )
        if not subfolder:
            config = self.trainer.runs[active_run.adapter_name].config.to_dict()
        self.store.set_config(active_run.run_id, config)
        return {"path": path, "model_id": active_run.run_id, "type": "load_weights"}

    def _weights_source(self, options: Mapping[str, Any]) -> tuple[str, Path, dict[str, Any]]:
        """Return (path, folder, config) of the weights to load: a checkpoint, or an adapter in the
        server's folder or library. ``DataError``: the weights do not exist, are encrypted, or lack
        the requested optimizer state."""
        path = options["path"]
        if "folder" in options:
            has_optimizer, weights_folder, config = (
                False,
                Path(options["folder"]),
                options["config"],
            )
        else:
            checkpoint = parse_checkpoint_path(path)
            checkpoint_row = self.store.checkpoint(checkpoint)
            if checkpoint_row is None:
                raise DataError(
                    f"{path}, which does not exist",
                    "a checkpoint of a run",
                    "list the run's checkpoints",
                )
            has_optimizer = checkpoint.kind == "weights"
            weights_folder, config = (
                self.store.files_of(checkpoint),
                json.loads(checkpoint_row["config"]),
            )
            if _is_encrypted(weights_folder / ADAPTER_FOLDER):
                raise DataError(
                    f"{path}, which is encrypted",
                    "weights that are not",
                    "load the checkpoint from which they were saved",
                )
        if options["optimizer"] and not has_optimizer:
            raise DataError(
                f"{path}, which holds no optimizer",
                "a checkpoint of save_state",
                "load the weights alone: create_training_client_from_state",
            )
        return path, weights_folder, config

    def save(self, active_run: ActiveRun, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"path": self._save_once(active_run, "weights", options), "type": "save_weights"}

    def save_external(self, active_run: ActiveRun, options: Mapping[str, Any]) -> dict[str, Any]:
        path = self._save_once(active_run, "external_weights", options)
        return {"path": path, "type": "save_weights_external"}

    def _save_once(
        self, active_run: ActiveRun, checkpoint_kind: str, options: Mapping[str, Any]
    ) -> str:
        """Save a checkpoint and return its path tinker://RUN/KIND/NAME. If an earlier attempt at
        the same request has saved the checkpoint, but the server ended or its disk was full before
        the answer was written, nothing is saved again. ``DataError``: the name is invalid or taken,
        or the checkpoint exceeds the key's quota."""
        checkpoint = self._new_checkpoint(active_run, checkpoint_kind, options)
        checkpoint_row = self.store.checkpoint(checkpoint)
        if checkpoint_row is None or checkpoint_row["request"] != active_run.next_seq:
            self._write_checkpoint(active_run, checkpoint, options)
            self._update_bank(checkpoint)
            self._record_checkpoint(active_run, checkpoint, options)
        return checkpoint.path

    def save_for_sampler(self, active_run: ActiveRun, options: Mapping[str, Any]) -> dict[str, Any]:
        """Save a checkpoint, and copy its weights into the bank, so that the engine can sample from
        them at once. If the client gave no name but the id of a new sampling session
        (options["sampler"]), the checkpoint is hidden from lists and the session is created."""
        sampler_id = options.get("sampler")
        checkpoint_name = options.get("name")
        if sampler_id is not None:
            checkpoint_name = (
                "inflight" if options["kind"] == "inflight" else f"of-{active_run.next_seq}"
            )
        checkpoint = self._new_checkpoint(
            active_run, "sampler_weights", {**options, "name": checkpoint_name, "overwrite": True}
        )
        self._write_checkpoint(active_run, checkpoint, options)
        folder = self.store.files_of(checkpoint) / ADAPTER_FOLDER
        self.bank.put(checkpoint.path, folder, active_run.adapter_name)
        self.record_use(checkpoint.path)  # bounds the copies in memory, sampled from or not
        self._record_checkpoint(active_run, checkpoint, options, is_hidden=sampler_id is not None)
        if sampler_id is None:
            return {"path": checkpoint.path, "type": "save_weights_for_sampler"}
        self.store.add_sampler(sampler_id, options["session"], active_run.owner, checkpoint.path)
        return {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}

    def unload(self, active_run: ActiveRun, options: Mapping[str, Any]) -> dict[str, Any]:
        self.worker.memory.evict(active_run)
        self.store.mark_unloaded(active_run.run_id)
        return {"model_id": active_run.run_id, "type": "unload_model"}

    def _new_checkpoint(
        self, active_run: ActiveRun, checkpoint_kind: str, options: Mapping[str, Any]
    ) -> Checkpoint:
        """The path of the checkpoint that a request will save. Without a name in ``options``, the
        name is step-N, where N is the number of the request. ``DataError``: the name is invalid, or
        another request has used it and ``options`` do not allow overwriting."""
        checkpoint_name = options.get("name") or f"step-{active_run.next_seq}"
        if not CHECKPOINT_NAME.fullmatch(checkpoint_name):
            raise DataError(
                f"the name {checkpoint_name[:200]!r}",
                "1 to 128 letters, digits and '._-', beginning with none of '.-'",
                "choose another",
            )
        checkpoint = Checkpoint(active_run.run_id, checkpoint_kind, checkpoint_name)
        checkpoint_row = self.store.checkpoint(checkpoint)
        is_taken = checkpoint_row is not None and checkpoint_row["request"] != active_run.next_seq
        if is_taken and not options.get("overwrite"):
            raise DataError(
                f"{checkpoint.path}, which exists",
                "a new name",
                "choose another, or say overwrite=True",
            )
        return checkpoint

    def _write_checkpoint(
        self, active_run: ActiveRun, checkpoint: Checkpoint, options: Mapping[str, Any]
    ) -> None:
        """Write the files of a checkpoint, and replace those of an earlier checkpoint of this path.
        A checkpoint of the kind "weights" includes the optimizer's state. The adapter's files are
        encrypted if ``options`` have recipients, which are public keys. ``DataError``: a recipient
        is invalid, or the checkpoint exceeds the key's quota; no file is changed."""
        provenance = {"run": active_run.run_id, "request": active_run.next_seq}
        recipients = read_recipients(options.get("age_encryption_recipients") or ())
        with new_folder(
            self.store.files_of(checkpoint), overwrite=True, replaces=[EVERYTHING]
        ) as staging_folder:
            self.trainer.export(
                active_run.adapter_name, staging_folder / ADAPTER_FOLDER, self.base, provenance
            )
            if checkpoint.kind == "weights":
                self.trainer.save_optimizer(active_run.adapter_name, staging_folder)
            if recipients:
                encrypt_files(staging_folder / ADAPTER_FOLDER, recipients)
            problem_text = quota_problem(
                self.store,
                active_run.owner,
                "bytes",
                options.get("most_bytes"),
                folder_bytes(staging_folder),
                replaced=checkpoint,
            )
            if problem_text is not None:
                raise DataError(problem_text)

    def _update_bank(self, checkpoint: Checkpoint) -> None:
        """Tell the bank, from whose adapters the engine samples, that the files of a checkpoint
        were replaced. If the bank has the checkpoint, it reads the new files at the next use, or
        removes the checkpoint if the new files are encrypted."""
        folder = self.store.files_of(checkpoint) / ADAPTER_FOLDER
        if checkpoint.path not in self.bank:
            return
        if _is_encrypted(folder):
            self.bank.remove(checkpoint.path)
        else:
            self.bank.register(checkpoint.path, folder, replace=True)

    def _record_checkpoint(
        self,
        active_run: ActiveRun,
        checkpoint: Checkpoint,
        options: Mapping[str, Any],
        is_hidden: bool = False,
    ) -> None:
        self.store.add_checkpoint(
            checkpoint,
            active_run.owner,
            self.store.existing_run(active_run.run_id)["config"],
            metadata=options.get("user_metadata"),
            lifetime_seconds=options.get("ttl_seconds"),
            hidden=is_hidden,
            request=active_run.next_seq,
        )

    # Routes call the two methods below, but only in the training thread
    # (``Training.change_checkpoints``), like all functions that change files of checkpoints.

    def delete(self, checkpoint: Checkpoint) -> None:
        """Delete the files and the database row of a checkpoint, and remove it from the bank, so
        that no more samples are drawn from it."""
        if checkpoint.path in self.bank:
            self.bank.remove(checkpoint.path)
        self.store.delete_checkpoint(checkpoint)

    def copy(self, source: Checkpoint, target: Checkpoint) -> None:
        """Copy the files of a checkpoint to another run, as hard links where the file system has
        them. Links are safe because the files of checkpoints are never changed, only replaced. The
        caller adds the database row of ``target``."""
        with new_folder(
            self.store.files_of(target), overwrite=True, replaces=[EVERYTHING]
        ) as staging_folder:
            shutil.copytree(
                self.store.files_of(source),
                staging_folder,
                copy_function=_link_or_copy,
                dirs_exist_ok=True,
            )
        self._update_bank(target)

    def are_equal(self, first: Checkpoint, second: Checkpoint) -> bool:
        """Whether two checkpoints of one config have the same files with the same content."""
        folders = [self.store.files_of(checkpoint) for checkpoint in (first, second)]
        file_names, other_names = (
            {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
            for folder in folders
        )
        return file_names == other_names and all(
            (folders[0] / name).samefile(folders[1] / name)  # copies are hard links
            or filecmp.cmp(folders[0] / name, folders[1] / name, shallow=False)
            for name in file_names
        )


def parse_current_run(adapter_name: str) -> str | None:
    """The run id in tinker://RUN/now, the name of a run's current weights. None for any other name,
    such as tinker://RUN/weights/now, a checkpoint that a client has called "now"."""
    run_id, _, last_component = adapter_name.removeprefix("tinker://").rpartition("/")
    return run_id if last_component == CURRENT_WEIGHTS and run_id and "/" not in run_id else None


def adapter_folder(store: Store, adapter_name: str) -> Path:
    """The folder of an adapter by its name in the bank, from whose adapters the engine samples.
    tinker://RUN/KIND/NAME is the name of a checkpoint. tinker://RUN/now is the name of the run's
    weights at the time when samples from them were last requested.

    Raises:
        DataError: the name has another form.
        SelectionError: there is no such checkpoint.
    """
    run_id = parse_current_run(adapter_name)
    if run_id is not None:
        return store.folder_of(run_id) / CURRENT_WEIGHTS / ADAPTER_FOLDER
    checkpoint = parse_checkpoint_path(adapter_name)
    if store.checkpoint(checkpoint) is None:
        raise SelectionError(
            adapter_name, "a checkpoint that is there", "list the run's checkpoints"
        )
    return store.files_of(checkpoint) / ADAPTER_FOLDER


def _is_encrypted(folder: Path) -> bool:
    return any(folder.glob(f"*{ENCRYPTED_SUFFIX}"))


def _link_or_copy(source_path: str, target_path: str) -> None:
    try:
        os.link(source_path, target_path)
    except OSError:  # the file system has no hard links
        shutil.copy2(source_path, target_path)


def lora_config(model: Any, rank: int, *, attention: bool, mlp: bool, head: bool) -> LoraConfig:
    """The config of a new run's adapter. ``model``: the base model, from transformers;
    ``attention``, ``mlp``, ``head``: which layers to train. An output head that shares the
    embedding's weight is not trained, because training it would change the embedding too.
    ``ConfigError``: nothing would be trained."""
    head_layer, head_path = model.get_output_embeddings(), None
    if head and head_layer is not None and not has_tied_head(model):
        head_path = next(
            module_path for module_path, module in model.named_modules() if module is head_layer
        )
    targets = [
        *(["attention"] if attention else ()),
        *(["mlp"] if mlp else ()),
        *([head_path] if head_path else ()),
    ]
    if not targets:
        raise ConfigError(
            "nothing to train",
            "at least one kind of layers",
            "set train_attn or train_mlp; a head that is tied to the embedding is not trained",
        )
    return LoraConfig(rank=rank, targets=targets)


def has_tied_head(model: Any) -> bool:
    """Whether the output head and the input embedding share one weight."""
    head_layer = model.get_output_embeddings()
    return head_layer is not None and head_layer.weight is model.get_input_embeddings().weight
