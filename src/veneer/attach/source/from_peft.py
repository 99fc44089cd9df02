"""Tell users of PEFT which function of Veneer replaces each method of a PEFT model.

    answer_peft_names(model)       let merge_and_unload and other names raise AttributeErrors that
                                   name the function of Veneer
    peft_problem(model)            the reason why Veneer cannot attach to a model that PEFT has
                                   adapted

A model with adapters of Veneer has no methods of ``PeftModel``. But transformers and diffusers mix
methods of the same names into their models, and these would look for adapters of PEFT. transformers
and TRL test for PEFT by ``hasattr(model, "get_base_model")`` and the like, which must be False. So
the model's class is replaced by a subclass in which PEFT's method names raise AttributeErrors. The
subclass inherits everything else, such as the forward.

Rejected: methods that raise an error when they are called, because ``hasattr`` would then be True.
Also emulating PEFT, because PEFT's methods change what later calls compute.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn

from veneer.attach.layer.adapted_module import adapted_class, stop_answering_peft_names, walk
from veneer.attach.layer.lookup import unwrap
from veneer.distributed import base_class
from veneer.errors import MethodError, sentence

_HOW_TO_MERGE = (
    "handle.merge(), then handle.detach(keep_merged=True): the model itself is then the plain one"
)
_HOW_TO_SELECT = (
    "call the model inside `with veneer.use(model, name):`, or name None for the base; "
    "veneer.set_default(model, name) chooses for all other calls"
)
#: name of a method of a PeftModel, or of the mixins of transformers and diffusers -> the function
#: of Veneer that replaces it
PEFT_METHODS = {
    "merge_and_unload": _HOW_TO_MERGE,
    "merge_adapter": "handle.merge(), or veneer.merge(model, name)",
    "unmerge_adapter": "handle.unmerge(), or veneer.unmerge(model)",
    "fuse_lora": "handle.merge(), or veneer.merge(model, name)",
    "unfuse_lora": "handle.unmerge(), or veneer.unmerge(model)",
    "unload": "veneer.detach(model): the model itself is then as it was before",
    "get_base_model": (
        "use the model itself, which stays what it was; veneer.detach(model) removes the adapters"
    ),
    "set_adapter": _HOW_TO_SELECT,
    "set_adapters": _HOW_TO_SELECT,
    "disable_adapter": _HOW_TO_SELECT,
    "disable_adapters": _HOW_TO_SELECT,
    "enable_adapters": _HOW_TO_SELECT,
    "disable_adapter_layers": _HOW_TO_SELECT,
    "enable_adapter_layers": _HOW_TO_SELECT,
    "active_adapters": _HOW_TO_SELECT,
    "add_adapter": "veneer.attach(model, veneer.LoraConfig(…), name)",
    "load_adapter": "veneer.load(model, folder, name=name)",
    "load_lora_adapter": "veneer.load(model, folder, name=name)",
    "delete_adapter": "veneer.detach(model, name)",
    "delete_adapters": "veneer.detach(model, name)",
    "add_weighted_adapter": (
        "veneer.compose(folders, out, weights=…), or `with veneer.use(model, {name: weight, …}):`"
    ),
    "get_adapter_state_dict": "handle.named_parameters(), or handle.save(folder)",
    "save_lora_adapter": "handle.save(folder)",
    "print_trainable_parameters": "print(handle.summary())",
    "get_nb_trainable_parameters": "handle.summary(), which has trainable and total",
}
#: Python modules that define the mixins with PEFT's method names, from which the models of
#: transformers and diffusers inherit
_MIXINS = ("transformers.integrations.peft", "diffusers.loaders.peft")


class _Absent:
    """A descriptor that hides a method of a mixin: reading the attribute raises an AttributeError,
    so that Python calls ``__getattr__`` and ``hasattr`` is False."""

    def __get__(self, instance: Any, owner: Any = None) -> NoReturn:
        raise AttributeError


def answer_peft_names(model: nn.Module) -> None:
    """Let the names in ``PEFT_METHODS`` raise AttributeErrors on this model, whose class is
    replaced by a subclass. A method of such a name that the model's own class defines stays; only
    those of the mixins of transformers and diffusers, which look for adapters of PEFT, are hidden.
    """
    model = unwrap(model)
    stop_answering_peft_names(model)
    model.__class__ = _answering_class(type(model))


@functools.cache
def _answering_class(cls: Any) -> Any:
    """A subclass of ``cls`` whose instances raise an AttributeError for PEFT's method names."""
    mixin_names = {
        method_name
        for method_name in PEFT_METHODS
        if getattr(getattr(cls, method_name, None), "__module__", "").startswith(_MIXINS)
    }
    refused_names = frozenset(
        method_name
        for method_name in PEFT_METHODS
        if method_name in mixin_names or not hasattr(cls, method_name)
    )

    def find_attribute(self: Any, name: str) -> Any:
        # This is ``__getattr__``: Python calls it only for names that it does not find otherwise,
        # which include the children and parameters of the module.
        try:
            return cls.__getattr__(self, name)
        except AttributeError:
            if name in refused_names:
                raise _method_error(self, name) from None
            raise

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        rebuild_arguments = base_class(self), getattr(cls, "veneer_methods", None)
        return _rebuild, rebuild_arguments, self.__getstate__()

    attributes: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__getattr__": find_attribute,
        "__reduce_ex__": reduce_ex,
        "veneer_base": getattr(cls, "veneer_base", cls),
        "veneer_original_class": cls,
    }
    return type(cls.__name__, (cls,), {**attributes, **dict.fromkeys(mixin_names, _Absent())})


def _rebuild(base_cls: Any, method_names: Iterable[str] | None) -> nn.Module:
    """An empty object of an answering class, for copy and pickle. ``method_names`` are the adapted
    methods of the class; None if the class was not adapted."""
    cls = base_cls if method_names is None else adapted_class(base_cls, tuple(method_names))
    return object.__new__(_answering_class(cls))


def _method_error(model: nn.Module, method_name: str) -> MethodError:
    """The error of a use of PEFT's method ``method_name``, which names Veneer's function."""
    return MethodError(
        f"{method_name}, a method of PEFT's models, of a {base_class(model).__name__} with"
        " adapters of Veneer",
        "functions of Veneer, because an attached model is no PeftModel",
        PEFT_METHODS[method_name],
    )


def peft_problem(model: nn.Module) -> str | None:
    """An error text if PEFT has put adapters into the model; else None."""
    peft_model_class = getattr(sys.modules.get("peft.peft_model"), "PeftModel", None)
    peft_layer_class = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    if peft_model_class is not None and isinstance(model, peft_model_class):
        problem = f"a {type(model).__name__}"
    elif peft_layer_class is not None and (
        path := next(
            (path for path, module in walk(model) if isinstance(module, peft_layer_class)), None
        )
    ):
        problem = f"a {base_class(model).__name__} into which PEFT has put adapters (at {path!r})"
    else:
        return None
    advice = (
        "pass what its unload() returns (or merge_and_unload(), which leaves the change in the "
        "weights); to go on from PEFT's adapter, save it with save_pretrained first and "
        "veneer.load the folder"
    )
    return sentence(problem, "the base model", advice)
