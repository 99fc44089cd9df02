"""The commands do what their help says."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tests.support.commands import refused
from tests.support.forked import LARGE, Program, printed
from tests.support.tiny import sums, tiny_model, write_rows, write_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.train.config import TrainConfig

Case = Callable[..., Any]


def test_train_from_yaml_with_flags_over_it(
    veneer: Case, base: Path, data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    fields = {
        "base": str(base),
        "data": str(data),
        "output": str(tmp_path / "a"),
        "rank": 2,
        "eval_fraction": 0.2,
        "batch_size": 4,
    }
    file.write_text(yaml.safe_dump(fields))
    found = veneer(
        "train", file, "--rank", 3, "--targets", "q_proj,v_proj", "--no-check", "--layers", "-1"
    )
    assert found.code == 0, found.err
    for part in (
        "Base",
        "Memory   about",
        "trains",
        "loss",
        "tokens/s",
        "evaluation loss",
        "Adapter",
        "veneer merge",
    ):
        assert part in found.err
    config = json.loads((tmp_path / "a" / "adapter" / "veneer.json").read_text())["config"]
    assert config["rank"] == 3
    assert config["targets"] == ["q_proj", "v_proj"]
    assert config["layers"] == [-1]
    facts = json.loads(veneer("inspect", tmp_path / "a" / "adapter", "--json").out)
    assert sorted(facts["norms"]) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_every_field_is_a_flag(veneer: Case) -> None:
    text = veneer("train", "--help").out
    for name in TrainConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in text


def test_eval_compares_base_and_adapter(
    veneer: Case, base: Path, data: Path, adapter: Path
) -> None:
    found = json.loads(
        veneer(
            "eval", base, data, "--adapter", adapter, "--json", "--exact", 2, "--precision", "fp32"
        ).out
    )
    assert found["adapter"]["loss"] < found["base"]["loss"] - 0.2
    assert found["base"]["tokens"] == found["adapter"]["tokens"]
    assert {"perplexity", "accuracy", "exact"} <= found["base"].keys()
    table = veneer("eval", base, data, "--adapter", adapter).out
    assert re.search(r"base .*\n.*adapter ", table)
    assert "tokens counted" in table


def test_merge_writes_a_model_that_transformers_loads_alone(
    veneer: Case, base: Path, adapter: Path, tmp_path: Path
) -> None:
    found = veneer("merge", base, adapter, tmp_path / "merged")
    assert found.code == 0, found.err
    assert "of the change kept" in found.out
    assert "attached" not in found.out, "what lies on the disk is a plain model"
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;"
        f"m = M.from_pretrained({str(tmp_path / 'merged')!r}); t = T.from_pretrained({str(tmp_path / 'merged')!r});"
        "assert 'veneer' not in sys.modules; print(m(**t('3 + 5 =', return_tensors='pt')).logits.sum().item())"
    )
    alone = Program(code, *LARGE)
    assert alone.wait() == 0, alone.said
    import veneer as library

    model = AutoModelForCausalLM.from_pretrained(base)
    library.load(model, adapter)
    with torch.no_grad():
        adapted = model(
            **AutoTokenizer.from_pretrained(base)("3 + 5 =", return_tensors="pt")
        ).logits.sum()
    assert float(alone.said.splitlines()[-1]) == pytest.approx(float(adapted), rel=1e-4)
    again = veneer("merge", base, adapter, tmp_path / "merged", "--overwrite")
    assert again.code == 0
    assert not list(tmp_path.glob(".*"))


def test_generate_base_adapter_and_both(veneer: Case, base: Path, adapter: Path) -> None:
    options = ("--max-new-tokens", 5, "-p", "3 + 5 =", "-p", "1 + 1 =")
    alone, adapted = (
        veneer("generate", base, *options),
        veneer("generate", base, "--adapter", adapter, *options),
    )
    assert alone.code == adapted.code == 0
    assert alone.out != adapted.out
    both = veneer("generate", base, "--adapter", adapter, "--both", *options).out
    for word in ("prompt", "base", "adapter", "3 + 5 ="):
        assert word in both
    sampled = [
        veneer("generate", base, "--temperature", 1.0, "--seed", seed, *options).out
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert veneer("generate", base, "--chat", "--system", "s", *options).code == 0


def test_generation_does_not_depend_on_the_batch(base: Path) -> None:
    from veneer.models.load import load_base
    from veneer.train.generate import generate

    loaded = load_base(base, precision="fp32")
    prompts = [row["prompt"] for row in sums(7)] + ["a", "a much longer prompt than the others"]
    one = generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=8, batch_size=1)
    assert generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=8, batch_size=4) == one
    stops = generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=8, stop=[one[0][2]])
    assert stops[0] == one[0].split(one[0][2])[0]


def test_verify_prints_each_check_and_decides_by_the_exit_code(
    veneer: Case, base: Path, adapter: Path, tmp_path: Path
) -> None:
    found = veneer("verify", adapter)
    assert found.code == 0, found.err
    for check in (
        "ok       files",
        "ok       tensors",
        "ok       record",
        "ok       numbers",
        "ok       layers",
    ):
        assert check in found.out
    assert "weights have the fingerprints of the record" in veneer("verify", adapter, base).out
    facts = json.loads(veneer("verify", adapter, base, "--json").out)
    assert facts["ok"] is True
    assert {finding["level"] for finding in facts["findings"]} <= {"ok", "warning"}
    assert {finding["check"] for finding in facts["findings"]} >= {
        "files",
        "record",
        "norms",
        "base",
    }
    warned = tmp_path / "warned"
    shutil.copytree(adapter, warned)
    (warned / "run.py").write_text("print()")
    assert veneer("verify", warned).code == 0
    strict = veneer("verify", warned, base, "--strict")
    assert strict.code == 2
    assert "run.py is a program" in strict.out
    assert veneer("verify", adapter, "--strict").code == 0


def test_verify_refuses_what_is_wrong(
    veneer: Case, base: Path, adapter: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(adapter, damaged)
    data = bytearray((damaged / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "adapter_model.safetensors").write_bytes(data)
    (damaged / "adapter_model.bin").write_bytes(b"")
    for options in ((), (base,), ("--json",)):
        found = veneer("verify", damaged, *options)
        assert found.code == 2
        assert "its tensors changed after it was written" in found.out
        assert "adapter_model.bin" in found.out
    other = write_tiny(tmp_path / "other")
    state = load_file(other / "model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, other / "model.safetensors")
    found = veneer("verify", adapter, other)
    assert found.code == 2
    assert "error    base" in found.out
    missing = veneer("verify", adapter, tmp_path / "nothing")
    assert missing.code == 2
    assert "no base model at" in missing.err


def test_verify_takes_what_other_commands_take(
    veneer: Case, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert veneer("add", adapter, "x").code == 0
    found = veneer("verify", "library:x", base)
    assert found.code == 0, found.err
    assert "weights have the fingerprints of the record" in found.out
    assert veneer("push", adapter, f"file://{tmp_path}/store").code == 0
    assert veneer("verify", f"file://{tmp_path}/store").code == 0
    named = tmp_path / "of:x:y"
    shutil.copytree(adapter, named)
    assert f"{named}: good" in veneer("verify", named).out, "no picture in the place of :x:"


def test_inspect_shows_a_provenance_of_any_form(veneer: Case, tmp_path: Path) -> None:
    import veneer as library

    for number, metrics in enumerate(
        ({"eval_loss": float("nan"), "steps": 3}, {"steps": "7"}, 3, {"last_loss": [1]})
    ):
        handle = library.attach(tiny_model(), library.LoraConfig(rank=2))
        handle.save(tmp_path / str(number), provenance={"metrics": metrics, "config": "data"})
        assert veneer("inspect", tmp_path / str(number)).code == 0


def test_inspect_shows_everything(veneer: Case, adapter: Path) -> None:
    text = veneer("inspect", adapter).out
    for part in (
        "fingerprint",
        "lora, rank 4",
        "q_proj × 2",
        "‖ΔW‖",
        "steps",
        "LlamaForCausalLM",
        "and 2 layers with smaller changes",
    ):
        assert part in text
    facts = json.loads(veneer("inspect", adapter, "--json").out)
    assert facts["verified"]
    assert len(facts["norms"]) == 14
    assert all(norm > 0 for norm in facts["norms"].values())
    assert facts["provenance"]["data"]["train"]


def test_stdin_gives_prompts(veneer: Case, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\nb\n"))
    assert veneer("generate", base, "--max-new-tokens", 2).code == 0


def test_help_and_version(veneer: Case) -> None:
    assert re.fullmatch(r"veneer \d+\.\d+\.\d+\S*\n", veneer("--version").out)
    for command in ("train", "eval", "generate", "merge", "inspect", "extract"):
        found = veneer(command, "--help")
        assert found.code == 0
        assert f"veneer {command} " in found.out.split("Example", 1)[1]
        assert f" {command} " in veneer("--help").out


def test_help_loads_no_library_of_the_commands() -> None:
    code = (
        "import sys; from veneer.cli import run; run([{arguments}])\n"
        "print({{'transformers', 'trl', 'datasets', 'accelerate'}} & set(sys.modules))"
    )
    for arguments in ("'--help'", "'train', '--help'", "'merge', '--help'"):
        assert printed(code.format(arguments=arguments)).rstrip().endswith("\nset()"), arguments


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("typer", ["--help"], "cli"),
        ("rich", ["inspect", "nothing"], "cli"),
        ("yaml", ["train", "run.yaml"], "cli"),
        ("transformers", ["train", "--base", "b", "--data", "d", "--output", "o"], "train"),
        ("uvicorn", ["serve", "b"], "serve"),
        ("ray", ["serve", "b", "--replicas", "2", "--port", "0"], "cluster"),
    ],
)
def test_a_package_that_is_not_installed_is_one_line_that_names_what_to_install(
    missing: str, arguments: list[str], extra: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    code = f"import sys; sys.modules[{missing!r}] = None; from veneer.cli import run; sys.exit(run({arguments!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    expected = f"Found: no Python package {missing!r}. Expected: veneer[{extra}]. Do: pip install 'veneer[{extra}]'.\n"
    assert done.stderr == f"Error: {expected}"


def test_the_tensorboard_tracker(veneer: Case, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    rows = write_rows(tmp_path / "a.jsonl", sums(4))
    found = veneer(
        "train",
        "--base",
        base,
        "--data",
        rows,
        "--output",
        tmp_path / "o",
        "--trackers",
        "tensorboard",
        "--rank",
        2,
    )
    assert found.code == 0, found.err
    assert list((tmp_path / "o").rglob("events.out.tfevents.*"))


def test_compose_and_diff(veneer: Case, base: Path, adapter: Path, tmp_path: Path) -> None:
    found = veneer("compose", tmp_path / "twice", f"{adapter}=1.5", f"{adapter}=0.5")
    assert found.code == 0, found.err
    assert "sum of 2 adapters: 14 layers, rank 8, nothing left out" in found.out
    assert "written to" in found.out
    report = json.loads(
        veneer("compose", tmp_path / "small", tmp_path / "twice", "--rank", 2, "--json").out
    )
    assert report["method"] == "svd"
    assert report["verified"]
    assert 0 < report["error"] < 1
    assert {layer["rank"] for layer in report["layers"].values()} == {2}
    assert (
        veneer(
            "generate",
            base,
            "--adapter",
            tmp_path / "small",
            "-p",
            "3 + 5 =",
            "--max-new-tokens",
            2,
        ).code
        == 0
    )
    assert "identical" in veneer("diff", adapter, adapter, "--exit-code").out
    text = veneer("diff", adapter, tmp_path / "twice", "--layers", 3)
    assert text.code == 0
    for part in (
        "cosine 1.000",
        "φ in",
        "model.layers.0",
        "and 11 layers that differ less",
        "apart by 0.5 ",
    ):
        assert part in text.out
    facts = json.loads(veneer("diff", adapter, tmp_path / "twice", "--json").out)
    assert facts["base"] == "same"
    assert facts["difference"] == pytest.approx(0.5)
    assert len(facts["layers"]) == 14
    assert veneer("diff", adapter, tmp_path / "twice", "--exit-code").code == 1
    minus = veneer("compose", tmp_path / "minus", f"{adapter}=-1", "--layer", "q_proj=0")
    assert minus.code == 0
    assert "only A  2" in veneer("diff", adapter, tmp_path / "minus").out


def test_compose_with_a_base(veneer: Case, base: Path, tmp_path: Path) -> None:
    import veneer as library

    model = AutoModelForCausalLM.from_pretrained(base)
    library.attach(model, library.LoraConfig(rank=2, variant="dora", train_also=["norm"])).save(
        tmp_path / "a"
    )
    found = veneer("compose", tmp_path / "b", f"{tmp_path / 'a'}=2", "--base", base)
    assert found.code == 0, found.err
    library.detach(model)
    library.load(model, tmp_path / "b")
    for method, seed_options in (("ties", ()), ("dare", ("--seed", 1))):
        options = ("--method", method, "--density", 0.5, *seed_options, "--base", base)
        assert veneer("compose", tmp_path / method, f"{tmp_path / 'a'}=2", *options).code == 0


def test_composing_reads_of_the_base_what_it_needs(
    veneer: Case, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import veneer as library
    from veneer import models
    from veneer.tools.compose import compose

    model = AutoModelForCausalLM.from_pretrained(base)
    library.attach(model, library.LoraConfig(rank=2, variant="dora", targets=["q_proj"])).save(
        tmp_path / "a"
    )
    library.detach(model)
    expected = compose([tmp_path / "a"], tmp_path / "expected", weights=[2], base=model).path
    monkeypatch.setattr(
        models, "load_base", lambda *args, **options: pytest.fail("the whole model was loaded")
    )
    found = veneer("compose", tmp_path / "b", f"{tmp_path / 'a'}=2", "--base", base)
    assert found.code == 0, found.err
    held = [
        load_file(folder / "adapter_model.safetensors") for folder in (expected, tmp_path / "b")
    ]
    assert held[0].keys() == held[1].keys()
    assert all(torch.equal(held[0][key], held[1][key]) for key in held[0])


def next_lines(text: str) -> list[list[str]]:
    """The command lines below the last "Next:", as a shell would read them."""
    words, commands = shlex.split(text[text.rindex("Next:") :])[1:], []
    for word in words:
        if word == "veneer":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def test_what_is_said_to_come_next_works_as_it_is(
    veneer: Case, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--find-rate names a run, which names an answer to one of its prompts and a merge."""
    file = tmp_path / "run of mine.yaml"
    fields = {
        "base": str(base),
        "data": str(data),
        "output": str(tmp_path / "my run"),
        "max_steps": 2,
        "rank": 2,
    }
    file.write_text(yaml.safe_dump(fields))
    first = ["train", str(file), "--find-rate", "--precision", "fp32", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["veneer", *first])
    found = veneer(*first)
    assert found.code == 0, found.err
    rate = re.search(r"suggested: (--learning-rate) (\S+)", found.out)
    (run,) = next_lines(found.err)
    assert rate is not None
    assert run[-2:] == [rate[1], rate[2]]
    found = veneer(*run)
    assert found.code == 0, found.err
    config = json.loads((tmp_path / "my run" / "run.json").read_text())["config"]
    assert (config["learning_rate"], config["seed"]) == (float(rate[2]), 1)
    commands = next_lines(found.err)
    assert [command[0] for command in commands] == ["generate", "merge"]
    assert commands[0][-2:] == ["--prompt", min((row["prompt"] for row in sums(24)), key=len)]
    for command in commands:
        found = veneer(*command)
        assert found.code == 0, found.err
    assert (tmp_path / "my run-merged" / "model.safetensors").exists()


HI = [{"role": "user", "content": "Hi"}]
SHELL = '--it\'s $HOME,\n"two" `lines`'
#: name → (a row of the data, the first command's words but the base and the adapter)
FIRST: dict[str, tuple[dict[str, Any], list[str]]] = {
    "chats": ({"messages": [*HI, {"role": "assistant", "content": "Hello!"}]}, ["chat"]),
    "prompts": ({"prompt": SHELL, "completion": " b"}, ["generate", "--both", "--prompt", SHELL]),
    "long prompts": (
        {"prompt": "a" * 190, "completion": " b"},
        ["generate", "--both", "--max-new-tokens", "66", "--prompt", "a" * 190],
    ),
    "none to show": ({"prompt": "a\x1b[2J", "completion": " b"}, ["inspect"]),
}


@pytest.mark.parametrize(("row", "expected"), FIRST.values(), ids=FIRST.keys())
def test_what_comes_next_is_told_by_the_data(
    veneer: Case,
    base: Path,
    row: dict[str, Any],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chats are for `veneer chat`; it would put a chat's marks around the prompts of those who
    learnt without."""
    rows, output = write_rows(tmp_path / "rows.jsonl", [row] * 2), tmp_path / "run"
    words = ("--device-map", "cpu", "--max-steps", 1, "--no-check")
    found = veneer("train", "--base", base, "--data", rows, "--output", output, *words)
    assert found.code == 0, found.err
    (first, merge) = next_lines(found.err)
    adapter = str(output / "adapter")
    assert merge == ["merge", str(base), adapter, f"{output}-merged"]
    named = (
        [adapter]
        if expected == ["inspect"]
        else [str(base), "--device-map", "cpu", "--adapter", adapter]
    )
    assert first == [expected[0], *named, *expected[1:]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    shown = veneer(*first)
    assert shown.code == 0, shown.err
    assert shown.out


def test_a_dry_run_and_a_sweep_are_two_things(
    veneer: Case, base: Path, data: Path, tmp_path: Path
) -> None:
    shared = ["train", "--base", base, "--data", data, "--output", tmp_path / "run"]
    refused(veneer(*shared, "--dry-run", "--find-rate"), "one of them")
    found = veneer(*shared, "--dry-run")
    assert found.code == 0, found.err
    assert "Example" in found.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_base_says_how_it_is_sampled(
    veneer: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    import io

    from tests.support.tiny import tiny_model, tiny_tokenizer

    model = tiny_model()
    for name, value in {
        "do_sample": True,
        "temperature": 1.5,
        "top_k": 30,
        "min_p": 0.1,
        "suppress_tokens": [9],
    }.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")

    def write(*options: object) -> Case:
        monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n"))
        found = veneer(
            command, tmp_path / "base", "--max-new-tokens", 16, "--precision", "fp32", *options
        )
        assert found.code == 0, found.err
        return found

    as_it_says = write()
    assert (
        "generation_config.json says: suppress_tokens [9], temperature 1.5, top_k 30."
        in as_it_says.err
    )
    assert "Not applied, of the base's generation_config.json: min_p 0.1." in as_it_says.err
    assert as_it_says.out == write("--temperature", 1.5, "--top-k", 30).out
    greedy = write("--temperature", 0)
    assert greedy.out != as_it_says.out != write("--top-k", 0).out
    assert "temperature" not in greedy.err
