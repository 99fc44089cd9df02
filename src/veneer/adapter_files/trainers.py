"""Patches for the trainers of transformers and TRL, which otherwise support adapters in a
``PeftModel`` only. ``patch_model`` applies the patches when an adapter is attached.

    Trainer(…).train(resume_from_checkpoint=…), load_best_model_at_end
        copies the parameters of the checkpoint into the attached adapter's, which the optimiser
        holds; a model without an adapter gets the checkpoint's adapter
    Trainer(quantised model with an adapter)
        accepts the model
    DPOTrainer(…), KTOTrainer, GRPOTrainer, RLOOTrainer
        use the policy without its adapter as reference model (``attach/reference.py``)
    TRL's disable_dropout=True
        also disables the dropout of adapters

Each patch replaces a function of a library once the library is imported (``when_imported``). The
replacement calls the original for models without adapters of Veneer. It refuses settings with which
a trainer would silently ignore an adapter.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from veneer.adapter_files import model_card
from veneer.adapter_files.file_names import copy_files
from veneer.adapter_files.save_load import install_from
from veneer.adapter_files.save_pretrained import SAVE_METHOD, load_into_attached, save_pretrained
from veneer.attach import (
    Change,
    Reference,
    adapters_of,
    answer_peft_names,
    detach,
    is_overridden,
    override_method,
    reference_of,
    selected_name,
    state_of,
    unwrap,
    walk,
)
from veneer.errors import ConfigError, TargetError, VeneerError
from veneer.formats import peft

#: the module of transformers that has ``Trainer``
TRAINER_MODULE = "transformers.trainer"
#: the modules of TRL with a trainer that disables dropout, or that loads a second copy of the base
#: as reference model of the policy
TRL_MODULES = tuple(
    f"trl.trainer.{name}_trainer" for name in ("dpo", "kto", "grpo", "rloo", "reward")
)


def patch_model(model: nn.Module) -> None:
    """Patch ``save_pretrained`` of a model with adapters and of its modules, and the trainers, even
    those that are imported later."""
    for _, module in walk(model):
        if callable(getattr(module, SAVE_METHOD, None)):
            override_method(module, SAVE_METHOD, save_pretrained)
    answer_peft_names(model)
    if "transformers" in sys.modules:
        patch_trainers()


def patch_trainers() -> None:
    """Patch the trainers of transformers and TRL, now or after their import."""
    when_imported(TRAINER_MODULE, patch_trainer)
    for name in TRL_MODULES:
        when_imported(name, patch_trl)


def _has_adapter(model: Any) -> bool:
    """Whether ``model`` is a module with an attached adapter of Veneer."""
    attached = adapters_of(model) if isinstance(model, nn.Module) else None
    return attached is not None and bool(attached.configs)


# ---- transformers --------------------------------------------------------------------------------


def patch_trainer(module: Any) -> None:
    """Patch the ``Trainer`` in ``transformers.trainer``."""
    trainer = module.Trainer
    if hasattr(trainer, "_is_veneer_patched"):
        return
    trainer._is_veneer_patched = True

    def replace_method(name: str, replacement: Callable[..., bool]) -> None:
        """Replace a method: call ``replacement``, and then the original if that returns False."""
        original = getattr(trainer, name)

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return None if replacement(self, *args, **kwargs) else original(self, *args, **kwargs)

        setattr(trainer, name, method)

    replace_method(
        "_load_best_model",
        lambda self: _load_checkpoint(self, self.model, self.state.best_model_checkpoint),
    )
    replace_method(
        "_load_from_checkpoint",
        lambda self, resume_from_checkpoint, model=None: _load_checkpoint(
            self, self.model if model is None else model, resume_from_checkpoint
        ),
    )
    replace_method("train", lambda self, *args, **kwargs: _refuse_unused_adapter(self))
    replace_method("evaluate", lambda self, *args, **kwargs: _refuse_unused_adapter(self))
    replace_method("_push_from_checkpoint", _copy_adapter_files)
    replace_method("create_model_card", lambda self, *args, **kwargs: _has_veneer_card(self))

    validate_quantization = module.validate_quantization_for_training
    module.validate_quantization_for_training = lambda model: (
        None if _has_adapter(model) else validate_quantization(model)
    )


def _load_checkpoint(trainer: Any, model: nn.Module, folder: str) -> bool:
    """Load a checkpoint that ``save_pretrained`` wrote. False: the trainer must load it."""
    # FSDP and DeepSpeed store the state of the complete model in other files
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    if _has_adapter(model):
        if not is_overridden(unwrap(model), SAVE_METHOD):
            return False
        load_into_attached(model, folder)
        return True
    is_peft = hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
    if is_peft or not (Path(folder) / peft.CONFIG).is_file():
        return False
    install_from(model, folder, "default", trainable=True, verify_base=True)
    try:
        _refuse_unused_adapter(trainer)  # at ``train``, the model had no adapter yet
    except VeneerError:
        detach(model)
        raise
    patch_model(model)
    disable_dropout(model, trainer.args)
    return True


def _copy_adapter_files(trainer: Any, checkpoint_folder: str) -> bool:
    """Copy all files of an adapter from the checkpoint into the folder that a push during training
    uploads. Transformers copies only PEFT's two files, and only if PEFT is installed, while the
    record has hashes of the adapter's other files, too. Returns False, so that the replaced method
    runs afterwards."""
    if _has_adapter(trainer.model) and trainer.is_world_process_zero():
        copy_files(Path(checkpoint_folder), Path(trainer.args.output_dir))
    return False


def _has_veneer_card(trainer: Any) -> bool:
    """Whether the output folder has Veneer's model card, which must stay. ``Trainer`` would take it
    for PEFT's, replace it and call a method of ``PeftModel``. (TRL's trainers write other cards.)
    """
    card_path = Path(trainer.args.output_dir) / model_card.CARD_FILE
    return (
        _has_adapter(trainer.model)
        and card_path.is_file()
        and model_card.NOTES_MARKER in card_path.read_text(encoding="utf-8")
    )


def _refuse_unused_adapter(trainer: Any) -> bool:
    """Raise an error if settings would make a trainer silently ignore an adapter; else False.

    Raises:
        TargetError: the adapter changes the output layer, but TRL's forward multiplies directly by
            the weight of this layer. (TRL refuses such a ``PeftModel``, too.)
        ConfigError: a reference model is to be updated, but has no weights of its own; or vLLM is
            to generate, to which TRL would send the weights of the base.
    """
    model, reference_model = trainer.model, getattr(trainer, "ref_model", None)
    if isinstance(reference_model, Reference) and getattr(trainer.args, "sync_ref_model", False):
        raise ConfigError(
            "sync_ref_model=True with a reference model that is the policy's own base",
            "one that stays",
            "leave sync_ref_model out, or pass a whole model as ref_model",
        )
    if not _has_adapter(model):
        return False
    if getattr(trainer.args, "use_vllm", False):
        raise ConfigError(
            "use_vllm=True for a policy with an adapter, of which TRL would send vLLM the base",
            "texts drawn from the policy",
            "leave use_vllm out: the model draws them itself",
        )
    forward: Any = model.__dict__.get("forward")
    if isinstance(forward, MethodType) and forward.__func__.__code__.co_name == "_fused_forward":
        output_layer = model.get_output_embeddings()
        layer_state = None if output_layer is None else state_of(output_layer)
        layer_adapter = None if layer_state is None else layer_state.get(selected_name(model))
        if layer_adapter is not None and (layer_adapter.changes or layer_adapter.full._parameters):
            raise TargetError(
                f"an adapter of the output layer for TRL's {type(trainer).__name__}, which"
                " multiplies by its weight",
                "one that the forward reaches: it would neither be used nor trained",
                "leave the output layer (and what is tied to it) out of the targets",
            )
    return False


# ---- TRL -----------------------------------------------------------------------------------------

#: the trainer of which ``__init__`` is running
_TRAINER_IN_INIT: ContextVar[Any] = ContextVar("veneer_trainer", default=None)


def patch_trl(module: Any) -> None:
    """Patch a module of TRL: the reference model of a policy with an adapter is the policy's base,
    and ``disable_dropout`` covers adapters."""
    if hasattr(module, "_is_veneer_patched"):
        return
    module._is_veneer_patched = True
    load_model = module.create_model_from_path
    original_disable = getattr(module, "disable_dropout_in_model", None)

    @functools.wraps(load_model)
    def create_model_from_path(*args: Any, **kwargs: Any) -> Any:
        # the trainer has no model yet while it loads the policy itself
        policy = getattr(_TRAINER_IN_INIT.get(), "model", None)
        return (
            reference_of(policy)
            if policy is not None and _has_adapter(policy)
            else load_model(*args, **kwargs)
        )

    module.create_model_from_path = create_model_from_path
    if original_disable is not None:

        @functools.wraps(original_disable)
        def disable_dropout_in_model(model: nn.Module) -> None:
            """TRL disables only ``nn.Dropout`` modules, which Veneer's adapters do not have."""
            original_disable(model)
            _zero_dropout(model)

        module.disable_dropout_in_model = disable_dropout_in_model
    for name, member in vars(module).items():
        if (
            isinstance(member, type)
            and member.__module__ == module.__name__
            and name.endswith("Trainer")
        ):
            member.__init__ = _track_construction(member.__init__)


def _zero_dropout(model: nn.Module) -> None:
    """Set the dropout of all adapters of a model to zero."""
    for module in model.modules():
        if isinstance(module, Change):
            module.dropout = 0.0


def disable_dropout(model: nn.Module, settings: Any) -> None:
    """Disable the dropout of an adapter that was attached after TRL's ``disable_dropout`` ran."""
    if getattr(settings, "disable_dropout", False):
        _zero_dropout(model)


def _track_construction(init: Callable[..., None]) -> Callable[..., None]:
    """``init`` with ``_TRAINER_IN_INIT`` set to the object that it constructs."""

    @functools.wraps(init)
    def tracked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        token = _TRAINER_IN_INIT.set(self)
        try:
            init(self, *args, **kwargs)
        finally:
            _TRAINER_IN_INIT.reset(token)

    return tracked_init


# ---- patches after an import ---------------------------------------------------------------------


def when_imported(module_name: str, callback: Callable[[Any], None]) -> None:
    """Call ``callback`` with a module: now if the module is imported, else after its import."""
    if module_name in sys.modules:
        callback(sys.modules[module_name])
    elif not any(
        isinstance(finder, _ImportWatcher) and finder.module_name == module_name
        for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, _ImportWatcher(module_name, callback))


class _ImportWatcher(MetaPathFinder):
    """A finder of one module that delegates to the other finders, and calls ``callback`` once the
    module is imported."""

    def __init__(self, module_name: str, callback: Callable[[Any], None]) -> None:
        self.module_name, self.callback = module_name, callback

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.module_name:
            return None
        specs = (
            finder.find_spec(fullname, path, target)
            for finder in [*sys.meta_path]
            if finder is not self
        )
        spec: Any = next((spec for spec in specs if spec is not None), None)
        if spec is not None:
            original_exec_module = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                original_exec_module(module)
                sys.meta_path.remove(self)  # not earlier: a program may repeat a failed import
                self.callback(module)

            spec.loader.exec_module = exec_module
        return spec
