"""docs/paper/: a page an experiment, and README.md with every claim, from what is recorded in results/."""

from __future__ import annotations

import json
from pathlib import Path

from experiments import NAMES, find
from experiments.experiment import Claim, Experiment, Run, table
from experiments.run import RESULTS

VERDICTS = {True: "held", False: "did not hold", None: "cannot be told here"}
HEAD = """# What papers claim, tried here

Each line is a claim of a paper about LoRA, tried with Veneer at a size that two cores can do; a page each has tables,
seeds, spread and cost. What did not hold here stands here as well. A small model and a short run say little of a large
one: the configurations of full size are in `experiments/full/`, and the pages name them.

```console
make paper                                  # everything again: hours
python -m experiments NAME                  # one of them; --smoke: seconds, does it run
```
"""


def recorded() -> dict[str, dict]:
    """Results by name, of the recorded size."""
    files = {name: RESULTS / f"{name}.json" for name in NAMES}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def pages() -> dict[str, str]:
    """Texts by their place below docs/: `paper/README.md`, `paper/NAME.md`, `paper/NAME-PLOT.svg`."""
    results, found, rows, waiting = recorded(), {}, [], []
    for name in NAMES:
        experiment = find(name)
        where = f"[{experiment.title}]({name}.md)"
        if name not in results:
            found[f"paper/{name}.md"] = "\n\n".join([*beginning(experiment), f"Not recorded yet: {command(name)}.\n"])
            waiting.append(where)
            continue
        result, runs = results[name], results[name]["runs"]
        claims = experiment.claims(runs)
        drawings = {f"{name}-{plot}.svg": text for plot, text in experiment.plots(runs).items()}
        found |= {f"paper/{file}": text for file, text in drawings.items()}
        found[f"paper/{name}.md"] = page(name, experiment, result, claims, [*drawings])
        rows += [(where, claim) for claim in claims]
    told = [claim.held for _, claim in rows]
    count = f"Of {len(rows)} claims: " + ", ".join(f"{told.count(held)} {said}" for held, said in VERDICTS.items())
    count += f". Not recorded yet: {', '.join(waiting)}." if waiting else "."
    summary = table(
        ("experiment", "claim", "source", "found here", ""),
        [(where, claim.what, claim.source, claim.found, VERDICTS[claim.held]) for where, claim in rows],
        numbers=False,
    )
    return {**found, "paper/README.md": f"{HEAD}\n{count}\n\n{summary}\n"}


def page(name: str, experiment: Experiment, result: dict, claims: list[Claim], drawings: list[str]) -> str:
    runs: list[Run] = result["runs"]
    said = [(claim.what, claim.source, claim.found, VERDICTS[claim.held]) for claim in claims]
    cost = f"{len(runs)} runs, {sum(run['cpu'] for run in runs) / 60:.1f} minutes of CPU time in all, a thread each"
    parts = [
        *beginning(experiment),
        "## Claims", table(("claim", "source", "found here", ""), said, numbers=False),
        "## Measured", experiment.tables(runs).strip(),
        *(f"![{experiment.title}: {Path(file).stem.removeprefix(f'{name}-')}]({file})" for file in drawings),
        f"{command(name)}: {cost}. {result['machine']}, torch {result['versions']['torch']}.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def beginning(experiment: Experiment) -> list[str]:
    files = ", ".join(f"[{file}](../../experiments/full/{file})" for file in experiment.full)
    return [f"# {experiment.title}", experiment.about.strip(), *([f"At full size: {files}."] if files else [])]


def command(name: str) -> str:
    return f"`python -m experiments {name}`"
