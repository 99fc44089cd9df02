"""Calls without gradients, experts, and what importing costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

import runner
import veneer
from candidates import (
    ALPHA,
    DTYPES,
    llama,
    load_bank,
    peft_with,
    save_random,
    sharing,
    with_peft,
)
from runner import Arms, Case

ROWS, PROMPT = 16, 64


def eval_with_peft(model: Any, **config: Any) -> Any:
    return with_peft(model, r=8, lora_alpha=ALPHA, **config).eval()


def frozen_llama(layers: int, dtype: str, tiny: bool, **changes: Any) -> Any:
    return llama(layers, 0, tiny, **changes).to(DTYPES[dtype]).eval().requires_grad_(False)


def without_gradients(call: Callable[[], object]) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        call()

    return run


def forward_arms(
    stack: Any, seed: int, dtype: str, tokens: int, layers: int, tiny: bool = False
) -> Arms:
    torch.manual_seed(seed)
    base = frozen_llama(layers, dtype, tiny)
    ids = torch.randint(0, base.config.vocab_size, (1, tokens))
    config = veneer.LoraConfig(rank=8, alpha=ALPHA)

    def attach_base(products: bool) -> Any:
        model = sharing(base)
        veneer.attach(model, config)
        if products:
            veneer.models.use_products(model)
        return model

    merged = copy.deepcopy(base)  # merging writes into the weights
    veneer.attach(merged, config).merge(keep=False)
    veneer.detach(merged, keep_merged=True)
    everywhere = {"target_modules": "all-linear"}
    models = {"base": base, "peft": eval_with_peft(sharing(base), **everywhere)}
    if dtype != "float32":
        models["peft, bf16 adapters"] = eval_with_peft(sharing(base), narrow=True, **everywhere)
    models |= {
        "peft, merged": eval_with_peft(copy.deepcopy(base), **everywhere).merge_and_unload(),
        "veneer": attach_base(False),
        "veneer, own attention": attach_base(True),
        "veneer, merged": merged,
    }
    return {
        name: without_gradients(lambda m=model: m(ids, logits_to_keep=1))
        for name, model in models.items()
    }


def decode_on_slots(model: Any, length: int) -> Callable[[], object]:
    """A token of each row behind a prompt, on slots, as the server computes it."""
    from veneer.models.decode.forward import Forward
    from veneer.models.decode.slots import Slots

    forward = Forward(model)
    slots = Slots(ROWS, length + 1, torch.device("cpu"))
    prompts = torch.randint(0, forward.logit_count, (ROWS, length)).tolist()
    with torch.inference_mode():
        rows: Any = [slots.allocate(length + 1) for _ in prompts]
        forward.fill(slots, rows, prompts)
    return lambda: forward.decode(slots, rows, [1] * ROWS, [length] * ROWS)


def decode_with_cache(model: Any, length: int, **options: Any) -> Callable[[], object]:
    """The same with transformers' own cache, which is all that PEFT has."""
    ids = torch.randint(0, model.config.vocab_size, (ROWS, length))
    with torch.inference_mode():
        cache = model(ids, use_cache=True, logits_to_keep=1).cache

    def decode() -> None:
        model(ids[:, :1], cache=cache, use_cache=True, **options)
        cache.crop(-1)

    return decode


def call_in_bank(
    bank: Any, choice: Sequence[str], call: Callable[[], object]
) -> Callable[[], None]:
    """A call in which each row of the batch uses the adapter that is chosen for it."""

    def run() -> None:
        with bank.rows(choice):
            call()

    return run


def mixed_arms(
    stack: Any,
    seed: int,
    dtype: str,
    layers: int,
    adapters: int,
    length: int = PROMPT,
    tiny: bool = False,
) -> Arms:
    torch.manual_seed(seed)
    base = frozen_llama(layers, dtype, tiny)
    folder = Path(stack.enter_context(TemporaryDirectory()))
    adapter_names = save_random(base, folder, adapters)
    bank = load_bank(base, folder, adapter_names)
    choice = [adapter_names[row % adapters] for row in range(ROWS)]
    peers = {
        "peft": {},
        **(
            {"peft, bf16 adapters": {"autocast_adapter_dtype": False}} if dtype != "float32" else {}
        ),
    }
    calls = {
        "base, transformers' cache": decode_with_cache(sharing(base), length),
        **{
            name: decode_with_cache(
                peft_with(base, folder, adapter_names, **options), length, adapter_names=choice
            )
            for name, options in peers.items()
        },
        "base, veneer's slots": decode_on_slots(sharing(base), length),
        "veneer": call_in_bank(bank, choice, decode_on_slots(bank.model, length)),
    }
    return {name: without_gradients(call) for name, call in calls.items()}


STACKS = ("gate_up_proj", "down_proj")


def experts_arms(stack: Any, seed: int, dtype: str, call: str, tiny: bool = False) -> Arms:
    import transformers

    torch.manual_seed(seed)
    width, experts = (32, 4) if tiny else (512, 64)
    config = transformers.Qwen3MoeConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        moe_intermediate_size=width // 2,
        num_experts=experts,
        num_experts_per_tok=2 if tiny else 4,
        num_hidden_layers=1 if tiny else 2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=width // 8,
        vocab_size=4096,
        decoder_sparse_step=1,
    )
    base = transformers.Qwen3MoeForCausalLM(config).to(DTYPES[dtype]).eval().requires_grad_(False)
    peer = {"target_modules": [], "target_parameters": [f"mlp.experts.{name}" for name in STACKS]}
    models = {
        "base": base,
        "peft": eval_with_peft(copy.deepcopy(base), **peer),
        "peft, bf16 adapters": eval_with_peft(copy.deepcopy(base), narrow=True, **peer),
        "veneer": copy.deepcopy(base),
    }
    targets = [f"experts.{name}" for name in STACKS]
    veneer.attach(models["veneer"], veneer.LoraConfig(rank=8, alpha=ALPHA, targets=targets))
    ids = torch.randint(0, 4096, (1, 1) if call == "one token" else (2, 16 if tiny else 256))

    def train(model: Any) -> None:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model.zero_grad()
        model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()

    if call == "one token":
        return {
            name: without_gradients(lambda m=model: m(input_ids=ids, use_cache=False))
            for name, model in models.items()
        }
    return {name: lambda m=model: train(m) for name, model in models.items()}


# ---- the server's engine, without its server


#: a tokenizer: each token is a letter
LETTERS: Any = SimpleNamespace(
    eos_token_id=None, decode=lambda ids, **_: "".join(chr(97 + id % 26) for id in ids)
)


def engine_arms(
    stack: Any, seed: int, dtype: str, layers: int, prompt: int, tokens: int, tiny: bool = False
) -> Arms:
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    from veneer.serve.engine import Engine
    from veneer.serve.requests import Request, Sampling

    torch.manual_seed(seed)
    base = frozen_llama(layers, dtype, tiny, use_cache=True)
    prompts = torch.randint(0, base.config.vocab_size, (ROWS, prompt))
    # the others compute each prompt anew, round after round
    engine = Engine(sharing(base), LETTERS, rows=ROWS, length=prompt + tokens, prefix_cache=False)
    greedy: Any = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    config = GenerationConfig(eos_token_id=-1, **greedy)
    paged = ContinuousBatchingConfig(
        page_size=32,
        num_blocks=256,
        max_batch_tokens=512,
        allow_block_sharing=False,
        use_cuda_graph=False,
    )
    batching = sharing(base)
    stack.callback(batching.destroy_cached_continuous_batching_manager)

    def generate() -> None:
        answers = base.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=tokens,
            **greedy,
        )
        assert answers.shape[1] == prompt + tokens

    def generate_batch() -> None:
        answers = batching.generate_batch(
            prompts.tolist(),
            generation_config=config,
            continuous_batching_config=paged,
            persistent_manager=True,
        )
        assert [len(answer.generated_tokens) for answer in answers.values()] == [tokens] * ROWS

    def ours() -> None:
        pieces: list[Any] = []
        for ids in prompts.tolist():
            sampling = Sampling(tokens, temperature=0.0, ignore_eos=True)
            engine.submit(Request(tuple(ids), {}, sampling, 600, ""), pieces.append)
        while engine.waiting or engine.running:
            engine.step()
        assert sum(len(piece.tokens) for piece in pieces) == ROWS * tokens

    return {
        "transformers, generate": without_gradients(generate),
        "transformers, generate_batch": generate_batch,
        "veneer": without_gradients(ours),
    }


# ---- importing

CODE = {
    "torch": "import torch",
    "peft": "import peft; peft.LoraConfig, peft.get_peft_model",
    "veneer": "import torch; from veneer import attach, LoraConfig",
}


def import_arms(stack: Any, seed: int, names: Sequence[str] = tuple(CODE)) -> Arms:
    """Seconds around the import, in fresh interpreters."""
    template = (
        "import json, time; wall, cpu = time.perf_counter(), time.process_time(); {}; "
        "print(json.dumps(dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)))"
    )
    return {
        name: lambda name=name: runner.child("-c", template.format(CODE[name])) for name in names
    }


FORWARD = Case(
    "forward",
    "A forward pass of one row through SmolLM2-135M's shape (6 of 30 layers), without gradients "
    "and cache.",
    "the same weights and ids, rank 8 on all linear layers, logits of the last token; merged "
    "models beside merged ones",
    "base",
    [
        {"threads": "default", "dtype": dtype, "tokens": tokens, "layers": 6}
        for tokens in (1, 256)
        for dtype in DTYPES
    ],
    forward_arms,
    {"tiny": True, "layers": 1, "tokens": 4},
    minutes=10,
)
MIXED = Case(
    "mixed",
    "A token of each of 16 rows that use 8 adapters in one batch, behind 64 tokens; 4 layers.",
    "the same base, adapters and rows; PEFT's `adapter_names` on transformers' cache, a bank on "
    "the server's "
    "slots, and "
    "the base on either",
    "base, transformers' cache",
    [{"threads": "default", "dtype": dtype, "layers": 4, "adapters": 8} for dtype in DTYPES],
    mixed_arms,
    {"tiny": True, "layers": 1, "adapters": 2, "length": 4},
    minutes=4,
)
EXPERTS = Case(
    "experts",
    "A mixture of experts (Qwen3-MoE's shape, 2 layers of 64 experts) with adapters on all "
    "experts: "
    "one token, "
    "and a step of 2 × 256 tokens.",
    "the same weights and ids, rank 8 on both stacks of all layers, transformers' own choice of "
    "how experts are "
    "computed",
    "base",
    [{"threads": "default", "dtype": "bfloat16", "call": call} for call in ("one token", "a step")],
    experts_arms,
    {"tiny": True},
    minutes=9,
)
ENGINE = Case(
    "engine",
    "16 prompts of 128 tokens answered with 17 tokens each, without adapters and without HTTP; 4 "
    "layers.",
    "the same base, prompts and number of tokens, greedy; `generate_batch` is transformers' "
    "continuous batching",
    "transformers, generate",
    [{"threads": "default", "dtype": "bfloat16", "layers": 4, "prompt": 128, "tokens": 17}],
    engine_arms,
    {"tiny": True, "layers": 1, "prompt": 8, "tokens": 3},
    minutes=1.7,
)
IMPORT = Case(
    "import_time",
    "Importing what attaching needs, in fresh interpreters.",
    "the names that wrap a model and its config, loaded (PEFT's are not left to be loaded later)",
    "torch",
    [{"threads": "default"}],
    import_arms,
    {"names": ["torch"]},
    rounds=2,
    minutes=3,
)
CASES = (FORWARD, MIXED, EXPERTS, ENGINE, IMPORT)
