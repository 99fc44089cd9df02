"""Fine-tuning on a base in 4 bits beside one in bfloat16, on the demo's task (spelling → phonemes, SmolLM2-135M), and
what a merge of the adapter keeps of it.

Two runs of `make demo`'s training, which differ in `quantize` alone. Then all is loaded anew from the folders that they
left and judged on the demo's 200 held-out words, by the phoneme error rate of greedy answers and by the loss of the
completions (nats a token):

    bf16                adapter and base in bfloat16
    nf4                 adapter on the base in nf4, as it was trained
    nf4 in 16 bits      the same adapter, merged into the 16-bit files (`veneer merge`)
    nf4 in nf4          the same adapter, merged into the base in nf4 (`handle.merge()`), by each rounding

Without merging there is one more: the nf4 adapter on the base in bfloat16.

    python benchmarks/quantized.py                    240 steps each, as the demo (half an hour on one quiet core)
    python benchmarks/quantized.py --kind int8
    python benchmarks/quantized.py --steps 4 --words 8 --folder /tmp/q --out /tmp/q      does it run

A training run that was stopped goes on where it was; one that is finished is judged as it is (--anew: not). Predicted:
nf4 within 0.02 of bf16's error rate (Dettmers et al. 2023, arXiv:2305.14314, find no difference at all), the merge into
16 bits too, and the merge into nf4 worse, as its grid holds little of so small a change.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub
sys.path.append(str(Path(__file__).resolve().parent.parent))  # demo/

from demo import __main__ as demo
from demo import pronounce
from rich.console import Console
from rich.table import Table

import veneer
from report import write
from veneer import models
from veneer.tools.merge_checkpoint import merge_checkpoint
from veneer.train import checkpoint
from veneer.train.data import Columns, read
from veneer.train.evaluate import evaluate
from veneer.train.run import fit
from veneer.train.tokens import tokenise

console = Console()
ROUNDINGS = ("nearest", "auto")


def trained(base: str, kind: str | None, out: Path, steps: int, data: dict[str, Path], anew: bool) -> dict[str, Any]:
    """The adapter of the demo's run on the base in this kind, and what the run said of itself."""
    output = out / (kind or "bf16")
    config = demo.settings(
        output, base=base, data=str(data["train"]), eval_data=str(data["watched"]), max_steps=steps,
        quantize=kind, precision="bf16", save_every=30,
    )  # fmt: skip
    if anew:
        shutil.rmtree(output, ignore_errors=True)
    done = checkpoint.read_json(output / checkpoint.RUN)
    if done is None or done["status"] != "finished" or done["config"] != config.content():
        result = fit(config, console=Console(stderr=True))
        if result.interrupted:
            raise SystemExit(130)
    metrics = checkpoint.read_json(output / checkpoint.METRICS)
    return {"adapter": output / checkpoint.ADAPTER, "steps": metrics["steps"], "seconds": round(metrics["seconds"])}


def judged(loaded: models.Base, words: list[pronounce.Word], rows: Path) -> dict[str, float]:
    """Phoneme error rate, share of words exact, and loss of the completions (nats a token)."""
    answers = demo.say(loaded, [word.prompt for word in words])
    score = pronounce.score(answers, words)
    examples = tokenise(read(str(rows), Columns()), loaded.tokenizer, max_length=256)
    loss = evaluate(loaded.model, examples, batch_size=50).loss
    return {"error_rate": round(score.error_rate, 4), "exact": round(score.exact, 4), "loss": round(loss, 4)}


def on_base(base: str, kind: str | None) -> models.Base:
    return models.load_base(base, precision="bf16", attention="eager", quantize=kind)  # type: ignore[arg-type]


def measured(base: str, kind: str, runs: dict[str, Any], out: Path, words: Any, rows: Path) -> dict[str, Any]:
    """Each row of the table."""
    found: dict[str, Any] = {}

    def judge(name: str, loaded: models.Base, **more: Any) -> None:
        found[name] = {**judged(loaded, words, rows), **more}
        console.print(f"{name}: {found[name]}", highlight=False)

    own = runs[kind]["adapter"]
    for name, adapter, on in (
        ("bf16", runs["bf16"]["adapter"], None),
        (f"{kind} on bf16", own, None),
        (kind, own, kind),
    ):
        loaded = on_base(base, on)
        veneer.load(loaded.model, adapter)
        judge(name, loaded)
    merged = merge_checkpoint(
        models.folder_of(base), [(own, 1.0)], out / "merged", dtype=models.pick_dtype("bf16"), overwrite=True
    )
    kept = sum(layer.retention for layer in merged.report.layers) / len(merged.report.layers)
    judge(f"{kind} in 16 bits", on_base(str(out / "merged"), None), retention=round(kept, 4))
    for rounding in ROUNDINGS:
        loaded = on_base(base, kind)
        handle = veneer.load(loaded.model, own)
        report = handle.merge(keep=False, rounding=rounding)
        kept = sum(layer.retention for layer in report.layers) / len(report.layers)
        judge(f"{kind} in {kind}, {rounding}", loaded, retention=round(kept, 4))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=demo.BASE)
    parser.add_argument("--kind", default="nf4", choices=("nf4", "fp4", "int8"))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--words", type=int, default=demo.JUDGED)
    parser.add_argument("--folder", type=Path, default=demo.OUT / "quantized", help="where the runs are kept")
    parser.add_argument("--train", choices=("bf16", "quantized"), help="train this alone, and judge nothing")
    parser.add_argument("--anew", action="store_true", help="do not take up an earlier run")
    parser.add_argument("--out", type=Path, help="folder for quantized.json (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    train, held = pronounce.words()
    words = held[500 : 500 + options.words]
    parts = {"train": train, "watched": held[:150], "held-out": words}
    data = {name: pronounce.write_rows(options.folder / f"{name}.jsonl", part) for name, part in parts.items()}
    wanted = {"bf16": (None,), "quantized": (options.kind,), None: (None, options.kind)}[options.train]
    runs = {
        kind or "bf16": trained(options.base, kind, options.folder, options.steps, data, options.anew)
        for kind in wanted
    }
    if options.train:
        return 0
    rows = measured(options.base, options.kind, runs, options.folder, words, data["held-out"])
    table = Table(title=f"English pronunciations, {len(words)} held-out words, {options.steps} steps")
    for name in ("model", "phoneme error rate", "words exact", "loss", "change kept"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, row in rows.items():
        kept = f"{row['retention']:.1%}" if "retention" in row else ""
        table.add_row(name, f"{row['error_rate']:.4f}", f"{row['exact']:.1%}", f"{row['loss']:.4f}", kept)
    console.print(table)
    difference = round(rows[options.kind]["error_rate"] - rows["bf16"]["error_rate"], 4)
    console.print(
        f"error rate: bf16 {rows['bf16']['error_rate']:.4f}, {options.kind} {rows[options.kind]['error_rate']:.4f}, "
        f"difference {difference:+.4f} (at most 0.02 is wanted)",
        highlight=False,
    )
    setting = {"kind": options.kind, "steps": options.steps, "words": len(words), "base": options.base}
    seconds = {name: run["seconds"] for name, run in runs.items()}
    case = {"setting": setting, "seconds": seconds, "difference": difference, "rows": rows}
    write("quantized" if options.kind == "nf4" else f"quantized_{options.kind}", {"cases": [case]}, options.out)
    return 0 if difference <= 0.02 else 1


if __name__ == "__main__":
    sys.exit(main())
