"""Cases that LoRA libraries get wrong, run with each of them: ``python -m benchmarks.torture``.

    cases.py      CASES: a name, what is asked, and a function of a library
    judges.py     what "right" means: forward equals merged, unmerging restores the bits, …
    library.py    what a case may ask of a library, and the Result that it returns
    models.py     the small models that the cases are about
    peft_library.py, lycoris_library.py, loralib_library.py, veneer_library.py    the libraries

A case names no library and a library names no case, so each case runs the same way with every
library, at its defaults. ``tests/test_torture.py`` runs every case with Veneer. A new case is one
more entry of CASES.
"""
