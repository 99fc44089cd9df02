"""Damage adapter folders in many ways, and check what reading and loading them does.

    python -m scripts.fuzz --count 10000 --seed 0    judge this many mutants; exit code 1 if one
                                                     fails
    python -m scripts.fuzz --seed 0 --only 1234      judge one of them again, and print all about it

A mutant is an adapter folder with one mutation, both chosen at random from (seed, number). It is
verified, read and loaded onto its model in a process that another process watches. The outcome must
be one of

    refused      One VeneerError says what was found and what to do, and the model is unchanged.
    harmless     The mutant loads, and its outputs equal bit for bit those of the adapter before the
                 mutation.
    different    The mutant loads, and its outputs are finite but others: it is a valid folder of
                 another adapter. This is allowed only if nothing can tell: the folder is another
                 library's and has no hashes, or the mutation corrected the hashes.

Any other outcome is a failure: another exception, a crash, more than 5 seconds of work, more memory
than the files explain, outputs that are not finite, a changed model, an executed pickle, other
outputs of a Veneer adapter whose hashes were not corrected, or a `veneer verify` that disagrees
with loading.

    seeds.py      the adapters and their models
    mutations.py  the mutations of a folder
    judge.py      judges a mutant; the watched process
"""
