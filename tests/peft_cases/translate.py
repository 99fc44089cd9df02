"""The config of ours that docs/from-peft.md says means a config of PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .rows import Row


class UntranslatedError(Exception):
    """A field or a tuner for which Veneer has no config: there is nothing to attach."""


#: fields of which the docs say "not offered", or that mean PEFT's own arithmetic alone
NOT_OFFERED = {
    "arrow_config", "kasa_config", "layer_replication", "lora_bias", "loftq_config", "monteclora_config",
    "use_bdlora", "use_qalora", "velora_config",
}  # fmt: skip
#: ways to start that move no base weight, and the variant of ours
STARTS = {"pissa": "pissa", "olora": "olora", "orthogonal": "orthogonal"}
# : tuners of PEFT that have a variant of ours: (variant, its field for the rank, for alpha, default
# rank, default alpha)
TUNERS = {
    "adalora": ("adalora", "init_r", "lora_alpha", 12, 8),
    "loha": ("loha", "r", "alpha", 8, 8),
    "lokr": ("lokr", "r", "alpha", 8, 8),
    "vera": ("vera", "r", None, 256, None),
}
#: fields of those that ours do not have
_OTHER_FORMS = {"decompose_both", "decompose_factor", "use_effective_conv2d"}


def translated(
    row: Row, made: nn.Module
) -> tuple[dict[str, Any], Callable[[nn.Module], dict[str, Any]]]:
    """(fields of ``veneer.LoraConfig``, what else ``attach`` is given) for a row that PEFT made
    into ``made``.

    Raises:
        UntranslatedError: Veneer has no config that means it.
    """
    fields = dict(row.fields)
    if row.as_lora is not None or fields.keys() & (NOT_OFFERED | _OTHER_FORMS):
        raise UntranslatedError
    if row.tuner == "ln_tuning":
        return _norms(fields, made), lambda model: {}
    if row.tuner != "lora" and row.tuner not in TUNERS:
        raise UntranslatedError
    # PEFT's default for a type of model
    targets = fields.get("target_modules") or made.peft_config["default"].target_modules or []
    means_more = targets == "all-linear" and _means_more(made)
    targets = "peft-all-linear" if means_more else _listed(targets)
    parameters = [*fields.get("target_parameters", [])]
    ours: dict[str, Any] = {"targets": targets}
    if parameters:
        ours["targets"] = [*([targets] if isinstance(targets, str) else targets), *parameters]
    if fields.get("exclude_modules"):
        ours["exclude"] = _listed(fields["exclude_modules"])
    if fields.get("layers_to_transform") is not None:
        layers = fields["layers_to_transform"]
        if set(targets) & {path for path, _ in made.base_model.model.named_modules()}:
            raise UntranslatedError  # PEFT adapts what is named by its whole path in any block
        ours["layers"] = [layers] if isinstance(layers, int) else list(layers)
    if saved := _saved(made):
        ours["train_also"] = saved
    if tokens := fields.get("trainable_token_indices"):
        ours["trainable_tokens"] = tokens
    if tokens := fields.get("alora_invocation_tokens"):
        ours["invocation_tokens"] = tokens
    ours["bias"] = {"none": "none", "lora_only": "targets", "all": "all"}[
        fields.get("bias", "none")
    ]
    ours["dropout"] = fields.get("lora_dropout", 0.0)
    return {**ours, **_strength(row, fields, made)}, lambda model: {}


def _listed(targets: Any) -> Any:
    """A text is a regular expression to PEFT, a list holds names."""
    if isinstance(targets, str):
        return targets if targets == "all-linear" else f"re:{targets}"
    return sorted(targets)


def _means_more(made: nn.Module) -> bool:
    """Whether PEFT's "all-linear" means other layers than ours: the head of a task, which stands
    outside the base model, and of an ``nn.MultiheadAttention`` the out-projection alone."""
    model = made.base_model.model
    attention = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    base = getattr(model, "base_model", model)
    return attention or (
        base is not model and getattr(model, "get_output_embeddings", lambda: None)() is None
    )


def _saved(made: nn.Module) -> list[str]:
    """What PEFT trains whole: the modules that were named, and the heads that it adds for a
    task."""
    names = made.peft_config["default"].modules_to_save or ()
    paths = [path for path, _ in made.base_model.model.named_modules()]
    return sorted(name for name in names if any(f".{path}".endswith(f".{name}") for path in paths))


def _norms(fields: dict[str, Any], made: nn.Module) -> dict[str, Any]:
    """PEFT's LNTuning: layers trained whole. Of ours these are targets that have no smaller change;
    matrices that are trained whole are ``train_also``, which goes with a target."""
    targets = made.peft_config["default"].target_modules
    ours = {"targets": _listed(targets), "train_also": fields.get("modules_to_save", [])}
    if any(
        _most(module)
        for module in made.base_model.model.modules()
        if isinstance(module, BaseTunerLayer)
    ):
        raise UntranslatedError
    return ours


def _strength(row: Row, fields: dict[str, Any], made: nn.Module) -> dict[str, Any]:
    """Variant, ranks and alphas. A rank that is larger than a weight allows is lowered to that, and
    its alpha with it, so that the scale stays."""
    if row.tuner != "lora":
        variant, rank_field, alpha_field, rank, alpha = TUNERS[row.tuner]
        rank, alpha = fields.get(rank_field, rank), fields.get(alpha_field, alpha)
        by_root = False
    else:
        rank, alpha = fields.get("r", 8), fields.get("lora_alpha", 8)
        variant, by_root = _variant(fields)
    usual = rank
    made_ranks, made_alphas = {}, {}
    for path, module in made.base_model.model.named_modules():
        if not isinstance(module, LoraLayer if row.tuner == "lora" else BaseTunerLayer) or not (
            most := _most(module)
        ):
            continue
        path = f"{path.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}"
        own = (
            module.r.get("default", rank) if row.tuner == "lora" and hasattr(module, "r") else rank
        )
        own_alpha = module.lora_alpha["default"] if row.tuner == "lora" else alpha
        allowed = min(own, most)
        if row.tuner != "lora":
            if allowed != usual:
                made_ranks[path] = allowed
            continue
        scale = own_alpha / (math.sqrt(own) if fields.get("use_rslora") else own)
        if allowed != usual:
            made_ranks[path] = allowed
        needed = scale * (math.sqrt(allowed) if by_root else allowed)
        if needed != alpha:
            made_alphas[path] = needed
    strength: dict[str, Any] = {"variant": variant, "rank": usual}
    if alpha is not None:
        strength["alpha"] = alpha
    # by the module's path, or by that of the parameter where it is one of several
    exact = {
        path: "re:{}([.]{})?".format(*map(re.escape, path.rsplit(".", 1)))
        for path in {*made_ranks, *made_alphas}
    }
    strength["ranks"] = {exact[path]: value for path, value in made_ranks.items()}
    strength["alphas"] = {exact[path]: value for path, value in made_alphas.items()}
    return {name: value for name, value in strength.items() if value != {}}


def _variant(fields: dict[str, Any]) -> tuple[str, bool]:
    """(the variant, whether its scale is alpha / √r)."""
    start = fields.get("init_lora_weights", True)
    if fields.get("use_dora"):
        return ("dora_rslora", True) if fields.get("use_rslora") else ("dora", False)
    if isinstance(start, str) and start.split("_")[0].lower() in STARTS:
        return STARTS[start.split("_")[0].lower()], False
    if isinstance(start, str) and start != "gaussian":
        raise UntranslatedError
    return ("rslora", True) if fields.get("use_rslora") else ("lora", False)


def _most(module: nn.Module) -> int:
    """min(out, in) of the weight that a layer of PEFT changes; 0 if it has none that is a
    matrix."""
    layer = module.get_base_layer()
    weight = getattr(layer, getattr(module, "parameter_name", "weight"), None)
    if isinstance(layer, nn.MultiheadAttention):
        weight = layer.in_proj_weight
    if weight is None or weight.dim() < 2:
        return 0
    if weight.dim() == 3 and not isinstance(layer, nn.Conv1d):  # experts: a matrix each
        return min(weight.shape[1:])
    groups = getattr(layer, "groups", 1)
    return min(weight.shape[0] // groups, weight[0].numel())
