"""What a base's generation_config.json says of sampling is honoured, or named."""

from __future__ import annotations

import logging

import pytest
from tests.support.api_server import BASE, serving
from tests.support.service import open_service
from tests.support.tiny import tiny_model, tiny_tokenizer

from veneer.errors import ConfigError
from veneer.models.sampling_defaults import SamplingDefaults, sampling_defaults
from veneer.train.generate import continuations, generate


def model_of(**fields):
    model = tiny_model()
    for name, value in fields.items():
        setattr(model.generation_config, name, value)
    return model


def test_what_a_config_says():
    said = sampling_defaults(
        model_of(do_sample=True, temperature=0.6, top_k=20, repetition_penalty=1.1, min_p=0.05)
    )
    assert (said.samples, said.temperature, said.top_k, said.top_p) == (True, 0.6, 20, None)
    assert (said.repetition_penalty, said.further_fields) == (1.1, {"min_p": 0.05})
    neutral = model_of(
        repetition_penalty=1.0, min_p=0.0, num_beams=1, no_repeat_ngram_size=0, suppress_tokens=[]
    )
    assert sampling_defaults(neutral) == sampling_defaults(tiny_model()) == SamplingDefaults()
    assert sampling_defaults(object()) == SamplingDefaults()  # an encoder has none


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("temperature", "hot"), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.5),
     ("top_k", -2), ("top_k", 2.5), ("top_k", True), ("repetition_penalty", 0.0)],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"{field} .*generation_config.json"):
        sampling_defaults(model_of(**{field: value}))


# ---------------------------------------------------------------------------------------------- the
# server


def test_a_request_that_says_nothing_is_sampled_as_the_config_says(tmp_path):
    with serving(tmp_path / "dir") as served, served.http() as http:
        served.service.sampling = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.9)
        for fields, expected in (
            ({}, (0.6, 20, 0.9)),
            ({"temperature": None, "top_k": None}, (0.6, 20, 0.9)),
            ({"temperature": 1, "top_k": 0, "top_p": 1}, (1.0, 0, 1.0)),
            ({"top_k": -1, "temperature": 0}, (0.0, 0, 0.9)),
        ):
            for route, prompt in (
                ("completions", {"prompt": "a"}),
                ("chat/completions", {"messages": HELLO}),
            ):
                answer = http.post(
                    f"/v1/{route}", json={"model": BASE, **prompt, **fields, "max_tokens": 1}
                )
                assert answer.status_code == 200
                sampling = served.engine.seen[-1].sampling
                assert (sampling.temperature, sampling.top_k, sampling.top_p) == expected


HELLO = [{"role": "user", "content": "hello"}]


def test_the_server_reads_the_config_and_names_what_it_does_not_apply(tmp_path, caplog):
    model = model_of(
        do_sample=True, temperature=0.6, top_k=20, repetition_penalty=1.1, no_repeat_ngram_size=3
    )
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.WARNING, "veneer.serve"):
        service = open_service(tmp_path / "base", None)
    service.close()
    assert (service.sampling.temperature, service.sampling.top_k) == (0.6, 20)
    (line,) = [
        record.getMessage()
        for record in caplog.records
        if "generation_config.json" in record.getMessage()
    ]
    assert "no_repeat_ngram_size 3, repetition_penalty 1.1" in line


# ----------------------------------------------------------------------------------------------
# generate


def test_penalties_of_the_config_are_those_of_texts_and_not_of_rollouts():
    """What GRPO draws are samples of the model that it trains, whatever is good for a chat."""
    plain, changed, tokenizer = (
        tiny_model(),
        model_of(repetition_penalty=50.0, num_beams=4),
        tiny_tokenizer(),
    )
    options = {"max_new_tokens": 20, "temperature": 0.0}
    assert continuations(changed, tokenizer, [[5, 6]], **options) == continuations(
        plain, tokenizer, [[5, 6]], **options
    )
    assert changed.generation_config.repetition_penalty == 50.0
    assert generate(changed, tokenizer, ["ab"], **options) != generate(
        plain, tokenizer, ["ab"], **options
    )
