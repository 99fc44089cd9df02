"""The cases of the matrix: a variant as an adapter on all examples of a layer kind, and the verdict
on each example."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers.pytorch_utils  # noqa: F401 (registers a class of a layer kind)
from tests.support.toys import error, flat, randomise
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

import veneer
from veneer.errors import VeneerError
from veneer.layers import Layer
from veneer.variants import VARIANTS, Variant

#: the verdict on an exact result
EXACT = ""
#: begins the verdict on an exact result that needs a note
NOTE = "exact, with "
#: the verdict on an example to which an operation does not apply
LEFT_OUT = None
#: rank and alpha of every adapter, so that the scale is not 1
RANK, ALPHA = 2, 3
#: the verdict of an operation by example: EXACT, LEFT_OUT, or the reason why it is not exact
Verdicts = dict[str, str | None]

#: pattern of an exception's text -> text on the page; other exceptions are quoted
REASONS = {
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
    ),  # Veneer's own reason in a folder that PEFT would misread
}


#: options of a module that its description omits: sizes and defaults
ORDINARY = r"\w*_features=|stride=1$|affine=True|momentum=|track_running_stats="


class Inexact(Exception):  # noqa: N818 (no error of the program)
    """Raised if a run ends with a wrong result."""


class Side(nn.Module):
    """A model of several modules. It is called with the arguments of each module by its name."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, inputs):
        return {name: getattr(self, name)(*args) for name, args in inputs.items()}


@dataclass
class Results:
    """The results of one layer kind or storage. ``verdicts``: {variant or storage: {operation:
    {example: verdict}}}; ``examples``: a description of each example."""

    name: str
    verdicts: dict[str, dict[str, Verdicts]]
    examples: dict[str, str]


@dataclass
class Case:
    """One variant on the examples of one kind of layer.

    Fields:
        base: the examples without adapters, float64.
        model: the examples with an adapter for each variant, named like the variant.
        other: the name of another adapter on ``model``.
        rows, breaks: the results of ``rows_of`` and ``breaks_of`` for each example.
        compiled: the model, compiled with and without ``fullgraph``; all cases of the model share
            it.
        alone: the cases of single examples, by example.
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
        """This case with one example alone."""
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
        """The flattened output of each example under the variant's adapter."""
        with veneer.use(self.model, self.name), torch.no_grad():
            return flats(self.model(self.inputs))


def flats(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: flat(output) for name, output in outputs.items()}


def attach(
    model: Side, variant: Variant, inputs: Mapping[str, tuple], name: str | None = None, exclude=()
) -> Any:
    """Attach the variant as an adapter with random values to every weight of ``model``, with all
    the calibration data that it needs."""
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
    """Attach the variant to ``model``, except to the examples that refuse it. Returns the reasons
    of these by example."""
    try:
        attach(model, variant, inputs)
        return {}
    except Exception as first_error:
        refusals: dict[str, str] = {}
        for example, args in inputs.items():
            try:
                attach(
                    Side({example: copy.deepcopy(getattr(base, example))}), variant, {example: args}
                )
            except Exception as error:
                refusals[example] = reason(error)
        if not refusals:
            raise first_error
        if len(refusals) < len(inputs):
            accepted = {
                example: args for example, args in inputs.items() if example not in refusals
            }
            attach(model, variant, accepted, exclude=tuple(refusals))
        return refusals


def rows_of(kind: Layer, module: nn.Module, args: tuple) -> int | None:
    """The number of rows in the inputs of a module, such that the base gives the same outputs when
    it runs on the rows one by one. None if there is no such number; negative if the layer kind
    cannot split the inputs into rows."""
    tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    packed_sizes = [int(x.batch_sizes[0]) for x in args if isinstance(x, PackedSequence)]
    candidates = (
        *packed_sizes,
        *dict.fromkeys(size for x in tensors for size in x.shape[:2] if size > 1),
    )
    batch_output, has_rows = flat(module(*args)), False
    for count in candidates:
        try:
            row_outputs = []
            for row in range(count):
                row_args, row_kwargs = kind.take(module, args, {}, torch.tensor([row]), count)
                has_rows = True
                row_outputs.append(module(*row_args, **row_kwargs))
            joined_output = flat(kind.put(module, row_outputs, torch.arange(count)))
            if error(joined_output, batch_output) < 1e-10:
                return count
        except (LookupError, RuntimeError):  # this axis does not count rows
            continue
    return None if has_rows else -candidates[0]


def breaks_of(module: nn.Module, args: tuple) -> str:
    """The reason why the base cannot be compiled into one graph; EXACT if it can."""
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(module, backend="eager", fullgraph=True)(*args)
    except Exception as error:
        return reason(error)
    return EXACT


def reason(error: Exception) -> str:
    """The text of an exception for the page, short and the same on every machine."""
    text = " ".join(str(error).split()) or type(error).__name__
    for pattern, words in REASONS.items():
        if match := re.search(pattern, text):
            return short(match.expand(words))
    veneer_error = re.search(r"Found: (.*?)\. Expected: ", text)
    if isinstance(error, VeneerError) and veneer_error:
        text = veneer_error[1]
    elif not isinstance(error, VeneerError | Inexact):
        text = text.split(". ")[0]
    text = re.sub(
        r"(base_model\.model\.)?\b(m\d+|beside)\.?", "", text
    )  # the names of the examples
    return short(re.sub(r" ?\([^()]*\d\.\d[^()]*\)", "", text)).strip(
        " .:;,"
    )  # numbers that depend on a random seed


def short(text: str) -> str:
    """``text`` with tuples of equal numbers shortened, such as "(3, 3)" to "3"."""
    return re.sub(r"\((\d+)(?:, \1)*,?\)", r"\1", text)


def describe_example(module: nn.Module, first: nn.Module) -> str:
    """How an example differs from the first example of its layer kind, which has no options."""
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
    if isinstance(module, nn.MultiheadAttention):  # its extra_repr omits the options
        attributes = {
            "batch_first": module.batch_first,
            "kdim": module.kdim,
            "add_bias_kv": module.bias_k is not None,
        }
        text = ", ".join(f"{name}={value}" for name, value in attributes.items())
    options = re.split(r", (?=\w+=)", text)
    return [option for option in options if "=" in option and not re.match(ORDINARY, option)]


def quiet() -> None:
    """Set one thread, one seed and limits of recompilation, and turn off warnings."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 4096
    warnings.simplefilter("ignore")
    warnings.simplefilter(
        "error", veneer.SkippedLayers
    )  # an example without an adapter must not count as exact
