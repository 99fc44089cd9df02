"""`veneer sweep`: train several configurations of a run (the candidates) together on one copy of
the base, and keep the adapter of the best.

    sweep_settings.py         the section `sweep:`: which settings vary, and when candidates end
    search.py                 proposes candidates, and decides which of them end early
    cohort.py                 trains a cohort: the candidates that train at the same time
    held_out.py               evaluates several candidates together on the held-out rows
    sweep_record.py           every candidate's losses, and the files of the output
    sweep_run.py              runs a sweep, from its settings to the report
    winner.py                 writes the folder of the best candidate, the winner
    conclusions.py            whether the winner's settings lie at an edge of a searched range, and
                              whether the winner has the same losses when it trains alone
    table.py, sweep_page.py   output on the terminal; the HTML report

A sweep takes a `TrainConfig` and a `Sweep`. It writes `best/` with the files of `veneer train`,
`sweep.json` and `report.html`.
"""
