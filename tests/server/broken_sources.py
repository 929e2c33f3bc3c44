"""Sources that fail: a hub, an S3 server and a disk, and the exchange that meets them.

`fragile_exchange` runs in the exchange's process. Its limits are short, it may not read what its user may not read
(root may read everything), and its disk is full while a certain file exists.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.adapters import hub_client
from engine.adapters.disk_cache import DiskCache
from engine.adapters.exchange import Exchange
from engine.adapters.hub import HubSource
from engine.adapters.registry import make_sources
from engine.adapters.s3 import S3Source
from engine.adapters.tiers import HostRegion
from engine.config import EngineConfig
from engine.ops.layout import ShardLayout
from tests.server.broken_files import FAILED, FORBIDDEN, MISFIT, NOT_FOUND, Kind
from tools.attack import hub

if TYPE_CHECKING:
    from tests.adapters.fake_s3 import FakeS3

HUB, FULL = "LORAX_TEST_HUB", "LORAX_TEST_FULL"  # address, and the file that makes the disk full
MAX_SECONDS = 1.0  # of a download
CAPABILITY_VERSION = 0x20080522
DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2  # capabilities(7)


def fragile_exchange(
    config: EngineConfig, layout: ShardLayout, region: HostRegion, **more: Any
) -> Exchange:
    """See the module and `engine.process.Parts`."""
    give_up_rights()
    fill_disk(Path(os.environ[FULL]))
    cache = Path(config.model.huggingface_hub_cache or "")
    quick: dict[str, Any] = {"attempts": 2, "backoff_s": 0.01, "ttl_s": 0.0}
    hub_client.MAX_CUTS = 0
    sources = make_sources(config)
    sources["hub"] = HubSource(
        "operator", cache, endpoint=os.environ[HUB], max_seconds=MAX_SECONDS, **quick
    )
    sources["s3"] = S3Source(
        DiskCache(cache, max_seconds=MAX_SECONDS),
        endpoint=config.adapters.s3_endpoint_url,
        read_s=1.0,
        **quick,
    )
    return Exchange(config, layout, region, sources=sources, **more)


def give_up_rights() -> None:
    """Permissions hold for this thread and those it starts, even if the user is root."""
    words = ctypes.c_uint32 * 6
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    libc, sets = ctypes.CDLL(None, use_errno=True), words()
    if libc.capget(header, sets) == 0:
        sets[0] &= ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH)  # of the effective set
        libc.capset(header, sets)


def fill_disk(flag: Path) -> None:
    """While `flag` exists, the calls that write downloads and conversions fail, as on a full disk."""
    from huggingface_hub import file_download

    from engine.sandbox import convert

    def full(before: Callable[..., Any] | None = None) -> Callable[[Any, str], None]:
        def patch(module: Any, name: str) -> None:
            call = getattr(module, name)

            def write(*given: Any, **options: Any) -> Any:
                if not flag.exists():
                    return call(*given, **options)
                if before:
                    before(*given)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            setattr(module, name, write)

        return patch

    full()(os, "posix_fallocate")
    full()(convert, "_create")
    full(lambda url, file: file.write(b"half"))(file_download, "http_get")


class World(NamedTuple):
    """What a row may break. `full` is the flag of the full disk."""

    s3: FakeS3
    full: Path


class Row(NamedTuple):
    """One failing source."""

    adapter: str
    source: str | None
    arm: Callable[[World], object]
    kind: Kind
    reason: str
    remedy: str


def nothing(world: World) -> None:
    pass


def fill(world: World) -> None:
    world.full.touch()


def s3_answers(status: int, code: str) -> Callable[[World], None]:
    def arm(world: World) -> None:
        world.s3.broken, world.s3.fault, world.s3.code = 100, status, code

    return arm


def s3_cuts(world: World) -> None:
    world.s3.broken, world.s3.fault, world.s3.where = 100, "cut", "adapter_model"


def s3_drips(world: World) -> None:
    world.s3.delay_s = 0.2


def refuses(request: BaseHTTPRequestHandler, path: str) -> None:
    hub.send(request, 403, b"{}")


def lacks(request: BaseHTTPRequestHandler, path: str) -> None:
    hub.send(request, 404, b"{}", X_Error_Code="RepoNotFound")


def sends_page(request: BaseHTTPRequestHandler, path: str) -> None:
    """A page to sign in, where the weights are asked for."""
    page = b"<html>sign in</html>" * 5000
    if hub.begin(request, path, len(page)):
        request.wfile.write(page)


OWN: dict[str, hub.Manner] = {"refuses": refuses, "lacks": lacks, "sends-page": sends_page}


class FailingHub(hub.HostileHub):
    """`hostile/WORD-N` misbehaves as WORD says; `files/NAME` is the folder NAME."""

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        word = request.path.partition("hostile/")[2].partition("/")[0].rpartition("-")[0]
        if word not in OWN:
            return super()._answer(request, body)
        OWN[word](request, request.path.split("?")[0].strip("/"))


def of_hub(word: str, kind: Kind, reason: str, remedy: str) -> Row:
    return Row(f"hostile/{word}-1", "hub", nothing, kind, reason, remedy)


def of_s3(arm: Callable[[World], object], kind: Kind, reason: str, remedy: str) -> Row:
    return Row("s3://loras/team/bad", None, arm, kind, reason, remedy)


SOURCES = {
    "hub: 403": of_hub("refuses", FORBIDDEN, "private or does not exist", "check the server's token"),
    "hub: 404": of_hub("lacks", NOT_FOUND, "no hostile/lacks-1 on the hub", "check the server's token"),
    "hub: 500": of_hub("fails", FAILED, "500", "try again"),
    "hub: busy": of_hub("busy", FAILED, "429", "try again"),
    "hub: slow": of_hub("drips", FAILED, "took too long", "try again"),
    "hub: closes in the middle": of_hub("resets", FAILED, "ended early", "try again"),
    "hub: wrong length": of_hub("lies", FAILED, "ended early", "try again"),
    "hub: redirects in circles": of_hub("circles", FAILED, "redirect", "try again"),
    "hub: not a hub": of_hub("not-json", FAILED, "the answer cannot be read", "HF_ENDPOINT"),
    "hub: a page to sign in": of_hub("sends-page", MISFIT, "a web page", "download it again"),
    "hub: disk full": Row("files/bad", "hub", fill, FAILED, "No space left", "free disk space"),
    "s3: 403": of_s3(s3_answers(403, "AccessDenied"), FORBIDDEN, "AccessDenied", "s3:GetObject"),
    "s3: 404": Row("s3://loras/none", None, nothing, NOT_FOUND, "no s3://loras/none", "s3://bucket"),
    "s3: no bucket": of_s3(s3_answers(404, "NoSuchBucket"), NOT_FOUND, "no bucket", "s3://bucket"),
    "s3: 500": of_s3(s3_answers(500, "InternalError"), FAILED, "InternalError", "try again"),
    "s3: slow": of_s3(s3_drips, FAILED, "took too long", "--adapter-load-timeout-s"),
    "s3: closes in the middle": of_s3(s3_cuts, FAILED, "s3://loras/team/bad", "check the network"),
    "s3: disk full": of_s3(fill, FAILED, "is full", "free disk space"),
    "bin, disk full": Row("pickled", None, fill, FAILED, "No space left", "free disk space"),
}  # fmt: skip
