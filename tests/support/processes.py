"""Processes that run functions of the tests, forked from a server that has imported everything: one costs some
milliseconds. ``forked.py`` is for programs, to which it matters what has been imported."""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
#: not the tests' own files: the server does not know their folder
CONTEXT.set_forkserver_preload(
    ["veneer", "veneer.store.library", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]
)
