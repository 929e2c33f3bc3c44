"""What a started engine says of itself."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from engine import ops
from engine.config import EngineConfig, MemoryConfig
from engine.errors import ConfigError
from engine.ops.schemas import SCHEMAS
from engine.platform import detect, device_type
from tests.engine.harness import Harness, config_of
from tests.tiny import make_model


def test_info_and_log_name_what_serves_every_op(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_model("llama", tmp_path)
    caplog.set_level(logging.INFO, "engine.build")
    harness = Harness(config_of(tmp_path))
    device = harness.engine.platform.device.type
    served = {op: backends[device] for op, backends in ops.backends().items()}
    assert harness.engine.info.backends == served and served.keys() == SCHEMAS.keys()
    (line,) = (text for text in caplog.messages if text.startswith("ops on "))
    assert device in line and all(f"{op}: {backend}" in line for op, backend in served.items())
    harness.close()


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user decides; else the GPU that torch sees."""
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        found = "cuda" if there else "cpu"
        assert device_type(EngineConfig()) == found
        assert device_type(EngineConfig(memory=MemoryConfig(device="cpu"))) == "cpu"
        on_gpu = EngineConfig(memory=MemoryConfig(device="cuda"))
        if there:
            assert device_type(on_gpu) == "cuda"
        else:
            with pytest.raises(ConfigError, match="--device cuda"):
                device_type(on_gpu)
    assert detect(EngineConfig(memory=MemoryConfig(device="cpu"))).device.type == "cpu"
