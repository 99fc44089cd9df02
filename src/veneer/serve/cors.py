"""Cross-origin requests of browsers (CORS), from the origins that ``--cors`` names.

A browser asks before it sends JSON or a key to another origin (a preflight, without a key), and
lets a page read an answer only if the answer names the page's origin. Credentials of the browser
itself (cookies, certificates) are never allowed: a key is a header that the page sets.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from starlette.responses import Response

from veneer.serve.refusal import Refusal

ANY = "*"
METHODS = "GET, HEAD, POST, PUT, DELETE"
#: headers of an answer that a page may read, besides those that it always may
EXPOSED = "x-request-id, retry-after"
#: seconds for which a browser may remember the answer to a preflight
SECONDS = 600
#: names of headers, as a preflight lists them: clients send some of their own (x-stainless-…)
_NAMES = re.compile(r"[A-Za-z0-9-]{1,64}(?: *, *[A-Za-z0-9-]{1,64}){0,63}")


def origin_headers(origins: Collection[str], origin: str | None) -> list[tuple[bytes, bytes]]:
    """The headers of an answer to a request from ``origin``. Without ``origins`` there are none."""
    if not origins:
        return []
    if ANY in origins:
        allowed, headers = ANY, []
    else:
        allowed, headers = origin if origin in origins else None, [(b"vary", b"Origin")]
    if allowed is not None:
        headers.append((b"access-control-allow-origin", allowed.encode()))
        headers.append((b"access-control-expose-headers", EXPOSED.encode()))
    return headers


def is_preflight(method: str, headers: Any) -> bool:
    return (
        method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers
    )


def preflight_response(origins: Collection[str], headers: Any) -> Response:
    """The answer to a preflight, without the headers of ``origin_headers``. ``Refusal``: the origin
    is none of those that are allowed."""
    origin = headers["origin"]
    if ANY not in origins and origin not in origins:
        problem, expected = f"the origin {origin[:200]!r}", "one that the server allows"
        raise Refusal(403, problem, expected, "start the server with --cors ORIGIN", code="origin")
    names = headers.get("access-control-request-headers", "")
    allowed = {
        "access-control-allow-methods": METHODS,
        "access-control-max-age": str(SECONDS),
        "access-control-allow-headers": (
            names if _NAMES.fullmatch(names) else "authorization, content-type"
        ),
    }
    return Response(status_code=204, headers=allowed)
