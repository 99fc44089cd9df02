"""Which modules a config of PEFT means.

read        ``veneer.formats.peft`` finds the paths that PEFT's own matching finds, for a folder of such a config
at the root the same where some of the names are whole paths, which PEFT adapts whatever
``layers_to_transform`` says,
            and where a list of blocks is the first part of a path, which it does not see without
            ``layers_pattern``
attach      the config by docs/from-peft.md changes these modules; where there are none, PEFT and Veneer both refuse
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import peft
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

import veneer
from veneer.errors import TargetError
from veneer.formats.peft_paths import expected_paths

from .rows import Row
from .ways import DiffersError, Result, tried

# : what stands in one model: the same names at several depths, indices of one and more digits,
# names that end alike
PATHS = [
    "foobar", "top.q_proj", "top.v_proj", "top.foo", "top.bar.0.baz", "top.bar.1.baz",
    "top.bar.1.spam.2.baz", "top.bar.2.spam.1.baz", "top.bar.10.baz", "top.bar.001.baz", "top.whatever.1.baz",
    "blocks.1.weight_of", "mlp.blocks.1.weight_of", "mlp.blocks.1.other",
    "transformer.h.0.attn.attention.q_proj", "transformer.h.1.attn.attention.q_proj",
    "transformer.h.1.attn.attention.v_proj", "transformer.h.1.attn.attention.q_proj_extra",
    "transformer.h.1.mlp.c_fc", "transformer.h.10.mlp.c_fc", "layers.3.self_attn.k_proj", "layers.13.self_attn.k_proj",
]  # fmt: skip

AT_THE_ROOT = [
    "baz",
    "q_proj",
    "c_fc",
    "bar.1.baz",
    "h.2.q_proj",
    "layers.1.c_fc",
    "layers.10.mlp.c_fc",
]

CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["foo"]},
    {"target_modules": ["bar"]},
    {"target_modules": ["foo", "foobar"]},
    {"target_modules": "foo"},
    {"target_modules": ".*oba.*"},
    {"target_modules": "foob.*"},
    {"target_modules": ".*bar.*"},
    {"target_modules": ".*spam.*baz"},
    {"target_modules": ["baz"]},
    {"target_modules": ["baz"], "layers_to_transform": [1]},
    {"target_modules": ["baz"], "layers_to_transform": [0]},
    {"target_modules": ["baz"], "layers_to_transform": [10]},
    {"target_modules": ["baz"], "layers_to_transform": [0, 1, 2]},
    {"target_modules": ["baz"], "layers_to_transform": 1},
    {"target_modules": ["baz"], "layers_to_transform": [1], "layers_pattern": ["bar"]},
    {"target_modules": ["baz"], "layers_to_transform": [0], "layers_pattern": ["bar"]},
    {"target_modules": ["baz"], "layers_to_transform": [2], "layers_pattern": ["bar"]},
    {"target_modules": ["baz"], "layers_to_transform": [1], "layers_pattern": "bar"},
    {"target_modules": ["baz"], "layers_to_transform": [1], "layers_pattern": ["foo"]},
    {"target_modules": ["baz"], "layers_to_transform": [1], "layers_pattern": ["baz"]},
    {"target_modules": ["baz"], "layers_to_transform": [1], "layers_pattern": ["whatever"]},
    {"target_modules": ["baz"], "layers_to_transform": [1], "layers_pattern": ["spam", "bar"]},
    {"target_modules": ["baz"], "layers_to_transform": [1], "layers_pattern": []},
    {"target_modules": ["baz", "other"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["attention.q_proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": ["h"]},
    {
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [0, 1, 2],
        "layers_pattern": ["h"],
    },
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["top.q_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ".*h.1.*"},
    {"target_modules": ".*(q_proj|v_proj)$"},
    {"target_modules": r"transformer\.h\.\d+\..*"},
    {"target_modules": r"^(?!.*mlp).*h.*(?:q_proj|c_fc)(?=$|\.).*"},
    {"target_modules": ["weight_of"], "layers_to_transform": [1], "layers_pattern": ["blocks"]},
    {"target_modules": ["mlp.c_fc"]},
    {"target_modules": ["1.mlp.c_fc"]},
    {"target_modules": ["c_fc"], "layers_to_transform": [1]},
    {"target_modules": ["3.self_attn.k_proj"]},
    {"target_modules": [".*k_proj"]},
    {"target_modules": ["top.bar"]},
]


def tree() -> nn.Module:
    """A model with a linear layer at each of the paths."""
    root = nn.Module()
    for path in PATHS:
        *above, last = path.split(".")
        here = root
        for part in above:
            if part not in here._modules:
                here.add_module(part, nn.Module())
            here = here._modules[part]
        here.add_module(last, nn.Linear(2, 2))
    return root


def results() -> Iterator[Result]:
    for fields in CONFIGS:
        yield from _of(fields)


def _of(fields: Mapping[str, Any]) -> Iterator[Result]:
    name = Row("", "paths", "lora", fields).name
    config = peft.LoraConfig(r=1, **fields)
    expected = {path for path in PATHS if _chosen(config, path)}
    written = {**config.to_dict(), "target_modules": fields["target_modules"]}

    def read(paths: list[str]) -> None:
        _must_be(expected_paths(written, paths), {path for path in paths if _chosen(config, path)})

    yield tried("Targets", name, "read", lambda: read(PATHS))
    yield tried("Targets", name, "at the root", lambda: read([*PATHS, *AT_THE_ROOT]))
    if "layers_pattern" in fields:
        return  # docs/from-peft.md: a block's index is the first number in a path

    def attach() -> None:
        ours: dict[str, Any] = {"rank": 1, "targets": _listed(fields["target_modules"])}
        if "exclude_modules" in fields:
            ours["exclude"] = _listed(fields["exclude_modules"])
        if "layers_to_transform" in fields:
            ours["layers"] = fields["layers_to_transform"]
            ours["layers"] = [ours["layers"]] if isinstance(ours["layers"], int) else ours["layers"]
        if not expected:
            _both_refuse(config, ours)
            return
        handle = veneer.attach(tree(), veneer.LoraConfig(**ours))
        _must_be({path.removesuffix(".weight") for path in handle.changes}, expected)

    yield tried("Targets", name, "attach", attach)


def _chosen(config: peft.LoraConfig, path: str) -> bool:
    found = check_target_module_exists(config, path)
    return bool(found) and type(found).__name__ != "_ExcludedModule"


def _listed(targets: Any) -> Any:
    return f"re:{targets}" if isinstance(targets, str) else targets


def _both_refuse(config: peft.LoraConfig, ours: Mapping[str, Any]) -> None:
    try:
        peft.get_peft_model(tree(), config)
    except ValueError:
        pass
    else:
        raise DiffersError("PEFT finds no path, and adapts something")
    try:
        veneer.attach(tree(), veneer.LoraConfig(**ours))
    except TargetError:
        return
    raise DiffersError("PEFT refuses what matches nothing, Veneer attaches something")


def _must_be(found: set[str] | None, expected: set[str]) -> None:
    if found != expected:
        raise DiffersError(f"PEFT means {sorted(expected)}, Veneer {sorted(found or ())}")
