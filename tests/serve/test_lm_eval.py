"""lm-eval's own client for completions against the server: log-likelihoods and answers are those of the
merged model. `LM_EVAL=/path/to/python pytest tests/serve/test_lm_eval.py`, a Python that has lm-eval.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from tests.support.api_server import listening
from tests.support.service import make_adapter, open_service
from tests.support.tiny import tiny_model, tiny_tokenizer, write_tiny

import veneer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("LM_EVAL"), reason="LM_EVAL names no Python that has lm-eval"
    ),
]

SCRIPT = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

url, tokenizer, pairs, prompts = json.load(sys.stdin)
model = LocalCompletionsAPI(
    base_url=f"{url}/v1/completions", model="own", tokenizer=tokenizer, tokenizer_backend="huggingface",
    batch_size=4, max_length=200, num_concurrent=1,
)
scored = [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(pairs)]
until = {"until": ["\\n"], "max_gen_toks": 12, "temperature": 0}
drawn = [Instance("generate_until", {}, (prompt, until), i) for i, prompt in enumerate(prompts)]
result = {"scores": model.loglikelihood(scored), "texts": model.generate_until(drawn)}
print("RESULT" + json.dumps(result))
"""

PAIRS = [
    ("The cat sat on the", " mat"),
    ("2 + 2 =", " 4"),
    ("Grüße aus", " München"),
    ("a", "b"),
    ("x" * 60, "y" * 30),
    ("The cat sat on the", " dog"),
]


def likelihoods(model, pairs):
    """(log p of the continuation, whether it is the greedy one), in float64."""
    tokenizer, found = tiny_tokenizer(), []
    model = model.double()
    for context, continuation in pairs:
        first, second = (tokenizer(text)["input_ids"] for text in (context, continuation))
        with torch.inference_mode():
            logits = model(torch.tensor([first + second])).logits[0, len(first) - 1 : -1]
        rows = logits.log_softmax(-1)
        chosen = rows.gather(-1, torch.tensor(second)[:, None])
        found.append((float(chosen.sum()), logits.argmax(-1).tolist() == second))
    return found


def greedy(model, text, count):
    ids = tiny_tokenizer()(text)["input_ids"]
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    answer = tiny_tokenizer().decode(out[0, len(ids) :], skip_special_tokens=True)
    return answer.partition("\n")[0]


def test_lm_eval_measures_what_the_merged_model_says(tmp_path):
    base = write_tiny(tmp_path / "base")
    make_adapter(tmp_path / "adapters" / "own", 3, rank=3, targets="all-linear")
    model = tiny_model()
    veneer.load(model, tmp_path / "adapters" / "own").merge()
    # a continuation that is the greedy one, so that both answers to that question are tested
    pairs = [*PAIRS, ("The", greedy(model, "The", 3))]
    with listening(open_service(base, tmp_path / "adapters")) as (url, _):
        done = subprocess.run(
            [os.environ["LM_EVAL"], "-c", SCRIPT],
            input=json.dumps([url, str(base), pairs, ["The cat", "2 + 2"]]),
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"},
        )
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("RESULT")[2])
    texts = [greedy(model, prompt, 12) for prompt in ("The cat", "2 + 2")]
    assert found["texts"] == texts
    for (logprob, is_greedy), wanted in zip(
        found["scores"], likelihoods(model, pairs), strict=True
    ):
        assert logprob == pytest.approx(wanted[0], abs=1e-3)
        assert is_greedy == wanted[1]
    assert any(is_greedy for _, is_greedy in found["scores"])
