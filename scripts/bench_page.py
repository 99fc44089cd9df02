"""Make tables of the records in benchmarks/results/NAME/COMMIT.json: a table for the README, and
docs/benchmarks.md. Tables show the latest record; a small plot shows all records."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for _folder in (ROOT, ROOT / "benchmarks"):
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))

from benchmarks import runner  # noqa: E402
from scripts import charts  # noqa: E402

from cases import all_cases  # noqa: E402 (found in the folders above)

RESULTS = ROOT / "benchmarks" / "results"
#: second records of the same commits, made from a fresh clone: NAME/COMMIT.json
REPEATS = RESULTS / "again"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
#: the most settings that are columns of a table
MAX_COLUMNS = 6
#: the characters of a sparkline, from low to high
BARS = "▁▂▃▄▅▆▇█"
#: repeats whose numbers differ with a smaller p-value are counted
P_LIMIT = 0.05
PENDING = "Figures are being recorded; earlier ones were [wrong](docs/benchmarks.md#corrections)."
#: headings of docs/benchmarks.md by case
TITLES = {
    "step": "Training step",
    "step_one_thread": "Training step on one thread",
    "step_others": "Training step of BERT and ResNet-50",
    "step_memory": "Memory of a training step",
    "many": "Many adapters trained at once",
    "forward": "Forward pass",
    "mixed": "Rows with different adapters",
    "experts": "Mixture of experts",
    "engine": "Generation without HTTP",
    "rollouts": "Rollouts (GRPO)",
    "import_time": "Import",
    "compose": "Composing adapters",
    "merge": "Merging into a checkpoint",
    "merge_fidelity": "What a merge keeps",
    "time_to_target": "Time to a held-out loss",
    "sweep": "Sweep of settings",
    "plan_errors": "Predictions of the planner",
    "task_tagging": "Tagging",
    "task_dpo": "Preferences (DPO)",
    "task_grpo": "Rewards (GRPO)",
    "serve": "Serving over HTTP",
    "prefix": "A prompt that was asked before",
    "gap": "Streams beside long prompts",
    "long_row": "A long row among short ones",
    "earlier": "Beside an earlier commit",
    "rollouts_earlier": "Rollouts beside an earlier commit",
}
#: rows of "In short": (title, case, setting of the case, arm of Veneer, name of the number)
OWN_LOSS_ARM = "veneer, own loss and attention"
README_ROWS = (
    ("training step, 4 × 256 tokens", "step", {"tokens": 1024}, "veneer", "wall"),
    ("training step, 4 × 64 tokens", "step", {"tokens": 256}, "veneer", "wall"),
    ("peak memory of a step, 4 × 256", "step_memory", {}, "veneer", "peak"),
    ("forward pass, 256 tokens", "forward", {"tokens": 256}, "veneer", "wall"),
    ("forward pass, 1 token", "forward", {"tokens": 1}, "veneer", "wall"),
    ("16 rows, 8 adapters, 1 token, server's cache", "mixed", {}, "veneer", "wall"),
)
PAGE_ROWS = (
    *README_ROWS,
    ("own loss and attention: step, 4 × 256", "step", {"tokens": 1024}, OWN_LOSS_ARM, "wall"),
    ("own loss and attention: step, 4 × 64", "step", {"tokens": 256}, OWN_LOSS_ARM, "wall"),
    ("own loss and attention: peak memory", "step_memory", {}, OWN_LOSS_ARM, "peak"),
    ("one thread, 2 layers: step, 512 tokens", "step_one_thread", {}, "veneer", "wall"),
    ("one thread, own loss and attention", "step_one_thread", {}, OWN_LOSS_ARM, "wall"),
)
PEER_ARMS = ("peft", "peft, bf16 adapters")


@cache
def _known_cases() -> dict[str, Any]:
    return all_cases()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, and an empty line."""
    lines = [
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return [*(re.sub(r" {2,}", " ", line) for line in lines), ""]


def ratio(row: Mapping[str, Any] | None, spread: bool = True) -> str:
    if not row:
        return "–"
    text = f"{row['ratio']:.2f}"
    return f"{text} ({row['low']:.2f}–{row['high']:.2f})" if spread else text


def sparkline(values: Sequence[float]) -> str:
    """A character for each value, lowest for the least value."""
    least, greatest = min(values), max(values)
    return "".join(
        BARS[round((value - least) / ((greatest - least) or 1) * (len(BARS) - 1))]
        for value in values
    )


def describe(setting: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key.replace('_', ' ')} {SHORT.get(str(value), value)}" for key, value in setting.items()
    )


def latest(name: str) -> dict[str, Any] | None:
    recorded = runner.records(name, RESULTS)
    return recorded[-1] if recorded else None


def repeat_of(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The second record of the same commit; None without one."""
    recorded = runner.records(result["name"], REPEATS)
    return next((repeat for repeat in recorded if repeat["commit"] == result["commit"]), None)


@dataclass(frozen=True)
class RepeatedNumber:
    """A number of a record beside the same number of its repeat.

    `first` and `again` are cells of a table. `is_within` says whether the median of the repeat lies
    in the range of the record, `chance_outside` how probable it is that it does not although
    nothing has changed. `is_identical` says whether both have the same values, which a fixed seed
    or counted bytes give, so that chance cannot move them. `p` is of `rank_sum_p`.
    """

    setting: str
    arm: str
    title: str
    first: str
    again: str
    is_within: bool
    is_identical: bool
    chance_outside: float
    p: float


def compare_repeat(result: Mapping[str, Any], repeat: Mapping[str, Any]) -> list[RepeatedNumber]:
    """Compare each number that is shown of a record with its repeat. The ratio of the floor to
    itself is omitted."""
    rows, floor = [], result["floor"]
    for case, case_again in zip(result["cases"], repeat["cases"], strict=True):
        for arm in case["processes"][0]["rounds"]:
            for number, (title, form) in result["shown"].items():
                if arm == floor and form == "ratio":
                    continue
                first, again = (
                    runner.process_values(record["processes"], arm, floor, number, form)
                    for record in (case, case_again)
                )
                if not first or not again:
                    continue
                cells = [cell(record, arm, floor, number, form) for record in (case, case_again)]
                rows.append(
                    RepeatedNumber(
                        describe(case["setting"]),
                        arm,
                        title,
                        *cells,
                        is_within=min(first) <= statistics.median(again) <= max(first),
                        is_identical=sorted(first) == sorted(again),
                        chance_outside=chance_outside(len(first), len(again)),
                        p=rank_sum_p(first, again),
                    )
                )
    return rows


def chance_outside(first_count: int, again_count: int) -> float:
    """The probability that the median of `again_count` values lies outside of the range of
    `first_count` values of the same continuous distribution.

    The median is above the range exactly if the greatest k of all values are new ones, where k new
    values are at or above the median. With an even count the upper of the two middle values takes
    its place, which gives an upper bound.
    """
    above = (again_count + 1) // 2
    total = math.comb(first_count + again_count, above)
    return min(1.0, 2 * math.comb(again_count, above) / total)


def rank_sum_p(first: Sequence[float], again: Sequence[float]) -> float:
    """The two-sided p-value of Wilcoxon's rank-sum test that two samples are of one distribution,
    exact by all ways to divide the values (252 for 5 and 5). Ties have their mean rank."""
    values = sorted([*first, *again])
    ranks = [(2 * values.index(value) + values.count(value) + 1) / 2 for value in (*first, *again)]
    expected = len(first) * (len(values) + 1) / 2
    distance = abs(sum(ranks[: len(first)]) - expected)
    divisions = [sum(chosen) for chosen in itertools.combinations(ranks, len(first))]
    return sum(abs(ranks_sum - expected) >= distance for ranks_sum in divisions) / len(divisions)


#: by form of a number in a record: the format in which it is shown, its unit, and the divisor
DISPLAY_FORMS = {"ratio": (".2f", "", 1), "bytes": (",.0f", " MiB", 2**20)}


def cell(case: Mapping[str, Any], arm: str, floor: str, number: str, form: str) -> str:
    """The median of a number, and its least and greatest value over the processes; how many of
    these have it, where some do not."""
    spread = runner.spread(case["processes"], arm, floor, number, form)
    if spread is None:
        return "–"
    form, unit, scale = DISPLAY_FORMS.get(form, (form, "", 1))
    middle_text, least_text, greatest_text = (format(value / scale, form) for value in spread)
    range_text = f" ({least_text}–{greatest_text})" if least_text != greatest_text else ""
    kept = [process for process in case["processes"] if process["kept"]]
    has_number = [process["rounds"][arm][0].get(number) is not None for process in kept]
    count_text = "" if all(has_number) else f", {sum(has_number)} of {len(kept)} runs"
    return f"{middle_text}{unit}{range_text}{count_text}"


# ----------------------------------------------------------------------------------------------
# README.md


def readme() -> str:
    """The README's table of the latest records; a single line if nothing is recorded."""
    rows = _summary_rows(README_ROWS)
    if not rows:
        return PENDING
    lead = _paragraph(
        "Time and memory as ratios to the frozen base's own (lower is better), of SmolLM2-135M's"
        " shape (4 to 30 layers) at rank 8 on a CPU: medians, and ranges between processes"
        " ([how, and all others](docs/benchmarks.md))."
    )
    head = ["", "Veneer, fp32", "PEFT, fp32", "Veneer, bf16", "PEFT, bf16", "PEFT, bf16 adapters"]
    return "\n".join([*lead, *table(head, rows)]).rstrip()


def _summary_rows(
    row_specs: Iterable[tuple[str, str, Mapping[str, Any], str, str]],
) -> list[list[str]]:
    """Rows of Veneer, PEFT at its defaults and PEFT at its best, in both precisions. A row without
    any record is omitted."""
    rows = []
    for title, name, setting, arm, number in row_specs:
        cells = []
        result = latest(name)
        for dtype in ("float32", "bfloat16"):
            case = _case_of(result, {**setting, "dtype": dtype}) if result else None
            for shown_arm in (arm, *(PEER_ARMS if dtype != "float32" else PEER_ARMS[:1])):
                cells.append(
                    cell(case, shown_arm, result["floor"], number, "ratio")
                    if case and result
                    else "–"
                )
        if any(text != "–" for text in cells):
            rows.append([title, *cells])
    return rows


def _case_of(result: Mapping[str, Any], setting: Mapping[str, Any]) -> Mapping[str, Any] | None:
    matches = [case for case in result["cases"] if setting.items() <= case["setting"].items()]
    return matches[0] if matches else None


def _serve_table() -> list[str]:
    result = latest("serve")
    if result is None:
        return []
    numbers = {"rate": ",.0f", "first p50": ",.0f", "gap p95": ",.0f"}
    head, rows = [f"served: {result['about'].partition(' on ')[0]}"], {}
    for case in result["cases"]:
        dtype = SHORT[case["setting"]["dtype"]]
        head += [f"tokens/s, {dtype}", "to the first, ms", "between two, p95, ms"]
        for arm in case["processes"][0]["rounds"]:
            cells = [
                cell(case, arm, result["floor"], number, form) for number, form in numbers.items()
            ]
            rows[arm] = [*rows.get(arm, [arm]), *cells]
    return table(head, rows.values())


# ----------------------------------------------------------------------------------------------
# docs/benchmarks.md


def page() -> str:
    """The page. For every case: what is equal between the arms, where it was measured, each arm
    beside the floor, and all records."""
    cases = _known_cases()
    minutes = sum(case.minutes for case in cases.values() if case.group == "bench")
    lines = [
        "# Benchmarks",
        "",
        *_paragraph(
            f"`make bench` records all but serving, tasks and the planner (about {minutes:.0f}"
            " minutes on two quiet cores), `make bench-serve`, `bench-tasks`, `bench-plan` and"
            " `bench-earlier` the rest; `make docs` writes this page. `python -m benchmarks --list`"
            " names the cases."
        ),
        *_about_runner(),
        "## In short",
        "",
        *_in_short(),
    ]
    for name, case in cases.items():
        recorded = runner.records(name, RESULTS)
        about = (
            case.about
            if not recorded or _is_same_work(recorded[-1], case)
            else recorded[-1]["about"]
        )
        lines += [f"## {TITLES[name]}", "", *_paragraph(f"{about} (`{name}`)")]
        lines += _record_section(recorded) if recorded else ["Not recorded by the runner yet.", ""]
    lines += [
        (ROOT / "benchmarks" / "corrections.md").read_text().rstrip(),
        "",
        *_recorded_before(),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _is_same_work(result: Mapping[str, Any], case: Any) -> bool:
    """Whether a record has the settings of the case today, so that the case's text describes it."""
    return [entry["setting"] for entry in result["cases"]] == [*map(dict, case.settings)]


def plots() -> dict[str, str]:
    """The plot of each recorded case, by the name of its file in docs/."""
    plots_by_name = {}
    for name in _known_cases():
        if result := latest(name):
            plots_by_name[_plot_name(name)] = _plot(result)
    return plots_by_name


def _plot_name(name: str) -> str:
    return f"benchmarks-{name}.svg"


def _plot(result: Mapping[str, Any]) -> str:
    """A plot of the first number of each arm, with its range, in each setting."""
    number, (title, form) = next(iter(result["shown"].items()))
    _, unit, scale = DISPLAY_FORMS.get(form, (form, "", 1))
    panels: dict[str, dict[str, tuple[float, float, float]]] = {}
    for case in result["cases"]:
        arms = {}
        for arm in case["processes"][0]["rounds"]:
            measured = runner.spread(case["processes"], arm, result["floor"], number, form)
            if measured is not None:
                arms[arm] = (measured[0] / scale, measured[1] / scale, measured[2] / scale)
        panels[describe(case["setting"])] = arms
    label = f"{title} as ratio to {result['floor']}" if form == "ratio" else title
    return charts.ranges_file(panels, x=f"{label},{unit}" if unit else label)


def _paragraph(text: str) -> list[str]:
    """``text`` as lines of at most 100 columns, and an empty line."""
    return [*textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False), ""]


def _details(summary: str, lines: Sequence[str]) -> list[str]:
    """Lines that are hidden until a reader opens them."""
    return ['<details markdown="1">', f"<summary>{summary}</summary>", "", *lines, "</details>", ""]


def _in_short() -> list[str]:
    rows = _summary_rows(PAGE_ROWS)
    if not rows:
        return _paragraph(PENDING.replace("docs/benchmarks.md", ""))
    missing = len(PAGE_ROWS) - len(rows)
    lead = (
        "Wall time and memory as ratios to the floor of the same round (forward, and the gradient"
        " carried back; or the plain base), the smaller, the better: medians, and the range between"
        " processes. SmolLM2-135M's shape, rank 8 on all linear layers, default threads where"
        " nothing else is said." + f" {missing} rows are not recorded yet." * bool(missing)
    )
    head = ["", "Veneer, fp32", "PEFT, fp32", "Veneer, bf16", "PEFT, bf16", "PEFT, bf16 adapters"]
    return [*_paragraph(lead), *table(head, rows), *_serve_table()]


def _about_runner() -> list[str]:
    return (
        _paragraph(
            "All arms of a case run in one process, each once in a round, in an order that is "
            "drawn anew for each round; the floor runs before and after each. A case has several "
            "processes, and the range that is shown lies between these. A round is thrown away "
            "for all arms, counted and repeated where the floor's two times differ by more than "
            f"{runner.LIMIT:.0%}. (Records that count no rounds threw away a process whose floor "
            "was that far from its median in any round.) Peaks of memory and whole training runs "
            "have a process to themselves. A record names its commit and is never changed; the "
            "latest is shown, whatever it says. Every raw time is in "
            "`benchmarks/results/NAME/COMMIT.json`. What was expected before is in "
            "`benchmarks/predictions.md`, to which lines are only added."
        )
        + _count_repeats()
    )


def _count_repeats() -> list[str]:
    """How many medians of the repeats lie in the range of the records: of all, and of each case."""
    latest_records = [result for name in _known_cases() if (result := latest(name))]
    repeated = [(result, repeat) for result in latest_records if (repeat := repeat_of(result))]
    comparisons = [compare_repeat(result, repeat) for result, repeat in repeated]
    rows = [row for comparison in comparisons for row in comparison]
    if not rows:
        return []
    varied = [row for row in rows if not row.is_identical]
    expected = sum(1 - row.chance_outside for row in varied)
    text = (
        f"{len(repeated)} of {len(latest_records)} cases were recorded a second time, from a fresh"
        f" clone of the same commit: {sum(row.is_within for row in rows)} of {len(rows)} medians of"
        f" the second record lie in the range of the first. {len(rows) - len(varied)} of these"
        " numbers have the same values in both records, as fixed seeds or counted bytes give them;"
        f" of the other {len(varied)}, {sum(row.is_within for row in varied)} lie in the range,"
        f" where about {expected:.0f} would if nothing but chance differed (a range of so few"
        f" processes is narrow). {sum(row.p < P_LIMIT for row in rows)} of them differ by an exact"
        f" rank-sum test (p below {P_LIMIT}), where at most {P_LIMIT * len(varied):.0f} would. Both"
        " records are in the details of each case."
    )
    by_case = [
        [
            f"`{result['name']}`",
            _fraction(row.is_within for row in comparison if not row.is_identical),
            str(sum(row.is_identical for row in comparison)),
            *(_fraction(_are_rounds_discarded(_processes(record))) for record in (result, repeat)),
        ]
        for (result, repeat), comparison in zip(repeated, comparisons, strict=True)
    ]
    head = ["", "medians in the range", "same values", "rounds thrown away, first", "again"]
    return [*_paragraph(text), *_details("Second records by case", table(head, by_case))]


def _record_section(recorded: Sequence[Mapping[str, Any]]) -> list[str]:
    result = recorded[-1]
    title, _ = next(iter(result["shown"].values()))
    alternative = f"{title.capitalize()} of each arm, with the range between processes"
    picture = [f"![{alternative}]({_plot_name(result['name'])})", ""]
    lines: list[str] = []
    shown, floor = result["shown"], result["floor"]
    if len(shown) == 1:
        lines += _table_by_setting(result, *next(iter(shown.items())))
    else:
        for case in result["cases"]:
            rows = [
                [
                    arm,
                    *(cell(case, arm, floor, number, form) for number, (_, form) in shown.items()),
                ]
                for arm in case["processes"][0]["rounds"]
            ]
            lines += [
                f"{describe(case['setting'])}:",
                "",
                *table(["", *(title for title, _ in shown.values())], rows),
            ]
    case = _known_cases()[result["name"]]
    equal = case.equal if _is_same_work(result, case) else result["equal"]
    lines = [*_paragraph(f"Equal: {equal}."), *_paragraph(_provenance(result)), *lines]
    lines += [*_history(recorded), *_repeat_section(result)]
    return [*picture, *_details("Numbers, machine and history", lines)]


def _repeat_section(result: Mapping[str, Any]) -> list[str]:
    """A table of the numbers of the repeat beside those of the record."""
    repeat = repeat_of(result)
    if repeat is None:
        return []
    rows = [
        [
            *(row.setting, row.arm, row.title, row.first, row.again),
            "yes" if row.is_within else "no",
            f"{row.p:.2f}",
        ]
        for row in compare_repeat(result, repeat)
    ]
    head = ["", "", "", "first", "again", "median in the range", "rank-sum p"]
    lead = f"Recorded again from a fresh clone, {_provenance(repeat)[3:]}"
    return [*_paragraph(lead), *table(head, rows)]


def _table_by_setting(result: Mapping[str, Any], number: str, shown: Sequence[str]) -> list[str]:
    """A table with arms as rows and settings as columns."""
    cases, (title, form) = result["cases"], shown
    first = cases[0]["setting"]
    names = dict.fromkeys(key for case in cases for key in case["setting"])
    varied_keys = [
        key for key in names if any(case["setting"].get(key) != first.get(key) for case in cases)
    ]
    shared = {key: value for key, value in first.items() if key not in varied_keys}
    head = [title]
    for case in cases:
        head.append(
            describe({key: case["setting"][key] for key in varied_keys if key in case["setting"]})
            or "all"
        )
    arms = dict.fromkeys(arm for case in cases for arm in case["processes"][0]["rounds"])
    rows = [
        [arm, *(cell(case, arm, result["floor"], number, form) for case in cases)] for arm in arms
    ]
    ratio_text = f" as ratio to `{result['floor']}`" if form == "ratio" else ""
    lead = "; ".join(filter(None, [describe(shared), f"{title}{ratio_text}:"]))
    lines = [head, *rows]
    if len(cases) > MAX_COLUMNS:  # settings as rows
        lines = [[line[column] for line in lines] for column in range(len(head))]
    return [lead, "", *table(lines[0], lines[1:])]


def _fraction(conditions: Iterable[bool]) -> str:
    """How many conditions hold, of how many; a dash without any."""
    values = list(conditions)
    return f"{sum(values)} of {len(values)}" if values else "–"


def _processes(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [process for case in result["cases"] for process in case["processes"]]


def _are_rounds_discarded(processes: Iterable[Mapping[str, Any]]) -> list[bool]:
    """For each round, whether it was thrown away. Records that count no rounds have none."""
    discarded: list[bool] = []
    for process in processes:
        if "thrown_away" in process:
            discarded += [False] * len(process["orders"]) + [True] * len(process["thrown_away"])
    return discarded


def _provenance(result: Mapping[str, Any]) -> str:
    processes = _processes(result)
    discarded_count = sum(not process["kept"] for process in processes)
    rounds = _are_rounds_discarded(processes)
    rounds_text = f"; {rounds.count(False)} rounds, {rounds.count(True)} thrown away"
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    return (
        f"On {result['machine']}, {result['cores']} cores, load {result['load']:.1f} at the start;"
        f" allocator {result['allocator']}; {versions}. Commit `{result['commit'][:12]}`, recorded"
        f" {result['recorded'][:10]}; {len(processes) - discarded_count} processes,"
        f" {discarded_count} thrown away{rounds_text if rounds else ''}."
    )


def _history(recorded: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sparkline for each arm of Veneer: its first number in the first setting, in all records."""
    result = recorded[-1]
    number, (title, form) = next(iter(result["shown"].items()))
    lines = []
    for arm in result["cases"][0]["processes"][0]["rounds"]:
        medians = [
            runner.spread(old["cases"][0]["processes"], arm, old["floor"], number, form)
            for old in recorded
            if old["cases"][0]["setting"] == result["cases"][0]["setting"]
        ]
        values = [median[0] for median in medians if median]
        if arm.startswith("veneer") and values:
            lines.append(f"- `{arm}`: {sparkline(values)} {values[0]:.3g} → {values[-1]:.3g}")
    count = f"{len(recorded)} record{'s' if len(recorded) > 1 else ''}"
    if len({old["machine"] for old in recorded}) > 1:
        count += " of different machines"
    lead = f"All that was recorded ({count}), {title}, {describe(result['cases'][0]['setting'])}:"
    return [lead, "", *lines, ""] if lines else [f"{count}.", ""]


def _recorded_before() -> list[str]:
    """A section on the results that other programs recorded before the runner existed: a table of
    their files."""
    rows = []
    for file in sorted((ROOT / "benchmarks" / "results" / "before").glob("*.json")):
        result = json.loads(file.read_text())
        versions = result.get("versions", {})
        versions_text = ", ".join(
            f"{key} {versions[key]}" for key in ("torch", "transformers", "peft") if key in versions
        )
        rows.append([f"`{file.name}`", str(result.get("machine", "–")), versions_text or "–"])
    lead = (
        "Recorded before by other programs, unchanged, in `benchmarks/results/before/`; no number"
        " of this page is one of these. Programs and predictions of then are in git's history."
    )
    files = _details("Files", table(["file", "machine", "versions"], rows))
    return ["## Recorded before", "", *_paragraph(lead), *files] if rows else []
