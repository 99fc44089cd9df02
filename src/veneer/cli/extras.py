"""Which optional part of Veneer holds a package that is not installed."""

from __future__ import annotations

import re
from importlib import metadata

#: modules that are named otherwise than the package that holds them
_PACKAGES = {"yaml": "pyyaml", "google": "protobuf"}
#: of several optional parts that hold a package, the first of these is meant: each contains those
#: before it
_ORDER = ("cli", "train", "serve", "remote")


def extra_with(module: str) -> str | None:
    """The optional part of Veneer (``pip install 'veneer[…]'``) with the package of this module, or
    None."""
    top = module.partition(".")[0]
    package = _PACKAGES.get(top, top).replace("_", "-").lower()
    extras = []
    for requirement in metadata.requires("veneer") or ():
        name, extra = (
            re.match(r"[\w.-]+", requirement),
            re.search(r"extra == ['\"]([\w-]+)['\"]", requirement),
        )
        if name and extra and name[0].replace("_", "-").lower() == package:
            extras.append(extra[1])
    ranked = sorted(
        extras, key=lambda extra: (_ORDER.index(extra) if extra in _ORDER else len(_ORDER), extra)
    )
    return next(iter(ranked), None)


def missing_package(error: ModuleNotFoundError) -> str | None:
    """What to tell a user about a package that is not installed; None where it is none of Veneer's
    optional ones."""
    extra = extra_with(error.name or "")
    if extra is None:
        return None
    package = str(error.name).partition(".")[0]
    return (
        f"Found: no Python package {package!r}. Expected: veneer[{extra}]. Do: pip install"
        f" 'veneer[{extra}]'."
    )
