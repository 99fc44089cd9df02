"""The runner's rules, the form of its records, and that every case runs, on toys. No time is judged
here."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import benchmarks.runner
import pytest
import torch
from demo import pronounce
from scripts import bench_page

import candidates
import memory
import runner
from cases import all_cases, earlier, runs

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers warn

ROOT = Path(__file__).parent.parent
CASES = all_cases()
PREDICTIONS = "benchmarks/predictions.md"


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        pytest.skip(f"git has no answer: {done.stderr.strip()}")
    return done.stdout


def whole_history() -> None:
    if git("rev-parse", "--is-shallow-repository").strip() == "true":
        pytest.skip("the history of this clone is cut off")


# ---- the cases -----------------------------------------------------------------------------------


@pytest.fixture
def inside(monkeypatch, base):
    """What the cases run in processes of its own runs in this one; SmolLM2 is a toy."""

    def call(function: str, *arguments: Any, **_: Any) -> Any:
        module, _, name = function.partition(":")
        return getattr(importlib.import_module(module), name)(*json.loads(json.dumps(arguments)))

    monkeypatch.setattr(runner, "call", call)
    monkeypatch.setattr(runner, "child", lambda *arguments, **_: {"wall": 1.0, "cpu": 1.0})
    monkeypatch.setattr("task_cases.answers.SMOLLM", str(base))
    monkeypatch.setenv("BEFORE", str(ROOT))
    monkeypatch.setattr(pronounce, "words", functools.cache(pronounce.words))
    return {"base": str(base)}


# : how many settings run here; the others differ in a size or a dtype. All of them: python -m
# benchmarks --smoke
FEW = {
    "step": 2, "step_one_thread": 2, "step_memory": 1, "forward": 2, "mixed": 2, "merge_fidelity": 1, "plan_errors": 1,
    "rollouts": 2, "earlier": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", [
    *(name for name, case in CASES.items() if case.group == "bench"),
    "time_to_target",
    "sweep",
    "rollouts",
    "earlier",
    pytest.param("plan_errors", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_case_runs(name, inside):
    case = CASES[name]
    if name in ("merge_fidelity", "time_to_target", "sweep"):
        case = dataclasses.replace(case, toy={**case.toy, **inside})
    result = json.loads(json.dumps(runner.smoke(case, FEW.get(name))))
    assert result["name"] == name
    assert {"torch", "veneer", "python"} <= result["versions"].keys()
    for one in result["cases"]:
        (process,) = one["processes"]
        assert case.floor in process["rounds"]
        assert (
            name in ("plan_errors", "import_time")
            or any(arm.startswith("veneer") for arm in process["rounds"])
            or (name == "sweep")
        )
        for units in process["rounds"].values():
            (unit,) = units
            assert unit.keys() >= {"wall", "cpu"}
            numbers = [value for name, value in unit.items() if name != "curve"]
            assert all(value is None or value >= 0 for value in numbers), unit
        for number, (_, form) in case.shown.items():
            assert (
                any(
                    runner.spread([process], arm, case.floor, number, form)
                    for arm in process["rounds"]
                )
                or number == "wall to target"
            ), number


def test_cpu_time_beside_an_earlier_commit_counts_children():
    before = earlier.cpu_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(2_000_000))"], check=True)
    assert earlier.cpu_seconds() - before > 0.01


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("BEFORE", str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(SystemExit, match=r"Found: BEFORE=.*Expected: a checkout.*Do: git worktree"):
        earlier.earlier_arms()


@pytest.mark.parametrize("name", ["task_dpo", "task_grpo"])
def test_a_task_runs(name, inside):
    (one,) = runner.smoke(CASES[name])["cases"]
    for units in one["processes"][0]["rounds"].values():
        assert 0 <= units[0]["quality"] <= 1
        assert units[0]["steps"] > 0
        assert ("before" in units[0]) == (name == "task_grpo")  # the reward must rise


@pytest.mark.slow
def test_a_task_of_its_own_rows(tmp_path, monkeypatch, inside):
    snips = tmp_path / "snips"
    snips.mkdir()
    pieces = [{"text": "play "}, {"text": "Some Song", "entity": "track"}, {"text": " now"}]
    for file, count in (("train_Play_full.json", 8), ("validate_Play.json", 2)):
        rows = [{"data": [*pieces, {"text": f"{file} {i}"}]} for i in range(count)]
        (snips / file).write_text(json.dumps({"Play": rows}))
    monkeypatch.setenv("SNIPS", str(snips))
    assert CASES["task_tagging"].lacks() is None
    test_a_task_runs("task_tagging", inside)


def test_the_record_fits_into_its_time_and_has_five_processes():
    chosen = [case for case in CASES.values() if case.group == "bench"]
    assert sum(case.minutes for case in chosen) <= 100
    for case in CASES.values():
        assert len(case.seeds or range(case.processes)) >= 5
        assert all(setting["threads"] in ("default", 1) for setting in case.settings)


def test_what_is_reported_was_tuned_on_nothing():
    assert not {*runs.CHOSEN_ON} & {*runs.REPORTED_ON}
    for name in ("time_to_target", "sweep"):
        assert CASES[name].seeds == runs.REPORTED_ON


def test_the_way_to_a_target_is_interpolated():
    curve = [
        {"loss": loss, "cpu": cpu}
        for loss, cpu in ((4.0, 0.0), (2.0, 10.0), (3.0, 20.0), (1.0, 30.0))
    ]
    found = {target: runs.cost_until(curve, target, "cpu") for target in (3.0, 2.0, 1.5, 0.5)}
    assert found == {3.0: 5.0, 2.0: 10.0, 1.5: 27.5, 0.5: None}


@pytest.mark.parametrize("arch", candidates.ARCHITECTURES)
@pytest.mark.parametrize("dtype", candidates.DTYPES)
def test_every_candidate_adapts_the_same_layers(arch, dtype):
    known = candidates.ARCHITECTURES[arch]
    base = known.build(4, 16, tiny=True).to(candidates.DTYPES[dtype])
    layers = candidates.ranks(base, known, 4)
    for name in candidates.names(arch, dtype)[2:]:
        made = candidates.make(name, candidates.sharing(base), arch, 4)
        assert len(made.parameters) == 2 * len(layers), name  # an A and a B each
        optimizer = made.optimizer()
        candidates.step(made, optimizer, known.batch(base, 16))
        assert all(parameter.grad is not None for parameter in made.parameters), name
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_the_floor_carries_the_gradient_to_the_embedded_input_and_no_further():
    known = candidates.ARCHITECTURES["llama"]
    model = known.build(1, 16, tiny=True)
    made, inputs = candidates.make("floor", model, "llama", 4), []
    model.get_submodule(known.entry).register_forward_hook(lambda *call: inputs.append(call[2]))
    candidates.step(made, made.optimizer(), known.batch(model, 16))
    assert inputs[0].grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_saved_bytes_count_each_storage_once_and_what_is_freed_not_at_all():
    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(10))

        def forward(self, x):
            x = x * 1.0
            (x * self.weight).sum().detach()  # a graph that nothing holds
            return (x[:5] * self.weight[:5]).sum() + (x[5:] * self.weight[5:]).sum()

    made = candidates.Candidate(Square(), [], lambda model, batch: model(batch["x"]))
    assert (
        memory.saved_bytes(made, {"x": torch.ones(10)}) == 10 * 4
    )  # x, though both of its halves are saved


# ---- the runner ----------------------------------------------------------------------------------


def toy_case(**changes: Any) -> runner.Case:
    def arms(stack: Any, seed: int, size: int) -> dict[str, Any]:
        return {name: lambda name=name: CALLS.append(name) for name in ("floor", "peft", "veneer")}

    settings = [{"threads": 1, "size": 3}]
    return runner.Case(**{
        "name": "toy", "about": "A toy.", "equal": "all", "floor": "floor", "settings": settings, "arms": arms,
        "toy": {"size": 1}, **changes,
    })  # fmt: skip


CALLS: list[str] = []


def process_of(
    floors: Sequence[float], factor: float = 2.0, *, kept: bool = True
) -> dict[str, Any]:
    rounds = {arm: [{"wall": value * times, "cpu": value * times} for value in floors]
              for arm, times in (("floor", 1.0), ("peft", 3.0), ("veneer", factor))}  # fmt: skip
    return {"seed": 0, "rounds": rounds, "orders": [[]] * len(floors), "repeats": 1, "movement": [],
            "thrown_away": [], "kept": kept, "threads": 1, "load": 0.0, "tuning": {}}  # fmt: skip


def test_rounds_are_interleaved_in_an_order_that_changes_and_can_be_drawn_again(monkeypatch):
    monkeypatch.setattr(runner, "SHORTEST", 0.0)
    monkeypatch.setattr(runner, "movement", lambda *_: 0.0)
    CALLS.clear()
    found = runner.run_rounds(toy_case(), {"threads": 1, "size": 3}, 0, 6)
    assert [*found["rounds"]] == ["floor", "peft", "veneer"]
    assert found["kept"]
    assert all(len(units) == 6 for units in found["rounds"].values())
    counted = CALLS[-19:]
    assert counted[::3] == ["floor"] * 7  # before and after each round
    assert [counted[start : start + 2] for start in range(1, 19, 3)] == found["orders"]
    assert all(sorted(order) == ["peft", "veneer"] for order in found["orders"])
    assert len({tuple(order) for order in found["orders"]}) > 1
    again = runner.run_rounds(toy_case(), {"threads": 1, "size": 3}, 0, 6)
    assert again["orders"] == found["orders"]
    assert (
        runner.run_rounds(toy_case(), {"threads": 1, "size": 3}, 1, 6)["orders"] != found["orders"]
    )


def test_settings_share_a_process_and_one_that_is_thrown_away_has_its_own(monkeypatch):
    settings = [{"threads": threads, "size": size} for threads, size in ((1, 3), (1, 4), (2, 5))]
    case, spawned = toy_case(settings=settings, processes=2), []

    def child(*arguments, **_):
        indices = [int(index) for index in arguments[-1].split(",")]
        spawned.append(sorted(indices))
        first = len(spawned) == 1
        kept = {index: not (first and index == 0) for index in indices}
        return {"settings": [process_of([1.0], i + 1.0, kept=kept[i]) for i in indices]}

    monkeypatch.setattr(runner, "child", child)
    monkeypatch.setattr(runner, "PENDING", {})
    monkeypatch.setattr(runner, "MEASURED", set())
    for index, setting in enumerate(settings):
        processes = runner.gather(case, setting)
        assert [process["kept"] for process in processes] == [False] * (index == 0) + [True, True]
        assert all(process["rounds"]["veneer"][0]["wall"] == index + 1.0 for process in processes)
    assert spawned == [[0, 1], [0], [0, 1], [2], [2]]
    assert not runner.PENDING


def scripted(monkeypatch, floors: Sequence[float]) -> dict[str, Any]:
    """Three rounds of the toy, in which the floor takes these times and all else one second."""
    times = iter([1.0, 1.0, *floors])  # warming up, and how often a unit is repeated

    def measure_unit(arm: Any, repeats: int) -> dict[str, float]:
        CALLS.clear()
        arm()
        watched = CALLS == ["floor"]
        return {"wall": next(times) if watched else 1.0, "cpu": 1.0}

    monkeypatch.setattr(runner, "measure_unit", measure_unit)
    return runner.run_rounds(toy_case(), {"threads": 1, "size": 3}, 0, 3)


def test_a_round_whose_floor_moves_is_thrown_away_for_all_arms_and_stays_in_the_record(monkeypatch):
    process = scripted(monkeypatch, [1.0, 1.2, 1.2, 1.21, 1.0, 1.0])
    assert process["kept"]
    assert [unit["wall"] for unit in process["rounds"]["floor"]] == [1.2, 1.205, 1.0]
    assert all(len(units) == 3 for units in process["rounds"].values())
    assert [round(done["movement"], 3) for done in process["thrown_away"]] == [0.182, 0.19]
    for done in process["thrown_away"]:
        assert done["units"].keys() == {"peft", "veneer"}
        assert [*done["units"]] == done["order"]
    assert [floor["wall"] for floors in process["floors"] for floor in floors] == [
        *(1.2, 1.2),
        *(1.2, 1.21),
        *(1.0, 1.0),
    ]


def test_a_process_with_too_few_quiet_rounds_ends(monkeypatch):
    process = scripted(monkeypatch, [1.0, 1.0, *[1.2, 1.0] * 20])
    assert not process["kept"]
    assert len(process["thrown_away"]) == runner.ATTEMPTS * 3 - 1
    assert len(process["rounds"]["veneer"]) == 1


def test_movement_is_a_share_of_the_mean():
    assert runner.movement(1.0, 1.0) == 0
    assert runner.movement(1.9, 2.1) == runner.movement(2.1, 1.9) == pytest.approx(0.1)


def test_the_mean_of_two_units_keeps_what_is_missing():
    first, second = {"wall": 1.0, "gap": None}, {"wall": 2.0, "gap": 3.0}
    assert runner.mean_unit(first, second) == {"wall": 1.5, "gap": None}


def test_a_process_that_is_thrown_away_stays_in_the_record(capsys):
    noisy = process_of([1.0, 1.0], factor=1.0, kept=False)
    answers = iter([noisy, process_of([1.0, 1.0, 1.09]), noisy, noisy, process_of([1.0, 1.0, 1.0])])
    case = toy_case(processes=2)
    processes = runner.gather(case, case.settings[0], lambda *_: next(answers))
    assert [process["kept"] for process in processes] == [False, True, False, False, True]
    for arm, ratio in (("peft", 3.0), ("veneer", 2.0)):
        assert (
            runner.spread(processes, arm, "floor", "wall", "ratio") == [ratio] * 3
        )  # not the 1.0 of noisy ones
    assert (
        capsys.readouterr().out.count("a process is thrown away: the floor moved in 0 rounds") == 3
    )


def test_a_machine_that_is_not_quiet_ends_the_case():
    case, asked = toy_case(processes=5), []
    with pytest.raises(
        runner.RecordError, match=r"more than 10% in most rounds of 3 processes.*quiet machine"
    ):
        runner.gather(
            case, case.settings[0], lambda *_: asked.append(1) or process_of([1.0], kept=False)
        )
    assert len(asked) == 1 + runner.RETRIES


def test_the_range_is_between_processes():
    processes = [{**process_of([1.0, 1.0], factor), "kept": True} for factor in (1.0, 1.5, 1.2)]
    assert runner.spread(processes, "veneer", "floor", "wall", "ratio") == [1.2, 1.0, 1.5]
    assert runner.spread(processes, "veneer", "floor", "wall", ".1f") == [1.2, 1.0, 1.5]
    assert runner.spread(processes, "nobody", "floor", "wall", "ratio") is None


def recorded(
    tmp_path: Path, monkeypatch, commit: str, factor: float, when: str, case: Any = None
) -> dict[str, Any]:
    monkeypatch.setattr(runner, "require_clean_tree", lambda: commit)
    result = runner.record(case or toy_case(), lambda *_: process_of([1.0, 1.0, 1.0], factor))
    runner.write({**result, "recorded": when}, tmp_path)
    return result


def test_a_record_holds_every_time_and_where_it_was_made(tmp_path, monkeypatch):
    recorded(tmp_path, monkeypatch, "a" * 40, 2.0, "2026-01-01")
    (result,) = runner.records("toy", tmp_path)
    assert (tmp_path / "toy" / f"{'a' * 12}.json").exists()
    needed = {
        "name",
        "about",
        "equal",
        "floor",
        "shown",
        "commit",
        "clean",
        "recorded",
        "load",
        "machine",
        "cores",
    }
    assert needed | {"allocator", "versions", "cases"} == result.keys()
    assert result["commit"] == "a" * 40
    (case,) = result["cases"]
    assert len(case["processes"]) == 5
    for process in case["processes"]:
        assert {
            "seed",
            "rounds",
            "orders",
            "movement",
            "threads",
            "load",
            "tuning",
            "kept",
        } <= process.keys()
        assert process["rounds"]["veneer"] == [{"wall": 2.0, "cpu": 2.0}] * 3
    with pytest.raises(runner.RecordError, match="one record of a commit"):
        recorded(tmp_path, monkeypatch, "a" * 40, 1.0, "2026-01-02")


def test_recording_refuses_a_tree_with_changes(tmp_path, monkeypatch):
    def run(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True,
                       capture_output=True)  # fmt: skip

    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "file").write_text("one")
    kept = tmp_path / "benchmarks" / "results" / "toy" / "old.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    run("init", "-q"), run("add", "."), run("commit", "-qm", "one")
    commit = runner.require_clean_tree()
    (kept.parent / "new.json").write_text("{}")  # recorded since
    assert runner.require_clean_tree() == commit
    for file in (tmp_path / "file", tmp_path / "other", kept):
        before = file.read_text() if file.exists() else None
        file.write_text("two")
        with pytest.raises(runner.RecordError, match="changes that are not committed"):
            runner.record(toy_case(), lambda *_: pytest.fail("it ran"))
        file.unlink() if before is None else file.write_text(before)


def test_a_process_is_as_its_user_has_it_or_has_one_thread(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, "1")
    plain, single = runner.environment("default"), runner.environment(1)
    assert not [name for name in plain if name.startswith(runner.TUNING)]
    tuned = {name: value for name, value in single.items() if name.startswith(runner.TUNING)}
    assert tuned == {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def test_a_process_of_its_own_answers_in_its_last_line(tmp_path):
    assert runner.child("-c", "print('a word'); print('{\"said\": 1}')") == {"said": 1}
    with pytest.raises(RuntimeError, match="broken"):
        runner.child("-c", "raise SystemExit('broken')")


def test_a_case_of_one_arm_a_process_starts_one_for_each(monkeypatch):
    commands = []

    def child(*command: str, env: Any) -> dict[str, Any]:
        commands.append(command)
        unit = {"wall": 1.0, "cpu": 1.0}
        return {"seed": 7, "rounds": {command[-1]: [unit]}, "kept": True, "threads": 1}

    monkeypatch.setattr(runner, "child", child)
    case = toy_case(apart=True, seeds=(7, 8))
    processes = runner.gather(case, case.settings[0])
    assert len(commands) == 2 * 3
    assert sorted(command[-1] for command in commands[:3]) == ["floor", "peft", "veneer"]
    assert [command[:3] for command in commands] == [("-m", "benchmarks", "--child")] * 6
    for process in processes:
        assert [*process["rounds"]] == ["floor", "peft", "veneer"]
        assert process["kept"] is True


@pytest.mark.slow
def test_a_case_is_recorded_in_processes(tmp_path, monkeypatch):
    """From the parent to the file, in toys of a case and its one round."""
    monkeypatch.setattr(runner, "require_clean_tree", lambda: "b" * 40)
    monkeypatch.setattr(runner, "RETRIES", 20)  # other tests run beside it
    case = dataclasses.replace(CASES["import_time"], processes=1)
    runner.write(runner.record(case), tmp_path)
    (result,) = runner.records("import_time", tmp_path)
    *noisy, process = result["cases"][0]["processes"]
    assert not any(process["kept"] for process in noisy)
    assert [len(units) for units in process["rounds"].values()] == [2, 2, 2]
    assert process["rounds"]["torch"][0]["wall"] > 0
    assert len(process["orders"]) == 2


# ---- what is recorded in the repository ----------------------------------------------------------


def is_ancestor(commit: str) -> bool:
    command = ["git", "merge-base", "--is-ancestor", commit, "HEAD"]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode == 0


def test_a_result_is_of_a_commit_before_this_one():
    whole_history()
    for file in benchmarks.runner.names_of():
        result = json.loads(file.read_text())
        assert file.stem == result["commit"][:12]
        assert result["clean"] is True
        assert is_ancestor(result["commit"]), f"{file}: {result['commit']} is not an ancestor"
    assert is_ancestor(git("rev-parse", "HEAD").strip())
    assert not is_ancestor("0" * 40)
    tree = git("rev-parse", "HEAD^{tree}").strip()
    aside = git(
        "-c", "user.name=a", "-c", "user.email=a@b", "commit-tree", tree, "-m", "aside"
    ).strip()
    assert not is_ancestor(aside)  # a commit that stands beside this one


def test_no_recorded_result_was_ever_changed():
    whole_history()
    changed = git(
        "log",
        "--diff-filter=MD",
        "--no-renames",
        "--format=",
        "--name-only",
        "--",
        "benchmarks/results/*/*",
    )
    assert changed.split() == []


def appended(versions: Sequence[str]) -> bool:
    return all(new.startswith(old) for old, new in pairwise(versions))


def test_predictions_are_only_added():
    whole_history()
    commits = git("log", "--reverse", "--format=%H", "--", PREDICTIONS).split()
    versions = [git("show", f"{commit}:{PREDICTIONS}") for commit in commits]
    assert appended([*versions, (ROOT / PREDICTIONS).read_text()])
    assert appended(["a\n", "a\nb\n"])
    assert not appended(["a\nb\n", "a\nc\n"])
    assert not appended(["a\nb\n", "b\n"])


def test_a_prediction_has_a_date_a_commit_a_known_case_and_an_arm():
    rows = [
        line.strip("| \n").split(" | ")
        for line in (ROOT / PREDICTIONS).read_text().splitlines()[8:]
    ]
    assert rows
    for row in rows:
        date, commit, case, arm, expected = row
        assert (len(date), len(commit)) == (10, 12)
        assert arm
        assert expected
        assert case.partition(",")[0] in CASES


# ---- the pages -----------------------------------------------------------------------------------


def test_pages_show_the_latest_and_plot_all(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_page, "RESULTS", tmp_path)
    empty = bench_page.page()
    assert "Not recorded by the runner yet." in empty
    assert "## Corrections" in empty
    for name in CASES:
        assert f"## {bench_page.TITLES[name]}\n" in empty
        assert f"(`{name}`)" in empty
    assert len({*bench_page.TITLES.values()}) == len(CASES)
    case = toy_case(name="step", settings=[
        {"threads": "default", "dtype": dtype, "layers": 30, "tokens": 1024} for dtype in ("float32", "bfloat16")
    ])  # fmt: skip
    for commit, factor, when in (
        ("a", 0.8, "2026-01-01"),
        ("c", 1.25, "2026-03-01"),
        ("b", 0.9, "2026-02-01"),
    ):
        recorded(tmp_path, monkeypatch, commit * 40, factor, when, case)
    page, readme = bench_page.page(), bench_page.readme()
    assert "| veneer | 1.25 | 1.25 |" in page  # the latest, though another was better
    assert "0.80 |" not in page
    assert "- `veneer`: ▁▃█ 0.8 → 1.25" in page
    assert (
        f"Commit `{'c' * 12}`, recorded 2026-03-01; 10 processes, 0 thrown away; 30 rounds, 0 thrown away."
        in " ".join(page.split())
    )
    assert "| training step, 4 × 256 tokens | 1.25 | 3.00 | 1.25 | 3.00 | – |" in readme
    assert "not recorded yet" in page  # the rest
    assert "](benchmarks-step.svg)" in page
    (drawn,) = bench_page.plots().values()
    assert "1.25" not in drawn  # a dot, whose place says it
    assert drawn.count("<circle") == 2 * 3  # settings, arms
    for text in (page, readme):
        lines = text.splitlines()
        for number in (number for number, line in enumerate(lines) if line.startswith("|---")):
            assert (
                lines[number].count("|")
                == lines[number - 1].count("|")
                == lines[number + 1].count("|")
            )


def test_the_page_shows_a_second_record_of_the_same_commit_beside_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_page, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_page, "REPEATS", tmp_path / "again")
    case = toy_case(name="step")
    result = recorded(tmp_path, monkeypatch, "a" * 40, 1.25, "2026-01-01", case)
    assert bench_page.repeat_of(result) is None
    assert "Recorded again" not in bench_page.page()
    recorded(tmp_path / "again", monkeypatch, "b" * 40, 1.25, "2026-01-02", case)
    assert bench_page.repeat_of(result) is None  # another commit
    recorded(tmp_path / "again", monkeypatch, "a" * 40, 1.5, "2026-01-03", case)
    page = " ".join(bench_page.page().split())
    assert "1 of 1 cases were recorded a second time" in page
    # the toys' times are equal in each process, so a range is one number
    rows = bench_page.compare_repeat(result, bench_page.repeat_of(result))
    by_arm = {row.arm: row for row in rows}
    assert (by_arm["veneer"].first, by_arm["veneer"].again) == ("1.25", "1.50")
    assert not by_arm["veneer"].is_within
    assert by_arm["veneer"].p == pytest.approx(2 / 252)  # no process of one is in the other
    assert by_arm["peft"].is_within
    assert by_arm["peft"].p == 1.0
    assert "floor" not in by_arm
    assert f"{len(rows) - 1} of {len(rows)} medians of the second record lie in" in page
    assert "1 of them differ by an exact rank-sum test (p below 0.05)" in page
    # numbers that both records have alike say nothing of chance and are counted apart
    identical = [row for row in rows if row.is_identical]
    assert by_arm["peft"] in identical
    assert by_arm["veneer"] not in identical
    assert f"{len(identical)} of these numbers have the same values in both records" in page
    assert f"of the other {len(rows) - len(identical)}, 0 lie in the range" in page
    assert f"| `step` | 0 of {len(rows) - len(identical)} | {len(identical)} |" in page


@pytest.mark.parametrize(("first", "again"), [(5, 5), (9, 5), (4, 3)])
def test_the_chance_of_a_median_outside_of_a_range_is_that_of_all_orders(first, again):
    orders = list(itertools.combinations(range(first + again), again))
    outside = sum(
        not min(set(range(first + again)) - set(chosen))
        < statistics.median(chosen)
        < max(set(range(first + again)) - set(chosen))
        for chosen in orders
    )
    assert bench_page.chance_outside(first, again) == pytest.approx(outside / len(orders))


def test_a_rank_sum_is_unlikely_exactly_as_often_as_it_is_rare():
    p_values = [
        bench_page.rank_sum_p(chosen, sorted(set(range(8)) - set(chosen)))
        for chosen in itertools.combinations(range(8), 4)
    ]
    for p in set(p_values):
        assert sum(value <= p + 1e-9 for value in p_values) / len(p_values) == pytest.approx(p)
    assert bench_page.rank_sum_p([1.0, 1.0], [1.0, 1.0]) == 1.0


def test_the_page_of_plans_takes_the_latest_record(tmp_path, monkeypatch):
    from scripts import plan_page

    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "plan_errors.json").write_text(json.dumps({"rows": []}))
    monkeypatch.setattr(plan_page, "RESULTS", tmp_path)
    assert plan_page.measured_rows() == (
        "Recorded before by another program; the runner's own record is pending.",
        [],
    )
    numbers = {
        "memory": 200.0,
        "seconds": 2.0,
        "planned memory": 210.0,
        "planned seconds": 1.0,
        "wall": 1.0,
    }
    rounds = {"as it comes": [numbers], "giving back": [{**numbers, "memory": 150.0}]}
    settings = [{"threads": 1, "name": name} for name in ("llama-fp32", "llama-fp32-ddp")]
    case = toy_case(name="plan_errors", floor="as it comes", settings=settings, apart=True)
    monkeypatch.setattr(runner, "require_clean_tree", lambda: "d" * 40)
    runner.write(
        runner.record(case, lambda *_: {"seed": 0, "rounds": rounds, "kept": True}), tmp_path
    )
    note, (alone, several) = plan_page.measured_rows()
    assert "dddddddddddd" in note
    assert alone["memory_error"] == pytest.approx(0.05)
    assert alone["held_error"] == pytest.approx(0.4)
    assert alone["time_error"] == pytest.approx(0.0)
    assert "time_error" not in several  # its processes wait for each other


def test_a_range_stands_beside_each_number():
    processes = [{**process_of([1.0], factor), "kept": True} for factor in (1.0, 1.5, 1.2)]
    case = {"processes": processes}
    assert bench_page.cell(case, "veneer", "floor", "wall", "ratio") == "1.20 (1.00–1.50)"
    assert bench_page.cell(case, "nobody", "floor", "wall", "ratio") == "–"
    processes[0]["rounds"]["veneer"][0]["wall"] = None
    assert bench_page.cell(case, "veneer", "floor", "wall", ".1f") == "1.4 (1.2–1.5), 2 of 3 runs"
    assert bench_page.sparkline([3.0]) == "▁"
