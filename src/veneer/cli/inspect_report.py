"""`veneer inspect --report`: write an HTML report about an adapter.

``tools/report`` computes the figures that need only weights. This module measures losses by running
the model: with the adapter truncated to smaller ranks, with repaired adapters, and, as a control,
with the adapter at a smaller scale. Each of these derived adapters is written to a temporary
folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from veneer.errors import ConfigError

#: factors by which the measured repairs multiply intruder dimensions
REPAIR_FACTORS = (0.5, 0.0)
#: factors by which ΔW is multiplied and measured if there is no intruder dimension to repair
SCALES = (0.75, 0.5)
#: the recommended rank retains at least this share of the adapter's reduction of the loss
MIN_RETAINED_GAIN = 0.99


class ReportRequest(NamedTuple):
    """The options of `veneer inspect --report`. ``other``: the adapter to compare with; ``data``,
    ``general``: sources of rows to measure losses on; ``intruders``: number of leading singular
    vectors to examine in each weight; ``loading_options``: arguments of `load_base`."""

    report: Path
    other: str | None
    base: str | None
    data: str | None
    general: str | None
    intruders: int
    batch_size: int
    loading_options: dict[str, Any]


def write_report(adapter_files: Any, request: ReportRequest) -> dict[str, Any]:
    """Write the HTML page and return its content for JSON. Invalid options raise ConfigError before
    anything is computed."""
    from veneer.adapter_files import read
    from veneer.cli.console import base_files, err
    from veneer.fileio.atomic import write_whole
    from veneer.store.library import resolve
    from veneer.tools.report import examine
    from veneer.tools.report.report_page import page
    from veneer.train.data import read as read_rows

    sources = {
        name: source
        for name in ("data", "general")
        if (source := getattr(request, name)) is not None
    }
    if request.report.suffix.lower() not in (".html", ".htm") or not request.report.parent.is_dir():
        raise ConfigError(
            f"--report {request.report}",
            "a file .html in a folder that exists",
            "name, for instance, report.html",
        )
    if sources and request.base is None:
        raise ConfigError(
            f"--{next(iter(sources))} without --base", "the model to measure", "add --base MODEL"
        )
    other_adapter = None if request.other is None else read(resolve(request.other))
    rows = {name: read_rows(source) for name, source in sources.items()}
    base_options = {} if request.base is None else base_files(request.base, adapter_files.path)
    examples = (
        {} if request.base is None else _tokenise_sources(request.base, adapter_files.path, rows)
    )
    with err.status("Looking …") as status:
        report = examine(
            adapter_files,
            **base_options,
            base_name=request.base,
            other=other_adapter,
            count=request.intruders,
            progress=lambda path, done, total: status.update(f"{done} of {total}  {path}"),
        )
        facts = report.to_dict()
        if examples:
            losses = facts["losses"] = _measure_losses(
                adapter_files, report, request, base_options, examples, status
            )
            facts["next_rank"], facts["why"] = _recommend_rank(losses["rows"]) or (
                report.next_rank,
                report.why,
            )
    write_whole(request.report, page(facts))
    return facts


def _tokenise_sources(base: str, adapter: Path, rows: dict[str, Any]) -> dict[str, Any]:
    """Tokenise the rows of each source. Rows are truncated to the model's context, at most 2048
    tokens."""
    from veneer.cli.console import tokenizer_for
    from veneer.models.load import context_length
    from veneer.train.prepare import check_length
    from veneer.train.tokens import tokenise

    length = check_length(None, context_length(base), base)
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


def _measure_losses(
    adapter_files: Any,
    report: Any,
    request: ReportRequest,
    base_options: dict[str, Any],
    examples: dict[str, Any],
    status: Any,
) -> dict[str, Any]:
    """Measure the loss of the base, the adapter and the derived adapters on each source of
    examples. The result is described in `veneer.tools.report.report_page`. ``base_options``: how
    the tools read base weights; ``status``: shows progress."""
    import veneer
    from veneer.cli.console import open_base_and_adapter
    from veneer.train.evaluate import evaluate

    loaded_base, handle = open_base_and_adapter(
        str(request.base), str(adapter_files.path), **request.loading_options
    )
    tokens: dict[str, int] = {}

    def measure(
        kind: str,
        setting: float | None,
        removed_share: float | None,
        select_adapter: Any,
        source_names: Any = None,
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "what": kind,
            "at": setting,
            "removed": removed_share,
            "data": None,
            "general": None,
        }
        label = f"{kind} {setting if setting is not None else ''}"
        for name in source_names or examples:
            status.update(f"Measuring {label} on {request._asdict()[name]} …")
            with select_adapter():
                evaluation = evaluate(
                    loaded_base.model, examples[name], batch_size=request.batch_size
                )
            row[name], tokens[name] = evaluation.loss, evaluation.tokens
        return row

    rows = [measure("base", None, None, partial(veneer.use, loaded_base.model, None))]
    rows.append(measure("adapter", None, None, handle.use))
    note = _derivation_obstacle(adapter_files)
    if note is None:
        handle.detach()
        with TemporaryDirectory() as folder:
            for kind, setting, removed_share, path in _write_derived_adapters(
                adapter_files, report, "data" in examples, base_options, Path(folder)
            ):
                # `open_base_and_adapter` has compared the base with the adapter's fingerprints
                derived = veneer.load(loaded_base.model, path, verify_base=False)
                source_names = ["data"] if kind == "rank" else None
                rows.append(measure(kind, setting, removed_share, derived.use, source_names))
                derived.detach()
    sources = {
        name: {"source": Path(request._asdict()[name]).name, "tokens": tokens[name]}
        for name in examples
    }
    return {"data": None, "general": None, **sources, "note": note, "rows": rows}


def _derivation_obstacle(adapter_files: Any) -> str | None:
    """Why an adapter cannot be truncated, repaired or scaled, as a note for the page; None if it
    can."""
    if adapter_files.tokens:
        reason = "It trains tokens, which no truncation and no repair has a place for"
    elif adapter_files.config.invocation_tokens:
        reason = "It acts from its invocation tokens on, which no truncation and no repair keeps"
    else:
        return None
    return f"{reason}, so that none was measured."


def _write_derived_adapters(
    adapter_files: Any,
    report: Any,
    with_truncations: bool,
    base_options: dict[str, Any],
    folder: Path,
) -> Iterator[tuple[str, float, float | None, Path]]:
    """Write the derived adapters to measure, one after the other.

    Yield (kind, rank or factor, removed share of the change, folder) of each adapter."""
    from veneer.tools.compose import compose
    from veneer.tools.compose.repair import repair

    for cut in report.cuts[:-1] if with_truncations else ():
        path = compose(
            adapter_files,
            folder / f"rank-{cut.rank}",
            method="svd",
            rank=cut.rank,
            **base_options,
        ).path
        yield "rank", cut.rank, cut.lost, path

    def write_scaled(scale: float) -> tuple[str, float, float, Path]:
        path = compose(
            adapter_files, folder / f"weaker-{scale}", weights=[scale], **base_options
        ).path
        return "weaker", scale, 1 - scale, path

    has_intruders = any(weight.count for weight in report.weight_intruders)
    for factor in REPAIR_FACTORS if has_intruders else ():
        repaired = repair(
            adapter_files,
            folder / f"repaired-{factor}",
            **base_options,
            factor=factor,
            intruders=report.weight_intruders,
        )
        yield "repaired", factor, repaired.removed, repaired.path
        if repaired.removed < 1:
            yield write_scaled(1 - repaired.removed)
    yield from () if has_intruders else map(write_scaled, SCALES)


def _recommend_rank(rows: list[dict[str, Any]]) -> tuple[int, str] | None:
    """Return (the smallest rank that keeps nearly all of the gain on the data, the reason), or None
    if no smaller rank does. The gain is the loss of the base minus the loss of the adapter."""
    base, adapter, *derived_rows = rows
    if adapter["data"] is None or adapter["data"] >= base["data"]:
        return None
    gain = base["data"] - adapter["data"]
    for row in derived_rows:
        retained_gain = (base["data"] - row["data"]) / gain if row["what"] == "rank" else 0.0
        if retained_gain >= MIN_RETAINED_GAIN:
            rank = row["at"]
            reason = (
                f"truncated to rank {rank} it keeps {retained_gain:.1%} of what it gained on the"
                " data"
            )
            return rank, reason
    return None
