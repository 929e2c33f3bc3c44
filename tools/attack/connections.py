"""Slow and broken clients, as cheap as they can be: raw sockets, and one table of what each of them sends.

A client is a coroutine that gets a socket and ends when it has said everything; the socket stays open until its round
ends or the server closes it.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache

HOLD_S = 12.0
DRIP_S = 1.0
MAX_HEAVY = 6  # clients of one kind in a round that send many megabytes
SECRET = "attack-secret-4f1d"  # in every token; must not be in the log
MIB = 1 << 20

Sock = socket.socket
Client = Callable[[Sock, random.Random], Awaitable[None]]


def head(*lines: str, target: str = "/generate", method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: x", *lines, "", ""]).encode("latin-1")


def json_head(size: int | None, *lines: str, target: str = "/generate") -> bytes:
    length = [f"Content-Length: {size}"] if size is not None else ["Transfer-Encoding: chunked"]
    return head("Content-Type: application/json", *length, *lines, target=target)


async def say(sock: Sock, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def drip(sock: Sock, pieces: list[bytes]) -> None:
    for piece in pieces:
        await say(sock, piece)
        await asyncio.sleep(DRIP_S)


async def silent(sock: Sock, chosen: random.Random) -> None:
    """Says nothing."""


async def half_header(sock: Sock, chosen: random.Random) -> None:
    whole = json_head(100)
    await say(sock, whole[: chosen.randrange(1, len(whole) - 2)])


async def header_drip(sock: Sock, chosen: random.Random) -> None:
    """A byte a second, for ever."""
    await drip(sock, [bytes([byte]) for byte in head("X-Long: " + "x" * 300)])


async def no_body(sock: Sock, chosen: random.Random) -> None:
    """Announces a body and sends none of it."""
    await say(
        sock, json_head(chosen.choice([10, 1000, 31 * MIB]), f"Authorization: Bearer {SECRET}")
    )


async def body_drip(sock: Sock, chosen: random.Random) -> None:
    await say(sock, json_head(1000))
    await drip(sock, [b" "] * 300)


async def half_body(sock: Sock, chosen: random.Random) -> None:
    """30 MB of 31, and then nothing."""
    await say(sock, json_head(31_000_000) + b'{"inputs": "')
    for _ in range(30):
        await say(sock, b"x" * 1_000_000)


async def endless_chunks(sock: Sock, chosen: random.Random) -> None:
    await say(sock, json_head(None))
    chunk = b"%x\r\n%b\r\n" % (MIB, b" " * MIB)
    for _ in range(100):
        await say(sock, chunk)


async def bad_chunk(sock: Sock, chosen: random.Random) -> None:
    bad = [b"zz\r\n", b"-1\r\n", b"ffffffffffffffffffff\r\n", b"5\r\nabc", b"5;" + b"x" * 90_000]
    await say(sock, json_head(None) + chosen.choice(bad))


async def both_lengths(sock: Sock, chosen: random.Random) -> None:
    second = chosen.choice(["Transfer-Encoding: chunked", "Content-Length: 7"])
    await say(sock, json_head(5, second) + b"0\r\n\r\n{}")


async def garbage(sock: Sock, chosen: random.Random) -> None:
    await say(sock, chosen.randbytes(chosen.randint(1, 5000)))


async def tls_hello(sock: Sock, chosen: random.Random) -> None:
    await say(sock, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chosen.randbytes(508))


async def expect(sock: Sock, chosen: random.Random) -> None:
    value = chosen.choice(["\xe9", "100-continue, 200-ok", "x" * 5000])
    await say(sock, json_head(2, f"Expect: {value}") + b"{}")


async def control_characters(sock: Sock, chosen: random.Random) -> None:
    """Control characters in the token, which must not reach the log."""
    bad = chosen.choice(["\x00", "\x07", "\x1b[31m", "\x7f", "\xe9", "\x85"])
    await say(sock, json_head(2, f"Authorization: Bearer {SECRET}{bad}{SECRET}") + b"{}")


async def long_header(sock: Sock, chosen: random.Random) -> None:
    """One header line of 1 MB."""
    await say(sock, head(f"X-Long: {'x' * MIB}"))


async def long_target(sock: Sock, chosen: random.Random) -> None:
    await say(sock, head(target="/" + "%41" * 50_000, method="GET"))


MANY_HEADERS = head(*(f"X-{i}: {i}" for i in range(20_000)))


async def many_headers(sock: Sock, chosen: random.Random) -> None:
    await say(sock, MANY_HEADERS)


async def pipelined(sock: Sock, chosen: random.Random) -> None:
    """Two hundred requests at once, and then noise."""
    await say(sock, head(target="/health", method="GET") * 200 + chosen.randbytes(200))


@cache
def bomb() -> bytes:
    """300 MB of JSON in 300 KB."""
    return gzip.compress(b'{"inputs": "' + b"x" * 300_000_000 + b'"}', 6)


async def gzip_bomb(sock: Sock, chosen: random.Random) -> None:
    packed = bomb()
    await say(sock, json_head(len(packed), "Content-Encoding: gzip") + packed)


async def bad_gzip(sock: Sock, chosen: random.Random) -> None:
    coding = chosen.choice(["gzip", "deflate", "br", "zstd"])
    await say(sock, json_head(1000, f"Content-Encoding: {coding}") + chosen.randbytes(1000))


async def bad_json(sock: Sock, chosen: random.Random) -> None:
    bodies = [
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"inputs": 1e999}',
        b"nul",
        b'{"inputs":"\\ud800"}',
        b"",
    ]
    body = chosen.choice(bodies)
    await say(sock, json_head(len(body)) + body)


async def never_reads(sock: Sock, chosen: random.Random) -> None:
    """Asks for a stream and reads none of it."""
    parameters = {"max_new_tokens": 1000, "ignore_eos_token": True}
    body = json.dumps({"inputs": "word1 word2", "parameters": parameters}).encode()
    await say(sock, json_head(len(body), target="/generate_stream") + body)
    await asyncio.sleep(3600)


async def reset(sock: Sock, chosen: random.Random) -> None:
    """Connects, says a little or nothing, and resets."""
    await say(sock, json_head(100)[: chosen.choice([0, 10, 1000])])
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


KINDS: dict[str, Client] = {
    "says nothing": silent,
    "half a header": half_header,
    "header byte by byte": header_drip,
    "body never sent": no_body,
    "body byte by byte": body_drip,
    "half a body of 30 MB": half_body,
    "endless chunks": endless_chunks,
    "bad chunk": bad_chunk,
    "two lengths": both_lengths,
    "garbage": garbage,
    "TLS hello": tls_hello,
    "bad Expect": expect,
    "control characters in Authorization": control_characters,
    "header line of 1 MB": long_header,
    "target of 150 KB": long_target,
    "20,000 header lines": many_headers,
    "pipelined garbage": pipelined,
    "gzip bomb": gzip_bomb,
    "bad compression": bad_gzip,
    "bad JSON": bad_json,
    "stream never read": never_reads,
    "reset": reset,
}
HEAVY = ("half a body of 30 MB", "endless chunks", "gzip bomb", "stream never read")


@dataclass
class Seen:
    """What the server did with the clients."""

    opened: Counter[str] = field(default_factory=Counter)
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, status)
    refused: int = 0  # connections that were not accepted


async def attack(
    where: tuple[str, int], kind: str, chosen: random.Random, hold_s: float, seen: Seen
) -> None:
    """One client: connects, does its worst, and notes the first answer, if any comes while it holds."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        if kind == "stream never read":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            async with asyncio.timeout(hold_s):
                await loop.sock_connect(sock, where)
                seen.opened[kind] += 1
        except (OSError, TimeoutError):
            seen.refused += 1
            return
        talking = asyncio.create_task(KINDS[kind](sock, chosen))
        first = b""
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(hold_s):
                if kind in ("stream never read", "reset"):
                    await talking
                else:
                    first = await loop.sock_recv(sock, 64)
        talking.cancel()
        await asyncio.gather(talking, return_exceptions=True)
        if first.startswith(b"HTTP/"):
            seen.answers[kind, first[9:12].decode("latin-1")] += 1
        elif kind != "reset":
            seen.answers[kind, "open" if not first else "other"] += 1


async def rounds(
    where: tuple[str, int], count: int, seed: int, seen: Seen, hold_s: float = HOLD_S
) -> None:
    """`count` clients: half of them of all kinds in rounds, then the other half at once, whose body never comes."""
    chosen, kinds = random.Random(seed), list(KINDS)
    await asyncio.to_thread(bomb)
    size = max(len(kinds), -(-count // 8))
    for start in range(0, count // 2, size):
        of_round: list[str] = []
        for i in range(start, min(start + size, count // 2)):
            kind = kinds[i % len(kinds)]
            heavy = kind in HEAVY and of_round.count(kind) >= MAX_HEAVY
            of_round.append("half a header" if heavy else kind)
        await asyncio.gather(
            *(
                attack(where, kind, random.Random(chosen.random()), hold_s, seen)
                for kind in of_round
            )
        )
    rest = ["body never sent"] * (count - count // 2)
    await asyncio.gather(*(attack(where, kind, chosen, hold_s, seen) for kind in rest))
