"""The proof of a base: what it covers on real architectures, what it lets pass, what it costs the
second time."""

from __future__ import annotations

import copy
import json
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.real_models import REAL, RealModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
from veneer.adapter_files import base_proof
from veneer.adapter_files.verify import verify
from veneer.attach.layer.model_index import ModelIndex
from veneer.bases import BASES
from veneer.errors import AdapterError, BaseMismatchError
from veneer.fileio import hashing
from veneer.layers import parameter_path
from veneer.models.base_weights import list_weights

#: folders as earlier versions wrote them
WRITTEN_BEFORE = Path(__file__).parent / "written_before"
#: with hundreds of tensors, each a load
LARGE = {"unet2d-condition", "mobilenet-v3-small", "whisper", "efficientnet-b0"}
every_model = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=name, marks=[pytest.mark.slow] * (name in LARGE))
        for name, entry in REAL.items()
    ],
)


# ----------------------------------------------------------------------------------------------
# what is covered


class Reads(TorchDispatchMode):
    """The memory that the operations of a block read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and value.numel():
                self.seen.add(value.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


def used(model: nn.Module, example: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The parameters and lasting buffers that a forward reads, and that are no copies of the
    adapter's."""
    with Reads() as reads, torch.no_grad():
        model.eval()(**example)
    # a tied one under its first name
    every = (*model.named_parameters(), *model.named_buffers())
    lasting = model.state_dict()
    return {
        name: tensor
        for name, tensor in every
        if ".veneer." not in f".{name}."
        and name in lasting
        and tensor.untyped_storage().data_ptr() in reads.seen
    }


def change(tensor: torch.Tensor) -> None:
    """Another number in one place, as far off as a bfloat16 can tell."""
    with torch.no_grad():
        flat = tensor.detach().view(-1)
        at = len(flat) // 2
        flat[at] = ~flat[at] if tensor.dtype == torch.bool else flat[at] + 1


def refusal(model: nn.Module, path) -> str | None:
    """Why a base is refused, or None."""
    try:
        veneer.load(model, path).detach()
    except BaseMismatchError as error:
        return str(error)
    return None


def test_there_are_twenty_architectures():
    assert len(REAL) >= 20


@every_model
def test_any_tensor_that_forward_uses_is_refused_once_it_was_changed(entry: RealModel, tmp_path):
    model, example, _ = entry.build()
    tensors = used(model, example)
    handle = veneer.attach(model, veneer.LoraConfig(rank=1, targets="all-linear"))
    path = handle.save(tmp_path / "adapter")
    own = {
        parameter_path(at, key)
        for at, part in handle.layers.items()
        for key in part.full.state_dict()
    }
    handle.detach()
    passed = []
    for name, tensor in tensors.items():
        before = tensor.detach().clone()
        change(tensor)
        refused = refusal(model, path)
        if refused is None:
            passed.append(name)
        else:
            at = (
                name.replace("parametrizations.", "")
                .removesuffix(".original0")
                .removesuffix(".original1")
            )
            assert at in refused
        with torch.no_grad():
            tensor.copy_(before)
    assert set(passed) == own & tensors.keys(), (
        "what the adapter brings itself may be anything; nothing else may"
    )
    assert all("running" in name for name in passed)
    veneer.load(model, path)


# ----------------------------------------------------------------------------------------------
# what may differ


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3))


def saved(model: nn.Module, path, **config: Any):
    handle = veneer.attach(model, veneer.LoraConfig(rank=1, **{"targets": ["2"], **config}))
    folder = handle.save(path, overwrite=True)
    handle.detach()
    return folder


def record(path) -> dict[str, Any]:
    return json.loads((path / "veneer.json").read_text())["base"]


def test_the_record_tells_the_changed_weights_from_the_rest(tmp_path):
    base = record(saved(net(), tmp_path / "a", train_also=["3"]))
    assert list(base["weights"]) == ["2.weight"]
    assert list(base["rest"]) == ["0.weight", "1.weight", "1.bias", "2.bias"], (
        "3 is the adapter's own"
    )


def test_a_replaced_embedding_or_a_tripled_norm_is_refused(tmp_path):
    """The values of the adapted layers are right, and the answers are not."""
    path = saved(net(), tmp_path / "a")
    for number in (0, 1, 3):
        other = net()
        with torch.no_grad():
            other[number].weight *= 3
        with pytest.raises(BaseMismatchError, match=rf"1 of 6 other tensors \({number}\.weight\)"):
            veneer.load(other, path)
        with pytest.raises(BaseMismatchError):
            veneer.Bank(other).add(path)
        veneer.load(other, path, verify_base=False)


def test_another_precision_and_what_is_trained_in_full_may_differ(tmp_path):
    path = saved(net().bfloat16(), tmp_path / "a", train_also=["3"])
    other = net().bfloat16().float()
    nn.init.normal_(other[3].weight)
    veneer.load(other, path)


def test_whole_numbers_are_proven_to_the_last(tmp_path):
    """Rounded to bfloat16, 300 and 301 are one number."""
    model = net()
    model.register_buffer("index", torch.tensor([300]))
    path = saved(model, tmp_path / "a")
    veneer.load(model, path).detach()
    model.index += 1
    with pytest.raises(BaseMismatchError, match="index"):
        veneer.load(model, path)


def test_buffers_that_no_state_dict_holds_may_differ(tmp_path):
    model = net()
    model.register_buffer("frequencies", torch.ones(2), persistent=False)
    path = saved(model, tmp_path / "a")
    model.frequencies += 1
    veneer.load(model, path)


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mid, self.head = (
            nn.Embedding(9, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 9, bias=False),
        )
        self.head.weight = (
            self.embed.weight if tied else nn.Parameter(self.embed.weight.detach().clone())
        )

    def forward(self, ids):
        return self.head(self.mid(self.embed(ids)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_tie_and_two_equal_weights_are_the_same_base(tied, tmp_path):
    path = saved(Tied(tied), tmp_path / "a", targets=["mid"])
    other = Tied(not tied)
    veneer.load(other, path).detach()
    with torch.no_grad():
        other.head.weight[0, 0] += 1
    with pytest.raises(BaseMismatchError, match=r"head\.weight"):
        veneer.load(other, path)


def test_a_head_that_is_not_there_is_said_and_let_pass(tmp_path):
    """An adapter of a classifier's body, on the body alone; and the other way round."""
    whole, body = net(), net()[:3]
    path = saved(whole, tmp_path / "a")
    with pytest.warns(
        veneer.UnverifiedAdapter, match=r"2 tensors of its record are not in this model \(3\.weight"
    ):
        veneer.load(body, path).detach()
    path = saved(body, tmp_path / "b")
    with pytest.warns(
        veneer.UnverifiedAdapter,
        match=r"2 parameters of this model are not in its record \(3\.weight",
    ):
        veneer.load(whole, path)


def old(path):
    """The same folder as a Veneer from before the rest was recorded wrote it."""
    files = veneer.adapter_files.read(path)
    base = {key: value for key, value in files.metadata["base"].items() if key != "rest"}
    from safetensors.torch import load_file

    from veneer.adapter_files.folder import write

    write(
        path, load_file(path / "adapter_model.safetensors"), files.peft_config, base=base,
        changes=files.metadata["changes"], config=files.config, provenance={}, overwrite=True, parameters={},
    )  # fmt: skip
    return path


def test_a_folder_of_the_previous_format_proves_adapted_layers_only(tmp_path):
    path = old(saved(net(), tmp_path / "a"))
    other = net()
    nn.init.zeros_(other[3].weight)
    veneer.load(other, path).detach()
    report = verify(path, other)
    assert report.ok
    assert "adapted layers only: 1 of 1 tensors proven" in str(report)
    nn.init.zeros_(other[2].weight)
    with pytest.raises(BaseMismatchError):
        veneer.load(other, path)


def numbered() -> nn.Module:
    """The base of the folders in written_before/."""
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.copy_(torch.arange(weight.numel()).reshape(weight.shape) / 8 + number)
    return model


@pytest.mark.parametrize(("folder", "proven"), [("adapted_layers", 1), ("sha256", 6)])
def test_a_folder_that_was_written_before_is_proven_by_its_own_hash(folder, proven, tmp_path):
    """`adapted_layers` is of a Veneer that recorded nothing of the rest, `sha256` of one that had
    no XXH3."""
    path, model = WRITTEN_BEFORE / folder, numbered()
    handle = veneer.load(model, path)
    torch.testing.assert_close(model(torch.ones(1, 4)), torch.tensor([[45.6168, 49.3722]]))
    report = verify(path, numbered())
    assert report.ok
    assert f"{proven} of {proven} tensors proven" in str(report)
    other = numbered()
    with torch.no_grad():
        other[0].weight[1, 1] += 1
    with pytest.raises(BaseMismatchError):
        veneer.load(other, path)
    assert not verify(path, other).ok
    handle.save(tmp_path / "again")
    assert all(
        one.startswith("xxh3:")
        for one in hashing.recorded_fingerprints(record(tmp_path / "again")).values()
    )
    assert veneer.compare(path, tmp_path / "again").base == "unknown"
    with pytest.raises(
        AdapterError, match=f"SHA-256 fingerprints in .*{folder}.*save those of an earlier"
    ):
        veneer.compose([path, tmp_path / "again"], tmp_path / "no")
    veneer.compose([path, path], tmp_path / "sum")


def test_folders_of_both_hashes_stand_in_one_bank(hashed, tmp_path):
    veneer.load(numbered(), WRITTEN_BEFORE / "sha256").save(tmp_path / "new")
    bank = veneer.Bank(numbered())
    hashed.clear()
    for name, path in {"old": WRITTEN_BEFORE / "sha256", "new": tmp_path / "new"}.items():
        bank.add(path, name=name)
        bank.add(path, name=f"{name} again")
    assert len(hashed) == 2 * 6, "once for each hash"
    model = bank.model
    with torch.no_grad():
        model[2].weight[0, 0] += 1
    for path in (WRITTEN_BEFORE / "sha256", tmp_path / "new"):
        with pytest.raises(BaseMismatchError):
            veneer.Bank(model).add(path)


def test_verify_says_how_much_is_proven(tmp_path):
    path = saved(net(), tmp_path / "a")
    assert "7 of 7 tensors proven" in str(verify(path, net()))
    report = verify(path, net()[:3])
    assert report.ok
    assert "2 tensors that it computes with are not in this base: 3.weight, 3.bias" in str(report)
    assert "5 of 7 tensors proven" in str(report)
    other = net()
    nn.init.zeros_(other[3].weight)
    report = verify(path, other)
    assert not report.ok
    assert (
        "other numbers in 1 of 6 tensors that it computes with and does not change (3.weight)"
        in str(report)
    )


def test_a_derived_adapter_proves_what_all_its_sources_prove(tmp_path):
    model = net()
    one, two = saved(model, tmp_path / "a"), saved(model, tmp_path / "b", targets=["3"])
    veneer.compose([one, two], tmp_path / "sum")
    base = record(tmp_path / "sum")
    assert sorted(base["weights"]) == ["2.weight", "3.weight"]
    assert sorted(base["rest"]) == ["0.weight", "1.bias", "1.weight", "2.bias", "3.bias"]
    veneer.compose([one, old(two)], tmp_path / "less")
    assert "rest" not in record(tmp_path / "less")
    other = net()
    nn.init.zeros_(other[0].weight)
    with pytest.raises(BaseMismatchError, match=r"different bases \(0\.weight\)"):
        veneer.compose([one, saved(other, tmp_path / "c", targets=["3"])], tmp_path / "no")


# ----------------------------------------------------------------------------------------------
# what it costs


@pytest.fixture
def hashed(monkeypatch) -> list[int]:
    """The sizes of the weights that are hashed."""
    base_proof._CACHE.clear()
    sizes: list[int] = []
    plain = base_proof.fingerprint
    monkeypatch.setattr(
        base_proof,
        "fingerprint",
        lambda weight, like: (sizes.append(weight.numel()), plain(weight, like))[1],
    )
    return sizes


def test_a_base_is_hashed_once_for_all_saves_and_loads(hashed, tmp_path):
    model = net()
    saved(model, tmp_path / "a")
    assert sorted(hashed) == sorted(p.numel() for p in model.parameters())
    hashed.clear()
    saved(model, tmp_path / "b", targets=["3"])
    veneer.load(model, tmp_path / "a")
    veneer.load(model, tmp_path / "b", name="b")
    bank = veneer.Bank(net())
    assert hashed == []
    bank.add(tmp_path / "a")
    assert len(hashed) == 7, "another model object"
    bank.add(tmp_path / "b")
    assert len(hashed) == 7


def test_a_weight_that_was_written_to_is_hashed_again(hashed, tmp_path):
    model = net()
    path = saved(model, tmp_path / "a")
    hashed.clear()
    writes = [
        lambda weight: weight.data.mul_(2),  # which torch does not count
        lambda weight: weight.data.numpy().__imul__(2),
        lambda weight: setattr(weight, "data", weight.data * 2),
        nn.init.ones_,
    ]
    for write in writes:
        write(model[3].weight)
        with pytest.raises(BaseMismatchError, match=r"3\.weight"):
            veneer.load(model, path)
        assert hashed == [24]
        hashed.clear()


def test_merging_and_unmerging_prove_the_same_base(hashed, tmp_path):
    model = net()
    handle = veneer.attach(model, veneer.LoraConfig(rank=1, targets=["2", "3"], train_also=["1"]))
    other = veneer.attach(model, veneer.LoraConfig(rank=1, targets=["2"]), "other")
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = record(other.save(tmp_path / "before"))
    handle.merge()
    assert record(other.save(tmp_path / "merged")) == expected
    hashed.clear()
    assert record(other.save(tmp_path / "again")) == expected
    assert hashed == []
    handle.unmerge()
    assert record(other.save(tmp_path / "after")) == expected


def test_threads_that_load_at_once_hash_once(hashed, tmp_path):
    model = net()
    path = saved(model, tmp_path / "a")
    other = net()
    hashed.clear()
    tensors = list_weights(ModelIndex(other))
    threads = [
        threading.Thread(target=base_proof.fingerprints_of, args=(tensors,)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hashed) == len(tensors)
    veneer.load(other, path)
    assert len(hashed) == len(tensors)


def test_a_fingerprint_is_of_shape_and_values_in_either_hash():
    torch.manual_seed(0)
    weight = torch.randn(3, 50_000)
    old = "8d8d55dabd45ee450a3d6b98c7538b24"  # as folders of an earlier Veneer have it
    assert hashing.fingerprint(weight, like=old) == old
    for kind in (hashing.XXH3, hashing.SHA256):
        found = hashing.fingerprint(weight, kind)
        assert found == hashing.fingerprint_of(weight.shape, weight.split(1), kind)
        assert found == hashing.fingerprint(weight.bfloat16(), kind)
        assert found == hashing.fingerprint(weight.t().contiguous().t(), kind)
        assert found != hashing.fingerprint(weight.reshape(50_000, 3), kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_a_fingerprint_of_a_view_is_of_its_own_values(dtype):
    column = torch.arange(12).view(6, 2).to(dtype)[:, 0]
    for view in (column, column[:, None], column[1].expand(6)):
        assert hashing.fingerprint(view) == hashing.fingerprint(view.contiguous())


# ---------------------------------------------------------------------------------------------- new
# heads


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A BERT without a classifier or pooler."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bert")
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def classifier(folder, seed: int) -> Any:
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    return BertForSequenceClassification.from_pretrained(folder).eval()


IDS = torch.arange(3, 13).view(2, 5)


def test_all_linear_trains_a_new_head_and_the_adapter_holds_it(checkpoint, tmp_path):
    """As PEFT's SEQ_CLS does; and the pooler, which PEFT adapts and loses."""
    model = classifier(checkpoint, 1)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    full = {
        f"{path}.{name}" for path, part in handle.layers.items() for name in part.full._parameters
    }
    assert full == {
        f"{at}.{name}" for at in ("bert.pooler.dense", "classifier") for name in ("weight", "bias")
    }
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = handle.save(tmp_path / "a")
    other = classifier(checkpoint, 2)
    veneer.load(other, path)
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_all_linear_leaves_a_head_that_came_with_the_checkpoint(checkpoint, tmp_path):
    classifier(checkpoint, 1).save_pretrained(tmp_path / "tuned")
    handle = veneer.attach(classifier(tmp_path / "tuned", 0), veneer.LoraConfig(rank=2))
    assert not any(part.full._parameters for part in handle.layers.values())


def test_peft_s_seq_cls_trains_the_head_that_all_linear_trains(checkpoint):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=2)
        theirs = peft.get_peft_model(classifier(checkpoint, 1), config)
    trained = {
        name
        for name, p in theirs.named_parameters()
        if p.requires_grad and "modules_to_save" in name
    }
    assert trained
    model = classifier(checkpoint, 1)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    for name in trained:
        module, _, parameter = name.removeprefix("base_model.model.").rpartition(
            ".modules_to_save.default."
        )
        assert parameter in handle.layers[module].full._parameters


def test_a_new_head_that_is_neither_trained_nor_saved_is_warned_of_and_refused(
    checkpoint, tmp_path
):
    """Nobody has these numbers any more: they are in no checkpoint, and not in the adapter."""
    model = classifier(checkpoint, 1)
    with pytest.warns(
        veneer.FreshWeights, match=r"attached, 4 parameters were not in the checkpoint.*classifier"
    ) as told:
        handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["query"]))
    assert told[0].filename == __file__
    with pytest.warns(
        veneer.FreshWeights,
        match=r"saved, 4 parameters .*train_also=\['bert\.pooler\.dense', 'classifier'\]",
    ):
        path = handle.save(tmp_path / "a")
    report = verify(path)
    assert "random as it was trained, and in no file: bert.pooler.dense.weight" in str(report)
    with pytest.raises(
        BaseMismatchError, match=r"classifier\.weight.* were random as the adapter was trained"
    ):
        veneer.load(classifier(checkpoint, 2), path)
    veneer.load(classifier(checkpoint, 1), path)


def test_train_also_and_excluding_are_obeyed(checkpoint, tmp_path):
    handle = veneer.attach(
        classifier(checkpoint, 1),
        veneer.LoraConfig(rank=2, targets=["query"], train_also=["classifier", "pooler"]),
    )
    handle.save(tmp_path / "a")
    with pytest.warns(veneer.FreshWeights, match="2 parameters .*classifier.weight"):
        veneer.attach(classifier(checkpoint, 1), veneer.LoraConfig(rank=2, exclude=["classifier"]))


def test_a_new_head_is_trained_in_full_beside_other_targets_than_all_linear(checkpoint, tmp_path):
    config = veneer.LoraConfig(rank=2, targets=["all-linear", "word_embeddings"])
    handle = veneer.attach(classifier(checkpoint, 1), config)
    assert {*handle.layers["classifier"].full._parameters} == {"weight", "bias"}
    assert "bert.embeddings.word_embeddings" in handle.layers
    handle.save(tmp_path / "a")  # warnings are errors here


def test_the_unused_pooler_of_a_base_model_binds_nobody(checkpoint, tmp_path):
    """Each load of an encoder without a pooler in its checkpoint makes another one, which mean
    pooling never reads."""
    from transformers import BertModel

    model = BertModel.from_pretrained(checkpoint)
    with pytest.warns(veneer.FreshWeights, match="pooler"):
        handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["query"]))
    with pytest.warns(veneer.FreshWeights, match="pooler"):
        path = handle.save(tmp_path / "a")
    veneer.load(BertModel.from_pretrained(checkpoint), path)


def test_a_model_that_no_checkpoint_marked_is_not_spoken_of(tmp_path):
    saved(net(), tmp_path / "a")  # warnings are errors here
    saved(copy.deepcopy(net()), tmp_path / "b")


# ----------------------------------------------------------------------------------------------
# packed by a call


def packed_model(nested: bool = True) -> nn.Module:
    """Two 4-bit layers, the same bits at each call."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layers = [
        bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=nested)
        for _ in range(2)
    ]
    return nn.Sequential(*layers).to("cpu").eval()


def repack(model: nn.Module) -> nn.Module:
    """What a call on a processor with AVX512-BF16 does to each 4-bit weight, on any processor."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    for module in model:
        weight: Any = module.weight
        weight.data, weight.quant_state = _convert_weight_packed_for_cpu(
            weight.data, weight.quant_state
        )
    return model


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("trained_on", ["fresh", "called"])
def test_a_4bit_base_that_was_called_and_a_fresh_one_are_one_base(
    trained_on: str, nested: bool, tmp_path: Path
) -> None:
    fresh, called = packed_model(nested), repack(packed_model(nested))
    first, second = (fresh, called) if trained_on == "fresh" else (called, fresh)
    veneer.attach(first, veneer.LoraConfig(rank=2, targets=["0"])).save(tmp_path / "a")
    veneer.load(second, tmp_path / "a")
    other = packed_model(nested)
    with torch.no_grad():
        other[1].weight.data[0] ^= 255
    with pytest.raises(BaseMismatchError, match=r"1 of 1 other tensors \(1\.weight\)") as raised:
        veneer.load(other, tmp_path / "a")
    assert "AVX512" not in str(raised.value)


def test_a_record_of_a_4bit_base_as_it_was_loaded_is_read_on_a_fresh_one_and_explained_on_a_called_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # as an earlier Veneer took its fingerprints
        patch.setattr(
            BASES["bitsandbytes_4bit"].__class__,
            "after_first_call",
            lambda self, weight, stored: stored,
        )
        veneer.attach(packed_model(), veneer.LoraConfig(rank=2, targets=["0"])).save(tmp_path / "a")
    base_proof._CACHE.clear()
    veneer.load(packed_model(), tmp_path / "a")
    with pytest.raises(BaseMismatchError, match=r"AVX512-BF16 has rounded.*load the base anew"):
        veneer.load(repack(packed_model()), tmp_path / "a")
