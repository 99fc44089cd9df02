"""Make the page of the matrix: its tables and their footnotes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from veneer.variants import VARIANTS

from .cases import LEFT_OUT, NOTE, Results, Verdicts
from .operations import CYCLES, OPERATIONS
from .storages import GRID, STORED


class Page:
    """Makes the cells of the tables, numbers their footnotes and counts the classes of cells."""

    def __init__(self) -> None:
        self.notes: dict[str, int] = {}
        self.counts = {"exact": 0, "exact, with a note": 0, "in part": 0, "no": 0}

    def cell(self, verdicts: Verdicts, examples: Mapping[str, str]) -> tuple[str, str]:
        """(the class of a cell, its text). ``examples``: a description of each example."""
        verdicts_with_rows = {
            example: why for example, why in verdicts.items() if why is not LEFT_OUT
        }
        reasons: dict[str, list[str]] = {}
        for example, why in verdicts_with_rows.items():
            if why:
                reasons.setdefault(why, []).append(f"`{examples[example]}`")
        if verdicts_with_rows and not reasons:
            return "exact", "exact"
        texts = [
            (
                why
                if len(labels) == len(verdicts_with_rows)
                else f"{', '.join(dict.fromkeys(labels))}: {why}"
            )
            for why, labels in reasons.items()
        ]
        number = self.notes.setdefault(
            "; ".join(texts) or "no example has rows", len(self.notes) + 1
        )
        exact_count = sum(
            not why or why.startswith((NOTE, GRID)) for why in verdicts_with_rows.values()
        )
        if verdicts_with_rows and exact_count == len(verdicts_with_rows):
            is_rounded = any(why.startswith(GRID) for why in reasons)
            return "exact, with a note", f"{'to its grid' if is_rounded else 'exact'} [^{number}]"
        cell_class = "in part" if exact_count else "no"
        return cell_class, f"{cell_class} [^{number}]"

    def rows(self, results: Results) -> Iterator[tuple[str, list[str]]]:
        """(names of variants, cells): variants with the same cells share a row."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for name, operations in results.verdicts.items():
            cells = [self.cell(verdicts, results.examples) for verdicts in operations.values()]
            for cell_class, _ in cells:
                self.counts[cell_class] += 1
            groups.setdefault(tuple(text for _, text in cells), []).append(name)
        largest_group = max(groups.values(), key=len)
        for cells, names in groups.items():
            remaining = [name for name in results.verdicts if name not in names]
            if not remaining:
                variants = f"all {len(names)}" if len(names) > 1 else ""
            elif names is largest_group and len(remaining) < len(names):
                variants = f"all but {', '.join(remaining)}"
            else:
                variants = ", ".join(names)
            yield variants, list(cells)


INTRO = """# What works with what

Written by `make matrix`, which runs every cell; nothing here is typed. `make check` runs it again
and fails if this page says something else.

**exact** means, for every example of the layer (each option that changes the arithmetic), with
errors relative to the size of what is compared:

| | |
|---|---|
"""

MEANINGS = {
    "forward": (
        "in float64, a call as it is made, and on both paths that it can be told to take (adding ΔW"
        " x, and forming W + ΔW), is within 1e-10 of the definition: the module's own forward on"
        " gain ⊙ (W + ΔW), with ΔW and gain as the variant's paper says"
    ),
    "gradient": (
        "on the same paths, of every adapter parameter and input, within 1e-9 of autograd through"
        " the definition"
    ),
    "merge": (
        "the merged outputs are within 1e-10 of the adapted ones; in bfloat16 every merged weight"
        " is W + ΔW rounded to the nearest"
    ),
    "unmerge": (
        f"in bfloat16, after each of {CYCLES} merges and unmerges, every bit of the base is back"
    ),
    "save/load": (
        "on a fresh base, the same config, the same adapter parameters and the same bits of output"
    ),
    "mixed batch": (
        "rows of one batch that use this adapter, none and another one are within 1e-10 of the rows"
        " of whole batches"
    ),
    "bank": (
        "the same of a `veneer.Bank` that holds the adapters from their folders, on a base of"
        " its own"
    ),
    "compile": (
        "`torch.compile` into one graph, switched between two adapters, is within 1e-10 of eager"
    ),
    "PEFT round trip": (
        "what PEFT loads and computes from our folder, and what we load from the folder that PEFT"
        " then writes, within 1e-5"
    ),
}

NOTES = """
A footnote says why a cell is not exact, and of which examples: each goes by what makes it different
from the plainest one. Where PEFT would compute something else from our folder, the folder makes
PEFT refuse it, and says why; Veneer reads it all the same. A mixed batch, and a bank, is asked of
examples whose inputs hold rows: the base gives the same outputs when it runs on them one by one.

## Layers × variants
"""


STORAGE_NOTES = """
Here **exact** has the accuracy of the numbers that a layer computes with: outputs within 1e-10 in
float64, 1e-6 in float32, 6e-4 in float16 and 5e-3 in bfloat16, gradients within twice that. **To
its grid** means that the merged weight is rounded to what the storage can hold, which is less than
a change needs: here each number to the nearest, which keeps a part of it (`rounding="faithful"`
keeps what the adapter reads). An adapter that is left unmerged keeps all. Bases of other libraries:
[quantised-bases.md](quantised-bases.md).
"""


def format_counts(counts: Mapping[str, int]) -> str:
    return (
        f"{sum(counts.values())} cells:"
        f" {', '.join(f'{count} {kind}' for kind, count in counts.items())}."
    )


def page(layers: list[Results], storages: list[Results]) -> tuple[str, str]:
    """(the page, its summary)."""
    builder = Page()
    lines = [
        f"| layer | variants | {' | '.join(OPERATIONS)} |",
        "|---" * (len(OPERATIONS) + 2) + "|",
    ]
    for results in layers:
        for variants, cells in builder.rows(results):
            lines.append(f"| {results.name} | {variants} | {' | '.join(cells)} |")
    sizes = (
        f"{len(layers)} layers × {len(VARIANTS.names())} variants × {len(OPERATIONS)} operations"
    )
    summary = f"{sizes} = {format_counts(builder.counts)}"
    lines += ["", summary, ""]
    skipped = {
        f"{results.name} (`{results.examples[example]}`)": None
        for results in layers
        for operations in results.verdicts.values()
        for example, why in operations["mixed batch"].items()
        if why is LEFT_OUT
    }
    lines += [f"Examples without rows: {', '.join(skipped)}.", ""] if skipped else []
    lines += ["## Storages of a linear layer's weight, with variant `lora`", STORAGE_NOTES]
    lines += [f"| storage | examples | {' | '.join(STORED)} |", "|---" * (len(STORED) + 2) + "|"]
    builder.counts = dict.fromkeys(builder.counts, 0)
    for results in storages:
        for _, row in builder.rows(results):
            examples_text = ", ".join(dict.fromkeys(results.examples.values()))
            lines.append(f"| {results.name} | {examples_text} | {' | '.join(row)} |")
    sizes = f"{len(storages)} storages × {len(STORED)} operations"
    storage_summary = f"{sizes} = {format_counts(builder.counts)}"
    lines += ["", storage_summary, ""]
    lines += [f"[^{number}]: {text}." for text, number in builder.notes.items()]
    meanings = "\n".join(f"| {operation} | {MEANINGS[operation]} |" for operation in OPERATIONS)
    tables = "\n".join(lines)
    return f"{INTRO}{meanings}\n{NOTES}\n{tables}\n", f"{summary}\n{storage_summary}"
