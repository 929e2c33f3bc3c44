"""HTTP GET with limits: on hosts, addresses, redirects, bytes and seconds.

The address is checked after the name is resolved, and the connection is made to that very address. Proxies of the
environment are not used, because they would resolve the name again.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from urllib.parse import SplitResult, urljoin, urlsplit

CONNECT_S, READ_S = 5.0, 20.0  # limits of one connection attempt, and of one wait for data
MAX_REDIRECTS = 5
PIECE_BYTES = 1 << 18
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Permit = Callable[
    [str, int], bool
]  # host and port -> whether private addresses are permitted; raises Refused


class WebError(Exception):
    """The network or the server failed; another try may succeed."""


class Refused(Exception):
    """The address may not be used."""


class TooMuch(Exception):
    """The answer is larger than allowed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer whose body is read by `pieces`, once."""

    status: int
    headers: Message
    pieces: Iterator[bytes]

    def read(self, max_bytes: int) -> bytes:
        """The whole body. Raises TooMuch or WebError."""
        body = bytearray()
        for piece in self.pieces:
            body += piece
            if len(body) > max_bytes:
                raise TooMuch(f"the answer has more than {max_bytes} bytes")
        return bytes(body)


class Web:
    """GETs and HEADs of URLs that `permit` allows. Thread-safe."""

    def __init__(self, permit: Permit, context: ssl.SSLContext | None = None) -> None:
        """`permit` is called for the URL and for each redirect. `context`: None checks certificates as usual."""
        self._permit = permit
        self._context = context

    @contextlib.contextmanager
    def open(
        self, url: str, end_by: float, headers: Mapping[str, str], method: str = "GET"
    ) -> Iterator[Answer]:
        """The answer after redirects. `end_by`: by time.monotonic(). `headers` are not sent to another host.

        Raises Refused, or WebError also while the body is read.
        """
        start = urlsplit(url)
        with contextlib.ExitStack() as held:
            for _ in range(MAX_REDIRECTS + 1):
                parts = urlsplit(url)
                sent = dict(headers) if parts.netloc == start.netloc else {}
                with _failures(parts, end_by):
                    connection = held.enter_context(self._connected(parts, end_by))
                    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                    connection.request(
                        method, target, headers={"Accept-Encoding": "identity"} | sent
                    )
                    answer = held.enter_context(contextlib.closing(connection.getresponse()))
                place = answer.headers.get("Location")
                if answer.status not in (301, 302, 303, 307, 308) or not place:
                    yield Answer(answer.status, answer.headers, _pieces(answer, parts, end_by))
                    return
                held.pop_all().close()
                url = urljoin(url, place)
                if urlsplit(url).scheme != start.scheme:
                    raise Refused(f"a redirect leads to {url}")
        raise WebError(f"{start.netloc} redirects more than {MAX_REDIRECTS} times")

    @contextlib.contextmanager
    def _connected(self, parts: SplitResult, end_by: float) -> Iterator[http.client.HTTPConnection]:
        """A connection that is broken at `end_by`."""
        if time.monotonic() >= end_by:
            raise WebError(f"{parts.hostname} answers too slowly")
        host, is_secure = parts.hostname or "", parts.scheme == "https"
        if parts.username or parts.password or not host:
            raise Refused("the address has a password or no host")
        port = parts.port or (443 if is_secure else 80)
        wire = _connect(host, port, self._permit(host, port))
        timer = threading.Timer(max(0.0, end_by - time.monotonic()), _break, [wire])
        timer.daemon = True
        timer.start()
        try:
            if is_secure:
                context = self._context or ssl.create_default_context()
                plain, wire = wire, context.wrap_socket(wire, server_hostname=host)
                plain.close()
                timer.cancel()
                timer = threading.Timer(max(0.0, end_by - time.monotonic()), _break, [wire])
                timer.daemon = True
                timer.start()
            connection = http.client.HTTPConnection(host, port)
            connection.sock = wire
            yield connection
            connection.close()
        finally:
            timer.cancel()
            wire.close()


def is_private(address: str) -> bool:
    """Whether an IP address is anything but a public one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_private(str(inner))
    return not ip.is_global or ip.is_multicast


def _connect(host: str, port: int, may_be_private: bool) -> socket.socket:
    """A connection to one of the host's addresses, all of which are checked first."""
    addresses = [str(one[4][0]) for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not may_be_private and any(map(is_private, addresses)):
        raise Refused(f"{host} has a private address")
    failure: OSError = OSError(0, "the host has no address")
    for address in dict.fromkeys(addresses):
        try:
            wire = socket.create_connection((address, port), timeout=CONNECT_S)
        except OSError as error:
            failure = error
        else:
            wire.settimeout(READ_S)
            return wire
    raise failure


def _break(wire: socket.socket) -> None:
    """Wakes the thread that waits for this connection."""
    with contextlib.suppress(OSError):
        wire.shutdown(socket.SHUT_RDWR)


def _pieces(answer: http.client.HTTPResponse, parts: SplitResult, end_by: float) -> Iterator[bytes]:
    with _failures(parts, end_by):
        while piece := answer.read(PIECE_BYTES):
            yield piece
        if answer.length:  # bytes that did not arrive
            raise WebError(f"{parts.hostname} closed the connection too early")


@contextlib.contextmanager
def _failures(parts: SplitResult, end_by: float) -> Iterator[None]:
    """Failures of the network as WebError."""
    try:
        yield
    except UnicodeError:  # of a host name
        raise Refused(f"{parts.netloc!r} is not a host") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if time.monotonic() >= end_by:
            raise WebError(f"{parts.hostname} answers too slowly") from None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise WebError(f"{parts.hostname}: {reason}") from None
