"""A model with an adapter in other people's trainers: what they save is the adapter, they go on
from it, and what they compare the policy with is its own base. The cells are those of
docs/trainers.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tests.support import trainer_cells
from tests.support.adapter_libraries import (
    PEFT,
    VENEER,
    Library,
    attach_adapter,
    load_model,
    outputs,
    same,
    trained,
)
from tests.support.trainer_cells import CELLS, LARGEST, YES, Case
from tests.support.trainers import (
    BUILD,
    HALF,
    LINEAR,
    RUNS,
    Run,
    arguments,
    batches,
    token_rows,
    write_bases,
)
from torch import nn

import veneer
from veneer import integrations
from veneer.attach.reference import Reference
from veneer.errors import AdapterError, ConfigError, OutputExistsError, TargetError

# every one of these trainers uses what the next version of a library that it stands on will lack
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*workers.*"),
]

ROOT = Path(__file__).resolve().parents[2]
RUN = {run.name: run for run in RUNS}
#: one trainer of each way to be integrated, and one cell of the others
WHOLE = ("Trainer", "DPOTrainer", "Lightning", "accelerate")
FAST = {(name, cell) for name in WHOLE for cell in CELLS} | {
    ("SFTTrainer", "resume"),
    ("RewardTrainer", "resume"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    write_bases(folder)
    return folder


@pytest.fixture(scope="module")
def case(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Library, Run], Case]:
    """The case of a library and a trainer, whose first run is made once."""
    cases: dict[tuple[str, str], Case] = {}

    def of(library: Library, run: Run) -> Case:
        key = library.name, run.name
        if key not in cases:
            cases[key] = Case(library, run, bases, tmp_path_factory.mktemp("case"))
        return cases[key]

    return of


# ---- the cells
# ---------------------------------------------------------------------------------------------------

ASKED = [
    pytest.param(
        run,
        cell,
        marks=[] if (run.name, cell) in FAST else pytest.mark.slow,
        id=f"{run.name}-{cell}",
    )
    for run in RUNS
    for cell in CELLS
    if trainer_cells.has_cell(run, cell)
]


@pytest.mark.parametrize(("run", "cell"), ASKED)
def test_a_trainer_does_with_an_adapter_what_the_page_says(run: Run, cell: str, case):
    assert getattr(case(VENEER, run), cell)() == YES


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(run, marks=[] if run.name in WHOLE else pytest.mark.slow, id=run.name)
        for run in RUNS
    ],
)
def test_a_checkpoint_is_no_larger_than_pefts(run: Run, case):
    for step in (HALF, 2 * HALF):
        ours, theirs = (
            trainer_cells.size(case(library, run).checkpoint(step)) for library in (VENEER, PEFT)
        )
        assert ours <= LARGEST * theirs


@pytest.mark.slow
def test_the_page_shows_what_the_runs_give():
    recorded = json.loads((ROOT / "benchmarks" / "results" / "trainers.json").read_text())
    found = dict(trainer_cells.rows())
    assert {name: {**row, "size": None} for name, row in found.items()} == {
        name: {**row, "size": None} for name, row in recorded["trainers"].items()
    }
    assert max(row["size"] for row in found.values()) <= LARGEST


# ---- the reference
# -----------------------------------------------------------------------------------------------


def with_the_same_numbers(bases: Path, start: float = 0.0, dropout: float = 0.0) -> tuple[Any, Any]:
    """PEFT's model and ours with equal A and B; ``start`` is the deviation of B."""
    run = RUN["DPOTrainer"]
    torch.manual_seed(1)
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=LINEAR, lora_dropout=dropout)
    theirs: Any = peft.get_peft_model(load_model(bases, run), config)
    ours = load_model(bases, run)
    handle = veneer.attach(
        ours, veneer.LoraConfig(rank=16, alpha=16, targets=LINEAR, dropout=dropout)
    )
    for path, change in handle.changes.items():
        layer = theirs.get_submodule(f"base_model.model.{path.removesuffix('.weight')}")
        nn.init.normal_(layer.lora_B["default"].weight, std=start) if start else None
        change.A.data.copy_(layer.lora_A["default"].weight.data[None])
        change.B.data.copy_(layer.lora_B["default"].weight.data[None])
    return theirs, ours


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("start", [0.0, 0.05])
@pytest.mark.parametrize(
    "name",
    ["DPO", *(pytest.param(name, marks=pytest.mark.slow) for name in ("KTO", "GRPO", "RLOO"))],
)
def test_a_policy_is_compared_with_its_own_start_as_pefts_is(
    name: str, start: float, bases: Path, tmp_path: Path
):
    """TRL copies a PEFT adapter that changes the model already, and compares with the copy. DPO and
    KTO switch dropout off, that of adapters too."""
    theirs, ours = with_the_same_numbers(
        bases, start, dropout=0.5 if name in ("DPO", "KTO") else 0.0
    )
    expected = losses(BUILD[name](theirs, tmp_path / "theirs", [], {}))
    trainer = BUILD[name](ours, tmp_path / "ours", [], {})
    assert isinstance(trainer.ref_model, Reference)
    found = losses(trainer)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(set(found)) > 2 or name == "RLOO"


def test_another_adapter_can_be_the_reference(bases: Path, tmp_path: Path):
    _, model = with_the_same_numbers(bases, 0.05)
    before = outputs(model)
    veneer.attach(model, veneer.LoraConfig(rank=4, targets=LINEAR), name="policy")
    with veneer.use(model, "policy"):
        trainer = BUILD["DPO"](model, tmp_path, [], {}, ref_model=Reference(model, "default"))
        found = losses(trainer)
        trainer.save_model(str(tmp_path / "saved"))
    assert found[0] == pytest.approx(0.6931, abs=1e-3) or found[0] != found[1]
    assert torch.equal(outputs(Reference(model, "default")), before)
    assert veneer.adapter_files.read(tmp_path / "saved").config.rank == 4


def test_a_reference_that_should_move_is_refused(bases: Path, tmp_path: Path):
    model = attach_adapter(VENEER, bases, RUN["DPOTrainer"], 1)
    trainer = BUILD["DPO"](model, tmp_path, [], {"sync_ref_model": True})
    with pytest.raises(
        ConfigError,
        match="sync_ref_model=True with a reference model that is the policy's own base",
    ):
        trainer.train()


def test_texts_of_vllm_would_be_those_of_the_base(bases: Path, tmp_path: Path):
    trainer = BUILD["GRPO"](attach_adapter(VENEER, bases, RUN["GRPOTrainer"], 1), tmp_path, [], {})
    trainer.args.use_vllm = True
    with pytest.raises(ConfigError, match="TRL would send vLLM the base"):
        trainer.train()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_that_trls_forward_would_pass_by_is_refused(
    target: str, bases: Path, tmp_path: Path
):
    """The two are tied, so the change of one is that of both."""
    model = load_model(bases, RUN["DPOTrainer"])
    veneer.attach(model, veneer.LoraConfig(rank=4, targets=["q_proj", target]))
    trainer = BUILD["DPO"](model, tmp_path, [], {})
    for call in (trainer.train, trainer.evaluate):
        with pytest.raises(
            TargetError, match="an adapter of the output layer for TRL's DPOTrainer"
        ):
            call()
    veneer.save(model, tmp_path / "checkpoint")
    bare = load_model(bases, RUN["DPOTrainer"])
    trainer = BUILD["DPO"](bare, tmp_path, [], {})
    before = dict(bare.named_modules())
    with pytest.raises(TargetError, match="an adapter of the output layer for TRL's DPOTrainer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint"))
    assert dict(bare.named_modules()) == before


# ---- transformers
# ------------------------------------------------------------------------------------------------


def plain(model: Any, folder: Path, **more: Any) -> Any:
    settings = more.pop("settings", {})
    rows: Any = token_rows()
    return transformers.Trainer(
        model=model, args=transformers.TrainingArguments(**arguments(folder, **settings)), train_dataset=rows,
        data_collator=transformers.default_data_collator, **more,
    )  # fmt: skip


def test_one_script_starts_a_run_and_resumes_it(bases: Path, tmp_path: Path):
    config = veneer.LoraConfig(rank=4, targets=LINEAR, dropout=0.1)

    def script(folder: Path, resume: bool) -> Any:
        trainer = plain(
            load_model(bases, RUN["Trainer"]), folder, callbacks=[integrations.callback(config)]
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    first = script(tmp_path, False)
    (tmp_path / f"checkpoint-{2 * HALF}").rename(tmp_path / "last")
    assert same(trained(script(tmp_path, True).model), trained(first.model))


@pytest.mark.parametrize("name", ["DPO", "Reward"])
def test_an_adapter_that_a_trainer_attaches_drops_nothing_if_told_so(
    name: str, bases: Path, tmp_path: Path
):
    run = RUN[f"{name}Trainer"]
    config = veneer.LoraConfig(rank=2, dropout=0.5, targets=LINEAR)
    trainer = BUILD[name](load_model(bases, run), tmp_path, [integrations.callback(config)], {})
    assert trainer.args.disable_dropout
    assert {
        change.dropout for change in veneer.Handle(trainer.model, "default").changes.values()
    } == {0.0}


def test_the_callback_leaves_an_adapter_that_is_there(bases: Path, tmp_path: Path):
    model = attach_adapter(VENEER, bases, RUN["Trainer"], 1)
    before = trained(model)
    plain(model, tmp_path, callbacks=[integrations.callback(veneer.LoraConfig(rank=2))])
    assert same(trained(model), before)


@pytest.mark.parametrize("again", [False, True])
def test_a_model_that_would_be_trained_whole_is_refused(again: bool, bases: Path, tmp_path: Path):
    """Without a config and a checkpoint; or because ``model_init`` makes the model anew when
    training begins."""
    given: dict[str, Any] = {
        "callbacks": [integrations.callback(veneer.LoraConfig(rank=2) if again else None)]
    }
    if again:
        trainer = plain(
            None, tmp_path, model_init=lambda: load_model(bases, RUN["Trainer"]), **given
        )
    else:
        trainer = plain(load_model(bases, RUN["Trainer"]), tmp_path, **given)
    with pytest.raises(ConfigError, match="a model without an adapter as training begins"):
        trainer.train()


def lora_plus(handle: veneer.Handle) -> dict[str, Any]:
    return {
        "optimizers": (torch.optim.AdamW(veneer.optim.lora_plus(handle, lr=1e-3, ratio=16)), None)
    }


def lora_plus_by_class(handle: veneer.Handle) -> dict[str, Any]:
    groups = veneer.optim.lora_plus(handle, lr=1e-3, ratio=16)
    return {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups})}


def lora_fa(handle: veneer.Handle) -> dict[str, Any]:
    veneer.optim.freeze_a(handle)
    return {}


@pytest.mark.parametrize("optimiser", [lora_plus, lora_plus_by_class, lora_fa])
def test_optimisers_of_adapters_in_a_trainer(
    optimiser: Callable[..., dict[str, Any]], bases: Path, tmp_path: Path
):
    def run(seed: int, resume: Path | None) -> tuple[Any, Any]:
        model = attach_adapter(VENEER, bases, RUN["Trainer"], seed)
        handle = veneer.Handle(model, "default")
        before = {name: value.detach().clone() for name, value in handle.named_parameters()}
        trainer = plain(model, tmp_path / str(seed), **optimiser(handle))
        seen: list[list[float]] = []
        step = trainer.training_step
        trainer.training_step = lambda *a, **k: (
            seen.append([group["lr"] for group in trainer.optimizer.param_groups]), step(*a, **k)
        )[1]  # fmt: skip
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        after = {name: value.detach().clone() for name, value in handle.named_parameters()}
        if optimiser is lora_fa:
            assert resume or all(
                torch.equal(before[name], after[name]) for name in before if name.endswith(".A")
            )
        else:
            assert all(fast == pytest.approx(16 * slow) for slow, fast in seen if slow)
        assert not any(
            torch.equal(before[name], after[name]) for name in before if name.endswith(".B")
        )
        return model, after

    _, expected = run(1, None)
    _, found = run(2, tmp_path / "1" / f"checkpoint-{HALF}")
    assert same(found, expected)


def test_a_trainer_pushes_the_adapter_alone(bases: Path, tmp_path: Path, monkeypatch):
    """At the end, and after each checkpoint."""
    model = attach_adapter(VENEER, bases, RUN["Trainer"], 1)
    pushed: list[dict[str, bytes]] = []

    class Job:
        def done(self) -> bool:
            return True

    class Hub:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, *, folder_path: str, **_: Any) -> Any:
            pushed.append(
                {
                    path.name: path.read_bytes()
                    for path in Path(folder_path).iterdir()
                    if path.is_file()
                }
            )
            return Job()

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    monkeypatch.setattr(transformers.Trainer, "_finish_current_push", lambda self: None)
    settings = {"push_to_hub": True, "hub_model_id": "me/mine"}
    trainer = plain(model, tmp_path / "run", settings=settings)
    trainer.train()
    trainer.push_to_hub()
    assert len(pushed) >= 3
    for number, files in enumerate(pushed):
        assert not any(name.startswith(("model", "pytorch_model")) for name in files)
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        veneer.load(load_model(bases, RUN["Trainer"]), folder)
    expected = outputs(model)
    assert torch.equal(
        outputs(veneer.load(load_model(bases, RUN["Trainer"]), folder).model), expected
    )


def test_a_quantised_base_with_an_adapter_may_be_trained(tmp_path: Path, bases: Path):
    pytest.importorskip("bitsandbytes")
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    quantised = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantised
    )
    with pytest.raises(ValueError, match="purely quantized"):
        plain(model, tmp_path / "none")
    handle = veneer.attach(model, veneer.LoraConfig(rank=4, targets=LINEAR))
    before = {name: value.detach().clone() for name, value in handle.named_parameters()}
    plain(model, tmp_path / "run", settings={"max_steps": 2}).train()
    assert not any(
        torch.equal(value, before[name])
        for name, value in handle.named_parameters()
        if ".B" in name
    )


# ---- Lightning
# ---------------------------------------------------------------------------------------------------


def lightning_run(
    model: Any, folder: Path, callbacks: list[Any], resume: str | None = None, **more: Any
) -> Any:
    lightning = pytest.importorskip("pytorch_lightning")

    class Tuned(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model
            self.body = model.model  # the same weights, under another name
            self.temperature = nn.Parameter(torch.ones(()))

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(**batch).loss * self.temperature

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    keep = lightning.pytorch.callbacks if hasattr(lightning, "pytorch") else lightning.callbacks
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[keep.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **more), *callbacks],
    )  # fmt: skip
    tuned = Tuned().train()
    trainer.fit(tuned, batches(HALF), ckpt_path=resume)
    return tuned


@pytest.mark.filterwarnings("ignore:.*dirpath has changed.*")
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_lightning_checkpoint_holds_the_rest_of_the_module(
    weights_only: bool, bases: Path, tmp_path: Path
):
    run = RUN["Lightning"]
    config = veneer.LoraConfig(rank=4, targets=LINEAR)
    own = [integrations.lightning_callback(config, module="net")]
    tuned = lightning_run(load_model(bases, run), tmp_path, own, save_weights_only=weights_only)
    content = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert content["state_dict"] == {"temperature": tuned.temperature}
    adapter = integrations.unpack(tmp_path / "epoch=1.ckpt", tmp_path / "adapter")
    assert torch.equal(
        outputs(veneer.load(load_model(bases, run), adapter).model), outputs(tuned.net)
    )
    with pytest.raises(OutputExistsError):
        integrations.unpack(tmp_path / "epoch=1.ckpt", tmp_path / "adapter")
    if not weights_only:
        bare = load_model(bases, run)
        again = lightning_run(bare, tmp_path / "again", [integrations.lightning_callback(module="net")],
                              str(tmp_path / "epoch=0.ckpt"))  # fmt: skip
        assert same(trained(again), trained(tuned))


def test_a_lightning_checkpoint_that_was_tested_leaves_the_random_state_of_a_later_run():
    lightning = pytest.importorskip("pytorch_lightning")
    module = lightning.LightningModule()
    module.model = nn.Sequential(nn.Linear(3, 3))
    own = integrations.lightning_callback(veneer.LoraConfig(rank=2))
    trainer = lightning.Trainer(logger=False, callbacks=[own])
    own.setup(trainer, module, "fit")
    checkpoint = {"state_dict": dict(module.state_dict())}
    module.on_save_checkpoint(checkpoint)
    own.setup(trainer, module, "test")
    module.on_load_checkpoint(checkpoint)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    own.setup(trainer, module, "fit")
    own.on_fit_start(trainer, module)
    assert torch.equal(torch.get_rng_state(), state)


def two_parts(folder: Path, callbacks: list[Any], resume: str | None = None) -> Any:
    """A module of two parts after a step, which is saved, or as a checkpoint leaves it."""
    lightning = pytest.importorskip("pytorch_lightning")

    class Pair(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.bias = (
                nn.Linear(6, 5),
                nn.Linear(5, 4),
                nn.Parameter(torch.zeros(4)),
            )

        def training_step(self, batch: Any, index: int) -> Any:
            return (self.second(self.first(batch)) + self.bias).square().sum()

        def validation_step(self, batch: Any, index: int) -> Any:
            return self.training_step(batch, index)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=callbacks,
    )  # fmt: skip
    pair, rows = Pair(), torch.utils.data.DataLoader(torch.randn(2, 6))  # pyright: ignore[reportArgumentType]
    if resume is not None:
        trainer.validate(pair, rows, ckpt_path=resume, verbose=False)
        return pair
    trainer.fit(pair, rows, rows)
    trainer.save_checkpoint(folder / "pair.ckpt")
    return pair


@pytest.mark.parametrize("attach_again", [False, True])
def test_a_lightning_checkpoint_holds_an_adapter_for_each_part(attach_again: bool, tmp_path: Path):
    config = veneer.LoraConfig(rank=2)

    def callbacks(config: veneer.LoraConfig | None, *parts: str) -> list[Any]:
        return [integrations.lightning_callback(config, module=part) for part in parts]

    trained_pair = two_parts(tmp_path, callbacks(config, "first", "second"))
    path = tmp_path / "pair.ckpt"
    assert set(torch.load(path, weights_only=True)["state_dict"]) == {"bias"}
    again = two_parts(
        tmp_path, callbacks(config if attach_again else None, "first", "second"), str(path)
    )
    assert same(dict(again.state_dict()), dict(trained_pair.state_dict()))
    folder, fresh, x = (
        integrations.unpack(path, tmp_path / "adapter", module="second"),
        nn.Linear(5, 4),
        torch.ones(5),
    )
    fresh.load_state_dict(
        {name: getattr(trained_pair.second, name).detach() for name in ("weight", "bias")}
    )
    assert torch.equal(veneer.load(fresh, folder).model(x), trained_pair.second(x))
    with pytest.raises(
        AdapterError, match=r"module=None for .*, which holds the adapters of 'first', 'second'"
    ):
        integrations.unpack(path, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"adapters of 'second', and callbacks for 'first' alone"):
        two_parts(tmp_path, callbacks(None, "first"), str(path))
    with pytest.raises(
        ConfigError,
        match=r"two lightning_callbacks for one model \(module='first', module='first'\)",
    ):
        two_parts(tmp_path, callbacks(config, "first", "first"))


def test_what_lightning_cannot_do_is_said(bases: Path, tmp_path: Path):
    run = RUN["Lightning"]
    with pytest.raises(ConfigError, match=r"no module 'model' in Tuned.*\(there is net"):
        lightning_run(
            load_model(bases, run),
            tmp_path,
            [integrations.lightning_callback(veneer.LoraConfig(rank=2))],
        )
    with pytest.raises(ConfigError, match="a model without an adapter as training begins"):
        lightning_run(
            load_model(bases, run), tmp_path, [integrations.lightning_callback(module="net")]
        )
    torch.save({"state_dict": {}}, tmp_path / "whole.ckpt")
    torch.save({integrations.KEY: 3}, tmp_path / "number.ckpt")
    torch.save(pytest.raises, tmp_path / "code.ckpt")
    (tmp_path / "empty.ckpt").touch()
    none, unread = "in which there is no adapter", "of which no adapter can be read"
    cases = (("whole", none), ("number", none), ("code", unread), ("empty", unread))
    for name, message in cases:
        with pytest.raises(AdapterError, match=message):
            integrations.unpack(tmp_path / f"{name}.ckpt", tmp_path / "adapter")


# ---- accelerate
# --------------------------------------------------------------------------------------------------


def test_accelerate_saves_other_models_as_ever(bases: Path, tmp_path: Path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    remove = integrations.accelerate_hooks(accelerator)
    model, other = attach_adapter(VENEER, bases, RUN["accelerate"], 1), nn.Linear(2, 2)
    second = attach_adapter(VENEER, bases, RUN["accelerate"], 2)
    accelerator.prepare(model, other, second)
    accelerator.save_state(str(tmp_path / "state"))
    assert veneer.adapter_files.read(tmp_path / "state" / "veneer").config.rank == 16
    expected = [trained(one) for one in (model, other, second)]
    for one in (model, other, second):
        for parameter in one.parameters():
            parameter.data.add_(parameter.requires_grad)
    accelerator.load_state(str(tmp_path / "state"))
    assert all(
        same(trained(one), kept) for one, kept in zip((model, other, second), expected, strict=True)
    )
    files = {path.name for path in (tmp_path / "state").iterdir()}
    assert {"veneer", "veneer_1", "model.safetensors"} <= files
    assert "model_1.safetensors" not in files

    remove()
    accelerator.save_state(str(tmp_path / "whole"))  # as before: all of each model
    assert (tmp_path / "whole" / "model_2.safetensors").exists()
    integrations.accelerate_hooks(accelerator)
    for parameter in second.parameters():
        parameter.data.add_(parameter.requires_grad)
    accelerator.load_state(str(tmp_path / "whole"))
    assert same(trained(second), expected[2])
    accelerator.free_memory()
