"""Calls that mean something in PEFT or elsewhere, and here something else: the error says what is
meant."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.support.moe import build
from tests.support.tiny import tiny_model
from torch import nn

import veneer
from veneer.attach.source.from_peft import PEFT_METHODS
from veneer.errors import AdapterError, ConfigError, MethodError, NotQuantized, TargetError
from veneer.formats import peft as peft_format

# PEFT asks transformers for an attribute that is called otherwise by now
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

LORA = veneer.LoraConfig(rank=2)


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))


# ---- methods of PEFT's models
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(PEFT_METHODS))
@pytest.mark.parametrize(
    "make", [tiny_model, lambda: nn.Sequential(nn.Linear(8, 8))], ids=["transformers", "torch"]
)
def test_a_method_of_pefts_models_says_what_does_the_same_here(make: Any, method: str) -> None:
    model = make()
    before, cls = set(model.__dict__), type(model)
    handle = veneer.attach(model, LORA)
    with pytest.raises(MethodError, match=method) as raised:
        getattr(model, method)
    assert PEFT_METHODS[method] in str(raised.value)
    with pytest.raises(MethodError, match=method):
        getattr(copy.deepcopy(model), method)
    assert not hasattr(model, method)
    if isinstance(model, nn.Sequential):
        assert isinstance(pickle.loads(pickle.dumps(model)), nn.Sequential)
    handle.detach()
    assert set(model.__dict__) == before
    assert type(model) is cls
    assert hasattr(model, method) == hasattr(cls, method)


def test_every_method_that_transformers_mixes_in_for_peft_is_answered() -> None:
    from transformers.integrations.peft import PeftAdapterMixin

    public = {name for name in vars(PeftAdapterMixin) if not name.startswith("_")}
    assert public - {"peft_config"} - PEFT_METHODS.keys() == {
        "enable_peft_hotswap"
    }  # of later calls of the others


def test_a_method_of_the_users_class_keeps_its_meaning() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def unload(self) -> str:
            return "mine"

    model = Mine()
    veneer.attach(model, LORA)
    assert model.unload() == "mine"


@pytest.mark.parametrize("name", ["save_pretrained", "merge_and_unload", "generate", "eval"])
def test_what_a_handle_lacks_is_an_error_that_names_what_has_it(name: str) -> None:
    handle = veneer.attach(tiny_model(), LORA)
    with pytest.raises(MethodError, match=r"handle\.(save|merge|model\.)"):
        getattr(handle, name)
    assert not hasattr(handle, name)
    assert not hasattr(handle, "nothing_of_the_kind")
    assert copy.copy(handle) == handle


# ---- models and configs of PEFT
# ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unwrapped", [False, True], ids=["PeftModel", "its base"])
def test_a_model_that_peft_has_adapted_is_refused(unwrapped: bool, tmp_path: Path) -> None:
    veneer.attach(tiny_model(), LORA).save(tmp_path / "a")
    wrapped: Any = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    model = wrapped.base_model.model if unwrapped else wrapped
    for attach in (lambda: veneer.attach(model, LORA), lambda: veneer.load(model, tmp_path / "a")):
        with pytest.raises((TargetError, AdapterError), match=r"PEFT|Peft.*unload\(\)"):
            attach()
    veneer.attach(wrapped.unload(), LORA)


def test_a_config_of_peft_is_answered_by_the_config_that_means_the_same() -> None:
    theirs = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=r".*\.(q|v)_proj", lora_dropout=0.1, bias="lora_only", use_dora=True,
        rank_pattern={"q_proj": 2, r"layers\.0\..*v_proj": 3}, modules_to_save=["norm"], ensure_weight_tying=True,
    )  # fmt: skip
    with pytest.raises(ConfigError) as raised:
        veneer.attach(tiny_model(), theirs)  # pyright: ignore[reportArgumentType]
    assert "pass veneer.LoraConfig.from_peft(config), which is LoraConfig(rank=4" in str(
        raised.value
    )
    assert veneer.LoraConfig.from_peft(theirs) == veneer.LoraConfig(
        rank=4, alpha=8, targets=r"re:.*\.(q|v)_proj", dropout=0.1, bias="targets", variant="dora",
        ranks={"q_proj": 2, r"re:(.*\.)?(layers\.0\..*v_proj)": 3}, train_also=["re:.*norm"],
        exclude=["re:.*norm"],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="other tuners"):
        veneer.attach(tiny_model(), peft.IA3Config(target_modules=["q_proj"]))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("make", [veneer.LoraConfig, lambda **f: veneer.LoraConfig.from_dict(f)])
def test_a_name_of_pefts_config_is_answered_by_ours(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?s)'r'.*'rank'.*'lora_alpha'.*'alpha'"):
        make(r=8, lora_alpha=16)
    assert pickle.loads(pickle.dumps(LORA)) == copy.deepcopy(LORA) == LORA


# ---- targets
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["targets", "exclude", "train_also", "ranks"])
@pytest.mark.parametrize(
    "pattern", [r".*\.(q|v)_proj", r"model\.layers\.\d\.mlp\.up_proj", "^model.*q_proj$"]
)
def test_a_regular_expression_without_its_mark_is_told_of_it(field: str, pattern: str) -> None:
    value = {pattern: 2} if field == "ranks" else [pattern]
    with pytest.raises(TargetError) as raised:
        veneer.attach(tiny_model(), veneer.LoraConfig(rank=2, **{field: value}))
    assert f"write {'re:' + pattern!r}" in str(raised.value)


@pytest.mark.parametrize("word", ["all-linear", "attention", "mlp"])
def test_a_word_that_means_nothing_in_a_convolution_net_names_what_there_is(word: str) -> None:
    with pytest.raises(TargetError, match=r"2 Conv2d, 1 BatchNorm2d.*targets=\"all\""):
        veneer.attach(conv_net(), veneer.LoraConfig(rank=2, targets=word))


def test_the_summary_names_the_matrices_that_all_linear_leaves_out() -> None:
    experts = veneer.attach(build("mixtral", torch.float32), LORA).summary()
    assert experts.left_out == "1 MixtralExperts"
    assert '"all-linear" leaves out' in str(experts)
    net = nn.Sequential(
        conv_net(), nn.Flatten(), nn.Linear(16, 8), nn.Embedding(3, 4), nn.LSTM(4, 4)
    )
    assert veneer.attach(net, LORA).summary().left_out == "2 Conv2d, 1 LSTM"
    layers = {"0": nn.GRU(4, 4), "2": nn.GRU(4, 4), "4": nn.LSTM(4, 4)}
    blocks = nn.ModuleDict(
        {index: nn.Sequential(nn.Linear(4, 4), layer) for index, layer in layers.items()}
    )
    last_block = veneer.attach(blocks, veneer.LoraConfig(rank=2, layers=[-1]))
    assert last_block.summary().left_out == "1 LSTM"  # of 5 numbers of blocks, 3 are there
    for number, changes in enumerate(
        ({"targets": "all"}, {"targets": ["2"]}, {"exclude": ["0", "4"]})
    ):
        assert (
            veneer.attach(net, veneer.LoraConfig(rank=2, **changes), str(number)).summary().left_out
            == ""
        )
    assert veneer.attach(tiny_model(), LORA).summary().left_out == ""
    nested = nn.Sequential(nn.Sequential(conv_net()), nn.Flatten(), nn.Linear(16, 8))
    in_full = veneer.LoraConfig(rank=2, train_also=["0"])  # trains what is below, too
    assert veneer.attach(nested, in_full).summary().left_out == ""


# ---- folders
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (Path("owner/name"), "hf://owner/name"),
        ("https://huggingface.co/owner/name/tree/main", "hf://owner/name"),
    ],
)
def test_a_path_that_looks_like_a_remote_place_says_how_to_fetch_it(path: Any, place: str) -> None:
    with pytest.raises(AdapterError) as raised:
        veneer.load(nn.Linear(2, 2), path)
    assert f"veneer.store.remote.pull({place!r})" in str(raised.value)


def test_a_path_that_is_no_id_is_not_taken_for_one() -> None:
    with pytest.raises(AdapterError) as raised:
        veneer.load(nn.Linear(2, 2), "./runs/a/b")
    assert "pull" not in str(raised.value)


def test_saving_what_peft_cannot_read_says_so(tmp_path: Path) -> None:
    targets = ["gate_up_proj", "q_proj"]
    handle = veneer.attach(
        build("mixtral", torch.float32), veneer.LoraConfig(rank=2, targets=targets, variant="dora")
    )
    with pytest.warns(
        veneer.LoadedElsewhere, match=r"PEFT cannot read.*modules alone.*veneer\.load"
    ) as caught:
        handle.save(tmp_path / "dora")
    assert caught[0].filename == __file__
    assert peft_format.not_for_peft(
        json.loads((tmp_path / "dora" / peft_format.CONFIG).read_text())
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        veneer.attach(
            build("mixtral", torch.float32), veneer.LoraConfig(rank=2, targets=targets)
        ).save(tmp_path / "lora")


# ---- torch's quantisation
# ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.* deprecated")
def test_each_call_that_quantises_an_attached_model_warns_at_its_own_line() -> None:
    quantize: Any = torch.ao.quantization.quantize_dynamic  # pyright: ignore[reportPrivateImportUsage]
    model = nn.Sequential(nn.Linear(8, 8))
    veneer.attach(model, LORA)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", NotQuantized)
        quantize(model)
        quantize(model)
    assert [(one.category, one.filename) for one in caught] == [(NotQuantized, __file__)] * 2
    assert caught[0].lineno != caught[1].lineno
