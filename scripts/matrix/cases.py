"""The cases: a variant as an adapter on all examples of one kind of layer, and what is said of each
example."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers.pytorch_utils  # noqa: F401 (the class of a kind that exists once this is imported)
from tests.support.toys import error, flat, randomise
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

import veneer
from veneer.errors import VeneerError
from veneer.layers import Layer
from veneer.variants import VARIANTS, Variant

EXACT = ""
#: begins what is said of an exact result
NOTE = "exact, with "
#: an example to which an operation does not apply
LEFT_OUT = None
#: of every adapter: neither their ratio nor a scale is 1
RANK, ALPHA = 2, 3
#: what an operation says of each example by name: EXACT, LEFT_OUT or why it is not exact
Found = dict[str, str | None]

#: what an exception says -> what the page says; any other is quoted
WORDS = {
    r"whose inputs cannot be read": (
        "this variant starts from the inputs of every weight, and what they are is known only "
        "inside this layer"
    ),
    r"wrap RNN, GRU, or LSTM": "`torch.compile` leaves torch's recurrent layers as they are",
    r"^PEFT: .*MultiheadAttention does not support DoRA": "PEFT has no DoRA for it",
    r"^PEFT: .*ParamWrapper does not work with use_dora": "PEFT has no DoRA for it",
    r"^PEFT: .*PEFT has no \w+ layer": "PEFT has no adapter for this kind of layer",
    r"^PEFT: .*(PEFT [\d.]+) applies .* out-projection 2 times": (
        r"\1 adds the change of an attention's output " "projection twice"
    ),
    r"^PEFT: .*PEFT knows one fused in-projection": (
        "PEFT adapts an attention only where queries, keys and values have the same width"
    ),
    r"^PEFT: .*PEFT leaves out dilation=([^\"]*?)\"?$": (
        r"PEFT's adapter of a convolution ignores its dilation, which " r"is \1 here"
    ),
    r"^PEFT: .*PEFT leaves out padding_mode='(\w+)'": (
        r"PEFT's adapter of a convolution ignores its padding mode, " r"which is \1 here"
    ),
    r"^PEFT: .*PEFT's change of a convolution in (\d+) groups": (
        r"PEFT's adapter of a convolution in \1 groups equals "
        "no change of its weight, so it cannot hold ours"
    ),
    r"^PEFT: .*PEFT bounds the norm": (
        "PEFT's adapter applies `max_norm` to its own numbers, and not to the changed weight"
    ),
    r"^PEFT: .*PEFT rescales the outputs of modules alone": (
        "PEFT has DoRA for whole layers, and not for a parameter by itself"
    ),
    r"^PEFT: .*not for PEFT: '\S*?': (.*?)\"?$": (
        r"\1"
    ),  # what we write into a folder that PEFT would read otherwise
}


#: options that say nothing: sizes and defaults
ORDINARY = r"\w*_features=|stride=1$|affine=True|momentum=|track_running_stats="


class Inexact(Exception):  # noqa: N818 (no error of the program)
    """A run that ended and gave another result."""


class Side(nn.Module):
    """Modules side by side, called on a mapping of their arguments by name."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, inputs):
        return {name: getattr(self, name)(*args) for name, args in inputs.items()}


@dataclass
class Results:
    """The verdicts of one kind of layer or storage, {variant or storage: {operation: {example:
    …}}}, and the descriptions of its examples."""

    name: str
    verdicts: dict[str, dict[str, Found]]
    examples: dict[str, str]


@dataclass
class Case:
    """One variant on the examples of one kind of layer.

    Fields:
        base: the examples without adapters, float64.
        model: the same with an adapter that is named like each variant.
        other: another adapter on it.
        rows, breaks: what ``rows_of`` and ``breaks_of`` find for each example.
        compiled: the model, compiled with and without ``fullgraph``; shared by the cases of the
            model.
    """

    kind: Layer
    variant: Variant
    base: Side
    inputs: Mapping[str, tuple]
    model: Side
    other: str
    rows: Mapping[str, int | None]
    breaks: Mapping[str, str]
    compiled: dict[bool, Any] = field(default_factory=dict)
    alone: dict[str, Case] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.variant.name

    def solo(self, example: str) -> Case:
        """This case on one example."""
        if example not in self.alone:
            base = Side({example: getattr(self.base, example)})
            inputs = {example: self.inputs[example]}
            model = copy.deepcopy(base)
            attach(model, self.variant, inputs)
            attach(model, VARIANTS["lora"], inputs, name="other")
            self.alone[example] = Case(
                self.kind, self.variant, base, inputs, model, "other", self.rows, self.breaks
            )
        return self.alone[example]

    def outputs(self) -> dict[str, Tensor]:
        with veneer.use(self.model, self.name), torch.no_grad():
            return flats(self.model(self.inputs))


def flats(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: flat(output) for name, output in outputs.items()}


def attach(
    model: Side, variant: Variant, inputs: Mapping[str, tuple], name: str | None = None, exclude=()
) -> Any:
    """The variant as an adapter with random numbers, on every weight that there is, with all the
    data that it needs."""
    calibration: dict[str, Any] = {}
    if variant.needs & {"inputs", "gradient"}:
        calibration["batches"] = [(inputs,)]
    if "gradient" in variant.needs:
        calibration["loss"] = lambda model, batch: sum(
            y.square().sum() for y in flats(model(*batch)).values()
        )
    if "original" in variant.needs:
        state = {
            key: value for key, value in model.state_dict().items() if value.is_floating_point()
        }
        calibration["original"] = {
            key: value + 0.05 * torch.randn_like(value) for key, value in state.items()
        }
    config = veneer.LoraConfig(
        rank=RANK, alpha=ALPHA, targets="all", variant=variant.name, exclude=exclude
    )
    handle = veneer.attach(model, config, name or variant.name, **calibration)
    randomise(handle)
    return handle


def attach_where_possible(
    base: Side, model: Side, variant: Variant, inputs: Mapping[str, tuple]
) -> dict[str, str]:
    """Attach the variant to ``model`` without the examples that refuse it. Returns their reasons by
    name."""
    try:
        attach(model, variant, inputs)
        return {}
    except Exception as first_error:
        refused: dict[str, str] = {}
        for example, args in inputs.items():
            try:
                attach(
                    Side({example: copy.deepcopy(getattr(base, example))}), variant, {example: args}
                )
            except Exception as error:
                refused[example] = reason(error)
        if not refused:
            raise first_error
        if len(refused) < len(inputs):
            rest = {example: args for example, args in inputs.items() if example not in refused}
            attach(model, variant, rest, exclude=tuple(refused))
        return refused


def rows_of(kind: Layer, module: nn.Module, args: tuple) -> int | None:
    """How many rows the inputs of a module hold: as many as the base can be run on one by one, with
    the same outputs. None if there is no such number; negative for inputs that the kind cannot take
    apart."""
    tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    packed = [int(x.batch_sizes[0]) for x in args if isinstance(x, PackedSequence)]
    candidates = (
        *packed,
        *dict.fromkeys(size for x in tensors for size in x.shape[:2] if size > 1),
    )
    batch_output, has_rows = flat(module(*args)), False
    for count in candidates:
        try:
            each = []
            for row in range(count):
                row_args, row_kwargs = kind.take(module, args, {}, torch.tensor([row]), count)
                has_rows = True
                each.append(module(*row_args, **row_kwargs))
            if error(flat(kind.put(module, each, torch.arange(count))), batch_output) < 1e-10:
                return count
        except (LookupError, RuntimeError):  # not an axis of rows
            continue
    return None if has_rows else -candidates[0]


def breaks_of(module: nn.Module, args: tuple) -> str:
    """Why the base alone cannot be compiled into one graph, or nothing."""
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(module, backend="eager", fullgraph=True)(*args)
    except Exception as broken:
        return reason(broken)
    return EXACT


def reason(error: Exception) -> str:
    """An exception as a few words that are the same on every machine."""
    text = " ".join(str(error).split()) or type(error).__name__
    for pattern, words in WORDS.items():
        if match := re.search(pattern, text):
            return short(match.expand(words))
    contract = re.search(r"Found: (.*?)\. Expected: ", text)
    if isinstance(error, VeneerError) and contract:
        text = contract[1]
    elif not isinstance(error, VeneerError | Inexact):
        text = text.split(". ")[0]
    text = re.sub(
        r"(base_model\.model\.)?\b(m\d+|beside)\.?", "", text
    )  # the names of our examples
    return short(re.sub(r" ?\([^()]*\d\.\d[^()]*\)", "", text)).strip(
        " .:;,"
    )  # numbers that a random seed gives


def short(text: str) -> str:
    """A kernel's (3, 3) is 3."""
    return re.sub(r"\((\d+)(?:, \1)*,?\)", r"\1", text)


def describe_example(module: nn.Module, first: nn.Module) -> str:
    """Describe how an example differs from the first and plainest example of its kind."""
    options = ", ".join(option for option in _options(module) if option not in _options(first))
    name = type(module).__name__
    return (
        options
        if options and type(module) is type(first)
        else f"{name}({options})"
        if options
        else name
    )


def _options(module: nn.Module) -> list[str]:
    text = short(module.extra_repr())
    if isinstance(module, nn.MultiheadAttention):  # which does not say them
        attributes = {
            "batch_first": module.batch_first,
            "kdim": module.kdim,
            "add_bias_kv": module.bias_k is not None,
        }
        text = ", ".join(f"{name}={value}" for name, value in attributes.items())
    options = re.split(r", (?=\w+=)", text)
    return [option for option in options if "=" in option and not re.match(ORDINARY, option)]


def quiet() -> None:
    """One thread, one seed, and nobody who talks in between."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 4096
    warnings.simplefilter("ignore")
    warnings.simplefilter(
        "error", veneer.SkippedLayers
    )  # an example without an adapter would prove nothing
