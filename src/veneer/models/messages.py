"""Silence transformers while it loads, and explain its errors."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path

from veneer.errors import ConfigError, first_line

log = logging.getLogger("veneer.models")


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """A block in which transformers reads the base that the user calls ``name``. Progress bars and
    messages of transformers are suppressed, and its exceptions become readable errors
    (``explain_error``)."""
    with quiet():
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            raise explain_error(name, error) from error


def explain_error(name: str, error: Exception) -> Exception:
    """A ``ConfigError`` with a readable text for an exception that transformers raised while it
    read the base ``name``. Errors of the file system (no space, no permission) are returned
    unchanged, and so are exceptions of unknown kinds if the base is a local path or a package."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EDQUOT):
        return error
    if needs_remote_code(error):
        return ConfigError(
            f"{name} cannot be loaded without running code beside it, or that it names (auto_map)",
            "a class that transformers has; Veneer runs nobody else's code",
            "use another; if it is a base, and you have read that code and trust it, pass"
            " --trust-remote-code",
        )
    if not Path(name).expanduser().exists() and not name.startswith("package:"):
        return ConfigError(
            f"no folder {name} here, and the hub gives no such model ({first_line(error)})",
            "a model folder, a .gguf file, or the id of a model on the Hugging Face hub that can be"
            " reached from here",
            "check the spelling and the network; for a private model log in with `hf auth login`",
        )
    if (
        isinstance(error, (OSError, ValueError, KeyError, RecursionError))
        or type(error).__name__ == "SafetensorError"
    ):
        return ConfigError(
            f"the model in {name} cannot be loaded ({first_line(error)})",
            "a complete causal language model that this transformers version knows",
            "check that the files are complete, or upgrade transformers",
        )
    return error


def needs_remote_code(error: Exception) -> bool:
    """Whether an error of transformers says that a model needs Python code from its folder, which
    transformers runs only with ``trust_remote_code``."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block in which transformers shows no progress bars and logs only errors, and the hub client
    logs no retries. The earlier settings are restored at its end."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_level = transformers_logging.get_verbosity()
    shows_bars = transformers_logging.is_progress_bar_enabled()
    hub_level = hub_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(hub_level)
        transformers_logging.set_verbosity(transformers_level)
        if shows_bars:
            transformers_logging.enable_progress_bar()
