"""Adapters with invocation tokens act on the tokens from the last occurrence of these on, in every
kind of call, as PEFT's aLoRA does."""

from __future__ import annotations

import copy
import json
import pickle
from functools import cache

import peft
import pytest
import torch
import transformers
from tests.support.tiny import write_tiny
from tests.support.toys import error
from torch import nn

import veneer
from veneer import context
from veneer.attach.invocation import find_starts
from veneer.errors import AdapterError, ConfigError, MergeError, SelectionError, TargetError
from veneer.models.load import load_base
from veneer.tools.compose import compose
from veneer.tools.convert import convert
from veneer.tools.merge_checkpoint import merge_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # PEFT's own, and that its adapters carry no fingerprint

_SIZES = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_GROUPED = {**_SIZES, "intermediate_size": 24, "num_key_value_heads": 1}
CONFIGS = {
    "llama": (transformers.LlamaConfig, _GROUPED),
    "qwen2": (transformers.Qwen2Config, _GROUPED),
    "opt": (transformers.OPTConfig, {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "gpt2": (transformers.GPT2Config, {
        **_SIZES, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }),
}  # fmt: skip
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "o_proj", "up_proj"],
    "opt": ["q_proj", "k_proj", "out_proj"],  # fc1 gets all tokens along one axis, where PEFT fails
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}

#: rows of tokens, in which 1 2 invokes "a" and 3 invokes "b"; 0 is padding
ROWS = {
    "within": [[5, 6, 1, 2, 7, 8], [9, 4, 6, 1, 2, 5]],
    "at the first token": [[1, 2, 5, 6, 7, 8], [1, 2, 4, 4, 9, 9]],
    "at the end": [[5, 6, 7, 8, 1, 2], [9, 9, 4, 5, 1, 2]],
    "twice": [[1, 2, 7, 1, 2, 8], [1, 2, 1, 2, 5, 6]],
    "in part": [[5, 2, 1, 6, 7, 1], [2, 2, 2, 1, 1, 5]],
    "in some rows": [[5, 6, 1, 2, 7, 8], [5, 6, 7, 8, 9, 4], [1, 2, 9, 8, 7, 6]],
    "padded on the left": [[0, 0, 5, 1, 2, 7], [0, 6, 9, 4, 5, 8], [5, 1, 2, 9, 8, 7]],
    "padded on the right": [[5, 1, 2, 7, 0, 0], [6, 9, 4, 5, 8, 0], [5, 1, 2, 9, 8, 7]],
}


def batch_of(name):
    ids = torch.tensor(ROWS[name])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def fresh(kind):
    config, fields = CONFIGS[kind]
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(config(**fields)).double().eval()


def by_peft(kind, folder, **fields):
    """A folder of PEFT's adapter with noise in each number."""
    torch.manual_seed(7)
    options = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS[kind], "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(fresh(kind), peft.LoraConfig(**{**options, **fields}))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(folder)
    return folder


@cache
def folders(kind, root):
    """Folders of PEFT's adapters: "a" and "b" have invocation tokens, "plain" has none."""
    tokens = {"a": [1, 2], "b": [3], "plain": None}
    return {
        name: by_peft(
            kind, root / kind / name, alora_invocation_tokens=ids, r=2 + number, lora_alpha=4
        )
        for number, (name, ids) in enumerate(tokens.items())
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("alora")


@pytest.fixture
def both(root):
    """A function that gives PEFT's model and ours with the same adapters."""

    def load(kind, *names):
        paths = folders(kind, root)
        theirs = peft.PeftModel.from_pretrained(fresh(kind), paths[names[0]], names[0])
        ours = fresh(kind)
        for name in names[1:]:
            theirs.load_adapter(paths[name], name)
        for name in names:
            veneer.load(ours, paths[name], name=name)
        return theirs.double().eval(), ours

    return load


# ---- as PEFT -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_peft(both, kind, rows):
    theirs, ours = both(kind, "a")
    batch = batch_of(rows)
    with torch.no_grad():
        expected, logits = theirs(**batch).logits, ours(**batch).logits
        with veneer.use(ours, None):
            base = ours(**batch).logits
    tokens = batch["attention_mask"].bool()
    assert error(logits[tokens], expected[tokens]) < 1e-9
    starts = find_starts(batch["input_ids"], [1, 2])
    for row, start in enumerate(starts):
        assert torch.equal(logits[row, :start], base[row, :start])
        if start is not None:
            assert error(logits[row, start:], base[row, start:]) > 1e-3


@pytest.mark.parametrize("rows", ["within", "at the end", "twice", "in part", "padded on the left"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_generated_tokens_are_those_of_peft(both, kind, rows):
    theirs, ours = both(kind, "a")
    options = {**batch_of(rows), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected, answer = theirs.generate(**options), ours.generate(**options)
    assert torch.equal(answer.sequences, expected.sequences)
    assert error(torch.stack(answer.logits), torch.stack(expected.logits)) < 1e-9


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_of_several_adapters_are_those_of_peft(both, kind):
    theirs, ours = both(kind, "a", "b", "plain")
    row = [5, 1, 2, 3, 7, 8]
    names = ["a", None, "b", "plain", "a"]
    batch = {"input_ids": torch.tensor([row, row, row, row, [5, 3, 6, 7, 8, 9]])}
    options = {**batch, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    theirs_names = [name or "__base__" for name in names]
    with torch.no_grad(), veneer.use(ours, names):
        expected = theirs(**batch, adapter_names=theirs_names).logits
        assert error(ours(**batch).logits, expected) < 1e-9
        expected = theirs.generate(**options, adapter_names=theirs_names)
        assert torch.equal(ours.generate(**options), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_are_those_of_peft(both, kind, checkpointing):
    theirs, ours = both(kind, "a")
    batch = batch_of("padded on the right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for model in (theirs, ours):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or ".veneer." in name)
        model(**batch, labels=labels, use_cache=False).loss.backward()
    gradients = [
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad]
        for model in (theirs, ours)
    ]
    assert error(torch.cat(gradients[1]), torch.cat(gradients[0])) < 1e-9
    assert torch.cat(gradients[0]).norm() > 1e-3


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_saved_adapter_is_the_same_for_peft(root, tmp_path, kind):
    model = fresh(kind)
    config = veneer.LoraConfig(rank=2, targets=TARGETS[kind], invocation_tokens=[1, 2])
    handle = veneer.attach(model, config)
    for parameter in handle.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    path = handle.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(fresh(kind), path).double().eval()
    assert theirs.peft_config["default"].alora_invocation_tokens == [1, 2]
    card = (path / "README.md").read_text()
    assert "from its invocation `[1, 2]` on" in card
    assert "vLLM cannot serve it" in card
    again, batch = fresh(kind), batch_of("in some rows")
    loaded = veneer.load(again, path)
    assert loaded.config.invocation_tokens == (1, 2)
    with torch.no_grad():
        expected = model(**batch).logits
        assert error(theirs(**batch).logits, expected) < 1e-9
        assert torch.equal(again(**batch).logits, expected)


def test_the_config_of_peft_is_read():
    theirs = peft.LoraConfig(
        target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[2, 1]
    )
    assert veneer.LoraConfig.from_peft(theirs).invocation_tokens == (2, 1)


# ---- calls with a cache, beams and copies --------------------------------------------------------


def _cache_of(output):
    return getattr(output, "cache", None) or output.past_key_values


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cache_knows_the_invocation_that_it_holds(both, kind, cut):
    """Cut before, within and behind the invocation of either row."""
    _, model = both(kind, "a")
    ids = torch.tensor([[5, 6, 1, 2, 7, 8], [1, 2, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
    with torch.no_grad():
        expected = model(ids).logits
        first = model(ids[:, :cut], use_cache=True)
        cached = copy.deepcopy(_cache_of(first))
        rest = model(ids[:, cut:], past_key_values=cached)
    logits = torch.cat([first.logits, rest.logits], 1)
    # the first of two tokens cannot know that it begins an invocation
    certain = torch.ones(3, 6, dtype=torch.bool)
    certain[0, 2:], certain[1] = cut != 3, cut != 1
    assert error(logits[certain], expected[certain]) < 1e-9


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_of_a_row_are_invoked_as_their_prompt(both, kind, options):
    _, model = both(kind, "a")
    batch = batch_of("padded on the left")
    options = {**options, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    answers = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, **options, use_cache=False), answers)
    count = len(answers) // len(batch["input_ids"])
    for row in range(len(batch["input_ids"])):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        alone = model.generate(**alone, **options)
        assert torch.equal(alone, answers[row * count : (row + 1) * count])


def test_a_generated_invocation_changes_nothing(both):
    """As in PEFT: a row is the base's if its prompt was, whatever is generated."""
    theirs, model = both("llama", "b")
    ids = torch.tensor([[5, 6, 7]])
    force = transformers.LogitsProcessorList([lambda ids, scores: _only(scores, 3, ids)])
    options = {"max_new_tokens": 5, "logits_processor": force, "pad_token_id": 0}
    for use_cache in (True, False):
        answer = model.generate(ids, **options, use_cache=use_cache)
        assert 3 in answer[0].tolist()
        with veneer.use(model, None):
            assert torch.equal(model.generate(ids, **options), answer)
    assert torch.equal(theirs.generate(input_ids=ids, **options), answer)


def _only(scores, token, ids):
    """Scores of which this token is the first that is generated behind a prompt of three."""
    return (
        scores
        if ids.shape[1] > 3
        else torch.full_like(scores, -1e9).index_fill(1, torch.tensor([token]), 0.0)
    )


def test_generation_goes_on_from_a_cache(both):
    _, model = both("llama", "a")
    ids = torch.tensor([[5, 1, 2, 6, 7, 8, 9]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    with torch.no_grad():
        cached = _cache_of(model(ids[:, :5], use_cache=True))
    assert torch.equal(model.generate(ids, past_key_values=cached, **options), expected)
    with torch.no_grad(), veneer.use(model, None):
        cached = _cache_of(model(ids[:, :1], use_cache=True))
    assert torch.equal(model.generate(ids, past_key_values=cached, **options), expected)


def test_chunks_of_a_prompt_are_one_prompt(both):
    _, model = both("llama", "a")
    ids = torch.tensor([[5, 6, 1, 2, 7, 8, 9]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=3, **options), expected)


@pytest.mark.parametrize("keep", [2, torch.tensor([0, 3, 5])])
def test_a_head_that_gets_some_tokens_alone(keep):
    model = fresh("llama")
    config = veneer.LoraConfig(rank=2, targets=["lm_head", "q_proj"], invocation_tokens=[1, 2])
    for parameter in veneer.attach(model, config).parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    ids = torch.tensor([[5, 6, 1, 2, 7, 8], [9, 9, 5, 1, 2, 6]])
    with torch.no_grad():
        expected = model(ids).logits
        expected = expected[:, -keep:] if isinstance(keep, int) else expected[:, keep]
        assert error(model(ids, logits_to_keep=keep).logits, expected) < 1e-9


def test_a_layer_that_gets_all_tokens_along_one_axis():
    model = fresh("opt")
    config = veneer.LoraConfig(rank=2, targets=["fc1", "fc2"], invocation_tokens=[1, 2])
    for parameter in veneer.attach(model, config).parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    ids = torch.tensor(ROWS["in some rows"])
    with torch.no_grad():
        expected = torch.cat([model(row[None]).logits for row in ids])
        assert error(model(ids).logits, expected) < 1e-9
        with veneer.use(model, None):
            assert error(model(ids).logits, expected) > 1e-3


def test_the_body_alone_finds_them_too(both):
    _, model = both("llama", "a")
    ids = torch.tensor([[5, 6, 1, 2, 7, 8]])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        assert error(model.lm_head(hidden), model(ids).logits) < 1e-9


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_finds_them_and_detach_leaves_nothing(both, copied):
    _, model = both("llama", "a")
    before = {name: dict(module.__dict__) for name, module in fresh("llama").named_modules()}
    ids = torch.tensor([[5, 6, 1, 2, 7, 8]])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected, twin = model.generate(ids, **options), copied(model)
    assert torch.equal(twin.generate(ids, **options), expected)
    veneer.detach(twin)
    assert torch.equal(model.generate(ids, **options), expected)
    assert not torch.equal(twin(ids).logits, model(ids).logits)
    for name, module in twin.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        for attribute in module.__dict__:
            assert "_hooks" not in attribute or not module.__dict__[attribute], attribute


def test_two_calls_before_one_backward_are_recomputed_each_with_its_own_tokens(both):
    _, model = both("llama", "a")
    rows = [torch.tensor([[5, 6, 1, 2, 7, 8]]), torch.tensor([[1, 2, 5, 6, 7, 8]])]
    model.train()

    def gradient():
        model.zero_grad()
        sum(model(ids, use_cache=False).logits.square().mean() for ids in rows).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".veneer." in name)
    expected = gradient()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert error(gradient(), expected) < 1e-9
    function = model.model.layers[0]._gradient_checkpointing_func
    veneer.detach(model)
    assert model.model.layers[0]._gradient_checkpointing_func is function.function


def test_a_row_without_invocation_gives_a_gradient_of_zero():
    model = fresh("llama")
    config = veneer.LoraConfig(rank=2, targets=["q_proj"], dropout=0.5, invocation_tokens=[1, 2])
    handle = veneer.attach(model.train(), config)
    model(torch.tensor([[5, 6, 7, 8]])).logits.sum().backward()
    assert all(not parameter.grad.any() for parameter in handle.parameters())


def test_an_error_in_a_call_leaves_no_trace(both):
    _, model = both("llama", "a")
    ids = torch.tensor([[5, 6, 1, 2, 7, 8]])
    expected = model(ids).logits
    with pytest.raises(IndexError):
        model(torch.tensor([[5, 99]]))
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(SelectionError, match="outside of a call of its model"):
        model.model.layers[0].self_attn.q_proj(torch.zeros(1, 4, 16).double())


def test_an_interrupted_call_leaves_no_trace(both):
    _, model = both("llama", "a")
    ids, other_ids = torch.tensor([[5, 6, 1, 2, 7, 8]]), torch.tensor([[1, 2, 5, 6, 7, 8]])
    expected = model(other_ids).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), veneer.use(model, "a"):
        model(ids)
    assert context.current.invoked_calls == context.current.selection == {}
    with pytest.raises(KeyboardInterrupt):
        model(ids)
    hook.remove()
    with veneer.use(model, "a"):
        assert torch.equal(model(other_ids).logits, expected)
    assert torch.equal(model(other_ids).logits, expected)
    assert context.current.invoked_calls == {}


def test_a_check_reaches_every_change():
    model = fresh("llama").float()
    config = veneer.LoraConfig(rank=2, targets="all-linear", invocation_tokens=[1, 2])
    veneer.attach(model, config)
    report = veneer.check(model, {"input_ids": torch.tensor([[5, 6, 1, 2, 7, 8]])})
    assert (report.compared, len(report.weights)) == (0, 14)


@pytest.mark.parametrize("kind", ["nf4", "int8", "bf16"])
def test_packed_and_narrow_weights_are_changed_from_the_invocation_on(tmp_path, kind):
    """The reference: the base fills a cache, and a plain adapter goes on from it."""
    if kind != "bf16":
        pytest.importorskip("bitsandbytes")
    base = write_tiny(tmp_path / "base", hidden_size=64, intermediate_size=128)
    options = {"precision": "bf16"} if kind == "bf16" else {"quantize": kind, "precision": "fp32"}
    model = load_base(base, device="cpu", **options).model
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    adapters = [
        veneer.attach(model, veneer.LoraConfig(rank=2, targets=targets, **fields), name)
        for name, fields in (("invoked", {"invocation_tokens": [1, 2]}), ("plain", {}))
    ]
    for parameters in zip(*(adapter.parameters() for adapter in adapters), strict=True):
        parameters[0].data.add_(torch.randn_like(parameters[0]) * 0.3)
        parameters[1].data.copy_(parameters[0])
    ids = torch.tensor([[15, 16, 17, 1, 2, 18, 19]])
    with torch.no_grad():
        with veneer.use(model, None):
            first = model(ids[:, :3], use_cache=True)
        with veneer.use(model, "plain"):
            rest = model(ids[:, 3:], past_key_values=_cache_of(first)).logits
            assert error(model(ids).logits[:, 3:], rest) > 0.1
        with veneer.use(model, "invoked"):
            logits = model(ids).logits
    # int8 rounds the inputs of all tokens of a call together
    tolerance = 1e-3 if kind == "nf4" else 0.03
    assert error(logits[:, :3], first.logits) < tolerance
    assert error(logits[:, 3:], rest) < tolerance


@pytest.mark.slow
def test_a_compiled_model_equals_the_plain_one(both):
    _, model = both("llama", "a")
    compiled = torch.compile(model, backend="eager")
    for ids in ([[5, 6, 1, 2, 7, 8]], [[1, 2, 5, 6, 7, 8]], [[5, 6, 7, 8, 9, 4]]):
        with torch.no_grad():
            ids = torch.tensor(ids)
            assert error(compiled(ids).logits, model(ids).logits) < 1e-9


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"variant": "dora"}, "variant='dora' with invocation_tokens"),
        ({"variant": "vera"}, "variant='vera' with invocation_tokens"),
        ({"bias": "all"}, "bias='all' with invocation_tokens"),
        ({"train_also": "lm_head"}, r"train_also=\('lm_head',\) with invocation_tokens"),
        ({"trainable_tokens": [3]}, r"trainable_tokens=\(3,\) with invocation_tokens"),
        ({"invocation_tokens": [1, -2]}, r"invocation_tokens=\(1, -2\)"),
        ({"invocation_tokens": "<call>"}, "invocation_tokens='<call>'"),
    ],
)
def test_a_config_that_would_change_other_tokens_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        veneer.LoraConfig(**{"invocation_tokens": [1, 2], **fields})


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(20, 6), nn.Conv1d(6, 6, 3, padding=1)
        self.rnn, self.head = nn.GRU(6, 6, batch_first=True), nn.Linear(6, 20)

    def forward(self, input_ids):
        return self.head(self.rnn(self.conv(self.embed(input_ids).mT).mT)[0])


@pytest.mark.parametrize("layer", ["embed", "conv", "rnn"])
def test_layers_that_are_no_linear_ones_are_refused(layer):
    config = veneer.LoraConfig(rank=2, targets=[layer, "head"], invocation_tokens=[1, 2])
    with pytest.raises(TargetError, match=f"'{layer}', a .*with invocation_tokens.*linear layers"):
        veneer.attach(Convolved(), config)


def test_a_model_without_input_ids_is_refused():
    config = veneer.LoraConfig(rank=2, targets="all", invocation_tokens=[1, 2])
    with pytest.raises(TargetError, match="whose forward takes no input_ids"):
        veneer.attach(nn.Sequential(nn.Linear(4, 4)), config)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=20, **sizes))
    config = veneer.LoraConfig(rank=2, targets=["q"], invocation_tokens=[1, 2])
    with pytest.raises(TargetError, match="which has an encoder"):
        veneer.attach(model, config)


def test_calls_that_hide_the_tokens_are_refused(both):
    _, model = both("llama", "a")
    ids = torch.tensor([[5, 6, 1, 2, 7, 8]])
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(SelectionError, match=r"no input_ids, of adapter 'a'.*inputs_embeds"):
        model(inputs_embeds=embeds)
    with pytest.raises(SelectionError, match="no input_ids"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)
    with veneer.use(model, None):
        model(inputs_embeds=embeds)
    with pytest.raises(SelectionError, match="several sequences in one row"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


def test_what_applies_to_every_token_is_refused(both, root, tmp_path):
    _, model = both("llama", "a", "plain")
    with pytest.raises(
        MergeError, match=r"merge of 'a', which acts from its invocation tokens \[1, 2\]"
    ):
        veneer.merge(model, "a")
    with pytest.raises(SelectionError, match="a blend with 'a'"):
        veneer.use(model, {"a": 0.5, "plain": 0.5})
    paths = folders("llama", root)
    with pytest.raises(AdapterError, match="for a combination of adapters"):
        compose([paths["a"], paths["plain"]], tmp_path / "sum")
    with pytest.raises(AdapterError, match="for format 'kohya'"):
        convert(paths["a"], tmp_path / "file.safetensors", to="kohya")
    fresh("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match="for a merge"):
        merge_checkpoint(tmp_path / "base", [paths["a"]], tmp_path / "merged")


@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}]
)
def test_a_folder_that_changes_other_tokens_too_is_refused(tmp_path, fields):
    path = by_peft("llama", tmp_path / "theirs", alora_invocation_tokens=[1, 2])
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(AdapterError, match=f"{next(iter(fields))}=.*alora_invocation_tokens"):
        veneer.load(fresh("llama"), path)
