"""Damage adapter folders in every way that we can think of, and see what reading and loading make
of them.

    python -m scripts.fuzz --count 10000 --seed 0    as many mutants; exit code 1 if any of them
                                                     fails
    python -m scripts.fuzz --seed 0 --only 1234      one of them again, with everything that is
                                                     known of it

Each mutant is one adapter folder with one mutation, both drawn from (seed, number). It is verified,
read and loaded onto the model that it belongs to, in a process that is watched from outside. It may
be

    refused      by one VeneerError that says what was found and what to do, with the model as it
                 was
    harmless     loaded, and the outputs are those of the adapter before the mutation, to the bit
    different    loaded, and the outputs are finite and others: a valid folder that describes
                 another adapter. Only
                 where nothing could tell: a folder of another library, which has no hashes, or
                     hashes made anew

Anything else is a failure: another exception, a crash, more than 5 seconds of work, memory beyond
what its files explain, outputs that are not finite, a model that is left changed, a pickle that
ran, other outputs of an adapter of ours whose hashes nobody made anew, or a `veneer verify` of
another opinion than loading.

    seeds.py      the adapters and their models
    mutations.py  what is done to a folder
    judge.py      what becomes of a mutant; the watched process
"""
