"""`veneer inspect`: what an adapter is, read and verified without its base."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Annotated, Any

from typer import Option

from veneer.cli.options import Adapter, AsJson


def inspect_command(
    adapter: Adapter,
    as_json: AsJson = False,
    layers: Annotated[int, Option(help="Show the so many layers with the largest change; 0 shows all.", min=0)] = 12,
) -> None:
    """Show an adapter's configuration, targets, counts, norms per layer and the fingerprint of its base.

    Reading verifies: a truncated or altered file is an error.

    \b
    Examples:
      veneer inspect run/adapter
      veneer inspect run/adapter --json
    """
    import veneer
    from veneer.cli.console import echo_json, out
    from veneer.store.library import resolve

    saved = veneer.adapter_files.read(resolve(adapter))
    facts = _facts(saved)
    if as_json:
        echo_json(facts)
    else:
        out.print(_head(facts))
        out.print(_norms(facts, layers))


def _facts(saved: Any) -> dict[str, Any]:
    from veneer.fileio.hashing import coverage

    record = saved.metadata.get("base", {})
    # of some of PEFT's tuners only the base tells the shapes
    unsized = saved.tuner.paths if saved.tuner is not None and saved.tuner.unsized else ()
    products = {} if unsized else saved.products
    base = {name: value for name, value in record.items() if name not in ("weights", "rest", "fresh")}
    return {
        "path": str(saved.path),
        "base": base or {"name": saved.peft_config.get("base_model_name_or_path")},
        "fingerprint": _fingerprint(record.get("weights", {})),
        "proof": coverage(record),
        "config": saved.config.to_dict(),
        "alpha": saved.peft_config["lora_alpha"],  # the config's may be None: the variant's default
        "parameters": saved.parameters,
        "bytes": sum(file.stat().st_size for file in saved.path.iterdir() if file.is_file()),
        "targets": Counter(path.rsplit(".", 1)[-1] for path in (products or unsized)),
        "trained_in_full": sorted(saved.full),
        "norms": {path: float(change.norm()) for path, change in products.items()},
        "provenance": saved.metadata.get("provenance", {}),
        "versions": saved.metadata.get("versions", {}),
        "verified": bool(saved.record),
    }


def _fingerprint(weights: dict[str, str]) -> str | None:
    """One hash of the fingerprints of all adapted base weights: equal for equal bases and targets."""
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:32] if weights else None


def _head(facts: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from veneer.attach.summary import size

    config, architecture = facts["config"], facts["base"].get("architecture")
    metrics, run = facts["provenance"].get("metrics") or {}, facts["provenance"].get("config") or {}
    training = [f"{metrics['steps']:,} steps"] if "steps" in metrics else []
    training += [f"loss {metrics['last_loss']:.4f}"] if "last_loss" in metrics else []
    training += [f"evaluation {metrics['eval_loss']:.4f}"] if "eval_loss" in metrics else []
    training += [f"on {run['data']}"] if training and "data" in run else []
    how = facts["base"].get("quantized")
    packed = f", trained on it in {how.get('as', 'packed form')} ({how.get('by')})" if how else ""
    unverified = "" if facts["verified"] else "  (written by another library: nothing to verify it by)"
    rows = {
        "adapter": f"{facts['path']}{unverified}",
        "base": f"{facts['base'].get('name') or '?'}{f' ({architecture})' if architecture else ''}{packed}",
        "fingerprint": facts["fingerprint"] or "none",
        "base proven": facts["proof"],
        "variant": f"{config['variant']}, rank {config['rank']}, alpha {facts['alpha']:g}, dropout {config['dropout']}",
        "targets": ", ".join(f"{kind} × {count}" for kind, count in facts["targets"].items()) or "none",
        **({"in full": ", ".join(facts["trained_in_full"])} if facts["trained_in_full"] else {}),
        "size": f"{facts['parameters']:,} numbers, {size(facts['bytes'])}",
        **({"training": ", ".join(training)} if training else {}),
        "written by": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()) or "unknown",
    }
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _norms(facts: dict[str, Any], count: int) -> Any:
    from veneer.cli.console import shown, table_of

    norms = sorted(facts["norms"].items(), key=lambda item: item[1], reverse=True)
    table = table_of("layer", ">‖ΔW‖", "")
    for path, norm in shown(table, norms, count, "layers with smaller changes"):
        table.add_row(path, f"{norm:.4g}", "█" * max(1, round(24 * norm / norms[0][1])) if norm > 0 else "")
    return table
