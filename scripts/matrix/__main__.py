from __future__ import annotations

import argparse
import difflib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

from . import ROOT, __doc__, silence

PAGE = ROOT / "docs" / "support.md"
#: layers that take longest; they start first, so that no process waits for them at the end
SLOW_LAYERS = ("conv3d", "recurrent", "attention", "parameter")


def run(only: list[str], jobs: int) -> tuple[str, str]:
    """(the page, its summary), of these layers and storages, or of all if ``only`` is empty."""
    silence()
    from veneer.bases import BASES
    from veneer.layers import LAYERS

    from .operations import of_layer
    from .page import page
    from .storages import of_storage

    layers, storages = (
        [name for name in names if not only or name in only]
        # opaque storages are in docs/quantised-bases.md instead
        for names in (LAYERS.names(), [storage.name for storage in BASES if not storage.opaque])
    )
    with ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=silence
    ) as pool:
        layer_futures = {
            name: pool.submit(of_layer, name)
            for name in sorted(layers, key=lambda name: name not in SLOW_LAYERS)
        }
        storage_futures = [pool.submit(of_storage, name) for name in storages]
        return page(
            [layer_futures[name].result() for name in layers],
            [future.result() for future in storage_futures],
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts.matrix", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "only", nargs="*", help="run these layers and storages alone, and write nothing"
    )
    parser.add_argument(
        "--check", action="store_true", help="fail if the committed page says something else"
    )
    parser.add_argument(
        "--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes at a time"
    )
    arguments = parser.parse_args()
    text, summary = run(arguments.only, arguments.jobs)
    if arguments.check:
        committed = PAGE.read_text() if PAGE.exists() else ""
        if text != committed:
            lines = difflib.unified_diff(
                committed.splitlines(), text.splitlines(), "committed", "found", lineterm=""
            )
            print("\n".join(lines))
            print(
                "Found: docs/support.md out of date. Expected: what `make matrix` writes. Do: run"
                " it and commit."
            )
            return 1
        print(f"docs/support.md: fresh\n{summary}")
        return 0
    if not arguments.only:
        PAGE.write_text(text)
    print(f"{text}\n{summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
