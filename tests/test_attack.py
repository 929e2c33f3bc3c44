"""The soak of hostile clients: its quick part against the real program, and its own pieces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tools.attack import kinds, report
from tools.attack.__main__ import QUICK, arguments
from tools.attack.pickles import SAFE

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 6.0  # for answers that are not to be late: machines of CI are slow


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_no_client_ends_or_blocks_the_server() -> None:
    """Hostile adapters, broken connections, kills and freezes of the exchange, and SIGTERM while it is frozen."""
    command = [sys.executable, "-m", "tools.attack", "--quick", "--limit-s", str(LIMIT_S)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=450)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_every_kind_can_be_written(tmp_path: Path) -> None:
    good, hostile = tmp_path / kinds.GOOD, tmp_path / "hostile"
    good.mkdir()
    hostile.mkdir()
    (good / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    save_file({"a": np.ones((2, 2), np.float32)}, good / SAFE)
    for number, kind in enumerate(kinds.CONTENTS | kinds.files.KINDS):
        kinds.write(hostile / str(number), kind, number)
        assert (hostile / str(number)).is_dir()


def test_quick_part_has_every_kind() -> None:
    planned = {kind for kind, _ in kinds.plan(QUICK["adapters"], 1)}
    assert planned == {kind for kind, _ in kinds.plan(1000, 2)}
    assert len(planned) >= 20


def test_quick_is_a_default_that_flags_change() -> None:
    args = arguments(["--quick", "--kills", "0", "--only", "faults"])
    assert (args.kills, args.freezes, args.only) == (0, QUICK["freezes"], ["faults"])


def test_what_is_left_over_is_named() -> None:
    before = {"descriptors": {"front": 10}, "threads": {}, "processes": {"all": 3}}
    assert not report.left_over(before, before)
    after = before | {"descriptors": {"front": 99}}
    assert report.left_over(before, after) == ["descriptors of front: 10 before, 99 after"]


def test_failed_checks_show_their_cases() -> None:
    checks = [report.check("streams that ended", ["base: closed"]), report.check("others", [])]
    shown = report.show(checks)
    assert "FAILED  streams that ended" in shown and "base: closed" in shown
