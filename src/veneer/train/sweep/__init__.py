"""`veneer sweep`: several configurations of one run, trained at once on one base, to keep the best.

    settings.py    what is tried, how it is chosen, who is ended early
    search.py      which candidates there are, and who goes on: of what was measured alone
    cohort.py      candidates that share a base: their steps, evaluations and checkpoints
    held_out.py    what they come to on the rows held out
    run.py         one sweep, from its settings to the winner's folder
    table.py       what is shown meanwhile; page.py: the report

In: a `TrainConfig` and a `Sweep`. Out: `best/` as `veneer train` would have left it, `sweep.json`,
`report.html`.
"""
