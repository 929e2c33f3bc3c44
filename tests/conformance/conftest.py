"""Published SDKs against a real server.

`make conformance` runs every module in an environment with its SDK, against a server whose address is in the
environment. Without it, in `make test`, only those modules run whose SDKs are dependencies of the tests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conformance.wire import Server

URL, KEY = "LORAX_CONFORMANCE_URL", "LORAX_CONFORMANCE_KEY"
IN_MAKE_TEST = ("test_openai_*.py", "test_huggingface.py")
FOLDER = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if URL in os.environ or not collection_path.match("test_*.py"):
        return None
    return not any(map(collection_path.match, IN_MAKE_TEST)) or None


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if URL in os.environ:
        yield Server(os.environ[URL], os.environ[KEY])
        return
    from tools.conformance import API_KEY, serving

    with serving() as url:
        yield Server(url, API_KEY)


@pytest.fixture
def until_cancelled(server: Server) -> Callable[[], None]:
    """Waits until the server has cancelled one more request than at the start of the test."""
    before = server.cancelled()

    def wait() -> None:
        while server.cancelled() == before:  # the test's timeout ends it
            time.sleep(0.05)

    return wait
