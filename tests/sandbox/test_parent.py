"""A child is confined, watched, and leaves nothing behind whatever it does."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.sandbox import CannotRun, Crashed, LimitReached, Limits, parent, run

LIMITS = Limits(cpu_s=20, wall_s=60.0, memory_bytes=256 << 20, file_bytes=4 << 20)


def do(what: str, limits: Limits = LIMITS, **given: Any) -> dict[str, Any]:
    return run("tests.sandbox.tasks", {}, {"what": what, **given}, limits)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No descriptor, no child, not even a dead one, no thread, and the turn is free."""
    before = set(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    yield
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert threading.active_count() == threads
    assert parent._TURNS.acquire(blocking=False)
    parent._TURNS.release()


def test_answer() -> None:
    assert do("echo", a=[1, None], b="é") == {"a": [1, None], "b": "é"}
    assert do("length", text="é" * 1_000_000) == {"length": 1_000_000}, "a call may be long"


@pytest.mark.parametrize("high", [False, True])
def test_confinement(high: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    with (tmp_path / "file").open("w+") as file, (tmp_path / "other").open("w") as other:
        os.set_inheritable(other.fileno(), True)
        # a busy server's descriptors have numbers above the child's own limit
        fd = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 300 if high else 0)
        try:
            seen = run("tests.sandbox.tasks", {"target": fd}, {"what": "state"}, LIMITS)
        finally:
            os.close(fd)
    # stdin, two pipes, the file; what the child was called with is closed
    names = [name for name in seen["open"] if not name.startswith("pipe:")]
    assert names == ["/dev/null", str(tmp_path / "file")]
    assert "HF_TOKEN" not in seen["environment"] and "PYTHONPATH" not in seen["environment"]
    assert seen["no_new_privs"] == "1" and seen["session"] and seen["nice"] >= 10
    limits = {name: soft for name, (soft, _) in seen["limits"].items()}
    assert limits["CORE"] == 0 and limits["FSIZE"] == LIMITS.file_bytes
    assert 0 < limits["CPU"] <= LIMITS.cpu_s + 60
    assert LIMITS.memory_bytes < limits["AS"] < 8 << 30
    assert limits["NOFILE"] <= 64 and not seen["torch"]


@pytest.mark.parametrize("what", ["spin", "hash_for_ever"])
def test_processor_time(what: str) -> None:
    with pytest.raises(LimitReached, match="1 s of processor time") as caught:
        do(what, Limits(cpu_s=1, wall_s=100.0, memory_bytes=64 << 20))
    assert caught.value.limit == "cpu"


def test_wall_time() -> None:
    with pytest.raises(LimitReached) as caught:
        do("sleep", Limits(cpu_s=5, wall_s=0.5, memory_bytes=64 << 20))
    assert caught.value.limit == "wall"


@pytest.mark.parametrize("what", ["allocate", "swallow"])
def test_memory(what: str) -> None:
    with pytest.raises(LimitReached, match="256 MiB") as caught:
        do(what)
    assert caught.value.limit == "memory"


def test_resident_memory_is_watched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the address space is not limited."""
    monkeypatch.setattr(parent._Child, "_resident", lambda self: 1 << 40)
    with pytest.raises(LimitReached) as caught:
        do("sleep")
    assert caught.value.limit == "memory"


def test_size_of_files(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        answer = run("tests.sandbox.tasks", {"target": file.fileno()}, {"what": "fill"}, LIMITS)
    assert answer == {"failed": "File too large"}
    assert (tmp_path / "file").stat().st_size == LIMITS.file_bytes


def test_what_it_says_is_bounded() -> None:
    with pytest.raises(Crashed, match="answer has more"):
        do("flood", fd=1)
    assert do("flood", fd=2) == {}, "what it complains of does not matter"


@pytest.mark.parametrize(
    ("what", "given", "words"),
    [
        ("die", {"number": signal.SIGSEGV}, "SIGSEGV"),
        ("fail", {}, "no such luck"),
        ("nonsense", {}, "cannot be read"),
        ("exit_at_once", {}, "exit code 3"),
    ],
)
def test_crashes(what: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(Crashed, match=words):
        do(what, **given)


def test_failures_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed by another (the system, out of memory), or not started: not the task's fault."""
    with pytest.raises(CannotRun, match="killed"):
        do("die", number=signal.SIGKILL)
    with pytest.raises(CannotRun, match="No module named 'tests.sandbox.none'"):
        run("tests.sandbox.none", {}, {}, LIMITS)
    with monkeypatch.context() as patch:
        patch.setattr(parent, "START_S", 0.0)
        patch.setattr(parent._Child, "_ready", lambda self: None)
        with pytest.raises(CannotRun, match="did not start"):
            do("echo")
    monkeypatch.setattr(sys, "executable", "/none")
    with pytest.raises(CannotRun, match="cannot start"):
        do("echo")


def test_what_it_started_ends_with_it() -> None:
    pid = do("leave_a_child")["pid"]
    deadline = time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)


class Stop(Exception):
    pass


@pytest.mark.parametrize("waiting", [True, False])
def test_pause_interrupts(waiting: bool) -> None:
    """While it waits for its turn, and while it runs."""
    turns = 0
    while waiting and parent._TURNS.acquire(blocking=False):
        turns += 1
    calls = 0

    def pause() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Stop

    try:
        with pytest.raises(Stop):
            run("tests.sandbox.tasks", {}, {"what": "sleep"}, LIMITS, pause)
    finally:
        for _ in range(turns):
            parent._TURNS.release()


def test_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a turn counts as nothing: three of them are done within a limit that is one's."""
    monkeypatch.setattr(parent, "_TURNS", threading.BoundedSemaphore(1))
    started: list[int] = []
    start = parent._start

    def counted(*given: Any) -> Any:
        child = start(*given)
        started.append(child._process.pid)
        assert sum(map(alive, started)) <= 1
        return child

    monkeypatch.setattr(parent, "_start", counted)
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(do("echo", n=n))) for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer["n"] for answer in answers) == [0, 1, 2] and len(started) == 3


def test_ends_with_its_parent() -> None:
    """Also with one that is killed."""
    program = (
        "from engine.sandbox import Limits, parent, run\n"
        "start = parent._start\n"
        "def told(*given):\n"
        "    child = start(*given)\n"
        "    print(child._process.pid, flush=True)\n"
        "    return child\n"
        "parent._start = told\n"
        "run('tests.sandbox.tasks', {}, {'what': 'sleep'}, Limits(5, 100.0, 1 << 28))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=Path.cwd(), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert alive(pid)
        process.kill()
    deadline = time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)
