"""The served page in Chromium."""

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


# Chromium's own services look up hosts of Google's at each start
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    if CHROMIUM is None:
        why = (
            "no Chromium: apt-get install chromium (Debian), or put chromium or google-chrome on"
            " the PATH"
        )
        assert os.environ.get("VENEER_CHROMIUM") != "required", (
            why
        )  # where CI says so, nothing passes by being skipped
        pytest.skip(why)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


def alone(
    browser: sync_api.Browser, file: Path, width: int, scheme: str
) -> tuple[sync_api.Page, list[str]]:
    """A page of one file without a network, and what is wrong with it: what it writes to the
    console or asks for."""
    wrong: list[str] = []
    context: Any = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
    )  # pyright: ignore
    shown = context.new_page()
    shown.on("console", lambda message: wrong.append(message.text))
    shown.on("request", lambda request: request.url == file.as_uri() or wrong.append(request.url))
    shown.goto(file.as_uri())
    return shown, wrong


def column(page: sync_api.Page, index: int) -> sync_api.Locator:
    return page.locator(".column").nth(index)


def answer(page: sync_api.Page, index: int) -> sync_api.Locator:
    return column(page, index).locator(".text")


def send(page: sync_api.Page, prompt: str = "one two three", tokens: int = 6) -> None:
    page.get_by_label("Max tokens").fill(str(tokens))
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Send").click()


def load(page: sync_api.Page, folder: str, name: str | None = None) -> None:
    """Fill in the form of the shelf, which is open, and send it."""
    if name is not None:
        page.get_by_label("Name").fill(name)
    page.get_by_label("Folder").fill(folder)
    page.get_by_role("button", name="Load", exact=True).click()


def expect_states(page: sync_api.Page, *states: str) -> None:
    for index, state in enumerate(states):
        expect(column(page, index)).to_have_attribute("data-state", state)
