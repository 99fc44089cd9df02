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

#: the name of the module of transformers that has ``Trainer``
TRAINER_MODULE_NAME = "transformers.trainer"
#: the names of the modules of TRL with a trainer that disables dropout, or that loads a second copy
#: of the base as reference model of the policy
TRL_MODULE_NAMES = tuple(
    f"trl.trainer.{name}_trainer" for name in ("dpo", "kto", "grpo", "rloo", "reward")
)


def patch_model(model: nn.Module) -> None:
    """Patch ``save_pretrained`` of a model with adapters and of its modules, and the trainers of
    transformers and TRL: now, or after their import."""
    for _, module in walk(model):
        if callable(getattr(module, SAVE_METHOD, None)):
            override_method(module, SAVE_METHOD, save_pretrained)
    answer_peft_names(model)
    patch_trainers()


def patch_trainers() -> None:
    """Patch the trainers of transformers and TRL, now or after their import."""
    when_imported(TRAINER_MODULE_NAME, patch_trainer)
    for name in TRL_MODULE_NAMES:
        when_imported(name, patch_trl)


def _has_adapter(model: Any) -> bool:
    """Whether ``model`` is a module with an attached adapter of Veneer."""
    attached = adapters_of(model) if isinstance(model, nn.Module) else None
    return attached is not None and bool(attached.configs)


# ---- transformers --------------------------------------------------------------------------------


def patch_trainer(transformers_module: Any) -> None:
    """Patch the ``Trainer`` in ``transformers.trainer``."""
    trainer_class = transformers_module.Trainer
    if hasattr(trainer_class, "_is_veneer_patched"):
        return
    trainer_class._is_veneer_patched = True

    def replace_method(name: str, replacement: Callable[..., bool]) -> None:
        """Replace a method of ``Trainer``: a call first calls ``replacement`` with its arguments,
        and then the original method if that returned False."""
        original_method = getattr(trainer_class, name)

        @functools.wraps(original_method)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return (
                None
                if replacement(self, *args, **kwargs)
                else original_method(self, *args, **kwargs)
            )

        setattr(trainer_class, name, method)

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

    validate_quantization = transformers_module.validate_quantization_for_training
    transformers_module.validate_quantization_for_training = lambda model: (
        None if _has_adapter(model) else validate_quantization(model)
    )


def _load_checkpoint(trainer: Any, model: nn.Module, folder: str) -> bool:
    """Load the checkpoint that ``save_pretrained`` wrote to ``folder`` into ``model``: into its
    attached adapter, or, if it has none, as a new adapter. Returns whether this was done; if not,
    the trainer's own method must load the checkpoint."""
    # FSDP and DeepSpeed store the state of the complete model in other files, which only the
    # trainer can load
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    if _has_adapter(model):
        if not is_overridden(unwrap(model), SAVE_METHOD):
            return False
        load_into_attached(model, folder)
        return True
    has_peft_adapter = hasattr(model, "peft_config") or getattr(
        model, "_hf_peft_config_loaded", False
    )
    if has_peft_adapter or not (Path(folder) / peft.CONFIG).is_file():
        return False
    install_from(model, folder, "default", trainable=True, verify_base=True)
    try:
        _refuse_unused_adapter(trainer)  # when ``train`` checked this, there was no adapter yet
    except VeneerError:
        detach(model)
        raise
    patch_model(model)
    disable_dropout(model, trainer.args)
    return True


def _copy_adapter_files(trainer: Any, checkpoint_folder: str) -> bool:
    """Copy all files of an adapter from the checkpoint into the folder that a push during training
    uploads. Transformers copies only PEFT's two files, and only if PEFT is installed; the folder
    would then lack files of which Veneer's record has hashes, and could not be loaded. Returns
    False, so that the original method runs afterwards."""
    if _has_adapter(trainer.model) and trainer.is_world_process_zero():
        copy_files(Path(checkpoint_folder), Path(trainer.args.output_dir))
    return False


def _has_veneer_card(trainer: Any) -> bool:
    """Whether the output folder has Veneer's model card, so that ``Trainer`` must not write one: it
    would replace the card and call a method of ``PeftModel``, which the model lacks. (TRL's
    trainers write cards of their own.)"""
    card_path = Path(trainer.args.output_dir) / model_card.CARD_FILE
    return (
        _has_adapter(trainer.model)
        and card_path.is_file()
        and model_card.NOTES_MARKER in card_path.read_text(encoding="utf-8")
    )


def _refuse_unused_adapter(trainer: Any) -> bool:
    """Raise an error if settings would make a trainer silently ignore an adapter. Otherwise return
    False, so that the patched method of the trainer goes on with the original.

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

#: the trainer whose ``__init__`` is running, by which ``create_model_from_path`` finds the policy
_TRAINER_IN_INIT: ContextVar[Any] = ContextVar("veneer_trainer", default=None)


def patch_trl(trl_module: Any) -> None:
    """Patch a module of TRL, so that its trainers use the policy without its adapter as reference
    model, and ``disable_dropout`` also disables the dropout of adapters. A second call for the same
    module does nothing."""
    if hasattr(trl_module, "_is_veneer_patched"):
        return
    trl_module._is_veneer_patched = True
    load_model = trl_module.create_model_from_path
    original_disable_dropout = getattr(trl_module, "disable_dropout_in_model", None)

    @functools.wraps(load_model)
    def create_model_from_path(*args: Any, **kwargs: Any) -> Any:
        # without a policy, this call loads the policy itself, so that TRL's function must do it
        policy = getattr(_TRAINER_IN_INIT.get(), "model", None)
        return (
            reference_of(policy)
            if policy is not None and _has_adapter(policy)
            else load_model(*args, **kwargs)
        )

    trl_module.create_model_from_path = create_model_from_path
    if original_disable_dropout is not None:

        @functools.wraps(original_disable_dropout)
        def disable_dropout_in_model(model: nn.Module) -> None:
            """Disable dropout as TRL does, which finds ``nn.Dropout`` modules only, and also in
            Veneer's adapters, which have no such modules."""
            original_disable_dropout(model)
            _zero_dropout(model)

        trl_module.disable_dropout_in_model = disable_dropout_in_model
    for name, member in vars(trl_module).items():
        if (
            isinstance(member, type)
            and member.__module__ == trl_module.__name__
            and name.endswith("Trainer")
        ):
            member.__init__ = _track_construction(member.__init__)


def _zero_dropout(model: nn.Module) -> None:
    """Set the dropout of all adapters of a model to zero."""
    for module in model.modules():
        if isinstance(module, Change):
            module.dropout = 0.0


def disable_dropout(model: nn.Module, training_args: Any) -> None:
    """Set the dropout of a model's adapters to zero if TRL's ``training_args`` have
    ``disable_dropout``. This is for an adapter that was attached after TRL applied that setting."""
    if getattr(training_args, "disable_dropout", False):
        _zero_dropout(model)


def _track_construction(init: Callable[..., None]) -> Callable[..., None]:
    """The method ``init``, with ``_TRAINER_IN_INIT`` set to its ``self`` while it runs."""

    @functools.wraps(init)
    def tracked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        context_token = _TRAINER_IN_INIT.set(self)
        try:
            init(self, *args, **kwargs)
        finally:
            _TRAINER_IN_INIT.reset(context_token)

    return tracked_init


# ---- patches after an import ---------------------------------------------------------------------


def when_imported(module_name: str, callback: Callable[[Any], None]) -> None:
    """Call ``callback`` with a module: now if it is imported already, else as soon as it is."""
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
                # stop watching only now: if the import fails, the program may repeat it
                sys.meta_path.remove(self)
                self.callback(module)

            spec.loader.exec_module = exec_module
        return spec
