"""Tables of what benchmarks/results/*.json hold: one for the README, all of them for docs/benchmarks.md."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

#: results in the order of the page, and the program that each is of
PROGRAMS = {
    "train_step": "train_step", "train_step_small": "train_step", "train_step_others": "train_step",
    "train_step_tuned": "train_step", "train_step_grid": "train_step",
    "train_memory": "train_memory", "time_to_target": "time_to_target", "tasks": "tasks",
    "many": "many", "clients": "clients", "sweep": "sweep",
    "scaling": "scaling", "forward": "forward",
    "experts": "experts",
    "frozen": "frozen", "planner": "planner", "attach": "attach", "compose": "compose", "import_time": "import_time",
    "fingerprints": "fingerprints",
    "merge_fidelity": "merge_fidelity", "merge": "merge", "mixed": "mixed", "engine": "engine", "serve": "serve",
    "serve_cold": "serve", "serve_vanish": "serve",
    "quantized": "quantized", "quantized_fp4": "quantized", "quantized_int8": "quantized",
}  # fmt: skip
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
#: rows of the summary's first table, and how they are called there
STEP_ROWS = {
    "full fine-tuning": "full fine-tuning",
    "peft": "PEFT",
    "peft, dropout": "PEFT, dropout 0.05",
    "peft, bf16 adapters": "PEFT, adapters in bf16",
    "loralib": "loralib",
    "veneer": "**Veneer**",
    "veneer, dropout": "**Veneer**, dropout 0.05",
    "veneer, model's own layout": "**Veneer**, with the model's own layout",
    "veneer, model's own attention": "**Veneer**, with the model's own attention",
    "veneer, model's own attention and loss": "**Veneer**, with the model's own attention and loss",
}


def results() -> dict[str, Any]:
    """The recorded results, by name; a result of one case is a result of a list of one."""
    found = {}
    for name in PROGRAMS:
        file = RESULTS / f"{name}.json"
        if file.exists():
            result = json.loads(file.read_text())
            found[name] = {"cases": [{"setting": {}, **result}], **result}
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, and an empty one."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return [*(re.sub(r" {2,}", " ", line) for line in lines), ""]


def ratio(row: Mapping[str, Any] | None, spread: bool = True) -> str:
    if not row:
        return "–"
    text = f"{row['ratio']:.2f}"
    return f"{text} ({row['low']:.2f}–{row['high']:.2f})" if spread else text


def said(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {SHORT.get(value, value)}" for key, value in setting.items())


# ---------------------------------------------------------------------------------------------- README.md


def readme() -> str:
    """The README's table: a row for each thing that was measured, Veneer beside PEFT in either precision."""
    found = results()
    rows: dict[str, dict[str, tuple[str, str]]] = {}
    for title, dtype, *cells in (*_ratios_beside_peft(found), *_served_beside_peft(found)):
        rows.setdefault(title, {})[dtype] = (cells[0], cells[1])
    if not rows:
        return ""
    lead = (
        "Times and memory are ratios to the floor or the plain base of the same run (the smaller, the better), medians "
        "of CPU time of one thread, with quartiles: SmolLM2-135M's shape, rank 8 on all linear layers. Rates are "
        "also over PEFT's."
    )
    if "import_time" in found:
        times = found["import_time"]["cases"][0]["rows"]
        lead += (
            f" Importing what attaching needs takes {ratio(times['veneer'])} of `import torch`'s time, PEFT "
            f"{ratio(times['peft'])}."
        )
    head = ["", "Veneer, fp32", "PEFT, fp32", "Veneer, bf16", "PEFT, bf16"]
    lines = [
        [title, *(cell for dtype in ("float32", "bfloat16") for cell in own.get(dtype, ("", "")))]
        for title, own in rows.items()
    ]
    return "\n".join([lead, "", *table(head, lines)]).rstrip()


def _ratios_beside_peft(found: Mapping[str, Any]) -> Iterable[list[str]]:
    """What was measured, its dtype, Veneer's and PEFT's ratio."""
    own = "veneer, model's own attention and loss"
    for name, title, who, number in (
        ("train_step", "a training step of {} layers", "veneer", ""),
        ("train_step", "with the model's own attention and loss", own, ""),
        ("train_memory", "peak memory of a step", "veneer", "peak"),
        ("train_memory", "kept by a step for backward", "veneer", "saved"),
    ):
        for case in found.get(name, {"cases": []})["cases"]:
            sides = [case["rows"].get(side) or {} for side in (who, "peft")]
            cells = [side.get(number) if number else side for side in sides]
            if all(cells):
                setting = case["setting"]
                yield [title.format(setting["layers"]), setting["dtype"], *map(ratio, cells)]
    for case in found.get("forward", {"cases": []})["cases"]:
        if case["setting"]["tokens"] in (1, 256):
            title = f"a forward pass of {_tokens(case['setting']['tokens'])}"
            yield [title, case["setting"]["dtype"], ratio(case["rows"]["veneer"]), ratio(case["rows"]["peft"])]
    for case in found.get("mixed", {"cases": []})["cases"]:
        if case["setting"]["call"] == "decode":
            title, dtype = "decoding 16 rows that use 8 adapters", case["setting"]["dtype"]
            yield [title, dtype, ratio(case["rows"]["bank, 8"]), ratio(case["rows"]["peft, 8"])]


def _served_beside_peft(found: Mapping[str, Any]) -> Iterable[list[str]]:
    for case in found.get("serve", {"cases": []})["cases"]:
        setting, rows = case["setting"], case["rows"]
        title = f"tokens/s, served to {setting['clients']} clients over {setting['adapters']} adapters"
        ours, theirs = rows.get("veneer"), rows.get("peft, mixed batches")
        if ours and theirs:  # the peer is the floor: its time over ours is how many times its rate we have
            times = ratio({"ratio": 1 / ours["ratio"], "low": 1 / ours["high"], "high": 1 / ours["low"]})
            cells = [f"{ours['rate']:,.0f}, × {times}", f"{theirs['rate']:,.0f}"]
            yield [title, setting["dtype"], *cells]


# ---------------------------------------------------------------------------------------------- docs/benchmarks.md


def summary(found: Mapping[str, Any]) -> list[str]:
    """The first tables of docs/benchmarks.md: the step, the way to a target, forward, serving, and a line about the
    rest."""
    parts = [
        _step_table(found),
        _target_table(found),
        _forward_table(found),
        _mixed_table(found),
        _serve_table(found),
        _rest(found),
    ]
    lines = [line for part in parts for line in part]
    lead = "Medians of CPU time of one thread, as ratios to the plain base in the same run."
    return ["## In short", "", lead, "", *lines] if lines else []


def _step_table(found: Mapping[str, Any]) -> list[str]:
    columns: list[tuple[str, Any, str]] = []
    for name, title, number in (("train_step", "step", ""), ("train_memory", "saved for backward", "saved"),
                                ("train_memory", "peak memory", "peak")):  # fmt: skip
        for case in found.get(name, {"cases": []})["cases"]:
            columns.append((f"{title}, {SHORT[case['setting']['dtype']]}", case, number))
    if not columns:
        return []
    rows = []
    for key, label in STEP_ROWS.items():
        cells = [(case["rows"].get(key) or {}) for _, case, _ in columns]
        cells = [cell.get(number) if number else cell for cell, (_, _, number) in zip(cells, columns, strict=True)]
        if any(cells):
            rows.append([label, *(ratio(cell, spread=False) for cell in cells)])
    setting = columns[0][1]["setting"]
    rows_of, length = max(1, setting["tokens"] // 256), min(setting["tokens"], 256)
    lead = (
        f"Training a model of SmolLM2-135M's shape ({setting['layers']} layers), {rows_of} × {length} tokens, rank "
        f"{setting['rank']} on all linear layers. The floor, 1.00, is what any step over a frozen base must do: "
        "forward, and the gradient carried back to the embedded input."
    )
    return [lead, "", *table(["", *(title for title, _, _ in columns)], rows)]


def _target_table(found: Mapping[str, Any]) -> list[str]:
    if "time_to_target" not in found:
        return []
    (case,) = found["time_to_target"]["cases"]
    labels = {
        "trl + peft": "TRL + PEFT, defaults", "trl + peft, tuned": "TRL + PEFT, tuned",
        "veneer, as many steps": "**Veneer**, as many steps", "veneer": "**Veneer**, 1.5 × the steps",
    }  # fmt: skip
    rows = [
        [labels[name], ratio(row["wall"]), ratio(row["cpu"]), f"{row['loss']:.3f}"]
        for name, row in case["rows"].items()
    ]
    lead = (
        f"SmolLM2-135M on spelling → phonemes, to a held-out loss of {case['target']:.2f} "
        f"({case['runs']} {'seeds' if case['runs'] > 1 else 'seed'}, with quartiles):"
    )
    return [lead, "", *table(["", "wall time", "CPU time", "final loss"], rows)]


def _forward_table(found: Mapping[str, Any]) -> list[str]:
    if "forward" not in found:
        return []
    cases = [case for case in found["forward"]["cases"] if case["setting"]["dtype"] == "float32"]
    head = ["forward, fp32", *(_tokens(case["setting"]["tokens"]) for case in cases)]
    labels = {"veneer, merged": "**Veneer**, merged", "veneer": "**Veneer**", "peft": "PEFT"}
    rows = [[label, *(ratio(case["rows"][key], spread=False) for case in cases)] for key, label in labels.items()]
    return table(head, rows)


def _mixed_table(found: Mapping[str, Any]) -> list[str]:
    if "mixed" not in found:
        return []
    cases = found["mixed"]["cases"]
    head = ["16 rows, their adapters mixed: time, base 1.00"]
    head += [f"{case['setting']['call']}, {SHORT[case['setting']['dtype']]}" for case in cases]
    labels = {"bank, 8": "**Veneer**, 8 adapters", "bank, 16": "**Veneer**, 16 adapters",
              "bank, 8, DoRA": "**Veneer**, 8 adapters, DoRA", "peft, 8": "PEFT, 8 adapters"}  # fmt: skip
    rows = [[label, *(ratio(case["rows"][key], spread=False) for case in cases)] for key, label in labels.items()]
    return table(head, rows)


def _serve_table(found: Mapping[str, Any]) -> list[str]:
    if "serve" not in found:
        return []
    cases = found["serve"]["cases"]
    labels = {"veneer": "**Veneer**", "peft, mixed batches": "PEFT, mixed batches",
              "merged, in turns": "merged models, in turns", "merged, a process a core": "merged models, more memory",
              "vllm": f"vLLM, CPU build{_vllm_dtype(cases)}"}  # fmt: skip
    head = [f"served to {cases[0]['setting']['clients']} clients over {cases[0]['setting']['adapters']} adapters"]
    for case in cases:
        dtype = SHORT[case["setting"]["dtype"]]
        head += [f"tokens/s, {dtype}", "to the first, ms", "between two, p95, ms"]
    rows = []
    for name, label in labels.items():
        if not any(name in case["rows"] for case in cases):
            continue
        cells = [label]
        for case in cases:
            row = case["rows"].get(name)
            numbers = (row["rate"], row["first"]["p50"], row["next"]["p95"]) if row else ()
            cells += [f"{number:,.0f}" for number in numbers] or ["–"] * 3
        rows.append(cells)
    return table(head, rows)


def _vllm_dtype(cases: Sequence[Mapping[str, Any]]) -> str:
    """A note on cases in which vLLM was not told the dtype: its "auto" takes bf16 for a float32 model too."""
    told = all("vllm_dtype" in case["setting"] for case in cases if "vllm" in case["rows"])
    return "" if told else ", bf16 in both (its `auto`)"


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count:,} tokens"


def _rest(found: Mapping[str, Any]) -> list[str]:
    texts = []
    if "import_time" in found:
        rows = found["import_time"]["cases"][0]["rows"]
        texts.append(
            f"importing what attaching needs takes {rows['veneer']['ratio']:.2f} × `import torch` "
            f"(PEFT {rows['peft']['ratio']:.2f})"
        )
    if "attach" in found:
        last = found["attach"]["cases"][0]["rows"]["128th adapter"]
        texts.append(f"attaching the 128th adapter {last['ratio']:.2f} × the first")
    if "forward" in found:
        calls = found["forward"]["calls"]
        texts.append(
            f"a forward of one adapted linear layer makes {calls['veneer']} Python calls (PEFT {calls['peft']}, the "
            f"bare layer {calls['bare']})"
        )
    return [f"{'; '.join(texts)}.", ""] if texts else []


def page() -> str:
    """Every result, with what was predicted before it, where it was measured, and quartiles."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make docs` from `benchmarks/results/`, which `make bench` writes (`make bench-grid`: every "
        "architecture). Numbers are ratios to the named floor in the same round, medians with quartiles; smaller is "
        "better. Each program says in its first lines what it measures, and what was predicted before it first ran; "
        "predictions stay as they were, right or wrong.",
        "",
    ]
    found = results()
    lines += summary(found)
    for name, result in found.items():
        lines += [f"## {name}", "", *_about(PROGRAMS[name], name), _made(result), ""]
        for group in _groups(result["cases"]):
            lines += _case_tables(name, group)
        lines += _merged_adapters(result.get("adapters", []))
        lines += _memory_at_once(result["memory"]) if name == "many" else []
        if result.get("grids"):
            lines += ["Quantised weights, from which ΔW starts; the time is the whole merge's.", ""]
            lines += [_made(result["grids_made"]), ""]
            lines += [*_roundings(result["grids"]), *_merged_grids(result["grid_adapters"])]
        if "calls" in result:
            text = ", ".join(f"{who} {count}" for who, count in result["calls"].items())
            lines += [f"Python calls in a forward of one `nn.Linear`: {text}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _about(program: str, name: str) -> list[str]:
    doc = ast.get_docstring(ast.parse((ROOT / "benchmarks" / f"{program}.py").read_text())) or ""
    first = doc.split("\n\n")[0].partition("Predicted")[0]
    predicted = re.search(r"Predicted[^:]*:.*", doc, re.DOTALL)
    lines = [" ".join(first.split()), ""]
    if predicted and name == program:
        lines += [f"> {' '.join(predicted[0].split())}", ""]
    return lines


def _made(result: Mapping[str, Any]) -> str:
    versions = result.get("versions", {"torch": result.get("torch", "?")})
    parts = [str(result["machine"])]
    if "cores" in result:
        parts[0] += f", {result['cores']} cores"
        parts.append(f"allocator {result['allocator']}")
    return f"On {'; '.join(parts)}; {', '.join(f'{key} {value}' for key, value in versions.items())}."


def _groups(cases: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Cases that share a table: those of an architecture, if there are several."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        groups.setdefault(str(case["setting"].get("architecture", "")), []).append(case)
    return list(groups.values())


def _shared(cases: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """(what all the settings say, the names of what differs)."""
    first = cases[0]["setting"]
    names = dict.fromkeys(key for case in cases for key in case["setting"])
    differ = [name for name in names if any(case["setting"].get(name) != first.get(name) for case in cases)]
    return {name: first[name] for name in names if name not in differ}, differ


def _case_tables(name: str, cases: list[Mapping[str, Any]]) -> list[str]:
    if name == "train_memory":
        return [line for case in cases for line in _memory(case)]
    if name == "time_to_target":
        return [line for case in cases for line in _target(case)]
    if name == "scaling":
        return _scaling(cases)
    if name == "tasks":
        return _tasks(cases)
    if name == "merge_fidelity":
        return _roundings(cases)
    if name.startswith("quantized"):
        return [line for case in cases for line in _quantised(case)]
    if name in ("merge", "serve", "serve_cold", "serve_vanish", "sweep"):
        form = {"merge": _files, "sweep": _swept, "serve": _served, "serve_cold": _cold, "serve_vanish": _vanished}[
            name
        ]
        return [line for case in cases for line in form(case)]
    shared, differ = _shared(cases)
    floor, runs = cases[0]["floor"], cases[0]["runs"]
    lead = [f"{said(shared)}: " if shared else "", f"ratio to {floor}, {runs} rounds."]
    keys = [key for key in dict.fromkeys(key for case in cases for key in case["rows"]) if key != floor]
    if len(cases) > 6:  # a case a row, a candidate a column
        head = [*differ, f"{floor}, ms", *keys]
        rows = [
            [*(str(SHORT.get(case["setting"].get(key), case["setting"].get(key))) for key in differ),
             f"{case['rows'][floor]['seconds'] * 1000:,.0f}",
             *(ratio(case["rows"].get(key), spread=False) for key in keys)]
            for case in cases
        ]  # fmt: skip
    else:
        head = ["", *(said({key: case["setting"].get(key) for key in differ}) or "ratio" for case in cases)]
        rows = [[f"{floor}, ms", *(f"{case['rows'][floor]['seconds'] * 1000:,.1f}" for case in cases)]]
        rows += [[key, *(ratio(case["rows"].get(key)) for case in cases)] for key in keys]
    return ["".join(lead), "", *table(head, rows)]


def _tasks(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for case in cases:
        sides = [case["rows"][name] for name in ("veneer", "peft")]
        qualities = [f"{side['quality']:.3f} ± {side['error']:.3f}" for side in sides]
        if "before" in case:
            qualities[1] += f"; the base {case['before']:.3f}"
        steps = f"{case['setting']['steps']} × {case['setting']['batch']}, {case['runs']}"
        times = [ratio(sides[0]), ratio(sides[0]["steps"]), f"{sides[1]['seconds']:.0f}"]
        lacking = ", ".join(name for name, met in case["verdict"].items() if not met)
        rows.append([case["setting"]["task"], steps, *qualities, *times, f"misses {lacking}" if lacking else "holds"])
    head = [
        "",
        "steps × rows, seeds",
        "Veneer",
        "PEFT",
        "CPU time over PEFT's",
        "of the steps alone",
        "PEFT, s",
        "the bar",
    ]
    return [f"Rank {cases[0]['setting']['rank']}.", "", *table(head, rows)]


def _swept(case: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, row in case["rows"].items():
        losses = ", ".join(f"{loss:.3f}" for loss in row["losses"])
        rows.append([name, ratio(row), f"{row['seconds']:,.0f}", losses, "yes" if row["as good"] else "no"])
    head = ["", f"CPU time over the {case['floor']}'s", "s", "the winner's loss, a seed each", "as good in all"]
    return [f"{said(case['setting'])}.", "", *table(head, rows)]


def _quantised(case: Mapping[str, Any]) -> list[str]:
    rows = [
        [name, f"{row['error_rate']:.3f}", f"{row['exact']:.1%}", f"{row['loss']:.3f}",
         f"{row['retention']:.1%}" if "retention" in row else ""]
        for name, row in case["rows"].items()
    ]  # fmt: skip
    lead = f"{said(case['setting'])}; error rates differ by {case['difference']:+.4f}."
    return [lead, "", *table(["", "phoneme error rate", "words exact", "loss", "change kept"], rows)]


def _memory(case: Mapping[str, Any]) -> list[str]:
    titles = {"saved": "saved for backward", "peak": "peak of the process", "above": "above the model at rest"}
    rows = [
        [name, *(f"{row[number]['mib']:,.0f} MiB, {row[number]['ratio']:.2f}" for number in titles)]
        for name, row in case["rows"].items()
    ]
    return [f"{said(case['setting'])}; ratios to the floor.", "", *table(["", *titles.values()], rows)]


def _memory_at_once(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of adapters trained at once: what a step holds at most, above what the process had before."""
    if not cases:
        return []
    sides = list(cases[0]["rows"])
    rows = [
        [f"{case['adapters']} × {case['tokens']} tokens, {case['layers']} layers, {SHORT[case['dtype']]}",
         *(f"{case['rows'][side]['mib']:,} MiB, {case['rows'][side]['ratio']:.3f}" for side in sides)]
        for case in cases
    ]  # fmt: skip
    return ["Memory of a step, and its ratio to the first column.", "", *table(["", *sides], rows)]


def _files(case: Mapping[str, Any]) -> list[str]:
    rows = [
        [name, f"{row['rate'] / 1e9:.2f} GB/s", f"{1 / row['ratio']:.2f}", f"{row['peak'] / 2**20:,.0f} MiB"]
        for name, row in case["rows"].items()
    ]
    setting = case["setting"]
    lead = (
        f"{setting['bytes'] / 2**30:.1f} GiB in bf16, largest tensor {setting['largest'] / 2**20:,.0f} MiB: the memory "
        f"may be {setting['bound'] / 2**20:,.0f} MiB. Rates to that of copying, {case['runs']} rounds."
    )
    return [lead, "", *table(["", "rate", "of copying", "peak memory"], rows)]


def _served(case: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, row in case["rows"].items():
        inverse = {"ratio": 1 / row["ratio"], "low": 1 / row["high"], "high": 1 / row["low"]}
        latencies = [f"{row[key]['p50']:,.0f}, {row[key]['p95']:,.0f}" for key in ("first", "next")]
        rest = [f"{row['memory'] / 2**20:,.0f} MiB in {row['processes']}", f"{row['alike']:.1%}"]
        name += _vllm_dtype([case]) if name == "vllm" else ""
        rows.append([name, ratio(inverse), f"{row['rate']:.1f}", *latencies, *rest])
    lead = f"{said(case['setting'])}; rates to that of {case['floor']}, {case['runs']} rounds."
    head = ["", "rate", "tokens/s", "first token, p50 and p95, ms", "between two", "memory, processes", "alike"]
    bars = [
        f"Veneer's rate over {name}{_vllm_dtype([case]) if name == 'vllm' else ''}: {ratio(row)}."
        for name, row in case["bars"].items()
    ]
    return [lead, "", *table(head, rows), *bars, ""]


def _cold(case: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, row in case["rows"].items():
        first = f"{row['first']['p50']:,.0f}, {row['first']['p95']:,.0f}" if row["first"] else "–"
        rows.append(
            [
                name,
                ratio(row),
                f"{row['p50']:.1f}, {row['p95']:.1f}",
                f"{row['longest']:,.0f}",
                f"{row['gaps']:,}",
                first,
            ]
        )
    lead = (
        f"{said(case['setting'])}; gaps between tokens of the streams, by what happens in them: nothing; an adapter "
        "loads; the step that computes the request for it; that of a request for one in memory. Medians of "
        f"{case['runs']} blocks."
    )
    head = ["", "p95 to none", "p50 and p95, ms", "longest", "gaps", "first token of that request, p50 and p95, ms"]
    return [lead, "", *table(head, rows), f"Cold over warm: {ratio(case['cold over warm'])}.", ""]


def _vanished(case: Mapping[str, Any]) -> list[str]:
    labels = {"rss": "resident, MiB", "threads": "threads", "files": "open files", "running": "rows that run",
              "waiting": "requests that wait", "users": "leases of adapters"}  # fmt: skip
    cells = {
        key: [f"{case[when][key] / (2**20 if key == 'rss' else 1):,.0f}" for when in ("before", "after")]
        for key in labels
    }
    requests = ", ".join(f"{count:,} {name}" for name, count in case["requests"].items())
    lead = f"{said(case['setting'])}. Requests: {requests}."
    grown = case["growth a minute"]
    last = "" if grown is None else f"Growth in the second half: {grown / 2**20:+.2f} MiB a minute. "
    same = "the same" if case["same answer"] else "ANOTHER"
    rows = [[label, *cells[key]] for key, label in labels.items()]
    return [
        lead,
        "",
        *table(["held when idle", "before", "after"], rows),
        f"{last}Afterwards a greedy answer is {same}.",
        "",
    ]


def _target(case: Mapping[str, Any]) -> list[str]:
    costs = [cost for cost in ("wall", "cpu", "joules") if any(cost in row for row in case["rows"].values())]
    titles = {"wall": "wall time", "cpu": "CPU time", "joules": "energy, J"}
    rows = []
    for name, row in case["rows"].items():
        cells = [f"{ratio(row[cost])}, {row[cost]['seconds']:.1f}" if row[cost] else "not reached" for cost in costs]
        losses = ", ".join(f"{loss:.3f}" for loss in row["losses"])
        rows.append([name, *cells, losses, f"{row['accuracy']:.1%}"])
    note = "" if "joules" in costs else " The machine shows no energy counter: CPU time stands for energy."
    lead = f"{said(case['setting'])}; to a held-out loss of {case['target']:.3f}, ratio to {case['floor']}, seconds."
    head = ["", *(titles[cost] for cost in costs), "final losses", "tokens right"]
    return [lead + note, "", *table(head, rows)]


def _scaling(cases: list[Mapping[str, Any]]) -> list[str]:
    shared, _ = _shared(cases)
    rows = []
    for case in cases:
        setting = case["setting"]
        others = said({key: value for key, value in setting.items() if key != "axis" and key not in shared})
        for name, row in case["rows"].items():
            law = row["fit"]
            points = (f"{size}: {cost * 1000:.1f}" for size, cost in zip(case["sizes"], row["seconds"], strict=True))
            what = "the floor's time" if name == case["floor"] else f"overhead of {name}"
            cells = [f"{law['exponent']:.2f}", f"{law['residual']:.2f}"] if law else ["not above zero everywhere", "–"]
            rows.append([setting["axis"], what, *cells, ", ".join(points), others])
    head = ["axis", "what grows", "exponent", "residual", "ms at each size", "at"]
    return [f"{said(shared)}, {cases[0]['runs']} rounds.", "", *table(head, rows)]


def _roundings(cases: list[Mapping[str, Any]]) -> list[str]:
    ways = list(cases[0]["rows"])
    rows = []
    for case in cases:
        setting = case["setting"]
        for number, name in enumerate(ways):
            row = case["rows"][name]
            what = [setting["shape"], SHORT.get(setting["dtype"], setting["dtype"]), f"{setting['size']:.0e}"]
            numbers = [f"{row['retention']:.3f}", *(f"{row[key]:.2%}" for key in ("inside", "outside"))]
            rows.append([*(what if number == 0 else [""] * 3), name, *numbers, f"{row['nanoseconds']:.1f}"])
    head = ["weight", "dtype", "‖ΔW‖ / ‖W‖", "rounding", "kept", "error on A's rows", "on random inputs", "ns a number"]
    lead = "Errors are relative to what ΔW adds to the output; `kept` is the slope of W' - W over ΔW."
    return [lead, "", *table(head, rows)]


def _merged_grids(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same of a base in 4 bits into which an adapter is merged."""
    lines = []
    for case in cases:
        setting, own = case["setting"], case["rows"]["adapter"]["loss"]
        rows = [
            [name, f"{row['loss']:.4f}", f"{row['loss'] / own - 1:+.2%}", f"{row['right']:.1%}",
             f"{row['divergence']:.5f}", f"{case['kept'][name]:.3f}" if name in case["kept"] else "–"]
            for name, row in case["rows"].items()
        ]  # fmt: skip
        task, rate, steps = setting["task"], setting["rate"], setting["steps"]
        lead = f"{task}, rate {rate:.0e}, {steps} steps; ‖ΔW‖ is {setting['size']:.1e} of ‖W‖ (median)."
        head = ["", "held-out loss", "against the adapter", "tokens right", "divergence", "kept (median)"]
        lines += [lead, "", *table(head, rows)]
    return lines


def _merged_adapters(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Held-out numbers of real adapters, unmerged and merged: a table each."""
    lines = []
    for case in cases:
        setting, own = case["setting"], case["rows"]["adapter"]["loss"]
        rows = []
        for name, row in case["rows"].items():
            divergence = f"{row['divergence']:.5f}" if "divergence" in row else "–"
            numbers = [
                f"{row['loss']:.4f}",
                f"{row['loss'] / own - 1:+.2%}",
                f"{row['right']:.1%}",
                f"{row['wrong']:.3f}",
            ]
            rows.append([name, *numbers, divergence, f"{case['kept'][name]:.3f}" if name in case["kept"] else "–"])
        lead = (
            f"{setting['task']}, rate {setting['rate']:.0e}, {setting['steps']} steps; ‖ΔW‖ is {setting['size']:.1e} "
            f"of ‖W‖ (median). Nearest keeps less than 99 % in {case['below 99 %']} weights."
        )
        head = ["", "held-out loss", "against the adapter", "tokens right", "wrong", "divergence", "kept (median)"]
        lines += [lead, "", *table(head, rows)]
    return lines
