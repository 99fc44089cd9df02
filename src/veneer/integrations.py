"""Callbacks and hooks with which the training loops of other libraries attach, save and load
adapters.

After ``veneer.attach``, transformers' ``Trainer`` and all of TRL's trainers save only the adapter,
resume from it, and use the base of the trained model as the reference model. Other trainers that
save a model by its ``save_pretrained`` save only the adapter too. None of these trainers needs this
module. It is for trainers that load the model themselves, for Lightning, for accelerate's
checkpoints, and for loops that need a reference model.

    callback(config)              attach within a transformers or TRL trainer
    lightning_callback(config)    Lightning's checkpoints hold the adapter and the random state
    unpack(checkpoint, folder)    extract the adapter folder from a Lightning checkpoint
    accelerate_hooks(accelerator) save_state and load_state of accelerate write and read adapters
    Reference, reference_of       a reference model without a second copy of the weights

Importing this module imports none of these libraries; the functions import them when called.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files.file_names import FILES
from veneer.adapter_files.save_load import install_from
from veneer.adapter_files.save_pretrained import load_into_attached, write_adapter
from veneer.adapter_files.trainers import disable_dropout, patch_model, patch_trainers
from veneer.attach import Reference, adapters_of, reference_of, selected_name, unwrap
from veneer.config import LoraConfig
from veneer.distributed import is_spread
from veneer.errors import AdapterError, ConfigError
from veneer.fileio.atomic import new_folder
from veneer.handle import attach

__all__ = [
    "Reference",
    "accelerate_hooks",
    "callback",
    "lightning_callback",
    "reference_of",
    "unpack",
]

#: the key of Veneer's entry in a Lightning checkpoint, and the name of the first adapter folder in
#: an accelerate checkpoint
KEY = "veneer"
#: the names under which Lightning can be imported
LIGHTNING_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _has_adapter(model: nn.Module) -> bool:
    model_adapters = adapters_of(model)
    return model_adapters is not None and bool(model_adapters.configs)


def callback(config: LoraConfig | None = None) -> Any:
    """A ``TrainerCallback`` that attaches a new adapter to the model of a transformers or TRL
    trainer. The trainer may also load the model itself (``SFTTrainer("base",
    callbacks=[callback(config)])``). The same script starts and resumes a run.

    Args:
        config: the config to attach, unless the model has an adapter. None attaches nothing: then
            the adapter comes from the checkpoint of ``train(resume_from_checkpoint=…)``.

    Raises:
        ConfigError: training begins and the model has no adapter, so that all weights would train.
    """
    from transformers import TrainerCallback

    patch_trainers()

    class AdapterCallback(TrainerCallback):
        def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if config is not None and not _has_adapter(kwargs["model"]):
                attach(kwargs["model"], config)
                disable_dropout(kwargs["model"], args)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not _has_adapter(kwargs["model"]):
                raise ConfigError(
                    "a model without an adapter as training begins",
                    "one with an adapter",
                    "give callback() a config, resume from a checkpoint, or attach (in model_init,"
                    " if you pass one)",
                )

    return AdapterCallback()


# ---- Lightning


def lightning_callback(config: LoraConfig | None = None, *, module: str = "model") -> Any:
    """A Lightning ``Callback`` for a ``LightningModule`` whose submodule ``module`` has an adapter.

    Checkpoints hold the files of the adapter folder in place of the submodule's tensors. They also
    hold torch's random states, which Lightning leaves out, so that a run resumed at the end of an
    epoch continues with the same random numbers. ``fit(ckpt_path=…)``, ``test(ckpt_path="best")``
    and similar calls restore both. They verify the base against the adapter's fingerprints. If the
    model has no adapter, the adapter of the checkpoint is attached. Everything else in the
    LightningModule is saved and loaded as usual. Checkpoints that were written without this
    callback are loaded as usual, too. Each submodule with an adapter needs its own callback.

    Args:
        config: the config to attach when the trainer sets up, unless the submodule has an adapter.
            None attaches nothing.
        module: path of the model within the LightningModule; "" is the LightningModule itself.

    Raises:
        ConfigError: Lightning is not installed. During a run: there is no such submodule; another
            callback serves the same submodule; the submodule has no adapter when training begins;
            its weights are sharded over processes (FSDP), for which Lightning writes other
            checkpoints; or a checkpoint holds the adapter of a submodule without a callback.
    """
    callback_classes = tuple(lightning.Callback for lightning in _lightning_modules())

    def setup(self: Any, trainer: Any, pl_module: Any, stage: str) -> None:
        model = _submodule(pl_module, module)
        other_paths = (
            callback.veneer_path
            for callback in trainer.callbacks
            if callback is not self and hasattr(callback, "veneer_path")
        )
        duplicate_path = next(
            (path for path in other_paths if _submodule(pl_module, path) is model), None
        )
        if duplicate_path is not None:
            raise ConfigError(
                f"two lightning_callbacks for one model (module={duplicate_path!r},"
                f" module={module!r})",
                "one for each part with an adapter",
                "leave one of them out, or say module=…",
            )
        # discard random states that an earlier `test` or `predict` loaded: `fit` must ignore them
        pl_module.__dict__.pop("_veneer_random_states", None)
        if config is not None and not _has_adapter(model):
            attach(model, config)
        if "_veneer_paths" not in pl_module.__dict__:
            pl_module.__dict__["_veneer_paths"] = []
            _replace_checkpoint_hooks(pl_module)
        if module not in pl_module.__dict__["_veneer_paths"]:
            pl_module.__dict__["_veneer_paths"].append(module)

    def on_fit_start(self: Any, trainer: Any, pl_module: Any) -> None:
        if not _has_adapter(_submodule(pl_module, module)):
            raise ConfigError(
                "a model without an adapter as training begins",
                "one with an adapter",
                "give lightning_callback() a config, resume from a checkpoint, or attach",
            )
        if (random_states := pl_module.__dict__.pop("_veneer_random_states", None)) is not None:
            # do this before the data loader of the next epoch draws its seed
            _set_random_states(random_states)

    class_attributes = {"veneer_path": module, "setup": setup, "on_fit_start": on_fit_start}
    return type("AdapterCallback", callback_classes, class_attributes)()


def _lightning_modules() -> list[Any]:
    """The imported modules of Lightning, which may be imported under both of its package names. If
    neither is imported, import the first that is installed. ``ConfigError``: neither is installed.
    """
    if imported_modules := [
        sys.modules[name] for name in LIGHTNING_PACKAGES if name in sys.modules
    ]:
        return imported_modules
    installed_names = [
        name for name in LIGHTNING_PACKAGES if importlib.util.find_spec(name.partition(".")[0])
    ]
    if not installed_names:
        raise ConfigError(
            "no Lightning", f"one of {', '.join(LIGHTNING_PACKAGES)}", "pip install lightning"
        )
    return [importlib.import_module(installed_names[0])]


def _submodule(pl_module: Any, path: str) -> nn.Module:
    """The model at a path in a LightningModule. Raises a ConfigError if there is none."""
    try:
        return unwrap(pl_module.get_submodule(path))
    except AttributeError:
        child_names = ", ".join(name for name, _ in pl_module.named_children())
        raise ConfigError(
            f"no module {path!r} in {type(pl_module).__name__}",
            f"the path of the model (there is {child_names})",
            "say module=…",
        ) from None


def _replace_checkpoint_hooks(pl_module: Any) -> None:
    """Replace the checkpoint hooks of a LightningModule by hooks that also save and load the
    adapters of the submodules in ``_veneer_paths``. They are hooks of the module, because with
    ``save_weights_only`` Lightning calls no hook of a callback."""
    original_save, original_load = pl_module.on_save_checkpoint, pl_module.on_load_checkpoint

    def adapted_models() -> dict[str, nn.Module]:
        return {path: _submodule(pl_module, path) for path in pl_module.__dict__["_veneer_paths"]}

    def shared_entries(models: Iterable[nn.Module]) -> dict[str, Tensor]:
        """The entries of the LightningModule's state dict that share memory with tensors of
        ``models``. The LightningModule may hold such a tensor under several names."""
        addresses = {
            _address(value)
            for model in models
            for value in model.state_dict().values()
            if isinstance(value, Tensor)
        }
        return {
            key: value
            for key, value in pl_module.state_dict().items()
            if isinstance(value, Tensor) and _address(value) in addresses
        }

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        models = {path: model for path, model in adapted_models().items() if _has_adapter(model)}
        if any(is_spread(model.modules()) for model in models.values()):
            raise ConfigError(
                "weights that are spread over processes, in a checkpoint of Lightning",
                "whole ones",
                "leave lightning_callback out; save with handle.save",
            )
        if models:
            for key in shared_entries(models.values()):
                checkpoint["state_dict"].pop(key, None)
            files_by_path = {path: _read_files(model) for path, model in models.items()}
            checkpoint[KEY] = {"adapters": files_by_path, "random": _random_states()}
        original_save(checkpoint)

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        if KEY in checkpoint:
            models, files_by_path = adapted_models(), checkpoint[KEY]["adapters"]
            if unmatched_paths := files_by_path.keys() - models.keys():
                raise ConfigError(
                    f"a checkpoint with adapters of {_quote_names(unmatched_paths)}, and callbacks"
                    f" for {_quote_names(models)} alone",
                    "a callback for each adapter",
                    "give the trainer a lightning_callback(module=…) for each",
                )
            for path, files in files_by_path.items():
                with tempfile.TemporaryDirectory() as folder:
                    _write_files(files, Path(folder))
                    _restore_adapter(models[path], Path(folder))
            checkpoint["state_dict"] = {
                **shared_entries(models[path] for path in files_by_path),
                **checkpoint["state_dict"],
            }
            pl_module.__dict__["_veneer_random_states"] = checkpoint[KEY]["random"]
        original_load(checkpoint)

    pl_module.__dict__.update(
        on_save_checkpoint=on_save_checkpoint, on_load_checkpoint=on_load_checkpoint
    )


def _quote_names(paths: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(paths)))


def _address(tensor: Tensor) -> int:
    """The address of the memory that a tensor, or the tensor of which it is a view, uses."""
    return tensor.untyped_storage().data_ptr()


def _read_files(model: nn.Module) -> dict[str, Tensor]:
    """The content of each file of the model's adapter folder, as a tensor of bytes, by file
    name."""
    with tempfile.TemporaryDirectory() as temporary_folder:
        folder = Path(temporary_folder) / "adapter"
        write_adapter(model, selected_name(model), folder, alone=True)
        return {
            path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in folder.iterdir()
        }


def _write_files(bytes_by_name: Mapping[str, Tensor], folder: Path) -> None:
    """Write the files that ``_read_files`` returned to ``folder``. Only the file names of an
    adapter folder are written, because an untrusted checkpoint may contain any name, such as
    a path outside of the folder."""
    for name in FILES:
        if name in bytes_by_name:
            (folder / name).write_bytes(bytes_by_name[name].cpu().numpy().tobytes())


def _restore_adapter(model: nn.Module, folder: Path) -> None:
    """Load an adapter folder into the attached adapter of a model. If the model has none, attach
    the adapter of the folder."""
    if _has_adapter(model):
        load_into_attached(model, folder)
    else:
        install_from(model, folder, "default", trainable=True, verify_base=True)
        patch_model(model)


def _random_states() -> dict[str, Any]:
    """The states of torch's random number generators on the CPU and on each GPU."""
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda_states}


def _set_random_states(random_states: Mapping[str, Any]) -> None:
    """Restore what ``_random_states`` returned. The states of GPUs are ignored if this machine has
    another number of GPUs."""
    torch.set_rng_state(random_states["cpu"].cpu())
    if torch.cuda.is_available() and len(random_states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in random_states["cuda"]])


def unpack(checkpoint: str | Path, folder: str | Path, *, module: str | None = None) -> Path:
    """Write the adapter folder from a Lightning checkpoint of ``lightning_callback``.

    Args:
        checkpoint: the path of the checkpoint file.
        folder: the path of the new adapter folder.
        module: path of the submodule whose adapter is written, if the checkpoint has several
            adapters.

    Returns:
        the folder, which ``veneer.load``, PEFT and ``from_pretrained`` can read.

    Raises:
        AdapterError: the checkpoint has no adapter, or none of this submodule, or several although
            ``module`` is None; or the file is incomplete.
        OutputExistsError: the folder exists and is not empty.
    """
    expected = "a Lightning checkpoint with one"
    advice = "pass one that lightning_callback had a part in"
    try:
        checkpoint_content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    # torch.load refuses files that are no checkpoint, or whose pickle would run code; the EOFError
    # of an empty file has no text
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error) or "it ends too early"
        raise AdapterError(
            f"{checkpoint}, of which no adapter can be read ({reason})", expected, advice
        ) from error
    veneer_entry = checkpoint_content.get(KEY) if isinstance(checkpoint_content, dict) else None
    files_by_path = veneer_entry.get("adapters") if isinstance(veneer_entry, dict) else None
    if not isinstance(files_by_path, dict) or not files_by_path:
        raise AdapterError(f"{checkpoint}, in which there is no adapter", expected, advice)
    if module is None and len(files_by_path) == 1:
        (module,) = files_by_path
    if module not in files_by_path:
        raise AdapterError(
            f"module={module!r} for {checkpoint}, which holds the adapters of"
            f" {_quote_names(files_by_path)}",
            "one of these",
            "say module=…",
        )
    with new_folder(folder) as new_adapter_folder:
        _write_files(files_by_path[module], new_adapter_folder)
    return Path(folder)


# ---- accelerate


def accelerate_hooks(accelerator: Any) -> Callable[[], None]:
    """Let ``accelerator.save_state`` and ``load_state`` save and load adapters instead of weights.

    For each prepared model with an adapter, ``save_state`` writes an adapter folder (``veneer``,
    ``veneer_1``, …), and ``load_state`` reads it into the attached adapter. Accelerate still saves
    optimisers, schedulers and random states. Under FSDP and DeepSpeed, accelerate does not pass the
    weights to hooks, so these hooks do nothing and all weights are saved. Checkpoints that were
    written without the hooks can still be loaded.

    Returns:
        a function that removes the hooks.
    """

    def adapter_folders(models: list[Any]) -> list[tuple[int, str]]:
        """(index of the model, name of its folder) for each model with an adapter."""
        model_indices = [index for index, model in enumerate(models) if _has_adapter(model)]
        return [
            (index, f"{KEY}_{adapter_index}" if adapter_index else KEY)
            for adapter_index, index in enumerate(model_indices)
        ]

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        if len(weights) != len(models):
            return
        for index, folder_name in reversed(adapter_folders(models)):
            model = unwrap(models[index])
            del weights[index]
            if accelerator.is_main_process:
                adapter_folder = Path(folder) / folder_name
                write_adapter(model, selected_name(model), adapter_folder, alone=True)

    def load(models: list[Any], folder: str) -> None:
        for index, folder_name in reversed(adapter_folders(models)):
            if (Path(folder) / folder_name).is_dir():
                load_into_attached(models[index], Path(folder) / folder_name)
                del models[index]

    hooks = (
        accelerator.register_save_state_pre_hook(save),
        accelerator.register_load_state_pre_hook(load),
    )

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove
