"""`veneer plan`: predict memory and time of a run or a service, from the base's config alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from veneer.cli.console import echo_json, out, table_of
from veneer.cli.options import AsJson, changed_flags, merge_flag_values
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
    Option(
        "--max-length",
        "--seq",
        help="Tokens of a row, padding included (default: the base's context, at most 2048).",
    ),
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
    """Predict what a run needs before hardware is rented: trained parameters, memory per device,
    and operations, sent bytes and time of a step. The prediction is for 1 to N devices that share
    the rows of a step, and for each strategy. With --serve, predict what a service needs.

    Only a config is read: the model is created without weights, and the operations of a step are
    counted. docs/plan.md compares such predictions with measurements.

    \b
    Examples:
      veneer plan run.yaml --hardware rtx4090
      veneer plan --base llama/config.json --seq 4096 --batch 2 --devices 8 --hardware h100
      veneer plan --base llama/config.json --quantize nf4 --hardware rtx4090 --json
      veneer plan --base llama/config.json --serve --adapters 10000 --requests 50
    """
    from veneer.train.plan.hardware import find_hardware

    service_options = {
        "adapters": adapters,
        "requests": requests,
        "prompt": prompt,
        "answer": answer,
        "rows": rows,
    }
    _refuse_unused_flags(serve, strategy, changed_flags(plan_command, **service_options))
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
    settings = _read_settings(config, flags)
    model = _make_model(settings)
    if serve:
        from veneer.train.plan.serving import Load, plan_service

        service_load = Load(requests, prompt, answer, adapters, rows, devices, settings.quantize)
        service_plan = plan_service(model, service_load, device_type)
        _print_plan(as_json, asdict(service_plan), _service_lines(service_plan))
        return
    _plan_run(settings, model, strategy, devices, device_type, as_json)


def _refuse_unused_flags(serve: bool, strategy: str | None, service_flags: list[str]) -> None:
    """Raise a ``ConfigError`` for a flag of a service in the plan of a run, or the reverse."""
    if service_flags and not serve:
        raise ConfigError(f"{service_flags[0]} without --serve", "both", "add --serve")
    if strategy and serve:
        raise ConfigError(
            "--strategy with --serve",
            "a run, whose devices share the work in one way or another",
            "leave --strategy out",
        )


def _plan_run(
    settings: Any, model: Any, strategy: str | None, devices: int, device_type: Any, as_json: bool
) -> None:
    """Print the memory and time of a training run, for 1, 2, 4, … and ``devices`` devices.

    Args:
        settings: the ``TrainConfig`` of the run.
        model: the base without weights, with an adapter attached.
        strategy: how the devices share the work; None plans all strategies.
        device_type: the ``Hardware`` of a device.
    """
    from veneer.train.plan.training_plan import STRATEGIES, Planner, plan_all, recommend

    run, planner = _make_run(settings, model), Planner(model)
    device_counts = [2**power for power in range(devices.bit_length()) if 2**power <= devices]
    if device_counts[-1] != devices:
        device_counts.append(devices)
    strategies = (strategy,) if strategy else STRATEGIES
    plans, omissions = plan_all(planner, run, device_counts, strategies, device_type)
    advice = recommend(planner, run, device_counts, strategies, device_type)
    plan_facts = [
        {**asdict(plan), "total": plan.total, "tokens_per_second_per_device": plan.speed}
        for plan in plans
    ]
    facts = {
        "trainable": planner.trainable,
        "total": planner.total,
        "plans": plan_facts,
        "left_out": omissions,
        "recommended": advice,
    }
    renderables = None if as_json else _run_renderables(settings, planner, plans, omissions, advice)
    _print_plan(as_json, facts, renderables)


def _read_settings(config: Path | None, flags: dict[str, Any]) -> Any:
    """The ``TrainConfig`` of a run, from a YAML file and from ``flags`` {field: value}, which take
    precedence unless they are None. Data and output may be missing, because a plan does not use
    them. ``ConfigError``: a setting is invalid, or cannot be planned."""
    from veneer.train.config import make_config, read_yaml

    fields = {} if config is None else read_yaml(config)
    fields |= {name: value for name, value in flags.items() if value is not None}
    if "base" not in fields:
        raise ConfigError("no base", "a YAML file that names one, or --base", "give one of them")
    settings = make_config(
        {"data": "", "output": "", **fields}, "the arguments" if config is None else str(config)
    )
    if settings.task != "sft":
        raise ConfigError(
            f"task {settings.task}, whose steps have other passes than one forward and one backward"
            " of each row",
            "task sft",
            "plan an sft run with as many rows (--base, --batch-size)",
        )
    unplanned_fields = ("adapter", "add_tokens", "trainable_tokens")
    if names := [name for name in unplanned_fields if getattr(settings, name)]:
        raise ConfigError(
            f"{', '.join(names)}, for which a plan would read an adapter or a tokenizer",
            "a run that starts a new adapter of layers",
            "run `veneer train --dry-run`",
        )
    return settings


def _make_model(settings: Any) -> Any:
    """The base on the meta device (shapes without values), with an adapter attached."""
    import torch

    import veneer
    from veneer.models.meta import countable_model
    from veneer.models.remote_code import trust_remote_code
    from veneer.train.adapter_setup import lora_config
    from veneer.variants import VARIANTS

    dtype = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}[
        settings.precision
    ]
    with trust_remote_code(settings.base, settings.trust_remote_code):
        model = countable_model(settings.base, dtype)
    # A variant that initialises its parameters from data or weights has the same shapes as lora, so
    # attach lora, which needs neither.
    variant = settings.variant if not VARIANTS[settings.variant].needs else "lora"
    veneer.attach(model, lora_config(settings.model_copy(update={"variant": variant}), model, {}))
    return model


def _make_run(settings: Any, model: Any) -> Any:
    """The run to plan, as `Planner` takes it. ``ConfigError``: its rows are longer than the context
    of the base."""
    from veneer.models.load import context_length_of
    from veneer.train.plan.training_plan import Run
    from veneer.train.prepare import check_length

    return Run(
        batch=settings.batch_size,
        length=check_length(settings.max_length, context_length_of(model.config), settings.base),
        accumulate=settings.grad_accum,
        optimiser=settings.optimiser,
        checkpointing=settings.activation_checkpointing,
        offload=settings.offload_activations,
        quantize=settings.quantize,
    )


def _print_plan(as_json: bool, facts: dict[str, Any], renderables: Any) -> None:
    """Print ``facts`` as JSON if ``as_json``, else ``renderables``, a sequence of texts and rich
    tables."""
    if as_json:
        echo_json(facts)
        return
    for renderable in renderables:
        out.print(renderable, soft_wrap=isinstance(renderable, str))


def _run_renderables(
    settings: Any, planner: Any, plans: Any, omissions: list[str], advice: str
) -> list[Any]:
    """The printed form of the plans of a run: texts and rich tables.

    ``plans``: a ``RunPlan`` for each number of devices and strategy; ``omissions``: sentences about
    combinations that cannot be planned; ``advice``: which plan to choose."""
    step_rows = settings.batch_size * settings.grad_accum
    storage_note = f", {settings.quantize}" if settings.quantize else ""
    header_lines: list[Any] = [
        f"Base     {settings.base} ({planner.total:,} numbers{storage_note})",
        f"Adapter  {settings.variant}, rank {settings.rank}: {planner.trainable:,} numbers train",
        f"Step     {step_rows} rows of {plans[0].run.length} tokens, on all devices together\n",
    ]
    headings = (">rows × passes", ">GiB", "", ">TFLOP", ">GB sent", ">s a step", ">tokens/s each")
    plan_table = table_of("devices", "by", *headings)
    for plan in plans:
        cells = (
            f"{plan.run.batch} × {plan.run.accumulate}",
            f"{plan.total / GIB:.1f}",
            "fits" if plan.fits else "does not",
            f"{plan.operations / 1e12:,.1f}",
            f"{plan.sent / 1e9:,.2f}",
            f"{plan.seconds:.3g}",
            f"{plan.speed:,.0f}",
        )
        strategy = plan.strategy if plan.devices > 1 else ""
        plan_table.add_row(f"{plan.devices} × {plan.hardware}", strategy, *cells)
    memory_uses = dict.fromkeys(use for plan in plans for use in plan.memory)
    memory_table = table_of("GiB", "", *(f">{use}" for use in memory_uses))
    for plan in plans:
        strategy = plan.strategy if plan.devices > 1 else ""
        gibibytes = (f"{plan.memory.get(use, 0) / GIB:.2f}" for use in memory_uses)
        memory_table.add_row(str(plan.devices), strategy, *gibibytes)
    return [*header_lines, plan_table, "", memory_table, "", *omissions, f"Take     {advice}"]


def _service_lines(plan: Any) -> list[str]:
    """The printed form of the plan of a service, line by line."""
    service_load = plan.load
    devices_text = (
        f"{service_load.devices} × {plan.hardware}"
        if service_load.devices > 1
        else f"one {plan.hardware}"
    )
    base_lines = [
        f"Base     {plan.base / GIB:.2f} GiB; an adapter {plan.adapter / 2**20:.1f} MiB; keys"
        f" and values of {service_load.prompt + service_load.answer} tokens"
        f" {plan.row / 2**20:.1f} MiB"
    ]
    if plan.rows == 0:
        return [
            *base_lines,
            f"Take     more than {devices_text} for a replica: the base and one row do not fit",
        ]
    return [
        *base_lines,
        (
            f"Replica  {devices_text}: {plan.rows} rows at once, {plan.in_memory:,} of"
            f" {service_load.adapters:,} adapters in memory"
        ),
        (
            f"Speed    {1e3 * plan.step:.1f} ms a token of each row; {plan.answered:.1f}"
            " requests/s at the most"
        ),
        (
            f"Take     {plan.replicas} replicas for {service_load.requests:g} requests/s;"
            f" {plan.hits:.0%} of them find their adapter in memory, others wait"
            f" {1e3 * plan.fetch:.1f} ms or more for it"
        ),
    ]
