"""docs/paper/: a page an experiment, and README.md with every claim, from what is recorded in
results/."""

from __future__ import annotations

import json
from pathlib import Path

from experiments import NAMES, find
from experiments.experiment import Claim, Experiment, Run, table
from experiments.run import RESULTS

VERDICTS = {True: "held", False: "did not hold", None: "cannot be told here"}
HEAD = """# What papers claim, tried here

Claims of papers about LoRA, tried with Veneer at a size that two cores can do; a page each has tables, seeds, spread
and cost. What did not hold here stands here as well. A small model and a short run say little of a large one: the
configurations of full size are in `experiments/full/`, and the pages name them.

```console
make paper                       # everything again: hours
python -m experiments NAME       # one of them
```
"""


def recorded() -> dict[str, dict]:
    """Results by name, of the recorded size."""
    files = {name: RESULTS / f"{name}.json" for name in NAMES}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def pages() -> dict[str, str]:
    """Texts by their place below docs/: `paper/README.md`, `paper/NAME.md`,
    `paper/NAME-PLOT.svg`."""
    results, found, every, sections, waiting = recorded(), {}, [], [], []
    for name in NAMES:
        experiment = find(name)
        where = f"[{experiment.title}]({name}.md)"
        if name not in results:
            found[f"paper/{name}.md"] = "\n\n".join(
                [*beginning(experiment), f"Not recorded yet: {command(name)}.\n"]
            )
            waiting.append(where)
            continue
        claims = experiment.claims(results[name]["runs"])
        drawings = {
            f"{name}-{plot}.svg": text
            for plot, text in experiment.plots(results[name]["runs"]).items()
        }
        found |= {f"paper/{file}": text for file, text in drawings.items()}
        found[f"paper/{name}.md"] = page(name, experiment, results[name], claims, [*drawings])
        sections.append(f"## {where}\n\n{told(claims)}")
        every += [claim.held for claim in claims]
    count = f"Of {len(every)} claims: " + ", ".join(
        f"{every.count(held)} {said}" for held, said in VERDICTS.items()
    )
    count += f". Not recorded yet: {', '.join(waiting)}." if waiting else "."
    return {**found, "paper/README.md": "\n\n".join([HEAD.rstrip(), count, *sections]) + "\n"}


def page(
    name: str, experiment: Experiment, result: dict, claims: list[Claim], drawings: list[str]
) -> str:
    runs: list[Run] = result["runs"]
    minutes = sum(run["cpu"] for run in runs) / 60
    spent = f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {minutes:.1f} minutes of CPU time"
    parts = [
        *beginning(experiment), "## Claims", told(claims), "## Measured", experiment.tables(runs).strip(),
        *(f"![{experiment.title}: {Path(file).stem.removeprefix(f'{name}-')}]({file})" for file in drawings),
        f"{command(name)}: {spent}, a thread each. {result['machine']}, torch {result['versions']['torch']}.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def told(claims: list[Claim]) -> str:
    """The table of some claims: first what came of them, as a phone has no room to the right."""
    rows = [
        (VERDICTS[claim.held], f"{claim.what} ({claim.source})", claim.found) for claim in claims
    ]
    return table(("", "claim", "found here"), rows, numbers=False)


def beginning(experiment: Experiment) -> list[str]:
    files = ", ".join(f"[{file}](../../experiments/full/{file})" for file in experiment.full)
    return [
        f"# {experiment.title}",
        experiment.about.strip(),
        *([f"At full size: {files}."] if files else []),
    ]


def command(name: str) -> str:
    return f"`python -m experiments {name}`"
