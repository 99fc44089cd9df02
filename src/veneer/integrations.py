"""Veneer in the training loops of other libraries.

What saves a model by its own ``save_pretrained`` needs nothing of this: transformers' ``Trainer``
and all of TRL's trainers save an adapter alone, resume from it, and take the policy's own base for
a reference, once ``veneer.attach`` has been called. This is for the rest.

    callback(config)              attach within a transformers or TRL trainer, which may load the model itself
    lightning_callback(config)    Lightning's checkpoints hold the adapter alone, and the random state
    unpack(checkpoint, folder)    the adapter folder in such a checkpoint
    accelerate_hooks(accelerator) accelerate's save_state and load_state write and read the adapter
    alone
    Reference, reference_of       a reference model without a second copy of the weights

The libraries are imported when one of these is called, never before.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from veneer.adapter_files.file_names import FILES
from veneer.adapter_files.save_load import install_from
from veneer.adapter_files.save_pretrained import refill, write_adapter
from veneer.adapter_files.trainers import cover, disable_dropout, patch_trainers
from veneer.attach.lookup import adapters_of, selected_name, unwrap
from veneer.attach.reference import Reference, reference_of
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

#: the key of a Lightning checkpoint, and the name of a folder in an accelerate one
KEY = "veneer"
LIGHTNING = ("lightning.pytorch", "pytorch_lightning")


def _adapted(model: nn.Module) -> bool:
    attached = adapters_of(model)
    return attached is not None and bool(attached.configs)


def callback(config: LoraConfig | None = None) -> Any:
    """A ``TrainerCallback`` that attaches a new adapter to the model of a transformers or TRL
    trainer, which may have loaded it itself (``SFTTrainer("base", callbacks=[callback(config)])``).
    One script then starts and resumes a run.

    Args:
        config: what to attach, unless the model has an adapter already. None attaches nothing: the
            adapter is that of the checkpoint which ``train(resume_from_checkpoint=…)`` is given.

    Raises:
        ConfigError: when training begins and the model has no adapter: it would be trained whole.
    """
    from transformers import TrainerCallback

    patch_trainers()

    class AdapterCallback(TrainerCallback):
        def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if config is not None and not _adapted(kwargs["model"]):
                attach(kwargs["model"], config)
                disable_dropout(kwargs["model"], args)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not _adapted(kwargs["model"]):
                do = (
                    "give callback() a config, resume from a checkpoint, or attach (in model_init,"
                    " if you pass one)"
                )
                raise ConfigError(
                    "a model without an adapter as training begins", "one with an adapter", do
                )

    return AdapterCallback()


# ---- Lightning
# ---------------------------------------------------------------------------------------------------


def lightning_callback(config: LoraConfig | None = None, *, module: str = "model") -> Any:
    """A Lightning ``Callback`` for a ``LightningModule`` whose part ``module`` has an adapter.

    Its checkpoints then hold the files of the adapter folder in place of that part's tensors, and
    the random state of torch, which Lightning leaves out: a run resumed at the end of an epoch goes
    on to the same numbers. ``fit(ckpt_path=…)``, ``test(ckpt_path="best")`` and the like put them
    back. The base is verified against the adapter's fingerprints, and a model without an adapter
    gets that of the checkpoint. The rest of the LightningModule is saved and loaded as ever; so are
    checkpoints from before. Several parts with an adapter take a callback each.

    Args:
        config: attached when the trainer sets up, unless the part has an adapter already; None
            attaches nothing.
        module: path of the model within the LightningModule; "" is all of it.

    Raises:
        ConfigError: Lightning is not installed; as it runs, there is no such part, another callback
            has it, it has no adapter when training begins, its weights are spread over processes
            (FSDP), whose checkpoints Lightning writes otherwise, or a checkpoint holds the adapter
            of a part that no callback has.
    """
    bases = tuple(lightning.Callback for lightning in _lightning())

    def setup(self: Any, trainer: Any, pl_module: Any, stage: str) -> None:
        model = _part(pl_module, module)
        others = (
            one.veneer_part
            for one in trainer.callbacks
            if one is not self and hasattr(one, "veneer_part")
        )
        if (
            twice := next((path for path in others if _part(pl_module, path) is model), None)
        ) is not None:
            problem = f"two lightning_callbacks for one model (module={twice!r}, module={module!r})"
            raise ConfigError(
                problem,
                "one for each part with an adapter",
                "leave one of them out, or say module=…",
            )
        # of a checkpoint that a call which does not train has read
        pl_module.__dict__.pop("_veneer_random", None)
        if config is not None and not _adapted(model):
            attach(model, config)
        if "_veneer_parts" not in pl_module.__dict__:
            pl_module.__dict__["_veneer_parts"] = []
            _pack(pl_module)
        if module not in pl_module.__dict__["_veneer_parts"]:
            pl_module.__dict__["_veneer_parts"].append(module)

    def on_fit_start(self: Any, trainer: Any, pl_module: Any) -> None:
        if not _adapted(_part(pl_module, module)):
            do = "give lightning_callback() a config, resume from a checkpoint, or attach"
            raise ConfigError(
                "a model without an adapter as training begins", "one with an adapter", do
            )
        if (states := pl_module.__dict__.pop("_veneer_random", None)) is not None:
            _set_random(states)  # before the loader of the next epoch draws its seed

    own = {"veneer_part": module, "setup": setup, "on_fit_start": on_fit_start}
    return type("AdapterCallback", bases, own)()


def _lightning() -> list[Any]:
    """Lightning under each of its names that has been imported; if none has, under the first that
    there is."""
    if imported := [sys.modules[name] for name in LIGHTNING if name in sys.modules]:
        return imported
    there = [name for name in LIGHTNING if importlib.util.find_spec(name.partition(".")[0])]
    if not there:
        raise ConfigError("no Lightning", f"one of {', '.join(LIGHTNING)}", "pip install lightning")
    return [importlib.import_module(there[0])]


def _part(pl_module: Any, path: str) -> nn.Module:
    try:
        return unwrap(pl_module.get_submodule(path))
    except AttributeError:
        parts = ", ".join(name for name, _ in pl_module.named_children())
        problem = f"no module {path!r} in {type(pl_module).__name__}"
        raise ConfigError(
            problem, f"the path of the model (there is {parts})", "say module=…"
        ) from None


def _pack(pl_module: Any) -> None:
    """Let the hooks of a LightningModule put the adapters of its ``_veneer_parts`` into its
    checkpoints, and take them out again. Lightning calls these for every checkpoint; a callback's
    own not for ``save_weights_only``."""
    save, load = pl_module.on_save_checkpoint, pl_module.on_load_checkpoint

    def parts() -> dict[str, nn.Module]:
        return {path: _part(pl_module, path) for path in pl_module.__dict__["_veneer_parts"]}

    def ours(models: Iterable[nn.Module]) -> dict[str, Tensor]:
        """What the module's state has in the memory of these models, under whatever names."""
        memory = {
            _address(value)
            for model in models
            for value in model.state_dict().values()
            if _is_tensor(value)
        }
        state = pl_module.state_dict()
        return {
            key: value
            for key, value in state.items()
            if _is_tensor(value) and _address(value) in memory
        }

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        models = {path: model for path, model in parts().items() if _adapted(model)}
        if any(is_spread(model.modules()) for model in models.values()):
            problem = "weights that are spread over processes, in a checkpoint of Lightning"
            raise ConfigError(
                problem, "whole ones", "leave lightning_callback out; save with handle.save"
            )
        if models:
            for key in ours(models.values()):
                checkpoint["state_dict"].pop(key, None)
            adapters = {path: _files(model) for path, model in models.items()}
            checkpoint[KEY] = {"adapters": adapters, "random": _random()}
        save(checkpoint)

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        if KEY in checkpoint:
            models, adapters = parts(), checkpoint[KEY]["adapters"]
            if strange := adapters.keys() - models.keys():
                problem = (
                    f"a checkpoint with adapters of {_quoted(strange)}, and callbacks for"
                    f" {_quoted(models)} alone"
                )
                do = "give the trainer a lightning_callback(module=…) for each"
                raise ConfigError(problem, "a callback for each adapter", do)
            for path, files in adapters.items():
                with tempfile.TemporaryDirectory() as folder:
                    _write(files, Path(folder))
                    _put_back(models[path], Path(folder))
            checkpoint["state_dict"] = {
                **ours(models[path] for path in adapters),
                **checkpoint["state_dict"],
            }
            pl_module.__dict__["_veneer_random"] = checkpoint[KEY]["random"]
        load(checkpoint)

    pl_module.__dict__.update(
        on_save_checkpoint=on_save_checkpoint, on_load_checkpoint=on_load_checkpoint
    )


def _quoted(paths: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(paths)))


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor)


def _address(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _files(model: nn.Module) -> dict[str, Tensor]:
    """The files of an adapter folder, as bytes that any reader of tensors reads."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        write_adapter(model, selected_name(model), folder, alone=True)
        return {
            path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in folder.iterdir()
        }


def _write(files: Mapping[str, Tensor], folder: Path) -> None:
    for name in FILES:  # and none that a stranger's checkpoint names
        if name in files:
            (folder / name).write_bytes(files[name].cpu().numpy().tobytes())


def _put_back(model: nn.Module, folder: Path) -> None:
    if _adapted(model):
        refill(model, folder)
    else:
        install_from(model, folder, "default", trainable=True, verify_base=True)
        cover(model)


def _random() -> dict[str, Any]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": devices}


def _set_random(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def unpack(checkpoint: str | Path, folder: str | Path, *, module: str | None = None) -> Path:
    """Write the adapter folder that is in a Lightning checkpoint of ``lightning_callback``.

    Args:
        module: the part whose adapter is meant, if there are several.

    Returns:
        the folder, which ``veneer.load``, PEFT and ``from_pretrained`` take.

    Raises:
        AdapterError: there is no adapter in the file, none of this part, several and no ``module``,
            or it is not whole.
        OutputExistsError: the folder exists and is not empty.
    """
    expected, do = (
        "a Lightning checkpoint with one",
        "pass one that lightning_callback had a part in",
    )
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
    ) as error:  # what is no checkpoint, or would run code when read
        raise AdapterError(
            f"{checkpoint}, of which no adapter can be read ({error})", expected, do
        ) from error
    held = content.get(KEY) if isinstance(content, dict) else None
    adapters = held.get("adapters") if isinstance(held, dict) else None
    if not isinstance(adapters, dict) or not adapters:
        raise AdapterError(f"{checkpoint}, in which there is no adapter", expected, do)
    if module is None and len(adapters) == 1:
        (module,) = adapters
    if module not in adapters:
        problem = (
            f"module={module!r} for {checkpoint}, which holds the adapters of {_quoted(adapters)}"
        )
        raise AdapterError(problem, "one of these", "say module=…")
    with new_folder(folder) as made:
        _write(adapters[module], made)
    return Path(folder)


# ---- accelerate
# --------------------------------------------------------------------------------------------------


def accelerate_hooks(accelerator: Any) -> Callable[[], None]:
    """Let ``accelerator.save_state`` write, in the place of each prepared model with an adapter,
    its adapter folder (``veneer``, ``veneer_1``, …), and ``load_state`` read it into the adapter
    that is attached. Optimisers, schedulers and random states are accelerate's as ever. Under FSDP
    and DeepSpeed, which keep weights in files of their own, nothing changes; checkpoints from
    before are read as they were.

    Returns:
        a function that takes the hooks out again.
    """

    def names(models: list[Any]) -> list[tuple[int, str]]:
        """(index, name of the folder) of each model with an adapter."""
        places = [index for index, model in enumerate(models) if _adapted(model)]
        return [
            (index, f"{KEY}_{number}" if number else KEY) for number, index in enumerate(places)
        ]

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        if len(weights) != len(models):
            return
        for index, name in reversed(names(models)):
            model = unwrap(models[index])
            del weights[index]
            if accelerator.is_main_process:
                write_adapter(model, selected_name(model), Path(folder) / name, alone=True)

    def load(models: list[Any], folder: str) -> None:
        for index, name in reversed(names(models)):
            if (Path(folder) / name).is_dir():
                refill(models[index], Path(folder) / name)
                del models[index]

    hooks = (
        accelerator.register_save_state_pre_hook(save),
        accelerator.register_load_state_pre_hook(load),
    )

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove
