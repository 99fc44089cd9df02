"""Two adapters of PEFT on one model.

switch      each alone, both gone, and one left when the other is detached
rows        ``adapter_names=`` beside ``veneer.use(model, [a name for each row])``
both        ``set_adapter([a, b])`` beside ``veneer.use(model, {"a": 1, "b": 1})``
stack       ``merge_adapter([a, b])`` beside ``veneer.merge`` of each in turn, undone in reverse to the very bits
sum         ``add_weighted_adapter(…, "cat")`` beside ``veneer.compose``; ours in PEFT; PEFT's in ours
svd         the same by ``"svd"``, at a rank that leaves nothing out
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from tests.support.toys import bits
from torch import Tensor, nn

import veneer

from . import ways
from .rows import CONFIGS, Row
from .ways import DiffersError, Result, must_equal

#: of the adapters; a negative weight negates one
NAMES = ("first", "second")
WEIGHTS = [0.7, -1.2]


@dataclass(frozen=True)
class Pair:
    """Two configs on one model. ``mixes``: PEFT can mix them in one batch; if not, whole batches
    are the reference. ``adds``: it can add them up; ``svd``: and decompose the sum, whose rank must
    be within what each weight allows."""

    model: str
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    mixes: bool = True
    adds: bool = True
    svd: bool = True

    @property
    def row(self) -> Row:
        return Row(
            "Two adapters", self.model, "lora", self.a, 0.3 if self.model in ways.MODELS else 0.1
        )

    @property
    def name(self) -> str:
        return f"{self.row.name} | {Row('', '', 'lora', self.b).name.partition(', ')[2]}"


def _to(*names: str, **fields: Any) -> dict[str, Any]:
    return {"target_modules": list(names), **fields}


_ALL, _CONV = {"target_modules": "all-linear"}, {"svd": False}
#: a module that one adapter alone trains in full, and DoRA, PEFT can neither mix nor add up
_APART = {"mixes": False, "adds": False}
PAIRS = [
    Pair("mlp", _to("lin0"), _to("lin0", r=10), **_CONV),
    Pair("mlp", _to("lin0"), _to("lin1", r=2), **_CONV),
    Pair("mlp of four", _to("lin1"), _to("lin1", r=4)),
    Pair("mlp of four", _to("lin1"), _to("lin2", r=4)),
    Pair("mlp of four", _to("lin0", "lin1"), _to("lin1", "lin2", r=4), **_CONV),
    # of sums with rsLoRA, PEFT's new adapter keeps the flag of the first and with it another scale
    Pair("mlp of four", _to("lin1", use_rslora=True), _to("lin1", r=3), adds=False),
    Pair("mlp of four", _to("lin1", "lin2", rank_pattern={"lin2": 2}), _to("lin1")),
    Pair(
        "mlp of four",
        _to("lin1", modules_to_save=["lin3"]),
        _to("lin1", modules_to_save=["lin3"]),
        adds=False,
    ),
    Pair("mlp of four", _to("lin1", modules_to_save=["lin3"]), _to("lin2"), **_APART),
    Pair("mlp of four", _to("lin1", use_dora=True), _to("lin1"), **_APART),
    Pair("mlp of four", _to("lin1", use_dora=True), _to("lin1", use_dora=True), **_APART),
    # PEFT has no sum of biases
    Pair(
        "mlp of four",
        _to("lin1", lora_bias=True),
        _to("lin1", "lin2", r=4, lora_bias=True),
        adds=False,
    ),
    Pair("wide Conv1D", _to("emb", "conv1d", r=2), _to("emb", "conv1d", r=3)),
    Pair("wide Conv1D", _to("conv1d", r=2), _to("emb", r=3, modules_to_save=["lin0"]), **_APART),
    Pair("Conv2d between linear layers", _to("conv2d"), _to("conv2d", "lin0", r=4), **_CONV),
    Pair("larger Conv1d", _to("conv1d"), _to("conv1d", r=4), mixes=False, **_CONV),
    Pair("Conv3d", _to("conv3d"), _to("conv3d", r=4), mixes=False, **_CONV),
    Pair("llama", _to("q_proj"), _to("q_proj", "v_proj", r=4)),
    Pair("llama", _ALL, {**_ALL, "r": 4, "lora_alpha": 16}),
    Pair("llama, tied", _to("q_proj"), _to("down_proj", r=4)),
    Pair("gpt2", _to("c_attn"), _to("c_attn", "c_fc", r=4)),
    Pair(
        "opt", _to("q_proj"), _to("fc1", "v_proj", r=4), mixes=False
    ),  # it flattens rows and tokens
    Pair("qwen2", _to("q_proj"), _to("q_proj", "v_proj", r=4)),
    Pair("mistral", _to("q_proj"), {**_ALL, "r": 4}),
    Pair("t5", _to("q", "v"), _to("k", "wo", r=4)),
    Pair("bart", _to("q_proj"), _to("fc1", "v_proj", r=4)),
    Pair("bert", _to("query"), _to("dense", r=4)),
    Pair("vit", _to("q_proj"), _to("v_proj", modules_to_save=["classifier"]), **_APART),
]


def results(pair: Pair) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as name:
        case = _Case(pair, Path(name))
        yield case.tried("switch", case.switch)
        yield case.tried("rows", case.rows)
        if not (
            pair.a.get("modules_to_save") or pair.b.get("modules_to_save")
        ):  # of which PEFT merges the active one
            yield case.tried("stack", case.stack)
        if pair.adds:
            yield case.tried("both", case.both)
            yield case.tried("sum", lambda: case.added("cat"))
            if pair.svd:
                yield case.tried("svd", lambda: case.added("svd"))


class _Case:
    def __init__(self, pair: Pair, folder: Path) -> None:
        self.pair, self.row, self.folder = pair, pair.row, folder
        ways.seed(self.row, pair.name)
        configs = [getattr(peft, CONFIGS["lora"])(**fields) for fields in (pair.a, pair.b)]
        self.theirs = peft.get_peft_model(ways.fresh(self.row), configs[0], NAMES[0])
        self.theirs.add_adapter(NAMES[1], configs[1])
        for name in NAMES:
            self.theirs.set_adapter(name)
            ways.noise(self.theirs, self.row.noise)
        self.theirs.eval().save_pretrained(folder, save_embedding_layers=False)
        self.model = ways.fresh(self.row)
        self.near = ways.near(self.row)

    def tried(self, way: str, run: Any) -> Result:
        return ways.tried(self.row.family, self.pair.name, way, run)

    @torch.no_grad()
    def answer(self, model: nn.Module, **more: Any) -> Tensor:
        """The output whose first axis are the rows."""
        _, args, keywords, _ = ways.built(self.row)
        given = model(*args, **keywords, **more)
        return (given if isinstance(given, Tensor) else given[0]).clone()

    def alone(self, name: str | None) -> Tensor:
        """PEFT's output with one adapter, or with none."""
        if name is None:
            with self.theirs.disable_adapter():
                return self.answer(self.theirs)
        self.theirs.set_adapter(name)
        return self.answer(self.theirs)

    def switch(self) -> None:
        for name in NAMES:
            veneer.load(self.model, self.folder / name, name=name)
        for name in (NAMES[0], None, NAMES[1]):
            with veneer.use(self.model, name):
                must_equal(self.answer(self.model), self.alone(name), self.near, f"{name} alone")
        other = ways.fresh(self.row)
        for name in NAMES:
            veneer.load(other, self.folder / name, name=name)
        veneer.detach(other, NAMES[1])
        must_equal(self.answer(other), self.alone(NAMES[0]), self.near, "one without the other")

    def rows(self) -> None:
        whole = {name: self.alone(name) for name in (None, *NAMES)}
        count = len(whole[None])
        names = [(None, *NAMES)[number % 3] for number in range(count)]
        if self.pair.mixes:
            expected = self.answer(
                self.theirs, adapter_names=[name or "__base__" for name in names]
            )
        else:
            expected = torch.stack([whole[name][number] for number, name in enumerate(names)])
        with veneer.use(self.model, names):
            must_equal(self.answer(self.model), expected, 10 * self.near, "rows")

    def stack(self) -> None:
        theirs = copy.deepcopy(self.theirs)
        theirs.base_model.merge_adapter([*NAMES])
        expected, before = self.answer(theirs), bits(self.model)
        for name in NAMES:
            veneer.merge(self.model, name)
        must_equal(self.answer(self.model), expected, 10 * self.near, "merged over each other")
        for name in reversed(NAMES):
            veneer.unmerge(self.model, name)
        if any(not torch.equal(value, before[key]) for key, value in bits(self.model).items()):
            raise DiffersError("unmerged: other bits")

    def both(self) -> None:
        self.theirs.base_model.set_adapter([*NAMES])
        expected = self.answer(self.theirs)
        with veneer.use(self.model, dict.fromkeys(NAMES, 1.0)):
            must_equal(self.answer(self.model), expected, 10 * self.near, "both")

    def added(self, kind: str) -> None:
        name = f"by_{kind}"
        more: dict[str, Any] = {}
        if kind == "svd":
            configs = (self.theirs.peft_config[name] for name in NAMES)
            more = {"svd_rank": sum(config.r for config in configs)}
        self.theirs.add_weighted_adapter([*NAMES], WEIGHTS, name, combination_type=kind, **more)
        expected = self.alone(name)
        ours = self.folder / f"ours_{kind}"
        veneer.compose([self.folder / name for name in NAMES], ours, weights=WEIGHTS)
        model = ways.fresh(self.row)
        veneer.load(model, ours)
        within = (
            10 * self.near if kind == "cat" else max(1e-5, 10 * self.near)
        )  # PEFT decomposes in 32 bits
        must_equal(self.answer(model), expected, within, "composed")
        theirs = peft.PeftModel.from_pretrained(ways.fresh(self.row), ours).eval()
        must_equal(self.answer(theirs), expected, within, "composed, in PEFT")
        self.theirs.save_pretrained(
            self.folder / "sums", selected_adapters=[name], save_embedding_layers=False
        )
        model = ways.fresh(self.row)
        veneer.load(model, self.folder / "sums" / name)
        must_equal(self.answer(model), expected, within, "added up by PEFT")
        if torch.equal(expected, self.alone(None)):
            raise DiffersError("the sum is nothing, so that the case shows nothing")
