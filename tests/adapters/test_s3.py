"""Adapters in S3, against a real S3 API server over HTTP."""

from __future__ import annotations

import base64
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from engine.adapters.disk_cache import FOLDER, DiskCache
from engine.adapters.exchange import Exchange
from engine.adapters.ref import AdapterRef
from engine.adapters.s3 import S3Source
from engine.adapters.tiers import HostRegion
from engine.config import AdapterConfig, EngineConfig, ModelConfig
from engine.errors import (
    AdapterError,
    AdapterForbidden,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterTooLarge,
)
from tests.lora import tiny

if TYPE_CHECKING:
    from tests.adapters.fake_s3 import FakeS3

LAYOUT = tiny.llama_layout("bfloat16")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


Make = Callable[..., S3Source]


@pytest.fixture
def make(s3: FakeS3, tmp_path: Path) -> Make:
    def source(budget: int = 0, seconds: float = 30.0, **given: object) -> S3Source:
        cache = DiskCache(tmp_path, budget, seconds)
        settings: dict[str, object] = {"endpoint": s3.url, "backoff_s": 0.01, "attempts": 2}
        return S3Source(cache, **{**settings, **given})  # type: ignore[arg-type]

    return source


def load(source: S3Source, name: str = "loras/team/a") -> bytes:
    """The weights of an adapter."""
    version = source.resolve(AdapterRef.parse(name), None)
    with source.fetch(version, None, lambda done, total: None) as files:
        return files.weights.read()


def residue(folder: Path) -> list[str]:
    """Temporaries in the cache."""
    return [path.name for path in (folder / FOLDER).glob("*.tmp")]


async def test_equals_the_folder(s3: FakeS3, saved: Path, tmp_path: Path) -> None:
    """The whole exchange, by prefix and by source name."""
    config = EngineConfig(
        model=ModelConfig(model_id="org/base", huggingface_hub_cache=str(tmp_path)),
        adapters=AdapterConfig(s3_endpoint_url=s3.url, adapter_root=(str(saved),)),
    )
    region = HostRegion.create(1 << 20)
    exchange = Exchange(config, LAYOUT, region)
    by_prefix = await exchange.acquire(AdapterRef.parse("s3://loras/team/a/"))
    by_name = await exchange.acquire(AdapterRef.parse("loras/team/a", "S3"))
    local = await exchange.acquire(AdapterRef.parse("a", "local"))
    assert by_prefix.image.digest == by_name.image.digest == local.image.digest
    assert by_prefix.image.source == "s3" and s3.downloads == 1
    with pytest.raises(AdapterNotFound, match="there is no s3://loras/team/none"):
        await exchange.acquire(AdapterRef.parse("s3://loras/team/none"))
    for lease in (by_prefix, by_name, local):
        lease.release()
    await exchange.close()
    region.close()


@pytest.mark.parametrize("part_bytes", [100, 1 << 20])
def test_the_exact_folder(make: Make, saved: Path, part_bytes: int) -> None:
    """`a` is not `a-b`; in many parts and in one."""
    source = make(part_bytes=part_bytes)
    for key, name in (("a", "a"), ("a-b", "b")):
        assert load(source, f"loras/team/{key}") == (saved / name / WEIGHTS).read_bytes()
    for name in ("loras/team/a-", "loras/tea", "none-such/team/a", "x!/a", "arn:aws:s3:::x/a"):
        with pytest.raises(AdapterNotFound) as caught:
            source.resolve(AdapterRef((name,)), None)
        assert caught.value.field == "adapter_id"


def test_a_folder_without_an_adapter(s3: FakeS3, make: Make) -> None:
    s3.put("empty/README.md", b"text")
    with pytest.raises(AdapterIncompatible, match=f"has no {CONFIG}"):
        load(make(), "loras/empty")


def test_revisions(s3: FakeS3, make: Make, saved: Path) -> None:
    """A replaced adapter is a new version; `@` takes the digest of the current one only."""
    source = make()
    old = source.resolve(AdapterRef.parse("loras/team/a"), None)
    pinned = AdapterRef.parse(f"loras/team/a@{old.revision[:12]}")
    assert source.resolve(pinned, None) == old
    s3.put_folder("team/a", saved / "c")
    assert source.resolve(AdapterRef.parse("loras/team/a"), None).revision != old.revision
    with pytest.raises(AdapterNotFound, match="has no revision"):
        source.resolve(pinned, None)
    assert load(source) == (saved / "c" / WEIGHTS).read_bytes()
    s3.put_folder("team/a@1", saved / "d")
    assert load(source, "loras/team/a@1") == (saved / "d" / WEIGHTS).read_bytes()


def test_replaced_between_resolve_and_fetch(s3: FakeS3, make: Make, saved: Path) -> None:
    source = make()
    version = source.resolve(AdapterRef.parse("loras/team/a"), None)
    s3.put_folder("team/a", saved / "c")
    with pytest.raises(AdapterLoadFailed, match="changed during loading"):
        source.fetch(version, None, lambda done, total: None)


def test_replaced_during_the_download(s3: FakeS3, make: Make, saved: Path, tmp_path: Path) -> None:
    """If-Match: the parts of two versions never meet in one file."""
    source = make(part_bytes=200)
    version = source.resolve(AdapterRef.parse("loras/team/a"), None)

    def replace(done: int, total: int) -> None:
        s3.put_folder("team/a", saved / "c")

    with pytest.raises(AdapterLoadFailed, match="changed during loading"):
        source.fetch(version, None, replace)
    assert residue(tmp_path) == []
    assert load(source) == (saved / "c" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (403, "AccessDenied", AdapterForbidden, "AccessDenied"),
        (400, "ExpiredToken", AdapterForbidden, "ExpiredToken"),
        (404, "NoSuchKey", AdapterNotFound, "there is no"),
        (503, "SlowDown", AdapterLoadFailed, "SlowDown"),
        (500, "InternalError", AdapterLoadFailed, "InternalError"),
        ("cut", "", AdapterLoadFailed, "s3://"),
    ],
)
@pytest.mark.parametrize("where", ["list-type", "adapter_model"])
def test_faults(
    s3: FakeS3,
    make: Make,
    tmp_path: Path,
    where: str,
    status: int | str,
    code: str,
    kind: type[AdapterError],
    words: str,
) -> None:
    """A typed error with a remedy or a field, no residue, and the next request is served."""
    source = make()
    s3.where, s3.fault, s3.code, s3.broken = where, status, code, 1000
    with pytest.raises(kind, match=words) as caught:
        load(source)
    assert caught.value.hint or caught.value.field
    assert residue(tmp_path) == []
    s3.broken = 0
    load(source)


@pytest.mark.parametrize("fault", [503, "cut"])
@pytest.mark.parametrize("part_bytes", [300, 1 << 20])
def test_transient_failures_are_retried(
    s3: FakeS3, make: Make, saved: Path, fault: int | str, part_bytes: int
) -> None:
    s3.where, s3.fault, s3.broken = "adapter_model", fault, 1
    assert load(make(part_bytes=part_bytes)) == (saved / "a" / WEIGHTS).read_bytes()
    assert s3.broken == 0


@pytest.mark.parametrize(
    "body",
    [
        b"<html>hello",
        b"",
        b"<a>" * 5000,
        b"<ListBucketResult/>",
        b"<ListBucketResult><Contents><Key>team/a/adapter_config.json</Key></Contents></ListBucketResult>",
        b"<ListBucketResult><Contents><Key>x</Key><Size>ten</Size></Contents></ListBucketResult>",
    ],
)
def test_what_is_no_answer_of_s3(s3: FakeS3, make: Make, body: bytes) -> None:
    s3.where, s3.fault, s3.body, s3.broken = "list-type", 200, body, 1000
    with pytest.raises((AdapterLoadFailed, AdapterNotFound)) as caught:
        load(make())
    assert caught.value.hint


def test_permanent_failures_are_not_retried(s3: FakeS3, make: Make) -> None:
    s3.fault, s3.code, s3.broken = 403, "AccessDenied", 1000
    with pytest.raises(AdapterForbidden):
        load(make(attempts=4))
    assert s3.broken == 999


def test_no_server_and_no_credentials(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(AdapterLoadFailed, match="s3://loras/team/a") as caught:
        load(make(endpoint="http://127.0.0.1:1"))
    assert "--s3-endpoint-url" in (caught.value.hint or "")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AdapterForbidden) as caught_too:
        load(make())
    assert "AWS_ACCESS_KEY_ID" in (caught_too.value.hint or "")


def test_without_boto3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(AdapterLoadFailed) as caught:
        S3Source(DiskCache(tmp_path)).resolve(AdapterRef(("loras/team/a",)), None)
    assert "lorax-engine[s3]" in (caught.value.hint or "")


def test_too_large(s3: FakeS3, make: Make) -> None:
    with pytest.raises(AdapterTooLarge, match="the limit is 10 bytes"):
        make(max_file_bytes=10).resolve(AdapterRef.parse("loras/team/a"), None)
    s3.put(f"team/a/{CONFIG}", b" " * ((8 << 20) + 1))
    with pytest.raises(AdapterTooLarge):
        make().resolve(AdapterRef.parse("loras/team/a"), None)
    assert s3.downloads == 0


def test_slow(s3: FakeS3, make: Make, tmp_path: Path) -> None:
    """The whole download has a deadline, although data keeps coming."""
    source = make(seconds=0.5)
    s3.delay_s = 0.2
    started = time.monotonic()
    with pytest.raises(AdapterLoadFailed, match="too long"):
        load(source)
    assert time.monotonic() - started < 5 and residue(tmp_path) == []


def test_concurrent_fetches_download_once(s3: FakeS3, make: Make) -> None:
    source = make()
    version = source.resolve(AdapterRef.parse("loras/team/a"), None)
    s3.delay_s = 0.01

    def fetch(number: int) -> bytes:
        with source.fetch(version, None, lambda done, total: None) as files:
            return files.weights.read()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(fetch, range(8)))) == 1
    assert s3.downloads == 1
    load(make())  # another process, later
    assert s3.downloads == 1


def test_eviction(s3: FakeS3, make: Make, saved: Path, tmp_path: Path) -> None:
    """Two of three fit: the least recently used goes, also after a restart. Open files stay readable."""
    size = sum((saved / "a" / name).stat().st_size for name in (CONFIG, WEIGHTS))
    budget = int(2.5 * size)
    for name in "abc":
        s3.put_folder(f"x/{name}", saved / name)
    source = make(budget)
    version = source.resolve(AdapterRef.parse("loras/x/a"), None)
    held = source.fetch(version, None, lambda done, total: None)
    load(source, "loras/x/b")
    load(source, "loras/x/a")
    assert s3.downloads == 2
    load(make(budget), "loras/x/c")  # removes b
    folder = tmp_path / FOLDER
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert used <= budget and s3.downloads == 3
    load(source, "loras/x/a")
    assert s3.downloads == 3
    load(source, "loras/x/b")  # removes c
    load(source, "loras/x/c")  # removes a
    assert s3.downloads == 5
    assert held.weights.read() == (saved / "a" / WEIGHTS).read_bytes()
    held.close()
    with pytest.raises(AdapterTooLarge, match="--adapter-disk-cache-gb"):
        load(make(size // 2), "loras/x/a")
    assert residue(tmp_path) == []


def test_a_download_in_progress_is_no_residue(s3: FakeS3, make: Make, tmp_path: Path) -> None:
    """A second process neither removes nor waits for it."""
    s3.delay_s = 0.05
    slow = make()
    thread = threading.Thread(target=load, args=(slow,))
    thread.start()
    while not residue(tmp_path):
        time.sleep(0.01)
    load(make(), "loras/team/a-b")
    thread.join()
    assert residue(tmp_path) == []


def crc64(data: bytes, value: int = 0) -> int:
    """CRC-64/NVME, bit by bit, with the interface of awscrt."""
    value ^= (1 << 64) - 1
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x9A6C9329AC4BC9B5 if value & 1 else 0)
    return value ^ ((1 << 64) - 1)


def upload(s3: FakeS3, kind: str, data: bytes) -> str:
    """Stores the weights of `team/a` in one manner; returns the algorithm that they can be compared by."""
    key = {"Bucket": "loras", "Key": f"team/a/{WEIGHTS}"}
    if kind in ("SHA256", "SHA1", "CRC32"):
        s3.client.put_object(**key, Body=data, ChecksumAlgorithm=kind)
        return kind.lower()
    if kind == "parts":
        size = 700
        id = s3.client.create_multipart_upload(**key)["UploadId"]
        parts = []
        for number, start in enumerate(range(0, len(data), size), 1):
            piece = {"PartNumber": number, "UploadId": id, "Body": data[start : start + size]}
            parts.append(
                {"PartNumber": number, "ETag": s3.client.upload_part(**key, **piece)["ETag"]}
            )
        s3.client.complete_multipart_upload(**key, UploadId=id, MultipartUpload={"Parts": parts})
        s3.add_headers["x-amz-checksum-crc32"] = "AAAAAA==-5"  # of the parts' checksums
        return "md5"
    s3.client.put_object(**key, Body=data)
    s3.forget_checksum(f"team/a/{WEIGHTS}")
    if kind == "CRC64NVME":
        s3.add_headers["x-amz-checksum-crc64nvme"] = base64.b64encode(
            crc64(data).to_bytes(8, "big")
        ).decode()
        return "crc64nvme"
    if kind == "KMS":
        s3.add_headers["x-amz-server-side-encryption"] = "aws:kms"
        return ""
    return "md5"


KINDS = ["SHA256", "SHA1", "CRC32", "CRC64NVME", "MD5", "parts", "KMS"]


@pytest.mark.parametrize("kind", KINDS)
def test_checksums_of_objects(
    s3: FakeS3, make: Make, saved: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tmp_path: Path
) -> None:
    """An object that is downloaded in ranges is compared as a whole, with whatever its store lists."""
    data = (saved / "a" / WEIGHTS).read_bytes()
    monkeypatch.setitem(sys.modules, "awscrt.checksums", SimpleNamespace(crc64nvme=crc64))
    algorithm = upload(s3, kind, data)
    source = make(part_bytes=1500)
    s3.where, s3.fault, s3.broken = "adapter_model", "corrupt", 1000
    if algorithm:
        with pytest.raises(AdapterLoadFailed, match=f"corrupt: its {algorithm} is not"):
            load(source)
        assert not residue(tmp_path)
        s3.broken = 1
    else:  # there is nothing to compare it with
        s3.broken = 0
    assert load(source) == data
