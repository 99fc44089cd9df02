"""PEFT's layout: the fields of ``adapter_config.json`` and the keys of
``adapter_model.safetensors``.

    base_model.model.<path>.lora_A.weight                 A of a low-rank change (suffixes by the kind of the layer)
    base_model.model.<path>.lora_B.weight                 B
    base_model.model.<path>.<parameter>                   a parameter that was trained in full
    base_model.model.<path>.base_layer.bias               a trained bias of a layer that also has a low-rank change
    base_model.model.<path>.lora_magnitude_vector         a number of a variant besides A and B
    base_model.model.<path>.lora_B.bias                   a bias that is scaled as B is, of lora_bias
    base_model.model.<attention>.base_layer.out_proj.…    the out-projection below an adapted attention
    base_model.model.<experts>.base_layer.lora_A.weight   the last but one of several adapted parameters of one module
    base_model.model.<block>.base_layer.<child>.…         what lies below a module with an adapted parameter

Read from PEFT 0.21's source and checked against it in the tests.

A folder that PEFT would load and then compute something else with says so in ``peft_type``: PEFT
fails on that word, and its error shows the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from veneer.errors import AdapterError, raise_all, sentence
from veneer.fileio.throttle import throttled
from veneer.formats import patterns
from veneer.lowrank import LowRank

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
#: the suffix of DoRA's magnitude
MAGNITUDE = "lora_magnitude_vector"
#: that of the bias beside B of ``lora_bias``: y = op(x; W) + bias + scale · (op(x; B A) + it)
LORA_BIAS = "lora_B.bias"
NOT_FOR_PEFT = "not for PEFT"
#: how often PEFT applies the change of the out-projection of an attention, in the releases up to
#: KNOWN: its
#: ``MultiheadAttention.merge`` adds it, and then calls the projection's own merge
#: (huggingface/peft#3774)
TIMES, KNOWN = 2, "0.21"
#: what PEFT calls a config without low-rank changes, which it refuses otherwise
NO_TARGETS = "dummy-target-modules"

#: a larger rank is no adapter's: it is more than any weight has inputs
MAX_RANK = 2**20


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in types


def _every(container: type, test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether all values of a list, or of a dict, pass a test."""
    return lambda value: (
        isinstance(value, container)
        and all(map(test, value.values() if container is dict else value))
    )


def _rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _token_ids(value: Any) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return all(
        isinstance(ids, list) and all(type(id_) is int and id_ >= 0 for id_ in ids) for ids in lists
    )


_number, _texts = _is(int, float), _every(list, _is(str))
_SIZE = f"a whole number from 1 to {MAX_RANK:,}"
# The fields that do not change the arithmetic given by the other fields, and the values that each
# may have besides null: (test, in words, fields).
_FIELDS: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        _is(str),
        "text",
        "base_model_name_or_path megatron_core peft_type peft_version revision task_type",
    ),
    (_is(bool), "true or false", "ensure_weight_tying fan_in_fan_out inference_mode lora_bias"),
    (_is(bool), "true or false", "use_dora use_qalora use_rslora"),
    (
        _is(dict),
        "an object",
        "auto_mapping corda_config eva_config loftq_config lora_ga_config megatron_config",
    ),
    (_is(dict), "an object", "runtime_config"),
    (_is(bool, str), "true, false or a name", "init_lora_weights"),
    (_is(int), "a whole number", "qalora_group_size"),
    (_number, "a number", "lora_alpha"),
    (lambda value: _number(value) and 0 <= value <= 1, "a number from 0 to 1", "lora_dropout"),
    (_rank, _SIZE, "r"),
    (_every(dict, _rank), f"{_SIZE} for each pattern", "rank_pattern"),
    (_every(dict, _number), "a number for each pattern", "alpha_pattern"),
    (_texts, "a list of texts", "modules_to_save target_parameters"),
    (
        lambda value: isinstance(value, str) or _texts(value),
        "text, or a list of texts",
        "exclude_modules layers_pattern target_modules",
    ),
    (_token_ids, "a list of token ids, or one for each path", "trainable_token_indices"),
    (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'", "bias"),
    (
        lambda value: _every(list, _is(int))(value if isinstance(value, list) else [value]),
        "a whole number, or a list of these",
        "layers_to_transform",
    ),
)
_INFORMATION = {field: (test, words) for test, words, fields in _FIELDS for field in fields.split()}
#: what to do instead of a field that is refused; PEFT applies what all others say
_INSTEAD = {
    "alora_invocation_tokens": (
        'take it out, and select the adapter from these tokens on (docs/from-peft.md, "aLoRA")'
    ),
    "layer_replication": (
        'take it out, and load on a base that has these layers (docs/from-peft.md, "Repeated'
        ' layers")'
    ),
}
#: starts that move part of the base's weight into the adapter, so that the file is a change of a
#: base without it; PEFT
#: makes them again as it loads the folder
STARTS = ("pissa", "olora")
# and those that nobody can make again (beginning of the name, why)
_CHANGES_BASE = (
    ("pissa", "which took a random approximation off the base's weights as it started"),
    ("corda", "which took what it found in data off the base's weights as it started"),
    ("loftq", "which quantised the base's weights as it started"),
    ("lora_ga", "which took what it found in gradients off the base's weights as it started"),
)


@dataclass(frozen=True)
class PeftLayer:
    """One low-rank change as the file holds it. ``at`` is the path of its module, or of its
    parameter where the config means one, without the wrappers that PEFT puts around them."""

    at: str
    A: Tensor
    B: Tensor
    suffixes: tuple[str, str]
    rank: int
    alpha: float
    scale: float
    extras: Mapping[str, Tensor]

    @property
    def stacked(self) -> bool:
        """Whether B counts the groups along its last axis, [out, r·g], as PEFT stacks experts; else
        along its first."""
        return self.B.shape[1] != self._rank

    @property
    def _rank(self) -> int:
        return self.rank if self.A.shape[0] % self.rank == 0 else self.A.shape[0]

    @property
    def dims(self) -> tuple[int, int, int]:
        """(groups, out, in) of the change. Raises AdapterError as ``low`` does."""
        low = self.low
        return low.A.shape[0], low.B.shape[1], low.A.shape[2]

    def with_magnitude(self, magnitude: Tensor | None) -> PeftLayer:
        """With DoRA's magnitude, if there is one: [1, out, 1, …] for a convolution, [out]
        elsewhere."""
        shape = (1, -1, *[1] * (self.A.dim() - 2)) if self.A.dim() > 2 else (-1,)
        return (
            self
            if magnitude is None
            else replace(self, extras={MAGNITUDE: magnitude.reshape(shape)})
        )

    @property
    def low(self) -> LowRank:
        """The change as a value, with one group but for grouped convolutions and stacks.
        ``AdapterError``: A and B that are no product of this rank."""
        rank = self._rank
        groups = self.A.shape[0] // rank
        try:
            A = self.A.reshape(groups, rank, -1)  # [g·r, in/g, …] -> [g, r, in]
            # B: [g·out, r, …], or [out, r·g]
            B = (
                self.B.reshape(-1, rank, groups).permute(2, 0, 1)
                if self.stacked
                else self.B.reshape(groups, -1, rank)
            )
        except RuntimeError as error:
            problem = f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} at {self.at!r}"
            raise AdapterError(
                problem, f"a product of rank {self.rank}", "get the file again"
            ) from error
        return LowRank(A, B, self.scale)

    def with_low(self, low: LowRank) -> PeftLayer:
        """Another change at the same place, in the same shapes but for the rank. Its alpha is that
        of plain LoRA: ``low.scale · rank``."""
        groups, rank, _ = low.A.shape
        A = low.A.reshape(groups * rank, *self.A.shape[1:])
        if self.stacked:
            B = low.B.permute(1, 2, 0).reshape(low.B.shape[1], rank * groups)
        else:
            B = low.B.reshape(groups * low.B.shape[1], rank, *self.B.shape[2:])
        return replace(
            self, A=A, B=B, rank=rank, alpha=low.scale * rank, scale=low.scale, extras={}
        )


def not_for_peft(config: Mapping[str, Any]) -> str | None:
    """Why PEFT would compute something else with this adapter, as its ``peft_type`` says; None: it
    would not."""
    type_ = str(config.get("peft_type"))
    return type_.removeprefix(NOT_FOR_PEFT).strip(": ") if type_.startswith(NOT_FOR_PEFT) else None


def key(path: str, suffix: str) -> str:
    return f"{PREFIX}{path}.{suffix}" if path else f"{PREFIX}{suffix}"


def split(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    suffixes: Iterable[tuple[str, str]],
    extras: Iterable[str] = (),
    ours: bool = False,
) -> tuple[dict[str, PeftLayer], dict[str, dict[str, Tensor]]]:
    """The file's tensors as (low-rank changes by path, fully trained parameters by path and name).
    ``suffixes``: the (A, B) suffixes that layer kinds use. ``extras``: the suffixes of further
    parameters that variants use. ``ours``: Veneer wrote the config, with whole paths.
    ``AdapterError``: a key that means nothing here, an A without a B, a rank that the config
    contradicts."""
    parts_by_suffix: dict[str, Any] = {
        suffix: (pair, "AB"[side]) for pair in suffixes for side, suffix in enumerate(pair)
    }
    parts_by_suffix |= {suffix: (None, suffix) for suffix in extras}
    pairs: dict[str, dict[str, Any]] = {}
    full: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for name, tensor in throttled(tensors.items()):
        bare = name.removeprefix(PREFIX)
        suffix = next(
            (suffix for suffix in parts_by_suffix if bare == suffix or bare.endswith(f".{suffix}")),
            None,
        )
        unknown = suffix is None and any(
            segment.startswith("lora_") for segment in bare.split(".")[-2:]
        )
        if not name.startswith(PREFIX) or unknown:
            keys = f"keys {PREFIX}<path>.lora_A.weight and the like"
            problems.append(sentence(f"tensor {name!r}", keys, "convert it first"))
        elif suffix is not None:
            pair, side = parts_by_suffix[suffix]
            entry = pairs.setdefault(bare[: -len(suffix)].rstrip("."), {"suffixes": None})
            entry[side] = tensor
            entry["suffixes"] = pair or entry["suffixes"]
        else:
            path, _, parameter = bare.rpartition(".")
            # the base's own values, which PEFT's bias="all" writes along
            if ".original_module" in path:
                continue
            # the same option repeats trained biases under the name of the adapter
            path = re.sub(r"\.modules_to_save(\.default)?(?=\.|$)", "", path)
            path = re.sub(r"((^|\.)base_layer)+$", "", path)
            full.setdefault(path, {})[parameter] = tensor
    low = {path: _layer(path, entry, config, ours, problems) for path, entry in pairs.items()}
    raise_all(AdapterError, "These adapter tensors cannot be used", problems)
    return {path: layer for path, layer in low.items() if layer is not None}, full


def _layer(
    path: str, entry: Mapping[str, Any], config: Mapping[str, Any], ours: bool, problems: list[str]
) -> PeftLayer | None:
    """The change of one path of the file, from its ``suffixes`` and its tensors by side ("A", "B",
    a variant's)."""
    A, B, named = entry.get("A"), entry.get("B"), _parameter_at(config, path, ours)
    if A is None or B is None:
        problems.append(
            sentence(f"half a pair at {path!r}", "both A and B", "get the whole file again")
        )
        return None
    if A.dim() < 2 or B.dim() < 2:
        problem = f"A {tuple(A.shape)} and B {tuple(B.shape)} at {path!r}"
        problems.append(sentence(problem, "matrices", "get the whole file again"))
        return None
    more = {
        suffix: tensor for suffix, tensor in entry.items() if suffix not in ("A", "B", "suffixes")
    }
    rank, alpha, scale = strength(config, *named, unnested(attention_of(path) or path)[0])
    target_path = named[0] if named else unnested(path)[0]
    # of a parameter, only a model tells how many matrices there are
    if not named and B.shape[1] % rank:
        problem = f"rank {B.shape[1]} at {path!r} (A {tuple(A.shape)}, B {tuple(B.shape)})"
        do = (
            "get both files again (what PEFT writes for a grouped convolution is no change of its"
            " weight)"
        )
        problems.append(sentence(problem, f"{rank}, as {CONFIG} says", do))
    return PeftLayer(target_path, A, B, entry["suffixes"], rank, alpha, scale, more)


def starts_from_base(config: Mapping[str, Any]) -> bool:
    """Whether the file holds a change of a base that PEFT changes as it loads the folder, by one of
    ``STARTS``."""
    start = config.get("init_lora_weights")
    return isinstance(start, str) and (start == "pissa" or start.lower() == "olora")


def check_config(config: Mapping[str, Any], ours: bool = False, with_base: bool = False) -> None:
    """Raise AdapterError for everything in the config that would change the arithmetic in a way
    that we do not do. ``ours`` is a config that Veneer wrote. ``with_base``: the base's weights are
    there to compute with."""
    problems = []
    type_ = config.get("peft_type")
    # the other fields of another tuner mean other things
    if type_ != "LORA" and not_for_peft(config) is None:
        do = (
            "save it as LoRA with PEFT (save_as_lora), or merge it there and run `veneer extract`"
            " on the merged model"
        )
        raise AdapterError(
            f"peft_type {type_!r} in {CONFIG}", "'LORA', or a type that docs/from-peft.md names", do
        )
    if type_ != "LORA" and not ours:
        problems.append(
            sentence(f"peft_type {type_!r} and no record", "'LORA'", "get the whole folder again")
        )
    for name in ("r", "lora_alpha", "target_modules"):
        if config.get(name) is None and not (
            name == "target_modules" and config.get("target_parameters")
        ):
            problems.append(
                sentence(
                    f"no {name!r} in {CONFIG}",
                    "a value",
                    f"add the {name} that it was trained with",
                )
            )
    start = config.get("init_lora_weights")
    if starts_from_base(config):
        if not with_base:
            problem = f"init_lora_weights={start!r}, which changed the base's weights as it started"
            do = (
                "load it on its base with veneer.load and save it, or let PEFT convert it when it"
                " saves"
            )
            problems.append(sentence(problem, "an adapter of the unchanged base", do))
    elif isinstance(start, str):
        matches = ((name, why) for name, why in _CHANGES_BASE if start.lower().startswith(name))
        problems += [
            sentence(f"init_lora_weights={start!r}, {why}", "an adapter of the unchanged base",
                     "let PEFT convert it when it saves (path_initial_model_for_weight_conversion)")
            for _, why in matches
        ]  # fmt: skip
    if config.get("lora_bias") is True and not with_base:
        do = "load it on its base, and merge or save it there"
        problems.append(sentence("lora_bias=true, biases beside B", "changes of weights alone", do))
    # A has all inputs, and yet PEFT scales them in a GPTQ layer
    alike = config.get("qalora_group_size") == 1
    if config.get("use_qalora") is True and (alike or not with_base):
        do = (
            "set it to false, unless that base is GPTQ's"
            if alike
            else "load it on its base, and save it there"
        )
        problems.append(
            sentence("use_qalora=true, which pools inputs of GPTQ layers", "A of all inputs", do)
        )
    for name, value in config.items():
        test, words = _INFORMATION.get(
            name, (lambda value: not value, "a field that Veneer can honour")
        )
        if value is not None and not test(value):
            problem = (
                f"{name[:80]}={text if len(text := repr(value)) <= 200 else text[:200] + '…'} in"
                f" {CONFIG}"
            )
            do = (
                "correct it, or get the file again"
                if name in _INFORMATION
                else _INSTEAD.get(name, "use PEFT for it")
            )
            problems.append(sentence(problem, words, do))
    raise_all(
        AdapterError, f"This {CONFIG} cannot be used", problems or list(_bad_patterns(config))
    )


def _bad_patterns(config: Mapping[str, Any]) -> Iterator[str]:
    """The problems of the expressions of a config whose fields have their types. Expressions of
    targets are only tested with ``re``, since the tensors name the targets too."""
    tests: list[tuple[str, Callable[[Any], Any], Any]] = [
        (field, patterns.ends, tuple(config.get(field) or ()))
        for field in ("rank_pattern", "alpha_pattern")
    ]
    alone = ("target_modules", "exclude_modules")
    tests += [
        (field, patterns.readable, config[field])
        for field in alone
        if isinstance(config.get(field), str)
    ]
    for field, compiled, source in (
        *tests,
        ("layers_pattern", patterns.containers, _layers_patterns(config)),
    ):
        try:
            compiled(source)
        except ValueError as error:
            do = "name the modules by the ends of their paths"
            yield sentence(f"{field} in {CONFIG}: {error}", "a plain regular expression", do)


def _layers_patterns(config: Mapping[str, Any]) -> tuple[str, ...]:
    listed = config.get("layers_pattern") or [r"[^.]+"]
    return (listed,) if isinstance(listed, str) else tuple(listed)


def expected_paths(config: Mapping[str, Any], paths: Iterable[str]) -> set[str] | None:
    """The paths among ``paths`` that the config's targets mean, by PEFT's rules; None where it
    cannot be told: "all-linear", and expressions that cannot be run within the limits of
    ``patterns``."""
    targets, exclude = config.get("target_modules") or (), config.get("exclude_modules")
    if targets == "all-linear":
        return None
    # PEFT adapts nothing in these
    saved_modules = [f".{name}." for name in config.get("modules_to_save") or ()]
    paths = [path for path in paths if not any(name in f".{path}." for name in saved_modules)]
    try:
        chosen = {
            path
            for path in paths
            if _named(targets, path) and not (exclude and _named(exclude, path))
        }
    except (ValueError, patterns.TooSlowError):
        return None
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if not layers:
        return chosen
    # what a list of names has as a whole path, PEFT adapts whatever its block
    full_paths = set() if isinstance(targets, str) else set(targets)
    return {path for path in chosen if path in full_paths or _layer_of(path, config) in layers}


def _layer_of(path: str, config: Mapping[str, Any]) -> int | None:
    """The first index in a path that stands behind what the first ``layers_pattern`` which matches
    at all means, and in front of something. Without a pattern PEFT sees none behind the first part
    of a path."""
    above, segments = patterns.containers(_layers_patterns(config)), path.split(".")
    least = 1 if config.get("layers_pattern") else 2
    indices = [
        (int(segment), ".".join(segments[:n]))
        for n, segment in enumerate(segments[:-1])
        if n >= least and segment.isdecimal()
    ]
    hits = (
        (pattern, number)
        for number, (_, front) in enumerate(indices)
        for pattern in above.matching(front)
    )
    first = min(hits, default=None)
    return indices[first[1]][0] if first is not None else None


def _named(names: str | Iterable[str], path: str) -> bool:
    if isinstance(names, str):
        return patterns.matcher_of_whole_texts(names)(path)
    return any(path == name or path.endswith(f".{name}") for name in names)


def strength(config: Mapping[str, Any], *paths: str) -> tuple[int, float, float]:
    """(rank, alpha, scale) of a change that goes by these paths, of which the first with a pattern
    counts. PEFT takes the first key of ``rank_pattern`` and ``alpha_pattern`` that matches the end
    of the path as a regex."""

    def value(patterned: str, default: str) -> Any:
        values = config.get(patterned) or {}
        looked_up = (patterns.ends(tuple(values)).first(path) for path in (paths if values else ()))
        return next(
            (values[pattern] for pattern in looked_up if pattern is not None), config[default]
        )

    rank, alpha = int(value("rank_pattern", "r")), value("alpha_pattern", "lora_alpha")
    return rank, alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def unnested(path: str) -> tuple[str, int]:
    """A path without the wrappers that PEFT puts around the modules of it, and how many of these
    stand at its end."""
    segments = path.split(".")
    depth = next(
        (count for count, segment in enumerate(reversed(segments)) if segment != "base_layer"),
        len(segments),
    )
    return ".".join(segment for segment in segments if segment != "base_layer"), depth


def of_parameter(path: str, layer: PeftLayer) -> bool:
    """Whether an entry of the file at ``path`` changes a parameter by its own name, not its
    module."""
    return layer.at != unnested(path)[0]


def pattern_of(path: str, layer: PeftLayer) -> str:
    """The path by which ``rank_pattern`` and ``alpha_pattern`` mean an entry of the file at
    ``path``."""
    return layer.at if of_parameter(path, layer) else unnested(attention_of(path) or path)[0]


def nested(path: str, wraps: Mapping[str, int]) -> str:
    """A path with the wrappers of the modules above it, of which each module has so many."""
    segments = path.split(".") if path else []
    inside: list[str] = []
    for count, segment in enumerate(segments):
        wrappers = wraps.get(".".join(segments[:count]), 0) if count else 0
        inside += [*["base_layer"] * wrappers, segment]
    return ".".join(inside)


def attention_of(path: str) -> str | None:
    """The path of the attention whose out-projection stands at this path of a file, or None. The
    two share their rank and alpha."""
    segments = path.split(".")
    return ".".join(segments[:-2]) if segments[-2:] == ["base_layer", "out_proj"] else None


def unsure(config: Mapping[str, Any]) -> str | None:
    """Why it is not known how often the PEFT that wrote this applies the change of an
    out-projection, or None."""
    version = str(config.get("peft_version") or KNOWN)
    later = [int(number) for number in re.findall(r"\d+", version)[:2]] > [
        int(number) for number in KNOWN.split(".")
    ]
    reason = (
        f"PEFT {KNOWN} applies an attention's out-projection {TIMES} times, and of PEFT {version}"
        " it is not known"
    )
    return reason if later else None


def _parameter_at(config: Mapping[str, Any], path: str, ours: bool) -> list[str]:
    """The path of the parameter that an entry of the file at ``path`` means, as near as the config
    alone can tell: the last of ``target_parameters`` in that module, or one before it for each
    wrapper. Nothing if it means a module."""
    bare, depth = unnested(path)
    ends = [target.rpartition(".") for target in config.get("target_parameters") or ()]
    parameters = [parameter for above, _, parameter in ends if above == bare]
    if (
        not ours
        and not parameters
        and not expected_paths({**config, "exclude_modules": None}, [bare])
    ):
        parameters = [
            parameter for above, _, parameter in ends if not above or _named([above], bare)
        ]
    return [f"{bare}.{parameters[-1 - depth]}".lstrip(".")] if depth < len(parameters) else []


def expected_parameters(config: Mapping[str, Any], paths: Iterable[str]) -> set[str]:
    """The parameters among ``paths`` that the config's ``target_parameters`` mean."""
    return {path for path in paths if _named(config.get("target_parameters") or (), path)}


def differs(kind: str, module: Any) -> str | None:
    """Why PEFT computes something else at a module of this kind than a change of its weight gives,
    or None."""
    # its A inherits stride and padding alone
    if kind.startswith("conv") and kind[4:] in (
        "1d",
        "2d",
        "3d",
    ):
        if module.groups != 1:
            return (
                f"PEFT's change of a convolution in {module.groups} groups is no change of its"
                " weight"
            )
        if any(step != 1 for step in module.dilation):
            return f"PEFT leaves out dilation={tuple(module.dilation)}"
        return (
            None
            if module.padding_mode == "zeros"
            else f"PEFT leaves out padding_mode={module.padding_mode!r}"
        )
    if kind == "embedding":
        return None if module.max_norm is None else "PEFT bounds the norm of A's rows too"
    if kind == "attention":
        return None if module._qkv_same_embed_dim else "PEFT knows one fused in-projection alone"
    return None if kind in ("linear", "conv1d_transformers") else f"PEFT has no {kind} layer"


#: what modules that wrap a layer answer for it, besides what every module has; they have no other
#: attribute of it
_OF_WRAPPERS = {
    "weight", "bias", "in_features", "out_features", "training",
    "add_zero_attn", "batch_first", "bias_k", "bias_v", "dropout", "embed_dim", "head_dim", "in_proj_bias",
    "in_proj_weight", "kdim", "num_heads", "out_proj", "vdim",
}  # fmt: skip


#: the kinds of layers that have a bias beside B in PEFT
WITH_BIAS = ("linear", "conv1d_transformers", "conv1d", "conv2d", "conv3d")


def lacks(attribute: str) -> bool:
    """Whether an attribute of a layer is none of the module that PEFT puts around it: whoever asks
    for it fails."""
    return attribute not in _OF_WRAPPERS and not hasattr(nn.Module, attribute)


#: what the projections and the router of experts are called in checkpoints from before
#: transformers 5
_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def taken_for_experts(path: str, parameters: Iterable[str]) -> bool:
    """Whether PEFT may take a linear layer for experts of old: among the targets of a model with
    fused experts it replaces these names by the fused parameters. Such a layer must be named by its
    parameter."""
    return path.rpartition(".")[2] in _EXPERTS and any(
        name.endswith(".gate_up_proj") for name in parameters
    )


def targets_for(chosen: list[str], among: Iterable[str]) -> list[str] | str:
    """The ``target_modules`` for which PEFT chooses exactly these paths ``among`` its candidates:
    last parts where those suffice, else whole paths, else (a path that is the end of another) a
    regex.
    """
    among, wanted = list(among), set(chosen)
    if not wanted:
        return []
    for paths in (sorted({path.rpartition(".")[2] for path in wanted}), sorted(wanted)):
        if expected_paths({"target_modules": paths}, among) == wanted:
            return paths
    return "|".join(map(re.escape, sorted(wanted)))


def common(
    ranks: Mapping[str, int], alphas: Mapping[str, float], rank: int, alpha: float
) -> tuple[int, float]:
    """The rank and alpha for ``r`` and ``lora_alpha``: these two if a layer has both, else those
    that most layers have. So where all layers have one scale, it is that of r and lora_alpha, for
    what reads no patterns (vLLM did not)."""
    pairs = [(ranks[path], alphas[path]) for path in ranks]
    return (rank, alpha) if (rank, alpha) in pairs or not pairs else max(pairs, key=pairs.count)


def patterns_for(values: Mapping[str, float], default: float) -> dict[str, float]:
    """A rank or alpha pattern with the whole path of every layer that differs from the default, so
    that it means no layer whose path only ends alike."""

    def pattern(path: str) -> str:
        alike = any(
            longer.endswith(f".{path}") and values[longer] != values[path] for longer in values
        )
        return f"^{re.escape(path)}" if alike else re.escape(path)

    return {pattern(path): value for path, value in values.items() if value != default}
