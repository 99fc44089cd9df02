"""Cases that LoRA libraries get wrong, run through Veneer and its peers: ``python
benchmarks/torture.py``.

    cases/        CASES: a name, the row of the table that it belongs to, and a function of a library
    judges.py     what "right" means: forward equals merged, unmerging restores bits, refused instead of accepted, …
    library.py    what a case may ask of a library, and the Result that it returns
    ours.py       that, for Veneer
    peers.py      that, for PEFT, LyCORIS and loralib
    models.py     the small models that the cases are about

A case knows no library and a library knows no case, so each case runs the same way everywhere.
``tests/test_torture.py`` runs every case with Veneer alone. A new case is one more entry of CASES.
"""
