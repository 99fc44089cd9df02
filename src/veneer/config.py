"""``LoraConfig``: which weights to adapt, and how. It validates its fields when it is created.

The defaults are those that current results support:

- ``targets="all-linear"``: adapters on attention alone do worse than on attention and the MLPs
  (Schulman and Thinking Machines Lab 2025, "LoRA Without Regret"; Dettmers et al. 2023, "QLoRA",
  arXiv:2305.14314, section 4).
- ``rank=16`` and a constant ``alpha=32``, so scale = 32 / rank: with B zero at the start, a
  constant alpha makes the best learning rate nearly independent of the rank ("LoRA Without
  Regret", section "Setting LoRA hyperparameters").
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
#: spelling of a parameter's dtype -> torch's name of the dtype
DTYPES = {
    "float32": "float32", "fp32": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16",
    "float64": "float64", "fp64": "float64",
}  # fmt: skip
#: field of PEFT's LoraConfig -> the field of Veneer's LoraConfig that replaces it
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
    "layers_pattern": "targets",
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
#: fields of PEFT's LoraConfig that Veneer does not need
PEFT_UNNEEDED = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out",
    "inference_mode", "megatron_config", "megatron_core", "peft_version",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
#: fields of PEFT's LoraConfig for features that Veneer does not have
PEFT_ONLY = {
    "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "qalora_group_size", "use_bdlora", "velora_config",
}  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """Which weights to adapt, and how. Every pattern (``targets``, ``exclude``, ``train_also``, the
    keys of ``ranks`` and ``alphas``) is one of

    - a word, but not as a key: ``"all-linear"`` (linear layers of the body, no output head; it also
      trains in full a new task head, which transformers initialised because the checkpoint does not
      hold it),
      ``"attention"`` (the linear layers of the body whose paths name attention), ``"mlp"`` (the
      other linear layers of the repeated blocks), ``"all"`` (everything that can be attached to),
      ``"peft-all-linear"`` (PEFT's "all-linear": every ``nn.Linear`` and ``Conv1D`` but the output
      embedding);
    - a module's full path, or a suffix of it at a dot: ``"q_proj"``, ``"self_attn.q_proj"``;
    - a glob over the full path: ``"model.layers.*.mlp.*"``;
    - ``"re:…"``, a regular expression that matches the full path;
    - for ``targets`` also a callable ``(path, module) -> bool``.

    Args:
        rank: r, the width of the bottleneck, ≥ 1 and at most min(out, in) of each target.
        alpha: numerator of the scale; None takes the variant's own default (32 for ``lora``).
        dropout: probability in [0, 1) of dropping an input of the low-rank path while training.
        targets: weights to adapt; each pattern must match at least one.
        exclude: weights to leave out of ``targets``; each pattern must match at least one.
        ranks, alphas: pattern → rank or alpha, for targets that differ from ``rank`` and ``alpha``;
            the first pattern that matches a target applies.
        slices: pattern → which outputs of a fused weight to change: a bool for each of its blocks
            of equal size (q and v of a fused q, k, v: ``[True, False, True]``), or (start, stop)
            ranges of outputs. All other outputs are left unchanged.
        layers: indices of the repeated blocks to adapt (the first number in a path); negative ones
            count from the end.
        train_also: modules to train in full. The adapter trains copies of them, so the base keeps
            its values.
        bias: "none", "targets" (train the biases of the targets too) or "all" (every bias of the
            model).
        trainable_tokens: ids of tokens whose rows of the input embedding, and of every weight tied
            to it, are trained in full; or {pattern: ids}, for embeddings or heads by name. All
            other rows stay frozen. With ``targets=()``, only these rows are trained.
        invocation_tokens: ids of the tokens that invoke the adapter (aLoRA, Greenewald et al. 2025,
            arXiv:2504.12397). In each row of ``input_ids``, the adapter acts from the last
            occurrence of these tokens on; a row without them gets the base's output. They require
            linear layers of a model that reads ``input_ids``, and a variant with ΔW = s · B A. ()
            lets the adapter act on every token.
        variant: a name in ``veneer.variants.names()``.
        dtype: dtype of the adapter parameters: a torch.dtype, its name ("float32", "float64",
            "bfloat16", "float16") or an abbreviation ("fp32", "bf16", …); stored as its name. None
            takes float32 for a 16-bit base, because rounding to 16 bits would lose an AdamW step of
            usual size, and the base's dtype otherwise.

    Raises:
        ConfigError: the error lists all problems of the config.
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
            """Raise ConfigError, which shows Veneer's names, for PEFT's field names. ``__init__``
            refuses all other unknown names."""
            if fields.keys() & {*PEFT_FIELDS, *PEFT_UNNEEDED, *PEFT_ONLY}:
                raise_all(
                    ConfigError, "This LoraConfig cannot be used", list(_field_problems(fields))
                )
            return super().__new__(cls)

    def __post_init__(self) -> None:
        # Fields become tuples and dicts, so that configs with equal fields are equal, cannot change
        # while they are shared, and convert to JSON.
        for field_name, empty_value in (
            ("exclude", ()),
            ("train_also", ()),
            ("ranks", {}),
            ("alphas", {}),
            ("slices", {}),
            ("trainable_tokens", ()),
            ("invocation_tokens", ()),
        ):
            if getattr(self, field_name) is None:
                object.__setattr__(self, field_name, empty_value)
        for field_name in ("exclude", "train_also", "targets", "layers"):
            field_value = getattr(self, field_name)
            if isinstance(field_value, str | int) and field_name != "targets":
                field_value = (field_value,)
            if isinstance(field_value, Set):
                field_value = sorted(field_value, key=str)
            if isinstance(field_value, Iterable) and not isinstance(field_value, str):
                object.__setattr__(self, field_name, tuple(field_value))
        object.__setattr__(self, "trainable_tokens", _ids_as_tuples(self.trainable_tokens))
        object.__setattr__(self, "invocation_tokens", _sequence_as_tuple(self.invocation_tokens))
        raise_all(ConfigError, "This LoraConfig cannot be used", list(self._problems()))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_name(self.dtype))
        for field_name in ("ranks", "alphas"):
            object.__setattr__(self, field_name, dict(getattr(self, field_name)))
        slices = {
            pattern: tuple(
                selection if isinstance(selection, bool) else tuple(selection)
                for selection in selections
            )
            for pattern, selections in self.slices.items()
        }
        object.__setattr__(self, "slices", slices)

    def _problems(self):
        """An error text for each field that is wrong."""
        yield from self._rank_and_alpha_problems()
        yield from self._target_problems()
        yield from self._invocation_problems()
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
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

    def _rank_and_alpha_problems(self):
        ranks: dict[str, Any] = {"rank": self.rank}
        alphas: dict[str, Any] = {"alpha": 1.0 if self.alpha is None else self.alpha}
        for field_name, values in (("ranks", ranks), ("alphas", alphas)):
            overrides = getattr(self, field_name)
            if isinstance(overrides, Mapping):
                values.update(
                    (f"{field_name}[{pattern!r}]", value) for pattern, value in overrides.items()
                )
            else:
                problem = f"{field_name}={overrides!r}"
                yield sentence(problem, "a mapping of pattern to value", "use e.g. {'q_proj': 8}")
        for name, rank in ranks.items():
            if type(rank) is not int or rank < 1:
                problem, advice = f"{name}={rank!r}", "use 16, or 8 for small data"
                yield sentence(problem, "a whole number of at least 1", advice)
        for name, alpha in alphas.items():
            if not _is_number(alpha) or not math.isfinite(alpha) or alpha <= 0:
                yield sentence(
                    f"{name}={alpha!r}", "a finite number above 0", "use 32, or twice the rank"
                )

    def _target_problems(self):
        trainable_tokens = self.trainable_tokens
        id_lists = trainable_tokens.values() if isinstance(trainable_tokens, Mapping) else ()
        trains_only_tokens = self.targets == () and self.trainable_tokens
        has_targets = callable(self.targets) or _are_patterns(self.targets)
        are_indices = isinstance(self.layers, tuple) and {*map(type, self.layers)} == {int}
        checks = [
            (
                not isinstance(self.slices, Mapping)
                or not all(map(_are_slices, self.slices.values())),
                "slices",
                "a mapping of pattern to bools or to (start, stop) ranges",
                "use e.g. {'c_attn': [True, False, True]}",
            ),
            (
                not all(map(_are_distinct_ids, id_lists or (trainable_tokens,))) or () in id_lists,
                "trainable_tokens",
                "a list of different token ids, or {pattern: such a list}",
                "use e.g. [49152, 49153]",
            ),
            (
                not has_targets and not trains_only_tokens,
                "targets",
                "a pattern, a list of patterns or a callable",
                'use "all-linear"',
            ),
            *(
                (
                    value != () and not _are_patterns(value),
                    name,
                    "a pattern or a list of patterns",
                    "name modules of the model",
                )
                for name, value in (("exclude", self.exclude), ("train_also", self.train_also))
            ),
            (
                self.layers is not None and not are_indices,
                "layers",
                "a list of block indices",
                "use e.g. [0, 1, -1], or None for all",
            ),
        ]
        for failed, name, expected, advice in checks:
            if failed:
                yield sentence(f"{name}={getattr(self, name)!r}", expected, advice)

    def _invocation_problems(self):
        """An error text for an invalid ``invocation_tokens``, and for each other field that would
        change the outputs of tokens before the invocation tokens."""
        token_ids = self.invocation_tokens
        if token_ids == ():
            return
        if not isinstance(token_ids, tuple) or not all(
            type(id_) is int and id_ >= 0 for id_ in token_ids
        ):
            advice = "use e.g. tokenizer.encode(text, add_special_tokens=False)"
            yield sentence(f"invocation_tokens={token_ids!r}", "a list of token ids", advice)
        if self.variant in VARIANTS.names() and not _is_plain_product(self.variant):
            plain_variants = ", ".join(filter(_is_plain_product, VARIANTS.names()))
            problem = f"variant={self.variant!r} with invocation_tokens"
            yield sentence(problem, f"one of {plain_variants}", 'use variant="lora"')
        for name, default_value in (("train_also", ()), ("trainable_tokens", ()), ("bias", "none")):
            value = getattr(self, name)
            if value != default_value:
                problem = f"{name}={value!r} with invocation_tokens"
                expected = "only low-rank changes, which act from the invocation on"
                yield sentence(problem, expected, f"leave {name} out")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values. JSON cannot represent a callable in ``targets``; the config of
        an attached adapter has ``re:`` patterns of the paths that the callable chose instead."""
        fields = asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
        }

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> LoraConfig:
        """The config whose ``to_dict`` is ``fields``. Raises a ConfigError that names the most
        similar field if a field is unknown."""
        raise_all(ConfigError, "This LoraConfig cannot be used", list(_field_problems(fields)))
        return LoraConfig(**fields)

    @staticmethod
    def from_peft(config: Any) -> LoraConfig:
        """The config that is equivalent to one of PEFT: it changes the same weights, and its
        adapter computes the same outputs from the same adapter parameters.

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
    """torch's name of a dtype, such as "bfloat16". ``dtype``: a ``torch.dtype`` or a spelling in
    ``DTYPES``; for any other value, the result is None."""
    return DTYPES.get(str(dtype).removeprefix("torch."))


def torch_dtype(dtype: Any, argument_name: str = "dtype") -> torch.dtype:
    """The ``torch.dtype`` for a ``torch.dtype`` or a spelling in ``DTYPES``. ``ConfigError``: any
    other value. ``argument_name``: the name of the value in the error text."""
    name = dtype_name(dtype)
    if name is None:
        raise ConfigError(
            f"{argument_name}={dtype!r}{nearest(str(dtype), DTYPES)}",
            f"one of {', '.join(DTYPES)}",
            "correct it",
        )
    return getattr(torch, name)


def trained_dtype(config: LoraConfig, base_dtype: torch.dtype) -> torch.dtype:
    """The dtype of adapter parameters for a weight of dtype ``base_dtype``: the config's dtype if
    it has one, else float32, or float64 for a float64 weight."""
    return torch_dtype(config.dtype) if config.dtype else at_least_float32(base_dtype)


def pattern_list(patterns: str | Iterable[str]) -> list[str]:
    """The patterns of a field that holds one pattern or several."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def path_test(pattern: str) -> Callable[[str], bool]:
    """A function that tells whether ``pattern`` matches the path of a module. The pattern is a
    regular expression (``re:…``), a glob, a path, or the end of a path at a dot."""
    if pattern.startswith("re:"):
        expression = re.compile(pattern[3:])
        return lambda path: expression.fullmatch(path) is not None
    if any(character in pattern for character in "*?["):
        return lambda path: fnmatchcase(path, pattern)
    return lambda path: path == pattern or path.endswith(f".{pattern}")


def bad_regex(config: LoraConfig) -> list[str]:
    """An error text for each ``re:`` pattern of a config that is no valid regular expression."""
    target_patterns = () if callable(config.targets) else pattern_list(config.targets)
    token_patterns = config.trainable_tokens if isinstance(config.trainable_tokens, Mapping) else ()
    patterns = [
        *target_patterns,
        *config.exclude,
        *config.train_also,
        *config.ranks,
        *config.alphas,
        *config.slices,
        *token_patterns,
    ]
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


def _field_problems(field_names: Iterable[str]) -> Iterator[str]:
    """An error text for each of ``field_names`` that ``LoraConfig`` lacks. For a field of PEFT's
    config, the text names Veneer's field, if there is one."""
    known_fields = LoraConfig.__dataclass_fields__
    for name in field_names:
        if name in known_fields:
            continue
        if name in PEFT_FIELDS:
            replacement = PEFT_FIELDS[name]
            expected = f"{replacement!r}, as PEFT's `{name}` is `{replacement}` here"
            yield sentence(f"field {name!r}", expected, f"write {replacement}")
        elif name in PEFT_UNNEEDED:
            yield sentence(
                f"field {name!r} of PEFT", "no such field: it is not needed", "remove it"
            )
        elif name in PEFT_ONLY:
            advice = "remove it; docs/from-peft.md says what there is instead"
            yield sentence(f"field {name!r} of PEFT", "a field that Veneer has", advice)
        else:
            yield sentence(
                f"field {name!r}{nearest(name, known_fields)}",
                f"one of {', '.join(known_fields)}",
                "correct or remove it",
            )


def _ids_as_tuples(value: Any) -> Any:
    """Token ids as tuples, so that equal configs compare equal. Values that are not token ids are
    returned unchanged, so that the error text of a later check shows them."""
    if isinstance(value, Mapping):
        return {pattern: _ids_as_tuples(ids) for pattern, ids in value.items()} or ()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(sorted(value) if isinstance(value, Set) else value)
    return value


def _sequence_as_tuple(value: Any) -> Any:
    """A token id, or a sequence of ids, as a tuple. Other values, such as text and sets, are
    returned unchanged, so that the error text of a later check shows them."""
    if isinstance(value, str | Set | Mapping) or not isinstance(value, Iterable | int):
        return value
    return (value,) if isinstance(value, int) else tuple(value)


def _is_plain_product(variant: str) -> bool:
    """Whether a variant computes ΔW = s · B A from two trained parameters, as LoRA does."""
    lora_variant = VARIANTS["lora"]
    return VARIANTS[variant].resolve is lora_variant.resolve and not VARIANTS[variant].frozen


def _are_distinct_ids(value: Any) -> bool:
    """Whether a value is a tuple of distinct token ids."""
    return (
        isinstance(value, tuple)
        and all(type(id_) is int and id_ >= 0 for id_ in value)
        and len({*value}) == len(value)
    )


def _are_slices(slices: object) -> bool:
    """Whether ``slices`` is a list of bools with a True, or a list of (start, stop) pairs."""
    if not isinstance(slices, Sequence) or isinstance(slices, str) or not slices:
        return False
    if all(isinstance(is_changed, bool) for is_changed in slices):
        return any(slices)
    return all(
        isinstance(bounds, Sequence) and [type(bound) for bound in bounds] == [int, int]
        for bounds in slices
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_patterns(value: object) -> bool:
    patterns = [value] if isinstance(value, str) else value
    return (
        isinstance(patterns, Sequence)
        and len(patterns) > 0
        and all(isinstance(pattern, str) and pattern for pattern in patterns)
    )
