"""The browser of the tests of the page."""

from tests.support.browser import browser  # noqa: F401 - a fixture is used by its name
