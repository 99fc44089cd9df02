"""docs/paper/: a page for each experiment and README.md with every claim, from the records in
results/."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import NAMES, load_experiment
from experiments.study import (
    FAILED,
    HELD,
    OPEN,
    RESULTS,
    Claim,
    Experiment,
    Tuned,
    rates_plot,
    rates_table,
    results_table,
    table,
)

HEAD = """# Claims of papers, tried here

Claims of papers about LoRA, tried with Veneer at a size that two cores can do. Each page has
tables, seeds, spread and cost. A small model and a short run say little of a large one: the
configurations of full size are in `experiments/full/`, and the pages name them.

**The rule.** The learning rate of each method is chosen on rows aside, with seeds of their own,
from a grid that grows until its best rate lies inside. All methods get as many grid points and the
same number of steps. Results are of other rows and of at least three other seeds. The 95 % interval
of Student's t over these seeds decides: a claim held, did not hold, or cannot be told at this size.
A page that breaks the rule is not written (`experiments/study.py`). Earlier pages broke it;
each page whose claims changed says what it showed then, and [the
corrections](../benchmarks.md#corrections) list it.

```console
make paper                       # run what is missing, then write these pages
python -m experiments NAME       # one experiment
```
"""


def load_records() -> dict[str, dict[str, Any]]:
    """Complete records by the name of their experiment."""
    records = {}
    for name in NAMES:
        file = RESULTS / f"{name}.json"
        if file.exists():
            content = json.loads(file.read_text())
            if not load_experiment(name).plan.missing_cells(content["runs"]):
                records[name] = content
    return records


def pages() -> dict[str, str]:
    """Texts by their path below docs/: `paper/README.md`, `paper/NAME.md`,
    `paper/NAME-PLOT.svg`."""
    records, texts, sections, waiting = load_records(), {}, [], []
    verdicts: list[str] = []
    for name in NAMES:
        experiment = load_experiment(name)
        link = f"[{experiment.title}]({name}.md)"
        if name not in records:
            text = f"Not recorded under [the rule](README.md) yet: {command(name)}."
            texts[f"paper/{name}.md"] = "\n\n".join([*introduction(experiment), text]) + "\n"
            waiting.append(link)
            continue
        text, drawings, claims = write_page(name, experiment, records[name])
        texts |= {f"paper/{file}": drawing for file, drawing in drawings.items()}
        texts[f"paper/{name}.md"] = text
        sections.append(f"## {link}\n\n{claims_table(claims)}")
        verdicts += [claim.verdict for claim in claims]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (HELD, FAILED, OPEN))
    summary = f"Of {len(verdicts)} claims: {counts}."
    if waiting:
        summary += f"\n\nNot recorded under the rule yet: {', '.join(waiting)}."
    blocks = [HEAD.rstrip(), *paragraphs(summary), *sections]
    return {**texts, "paper/README.md": "\n\n".join(blocks) + "\n"}


def write_page(
    name: str, experiment: Experiment, content: dict[str, Any]
) -> tuple[str, dict[str, str], list[Claim]]:
    """The page, its plots by file name, and its claims. Raises RuleError for runs that break the
    rule."""
    runs = content["runs"]
    experiment.plan.check(runs)
    claims = experiment.claims(runs)
    plots, tables = experiment.plots(runs), [experiment.tables(runs).strip()]
    if isinstance(plan := experiment.plan, Tuned):
        plots = {**plots, "rates": rates_plot(plan, runs)}
        results = results_table(plan, runs, experiment.columns)
        tables = [results, *filter(None, tables), rates_table(plan, runs)]
    drawings = {f"{name}-{plot}.svg": text for plot, text in plots.items()}
    images = [
        f"![{experiment.title}: {Path(file).stem.removeprefix(f'{name}-')}]({file})"
        for file in drawings
    ]
    minutes = sum(run["cpu"] for run in runs) / 60
    cost = (
        f"{command(name)}: {len(runs)} runs, {minutes:.1f} minutes of CPU time on one thread."
        f" {content['machine']}, torch {content['versions']['torch']}."
    )
    sections = [
        *introduction(experiment),
        f"## Claims\n\n{claims_table(claims)}",
        "## Measured",
        *tables,
        *images,
        cost,
    ]
    return "\n\n".join(sections) + "\n", drawings, claims


def claims_table(claims: Sequence[Claim]) -> str:
    """The verdict comes first, as a phone has no room to the right."""
    rows = [(claim.verdict, f"{claim.text} ({claim.source})", claim.evidence) for claim in claims]
    return table(("", "claim", "measured"), rows, numeric=False)


def introduction(experiment: Experiment) -> list[str]:
    files = ", ".join(f"[{file}](../../experiments/full/{file})" for file in experiment.full)
    sections = [f"# {experiment.title}", *paragraphs(experiment.about)]
    if files:
        sections += paragraphs(f"At full size: {files}.")
    if experiment.earlier:
        sections += ["## Shown before", *paragraphs(experiment.earlier)]
    return sections


def paragraphs(text: str) -> list[str]:
    """Blocks of Markdown, prose in lines of at most 100 columns."""
    blocks = []
    for block in text.strip().split("\n\n"):
        if not block.startswith("```"):
            block = textwrap.fill(
                " ".join(block.split()), 100, break_long_words=False, break_on_hyphens=False
            )
        blocks.append(block)
    return blocks


def command(name: str) -> str:
    return f"`python -m experiments {name}`"
