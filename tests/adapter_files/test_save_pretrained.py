"""`save_pretrained` of a model with adapters, and what `from_pretrained`, PEFT and `Trainer` make
of the folder."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.support.forked import printed
from tests.support.tiny import tiny_model
from tests.support.toys import randomise
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import veneer
from veneer.adapter_files.save_pretrained import load_into_attached
from veneer.adapter_files.trainers import when_imported
from veneer.errors import AdapterError, MergeError, OutputExistsError, SelectionError
from veneer.variants import VARIANTS

# PEFT asks transformers for an attribute that is called otherwise by now
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

IDS = torch.arange(24).view(2, 12) + 3
VARIANT_NAMES = [
    variant.name for variant in VARIANTS if variant.peft is not None and not variant.needs
]
WHOLE = {"config.json", "generation_config.json", "model.safetensors"}


@pytest.fixture
def model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def attach(model: Any, name: str = "default", **changes: Any) -> veneer.Handle:
    handle = veneer.attach(model, veneer.LoraConfig(rank=4, **changes), name)
    randomise(handle)
    return handle


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def again(path: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(path))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two logits differ by float32's rounding alone: PEFT, which transformers loads
    adapters with, adds up in another order than we do."""
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1))


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


# of PEFT, when it loads an adapter of a tied embedding
ties = pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")


# ---------------------------------------------------------------------------------------------- an
# adapter


@pytest.mark.filterwarnings("ignore::veneer.LoadedElsewhere")  # its own test is below
@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_an_adapter_alone_is_written_that_gives_the_model_again(variant, model, base, tmp_path):
    plain = logits(model)
    attach(model, variant=variant)
    model.save_pretrained(tmp_path / "saved")
    expected = logits(model)
    assert (expected - plain).abs().max() > 1e-3
    assert not names(tmp_path / "saved") & WHOLE
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved"
    )
    assert torch.allclose(logits(theirs), expected, atol=1e-5)
    ours = veneer.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved")
    assert torch.equal(logits(ours.model), expected)
    if not variant.startswith("dora"):
        assert same(again(tmp_path / "saved"), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"train_also": ["norm"]},
        {"targets": ["all-linear", "norm"]},
        {"alphas": {"q_proj": 3.0}, "ranks": {"k_proj": 2}},
        {"targets": "all"},
    ],
    ids=str,
)
@ties
def test_what_is_trained_besides_comes_back_too(changes, model, tmp_path):
    attach(model, **changes)
    model.save_pretrained(tmp_path)
    assert same(again(tmp_path), logits(model))


def test_a_folder_keeps_what_else_lies_in_it_and_loses_what_is_stale(model, tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(b"state")
    attach(model, variant="loha")
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nA note of mine.\n")
    assert "veneer.safetensors" in names(tmp_path)
    veneer.detach(model)
    attach(model)
    model.save_pretrained(tmp_path)
    files = {
        "optimizer.pt",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "veneer.json",
    }
    assert names(tmp_path) == files
    assert "A note of mine." in card.read_text()
    assert same(again(tmp_path), logits(model))


def test_the_selected_adapter_is_saved(model, tmp_path):
    attach(model, "a")
    attach(model, "b", variant="rslora")
    with veneer.use(model, "b"):
        model.save_pretrained(tmp_path)
        assert same(again(tmp_path), logits(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it loads its compiler
def test_a_wrapped_model_saves_its_adapter(model, tmp_path):
    attach(model)
    torch.compile(model).save_pretrained(tmp_path / "compiled")
    parallel = nn.DataParallel(model)
    parallel.module.save_pretrained(tmp_path / "parallel", state_dict=parallel.state_dict())
    expected = logits(model)
    assert same(again(tmp_path / "compiled"), expected)
    assert same(again(tmp_path / "parallel"), expected)


@ties
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_state_dict_that_is_passed_is_what_is_saved(prefix, model, tmp_path):
    attach(model, targets=["q_proj", "embed_tokens"])
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith(".B"):
                parameter.mul_(-2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(
        tmp_path, state_dict={prefix + key: value for key, value in other.state_dict().items()}
    )
    assert same(again(tmp_path), logits(other))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_the_main_process_writes(model, tmp_path):
    attach(model)
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


# ---------------------------------------------------------------------------------------------- a
# merged model


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_merged_model_is_saved_as_plain_files(by_hand, model, base, tmp_path):
    handle = attach(model, train_also=["norm"])
    handle.merge()
    model.save_pretrained(tmp_path / "merged", state_dict=model.state_dict() if by_hand else None)
    assert names(tmp_path / "merged") == WHOLE
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert tensors.keys() == load_file(base / "model.safetensors").keys()
    assert same(again(tmp_path / "merged"), logits(model))
    handle.unmerge()
    handle.detach()
    assert same(logits(model), again(base))


# ----------------------------------------------------------------------------------------------
# refused


def _several(model, path):
    attach(model, "a")
    attach(model, "b")
    model.save_pretrained(path)


def _base_selected(model, path):
    attach(model)
    with veneer.use(model, None):
        model.save_pretrained(path)


def _blend_selected(model, path):
    attach(model, "a")
    attach(model, "b")
    with veneer.use(model, {"a": 0.7, "b": 0.3}):
        model.save_pretrained(path)


def _rows_selected(model, path):
    attach(model, "a")
    attach(model, "b")
    with veneer.use(model, ["a", "b"]):
        model.save_pretrained(path)


def _a_part(model, path):
    attach(model)
    model.model.save_pretrained(path)


def _no_form(model, path):
    attach(model, variant="toy_scaled")
    model.save_pretrained(path)


def _option(name, value):
    def save(model, path):
        attach(model)
        model.save_pretrained(path, **{name: value})

    save.__name__ = name
    return save


def _lacking(model, path):
    attach(model)
    model.save_pretrained(
        path, state_dict={key: v for key, v in model.state_dict().items() if not key.endswith(".A")}
    )


def _strange(model, path):
    attach(model)
    model.save_pretrained(path, state_dict={**model.state_dict(), "head.weight": torch.ones(1)})


def _over_a_model(model, path):
    model.save_pretrained(path)
    attach(model)
    model.save_pretrained(path)


def _merged_over_an_adapter(model, path):
    handle = attach(model)
    model.save_pretrained(path)
    handle.merge()
    model.save_pretrained(path)


@pytest.mark.parametrize(
    ("save", "error", "text"),
    [
        (_several, SelectionError, r"2 adapters \(a, b\) and no name"),
        (_base_selected, SelectionError, "a selection of the base"),
        (_blend_selected, SelectionError, "of a blend"),
        (_rows_selected, SelectionError, "an adapter for each row"),
        (
            _a_part,
            SelectionError,
            "save_pretrained of a LlamaModel within the model that default belongs to",
        ),
        (_no_form, AdapterError, "variant 'toy_scaled'"),
        (_option("variant", "fp16"), AdapterError, "variant='fp16'"),
        (_option("save_peft_format", False), AdapterError, "save_peft_format=False"),
        (_option("distributed_checkpoint", True), AdapterError, "distributed_checkpoint=True"),
        (_lacking, AdapterError, "a state_dict without .*q_proj.veneer.default.low.weight.A"),
        (_strange, AdapterError, "a state_dict with head.weight"),
        (_over_a_model, OutputExistsError, "holds a whole model"),
        (_merged_over_an_adapter, OutputExistsError, "holds an adapter"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_saved_right_is_refused(save, error, text, model, tmp_path):
    with pytest.raises(error, match=text) as caught:
        save(model, tmp_path / "saved")
    assert all(word in str(caught.value) for word in ("Found: ", "Expected: ", "Do: "))


def test_the_bases_own_folder_takes_an_adapter_of_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    attach(model)
    model.save_pretrained(tmp_path)
    assert same(again(tmp_path), logits(model))


def test_a_base_without_a_name_is_told(tmp_path):
    model = tiny_model()
    attach(model)
    with pytest.warns(veneer.LoadedElsewhere, match="names no base"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(veneer.load(tiny_model(), tmp_path).model), logits(model))


def test_that_transformers_leaves_out_a_dora_is_told(model, tmp_path):
    attach(model, variant="dora")
    with pytest.warns(veneer.LoadedElsewhere, match="leaves out the magnitudes"):
        model.save_pretrained(tmp_path)
    # the day on which this fails, the warning may go
    assert not torch.allclose(again(tmp_path), logits(model), atol=1e-3)


class Mixed(nn.Module, huggingface_hub.PyTorchModelHubMixin):
    """A model of another library with the same method, and a layer that PEFT adapts otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_any_model_with_the_method_saves_its_adapter_and_says_what_peft_will_not_load(tmp_path):
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(2, 4, 8)
    plain = copy.deepcopy(model)
    randomise(veneer.attach(model, veneer.LoraConfig(rank=2, targets="all")))
    with pytest.warns(veneer.LoadedElsewhere, match="from_pretrained and PEFT will refuse"):
        model.save_pretrained(tmp_path)
    assert torch.equal(veneer.load(plain, tmp_path).model(x), model(x))


# ---------------------------------------------------------------------------------------------- the
# hub


@pytest.mark.parametrize("by_option", [False, True])
def test_push_to_hub_uploads_the_adapter_alone(by_option, model, tmp_path, monkeypatch):
    uploaded: dict[str, set[str]] = {}

    class Hub:
        def create_repo(self, repo_id, **_):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def create_commit(self, repo_id, operations, **_):
            uploaded[repo_id] = {operation.path_in_repo for operation in operations}

    monkeypatch.setattr(transformers.utils.hub, "_hf_api", Hub())
    card = huggingface_hub.ModelCard("---\n---\n")
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: card)
    attach(model)
    if by_option:
        model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine")
    else:
        model.push_to_hub("me/mine")
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "veneer.json"}
    assert uploaded == {"me/mine": files}


# ---------------------------------------------------------------------------------------------- the
# object


def test_detach_leaves_nothing_behind(model):
    own = {path: dict(module.__dict__) for path, module in model.named_modules()}
    attach(model, "a")
    attach(model, "b")
    veneer.detach(model, "a")
    assert "save_pretrained" in model.__dict__
    veneer.detach(model, "b")
    assert {path: module.__dict__.keys() for path, module in model.named_modules()} == {
        path: before.keys() for path, before in own.items()
    }
    assert model.save_pretrained.__func__ is type(model).save_pretrained


def test_a_method_that_the_object_had_of_its_own_comes_back(model, tmp_path):
    calls = []

    def save(path, **options):
        calls.append(path)

    model.save_pretrained = save
    handle = attach(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert calls == []
    handle.merge()
    model.save_pretrained(tmp_path / "merged")
    assert calls == [tmp_path / "merged"]
    handle.detach(keep_merged=True)
    assert model.save_pretrained is save


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself(copied, model, tmp_path):
    attach(model)
    other = copied(model)
    with torch.no_grad():
        next(parameter for name, parameter in other.named_parameters() if name.endswith(".B")).mul_(
            3
        )
    other.save_pretrained(tmp_path)
    assert same(again(tmp_path), logits(other))
    assert not same(logits(other), logits(model))
    veneer.detach(other)
    assert "save_pretrained" not in other.__dict__


# ----------------------------------------------------------------------------------------------
# Trainer


def rows(count: int = 24) -> Any:
    generator = torch.Generator().manual_seed(1)
    found = torch.randint(3, 259, (count, 12), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in found]


def trainer(model: Any, folder: Path, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=6, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, **more,
    )  # fmt: skip
    return Trainer(model, arguments, default_data_collator, rows(), rows(4))


def numbers(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "veneer" in name}


def test_the_best_model_is_the_best_adapter(model, tmp_path):
    attach(model)

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 5:
                with torch.no_grad():
                    [
                        parameter.add_(1)
                        for parameter in model.parameters()
                        if parameter.requires_grad
                    ]

    run = trainer(model, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    run.add_callback(Spoil())
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert same(logits(model), again(tmp_path / "checkpoint-4"))
    assert not same(logits(model), again(tmp_path / "checkpoint-6"))


def test_an_optimiser_that_was_there_before_goes_on_too(base, tmp_path):
    found = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        model = AutoModelForCausalLM.from_pretrained(base)
        handle = attach(model, dropout=0.1)
        run = trainer(model, tmp_path / "run" if resume is None else tmp_path / "again")
        optimiser = torch.optim.AdamW(handle.parameters(), lr=1e-2)
        run.optimizer = optimiser
        run.train(resume_from_checkpoint=resume)
        found.append(numbers(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_checkpoint_of_pefts_is_resumed(base, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    trainer(theirs, tmp_path / "theirs").train()
    model = AutoModelForCausalLM.from_pretrained(base)
    attach(model, targets=["q_proj"], alpha=8)
    with pytest.warns(veneer.UnverifiedAdapter):
        trainer(model, tmp_path / "ours").train(
            resume_from_checkpoint=str(tmp_path / "theirs" / "checkpoint-2")
        )
    assert torch.allclose(logits(model), logits(theirs), atol=1e-4)


def test_a_checkpoint_of_another_adapter_is_refused(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    attach(model, train_also=["norm"])
    model.save_pretrained(tmp_path)
    for changes, text in [
        ({"targets": ["q_proj"]}, "a change of"),
        ({"targets": "all-linear", "ranks": {"q_proj": 2}}, "rank 4.* at .*q_proj"),
        ({"variant": "rslora"}, "variant 'lora'"),
        ({}, "weight of 'model.norm' trained in full"),
    ]:
        other = AutoModelForCausalLM.from_pretrained(base)
        attach(other, **changes)
        before = numbers(other)
        with pytest.raises(AdapterError, match=text):
            load_into_attached(other, tmp_path)
        assert all(torch.equal(value, before[name]) for name, value in numbers(other).items())


def test_a_checkpoint_without_an_adapter_is_refused(model, base, tmp_path):
    handle = attach(model)
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(base))
    model.save_pretrained(tmp_path / "adapter")
    handle.merge()
    with pytest.raises(MergeError, match="'default', merged already"):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "adapter"))


def test_a_model_without_adapters_trains_as_ever(base, tmp_path):
    found = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        model = AutoModelForCausalLM.from_pretrained(base)
        veneer.detach(attach(model).model)
        trainer(model, tmp_path / "run" if resume is None else tmp_path / "again").train(
            resume_from_checkpoint=resume
        )
        found.append(model.state_dict())
    assert "model.safetensors" in names(tmp_path / "run" / "checkpoint-2")
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_trainer_that_is_imported_after_the_adapter_is_patched():
    program = """
import sys, torch, veneer
veneer.attach(torch.nn.Sequential(torch.nn.Linear(32, 32)))
assert "transformers" not in sys.modules
import transformers.trainer
print(transformers.trainer.Trainer._is_veneer_patched)
"""
    assert printed(program).splitlines()[-1] == "True"


def test_a_module_is_seen_once_it_is_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    finders = [*sys.meta_path]
    seen: list[Any] = []
    when_imported("a_late_module", seen.append)
    when_imported("a_late_module", seen.append)
    assert len(sys.meta_path) == len(finders) + 1
    with pytest.raises(ImportError):
        import a_late_module
    monkeypatch.setattr(
        sys, "dont_write_bytecode", True
    )  # two texts of one second and one size are the same to Python
    (tmp_path / "a_late_module.py").write_text("x = 1 / 0")
    with pytest.raises(ZeroDivisionError):
        import a_late_module
    (tmp_path / "a_late_module.py").write_text("value = 3")
    import a_late_module

    assert [module.value for module in seen] == [3]
    assert sys.modules.pop("a_late_module") is a_late_module
    assert sys.meta_path == finders
