"""Run the cases, print the table, write docs/peft-cases.md; fail if a result is wrong or a refusal
has no reason."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator

from . import ROOT, silence

PAGE = ROOT / "docs" / "peft-cases.md"
WAYS = {
    "load": "PEFT's folder by `veneer.load`, to what PEFT gives from that folder",
    "around": "what `veneer.save` makes of it, in PEFT, to the same",
    "merge": "the merged weights, to the same",
    "off": "unmerged (every bit of the base), switched off and detached, to the base",
    "targets": "`veneer.attach` by the config that [from-peft.md](from-peft.md) says: the modules that PEFT adapts",
    "save": "that adapter's folder in PEFT, to Veneer's outputs",
    "switch": "two of PEFT's adapters on one model: each alone, none, and one when the other is detached",
    "rows": "`adapter_names=[…]`, to `veneer.use(model, […])`",
    "stack": "`merge_adapter([…])`, to `veneer.merge` of each in turn; unmerged in reverse, every bit",
    "both": "`set_adapter([…])`, to `veneer.use(model, {…})`",
    "sum": "`add_weighted_adapter(…, \"cat\")`, to `veneer.compose`; each one's folder in the other",
    "svd": "the same by `\"svd\"`, at a rank that leaves nothing out",
    "read": "the paths that a config means, to PEFT's own matching",
    "at the root": "the same where names are whole paths, and lists of blocks stand at the root",
    "attach": "the paths that the translated config changes, to the same",
}  # fmt: skip


def results(only: str) -> Iterator:
    """Every result of the cases whose family and name a pattern is found in."""
    from . import matching, several, ways
    from .rows import rows

    for row in rows():
        if re.search(only, f"{row.family} / {row.name}"):
            yield from ways.results(row)
    for pair in several.PAIRS:
        if re.search(only, f"Two adapters / {pair.name}"):
            yield from several.results(pair)
    yield from (
        result for result in matching.results() if re.search(only, f"Targets / {result.name}")
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.peft_cases", description=__doc__)
    parser.add_argument(
        "only",
        nargs="?",
        default="",
        help="a pattern of families and names; then nothing is written",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing, and fail if the page says something else",
    )
    arguments = parser.parse_args()
    silence()
    import peft
    import torch
    import transformers

    from .page import page, summary, unexplained
    from .ways import EQUAL, WRONG

    found = []
    for result in results(arguments.only):
        found.append(result)
        if result.status != EQUAL:
            print(
                f"{result.status:8} {result.way:8} {result.name}\n    {' '.join(result.text.split())}",
                flush=True,
            )
    versions = f"PEFT {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}."
    text = page(found, WAYS, versions)
    print(f"{len(found)} results: {summary(found)}")
    odd = unexplained(found)
    for result in odd:
        print(
            f"Found: a refusal without a reason in page.py ({result.name}, {result.way}). Do: add one."
        )
    if arguments.check and text != (PAGE.read_text() if PAGE.exists() else ""):
        print(
            "Found: docs/peft-cases.md out of date. Do: python -m tests.peft_cases, and commit it."
        )
        return 1
    if not arguments.check and not arguments.only:
        PAGE.write_text(text)
    return 1 if odd or any(result.status == WRONG for result in found) else 0


if __name__ == "__main__":
    sys.exit(main())
