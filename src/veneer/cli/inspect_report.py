"""`veneer inspect --report`: write an HTML report about an adapter.

``tools/report`` computes the numbers that need only weights. This module adds losses, which it
measures by running the model with the adapter and with adapters derived from it: truncated to
smaller ranks, with intruder dimensions scaled down (repaired), and, as a control, with the whole
ΔW scaled down. An intruder dimension is a leading singular vector of the adapted weight that
resembles none of the base weight. Each derived adapter is written to a temporary folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from veneer.cli.console import base_files, err, open_base_and_adapter, tokenizer_for
from veneer.errors import ConfigError

#: for each measured repair, the factor by which it multiplies the singular values of intruders
REPAIR_FACTORS = (0.5, 0.0)
#: the factors of ΔW for which the loss is measured if there is no intruder dimension to repair
SCALES = (0.75, 0.5)
#: the share of the adapter's reduction of the loss that the recommended rank must retain
MIN_RETAINED_GAIN = 0.99


class ReportRequest(NamedTuple):
    """The options of `veneer inspect --report`.

    Fields:
        report: the HTML file to write.
        other: the adapter to compare with.
        base: the base model.
        data: held-out rows of the adapter's task, to measure losses on (a file or hub data set).
        general: general text, to measure what the model has forgotten.
        intruders: how many leading singular vectors of each weight to examine.
        batch_size: rows in one forward pass.
        loading_options: arguments of `load_base`.
    """

    report: Path
    other: str | None
    base: str | None
    data: str | None
    general: str | None
    intruders: int
    batch_size: int
    loading_options: dict[str, Any]


def write_report(adapter_files: Any, request: ReportRequest) -> dict[str, Any]:
    """Write the HTML page, and return its numbers as JSON values. Invalid options raise ConfigError
    before anything is computed.

    ``adapter_files``: the ``AdapterFiles`` of the adapter to report on."""
    from veneer.adapter_files import read
    from veneer.fileio.atomic import write_whole
    from veneer.store.library import resolve
    from veneer.tools.report import examine
    from veneer.tools.report.report_page import page
    from veneer.train.data import read as read_rows

    source_paths = {
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
    if source_paths and request.base is None:
        raise ConfigError(
            f"--{next(iter(source_paths))} without --base",
            "the model to measure",
            "add --base MODEL",
        )
    other_adapter = None if request.other is None else read(resolve(request.other))
    rows_by_source = {name: read_rows(source) for name, source in source_paths.items()}
    base_options = {} if request.base is None else base_files(request.base, adapter_files.path)
    examples_by_source = (
        {}
        if request.base is None
        else _tokenise_sources(request.base, adapter_files.path, rows_by_source)
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
        if examples_by_source:
            losses = facts["losses"] = _measure_losses(
                adapter_files, report, request, base_options, examples_by_source, status
            )
            largest_rank, by_norm = report.cuts[-1].rank, (report.next_rank, report.why)
            by_loss = _recommend_rank(losses["rows"], largest_rank) or by_norm
            needs_more = by_norm[0] > largest_rank == by_loss[0]
            facts["next_rank"], facts["why"] = by_norm if needs_more else by_loss
    write_whole(request.report, page(facts))
    return facts


def _tokenise_sources(base: str, adapter: Path, rows_by_source: dict[str, Any]) -> dict[str, Any]:
    """Tokenise the rows of each source ("data", "general") with the adapter's or the base's
    tokenizer. Rows are truncated to the model's context, at most 2048 tokens. For "data", the loss
    counts only completions."""
    from veneer.models.load import context_length
    from veneer.models.sampling_defaults import base_end_tokens
    from veneer.train.prepare import check_length
    from veneer.train.tokens import tokenise

    if not rows_by_source:
        return {}
    length = check_length(None, context_length(base), base)
    tokenizer = tokenizer_for(base, str(adapter))
    end_ids = base_end_tokens(base, tokenizer)
    return {
        name: tokenise(
            source_rows,
            tokenizer,
            max_length=length,
            too_long="truncate",
            completion_only=name == "data",
            end_ids=end_ids,
        )
        for name, source_rows in rows_by_source.items()
    }


def _measure_losses(
    adapter_files: Any,
    report: Any,
    request: ReportRequest,
    base_options: dict[str, Any],
    examples_by_source: dict[str, Any],
    status: Any,
) -> dict[str, Any]:
    """Measure the loss of the base, the adapter and the derived adapters on each source of
    examples. Returns the entry "losses" that `veneer.tools.report.report_page` describes.

    Args:
        report: the ``Report`` about the adapter's weights.
        base_options: the arguments by which `compose` and `repair` read base weights.
        examples_by_source: the tokenised examples, by "data" and "general".
        status: rich's status line, which shows progress.
    """
    import veneer
    from veneer.train.evaluate import evaluate

    loaded_base, handle = open_base_and_adapter(
        str(request.base), str(adapter_files.path), **request.loading_options
    )
    token_counts: dict[str, int] = {}

    def measure(
        kind: str,
        setting: float | None,
        removed_share: float | None,
        select_adapter: Any,  # called for a context manager in which calls use the adapter
        source_names: Any = None,  # the sources to measure on, "data" or "general"; None for all
    ) -> dict[str, Any]:
        loss_row: dict[str, Any] = {
            "what": kind,
            "at": setting,
            "removed": removed_share,
            "data": None,
            "general": None,
        }
        label = f"{kind} {setting if setting is not None else ''}"
        for name in source_names or examples_by_source:
            status.update(f"Measuring {label} on {request._asdict()[name]} …")
            with select_adapter():
                evaluation = evaluate(
                    loaded_base.model, examples_by_source[name], batch_size=request.batch_size
                )
            loss_row[name], token_counts[name] = evaluation.loss, evaluation.tokens
        return loss_row

    loss_rows = [measure("base", None, None, partial(veneer.use, loaded_base.model, None))]
    loss_rows.append(measure("adapter", None, None, handle.use))
    note = _derivation_obstacle(adapter_files)
    if note is None:
        handle.detach()
        with TemporaryDirectory() as folder:
            for kind, setting, removed_share, path in _write_derived_adapters(
                adapter_files, report, "data" in examples_by_source, base_options, Path(folder)
            ):
                # not verified again: `open_base_and_adapter` has compared the base's fingerprints
                derived = veneer.load(loaded_base.model, path, verify_base=False)
                source_names = ["data"] if kind == "rank" else None
                loss_rows.append(measure(kind, setting, removed_share, derived.use, source_names))
                derived.detach()
    source_facts = {
        name: {"source": Path(request._asdict()[name]).name, "tokens": token_counts[name]}
        for name in examples_by_source
    }
    return {"data": None, "general": None, **source_facts, "note": note, "rows": loss_rows}


def _derivation_obstacle(adapter_files: Any) -> str | None:
    """A sentence for the page that says why no derived adapters are measured: this adapter cannot
    be truncated, repaired or scaled. None if it can."""
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
    """Write the derived adapters to measure into ``folder``, one after the other.

    Yield (kind, setting, removed share of the change's norm, adapter folder) of each. The kinds are
    "rank" (the setting is the rank to which ΔW is truncated; only if ``with_truncations``),
    "repaired" (the factor of intruder dimensions) and "weaker" (the factor of ΔW). After each
    "repaired" adapter comes a "weaker" one with the same removed share, as a control, unless this
    share is 1 or more. If there are no intruder dimensions, the "weaker" adapters have the factors
    ``SCALES``."""
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


def _recommend_rank(loss_rows: list[dict[str, Any]], largest_rank: int) -> tuple[int, str] | None:
    """Return (the smallest rank that keeps nearly all of the gain, a sentence with the reason). The
    gain is the loss of the base minus the loss of the adapter, on "data". If no truncated adapter
    keeps enough, the rank is `largest_rank`, that of the adapter. Return None if "data" was not
    measured, if there is no gain, or if no truncated adapter was measured.

    ``loss_rows``: the measured rows, those of the base and of the adapter first, then the truncated
    adapters by increasing rank."""
    base, adapter, *derived_rows = loss_rows
    if adapter["data"] is None or adapter["data"] >= base["data"]:
        return None
    gain = base["data"] - adapter["data"]
    for loss_row in derived_rows:
        retained_gain = (
            (base["data"] - loss_row["data"]) / gain if loss_row["what"] == "rank" else 0.0
        )
        if retained_gain >= MIN_RETAINED_GAIN:
            rank = loss_row["at"]
            reason = (
                f"truncated to rank {rank} it keeps {retained_gain:.1%} of what it gained on the"
                " data"
            )
            return rank, reason
    if any(loss_row["what"] == "rank" for loss_row in derived_rows):
        return largest_rank, (
            f"no truncation keeps {MIN_RETAINED_GAIN:.0%} of what it gained on the data"
        )
    return None
