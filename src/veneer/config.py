"""What to attach, where and how large: ``LoraConfig``, a value that validates itself.

The defaults are those that current results support:

- ``targets="all-linear"``: adapting attention alone trails adapting the MLPs too (Schulman and
  Thinking Machines Lab 2025, "LoRA Without Regret"; Dettmers et al. 2023, "QLoRA",
  arXiv:2305.14314, section 4).
- ``rank=16`` and a constant ``alpha=32``, so scale = 32 / rank: with B zero at the start, a
  constant alpha makes the best learning rate nearly independent of the rank (the same report,
  section "Setting LoRA hyperparameters").
- B zero and A Kaiming-uniform: the attached model equals its base before the first step (Hu et al.
  2021, arXiv:2106.09685, section 4.1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from veneer.errors import ConfigError, nearest, raise_all, sentence
from veneer.precision import at_least_float32
from veneer.variants import VARIANTS

Targets = str | Sequence[str] | Callable[[str, Any], bool]

BIASES = ("none", "targets", "all")
#: torch's names of the dtypes that numbers may have, and the short ones
DTYPES = {
    "float32": "float32", "fp32": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16",
    "float64": "float64", "fp64": "float64",
}  # fmt: skip
#: PEFT's fields that have another name here, and that name
PEFT_FIELDS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "target_parameters": "targets",
    "exclude_modules": "exclude",
    "rank_pattern": "ranks",
    "alpha_pattern": "alphas",
    "layers_to_transform": "layers",
    "modules_to_save": "train_also",
    "trainable_token_indices": "trainable_tokens",
    "alora_invocation_tokens": "invocation_tokens",
    "use_dora": 'variant="dora"',
    "use_rslora": 'variant="rslora"',
    "use_qalora": 'variant="qalora"',
    "init_lora_weights": "variant",
    "loftq_config": 'variant="loftq"',
    "eva_config": 'variant="eva"',
    "corda_config": 'variant="corda"',
    "lora_ga_config": 'variant="lora_ga"',
    "peft_type": "variant",
}
#: those that need no counterpart
PEFT_UNNEEDED = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "megatron_config", "megatron_core", "peft_version",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
#: and those that PEFT alone offers
PEFT_ONLY = {
    "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "qalora_group_size", "use_bdlora", "velora_config",
}  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """What to attach. Every pattern (``targets``, ``exclude``, ``train_also``, the keys of
    ``ranks`` and ``alphas``) is one of

    - a word: ``"all-linear"`` (linear layers of the body, no output head; a task head that
      transformers initialised because the checkpoint did not hold it is trained in full),
      ``"attention"`` and ``"mlp"`` (the linear layers in and outside attention, in the repeated
      blocks), ``"all"`` (everything that can be attached to), ``"peft-all-linear"`` (PEFT's
      "all-linear": every ``nn.Linear`` and ``Conv1D`` but the output embedding);
    - a module's full path, or a suffix of it at a dot: ``"q_proj"``, ``"self_attn.q_proj"``;
    - a glob over the full path: ``"model.layers.*.mlp.*"``;
    - ``"re:…"``, a regular expression that matches the full path;
    - for ``targets`` also a callable ``(path, module) -> bool``.

    Args:
        rank: r, the width of the bottleneck, ≥ 1 and at most min(out, in) of each target.
        alpha: numerator of the scale; None takes the variant's own default (32 for ``lora``).
        dropout: probability in [0, 1) of dropping an input of the low-rank path while training.
        targets: what to attach to; each pattern must match something.
        exclude: what to leave out of ``targets``; each pattern must match something.
        ranks, alphas: pattern → value, for the targets that differ; the first pattern that matches
            counts.
        slices: pattern → which outputs of a fused weight to change: a bool for each of its equal
            parts (q and v of a fused q, k, v: ``[True, False, True]``), or (start, stop) ranges.
            The other outputs stay as they are.
        layers: indices of the repeated blocks to keep (the first number in a path); negative ones
            count from the end.
        train_also: modules to train fully, as copies that belong to the adapter: the base keeps its
            values.
        bias: "none", "targets" (train the biases of the targets too) or "all" (every bias of the
            model).
        trainable_tokens: ids of tokens whose rows of the input embedding are trained in full, and
            with them those of every weight that is tied to it; or {pattern: ids}, for an embedding
            or head by name. The other rows stay as they are; with ``targets=()`` nothing else is
            trained.
        invocation_tokens: ids of the tokens that invoke the adapter (aLoRA, Greenewald et al. 2025,
            arXiv:2504.12397): in each row it acts on the tokens from their last occurrence in
            ``input_ids`` on, and a row without them is the base's. For linear layers of a model
            that reads ``input_ids``, with a plain product B A. Empty acts on every token.
        variant: a name in ``veneer.variants.names()``.
        dtype: of the trained numbers: a torch.dtype, its name ("float32", "float64", "bfloat16",
            "float16") or a short one ("fp32", "bf16", …); kept as its name. None takes float32 for
            a 16-bit base (a 16-bit AdamW step of usual size is lost in rounding) and the base's
            dtype otherwise.

    Raises:
        ConfigError: with every problem at once.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: Targets = "all-linear"
    exclude: str | Sequence[str] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    slices: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    layers: Sequence[int] | None = None
    train_also: str | Sequence[str] = ()
    bias: str = "none"
    trainable_tokens: Sequence[int] | Mapping[str, Sequence[int]] = ()
    invocation_tokens: Sequence[int] = ()
    variant: str = "lora"
    dtype: str | torch.dtype | None = None

    if not TYPE_CHECKING:

        def __new__(cls, *args: Any, **fields: Any) -> LoraConfig:
            """Refuse PEFT's names by Veneer's; other unknown names are left to the error of
            ``__init__``."""
            if fields.keys() & {*PEFT_FIELDS, *PEFT_UNNEEDED, *PEFT_ONLY}:
                raise_all(
                    ConfigError, "This LoraConfig cannot be used", list(_unknown_fields(fields))
                )
            return super().__new__(cls)

    def __post_init__(self) -> None:
        # Tuples and plain dicts, so that a config is a value: equal when its fields are, safe to
        # share, and plain JSON.
        for name, empty in (
            ("exclude", ()),
            ("train_also", ()),
            ("ranks", {}),
            ("alphas", {}),
            ("slices", {}),
            ("trainable_tokens", ()),
            ("invocation_tokens", ()),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, empty)
        for name in ("exclude", "train_also", "targets", "layers"):
            value = getattr(self, name)
            if isinstance(value, str | int) and name != "targets":
                value = (value,)
            if isinstance(value, Set):
                value = sorted(value, key=str)
            if isinstance(value, Iterable) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "trainable_tokens", _tokens(self.trainable_tokens))
        if isinstance(self.invocation_tokens, Iterable | int):
            object.__setattr__(self, "invocation_tokens", _sequence(self.invocation_tokens))
        raise_all(ConfigError, "This LoraConfig cannot be used", list(self._problems()))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_name(self.dtype))
        for name in ("ranks", "alphas"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        slices = {
            pattern: tuple(
                chosen if isinstance(chosen, bool) else tuple(chosen) for chosen in outputs
            )
            for pattern, outputs in self.slices.items()
        }
        object.__setattr__(self, "slices", slices)

    def _problems(self):
        yield from self._strength_problems()
        yield from self._target_problems()
        yield from self._invocation_problems()
        if not _number(self.dropout) or not 0 <= self.dropout < 1:
            yield sentence(
                f"dropout={self.dropout!r}",
                "a probability in [0, 1)",
                "use 0, or a value like 0.05",
            )
        if self.bias == "lora_only":
            problem = "bias='lora_only'"
            yield sentence(problem, "PEFT's 'lora_only' is 'targets' here", 'write bias="targets"')
        elif self.bias not in BIASES:
            yield sentence(
                f"bias={self.bias!r}{nearest(str(self.bias), BIASES)}",
                " | ".join(BIASES),
                'use "none"',
            )
        if not isinstance(self.variant, str) or self.variant not in VARIANTS.names():
            yield sentence(
                f"variant={self.variant!r}{nearest(str(self.variant), VARIANTS.names())}",
                f"one of {', '.join(VARIANTS.names())}",
                "choose a variant that exists",
            )
        if self.dtype is not None and dtype_name(self.dtype) is None:
            problem = f"dtype={self.dtype!r}{nearest(str(self.dtype), DTYPES)}"
            yield sentence(problem, f"None, or one of {', '.join(DTYPES)}", "use None")

    def _strength_problems(self):
        yield from _positive_integer("rank", self.rank)
        alphas = {"alpha": 1.0 if self.alpha is None else self.alpha}
        for name in ("ranks", "alphas"):
            if not isinstance(getattr(self, name), Mapping):
                problem = f"{name}={getattr(self, name)!r}"
                yield sentence(problem, "a mapping of pattern to value", "use e.g. {'q_proj': 8}")
            elif name == "ranks":
                for pattern, rank in self.ranks.items():
                    yield from _positive_integer(f"ranks[{pattern!r}]", rank)
            else:
                alphas |= {f"alphas[{pattern!r}]": alpha for pattern, alpha in self.alphas.items()}
        for name, alpha in alphas.items():
            if not _number(alpha) or not math.isfinite(alpha) or alpha <= 0:
                yield sentence(
                    f"{name}={alpha!r}", "a finite number above 0", "use 32, or twice the rank"
                )
        if not isinstance(self.slices, Mapping) or not all(map(_slices, self.slices.values())):
            expected = "a mapping of pattern to bools or to (start, stop) ranges"
            yield sentence(
                f"slices={self.slices!r}", expected, "use e.g. {'c_attn': [True, False, True]}"
            )

    def _target_problems(self):
        wanted = (
            self.trainable_tokens.values() if isinstance(self.trainable_tokens, Mapping) else ()
        )
        if not all(map(_ids, wanted or (self.trainable_tokens,))) or (() in wanted):
            expected = "a list of different token ids, or {pattern: such a list}"
            yield sentence(
                f"trainable_tokens={self.trainable_tokens!r}", expected, "use e.g. [49152, 49153]"
            )
        nothing_else = self.targets == () and self.trainable_tokens
        if not callable(self.targets) and not _patterns(self.targets) and not nothing_else:
            expected = "a pattern, a list of patterns or a callable"
            yield sentence(f"targets={self.targets!r}", expected, 'use "all-linear"')
        for name in ("exclude", "train_also"):
            value = getattr(self, name)
            if value != () and not _patterns(value):
                yield sentence(
                    f"{name}={value!r}",
                    "a pattern or a list of patterns",
                    "name modules of the model",
                )
        indices = (
            isinstance(self.layers, tuple)
            and self.layers
            and all(type(index) is int for index in self.layers)
        )
        if self.layers is not None and not indices:
            yield sentence(
                f"layers={self.layers!r}",
                "a list of block indices",
                "use e.g. [0, 1, -1], or None for all",
            )

    def _invocation_problems(self):
        """Problems of ``invocation_tokens``, and of what would change tokens before them."""
        tokens = self.invocation_tokens
        if tokens == ():
            return
        if not isinstance(tokens, tuple) or not all(
            type(id_) is int and id_ >= 0 for id_ in tokens
        ):
            do = "use e.g. tokenizer.encode(text, add_special_tokens=False)"
            yield sentence(f"invocation_tokens={tokens!r}", "a list of token ids", do)
        if self.variant in VARIANTS.names() and not _is_plain_product(self.variant):
            plain = ", ".join(filter(_is_plain_product, VARIANTS.names()))
            problem = f"variant={self.variant!r} with invocation_tokens"
            yield sentence(problem, f"one of {plain}", 'use variant="lora"')
        for name, nothing in (("train_also", ()), ("trainable_tokens", ()), ("bias", "none")):
            value = getattr(self, name)
            if value != nothing:
                problem = f"{name}={value!r} with invocation_tokens"
                expected = "changes that act from the invocation on: low-rank ones alone"
                yield sentence(problem, expected, f"leave {name} out")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. A callable has no such form: ``attach`` replaces it by the paths that
        it chose."""
        fields = asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
        }

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> LoraConfig:
        """The config of ``to_dict``; an unknown field is a ConfigError that names the nearest known
        one."""
        raise_all(ConfigError, "This LoraConfig cannot be used", list(_unknown_fields(fields)))
        return LoraConfig(**fields)

    @staticmethod
    def from_peft(config: Any) -> LoraConfig:
        """The config that means what PEFT's means: an adapter that is attached with it computes the
        same from the same parameters, and changes the same weights.

        Args:
            config: a ``peft.LoraConfig``, a mapping of its fields, or the path of an
                ``adapter_config.json`` or of the folder that holds it.

        Raises:
            ConfigError: names each field that ``LoraConfig`` cannot express.
        """
        from veneer.formats.peft_config import lora_fields, read_fields

        fields, problems = lora_fields(read_fields(config))
        raise_all(ConfigError, "This config of PEFT cannot be used", problems)
        return LoraConfig(**fields)


def dtype_name(dtype: Any) -> str | None:
    """torch's name of a dtype that is spelled in any of the accepted ways; None if it is none of
    ``DTYPES``."""
    return DTYPES.get(str(dtype).removeprefix("torch."))


def torch_dtype(dtype: Any, argument: str = "dtype") -> torch.dtype:
    """The ``torch.dtype`` of such a spelling. ``ConfigError``: there is none of this name."""
    name = dtype_name(dtype)
    if name is None:
        problem = f"{argument}={dtype!r}{nearest(str(dtype), DTYPES)}"
        raise ConfigError(problem, f"one of {', '.join(DTYPES)}", "correct it")
    return getattr(torch, name)


def trained_dtype(config: LoraConfig, base: torch.dtype) -> torch.dtype:
    """The dtype of the parameters that are trained for a weight of dtype ``base``: that of the
    config, else float32, or float64 if ``base`` is."""
    return torch_dtype(config.dtype) if config.dtype else at_least_float32(base)


def pattern_list(patterns: str | Iterable[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def path_test(pattern: str) -> Callable[[str], bool]:
    """A test whether ``pattern`` matches a path: as a regular expression (``re:``), a glob, or a
    path or its end."""
    if pattern.startswith("re:"):
        expression = re.compile(pattern[3:])
        return lambda path: expression.fullmatch(path) is not None
    if any(character in pattern for character in "*?["):
        return lambda path: fnmatchcase(path, pattern)
    return lambda path: path == pattern or path.endswith(f".{pattern}")


def bad_regex(config: LoraConfig) -> list[str]:
    """A problem for each ``re:`` pattern of a config that is no regular expression."""
    targets = () if callable(config.targets) else pattern_list(config.targets)
    patterns = [*targets, *config.exclude, *config.train_also, *config.ranks, *config.alphas]
    problems = []
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            problems.append(
                sentence(
                    f"pattern {pattern!r}",
                    f"a regular expression after re: ({error})",
                    "correct it",
                )
            )
    return problems


def _unknown_fields(fields: Iterable[str]) -> Iterator[str]:
    """A problem for each name that is no field. For a field of PEFT it says what to write here."""
    names = LoraConfig.__dataclass_fields__
    for name in fields:
        if name in names:
            continue
        if name in PEFT_FIELDS:
            ours = PEFT_FIELDS[name]
            expected = f"{ours!r}, as PEFT's `{name}` is `{ours}` here"
            yield sentence(f"field {name!r}", expected, f"write {ours}")
        elif name in PEFT_UNNEEDED:
            yield sentence(
                f"field {name!r} of PEFT", "no such field: it is not needed", "remove it"
            )
        elif name in PEFT_ONLY:
            do = "remove it; docs/from-peft.md says what there is instead"
            yield sentence(f"field {name!r} of PEFT", "a field that Veneer has", do)
        else:
            yield sentence(
                f"field {name!r}{nearest(name, names)}",
                f"one of {', '.join(names)}",
                "correct or remove it",
            )


def _positive_integer(name: str, value: object):
    if type(value) is not int or value < 1:
        yield sentence(
            f"{name}={value!r}", "a whole number of at least 1", "use 16, or 8 for small data"
        )


def _tokens(value: Any) -> Any:
    """Ids as tuples of ints, so that a config is a value; what are no ids stays, for the error to
    show."""
    if isinstance(value, Mapping):
        return {pattern: _tokens(ids) for pattern, ids in value.items()} or ()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(sorted(value) if isinstance(value, Set) else value)
    return value


def _sequence(value: Any) -> Any:
    """Token ids in their order as a tuple; text and sets, which have none, stay as they are."""
    if isinstance(value, str | Set | Mapping):
        return value
    return (value,) if isinstance(value, int) else tuple(value)


def _is_plain_product(variant: str) -> bool:
    """Whether a variant computes ΔW = s · B A from two parameters that train, as LoRA does."""
    lora = VARIANTS["lora"]
    return VARIANTS[variant].resolve is lora.resolve and not VARIANTS[variant].frozen


def _ids(value: Any) -> bool:
    """Whether these are different token ids."""
    if not isinstance(value, tuple):
        return False
    return all(type(id_) is int and id_ >= 0 for id_ in value) and len({*value}) == len(value)


def _slices(outputs: object) -> bool:
    """Whether these are bools, one a part of equal size, or (start, stop) ranges."""
    if not isinstance(outputs, Sequence) or isinstance(outputs, str) or not outputs:
        return False
    if all(isinstance(chosen, bool) for chosen in outputs):
        return any(outputs)
    return all(
        isinstance(bounds, Sequence) and [type(end) for end in bounds] == [int, int]
        for bounds in outputs
    )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _patterns(value: object) -> bool:
    if isinstance(value, str):
        return bool(value)
    return (
        isinstance(value, Sequence)
        and len(value) > 0
        and all(isinstance(item, str) and item for item in value)
    )
