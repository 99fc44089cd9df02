"""`veneer sweep`: train several configurations of one run at once on one base, and keep the best.

    sweep_settings.py         the section `sweep:`: which settings vary, and when candidates end
    search.py                 proposes candidates, and decides which of them end early
    cohort.py                 trains several candidates together on one base
    held_out.py               evaluates several candidates together on the held-out rows
    sweep_record.py           every candidate's losses, and the files of the output
    sweep_run.py              runs a sweep, from its settings to the report
    winner.py                 writes the folder of the best candidate, the winner
    conclusions.py            whether the winner lies at an edge of a searched range, and whether it
                              has the same losses as a single run
    table.py, sweep_page.py   output on the terminal; the HTML report

A sweep takes a `TrainConfig` and a `Sweep`. It writes `best/` with the files of `veneer train`,
`sweep.json` and `report.html`.
"""
