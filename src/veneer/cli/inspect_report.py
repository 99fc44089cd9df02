"""`veneer inspect --report`: write an HTML report about an adapter.

``tools/report`` computes the figures that need only weights. This module measures losses with the
running model: of truncations to smaller ranks, of repairs, and of adapters with a smaller scale as
their control. Each of these derived adapters is written to a temporary folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from veneer.errors import ConfigError

#: factors of the intruder dimensions in the repairs that are measured
REPAIR_FACTORS = (0.5, 0.0)
#: scales of ΔW that are measured if there is no intruder to repair
SCALES = (0.75, 0.5)
#: the recommended rank keeps at least this share of the adapter's reduction of the loss
MIN_KEPT_GAIN = 0.99


class ReportRequest(NamedTuple):
    """The options of `veneer inspect --report`; ``other`` is the adapter to compare with."""

    report: Path
    other: str | None
    base: str | None
    data: str | None
    general: str | None
    intruders: int
    batch_size: int
    loading: dict[str, Any]


def write_report(saved: Any, request: ReportRequest) -> dict[str, Any]:
    """Write the HTML page and return its facts for JSON. Bad input raises ConfigError before
    anything is computed."""
    from veneer.adapter_files import read
    from veneer.cli.console import base_files, err
    from veneer.fileio.atomic import write_whole
    from veneer.store.library import resolve
    from veneer.tools.report import examine
    from veneer.tools.report.report_page import page
    from veneer.train.data import read as read_rows

    measures = {
        name: source
        for name in ("data", "general")
        if (source := getattr(request, name)) is not None
    }
    if request.report.suffix.lower() not in (".html", ".htm") or not request.report.parent.is_dir():
        problem = f"--report {request.report}"
        raise ConfigError(
            problem, "a file .html in a folder that exists", "name, for instance, report.html"
        )
    if measures and request.base is None:
        raise ConfigError(
            f"--{next(iter(measures))} without --base", "the model to measure", "add --base MODEL"
        )
    other_adapter = None if request.other is None else read(resolve(request.other))
    rows = {name: read_rows(source) for name, source in measures.items()}
    files = {} if request.base is None else base_files(request.base, saved.path)
    examples = {} if request.base is None else _examples(request.base, saved.path, rows)
    with err.status("Looking …") as status:
        report = examine(
            saved,
            **files,
            base_name=request.base,
            other=other_adapter,
            count=request.intruders,
            progress=lambda path, done, total: status.update(f"{done} of {total}  {path}"),
        )
        facts = report.to_dict()
        if examples:
            losses = facts["losses"] = _losses(saved, report, request, files, examples, status)
            facts["next_rank"], facts["why"] = _by_loss(losses["rows"]) or (
                report.next_rank,
                report.why,
            )
    write_whole(request.report, page(facts))
    return facts


def _examples(base: str, adapter: Path, rows: dict[str, Any]) -> dict[str, Any]:
    """Tokenise the rows of each source, truncated to the model's context (at most 2048 tokens)."""
    from veneer.cli.console import tokenizer_for
    from veneer.models.load import context_length
    from veneer.train.tokens import tokenise

    length = min(context_length(base) or 2048, 2048)
    tokenizer = tokenizer_for(base, str(adapter)) if rows else None
    return {
        name: tokenise(
            source_rows,
            tokenizer,
            max_length=length,
            too_long="truncate",
            completion_only=name == "data",
        )
        for name, source_rows in rows.items()
    }


def _losses(
    saved: Any,
    report: Any,
    request: ReportRequest,
    files: dict[str, Any],
    examples: dict[str, Any],
    status: Any,
) -> dict[str, Any]:
    """Measure the loss of the base, the adapter and the derived adapters on each source of
    examples. ``rows`` of the result: see `veneer.tools.report.report_page`."""
    import veneer
    from veneer.cli.console import open_base_and_adapter
    from veneer.train.evaluate import evaluate

    loaded, handle = open_base_and_adapter(str(request.base), str(saved.path), **request.loading)
    tokens: dict[str, int] = {}

    def measure(
        kind: str, setting: float | None, removed: float | None, select: Any, sources: Any = None
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"what": kind, "at": setting, "removed": removed}
        row |= {"data": None, "general": None}
        label = f"{kind} {setting if setting is not None else ''}"
        for name in sources or examples:
            status.update(f"Measuring {label} on {request._asdict()[name]} …")
            with select():
                evaluation = evaluate(loaded.model, examples[name], batch_size=request.batch_size)
            row[name], tokens[name] = evaluation.loss, evaluation.tokens
        return row

    rows = [measure("base", None, None, partial(veneer.use, loaded.model, None))]
    rows.append(measure("adapter", None, None, handle.use))
    note = None
    if saved.tokens:
        note = (
            "It trains tokens, which no truncation and no repair has a place for, so that none was"
            " measured."
        )
    else:
        handle.detach()
        with TemporaryDirectory() as folder:
            for kind, setting, removed, path in _write_derived_adapters(
                saved, report, "data" in examples, files, Path(folder)
            ):
                # opening `saved` above has already compared the base
                derived = veneer.load(loaded.model, path, verify_base=False)
                sources = ["data"] if kind == "rank" else None
                rows.append(measure(kind, setting, removed, derived.use, sources))
                derived.detach()
    sources = {
        name: {"source": Path(request._asdict()[name]).name, "tokens": tokens[name]}
        for name in examples
    }
    return {"data": None, "general": None, **sources, "note": note, "rows": rows}


def _write_derived_adapters(
    saved: Any, report: Any, truncate: bool, files: dict[str, Any], folder: Path
) -> Iterator[tuple[str, float, float | None, Path]]:
    """Write the adapters to measure one after the other.

    Yields (kind, rank or factor, removed share of the change, folder) of each."""
    from veneer.tools.compose import compose
    from veneer.tools.compose.repair import repair

    for cut in report.cuts[:-1] if truncate else ():
        path = compose(
            saved, folder / f"rank-{cut.rank}", method="svd", rank=cut.rank, **files
        ).path
        yield "rank", cut.rank, cut.lost, path

    def write_scaled(weight: float) -> tuple[str, float, float, Path]:
        path = compose(saved, folder / f"weaker-{weight}", weights=[weight], **files).path
        return "weaker", weight, 1 - weight, path

    has_intruders = any(weight.count for weight in report.weight_intruders)
    for factor in REPAIR_FACTORS if has_intruders else ():
        repaired = repair(
            saved,
            folder / f"repaired-{factor}",
            **files,
            factor=factor,
            intruders=report.weight_intruders,
        )
        yield "repaired", factor, repaired.removed, repaired.path
        if repaired.removed < 1:
            yield write_scaled(1 - repaired.removed)
    yield from () if has_intruders else map(write_scaled, SCALES)


def _by_loss(rows: list[dict[str, Any]]) -> tuple[int, str] | None:
    """Return (the smallest rank that keeps nearly all of the gain on the data, the reason), or None
    if no smaller rank does."""
    base, adapter, *derived_rows = rows
    if adapter["data"] is None or adapter["data"] >= base["data"]:
        return None
    gain = base["data"] - adapter["data"]
    for row in derived_rows:
        kept_gain = (base["data"] - row["data"]) / gain if row["what"] == "rank" else 0.0
        if kept_gain >= MIN_KEPT_GAIN:
            rank = row["at"]
            reason = (
                f"truncated to rank {rank} it keeps {kept_gain:.1%} of what it gained on the data"
            )
            return rank, reason
    return None
