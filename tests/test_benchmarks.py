"""The benchmarks run, on toys: what they write has the form from which the docs are made. No time is judged here."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from demo import pronounce
from scripts import bench_page

import candidates
import compose
import engine
import experts
import fingerprints
import forward
import frozen
import import_time
import many
import merge
import merge_fidelity
import mixed
import planner
import report
import scaling
import sweep
import tasks
import time_to_target
import train_memory
import train_step
from task_cases import answers

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers warn

SHAPE = ["--tiny", "--layers", "1"]
PLANNED = ["llama", "resnet18"]
MEMORY_ROWS = ["full fine-tuning", "peft", "veneer"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recorded(base, tmp_path_factory) -> Iterator[Callable[..., Path]]:
    """The folder of results, after these programs ran (all, if none is named) that have not yet. There is every one but
    `attach`; what they run in processes of its own runs in this one."""
    folder = tmp_path_factory.mktemp("results")
    out, few = ["--out", str(folder)], [*SHAPE, "--tokens", "16"]
    runs = {
        train_step: [*few, "--rank", "4", "--runs", "1"],
        train_memory: [*few, "--rank", "4", "--steps", "1", "--only", *MEMORY_ROWS],
        forward: [*SHAPE, "--tokens", "1", "16", "--runs", "1"],
        experts: ["--tiny", "--runs", "1"],
        engine: [*SHAPE, "--runs", "1", "--dtype", "float32"],
        mixed: [*SHAPE, "--runs", "1", "--length", "4"],
        many: [*SHAPE, "--runs", "1", "--sizes", "2x4"],
        frozen: ["--tiny", "--layers", "3", "--runs", "1"],
        planner: ["--model", *PLANNED, "--runs", "1", "--repeats", "1"],
        compose: ["--quick", "--runs", "1"],
        scaling: ["--tiny", "--runs", "1"],
        time_to_target: ["--quick", "--base", str(base)],
        tasks: ["--quick", "--case", "dpo", "grpo", "--at-once", "1"],
        sweep: ["--quick", "--base", str(base)],
        import_time: ["--runs", "1"],
        fingerprints: ["--tiny", "--layers", "1", "--runs", "1"],
        merge_fidelity: ["--quick", "--base", str(base)],
        merge: ["--quick"],
    }

    def run(*programs: ModuleType) -> Path:
        for program in programs or [*runs]:
            if arguments := runs.pop(program, None):
                program.main([*arguments, *out])
        return folder

    with pytest.MonkeyPatch.context() as patch:
        for module in (train_memory, time_to_target, tasks, merge, mixed, sweep):
            patch.setattr(module, "child", lambda script, *arguments, module=module, **_: module.main(arguments))
        patch.setattr(answers, "SMOLLM", str(base))
        patch.setattr(import_time, "run", lambda name: 1.0)
        patch.setattr(pronounce, "words", functools.cache(pronounce.words))
        yield run


def written(folder: Path, name: str) -> dict:
    """The result in `folder`; it says where it was made."""
    result = json.loads((folder / f"{name}.json").read_text())
    assert result["name"] == name
    assert result["machine"]
    assert {"torch", "veneer", "python"} <= result["versions"].keys()
    return result


def check(row: dict) -> None:
    assert row["low"] <= row["ratio"] <= row["high"]


def test_experts(recorded):
    result = written(recorded(experts), "experts")
    asked = [(case["setting"]["call"], case["setting"]["dtype"]) for case in result["cases"]]
    assert asked == [(call, dtype) for dtype in ("float32", "bfloat16") for call in ("one token", "a step")]
    for case in result["cases"]:
        assert list(case["rows"])[:3] == ["base", "veneer", "peft"]
        for row in case["rows"].values():
            check(row)


@pytest.mark.parametrize("arch", candidates.ARCHITECTURES)
def test_train_step(arch, tmp_path):
    train_step.main([*SHAPE, "--arch", arch, "--tokens", "16", "--rank", "4", "--runs", "1", "--out", str(tmp_path)])
    result = written(tmp_path, "train_step")
    assert [case["setting"]["dtype"] for case in result["cases"]] == ["float32", "bfloat16"]
    for case in result["cases"]:
        assert case["setting"] | {"dtype": ""} == {
            "architecture": arch, "dtype": "", "tokens": 16, "rank": 4, "layers": 1
        }  # fmt: skip
        assert list(case["rows"]) == candidates.names(arch, case["setting"]["dtype"])
        assert case["rows"]["floor"]["ratio"] == 1
        for row in case["rows"].values():
            check(row)


def test_a_step_is_measured_a_few_rows_a_process(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_step, "PROCESSES", (("peft", "veneer"), ("loralib", "peft, bf16 adapters")))
    monkeypatch.setattr(train_step, "child", lambda script, *arguments: train_step.main(arguments)["cases"][0])
    small = [*SHAPE, "--arch", "llama", "--dtype", "float32", "--tokens", "16", "--rank", "4", "--runs", "1"]
    train_step.main([*small, "--apart", "--out", str(tmp_path)])
    (case,) = written(tmp_path, "train_step")["cases"]
    assert list(case["rows"]) == ["floor", "peft", "loralib", "veneer"]  # of float32 no row with other adapters
    for row in case["rows"].values():
        check(row)
    assert all(row in candidates.names("llama", "bfloat16") for rows in train_step.PROCESSES for row in rows)


def test_the_grid_has_every_case():
    cases = list(train_step.grid(list(candidates.ARCHITECTURES), list(candidates.DTYPES)))
    assert len({tuple(case.items()) for case in cases}) == 4 * 2 * 4 * 3
    assert {case["tokens"] for case in cases} == {64, 256, 1024, 4096}


def test_an_unusual_case_is_printed_and_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    train_step.main([*SHAPE, "--tokens", "16", "--rank", "4", "--runs", "1", "--only", "veneer"])
    assert "veneer" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


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
    made, seen = candidates.make("floor", model, "llama", 4), []
    model.get_submodule(known.entry).register_forward_hook(lambda *call: seen.append(call[2]))
    candidates.step(made, made.optimizer(), known.batch(model, 16))
    assert seen[0].grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_train_memory(recorded):
    for case in written(recorded(train_memory), "train_memory")["cases"]:
        assert list(case["rows"]) == ["floor", *MEMORY_ROWS]
        for row in case["rows"].values():
            assert row.keys() == train_memory.NUMBERS.keys()
            for number in row.values():
                check(number)
        assert case["rows"]["floor"]["saved"]["ratio"] == 1


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
    assert train_memory.saved(made, {"x": torch.ones(10)}) == 10 * 4  # x, though both of its halves are saved


def test_time_to_target(recorded):
    result = written(recorded(time_to_target), "time_to_target")
    (case,) = result["cases"]
    assert list(case["rows"]) == list(time_to_target.LIBRARIES)
    assert case["rows"][time_to_target.PEER]["cpu"]["ratio"] == 1  # it reaches its own target
    for name, row in case["rows"].items():
        (curve,) = result["curves"][name]
        last = round(4 * (time_to_target.LONGER if name == "veneer" else 1))
        assert [point["step"] for point in curve] == list(range(0, last + 1, 2))
        assert curve[-1]["loss"] < curve[0]["loss"]
        assert row["losses"] == [round(curve[-1]["loss"], 4)]
        for cost in ("wall", "cpu"):
            assert row[cost] is None or row[cost]["seconds"] > 0
    firsts = [curves[0][0]["loss"] for curves in result["curves"].values()]
    assert max(firsts) - min(firsts) < 0.02  # all begin at the base, judged alike


def test_the_way_to_a_target_is_interpolated():
    curve = [{"loss": loss, "cpu": cpu} for loss, cpu in ((4.0, 0.0), (2.0, 10.0), (3.0, 20.0), (1.0, 30.0))]
    found = {target: time_to_target.reached(curve, target, "cpu") for target in (3.0, 2.0, 1.5, 0.5)}
    assert found == {3.0: 5.0, 2.0: 10.0, 1.5: 27.5, 0.5: None}


def test_sweep(recorded):
    result = written(recorded(sweep), "sweep")
    (case,) = result["cases"]
    assert list(case["rows"]) == [sweep.GRID, sweep.HALVING]
    for name, row in case["rows"].items():
        check(row)
        assert row["losses"] == [round(result["sweeps"][name][0]["loss"], 4)]
        assert len(result["sweeps"][name][0]["losses"]) == 16
    assert case["rows"][sweep.GRID]["steps"] == 16 * 9
    assert case["rows"][sweep.HALVING]["steps"] == 16 + 7 * 2 + 3 * 6
    assert case["rows"][sweep.GRID]["as good"] is True


def test_tasks(recorded):
    cases = written(recorded(tasks), "tasks")["cases"]
    assert [case["setting"]["task"] for case in cases] == ["dpo", "grpo"]
    for case in cases:
        assert list(case["rows"]) == [tasks.PEER, tasks.OWN]
        assert case["holds"] == all(case["verdict"].values())
        for row in case["rows"].values():
            check(row)
            check(row["steps"])
            assert 0 <= row["quality"] <= 1
    assert "before" in cases[1]  # the reward must rise


def test_a_task_holds_by_all_three_marks():
    def verdict(quality: float, cpu: float) -> dict[str, bool]:
        peers = [{"quality": value, "cpu": 10.0, "steps": 5.0, "before": 0.5} for value in (0.6, 0.7, 0.8)]
        own = [{"quality": quality, "cpu": cpu, "steps": 5.0}] * 3
        return tasks.of({tasks.PEER: peers, tasks.OWN: own})["verdict"]

    error = 0.1 / 3**0.5  # the peer's mean is 0.7
    assert verdict(0.7 - error + 1e-6, 10.0) == {"quality": True, "cpu": True, "rises": True}
    assert verdict(0.7 - error - 1e-6, 10.1) == {"quality": False, "cpu": False, "rises": True}
    assert verdict(0.5, 9.0) == {"quality": False, "cpu": True, "rises": False}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tagging", "digits", "speech"])
def test_a_task_of_its_own_rows(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "child", lambda script, *arguments: tasks.main(arguments))
    snips = tmp_path / "snips"
    snips.mkdir()
    pieces = [{"text": "play "}, {"text": "Some Song", "entity": "track"}, {"text": " now"}]
    for file, count in (("train_Play_full.json", 8), ("validate_Play.json", 2)):
        rows = [{"data": [*pieces, {"text": f"{file} {i}"}]} for i in range(count)]
        (snips / file).write_text(json.dumps({"Play": rows}))
    asked = ["--quick", "--case", name, "--at-once", "1", "--snips", str(snips), "--out", str(tmp_path)]
    if lacking := tasks.CASES[name].needs(tasks.parser().parse_args(asked)):
        pytest.skip(lacking)
    before = {"cases": [{"setting": {"task": "dpo"}, "holds": False}]}
    (tmp_path / "tasks.json").write_text(json.dumps(before))
    (judged,) = tasks.main(asked)["cases"]  # what was recorded of other cases is not judged again
    _, case = sorted(written(tmp_path, "tasks")["cases"], key=lambda case: case["setting"]["task"] == name)
    assert judged == case
    assert case["setting"]["task"] == name
    assert "before" not in case


def test_scaling(recorded):
    cases = written(recorded(scaling), "scaling")["cases"]
    assert [case["setting"]["axis"] for case in cases] == list(scaling.AXES)
    for case in cases:
        assert list(case["rows"]) == list(scaling.CANDIDATES)
        for row in case["rows"].values():
            assert len(row["seconds"]) == len(case["sizes"])
            assert row["fit"] is None or row["fit"].keys() == {"exponent", "factor", "residual"}


def test_the_fit_finds_a_power_and_says_where_there_is_none():
    sizes = [1, 2, 4, 8]
    found = scaling.fit(sizes, [3 * size**1.5 for size in sizes])
    assert found == {"exponent": 1.5, "factor": pytest.approx(3), "residual": 0}
    assert scaling.fit(sizes, [1, 2, -1, 3]) is None


def test_frozen(recorded):
    """Each pair computes one loss, which the program asserts."""
    cases = written(recorded(frozen), "frozen")["cases"]
    assert [case["setting"]["gain"] for case in cases] == [*frozen.GAINS, *frozen.GAINS]
    for case in cases:
        assert list(case["rows"]) == ["without", "with"]


def test_planner(recorded):
    cases = written(recorded(planner), "planner")["cases"]
    assert [case["setting"]["model"] for case in cases] == PLANNED
    for case in cases:
        assert list(case["rows"]) == ["factored", "planner"]


def test_forward(recorded):
    result = written(recorded(forward), "forward")
    assert [(case["setting"]["dtype"], case["setting"]["tokens"]) for case in result["cases"]] == [
        ("float32", 1), ("float32", 16), ("bfloat16", 1), ("bfloat16", 16)
    ]  # fmt: skip
    for case in result["cases"]:
        merged, own = "veneer, merged and attached", "veneer, model's own attention"
        assert list(case["rows"]) == ["base", "veneer, merged", merged, "veneer", own, "peft"]
    assert result["calls"]["bare"] == 9
    assert result["calls"].keys() == {"bare", "veneer", "peft"}


def test_engine(recorded):
    """The engine, `generate` and `generate_batch` answer the same requests."""
    cases = written(recorded(engine), "engine")["cases"]
    assert [case["setting"]["phase"] for case in cases] == ["prefill", "decode"]
    for case in cases:
        assert list(case["rows"]) == ["transformers, generate", "transformers, continuous batching", "veneer"]
        for row in case["rows"].values():
            check(row)
            assert row["rate"] > 0


def test_mixed(recorded):
    """Every candidate decodes and fills; a bank's further adapter takes some memory."""
    result = written(recorded(mixed), "mixed")
    assert len(result["cases"]) == 4
    for case in result["cases"]:
        assert list(case["rows"]) == ["base", "bank, idle", "bank, 8", "bank, 16", "bank, 8, DoRA", "peft, 8"]
        for row in case["rows"].values():
            check(row)
    assert result["memory"].keys() == {"float32", "bfloat16"}


def test_many(recorded):
    """Steps at once beside steps apart, in each dtype."""
    cases = written(recorded(many), "many")["cases"]
    assert [case["setting"]["dtype"] for case in cases] == ["float32", "bfloat16"]
    for case in cases:
        assert list(case["rows"]) == ["apart", "at once", "frozen", "peft, apart", "at once, of peft's"]
        for row in case["rows"].values():
            check(row)


def test_compose(recorded):
    """PEFT's adapter is Veneer's, which the program measures too."""
    case = written(recorded(compose), "compose")
    assert list(case["rows"]) == ["veneer, svd", "veneer, exact", "peft, svd", "peft, cat"]
    assert case["setting"] == {"adapters": 8, "rank": 4, "layers": 14}
    assert max(case["off"].values()) < 1e-4


def test_merge_fidelity(recorded):
    result = written(recorded(merge_fidelity), "merge_fidelity")
    assert [case["setting"]["dtype"] for case in result["cases"]] == list(merge_fidelity.DTYPES)
    for case in result["cases"]:
        assert list(case["rows"]) == ["nearest", "stochastic", "faithful", "faithful, outputs"]
        for row in case["rows"].values():
            assert row.keys() == {"retention", "inside", "outside", "nanoseconds"}
    early, late = result["adapters"]
    assert [case["setting"]["steps"] for case in (early, late)] == [1, 2]
    assert list(late["rows"]) == [
        "base", "adapter", "stochastic", "faithful, outputs", "nearest", "faithful", "faithful, inputs", "peft"
    ]  # fmt: skip
    assert late["rows"]["adapter"]["divergence"] == 0
    assert late["rows"]["adapter"]["loss"] < late["rows"]["base"]["loss"]
    (grid,) = result["grids"]
    assert grid["rows"]["nearest"]["retention"] < 0.3 < 0.8 < grid["rows"]["faithful"]["retention"]
    assert [case["setting"]["steps"] for case in result["grid_adapters"]] == [1, 2]
    for case in result["grid_adapters"]:
        assert list(case["rows"]) == ["base", "adapter", "nearest", "faithful"]
        assert case["rows"]["adapter"]["divergence"] == 0


def test_merge(recorded):
    """The result was compared bit for bit with a merge in memory."""
    (case,) = written(recorded(merge), "merge")["cases"]
    assert list(case["rows"]) == list(merge.CANDIDATES)
    for row in case["rows"].values():
        check(row)
        assert row["peak"] > 2**20


def test_rounding_at_random_is_right_on_average():
    values = torch.full((1, 1, 20_000), 1.3 * 2.0**-7 + 1, dtype=torch.float64)
    found = merge_fidelity.at_random(values, torch.bfloat16).double()
    assert {*found.unique().tolist()} == {1 + 2.0**-7, 1 + 2 * 2.0**-7}
    assert abs(float(found.mean() - values[0, 0, 0])) < 0.02 * 2.0**-7


def test_fingerprints(recorded):
    for case in written(recorded(fingerprints), "fingerprints")["cases"]:
        assert list(case["rows"]) == ["read", "hash", "again"]


def test_import_time(recorded):
    assert list(written(recorded(import_time), "import_time")["rows"]) == [
        "torch",
        "veneer",
        "veneer, nothing used",
        "peft",
    ]


def test_a_process_of_its_own_answers_in_its_last_line(tmp_path):
    script = tmp_path / "answer.py"
    script.write_text("import sys\nprint('a word')\nprint('{\"said\": \"' + sys.argv[1] + '\"}')\n")
    assert report.child(str(script), "this") == {"said": "this"}
    script.write_text("raise SystemExit('broken')")
    with pytest.raises(RuntimeError, match="broken"):
        report.child(str(script))


def test_rounds_begin_with_each_candidate_in_turn():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    assert report.rounds(calls, runs=2, warmup=1) == {"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 1.0]}
    assert "".join(order) == "abcbcacab"


def test_the_pages_show_every_result(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_page, "RESULTS", tmp_path)
    assert "## " not in bench_page.page()
    assert bench_page.readme() == ""
    monkeypatch.setattr(bench_page, "RESULTS", recorded())
    page, readme = bench_page.page(), bench_page.readme()
    steps = {f"train_step_{more}" for more in ("small", "others", "tuned", "grid")}
    quantized = {name for name in bench_page.PROGRAMS if name.startswith("quantized")}
    elsewhere = {*steps, *quantized, "attach", "clients", "serve", "serve_cold", "serve_vanish"}
    shown = bench_page.PROGRAMS.keys() - elsewhere
    for name in shown:
        assert f"## {name}\n" in page
    says = [name for name in shown if "\nPredicted" in str(sys.modules[bench_page.PROGRAMS[name]].__doc__)]
    assert len(says) == 18
    assert page.count("> Predicted") == len(says)
    assert "| veneer, dropout |" in page
    assert "| **Veneer**, dropout 0.05 |" in page
    assert "| | Veneer, fp32 | PEFT, fp32 | Veneer, bf16 | PEFT, bf16 |" in readme
    assert re.search(r"^\| a training step of \d+ layers \|", readme, re.MULTILINE)
    for text in (page, readme):
        lines = text.splitlines()
        heads = [number for number, line in enumerate(lines) if line.startswith("|---")]
        for number in heads:
            assert lines[number].count("|") == lines[number - 1].count("|") == lines[number + 1].count("|")
        assert sys.prefix not in text


@pytest.mark.slow
def test_clients(tmp_path, monkeypatch):
    import clients

    clients.main(["--tiny", "--runs", "1", "--dtype", "float32", "--tokens", "8", "--out", str(tmp_path)])
    (case,) = written(tmp_path, "clients")["cases"]
    assert list(case["rows"]) == ["one after another", "at once", "at once, the server's CPU"]
    assert case["rows"]["at once"]["alike"] < 1e-3
    for row in case["rows"].values():
        check(row)
    monkeypatch.setattr(bench_page, "RESULTS", tmp_path)
    assert "## clients\n" in bench_page.page()
    assert "> Predicted" in bench_page.page()


@pytest.mark.slow
def test_quantized(tmp_path):
    """On a base that knows nothing, so what it says of the error rate is not looked at."""
    pytest.importorskip("bitsandbytes")
    from tests.support.tiny import write_tiny

    import quantized

    base = write_tiny(tmp_path / "base", hidden_size=64, intermediate_size=128)
    folders = ["--folder", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert quantized.main(["--base", str(base), "--steps", "3", "--words", "4", *folders]) in (0, 1)
    (case,) = written(tmp_path, "quantized")["cases"]
    kept = {name: row.get("retention") for name, row in case["rows"].items()}
    assert list(kept) == ["bf16", "nf4 on bf16", "nf4", "nf4 in 16 bits", "nf4 in nf4, nearest", "nf4 in nf4, auto"]
    assert kept["bf16"] is kept["nf4"] is None
    assert kept["nf4 in 16 bits"] > 0.98 > kept["nf4 in nf4, nearest"]
    assert case["rows"]["nf4"]["loss"] != case["rows"]["nf4 on bf16"]["loss"]
