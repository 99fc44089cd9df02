"""`veneer inspect --report`: the look inside of an adapter, measured and written.

The numbers are ``tools/report``'s. What needs a model that runs is measured here, one derived
adapter after the other, each a folder that is gone afterwards: truncations to smaller ranks,
repairs, and their control.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from veneer.errors import ConfigError

#: what is left of the intruders in the repairs that are measured
FACTORS = (0.5, 0.0)
#: what is left of ΔW in the weaker adapters that are measured where there is no intruder to repair
EVENLY = (0.75, 0.5)
#: the share of what an adapter gained on the data that the next rank has to keep
ENOUGH = 0.99


class Asked(NamedTuple):
    report: Path
    other: str | None
    base: str | None
    data: str | None
    general: str | None
    intruders: int
    batch_size: int
    loading: dict[str, Any]


def write_report(saved: Any, asked: Asked) -> dict[str, Any]:
    """Write the page; what it shows, for JSON. Bad input is an error before anything is
    computed."""
    from veneer.adapter_files import read
    from veneer.cli.console import base_files, err
    from veneer.fileio.atomic import write_whole
    from veneer.store.library import resolve
    from veneer.tools.report import examine
    from veneer.tools.report.page import page
    from veneer.train.data import read as read_rows

    measures = {
        name: source for name in ("data", "general") if (source := getattr(asked, name)) is not None
    }
    if asked.report.suffix.lower() not in (".html", ".htm") or not asked.report.parent.is_dir():
        problem = f"--report {asked.report}"
        raise ConfigError(
            problem, "a file .html in a folder that exists", "name, for instance, report.html"
        )
    if measures and asked.base is None:
        raise ConfigError(
            f"--{next(iter(measures))} without --base", "the model to measure", "add --base MODEL"
        )
    other = None if asked.other is None else read(resolve(asked.other))
    rows = {name: read_rows(source) for name, source in measures.items()}
    files = {} if asked.base is None else base_files(asked.base, saved.path)
    examples = {} if asked.base is None else _examples(asked.base, saved.path, rows)
    with err.status("Looking …") as status:
        report = examine(
            saved, **files, base_name=asked.base, other=other, count=asked.intruders,
            progress=lambda path, done, total: status.update(f"{done} of {total}  {path}"),
        )  # fmt: skip
        facts = report.to_dict()
        if examples:
            losses = facts["losses"] = _losses(saved, report, asked, files, examples, status)
            facts["next_rank"], facts["why"] = _by_loss(losses["rows"]) or (
                report.next_rank,
                report.why,
            )
    write_whole(asked.report, page(facts))
    return facts


def _examples(base: str, adapter: Path, rows: dict[str, Any]) -> dict[str, Any]:
    """The rows of each source as token ids. The ends of rows that are longer than the model reads
    are left out."""
    from veneer.cli.console import tokenizer_for
    from veneer.models.load import context_length
    from veneer.train.tokens import tokenise

    length = min(context_length(base) or 2048, 2048)
    tokenizer = tokenizer_for(base, str(adapter)) if rows else None
    return {
        name: tokenise(
            own, tokenizer, max_length=length, too_long="truncate", completion_only=name == "data"
        )
        for name, own in rows.items()
    }


def _losses(
    saved: Any,
    report: Any,
    asked: Asked,
    files: dict[str, Any],
    examples: dict[str, Any],
    status: Any,
) -> dict[str, Any]:
    import veneer
    from veneer.cli.console import open_base_and_adapter
    from veneer.train.evaluate import evaluate

    loaded, handle = open_base_and_adapter(str(asked.base), str(saved.path), **asked.loading)
    tokens: dict[str, int] = {}

    def measured(
        what: str, at: float | None, removed: float | None, using: Any, names: Any = None
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "what": what,
            "at": at,
            "removed": removed,
            "data": None,
            "general": None,
        }
        for name in names or examples:
            status.update(
                f"Measuring {what} {at if at is not None else ''} on {asked._asdict()[name]} …"
            )
            with using():
                found = evaluate(loaded.model, examples[name], batch_size=asked.batch_size)
            row[name], tokens[name] = found.loss, found.tokens
        return row

    rows = [measured("base", None, None, partial(veneer.use, loaded.model, None))]
    rows.append(measured("adapter", None, None, handle.use))
    note = None
    if saved.tokens:
        note = (
            "It trains tokens, which no truncation and no repair has a place for, so that none was"
            " measured."
        )
    else:
        handle.detach()
        with TemporaryDirectory() as folder:
            for what, at, removed, path in _derived(
                saved, report, "data" in examples, files, Path(folder)
            ):
                # its base was proven above
                derived = veneer.load(loaded.model, path, verify_base=False)
                names = ["data"] if what == "rank" else None
                rows.append(measured(what, at, removed, derived.use, names))
                derived.detach()
    sources = {
        name: {"source": Path(asked._asdict()[name]).name, "tokens": tokens[name]}
        for name in examples
    }
    return {"data": None, "general": None, **sources, "note": note, "rows": rows}


def _derived(
    saved: Any, report: Any, cuts: bool, files: dict[str, Any], folder: Path
) -> Iterator[tuple[str, float, float | None, Path]]:
    """(what, rank or factor, share of the change that it lacks, folder) of each adapter to
    measure."""
    from veneer.tools.compose import compose
    from veneer.tools.compose.repair import repair

    for cut in report.cuts[:-1] if cuts else ():
        path = compose(
            saved, folder / f"rank-{cut.rank}", method="svd", rank=cut.rank, **files
        ).path
        yield "rank", cut.rank, cut.lost, path

    def weaker(weight: float) -> tuple[str, float, float, Path]:
        path = compose(saved, folder / f"weaker-{weight}", weights=[weight], **files).path
        return "weaker", weight, 1 - weight, path

    found = any(one.count for one in report.found)
    for factor in FACTORS if found else ():
        repaired = repair(
            saved, folder / f"repaired-{factor}", **files, factor=factor, found=report.found
        )
        yield "repaired", factor, repaired.removed, repaired.path
        if repaired.removed < 1:
            yield weaker(1 - repaired.removed)
    yield from () if found else map(weaker, EVENLY)


def _by_loss(rows: list[dict[str, Any]]) -> tuple[int, str] | None:
    """(the smallest rank that keeps nearly all of the gain on the data, why), or None where none
    smaller does."""
    base, adapter, *others = rows
    if adapter["data"] is None or adapter["data"] >= base["data"]:
        return None
    gain = base["data"] - adapter["data"]
    for row in others:
        kept = (base["data"] - row["data"]) / gain if row["what"] == "rank" else 0.0
        if kept >= ENOUGH:
            said = (
                f"truncated to rank {row['at']} it keeps {kept:.1%} of what it gained on the data"
            )
            return row["at"], said
    return None
