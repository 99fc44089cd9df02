"""Trainers of other libraries, taught what they know of a ``PeftModel`` alone. Nobody has to ask
for it: ``cover`` is called when an adapter is attached.

    Trainer(…).train(resume_from_checkpoint=…), load_best_model_at_end
        the parameters in the checkpoint are copied into those that train; a model without an
        adapter gets the one of the checkpoint
    Trainer(quantised model with an adapter)
        it can be trained
    DPOTrainer(…), KTOTrainer, GRPOTrainer, RLOOTrainer
        what they load as a reference model is the policy's own weights (``attach/reference.py``)
    TRL's disable_dropout=True
        is for an adapter's dropout too

Each is one function of a library that asks first whether the model has adapters of ours, put in its
place once somebody else has imported the library (``when_imported``). What such a trainer would do
without a word is refused.
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
from veneer.adapter_files.folder import copy_files
from veneer.adapter_files.save_load import install_from
from veneer.adapter_files.save_pretrained import SAVE, refill, save_pretrained
from veneer.attach.adapted_module import state_of, walk
from veneer.attach.change import Change
from veneer.attach.from_peft import override_peft_methods
from veneer.attach.install import detach
from veneer.attach.lookup import adapters_of, selected_name, unwrap
from veneer.attach.method_overrides import put, stands
from veneer.attach.reference import Reference, reference_of
from veneer.errors import ConfigError, TargetError, VeneerError
from veneer.formats import peft

TRAINER = "transformers.trainer"
#: modules of TRL whose trainer switches dropout off, or loads a second copy of the base to compare
#: the policy with
TRL = tuple(f"trl.trainer.{name}_trainer" for name in ("dpo", "kto", "grpo", "rloo", "reward"))


def cover(model: nn.Module) -> None:
    """Let a model with adapters be saved as what it is, also each part of it that could be saved by
    itself, and trainers that are imported, or will be, know it."""
    for _, module in walk(model):
        if callable(getattr(module, SAVE, None)):
            put(module, SAVE, save_pretrained)
    override_peft_methods(model)
    if "transformers" in sys.modules:
        teach()


def teach() -> None:
    """Teach the trainers of transformers and TRL, now or when they are imported."""
    when_imported(TRAINER, learn)
    for name in TRL:
        when_imported(name, learn_trl)


def _adapted(model: Any) -> bool:
    attached = adapters_of(model) if isinstance(model, nn.Module) else None
    return attached is not None and bool(attached.configs)


# ---- transformers
# ------------------------------------------------------------------------------------------------


def learn(module: Any) -> None:
    """Teach the ``Trainer`` in ``transformers.trainer``."""
    trainer = module.Trainer
    if hasattr(trainer, "_asks_veneer"):
        return
    trainer._asks_veneer = True

    def before(name: str, own: Callable[..., bool]) -> None:
        """Let ``own`` do what a method does, unless it returns False."""
        theirs = getattr(trainer, name)

        @functools.wraps(theirs)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return None if own(self, *args, **kwargs) else theirs(self, *args, **kwargs)

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
    before("create_model_card", lambda self, *args, **kwargs: _has_a_card(self))

    validate = module.validate_quantization_for_training
    module.validate_quantization_for_training = lambda model: (
        None if _adapted(model) else validate(model)
    )


def _load(trainer: Any, model: nn.Module, folder: str) -> bool:
    """Load a checkpoint that ``save_pretrained`` wrote, if that is for us."""
    # FSDP and DeepSpeed keep the whole state of the model in files of their own
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    if _adapted(model):
        if not stands(unwrap(model), SAVE):
            return False
        refill(model, folder)
        return True
    theirs = hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
    if theirs or not (Path(folder) / peft.CONFIG).is_file():
        return False
    install_from(model, folder, "default", trainable=True, verify_base=True)
    try:
        _must_be_used(trainer)  # as ``train`` asked before there was an adapter
    except VeneerError:
        detach(model)
        raise
    cover(model)
    disable_dropout(model, trainer.args)
    return True


def _copy_all(trainer: Any, checkpoint_folder: str) -> bool:
    """Before a push in mid-run, transformers copies an adapter from the checkpoint into the folder
    that is uploaded: PEFT's files, if PEFT is installed. All of it belongs together, as hashes seal
    it."""
    if _adapted(trainer.model) and trainer.is_world_process_zero():
        copy_files(Path(checkpoint_folder), Path(trainer.args.output_dir))
    return False


def _has_a_card(trainer: Any) -> bool:
    """The card of an adapter says what it is and how to load it. ``Trainer`` would take it for
    PEFT's, write another in its place and ask the model, as PEFT's, to mend that. (TRL's trainers
    write one of their own.)"""
    card = Path(trainer.args.output_dir) / model_card.NAME
    return (
        _adapted(trainer.model)
        and card.is_file()
        and model_card.LINE in card.read_text(encoding="utf-8")
    )


def _must_be_used(trainer: Any) -> bool:
    """What a trainer would leave out without a word. ``TargetError``: TRL's forward multiplies by
    the weight of the output layer, past an adapter there (of a ``PeftModel`` TRL refuses that too).
    ``ConfigError``: a reference that should move and has no weights of its own; vLLM, which TRL
    would give the weights of the base."""
    model, reference = trainer.model, getattr(trainer, "ref_model", None)
    if isinstance(reference, Reference) and getattr(trainer.args, "sync_ref_model", False):
        problem = "sync_ref_model=True with a reference model that is the policy's own base"
        raise ConfigError(
            problem,
            "one that stays",
            "leave sync_ref_model out, or pass a whole model as ref_model",
        )
    if not _adapted(model):
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
        part = None if layer_state is None else layer_state.get(selected_name(model))
        if part is not None and (part.changes or part.full._parameters):
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


# ---- TRL
# ---------------------------------------------------------------------------------------------------------

#: the trainer that is being made
_MAKING: ContextVar[Any] = ContextVar("veneer_trainer", default=None)


def learn_trl(module: Any) -> None:
    """Teach a module of TRL that the reference of a policy with an adapter is no second model, and
    what drops."""
    if hasattr(module, "_asks_veneer"):
        return
    module._asks_veneer = True
    load, theirs = module.create_model_from_path, getattr(module, "disable_dropout_in_model", None)

    @functools.wraps(load)
    def create_model_from_path(*args: Any, **kwargs: Any) -> Any:
        # None: it is the policy itself that is loaded
        policy = getattr(_MAKING.get(), "model", None)
        return (
            reference_of(policy)
            if policy is not None and _adapted(policy)
            else load(*args, **kwargs)
        )

    def disable_dropout_in_model(model: nn.Module) -> None:
        """TRL looks for ``nn.Dropout``, of which an adapter of PEFT has one a layer."""
        assert theirs is not None
        theirs(model)
        _drop_nothing(model)

    module.create_model_from_path = create_model_from_path
    if theirs is not None:
        module.disable_dropout_in_model = functools.wraps(theirs)(disable_dropout_in_model)
    for name, value in vars(module).items():
        if (
            isinstance(value, type)
            and value.__module__ == module.__name__
            and name.endswith("Trainer")
        ):
            value.__init__ = _noted(value.__init__)


def _drop_nothing(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Change):
            module.dropout = 0.0


def disable_dropout(model: nn.Module, settings: Any) -> None:
    """What TRL's ``disable_dropout`` did, for an adapter that was attached after it."""
    if getattr(settings, "disable_dropout", False):
        _drop_nothing(model)


def _noted(init: Callable[..., None]) -> Callable[..., None]:
    """``init``, while which ``_MAKING`` is the object that it makes."""

    @functools.wraps(init)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        token = _MAKING.set(self)
        try:
            init(self, *args, **kwargs)
        finally:
            _MAKING.reset(token)

    return made


# ---- when others are imported
# ------------------------------------------------------------------------------------


def when_imported(name: str, call: Callable[[Any], None]) -> None:
    """Call ``call`` with a module: now, or once somebody has imported it, which takes seconds."""
    if name in sys.modules:
        call(sys.modules[name])
    elif not any(isinstance(finder, _Watch) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch(name, call))


class _Watch(MetaPathFinder):
    """Finds nothing by itself; sees one module being imported, once."""

    def __init__(self, name: str, call: Callable[[Any], None]) -> None:
        self.name, self.call = name, call

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        others = (
            finder.find_spec(fullname, path, target)
            for finder in [*sys.meta_path]
            if finder is not self
        )
        spec: Any = next((spec for spec in others if spec is not None), None)
        if spec is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                sys.meta_path.remove(self)  # only now: an import that failed may be tried again
                self.call(module)

            spec.loader.exec_module = exec_module
        return spec
