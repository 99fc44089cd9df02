"""`veneer plan`: what a run or a service takes, from a config alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from veneer.cli.options import AsJson, merge_flag_values
from veneer.errors import ConfigError

GIB = 2**30

RunConfig = Annotated[Path | None, Argument(help="YAML file of `veneer train`; flags win over it.")]
Base = Annotated[
    str | None, Option(help="Folder, hub id, package:NAME or a config.json: no weights are read.")
]
Rank = Annotated[int | None, Option(help="Rank r of the adapter (default: 16).")]
Targets = Annotated[
    list[str] | None, Option("--targets", "--target", help="Layers to adapt (default: all-linear).")
]
Variant = Annotated[str | None, Option(help="Adapter variant (default: lora).")]
MaxLength = Annotated[
    int | None,
    Option("--max-length", "--seq", help="Tokens of a row, padding included (default: 2048)."),
]
BatchSize = Annotated[
    int | None,
    Option("--batch-size", "--batch", help="Rows in one forward pass, at most (default: 8)."),
]
GradAccum = Annotated[
    int | None, Option("--grad-accum", help="Forward passes in one step (default: 1).")
]
PlannedPrecision = Annotated[
    Literal["auto", "fp32", "bf16"] | None,
    Option("--precision", "--dtype", help="Base weights (default: bf16)."),
]
PlannedQuantize = Annotated[
    Literal["nf4", "fp4", "int8"] | None,
    Option(help="Linear layers in 4 or 8 bits (not stacks of experts)."),
]
Optimiser = Annotated[
    str | None, Option("--optimiser", "--optimizer", help="As `veneer train` takes it.")
]
Checkpointing = Annotated[
    bool | None,
    Option(
        "--activation-checkpointing/--no-activation-checkpointing", help="Recompute activations."
    ),
]
Devices = Annotated[int, Option(help="Plan for 1, 2, 4, … up to so many devices.", min=1)]
HardwareName = Annotated[
    str, Option(help="Device: l4, a10, rtx3090, rtx4090, l40s, a100, h100, h200, b200, mi300x.")
]
Strategy = Annotated[
    Literal["ddp", "fsdp", "tp"] | None,
    Option(help="How several devices share the work (default: all three)."),
]
Serve = Annotated[bool, Option("--serve", help="Plan a service instead of a run.")]
Adapters = Annotated[int, Option(help="--serve: adapters that are served.", min=1)]
Requests = Annotated[float, Option(help="--serve: requests a second.")]
PromptTokens = Annotated[int, Option(help="--serve: tokens of a prompt.", min=1)]
AnswerTokens = Annotated[int, Option(help="--serve: tokens of an answer.", min=1)]
Rows = Annotated[int, Option(help="--serve: answers that a replica writes at once.", min=1)]


def plan_command(
    config: RunConfig = None,
    base: Base = None,
    rank: Rank = None,
    targets: Targets = None,
    variant: Variant = None,
    length: MaxLength = None,
    batch: BatchSize = None,
    accumulate: GradAccum = None,
    precision: PlannedPrecision = None,
    quantize: PlannedQuantize = None,
    optimiser: Optimiser = None,
    checkpointing: Checkpointing = None,
    devices: Devices = 1,
    hardware: HardwareName = "h100",
    strategy: Strategy = None,
    serve: Serve = False,
    adapters: Adapters = 1,
    requests: Requests = 1.0,
    prompt: PromptTokens = 512,
    answer: AnswerTokens = 256,
    rows: Rows = 64,
    as_json: AsJson = False,
) -> None:
    """Predict what a run takes before anything is rented: trained parameters, memory of each
    device, operations, bytes sent and time of a step, for 1 to N devices that share its rows, and
    each strategy; or, with --serve, what a service takes.

    Only a config is read: the model is made without weights, and its step is counted.
    How far off that is, is measured in docs/plan.md.

    \b
    Examples:
      veneer plan run.yaml --hardware rtx4090
      veneer plan --base llama/config.json --seq 4096 --batch 2 --devices 8 --hardware h100
      veneer plan --base llama/config.json --quantize nf4 --hardware rtx4090 --json
      veneer plan --base llama/config.json --serve --adapters 10000 --requests 50
    """
    from veneer.train.plan.hardware import find_hardware

    device_type = find_hardware(hardware)
    flags = {
        "base": base,
        "rank": rank,
        "targets": merge_flag_values(targets),
        "variant": variant,
        "max_length": length,
        "batch_size": batch,
        "grad_accum": accumulate,
        "precision": precision,
        "quantize": quantize,
        "optimiser": optimiser,
        "activation_checkpointing": checkpointing,
    }
    settings = _settings(config, flags)
    model = _model(settings)
    if serve:
        from veneer.train.plan.serving import Load, plan_service

        load = Load(requests, prompt, answer, adapters, rows, devices, settings.quantize)
        service = plan_service(model, load, device_type)
        _print(as_json, asdict(service), _service_lines(service))
        return
    _plan_run(settings, model, strategy, devices, device_type, as_json)


def _plan_run(
    settings: Any, model: Any, strategy: str | None, devices: int, device_type: Any, as_json: bool
) -> None:
    """Print what a training run takes, for 1 to `devices` devices."""
    from veneer.train.plan.training_plan import STRATEGIES, Planner, plan_all, recommend

    run, planner = _run(settings), Planner(model)
    counts = [2**power for power in range(devices.bit_length()) if 2**power <= devices]
    counts = counts if counts[-1] == devices else [*counts, devices]
    strategies = (strategy,) if strategy else STRATEGIES
    plans, omissions = plan_all(planner, run, counts, strategies, device_type)
    advice = recommend(planner, run, counts, strategies, device_type)
    rows = [
        {**asdict(plan), "total": plan.total, "tokens_per_second_per_device": plan.speed}
        for plan in plans
    ]
    facts = {
        "trainable": planner.trainable,
        "total": planner.total,
        "plans": rows,
        "left_out": omissions,
        "recommended": advice,
    }
    tables = None if as_json else _tables(settings, planner, plans, omissions, advice)
    _print(as_json, facts, tables)


def _settings(config: Path | None, flags: dict[str, Any]) -> Any:
    """The settings of a run. Data and output may be missing: a plan does not use them."""
    from veneer.train.config import make_config, read_yaml

    fields = {} if config is None else read_yaml(config)
    fields |= {name: value for name, value in flags.items() if value is not None}
    if "base" not in fields:
        raise ConfigError("no base", "a YAML file that names one, or --base", "give one of them")
    settings = make_config(
        {"data": "", "output": "", **fields}, "the arguments" if config is None else str(config)
    )
    if settings.task != "sft":
        problem = (
            f"task {settings.task}, whose steps have other passes than one forward and one backward"
            " of each row"
        )
        raise ConfigError(
            problem, "task sft", "plan an sft run with as many rows (--base, --batch-size)"
        )
    return settings


def _model(settings: Any) -> Any:
    import torch

    import veneer
    from veneer.models.meta import countable_model
    from veneer.models.remote_code import trust_remote_code
    from veneer.train.adapter_setup import lora_config
    from veneer.variants import VARIANTS

    dtype = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}[
        settings.precision
    ]
    with trust_remote_code(settings.base if settings.trust_remote_code else None):
        model = countable_model(settings.base, dtype)
    # a variant that needs data or weights to start has the shapes of lora
    variant = settings.variant if not VARIANTS[settings.variant].needs else "lora"
    veneer.attach(model, lora_config(settings.model_copy(update={"variant": variant}), model, {}))
    return model


def _run(settings: Any) -> Any:
    from veneer.train.plan.training_plan import Run

    return Run(
        batch=settings.batch_size,
        length=settings.max_length or 2048,
        accumulate=settings.grad_accum,
        optimiser=settings.optimiser,
        checkpointing=settings.activation_checkpointing,
        offload=settings.offload_activations,
        quantize=settings.quantize,
    )


def _print(as_json: bool, facts: dict[str, Any], renderables: Any) -> None:
    """Print ``facts`` as JSON, or ``renderables``: texts and tables of rich."""
    from veneer.cli.console import echo_json, out

    if as_json:
        echo_json(facts)
        return
    for renderable in renderables:
        out.print(renderable, soft_wrap=isinstance(renderable, str))


def _tables(
    settings: Any, planner: Any, plans: Any, omissions: list[str], advice: str
) -> list[Any]:
    from veneer.cli.console import table_of

    rows = settings.batch_size * settings.grad_accum
    storage = f", {settings.quantize}" if settings.quantize else ""
    lines: list[Any] = [
        f"Base     {settings.base} ({planner.total:,} numbers{storage})",
        f"Adapter  {settings.variant}, rank {settings.rank}: {planner.trainable:,} numbers train",
        f"Step     {rows} rows of {plans[0].run.length} tokens, on all devices together\n",
    ]
    heads = (">rows × passes", ">GiB", "", ">TFLOP", ">GB sent", ">s a step", ">tokens/s each")
    plan_table = table_of("devices", "by", *heads)
    for plan in plans:
        cells = [f"{plan.run.batch} × {plan.run.accumulate}", f"{plan.total / GIB:.1f}"]
        cells += ["fits" if plan.fits else "does not", f"{plan.operations / 1e12:,.1f}"]
        cells += [f"{plan.sent / 1e9:,.2f}", f"{plan.seconds:.3g}", f"{plan.speed:,.0f}"]
        strategy = plan.strategy if plan.devices > 1 else ""
        plan_table.add_row(f"{plan.devices} × {plan.hardware}", strategy, *cells)
    names = dict.fromkeys(name for plan in plans for name in plan.memory)
    memory_table = table_of("GiB", "", *(f">{name}" for name in names))
    for plan in plans:
        strategy = plan.strategy if plan.devices > 1 else ""
        gibibytes = (f"{plan.memory.get(name, 0) / GIB:.2f}" for name in names)
        memory_table.add_row(str(plan.devices), strategy, *gibibytes)
    return [*lines, plan_table, "", memory_table, "", *omissions, f"Take     {advice}"]


def _service_lines(service: Any) -> list[str]:
    load = service.load
    devices = (
        f"{load.devices} × {service.hardware}" if load.devices > 1 else f"one {service.hardware}"
    )
    head = [
        f"Base     {service.base / GIB:.2f} GiB; an adapter {service.adapter / 2**20:.1f} MiB; keys"
        f" and values of {load.prompt + load.answer} tokens {service.row / 2**20:.1f} MiB"
    ]
    if service.rows == 0:
        return [
            *head,
            f"Take     more than {devices} for a replica: the base and one row do not fit",
        ]
    return [
        *head,
        (
            f"Replica  {devices}: {service.rows} rows at once, {service.in_memory:,} of"
            f" {load.adapters:,} adapters in memory"
        ),
        (
            f"Speed    {1e3 * service.step:.1f} ms a token of each row; {service.answered:.1f}"
            " requests/s at the most"
        ),
        (
            f"Take     {service.replicas} replicas for {load.requests:g} requests/s;"
            f" {service.hits:.0%} of them find their adapter in memory, others wait"
            f" {1e3 * service.fetch:.1f} ms or more for it"
        ),
    ]
