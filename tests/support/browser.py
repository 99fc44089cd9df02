"""Open and use the server's page in Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api

expect = sync_api.expect


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


# without these options, Chromium connects to hosts of Google at each start
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    if CHROMIUM is None:
        reason = (
            "no Chromium: apt-get install chromium (Debian), or put chromium or google-chrome on"
            " the PATH"
        )
        assert os.environ.get("VENEER_CHROMIUM") != "required", (
            reason
        )  # there, a skipped test must not count as passed
        pytest.skip(reason)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


def alone(
    browser: sync_api.Browser, file: Path, width: int, scheme: str
) -> tuple[sync_api.Page, list[str]]:
    """(a page that shows one file, without a network; the list of its failures: messages on the
    console, and requests of other files)."""
    failures: list[str] = []
    context: Any = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
    )  # pyright: ignore
    page = context.new_page()
    page.on("console", lambda message: failures.append(message.text))
    page.on("request", lambda request: request.url == file.as_uri() or failures.append(request.url))
    page.goto(file.as_uri())
    return page, failures


def column(page: sync_api.Page, index: int) -> sync_api.Locator:
    return page.locator(".column").nth(index)


def answer(page: sync_api.Page, index: int) -> sync_api.Locator:
    return column(page, index).locator(".text")


def send(page: sync_api.Page, prompt: str = "one two three", tokens: int = 6) -> None:
    page.get_by_label("Max tokens").fill(str(tokens))
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Send").click()


def load(page: sync_api.Page, folder: str, name: str | None = None) -> None:
    """Fill in and send the form that loads an adapter; it must be visible."""
    if name is not None:
        page.get_by_label("Name").fill(name)
    page.get_by_label("Folder").fill(folder)
    page.get_by_role("button", name="Load", exact=True).click()


def expect_states(page: sync_api.Page, *states: str) -> None:
    for index, state in enumerate(states):
        expect(column(page, index)).to_have_attribute("data-state", state)
