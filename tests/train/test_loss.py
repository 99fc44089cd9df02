"""The lean loss is the full loss: value and gradients, whatever is masked, wherever the adapter
sits, however the model turns hidden states into logits, and without ever holding more logits than
one chunk's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.forked import LARGE, Program
from tests.support.tiny import tiny_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import CausalLMOutputWithPast

import veneer
from veneer.attach.source.source_analysis import submodule_calls
from veneer.errors import ConfigError
from veneer.train import head_split
from veneer.train import loss as lean
from veneer.train.loss import IGNORED, causal_loss, token_loss

VOCABULARY = 259
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "experts_implementation": "eager",
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.3,
}


class SequenceHead(transformers.LlamaForCausalLM):
    """Each row of logits is also of the row before."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, use_cache: Any = None
    ) -> Any:
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
        ).last_hidden_state
        hidden = hidden + functional.pad(hidden, (0, 0, 1, -1))
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))


class TwoLogits(transformers.LlamaForCausalLM):
    """The output layer is called twice."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, use_cache: Any = None
    ) -> Any:
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
        ).last_hidden_state
        return CausalLMOutputWithPast(
            logits=self.lm_head(hidden) + self.lm_head(-0.5 * hidden).tanh()
        )


class MaskedHead(transformers.LlamaForCausalLM):
    """The head reads another input of the batch's shape, which is seen in its source."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, use_cache: Any = None
    ) -> Any:
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
        ).last_hidden_state
        return CausalLMOutputWithPast(
            logits=self.lm_head(hidden)
            * (1 + attention_mask[..., None] * input_ids[..., None] / 100)
        )


class ReadHead(transformers.LlamaForCausalLM):
    """The head's weight is read from above."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, use_cache: Any = None
    ) -> Any:
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
        ).last_hidden_state
        return CausalLMOutputWithPast(logits=functional.linear(hidden, self.lm_head.weight))


#: models whose forward is cut
CUT: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "llama-tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )
    ),
    "gemma2-softcap": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=0.5, sliding_window=8)
    ),
    "cohere-scale": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**LLAMA, logit_scale=0.3)),
    "granite-scale": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**LLAMA, logits_scaling=3.0)),
    "mixtral-balance": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**LLAMA, **EXPERTS, num_local_experts=4)
    ),
    "qwen2-moe-balance": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **LLAMA, **EXPERTS, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
        )
    ),
    "opt-deep": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, pad_token_id=0,
        )
    ),
    "phi-biased": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**{**LLAMA, "num_key_value_heads": 4})),
    "two-logits": lambda: TwoLogits(transformers.LlamaConfig(**LLAMA)),
    "read-head": lambda: ReadHead(transformers.LlamaConfig(**LLAMA)),
    "read-head-tied": lambda: ReadHead(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
}  # fmt: skip

#: models that are run in full
WHOLE: dict[str, Callable[[], Any]] = {
    "sequence-head": lambda: SequenceHead(transformers.LlamaConfig(**LLAMA)),
    "masked-head": lambda: MaskedHead(transformers.LlamaConfig(**LLAMA)),
}


def batch(seed: int, masked: str, rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    """Rows of tokens, padded on the right, with labels masked as named."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:], mask[2, 5:] = 0, 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    if masked == "prompts":
        labels[:, :4] = IGNORED
    if masked == "scattered":
        labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.6, IGNORED)
    if masked == "row":
        labels[1] = IGNORED
    if masked == "one":
        labels[:], labels[1, 7] = IGNORED, ids[1, 7]
    if masked == "all":
        labels[:] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def full_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The definition: all logits, then the cross-entropy of the shifted labels, and the balance of
    the experts."""
    outputs = model(
        **{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False
    )
    logits = outputs.logits[:, :-1].flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten(), ignore_index=IGNORED)
    balance = getattr(outputs, "aux_loss", None)
    return loss if balance is None else loss + model.config.router_aux_loss_coef * balance


def shaken(model: Any, targets: Any, **config: Any) -> Any:
    """With an adapter that does something."""
    handle = veneer.attach(model, veneer.LoraConfig(rank=4, targets=targets, **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1
            )
    return model


def adapted(targets: Any = "all-linear") -> Any:
    return shaken(tiny_model().double(), targets)


def made(name: str, dtype: torch.dtype = torch.float64) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (CUT | WHOLE)[name]().to(dtype).eval()


def head_of(model: Any) -> str:
    return next(
        name for name, module in model.named_modules() if module is model.get_output_embeddings()
    )


def embedding_of(model: Any) -> str:
    return next(
        name for name, module in model.named_modules() if module is model.get_input_embeddings()
    )


def compare(
    model: Any, inputs: dict[str, Tensor], rtol: float = 1e-12, atol: float = 1e-14, **options: Any
) -> None:
    """The lean loss and its gradients against the full ones."""
    found, wanted = causal_loss(model, inputs, **options), full_loss(model, inputs)
    torch.testing.assert_close(
        found.detach(), wanted.detach(), rtol=rtol, atol=0, check_dtype=False
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad(found, parameters, allow_unused=True)
    theirs = torch.autograd.grad(wanted, parameters, allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(
                one, other, rtol=rtol * 1000, atol=max(atol, rtol * float(other.abs().max()))
            )


def is_cut(model: Any) -> bool:
    return head_split.find_body(model) is not None


@pytest.mark.parametrize("masked", ["nothing", "prompts", "scattered", "row", "one"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["body", "head"])
def test_equal_to_the_full_loss(masked: str, targets: Any) -> None:
    model = adapted(targets)
    assert is_cut(model)
    compare(model, batch(0, masked))
    compare(model, batch(0, masked), chunk=2)


def test_a_label_of_no_chance() -> None:
    """Its share of the softmax is zero in float32, its loss is not infinite."""
    model = adapted("all-linear").float()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 2000
    inputs = batch(0, "nothing")
    full, cut = (
        loss(model, inputs) for loss in (lambda model, inputs: model(**inputs).loss, causal_loss)
    )
    assert full > 100
    assert torch.isfinite(cut)
    torch.testing.assert_close(cut, full)


@pytest.mark.parametrize("trained", ["body", "head", "tied", "full", "everything"])
@pytest.mark.parametrize("name", CUT)
def test_every_kind_of_head(name: str, trained: str) -> None:
    """An adapter in the body, on the head, on the embedding (which the head may share); a head
    trained in full, with an adapter's copy or as the parameter itself."""
    model = made(name)
    head, embedding = head_of(model), embedding_of(model)
    if trained == "body":
        gates = (
            ["shared_expert_gate"] if name == "qwen2-moe-balance" else []
        )  # one output, so no rank of 4
        shaken(model, "all-linear", exclude=[head, *gates])
    if trained == "head":
        shaken(model, [head])
    if trained == "tied":
        shaken(model, [embedding])
    if trained == "full":
        shaken(model, ["*0*proj*"] if name != "gpt2" else ["*0*attn*"], train_also=[head])
    assert is_cut(model)
    for chunk in (3, 1000):
        compare(model, batch(0, "scattered"), chunk=chunk)
    assert head_split.HEAD_IS_ROWWISE[model]


@pytest.mark.parametrize("trained", ["everything", "body", "head"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_head_that_is_not_of_each_row_is_run_in_full(name: str, trained: str) -> None:
    model = made(name)
    if trained != "everything":
        shaken(model, [head_of(model)] if trained == "head" else "all-linear")
    for seed in range(2):  # the second call knows
        compare(model, batch(seed, "scattered"), chunk=3)
    assert head_split.HEAD_IS_ROWWISE.get(model) is not True


@functools.cache
def whole_gradients(masked: str) -> tuple[Any, Tensor, list[Tensor]]:
    model = adapted(["q_proj", "down_proj", "lm_head"])
    loss = full_loss(model, batch(0, masked))
    return model, loss.detach(), list(torch.autograd.grad(loss, parameters_of(model)))


def parameters_of(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@settings(deadline=None, max_examples=30)
@given(
    chunk=st.integers(1, 40),
    masked=st.sampled_from(["nothing", "prompts", "scattered", "row", "one"]),
)
def test_any_chunk_gives_the_same(chunk: int, masked: str) -> None:
    model, loss, gradients = whole_gradients(masked)
    found = causal_loss(model, batch(0, masked), chunk=chunk)
    torch.testing.assert_close(found.detach(), loss, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(found, parameters_of(model)), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


def test_a_chunk_of_no_rows_is_an_error() -> None:
    with pytest.raises(ConfigError, match="chunk=0"):
        token_loss(tiny_model(), batch(0, "nothing"), chunk=0)


@pytest.mark.parametrize(
    "name", ["llama-tied", "gemma2-softcap", "granite-scale", "mixtral-balance"]
)
def test_float32(name: str) -> None:
    model = made(name, torch.float32)
    shaken(model, ["*q_proj", head_of(model)])
    compare(model, batch(0, "scattered"), rtol=2e-6, atol=1e-7, chunk=3)


def test_a_model_that_gives_float32_logits_whatever_it_is() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            state_size=4,
            num_hidden_layers=2,
            conv_kernel=3,
            time_step_rank=4,
        )
        model = shaken(transformers.MambaForCausalLM(config).double(), ["*x_proj", "lm_head"])
    assert is_cut(model)
    compare(model, batch(0, "scattered"), rtol=1e-6, atol=1e-7, chunk=3)


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits(autocast: bool) -> None:
    """bfloat16 logits, and float32 maths on them; or float32 weights under autocast. As close to
    float64 as the full loss is."""
    exact = shaken(made("llama-tied"), ["*q_proj", "lm_head"])
    model = copy.deepcopy(exact).to(torch.float32 if autocast else torch.bfloat16)
    inputs = batch(0, "scattered")

    def gradients(loss: Callable[..., Tensor], model: Any) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and model is not exact):
            value = loss(model, inputs)
        assert value.dtype == (torch.float64 if model is exact else torch.float32)
        return [value.detach(), *torch.autograd.grad(value, parameters_of(model))]

    wanted = gradients(full_loss, exact)
    ours, theirs = (
        gradients(functools.partial(causal_loss, chunk=3), model),
        gradients(full_loss, model),
    )
    for one, other, true in zip(ours, theirs, wanted, strict=True):
        assert one.dtype == other.dtype
        size = float(true.norm())
        assert float((one - true).norm()) <= 1.5 * float((other - true).norm()) + 2e-3 * size


def test_the_forward_that_accelerate_wraps(request: pytest.FixtureRequest) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # another test's, of another precision
    request.addfinalizer(lambda: AcceleratorState._reset_state(reset_partial_state=True))

    model, inputs = adapted(["q_proj", "lm_head"]).float(), batch(0, "prompts")
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared: Any = accelerator.prepare_model(model)
    seen = []
    model.lm_head.register_forward_hook(
        lambda module, args, output: seen.append((len(args[0][0]), output.dtype))
    )
    assert "forward" in prepared.__dict__
    found = causal_loss(prepared, inputs, chunk=5)
    assert all(rows <= 6 and dtype == torch.bfloat16 for rows, dtype in seen)
    torch.testing.assert_close(found, full_loss(prepared, inputs), rtol=1e-2, atol=0)
    assert prepared.__dict__["forward"].__self__ is prepared
    assert not torch.is_autocast_enabled("cpu"), (
        "its context is left, though one cannot be entered twice"
    )


class Largest(TorchDispatchMode):
    """The most rows of logits that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def see(self, tensor: Any) -> Any:
        if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == VOCABULARY:
            self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return tensor

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        pytree.tree_map(self.see, output)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["body", "head", "full"])
def test_no_more_logits_than_a_chunk_of_them(trained: str, dtype: torch.dtype) -> None:
    model = made("gemma2-softcap", dtype)
    targets = {"body": "all-linear", "head": ["*q_proj", "lm_head"], "full": ["*q_proj"]}[trained]
    shaken(model, targets, **({"train_also": ["lm_head"]} if trained == "full" else {}))
    inputs = batch(0, "nothing", rows=12, length=20)
    assert int((inputs["labels"] != IGNORED).sum()) > 200
    largest, saved = Largest(), []
    with (
        largest,
        torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.append(largest.see(x)) or x, lambda x: x
        ),
    ):
        loss = causal_loss(model, inputs, chunk=40)
        loss.backward()
    assert largest.rows == 40
    with largest:
        full_loss(model, inputs)
    assert largest.rows > 200


@pytest.mark.parametrize("grad", [False, True])
def test_logits_do_not_outlive_their_chunk(grad: bool) -> None:
    import weakref

    model, inputs = adapted(["q_proj", "lm_head"]), batch(0, "nothing")
    alive: list[Any] = []

    def look(module: Any, args: Any, output: Tensor) -> None:
        alive.append(weakref.ref(output))

    causal_loss(model, inputs, chunk=8)
    model.lm_head.register_forward_hook(look)
    model.lm_head.register_forward_pre_hook(
        lambda *_: pytest.fail("still there") if any(ref() is not None for ref in alive) else None
    )
    with torch.set_grad_enabled(grad):
        loss = causal_loss(model, inputs, chunk=8)
    assert len(alive) == 3
    assert all(ref() is None for ref in alive)
    assert loss.requires_grad == grad


@pytest.mark.parametrize("name", ["llama-tied", "sequence-head"])
@pytest.mark.parametrize("loss", [causal_loss, lambda *given: lean.log_probabilities(*given).sum()])
def test_a_step_leaves_nothing_behind(loss: Callable[..., Tensor], name: str) -> None:
    """Not until the garbage collector comes by, either: memory of a chunk's logits would grow by
    that in each step."""
    import gc

    model, inputs = shaken(made(name), ["*q_proj"]), batch(0, "nothing")
    alive = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            with torch.no_grad():
                loss(model, inputs)
            alive.append(sum(one.nbytes for one in gc.get_objects() if type(one) is Tensor))
    finally:
        gc.enable()
    assert alive[3] == alive[1]


@pytest.mark.parametrize("name", ["llama-tied", "gemma2-softcap", "phi-biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_all_chunks_lie_in_one_memory(name: str, dtype: torch.dtype) -> None:
    """Where the head is frozen; the numbers are those of a head that is called in its own way."""
    model, inputs = shaken(made(name, dtype), ["*q_proj"]), batch(0, "nothing")
    logits: list[Tensor] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if module.__dict__.get("out_features") == VOCABULARY:
            logits.append(output)  # so that fresh memory would be other memory

    def step() -> list[Tensor]:
        loss = causal_loss(model, inputs, chunk=8)
        return [
            loss.detach(),
            *torch.autograd.grad(loss, [one for one in model.parameters() if one.requires_grad]),
        ]

    step()  # finds out whether the head treats each row alone
    hook = nn.modules.module.register_module_forward_hook(look)
    ours = step()
    hook.remove()
    assert len(logits) == 3
    assert len({one.untyped_storage().data_ptr() for one in logits}) == 1
    calls: list[int] = []
    forward = model.lm_head.forward
    model.lm_head.forward = lambda rows: calls.append(1) or forward(rows)
    for one, other in zip(ours, step(), strict=True):
        torch.testing.assert_close(
            one, other, atol=torch.finfo(dtype).eps * float(other.abs().max()), rtol=1e-2
        )
    assert len(calls) == 3


def test_backward_through_a_scaled_loss_and_again() -> None:
    """Accumulated gradients are the gradients of the sum, and a graph that is kept can be used
    twice."""
    model = adapted(["q_proj", "lm_head"])
    batches = [batch(seed, "scattered") for seed in range(3)]
    for inputs in batches:
        (causal_loss(model, inputs, chunk=4) / 3).backward()
    found = [parameter.grad.clone() for parameter in parameters_of(model)]
    losses = torch.stack([full_loss(model, inputs) for inputs in batches])
    wanted = torch.autograd.grad(losses.mean(), parameters_of(model))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)
    loss = causal_loss(model, batches[0], chunk=4)
    first = torch.autograd.grad(loss, parameters_of(model), retain_graph=True)
    again = torch.autograd.grad(2 * loss, parameters_of(model))
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(2 * one, other)


def test_a_second_derivative_is_an_error() -> None:
    """Not a silent zero."""
    model = adapted(["q_proj", "lm_head"])
    with pytest.raises(
        NotImplementedError, match=r"create_graph=True.*one derivative.*model\(\*\*inputs\)\.loss"
    ):
        torch.autograd.grad(
            causal_loss(model, batch(0, "nothing")), parameters_of(model), create_graph=True
        )


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, inputs = adapted(["q_proj", "lm_head"]), batch(0, "scattered")
    wanted = torch.autograd.grad(full_loss(model, inputs), parameters_of(model))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert is_cut(model)
    causal_loss(model, inputs, chunk=4).backward()
    for parameter, gradient in zip(parameters_of(model), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-14)


def test_deterministic_algorithms() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        compare(adapted(["q_proj", "lm_head"]), batch(0, "scattered"), chunk=4)
    finally:
        torch.use_deterministic_algorithms(before)


def test_packed_rows() -> None:
    """No mask; positions that start again."""
    model = adapted(["q_proj", "lm_head"])
    inputs = batch(0, "prompts", rows=4)
    del inputs["attention_mask"]
    inputs["position_ids"] = torch.arange(12).remainder(5).repeat(4, 1)
    compare(model, inputs, chunk=4)


def test_the_head_alone_trains() -> None:
    """The rows of hidden states then want no gradient."""
    model = shaken(tiny_model(tie_word_embeddings=False).double(), ["lm_head"])
    seen: list[bool] = []
    model.model.register_forward_hook(
        lambda module, args, output: seen.append(output.last_hidden_state.requires_grad)
    )
    compare(model, batch(0, "scattered"), chunk=4)
    assert not any(seen)


def test_selected_adapters_and_the_base() -> None:
    model = shaken(tiny_model().double(), ["q_proj", "lm_head"])
    inputs = batch(0, "scattered")
    with veneer.use(model, None):
        loss = causal_loss(model, inputs, chunk=4)
        torch.testing.assert_close(loss, full_loss(model, inputs), rtol=1e-12, atol=0)
    assert not loss.requires_grad
    assert float(loss) != float(causal_loss(model, inputs).detach())
    veneer.merge(model)
    torch.testing.assert_close(
        causal_loss(model, inputs), full_loss(model, inputs), rtol=1e-12, atol=0
    )


def test_an_adapter_for_each_row() -> None:
    model = shaken(tiny_model().double(), ["q_proj", "lm_head"])
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=["v_proj", "lm_head"]), name="other")
    inputs = batch(0, "scattered")
    with veneer.use(model, ["default", None, "other"]):
        assert not is_cut(model)
        compare(model, inputs)
    with veneer.use(model, "other"):
        assert is_cut(model)
        compare(model, inputs, chunk=4)


def test_losses_of_each_label() -> None:
    model, inputs = shaken(tiny_model().double(), ["q_proj"]), batch(0, "scattered")
    losses, counts, right = lean.label_losses(model, inputs, chunk=4, accuracy=True)
    torch.testing.assert_close(
        losses.sum() / counts.sum(), full_loss(model, inputs), rtol=1e-12, atol=0
    )
    assert right.sum() == token_loss(model, inputs, accuracy=True).correct
    wanted = inputs["labels"][:, 1:] != -100
    likely = (
        model(**{name: value for name, value in inputs.items() if name != "labels"})
        .logits[:, :-1]
        .argmax(-1)
    )
    assert torch.equal(right, (likely == inputs["labels"][:, 1:])[wanted])
    head = shaken(tiny_model(tie_word_embeddings=False), ["q_proj"])
    head.lm_head.weight.requires_grad_(True)
    with pytest.raises(NotImplementedError, match="a head that trains"):
        lean.label_losses(head, inputs, chunk=4)


def test_adapter_dropout_on_the_head_is_no_reason_to_run_in_full() -> None:
    model = shaken(tiny_model(tie_word_embeddings=False), ["lm_head"], dropout=0.5).train()
    causal_loss(model, batch(0, "nothing"), chunk=4)
    assert head_split.HEAD_IS_ROWWISE[model]


def test_a_hook_on_a_trained_number_runs_once() -> None:
    """A hook that scales the gradient would scale each chunk's, and then the sum's."""
    model, inputs = adapted(["q_proj", "lm_head"]), batch(0, "scattered")
    parameter = parameters_of(model)[-1]
    wanted = torch.autograd.grad(full_loss(model, inputs), parameters_of(model))[-1]
    parameter.register_hook(lambda gradient: gradient * 3)
    assert not is_cut(model)
    causal_loss(model, inputs, chunk=4).backward()
    torch.testing.assert_close(parameter.grad, 3 * wanted, rtol=1e-9, atol=1e-14)


def test_a_hook_inside_of_the_body_is_no_reason_to_run_in_full() -> None:
    """Unless the head reads the number too, by a weight that is tied."""
    model, tied = (
        adapted(["q_proj"]),
        shaken(tiny_model(tie_word_embeddings=True), ["embed_tokens"]),
    )
    for one in (model, tied):
        parameters_of(one)[-1].register_hook(lambda gradient: gradient)
    assert is_cut(model)
    assert not is_cut(tied)
    plain = tiny_model(tie_word_embeddings=True)
    plain.lm_head.weight.register_hook(lambda gradient: gradient)
    assert not is_cut(plain)


def test_a_hook_on_the_model_sees_one_call() -> None:
    model, inputs = adapted(["q_proj", "lm_head"]), batch(0, "nothing")
    shapes = []
    model.register_forward_hook(lambda module, args, output: shapes.append(output.logits.shape[:2]))
    compare(model, inputs, chunk=4)
    assert shapes == [(3, 11), (3, 12)]


def test_the_body_runs_once_and_its_hooks_with_it() -> None:
    model, inputs = adapted(["q_proj", "lm_head"]), batch(0, "nothing")
    shapes = []
    model.model.register_forward_hook(
        lambda module, args, output: shapes.append(output.last_hidden_state.shape)
    )
    causal_loss(model, inputs, chunk=4)
    assert shapes == [(3, 12, 32)]


def test_a_compiled_model_is_run_whole() -> None:
    model = adapted(["q_proj", "lm_head"])
    compiled: Any = torch.compile(copy.deepcopy(model), backend="eager")
    inputs = batch(0, "scattered")
    assert not is_cut(compiled)
    torch.testing.assert_close(
        causal_loss(compiled, inputs), causal_loss(model, inputs), rtol=1e-12, atol=0
    )
    model.compile(backend="eager")
    assert not is_cut(model)


DISTRIBUTED = """
import os
import torch
import torch.distributed as dist
from tests.train.test_loss import batch, causal_loss, full_loss, is_cut, made, parameters_of, shaken

dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=0, world_size=1)
model, inputs = shaken(made("mixtral-balance"), ["*q_proj", "lm_head"]), batch(0, "scattered")
wanted = torch.autograd.grad(full_loss(model, inputs), parameters_of(model))
wrapped = torch.nn.parallel.DistributedDataParallel(model)
assert not is_cut(wrapped)
causal_loss(wrapped, inputs).backward()
for parameter, gradient in zip(parameters_of(model), wanted, strict=True):
    torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-14)
print("equal", flush=True)
os._exit(0)  # gloo's group may wait for ever for its threads when it is taken down
"""


def test_distributed_data_parallel_sees_each_call(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n{DISTRIBUTED}"
    program = Program(code, *LARGE, folder=tmp_path)
    assert program.wait() == 0, program.said
    assert program.said.strip().endswith("equal")


def test_a_forward_that_was_replaced_is_called() -> None:
    model, inputs = adapted(["q_proj", "lm_head"]), batch(0, "scattered")
    wanted = causal_loss(model, inputs)
    own = model.forward

    def forward(**kwargs: Any) -> Any:
        outputs = own(**kwargs)
        outputs.logits = outputs.logits * 2
        return outputs

    model.forward = forward
    assert not is_cut(model)
    assert abs(float(causal_loss(model, inputs).detach()) - float(wanted.detach())) > 1e-3


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_peft_wrapped() -> None:
    import peft

    model: Any = peft.get_peft_model(
        tiny_model().double(),
        peft.LoraConfig(r=2, target_modules=["q_proj"]),
        autocast_adapter_dtype=False,
    )
    for parameter in parameters_of(model):
        nn.init.normal_(parameter, std=0.1)
    inputs = batch(0, "scattered")
    assert not is_cut(model)
    compare(model, inputs)
    assert is_cut(model.base_model.model)
    compare(model.base_model.model, inputs, chunk=4)


def test_the_model_is_left_as_it_was() -> None:
    model = adapted(["q_proj", "lm_head"])
    before = [
        (name, dict(module.__dict__), dict(module._modules))
        for name, module in model.named_modules()
    ]
    causal_loss(model, batch(0, "scattered"), chunk=4).backward()
    after = [
        (name, dict(module.__dict__), dict(module._modules))
        for name, module in model.named_modules()
    ]
    for (name, own, children), (_, own_after, children_after) in zip(before, after, strict=True):
        assert own.keys() == own_after.keys(), name
        assert children == children_after, name


def test_the_balance_of_the_experts_is_the_models_own() -> None:
    """Computed once, from all tokens and the mask, whatever the chunks."""
    model, inputs = made("mixtral-balance"), batch(0, "scattered")
    wanted = model(**inputs).aux_loss * 0.3
    for chunk in (2, 100):
        extra = token_loss(model, inputs, chunk=chunk).extra
        assert extra is not None
        torch.testing.assert_close(extra, wanted, rtol=1e-12, atol=0)
    loss = causal_loss(model, inputs, chunk=2)
    # transformers' own loss is a float32
    torch.testing.assert_close(loss, model(**inputs).loss, rtol=1e-6, atol=0, check_dtype=False)


def test_the_count_of_an_accumulated_batch_replaces_its_own() -> None:
    model, inputs = adapted(), batch(0, "prompts")
    result = token_loss(model, inputs)
    torch.testing.assert_close(
        causal_loss(model, inputs, num_items_in_batch=100), result.total / 100
    )
    assert int(result.items) == int((inputs["labels"][:, 1:] != IGNORED).sum())


@pytest.mark.parametrize("name", ["llama", "mixtral-balance", "sequence-head"])
@pytest.mark.parametrize("masked", ["all", "first"])
def test_a_batch_without_labels_is_a_zero_that_reaches_the_parameters(
    name: str, masked: str
) -> None:
    model, inputs = shaken(made(name), ["*q_proj", "lm_head"]), batch(0, "all")
    if masked == "first":
        inputs["labels"][:, 0] = 7  # what nothing predicts
    result = token_loss(model, inputs, accuracy=True)
    assert float(result.total.detach()) == float(result.items) == float(result.correct) == 0.0
    parameters = parameters_of(model)
    assert all(not gradient.any() for gradient in torch.autograd.grad(result.total, parameters))


def test_a_forward_without_logits_to_keep_is_run_in_full() -> None:
    model, inputs = adapted(), batch(0, "prompts")

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False
        ) -> Any:
            return self.inner(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
            )

    torch.testing.assert_close(
        causal_loss(Plain(), inputs), causal_loss(model, inputs), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("masked", ["prompts", "one"])
def test_only_labelled_rows_reach_the_head(masked: str) -> None:
    model, inputs = adapted(), batch(0, masked)
    token_loss(model, inputs)  # the first call tries the head on a few rows
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    count = int(token_loss(model, inputs).items)
    assert seen == [(1, count, 32)]


@pytest.mark.parametrize("name", ["llama", "sequence-head"])
@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.parametrize("grad", [False, True])
def test_accuracy_counts_the_right_tokens(name: str, chunk: int, grad: bool) -> None:
    model, inputs = made(name), batch(0, "nothing")
    best = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).logits.argmax(-1)
    counted = inputs["labels"][:, 1:] != IGNORED
    inputs["labels"][:, 1:][counted] = best[:, :-1][counted]
    inputs["labels"][0, 4] = (inputs["labels"][0, 4] + 1) % VOCABULARY
    with torch.set_grad_enabled(grad):
        result = token_loss(model, inputs, accuracy=True, chunk=chunk)
    assert int(result.correct) == int(result.items) - 1


def test_what_reading_a_forward_finds() -> None:
    """Where each of transformers' causal models is cut, by its class alone."""
    assert dict(submodule_calls(_source(transformers.OPTForCausalLM)))["model", "decoder"] is False
    assert dict(submodule_calls(_source(transformers.Gemma2ForCausalLM)))["model",] is False
    assert dict(submodule_calls(_source(transformers.MixtralForCausalLM)))["model",] is False
    assert (
        dict(submodule_calls(_source(transformers.ProphetNetForCausalLM)))["prophetnet", "decoder"]
        is True
    )
    assert dict(submodule_calls(_source(MaskedHead)))["model",] is True
    assert submodule_calls(len) == ()


def _source(cls: Any) -> Any:
    import inspect

    return inspect.unwrap(cls.forward)
