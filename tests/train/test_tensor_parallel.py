"""Tensor parallelism: outputs, gradients, sums and the adapter folder of one process, on a model
that is cut by transformers' plan. Runs of ``veneer train`` are in ``test_ways.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.support.moe import build, set_way
from tests.support.processes import done_by_two
from tests.support.tiny import tiny_config, tiny_model
from tests.support.toys import error, randomise

import veneer
from veneer.distributed import average_gradients, is_sharded
from veneer.errors import ConfigError
from veneer.train.processes import check_divided_settings
from veneer.train.tensor_parallel import cut_layers, cut_model

# the ranks are processes of their own, of which no warning tells
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(4 * 6).view(4, 6) % 40 + 3
EXPERTS = r"re:.*\.experts\.(gate_up|down)_proj"


def qwen3() -> Any:
    """Norms of queries and keys between the layers that are cut, and biases of row-wise ones."""
    import transformers

    fields = {
        **tiny_config(tie_word_embeddings=False).to_diff_dict(),
        "head_dim": 8,
        "attention_bias": True,
    }
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**{**fields, "model_type": "qwen3"})
    )


def olmo2() -> Any:
    """Projections that transformers gathers."""
    import transformers

    fields = {**tiny_config().to_diff_dict(), "model_type": "olmo2"}
    torch.manual_seed(0)
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**fields))


def gpt2() -> Any:
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=50)
    )


def llama() -> Any:
    return tiny_model(tie_word_embeddings=False)


#: model, configuration of the adapter
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "lora": (llama, {"targets": "all-linear"}),
    "dora": (llama, {"targets": "all-linear", "variant": "dora"}),
    "in full": (
        llama,
        {"targets": ["q_proj"], "train_also": ["lm_head", "norm", "k_proj", "down_proj"]},
    ),
    "between": (
        qwen3,
        {"targets": "all-linear", "train_also": ["q_norm", "k_norm"], "bias": "all"},
    ),
    "biases of dora": (qwen3, {"targets": "all-linear", "variant": "dora", "bias": "targets"}),
    "gathered": (olmo2, {"targets": "all-linear"}),
    "mixtral": (lambda: build("mixtral", torch.float32), {"targets": EXPERTS, "rank": 2}),
    "experts": (
        lambda: build("qwen3_moe", torch.float32),
        {"targets": [EXPERTS, "q_proj", "o_proj"], "rank": 2},
    ),
    "dora of experts": (
        lambda: build("mixtral", torch.float32),
        {"targets": EXPERTS, "rank": 2, "variant": "dora"},
    ),
}


def attached(case: str) -> tuple[Any, veneer.Handle]:
    model, config = CASES[case]
    made = model().double().train()
    set_way(made, "eager")  # torch's grouped product knows no float64
    handle = veneer.attach(made, veneer.LoraConfig(**{"rank": 4, **config}))
    torch.manual_seed(1)
    randomise(handle, 0.1)
    return made, handle


def differentiated(model: Any, handle: veneer.Handle) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logits = model(input_ids=IDS).logits
    logits.square().mean().backward()
    return logits.detach(), [parameter.grad for parameter in handle.parameters()]


# ------------------------------------------------------------------------------------------ what
# the ranks do


def outputs_and_gradients(rank: int, folder: Path) -> None:
    for case in CASES:
        model, handle = attached(case)
        expected = differentiated(*attached(case))
        cut_model(model, torch.device("cpu"))
        cut = [p for p in model.parameters() if is_sharded(p)]
        assert cut, case
        assert all(2 * p.to_local().numel() == p.numel() for p in cut), case
        logits, _ = differentiated(model, handle)
        assert error(logits, expected[0]) < 1e-10, case
        average_gradients([*handle.parameters()])
        for (name, parameter), gradient in zip(handle.named_parameters(), expected[1], strict=True):
            assert error(parameter.grad, gradient) < 1e-10, (case, name)
        with torch.no_grad(), veneer.use(model, None):
            plain, _ = attached(case)
            with veneer.use(plain, None):
                assert error(model(input_ids=IDS).logits, plain(input_ids=IDS).logits) < 1e-10, case


def checkpointing_computes_the_same(rank: int, folder: Path) -> None:
    expected = differentiated(*attached("lora"))
    model, handle = attached("lora")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    cut_model(model, torch.device("cpu"))
    differentiated(model, handle)
    average_gradients([*handle.parameters()])
    for parameter, gradient in zip(handle.parameters(), expected[1], strict=True):
        assert error(parameter.grad, gradient) < 1e-10


def the_adapter_is_saved_whole(rank: int, folder: Path) -> None:
    for case in ("lora", "dora", "experts"):
        model, handle = attached(case)
        if rank == 0:
            handle.save(folder / f"{case} one", alone=True)
        cut_model(model, torch.device("cpu"))
        handle.save(folder / f"{case} two")


def what_is_summed(rank: int, folder: Path) -> None:
    """One sum for each row-wise layer, and one for each input of column-wise ones: nothing for the
    adapter."""
    sent, kept = [], dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return kept(tensor, *args, **kwargs)

    hidden = IDS.numel() * 32
    for case, norms in (("lora", 0), ("dora", 2 * 2)):
        model, handle = attached(case)
        cut_model(model, torch.device("cpu"))
        sent.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", counted)
            differentiated(model, handle)
        assert sent.count(hidden) == 2 * 2 + (2 * 2 - 1), (
            case
        )  # the first block's input has no gradient
        assert [size for size in sent if size != hidden] == [
            32
        ] * norms  # of DoRA: a number an output


def dropout_is_that_of_one_process(rank: int, folder: Path) -> None:
    """Of a column-wise layer exactly; of a row-wise one, each process drops other places of its
    part."""
    model, whole = (CASES["lora"][0]().train() for _ in range(2))
    for one in (model, whole):
        handle = veneer.attach(
            one, veneer.LoraConfig(rank=4, dropout=0.5, targets=["q_proj", "down_proj"])
        )
        torch.manual_seed(1)
        randomise(handle, 0.1)
    cut_model(model, torch.device("cpu"))
    layer, x = model.model.layers[0].self_attn.q_proj, torch.ones(1, 64, 32)
    torch.manual_seed(3)
    drops = [layer(x) for _ in range(2)]
    torch.manual_seed(3)
    expected = [whole.model.layers[0].self_attn.q_proj(x) for _ in range(2)]
    for own, wanted in zip(drops, expected, strict=True):
        assert error(own, wanted.chunk(2, dim=-1)[rank]) < 1e-6
    down = model.model.layers[0].mlp.down_proj
    down.weight.to_local().zero_()
    for change in down.veneer.default.changes.values():
        change.A.data.fill_(1.0)  # so that the parts differ by what is dropped alone
    terms: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda tensor, **_: terms.append(tensor.clone()))
        down(torch.ones(1, 64, 32))
    both = [torch.empty_like(terms[0]) for _ in range(2)]
    dist.all_gather(both, terms[0])
    assert error(*both) > 0.1
    state = [torch.empty_like(torch.get_rng_state()) for _ in range(2)]
    dist.all_gather(state, torch.get_rng_state())
    assert torch.equal(*state)  # and go on with the same ones


TASKS = (
    outputs_and_gradients,
    checkpointing_computes_the_same,
    the_adapter_is_saved_whole,
    what_is_summed,
    dropout_is_that_of_one_process,
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """`ran(task)`: the folder in which two processes did a task, once they have done all of
    them."""
    return done_by_two(TASKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("task", [task for task in TASKS if task is not the_adapter_is_saved_whole])
def test_two_processes(ran: Any, task: Any) -> None:
    ran(task)


def test_the_adapter_folder_is_that_of_one_process(ran: Any) -> None:
    folder = ran(the_adapter_is_saved_whole)
    for case in ("lora", "dora", "experts"):
        one, two = folder / f"{case} one", folder / f"{case} two"
        for file in ("adapter_model.safetensors", "veneer.safetensors"):
            assert (one / file).exists() == (two / file).exists()
        ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (two, one))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
        ours, theirs = (veneer.adapter_files.read(path).record for path in (two, one))
        assert ours["base"]["weights"] == theirs["base"]["weights"]  # fingerprints of whole weights


@pytest.mark.parametrize(
    ("model", "config", "processes", "problem"),
    [
        (
            llama,
            {"targets": "all-linear"},
            3,
            "num_attention_heads 4, num_key_value_heads 2, 32 outputs of",
        ),
        (llama, {"targets": "all-linear"}, 4, "num_key_value_heads 2"),
        (
            llama,
            {"targets": ["down_proj"], "variant": "vera"},
            2,
            "variant 'vera' at model.layers.0.mlp.down_proj",
        ),
        (
            lambda: build("gpt_oss", torch.float32),
            {"targets": ["q_proj"]},
            2,
            "no plan of transformers that cuts matrices",
        ),
        (
            lambda: build("mixtral", torch.float32),
            {"targets": EXPERTS, "dropout": 0.1, "rank": 2},
            2,
            "dropout at",
        ),
        (gpt2, {"targets": ["c_attn"]}, 2, "no plan of transformers that cuts matrices"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    model: Any, config: Any, processes: int, problem: str
) -> None:
    made = model()
    before = {name: id(value) for name, value in made.named_parameters()}
    veneer.attach(made, veneer.LoraConfig(**config))
    with pytest.raises(ConfigError, match=f"parallel tp over {processes} processes") as caught:
        cut_layers(made, processes, 0)
    assert problem in str(caught.value)
    assert {name: id(value) for name, value in made.named_parameters() if name in before} == before


def test_what_a_cut_base_cannot_do_is_refused(make: Callable[..., Any]) -> None:
    refused = {"quantize": "nf4"}, {"cache_lower": True}, {"device_map": "auto"}
    early = {"early_stopping": 2, "eval_fraction": 0.2, "eval_every": 5, "save_every": 5}
    for changes in (*refused, {"invocation": "<c>"}, early):
        with pytest.raises(ConfigError, match=f"parallel tp with {next(iter(changes))}"):
            check_divided_settings(make(parallel="tp", **changes), 2)
    check_divided_settings(make(parallel="tp"), 2)
    with pytest.raises(ConfigError, match="parallel tp with invocation"):
        check_divided_settings(make(parallel="tp"), 2, invocation_tokens=(3,))
