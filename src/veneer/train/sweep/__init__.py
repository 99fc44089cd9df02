"""`veneer sweep`: train several configurations of one run at once on one base, and keep the best.

    settings.py        the section `sweep:`: axes, sampler, rungs
    search.py          proposes candidates and decides which end early
    cohort.py          candidates that train together on one base
    held_out.py        their evaluation on the held-out rows
    record.py          every candidate's losses, as stored in checkpoints
    run.py             a sweep, from its settings to the report
    output_folder.py   resuming, status and checkpoints
    winner.py          the winner's folder
    conclusions.py     edges of the searched ranges; the winner repeated as a single run
    table.py, page.py  output on the terminal; the report

In: a `TrainConfig` and a `Sweep`. Out: `best/` with the files of `veneer train`, `sweep.json`,
`report.html`.
"""
