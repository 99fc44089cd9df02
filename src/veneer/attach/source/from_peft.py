"""Tell users of PEFT which function of Veneer replaces each method of a PEFT model.

    answer_peft_names(model)       merge_and_unload and others are AttributeErrors that name the
                                   function of Veneer
    peft_problem(model)            why Veneer cannot attach to a model that PEFT has adapted

An attached model has no methods of ``PeftModel``, and the methods that transformers and diffusers
mix into every model would look for adapters of PEFT. transformers and TRL test for PEFT by
``hasattr(model, "get_base_model")`` and the like, which must be False. So the model gets a subclass
of its class that refuses these names. Its forward is that of its class.

Rejected: attributes of the model that raise when they are called, because ``hasattr`` is then True.
And emulating PEFT, because PEFT's methods change what later calls compute.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn

from veneer.attach.layer.adapted_module import adapted_class, uncover, walk
from veneer.attach.layer.lookup import unwrap
from veneer.distributed import base_class
from veneer.errors import MethodError, sentence

_MERGE = (
    "handle.merge(), then handle.detach(keep_merged=True): the model itself is then the plain one"
)
_USE = (
    "call the model inside `with veneer.use(model, name):`, or name None for the base; "
    "veneer.set_default(model, name) chooses for all other calls"
)
#: a method of a PeftModel, or of the mixins of transformers and diffusers -> its counterpart in
#: Veneer
METHODS = {
    "merge_and_unload": _MERGE,
    "merge_adapter": "handle.merge(), or veneer.merge(model, name)",
    "unmerge_adapter": "handle.unmerge(), or veneer.unmerge(model)",
    "fuse_lora": "handle.merge(), or veneer.merge(model, name)",
    "unfuse_lora": "handle.unmerge(), or veneer.unmerge(model)",
    "unload": "veneer.detach(model): the model itself is then as it was before",
    "get_base_model": (
        "use the model itself, which stays what it was; veneer.detach(model) removes the adapters"
    ),
    "set_adapter": _USE,
    "set_adapters": _USE,
    "disable_adapter": _USE,
    "disable_adapters": _USE,
    "enable_adapters": _USE,
    "disable_adapter_layers": _USE,
    "enable_adapter_layers": _USE,
    "active_adapters": _USE,
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
_MIXINS = ("transformers.integrations.peft", "diffusers.loaders.peft")


class _Absent:
    """A class attribute that instances do not have, although a mixin defines it."""

    def __get__(self, instance: Any, owner: Any = None) -> NoReturn:
        raise AttributeError


def answer_peft_names(model: nn.Module) -> None:
    """Make the names in ``METHODS`` raise on this model. A method that the model's class defines
    stays, unless it comes from a mixin that looks for adapters of PEFT."""
    model = unwrap(model)
    uncover(model)
    model.__class__ = _answering_class(type(model))


@functools.cache
def _answering_class(cls: Any) -> Any:
    """The subclass of a model's class whose instances raise on PEFT's names."""
    mixed_in = {
        name
        for name in METHODS
        if getattr(getattr(cls, name, None), "__module__", "").startswith(_MIXINS)
    }
    refused = frozenset(name for name in METHODS if name in mixed_in or not hasattr(cls, name))

    def find_attribute(self: Any, name: str) -> Any:
        # only called for names that are not found otherwise, such as those of children
        try:
            return cls.__getattr__(self, name)
        except AttributeError:
            if name in refused:
                raise _method_error(self, name) from None
            raise

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        arguments = base_class(self), getattr(cls, "veneer_entries", None)
        return _rebuild, arguments, self.__getstate__()

    attributes: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__getattr__": find_attribute,
        "__reduce_ex__": reduce,
        "veneer_base": getattr(cls, "veneer_base", cls),
        "veneer_covered": cls,
    }
    return type(cls.__name__, (cls,), {**attributes, **dict.fromkeys(mixed_in, _Absent())})


def _rebuild(base: Any, entries: Iterable[str] | None) -> nn.Module:
    cls = base if entries is None else adapted_class(base, tuple(entries))
    return object.__new__(_answering_class(cls))


def _method_error(model: nn.Module, name: str) -> MethodError:
    problem = (
        f"{name}, a method of PEFT's models, of a {base_class(model).__name__} with adapters of"
        " Veneer"
    )
    expected = "functions of Veneer, because an attached model is no PeftModel"
    return MethodError(problem, expected, METHODS[name])


def peft_problem(model: nn.Module) -> str | None:
    """The problem of a model into which PEFT has put adapters, or None."""
    wrapper = getattr(sys.modules.get("peft.peft_model"), "PeftModel", None)
    tuned = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    if wrapper is not None and isinstance(model, wrapper):
        problem = f"a {type(model).__name__}"
    elif tuned is not None and (
        path := next((path for path, module in walk(model) if isinstance(module, tuned)), None)
    ):
        problem = f"a {base_class(model).__name__} into which PEFT has put adapters (at {path!r})"
    else:
        return None
    do = (
        "pass what its unload() returns (or merge_and_unload(), which leaves the change in the "
        "weights); to go on from PEFT's adapter, save it with save_pretrained first and "
        "veneer.load the folder"
    )
    return sentence(problem, "the base model", do)
