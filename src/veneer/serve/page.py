"""The web page at ``/``, with its files in ``web/``.

All files except the page itself are served under ``/web/<digest>/``. The digest is the hash of all
files together and changes with any of them, so browsers may cache the files for ever. The page
contains the digest in its links. Browsers ask for the page again at each visit, so that they see a
new digest. Loading the page needs no API key, but the requests that it sends to the API do.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response

WEB_FOLDER = Path(__file__).parent / "web"
MEDIA_TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}

# The browser runs only scripts that come from this server. Trusted types keep these scripts from
# writing a text, such as a model's output, into the page as HTML.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def digest(file_contents: dict[str, bytes]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all files, with their names."""
    entries = [
        f"{name}\0{len(content)}\0".encode() + content
        for name, content in sorted(file_contents.items())
    ]
    return hashlib.sha256(b"".join(entries)).hexdigest()[:16]


# The files are read once, so that a running server never mixes two versions of them, even if they
# are updated on disk.
FILE_CONTENTS = {
    file.name: file.read_bytes()
    for file in sorted(WEB_FOLDER.iterdir())
    if file.suffix in MEDIA_TYPES
}
PAGE_TEMPLATE = (WEB_FOLDER / "index.html").read_bytes()
DIGEST = digest({**FILE_CONTENTS, "index.html": PAGE_TEMPLATE})
PAGE_HTML = PAGE_TEMPLATE.replace(b"web/@/", f"web/{DIGEST}/".encode())

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
def index(request: Request) -> Response:
    """The page; status 304 without a body if the client's ``If-None-Match`` names this version."""
    headers = {**HEADERS, "Cache-Control": "no-cache", "ETag": f'"{DIGEST}"'}
    client_tags = [
        tag.strip().removeprefix("W/")
        for tag in request.headers.get("If-None-Match", "").split(",")
    ]
    if headers["ETag"] in client_tags or "*" in client_tags:
        return Response(status_code=304, headers=headers)
    return Response(PAGE_HTML, media_type="text/html; charset=utf-8", headers=headers)


@router.api_route("/web/{version}/{name}", methods=["GET", "HEAD"])
def file(version: str, name: str) -> Response:
    """A file that the page loads. Clients may cache it for ever, since its URL contains the digest
    of all files (``version``). Status 404: the server has no such file, or another version."""
    if version != DIGEST or name not in FILE_CONTENTS:
        return Response("Not found", 404, media_type="text/plain; charset=utf-8", headers=HEADERS)
    headers = {**HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}
    return Response(FILE_CONTENTS[name], media_type=MEDIA_TYPES[Path(name).suffix], headers=headers)
