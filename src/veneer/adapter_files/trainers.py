"""Patches for the trainers of transformers and TRL, which otherwise support adapters in a
``PeftModel`` only. ``cover`` applies them when an adapter is attached.

    Trainer(…).train(resume_from_checkpoint=…), load_best_model_at_end
        copies the parameters in the checkpoint into those that train; a model without an adapter
        gets the adapter of the checkpoint
    Trainer(quantised model with an adapter)
        accepts the model
    DPOTrainer(…), KTOTrainer, GRPOTrainer, RLOOTrainer
        use the policy's own base weights as reference model (``attach/reference.py``)
    TRL's disable_dropout=True
        also disables the dropout of adapters

Each patch replaces one function of a library, once the library is imported (``when_imported``), and
calls the original for models without adapters of Veneer. Settings with which a trainer would
silently ignore an adapter are refused.
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
from veneer.adapter_files.save_pretrained import SAVE, refill, save_pretrained
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

TRAINER = "transformers.trainer"
#: modules of TRL whose trainer disables dropout, or loads a second copy of the base as the policy's
#: reference
TRL = tuple(f"trl.trainer.{name}_trainer" for name in ("dpo", "kto", "grpo", "rloo", "reward"))


def cover(model: nn.Module) -> None:
    """Patch ``save_pretrained`` of a model with adapters and of its modules, and the trainers that
    are or will be imported."""
    for _, module in walk(model):
        if callable(getattr(module, SAVE, None)):
            override_method(module, SAVE, save_pretrained)
    answer_peft_names(model)
    if "transformers" in sys.modules:
        patch_trainers()


def patch_trainers() -> None:
    """Patch the trainers of transformers and TRL, now or when they are imported."""
    when_imported(TRAINER, patch_trainer)
    for name in TRL:
        when_imported(name, patch_trl)


def _has_adapter(model: Any) -> bool:
    attached = adapters_of(model) if isinstance(model, nn.Module) else None
    return attached is not None and bool(attached.configs)


# ---- transformers --------------------------------------------------------------------------------


def patch_trainer(module: Any) -> None:
    """Patch the ``Trainer`` in ``transformers.trainer``."""
    trainer = module.Trainer
    if hasattr(trainer, "_asks_veneer"):
        return
    trainer._asks_veneer = True

    def before(name: str, replacement: Callable[..., bool]) -> None:
        """Call ``replacement`` in place of a method, and the original if it returns False."""
        original = getattr(trainer, name)

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return None if replacement(self, *args, **kwargs) else original(self, *args, **kwargs)

        setattr(trainer, name, method)

    before(
        "_load_best_model", lambda self: _load(self, self.model, self.state.best_model_checkpoint)
    )
    before(
        "_load_from_checkpoint",
        lambda self, resume_from_checkpoint, model=None: _load(
            self, self.model if model is None else model, resume_from_checkpoint
        ),
    )
    before("train", lambda self, *args, **kwargs: _must_be_used(self))
    before("evaluate", lambda self, *args, **kwargs: _must_be_used(self))
    before("_push_from_checkpoint", _copy_all)
    before("create_model_card", lambda self, *args, **kwargs: _has_card(self))

    validate = module.validate_quantization_for_training
    module.validate_quantization_for_training = lambda model: (
        None if _has_adapter(model) else validate(model)
    )


def _load(trainer: Any, model: nn.Module, folder: str) -> bool:
    """Load a checkpoint that ``save_pretrained`` wrote. False if the trainer must load it."""
    # FSDP and DeepSpeed keep the whole state of the model in files of their own
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    if _has_adapter(model):
        if not is_overridden(unwrap(model), SAVE):
            return False
        refill(model, folder)
        return True
    is_peft = hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
    if is_peft or not (Path(folder) / peft.CONFIG).is_file():
        return False
    install_from(model, folder, "default", trainable=True, verify_base=True)
    try:
        _must_be_used(trainer)  # ``train`` checked this before the model had an adapter
    except VeneerError:
        detach(model)
        raise
    cover(model)
    disable_dropout(model, trainer.args)
    return True


def _copy_all(trainer: Any, checkpoint_folder: str) -> bool:
    """Copy all files of an adapter from the checkpoint into the folder that a push during training
    uploads. Transformers would copy PEFT's files alone, and only if PEFT is installed; the others
    belong to them, as the record has their hashes."""
    if _has_adapter(trainer.model) and trainer.is_world_process_zero():
        copy_files(Path(checkpoint_folder), Path(trainer.args.output_dir))
    return False


def _has_card(trainer: Any) -> bool:
    """Whether the output folder has Veneer's model card. ``Trainer`` would take it for PEFT's,
    replace it and call a method of ``PeftModel``. (TRL's trainers write a card of their own.)"""
    card = Path(trainer.args.output_dir) / model_card.NAME
    return (
        _has_adapter(trainer.model)
        and card.is_file()
        and model_card.LINE in card.read_text(encoding="utf-8")
    )


def _must_be_used(trainer: Any) -> bool:
    """Refuse settings with which a trainer would silently ignore an adapter. Always False.

    Raises:
        TargetError: TRL's forward multiplies by the weight of the output layer and skips an adapter
            of that layer (TRL refuses such a ``PeftModel`` too).
        ConfigError: a reference model that should be updated and has no weights of its own; vLLM,
            to which TRL would send the weights of the base.
    """
    model, reference = trainer.model, getattr(trainer, "ref_model", None)
    if isinstance(reference, Reference) and getattr(trainer.args, "sync_ref_model", False):
        problem = "sync_ref_model=True with a reference model that is the policy's own base"
        raise ConfigError(
            problem,
            "one that stays",
            "leave sync_ref_model out, or pass a whole model as ref_model",
        )
    if not _has_adapter(model):
        return False
    if getattr(trainer.args, "use_vllm", False):
        problem = (
            "use_vllm=True for a policy with an adapter, of which TRL would send vLLM the base"
        )
        raise ConfigError(
            problem,
            "texts drawn from the policy",
            "leave use_vllm out: the model draws them itself",
        )
    forward: Any = model.__dict__.get("forward")
    if isinstance(forward, MethodType) and forward.__func__.__code__.co_name == "_fused_forward":
        head = model.get_output_embeddings()
        layer_state = None if head is None else state_of(head)
        layer_adapter = None if layer_state is None else layer_state.get(selected_name(model))
        if layer_adapter is not None and (layer_adapter.changes or layer_adapter.full._parameters):
            problem = (
                f"an adapter of the output layer for TRL's {type(trainer).__name__}, which"
                " multiplies by its weight"
            )
            expected = "one that the forward reaches: it would neither be used nor trained"
            raise TargetError(
                problem,
                expected,
                "leave the output layer (and what is tied to it) out of the targets",
            )
    return False


# ---- TRL -----------------------------------------------------------------------------------------

#: the trainer whose ``__init__`` is running
_MAKING: ContextVar[Any] = ContextVar("veneer_trainer", default=None)


def patch_trl(module: Any) -> None:
    """Patch a module of TRL: the reference model of a policy with an adapter is the policy's base,
    and ``disable_dropout`` covers adapters."""
    if hasattr(module, "_asks_veneer"):
        return
    module._asks_veneer = True
    load, original = (
        module.create_model_from_path,
        getattr(module, "disable_dropout_in_model", None),
    )

    @functools.wraps(load)
    def create_model_from_path(*args: Any, **kwargs: Any) -> Any:
        # None while the policy itself is loaded
        policy = getattr(_MAKING.get(), "model", None)
        return (
            reference_of(policy)
            if policy is not None and _has_adapter(policy)
            else load(*args, **kwargs)
        )

    def disable_dropout_in_model(model: nn.Module) -> None:
        """TRL disables ``nn.Dropout`` modules, which PEFT's adapters have and Veneer's do not."""
        assert original is not None
        original(model)
        _zero_dropout(model)

    module.create_model_from_path = create_model_from_path
    if original is not None:
        module.disable_dropout_in_model = functools.wraps(original)(disable_dropout_in_model)
    for name, value in vars(module).items():
        if (
            isinstance(value, type)
            and value.__module__ == module.__name__
            and name.endswith("Trainer")
        ):
            value.__init__ = _track_construction(value.__init__)


def _zero_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Change):
            module.dropout = 0.0


def disable_dropout(model: nn.Module, settings: Any) -> None:
    """Disable the dropout of an adapter that was attached after TRL's ``disable_dropout`` ran."""
    if getattr(settings, "disable_dropout", False):
        _zero_dropout(model)


def _track_construction(init: Callable[..., None]) -> Callable[..., None]:
    """``init`` with ``_MAKING`` set to the object under construction."""

    @functools.wraps(init)
    def tracked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        token = _MAKING.set(self)
        try:
            init(self, *args, **kwargs)
        finally:
            _MAKING.reset(token)

    return tracked_init


# ---- when others are imported --------------------------------------------------------------------


def when_imported(name: str, call: Callable[[Any], None]) -> None:
    """Call ``call`` with a module: now if it is imported, else after its import."""
    if name in sys.modules:
        call(sys.modules[name])
    elif not any(isinstance(finder, _Watch) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch(name, call))


class _Watch(MetaPathFinder):
    """A finder that delegates to the other finders and calls ``call`` after the import of one
    module, once."""

    def __init__(self, name: str, call: Callable[[Any], None]) -> None:
        self.name, self.call = name, call

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        specs = (
            finder.find_spec(fullname, path, target)
            for finder in [*sys.meta_path]
            if finder is not self
        )
        spec: Any = next((spec for spec in specs if spec is not None), None)
        if spec is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                sys.meta_path.remove(self)  # only now: an import that failed may be tried again
                self.call(module)

            spec.loader.exec_module = exec_module
        return spec
