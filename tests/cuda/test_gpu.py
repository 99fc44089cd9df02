"""``make gpu`` on the emulated device: every check is right and within its limits, every part of
the program answers, and a time limit, a missing GPU, a missing library and a wrong number are said.
No time is judged here."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from scripts import bench_page, gpu_page
from tests.cuda import gpu_checks, gpu_model_checks, limits
from tests.cuda.gpu_compare import CHECKS
from tests.support.emulated_device import G0, one_visible

import gpu
import gpu_models
import gpu_place
import gpu_speed
import veneer
from gpu_place import Place, Skipped

pytestmark = pytest.mark.filterwarnings("ignore")
#: those of layers have a file of their own
MODELS = [name for name in CHECKS if not name.endswith((": every variant", ": rows and bank"))]
#: the check that asks CUDA for waits
OFFLOADED = "offloaded weights are refused before anything changes"
WAITS = "a training step: no wait of the host in forward and backward (set_sync_debug_mode)"


def slug(name: str) -> str:
    return gpu.slug(name)[:60]


@pytest.mark.parametrize("name", MODELS)
def test_a_check_is_right_and_within_its_limits(name):
    costs: limits.Costs = {}
    watch = limits.watching(costs)
    row = gpu_checks.run(
        Place(G0, True, lambda operation: watch(operation.replace(" ", "-"))), name
    )
    assert row["found"] == "right", row
    if costs:
        limits.kept({slug(name): costs})


def test_every_model_is_among_the_checks():
    """None was left out because its library is missing here."""
    assert {f"model, {name}" for name in gpu_model_checks.ARCHITECTURES} <= {*MODELS}


# ---- parts
# -------------------------------------------------------------------------------------------------------


def in_this_process(arguments, timeout):
    """What ``gpu.child`` does, without a process of its own."""
    with one_visible():
        return gpu.main(arguments)["answers"], ""


#: what is not installed here, and is said to be
ABSENT = {"peft + liger": "liger-kernel is not installed", "unsloth": "unsloth is not installed",
          "vllm, 8 adapters": "vllm is not installed", "peft, dropout": "PEFT has no dropout for stacks"}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A folder with the result of every part but the checks."""
    folder = tmp_path_factory.mktemp("results")
    parts = [part.name for part in gpu.PARTS if part.name != "checks"]
    gpu.main(["--quick", "--only", *parts, "--out", str(folder)], ask=in_this_process)
    return folder


def test_every_part_answers(recorded):
    result = json.loads((recorded / "gpu-emulated.json").read_text())
    assert result["device"] == "cuda"
    assert result["quick"]
    assert result["skipped"] == []
    asked = [(part.model, part.storage) for part in gpu.PARTS if part.model]
    assert [
        (case["setting"]["model"], case["setting"]["storage"]) for case in result["steps"]
    ] == asked
    assert [case["part"] for case in result["decode"]] == ["decode", "decode beside vllm"]
    for case in [*result["steps"], *result["decode"]]:
        assert case["rows"][case["floor"]]["ratio"] == 1
        for name, row in case["rows"].items():
            if "why" in row:
                assert ABSENT[name] in row["why"], (case["setting"], name, row)
                continue
            assert row["low"] <= row["ratio"] <= row["high"]
            assert row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
            assert row["tokens"] > 0
            assert row["peak"] > 0


def test_every_candidate_of_the_table_is_asked_for():
    assert {
        name for part in gpu.PARTS for name in part.candidates if part.model
    } == gpu_models.CANDIDATES.keys()
    assert (
        sum(part.limit for part in gpu.PARTS[:6]) <= gpu.TOTAL
    )  # those that are sure to have their time
    assert gpu.TOTAL <= 600


def test_parts_end_with_their_time_and_say_so(capsys):
    found = gpu.collect(gpu.PARTS, "cuda", True, 0.0, lambda *_: pytest.fail("nothing is asked"))
    assert [row["part"] for row in found["skipped"]] == [part.name for part in gpu.PARTS]
    slow = gpu.collect(gpu.PARTS[1:2], "cuda", True, 60, lambda *_: ([], "ended after 45 s"))
    assert slow["skipped"] == [{"part": "smollm2-135m", "why": "ended after 45 s"}]
    runs = {"one": lambda: None, "two": lambda: None}
    times, _, failed = gpu_speed.rounds(Place(G0), runs, time.monotonic() - 1)
    assert (times, failed) == ({}, dict.fromkeys(runs, "no time was left"))


def test_a_process_is_ended_at_its_limit_and_what_it_answered_counts(tmp_path, monkeypatch):
    script = tmp_path / "part.py"
    script.write_text(
        f"import time\nprint('a word')\nprint({gpu.MARK!r} + '{{\"check\": 1}}', flush=True)\ntime.sleep(60)"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    assert gpu.child(["checks"], 2) == ([{"check": 1}], "ended after 2 s")
    script.write_text("raise SystemExit('broken')")
    assert gpu.child(["checks"], 20) == ([], "broken")


def test_a_candidate_that_trains_nothing_is_no_time():
    made = gpu_models.CANDIDATES["veneer"](
        gpu_models.build(Place(G0, True), "llama-1b", "bf16"), "llama-1b", Place(G0)
    )
    made.parameters.append(torch.nn.Parameter(torch.ones(1, device=G0)))
    ids = torch.randint(0, 90, (2, 8), device=G0)
    with pytest.raises(RuntimeError, match="1 of 15 adapter parameters got no gradient"):
        gpu_speed.stepping(made, {"input_ids": ids, "labels": ids})()


def test_a_candidate_that_runs_out_of_memory_is_a_row(monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand more")

    monkeypatch.setitem(gpu_models.CANDIDATES, "peft", fails)
    case = gpu_speed.steps(
        Place(G0, True), "llama-1b", "bf16", ["frozen base", "peft"], time.monotonic() + 60
    )
    assert case["rows"]["peft"] == {
        "why": "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB"
    }


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert said.startswith("Found: no CUDA device")
    assert "Expected: a GPU that torch sees." in said
    assert "Do: " in said
    with pytest.raises(Skipped, match="Expected: cuda, mps or cpu"):
        gpu_place.find("tpu", False)


def test_a_processor_runs_the_program_too():
    place = Place(torch.device("cpu"), True)
    rows = [
        gpu_checks.run(place, name)
        for name in ("linear: every variant", "model, llama", OFFLOADED, WAITS)
    ]
    assert [row["found"] for row in rows] == ["right", "right", "right", "skipped"]
    assert "only CUDA says when the host waits for it; this is cpu" in rows[-1]["text"]


def test_a_part_runs_in_a_process_of_its_own(monkeypatch):
    """In which nothing is emulated, and nothing but the package is to be found; this one has no
    time for its checks."""
    monkeypatch.setenv("PYTHONPATH", str(Path(veneer.__file__).parent.parent))
    answers, problem = gpu.child(
        ["--part", "checks", "--device", "cpu", "--quick", "--seconds", "0.1"], 120
    )
    assert problem == ""
    assert [row["check"] for row in answers] == [
        name for name in CHECKS if not name.startswith("toy_")
    ]
    assert {row["text"] for row in answers} == {"no time was left"}


def test_a_wrong_number_ends_the_program_with_an_error(tmp_path, capsys):
    wrong = {"check": "linear: every variant", "found": "wrong", "text": "output: off by 1e-2"}
    with pytest.raises(SystemExit) as end:
        gpu.main(
            ["--quick", "--only", "checks", "--out", str(tmp_path)], ask=lambda *_: ([wrong], "")
        )
    assert end.value.code == 1
    assert "wrong: linear: every variant: output: off by 1e-2" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu-emulated.json").read_text())["checks"] == [wrong]


# ---- the page
# ----------------------------------------------------------------------------------------------------


def test_the_page_shows_what_a_gpu_gave_and_nothing_else(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_page, "RESULTS", tmp_path)
    assert "**Not measured yet.**" in gpu_page.page()
    result = json.loads((recorded / "gpu-emulated.json").read_text())
    file = tmp_path / "gpu-emulated.json"
    file.write_text(json.dumps(result))
    assert "**Not measured yet.**" in gpu_page.page()  # a toy's size is no measurement
    checks = [
        {"check": "one", "found": "right", "text": ""},
        {"check": "other", "found": "wrong", "text": "a | b"},
    ]
    more = {
        "quick": False,
        "checks": checks,
        "skipped": [{"part": "unsloth", "why": "580 s were over"}],
    }
    file.write_text(json.dumps({**result, **more}))
    page = gpu_page.page()
    assert "Not measured yet" not in page
    assert "## emulated\n" in page
    assert "1 of 2 checks against float64 are right." in page
    assert "| other | wrong | a \\| b |" in page
    assert "| peft + liger | – | liger-kernel is not installed | – | – |" in page
    assert "- unsloth: 580 s were over" in page
    lines = page.splitlines()
    for number in (number for number, line in enumerate(lines) if line.startswith("|---")):
        assert lines[number].count("|") == lines[number - 1].count("|")


def test_checks_that_did_not_finish_end_the_program_with_an_error(tmp_path):
    right = {"check": "linear: every variant", "found": "right", "text": ""}
    with pytest.raises(SystemExit) as end:
        gpu.main(
            ["--quick", "--only", "checks", "--out", str(tmp_path)],
            ask=lambda *_: ([right], "ended by signal 11"),
        )
    assert end.value.code == 1
