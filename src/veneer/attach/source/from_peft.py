"""Tell users of PEFT which function of Veneer replaces each method of a PEFT model.

    override_peft_methods(model)   merge_and_unload() and others raise an error that names the
                                   function of Veneer
    peft_problem(model)            why Veneer cannot attach to a model that PEFT has adapted

An attached model keeps its class. It has no methods of ``PeftModel``, and the methods that
transformers and diffusers mix into every model would look for adapters of PEFT. So the model object
gets attributes that raise (``method_overrides.py``).

Rejected: ``__getattr__`` of a subclass, because every access to a parameter or child of a module
would go through it. And emulating PEFT, because PEFT's methods change what later calls compute.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, NoReturn

from torch import nn

from veneer.attach.layer.adapted_module import base_class, walk
from veneer.attach.source.method_overrides import override_method
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


def override_peft_methods(model: nn.Module) -> None:
    """Make the methods in ``METHODS`` raise on this model. A method that the model's class defines
    stays, unless it comes from a mixin that looks for adapters of PEFT."""
    cls = base_class(model)
    for name in METHODS:
        method = getattr(cls, name, None)
        if name not in model.__dict__ and (
            method is None or getattr(method, "__module__", "").startswith(_MIXINS)
        ):
            override_method(model, name, partial(_refuse, name))


def _refuse(name: str, model: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    """Raise the MethodError of the PEFT method ``name``."""
    problem = (
        f"{name}(), a method of PEFT's models, called on a {base_class(model).__name__} with"
        " adapters of Veneer"
    )
    raise MethodError(
        problem, "functions of Veneer, because an attached model keeps its class", METHODS[name]
    )


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
