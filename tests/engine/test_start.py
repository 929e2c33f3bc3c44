"""What a started engine says of itself."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from engine import ops
from engine.ops.schemas import SCHEMAS
from tests.engine.harness import Harness, config_of
from tests.tiny import make_model


def test_info_and_log_name_what_serves_every_op(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_model("llama", tmp_path)
    caplog.set_level(logging.INFO, "engine.engine")
    harness = Harness(config_of(tmp_path))
    device = harness.engine.platform.device.type
    served = {op: backends[device] for op, backends in ops.backends().items()}
    assert harness.engine.info.backends == served and served.keys() == SCHEMAS.keys()
    (line,) = (text for text in caplog.messages if text.startswith("ops on "))
    assert device in line and all(f"{op}: {backend}" in line for op, backend in served.items())
    harness.close()
