"""lm-eval's client for completions against the server: log-likelihoods and answers are those of its
backend for transformers with the merged model. `LM_EVAL=/path/to/python pytest
tests/serve/test_lm_eval.py`, a Python that has lm-eval[api,hf].
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from tests.support.api_server import listening
from tests.support.service import make_adapter, open_service
from tests.support.tiny import tiny_tokenizer, write_tiny
from transformers import AutoModelForCausalLM

from veneer.tools.merge_checkpoint import merge_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("LM_EVAL"), reason="LM_EVAL names no Python that has lm-eval"
    ),
]

SCRIPT = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

url, base, merged, pairs, prompts = json.load(sys.stdin)
models = {
    "server": LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model="own", tokenizer=base,
        tokenizer_backend="huggingface", batch_size=4, max_length=200, num_concurrent=1,
    ),
    "transformers": HFLM(pretrained=merged, device="cpu", dtype="float32", batch_size=1),
}
scored = [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(pairs)]
until = {"until": ["\\n"], "max_gen_toks": 12, "temperature": 0}
drawn = [Instance("generate_until", {}, (prompt, until), i) for i, prompt in enumerate(prompts)]
results = {
    name: {"scores": model.loglikelihood(scored), "texts": model.generate_until(drawn)}
    for name, model in models.items()
}
print("RESULT" + json.dumps(results))
"""

PAIRS = [
    ("The cat sat on the", " mat"),
    ("2 + 2 =", " 4"),
    ("Grüße aus", " München"),
    ("a", "b"),
    ("x" * 60, "y" * 30),
    ("The cat sat on the", " dog"),
]


def greedy(model, text, count):
    ids = tiny_tokenizer()(text)["input_ids"]
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    answer = tiny_tokenizer().decode(out[0, len(ids) :], skip_special_tokens=True)
    return answer.partition("\n")[0]


def test_lm_eval_measures_what_the_merged_model_says(tmp_path):
    base = write_tiny(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapters" / "own", 3, rank=3, targets="all-linear")
    merge_checkpoint(base, [adapter], tmp_path / "merged", rounding="nearest")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # a continuation that is the greedy one, so that both answers to that question are tested
    pairs = [*PAIRS, ("The", greedy(model, "The", 3))]
    folders = [str(base), str(tmp_path / "merged")]
    with listening(open_service(base, tmp_path / "adapters")) as (url, _):
        done = subprocess.run(
            [os.environ["LM_EVAL"], "-c", SCRIPT],
            input=json.dumps([url, *folders, pairs, ["The cat", "2 + 2"]]),
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"},
        )
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    results = json.loads(done.stdout.rpartition("RESULT")[2])
    server, transformers = results["server"], results["transformers"]
    assert server["texts"] == transformers["texts"]
    for score, wanted in zip(server["scores"], transformers["scores"], strict=True):
        assert score == [pytest.approx(wanted[0], abs=1e-3), wanted[1]]
    assert {is_greedy for _, is_greedy in server["scores"]} == {True, False}
