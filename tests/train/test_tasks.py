"""Every task of `veneer train` learns, resumes bit for bit, says in its adapter what `veneer eval`
must know, and tells what is wrong with its rows before it reads weights."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.support.forked import printed
from tests.support.runs import Crash, same
from tests.support.tasks import CASES, config_of
from tests.support.tiny import tiny_model, tiny_tokenizer, write_rows

import veneer
from veneer.errors import ConfigError, DataError
from veneer.train import data
from veneer.train.config import make_config, task_names
from veneer.train.evaluate import evaluate_task, task_from_record
from veneer.train.run import fit
from veneer.train.tasks import TASKS, Rows
from veneer.train.tasks._base import truncate_ids
from veneer.train.tasks._media import read_audio, read_image
from veneer.train.tokens import tokenise
from veneer.train.trainer import TaskTrainer

# : how low an evaluation's loss must fall, as a share of the first step's; None: rewards rise
# instead
LEARNT = {
    "classify": 0.5, "classify words": 0.5, "classify images": 0.3, "classify with a decoder": 0.5, "dpo": 0.5,
    "orpo": 0.8, "kto": 0.7, "reward": 0.5, "grpo": None, "embed": 0.8, "embed by cosine": 0.8, "seq2seq": 0.95,
    "speech": 0.95,
}  # fmt: skip


def cases(fast: set[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in CASES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


def logged(result: Any, name: str) -> list[float]:
    lines = [json.loads(line) for line in (result.output / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_names_are_those_of_the_files() -> None:
    assert task_names() == sorted(TASKS.names())
    with pytest.raises(
        ConfigError, match=r"no such task \(nearest: 'classify'\); expected one of classify, dpo"
    ):
        make_config({"base": "b", "data": "d", "output": "o", "task": "clasify"})


@pytest.mark.parametrize("name", cases({"classify images", "dpo", "speech"}))
def test_a_task_learns_and_its_adapter_is_measured_alike(name: str, folder: Path) -> None:
    config = config_of(name, folder, "learns " + name, dropout=0.0, save_every=100, eval_every=100)
    result = fit(config, quiet=True)
    share = LEARNT[name]
    if share is None:
        rewards = logged(result, "reward")
        assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3
    else:
        assert result.eval_losses[-1][1] < share * result.losses[0]
    assert result.metrics["eval_loss"] == result.eval_losses[-1][1]

    # whoever has the base, the adapter and the data measures the same
    record = veneer.adapter_files.read(result.adapter).metadata["provenance"]["task"]
    assert "reward" not in record
    extra = {"reward": config.reward} if name == "grpo" else {}
    task = task_from_record(
        record, config.base, config.data, {"precision": "fp32"}, eval_fraction=0.25, **extra
    )
    task.open_base()
    prepared = task.prepare()
    model: Any = task.load().model
    veneer.load(model, result.adapter)
    found = evaluate_task(task, model, prepared.evaluation, batch_size=8)
    assert found["loss"] == pytest.approx(result.eval_losses[-1][1], rel=1e-5, abs=1e-6)
    measures = {
        key: value
        for key, value in result.metrics.items()
        if key.removeprefix("eval_") in task.measures
    }
    assert {f"eval_{key}": value for key, value in found.items() if key in task.measures} == {
        **measures, **{key: pytest.approx(value, abs=1e-4) for key, value in result.metrics.items()
                       if key.startswith("eval_") and key != "eval_loss"}
    }  # fmt: skip


@pytest.mark.parametrize("name", cases({"classify words", "grpo"}))
def test_a_crash_and_a_resume_change_nothing(name: str, folder: Path) -> None:
    """Dropout, drawn answers and batches in their order are all the same again."""
    own: dict[str, Any] = {"check": False, "max_steps": 6, "save_every": 2, "eval_every": 3}
    whole = fit(config_of(name, folder, "whole " + name, **own), quiet=True)
    config = config_of(name, folder, "crashed " + name, **own)
    with pytest.raises(ZeroDivisionError):
        fit(config, callbacks=[Crash(5)], quiet=True)
    resumed = fit(config, quiet=True)
    same(whole, resumed)
    assert len(whole.losses) == 6


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("grpo", [{"prompt": letter, "wanted": letter} for letter in "ab"]),
        (
            "classify with a decoder",
            [{"text": text, "label": len(text)} for text in ("a", "a longer text")],
        ),
    ],
)
def test_a_check_sees_tokens_that_look_at_others(
    name: str, rows: list[Any], folder: Path, tmp_path: Path
) -> None:
    """Of a row of one token queries and keys get no gradient, and the check would accuse them of
    it."""
    data, own = (
        write_rows(tmp_path / "rows.jsonl", rows * 4),
        {"max_steps": 1, "eval_fraction": 0.0},
    )
    assert (
        fit(config_of(name, folder, "checked " + name, data=str(data), **own), quiet=True).steps
        == 1
    )


def test_operations_are_counted_as_transformers_counts_them() -> None:
    """It walks the whole model for each batch."""
    from transformers import Trainer

    trainer: Any = object.__new__(TaskTrainer)
    trainer.model = tiny_model()
    for shape in ((2, 3), (4, 7)):
        batch = {"input_ids": torch.zeros(shape, dtype=torch.long)}
        assert trainer.floating_point_ops(batch) == Trainer.floating_point_ops(trainer, batch) > 0
    assert trainer.floating_point_ops({"pixel_values": torch.zeros(1)}) == 0


@pytest.mark.slow
def test_trl_is_loaded_for_sft_alone() -> None:
    code = "import sys, veneer.train.run, veneer.train.find_rate; print('trl' in sys.modules)"
    assert printed(code).splitlines()[-1] == "False"


@pytest.mark.parametrize("name", ["classify words", "dpo"])
def test_accumulated_batches_are_one(name: str, folder: Path) -> None:
    """Also where batches differ in their items: the loss is a mean over all of them."""
    own: dict[str, Any] = {
        "check": False,
        "max_steps": 2,
        "dropout": 0.0,
        "eval_fraction": 0.0,
        "save_every": 100,
    }
    one = fit(config_of(name, folder, "one " + name, batch_size=8, **own), quiet=True)
    two = fit(config_of(name, folder, "two " + name, batch_size=4, grad_accum=2, **own), quiet=True)
    if name == "classify words":  # BERT's own dropout differs
        assert two.losses[0] == pytest.approx(one.losses[0], rel=0.1)
    else:
        assert two.losses == pytest.approx(one.losses, rel=1e-4)


@pytest.mark.parametrize(
    "name", ["dpo", pytest.param("classify with a decoder", marks=pytest.mark.slow)]
)
def test_a_quantised_base(name: str, folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    own: dict[str, Any] = {"quantize": "int8", "max_steps": 12, "dropout": 0.0, "check": False}
    result = fit(config_of(name, folder, "packed " + name, **own), quiet=True)
    assert result.losses[-1] < 0.8 * result.losses[0]


def test_a_reference_is_the_base_and_takes_no_memory(folder: Path) -> None:
    config = config_of("dpo", folder)
    task = TASKS["dpo"](config)
    task.open_base()
    rows: Rows = task.prepare().train
    model: Any = task.load().model
    before = sum(parameter.numel() for parameter in model.parameters())
    veneer.attach(model, veneer.LoraConfig(rank=2))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    found = task.loss(model.train(), task.collate(rows.rows[:4]))
    assert float(found.total.detach()) == pytest.approx(
        4 * torch.tensor(2.0).log().item(), rel=1e-6
    )  # B is zero: no difference
    found.total.backward()
    assert model.training
    assert sum(parameter.numel() for parameter in model.parameters()) == before + trained


TURN = [{"role": "user", "content": "b"}]
CHAT_ANSWER = [*TURN, {"role": "assistant", "content": "c"}]
MIXED = "line 2 holds lists of messages, but line 1 holds text"
WRONG: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], str]] = {
    "a column": ("classify", {}, [{"text": "a", "lable": 1}], r"no column 'label' \(nearest: 'lable'\)"),
    "no kind": ("classify", {}, [{"sentence": "a", "label": 1}], r"--columns text=sentence,label=intent"),
    "one label": ("classify", {}, [{"text": "a", "label": 1}] * 4, "one label alone, '1'"),
    "a fraction": ("classify", {}, [{"text": "a", "label": 0.5}], "the label 0.5"),
    "a part": ("dpo", {"columns": "better=a"}, [{"chosen": "a"}], "the part 'better'"),
    "words and labels": ("classify words", {}, [{"words": ["a"], "labels": [1, 2]}], "1 words and 2 labels"),
    "labels in a text": ("classify words", {}, [{"words": ["a", "b"], "labels": "AB"}], "line 1: labels are 'AB'"),
    "one label for words": ("classify words", {}, [{"words": ["a"], "labels": 3}], "line 1: labels are 3"),
    "no labels": ("classify words", {}, [{"words": ["a"], "labels": []}], r"line 1: labels are \[\]"),
    "an image": ("classify images", {}, [{"image": [1, 2], "label": i} for i in (1, 2)], "an image of shape"),
    "a file": ("classify images", {}, [{"image": "no.png", "label": i} for i in (1, 2)], "no image at no.png"),
    "nothing": ("dpo", {}, [{"prompt": "a", "chosen": " b", "rejected": None}], "holds nothing in 'rejected'"),
    "two forms": ("dpo", {}, [{"prompt": "a", "chosen": TURN, "rejected": "c"}], "lists of"),
    "a chat": ("dpo", {}, [dict.fromkeys(("chosen", "rejected"), x) for x in ("a", CHAT_ANSWER)], MIXED),
    "a text": (
        "dpo", {}, [dict.fromkeys(("chosen", "rejected"), x) for x in (CHAT_ANSWER, "a")],
        "line 2 holds text, but line 1 holds lists of messages",
    ),
    "a judged chat": ("kto", {}, [{"prompt": x, "completion": x, "label": True} for x in ("a", TURN)], MIXED),
    "a verdict": ("kto", {}, [{"prompt": "a", "completion": " b", "label": "good"}], "label is 'good'"),
    "alone": ("kto", {"batch_size": 1}, [{"prompt": "a", "completion": " b", "label": True}], "kto with batch_size 1"),
    "a score": ("embed by cosine", {}, [{"anchor": "a", "positive": "b", "label": 3}], "label is 3"),
    "both": ("embed", {}, [{**dict.fromkeys(("anchor", "positive", "negative"), "a"), "label": 1}], "both `negative`"),
    "no text": ("seq2seq", {}, [{"prompt": "a", "completion": ""}], "completion is ''"),
    "a rate": ("speech", {}, [{"audio": {"array": [0.1], "sampling_rate": 8000}, "text": "a"}], "8000 samples"),
    "too long a sound": ("speech", {}, [{"audio": [0.1] * 24000, "text": "a"}], "1.5 s of audio"),
    "too long": ("dpo", {"max_length": 5}, [{"prompt": "a" * 9, "chosen": " b", "rejected": " c"}], "--max-length"),
    "no room": ("grpo", {"answer_tokens": 300}, [{"prompt": "a"}], "room for a prompt"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_before_weights_are_read(
    name: str, folder: Path, tmp_path: Path
) -> None:
    case, changes, rows, message = WRONG[name]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    config = config_of(case, folder, data=str(file), eval_fraction=0.0, **changes)
    task = TASKS[config.task](config)
    task.open_base()
    task.load = lambda: pytest.fail("the weights were read")  # type: ignore[method-assign]
    with pytest.raises((ConfigError, DataError), match=message):
        task.prepare()


@pytest.mark.parametrize(
    ("task", "base", "message"),
    [("dpo", "bert", "an encoder"), ("seq2seq", "llama", "an encoder with a decoder")],
)
def test_a_base_of_another_kind_is_refused(
    task: str, base: str, message: str, folder: Path
) -> None:
    for name in ("embed", "dpo"):
        config_of(name, folder)
    made = config_of("dpo", folder, "refused", base=str(folder / base), task=task)
    with pytest.raises(ConfigError, match=message):
        fit(made, quiet=True)
    assert not made.output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "grpo", "reward": []}, "needs reward"),
        ({"task": "dpo", "reward": ["a.py:f"]}, "reward needs task grpo"),
        ({"task": "dpo", "packing": True}, "packing given for task dpo; expected task sft"),
        (
            {"task": "kto", "prompt_column": "question", "completion_only": False},
            "prompt_column, completion_only given for task kto; expected task sft",
        ),
        ({"columns": "a"}, "PART=COLUMN"),
        ({"columns": "a=b"}, "columns is for the other tasks"),
    ],
)
def test_settings_that_do_not_agree(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config({"base": "b", "data": "d", "output": "o", **changes})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/none.py:f", "no such file"),
        ("{}/r.py:g", "no function 'g'"),
        ("{}/r.py:text", "no list of numbers"),
        ("{}/r.py:few", "8 finite numbers"),
        ("{}/r.py:nan", "8 finite numbers"),
        ("{}/r.py:words", "no list of numbers"),
    ],
)
def test_a_reward_function_that_is_wrong(
    spec: str, message: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.py").write_text(
        "def text(completions): return ['a'] * len(completions)\n"
        "def few(prompts): return [1.0]\n"
        "def nan(**given): return [float('nan')] * len(given['prompts'])\n"
        "def words(completion_ids): return [[]] * len(completion_ids)\n"
    )
    config = config_of("grpo", folder, reward=[spec.format(tmp_path)])
    task: Any = TASKS["grpo"](config)
    task.open_base()
    with pytest.raises((ConfigError, DataError), match=message):
        rows = task.prepare().train.rows[:8]
        task.rewards(rows, [[5, 6]] * 8)


def test_a_reward_function_gets_the_columns_of_all_rows(folder: Path, tmp_path: Path) -> None:
    """Also if the first row of a batch lacks one."""
    (tmp_path / "r.py").write_text(
        "def given(wanted): return [float(value is not None) for value in wanted]\n"
    )
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b", "wanted": "b"}])
    config = config_of(
        "grpo", folder, data=str(rows), eval_fraction=0.0, reward=[f"{tmp_path}/r.py:given"]
    )
    task: Any = TASKS["grpo"](config)
    task.open_base()
    assert task.rewards(task.prepare().train.rows, [[5, 6]] * 2).tolist() == [0.0, 1.0]


def test_a_reward_function_of_trl_is_called(folder: Path, tmp_path: Path) -> None:
    """Which may define a dataclass, read the tokens, and leave an answer to the others."""
    (tmp_path / "r.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Judge:\n    limit: int\n"
        "def brief(prompts, completions, completion_ids, **_):\n"
        "    return [None if len(ids) > Judge(1).limit else 2.0 for ids in completion_ids]\n"
    )
    config = config_of("grpo", folder, reward=[f"{tmp_path}/r.py:brief"])
    task: Any = TASKS["grpo"](config)
    task.open_base()
    rows = task.prepare().train.rows[:2]
    assert task.rewards(rows, [[5, 6], [5]]).tolist() == [0.0, 2.0]


def test_the_tokens_of_all_answers_are_counted(folder: Path) -> None:
    result = fit(config_of("grpo", folder, "counted", max_steps=2), quiet=True)
    answers = 8 * 4  # of a step; each prompt has two tokens
    lengths = [answers * (2 + length) for length in logged(result, "answer_length")]
    assert result.tokens == pytest.approx(sum(lengths))


@pytest.mark.parametrize("varies", [True, False])
def test_rewards_that_do_not_vary_are_told_at_the_first_step(
    varies: bool, folder: Path, tmp_path: Path
) -> None:
    given = "range(len(completions))" if varies else "[0.5] * len(completions)"
    (tmp_path / "judge.py").write_text(f"def judge(completions): return {given}\n")
    config = config_of(
        "grpo", folder, f"spread {varies}", reward=[f"{tmp_path}/judge.py:judge"], max_steps=2
    )
    shown = io.StringIO()
    result = fit(config, console=Console(file=shown, width=200))
    assert ("taught nothing" in shown.getvalue()) is not varies
    first = next(line for line in shown.getvalue().splitlines() if "1/2" in line)
    spread = logged(result, "reward_spread")
    assert all((value > 0) is varies for value in spread)
    assert f"reward {logged(result, 'reward')[0]:.3f} ± {spread[0]:.3f}" in first


def test_an_image_of_each_form(tmp_path: Path) -> None:
    from PIL import Image

    pixels = torch.arange(12).view(3, 4).numpy() * 20
    Image.fromarray(pixels.astype("uint8")).save(tmp_path / "a.png")
    file = read_image("a.png", "here", tmp_path)
    assert file.shape == (3, 4, 3)
    for value in (pixels.tolist(), pixels[..., None].tolist(), file.tolist()):
        assert (read_image(value, "here", tmp_path) == file).all()
    with pytest.raises(DataError, match=r"0 to 300"):
        read_image([[300]], "here", tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_an_image_of_a_hub_data_set_is_that_of_its_file(mode: str, tmp_path: Path) -> None:
    from PIL import Image

    colours = torch.arange(3 * 4 * 3).view(3, 4, 3).numpy() * 7
    image = Image.fromarray(colours.astype("uint8")).convert(mode)
    image.save(tmp_path / "a.tif")
    file, found = read_image("a.tif", "here", tmp_path), read_image(image, "here", tmp_path)
    assert found.shape == (3, 4, 3)
    assert found.dtype == file.dtype
    assert (found == file).all()


def test_a_folder_of_images(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    for label in ("dark", "light"):
        (tmp_path / label).mkdir()
        for i in range(6):
            shade = (20 if label == "dark" else 200) + i
            Image.new("L", (8, 8), shade).save(tmp_path / label / f"{i}.png")
    config = config_of("classify images", folder, data=str(tmp_path), max_steps=8, check=False)
    task: Any = TASKS["classify"](config)
    task.open_base()
    prepared = task.prepare()
    assert task.labels == ["dark", "light"]
    assert len(prepared.train) + len(prepared.evaluation) == 12
    assert task.collate(prepared.train.rows[:2])["pixel_values"].shape == (2, 3, 8, 8)
    first = prepared.hashes["train"]
    Image.new("L", (8, 8), 90).save(tmp_path / "light" / "0.png")
    assert task.prepare().hashes["train"] != first  # a run is not resumed on other images


def test_sound_of_each_form(tmp_path: Path) -> None:
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\x00\x40\x00\xc0")
    expected = [0.5, -0.5]
    assert read_audio("a.wav", "here", tmp_path, 8000).tolist() == expected
    assert (
        read_audio({"array": expected, "sampling_rate": 8000}, "here", tmp_path, 8000).tolist()
        == expected
    )
    assert read_audio(expected, "here", tmp_path, 8000).tolist() == expected
    with pytest.raises(DataError, match="8000 samples a second"):
        read_audio("a.wav", "here", tmp_path, 16000)


def test_a_head_that_knows_the_labels_keeps_them(folder: Path, tmp_path: Path) -> None:
    """A base that is a classifier is trained further, in the order of its own labels; others are
    refused."""
    from transformers import AutoModelForSequenceClassification

    config_of("classify", folder)
    names = {0: "is b", 1: "is a", 2: "is c"}
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "bert", id2label=names, label2id=None
    )
    model.save_pretrained(tmp_path / "head")
    tiny_tokenizer().save_pretrained(tmp_path / "head")
    task: Any = TASKS["classify"](config_of("classify", folder, base=str(tmp_path / "head")))
    task.open_base()
    task.prepare()
    assert task.labels == ["is b", "is a", "is c"]
    assert torch.equal(task.load().model.classifier.weight, model.classifier.weight)
    file = write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": x} for x in "xy"])
    task = TASKS["classify"](
        config_of(
            "classify", folder, base=str(tmp_path / "head"), data=str(file), eval_fraction=0.0
        )
    )
    task.open_base()
    task.prepare()
    with pytest.raises(DataError, match="whose head knows 3 labels, and data with 2"):
        task.load()


def test_a_new_head_trains_whatever_the_targets_are(folder: Path) -> None:
    result = fit(
        config_of("classify", folder, "attention", targets="attention", max_steps=2, check=False),
        quiet=True,
    )
    full = veneer.adapter_files.read(result.adapter).full
    assert any("classifier" in path for path in full)


# ---- sft: tools, calls of them, content parts
# --------------------------------------------------------------------

TEMPLATE = (
    "{% if tools %}{{ 'tools ' + (tools | tojson) + '\n' }}{% endif %}"
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CHAT = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "more"}],
    },
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def read_chat(tmp_path: Path, tools: Any, messages: Any = CHAT) -> data.Records:
    return data.read(write_rows(tmp_path / "chat.jsonl", [{"messages": messages, "tools": tools}]))


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_and_their_calls_reach_the_template_and_calls_are_learnt(
    tools: Any, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    records = read_chat(tmp_path, tools)
    assert records.unused == ()
    examples = tokenise(records, tokenizer, max_length=2000)
    text = tokenizer.decode(examples[0]["input_ids"])
    assert text.startswith('tools [{"type": "function"')
    assert "user:one more\n" in text
    learnt = tokenizer.decode([label for label in examples[0]["labels"] if label != -100])
    assert '"arguments": {"a": 1}' in learnt
    assert learnt.endswith("two\n<|im_end|>")
    assert "one more" not in learnt


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo"])
def test_tools_reach_the_template_in_tasks_of_answers(
    name: str, folder: Path, tmp_path: Path
) -> None:
    prompt, answer = [{"role": "user", "content": "one"}], [CHAT[-1]]
    row = {"prompt": prompt, "tools": TOOLS}
    row |= {
        "dpo": {"chosen": answer, "rejected": [{"role": "assistant", "content": "three"}]},
        "kto": {"completion": answer, "label": True},
        "grpo": {},
    }[name]
    without = {"dpo": [], "kto": "[]", "grpo": "judge"}[name]
    rows = write_rows(tmp_path / "rows.jsonl", [row, {**row, "tools": without}])
    config = config_of(name, folder, data=str(rows), eval_fraction=0.0)
    task: Any = TASKS[name](config)
    tokenizer = task.open_base()
    tokenizer.chat_template = TEMPLATE
    prepared = task.prepare()
    assert prepared.unused == ()
    key = {"dpo": "chosen"}.get(name, "ids")
    values = [row[key] for row in prepared.train.rows]
    texts = [tokenizer.decode(ids[0] if name == "dpo" else ids) for ids in values]
    assert [text.startswith("tools [") for text in texts] == [True, False]
    tokenizer.chat_template = TEMPLATE.replace("tools", "t")
    with pytest.raises(DataError, match="holds tools, and the base's chat template has no place"):
        task.prepare()


def test_tools_beside_texts_are_refused_unless_there_are_none(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a?", "chosen": " b", "rejected": " c", "tools": []} for _ in range(2)]
    for tools, expected in (([], None), (TOOLS, "line 2 holds tools beside texts")):
        rows[1]["tools"] = tools
        file = write_rows(tmp_path / "rows.jsonl", rows)
        task: Any = TASKS["dpo"](config_of("dpo", folder, data=str(file), eval_fraction=0.0))
        task.open_base()
        with pytest.raises(DataError, match=expected) if expected else nullcontext():
            task.prepare()


def test_words_are_apart_and_a_cut_row_ends_in_a_special_token_alone(
    folder: Path, tmp_path: Path
) -> None:
    """Of a tokenizer that tells words by the space before them, and adds no end."""
    rows = [{"words": ["play", "jazz", "now"], "labels": ["A", "B", "A"]}] * 2
    file = write_rows(tmp_path / "rows.jsonl", rows)
    options = {"data": str(file), "eval_fraction": 0.0, "too_long": "truncate"}
    task: Any = TASKS["classify"](config_of("classify words", folder, max_length=11, **options))
    task.open_base()
    row, tokenizer = task.prepare().train.rows[0], task.processor
    assert tokenizer.decode(row["ids"]) == "play jazz n"
    labelled = [i for i, label in enumerate(row["labels"]) if label >= 0]
    assert [task.labels[row["labels"][i]] for i in labelled] == ["A", "B", "A"]
    assert [tokenizer.decode(row["ids"][i]) for i in labelled] == ["p", "j", "n"]
    end = tokenizer.all_special_ids[0]
    assert truncate_ids([5, 6, 7, 8], 3, tokenizer) == [5, 6, 7]
    assert truncate_ids([5, 6, 7, end], 3, tokenizer) == [5, 6, end]


def test_a_template_without_a_place_for_tools_is_told(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(
        DataError, match="line 1 holds tools, and the base's chat template has no place"
    ):
        tokenise(read_chat(tmp_path, TOOLS), tokenizer, max_length=2000)
    with pytest.raises(DataError, match="line 1 holds tool_calls"):
        tokenise(read_chat(tmp_path, None), tokenizer, max_length=2000)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
            "a message that is not one",
        ),
        ({"role": "user", "content": []}, "a message that is not one"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "["}}]},
            "a tool call",
        ),
        ({"role": "assistant", "tool_calls": []}, "a message that is not one"),
    ],
)
def test_bad_parts_and_calls(message: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"line 1 holds {expected}"):
        read_chat(tmp_path, None, [message])
    with pytest.raises(DataError, match="holds tools that are none"):
        read_chat(tmp_path, "[", CHAT[-1:])


def test_a_base_of_16_bits_hears_sounds_in_its_check_and_its_steps(folder: Path) -> None:
    result = fit(
        config_of("speech", folder, "speech in bf16", precision="bf16", max_steps=1), quiet=True
    )
    assert result.model.dtype == torch.bfloat16
    assert len(result.losses) == 1
