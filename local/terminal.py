"""What the programs that a person runs in a terminal share: addresses, and faults in words."""

from __future__ import annotations

import argparse
import json
import re
import socket
import ssl
from collections.abc import Mapping
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import websockets.exceptions as refused

TOKEN_VARIABLE: Final = "WEBSOCKET_TOKEN"
LONGEST_PLANNED_DELAY_S: Final = 300.0
LOOPBACK: Final = re.compile(r"(.+\.)?localhost|127\.[\d.]+|::1")

STATUS_ADVICE: Final[Mapping[int, str]] = {
    400: "if the server expects TLS, use wss://",
    401: f"pass a valid token with --token or in {TOKEN_VARIABLE}",
    403: "the origin or the token is not allowed here; look at the server's log",
    404: "the gateway answers at / and at /ws; check the path",
    426: "this is an HTTP address; the gateway answers at / and at /ws",
    429: "too many connections or failed attempts from here; wait a minute",
    502: "the load balancer has no answer from a task; look at the service's tasks and their log",
    503: "the server is starting, draining or full, or no target is healthy; try again shortly",
    504: "the load balancer waited in vain for a task; check the tasks' security group",
}


class FatalError(Exception):
    """What ends the program with exit code 1, and what the person can do about it."""

    def __init__(self, problem: str, advice: str = "", *, passing: bool = False) -> None:
        super().__init__(problem)
        self.advice = advice
        self.passing = passing  # the same attempt may succeed later, as while a server restarts


class Problem(NamedTuple):
    """A way in which no connection comes about: the sentence has {place} and {error} to fill in."""

    kind: type[Exception]
    sentence: str
    advice: str
    passing: bool = True


PROBLEMS: Final = [  # the first that fits counts
    Problem(
        ssl.SSLCertVerificationError,
        "the certificate of {place} is not trusted: {error}",
        "use the host name in the certificate, or name its issuer in SSL_CERT_FILE",
        False,
    ),
    Problem(ssl.SSLError, "{place} does not answer in TLS", "try ws:// instead of wss://"),
    Problem(
        refused.InvalidMessage,
        "{place} does not answer in HTTP/1.1",
        "if it expects TLS, use wss://; otherwise check the port",
    ),
    Problem(
        ConnectionRefusedError,
        "connection refused: nothing listens at {place}",
        "start the server (make run), or check host and port",
    ),
    Problem(
        socket.gaierror, "the host name in {place} is unknown", "check its spelling, and your DNS"
    ),
    Problem(
        TimeoutError,
        "no answer from {place} in time",
        "check host and port, and that firewalls and security groups let you through",
    ),
    Problem(OSError, "cannot reach {place}: {error}", "check host, port and your network"),
    Problem(
        refused.InvalidHandshake,
        "no WebSocket connection with {place}: {error}",
        "is it the gateway's address?",
        False,
    ),
    Problem(
        refused.InvalidURI, "{place} is not an address: {error}", "expected ws://host:8080", False
    ),
    Problem(
        refused.InvalidProxy, "the proxy is not one: {error}", "look at your proxy settings", False
    ),
]
# What connect() raises then.
CONNECT_ERRORS: Final = (
    OSError,
    refused.InvalidHandshake,
    refused.InvalidURI,
    refused.InvalidProxy,
)


def explain(error: Exception, url: str) -> FatalError:
    """The failed connection attempt `error` in a sentence, with the step to take next."""
    parts = urlsplit(url)
    if isinstance(error, refused.InvalidStatus):
        status = error.response.status_code
        body = bytes(error.response.body or b"")[:200].decode(errors="replace").strip()
        sentence = f"the server answered HTTP {status}" + (f": {body}" if body else "")
        advice = STATUS_ADVICE.get(
            status, "check host, port and path: is it the gateway's address?"
        )
        return FatalError(sentence, advice, passing=status >= 500 or status == 429)
    if parts.scheme == "wss" and isinstance(error, ConnectionResetError):
        error = ssl.SSLError(*error.args)
    problem = next(each for each in PROBLEMS if isinstance(error, each.kind))
    words = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or error
    place = parts.netloc.rpartition("@")[2]
    sentence = problem.sentence.format(place=place, error=words)
    return FatalError(sentence, problem.advice, passing=problem.passing)


def escape(text: str) -> str:
    r"""One line without a character that could drive a terminal or deceive a reader.

    Control characters, bidirectional overrides, zero-width and lone surrogates become \uXXXX.
    """
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def parse_endpoint(text: str) -> tuple[str, list[str]]:
    """The WebSocket URL a person means by `text`: ws, wss, http, https or just host:port.

    Projects are taken out of the query: they are subscribed to by message, because only that can
    be repeated with a position after a lost connection.
    """
    scheme, found, rest = text.strip().partition("://")
    if not found:
        scheme, rest = "ws", text.strip()
    secure = {"ws": False, "http": False, "wss": True, "https": True}.get(scheme.lower())
    if secure is None:
        raise argparse.ArgumentTypeError(f"{scheme}:// is not one of ws, wss, http, https")
    try:
        parts = urlsplit(f"{'wss' if secure else 'ws'}://{rest}")
        host, _ = parts.hostname, parts.port  # the port is checked as it is read
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not an address: {error}") from None
    if not host or re.search(r"[\s\x00-\x1f]", rest):
        raise argparse.ArgumentTypeError("not an address: expected something like ws://host:8080")
    query = parse_qsl(parts.query, keep_blank_values=True)
    projects = [value for name, value in query if name == "project_id" and value]
    kept = [(name, value) for name, value in query if name not in {"project_id", "since", "epoch"}]
    url = urlunsplit((parts.scheme, parts.netloc, parts.path or "/", urlencode(kept), ""))
    return url, projects


def parse_token(text: str) -> str:
    """A bearer token that fits in one HTTP header."""
    if not re.fullmatch(r"[\x21-\x7e]*", text.strip()):
        raise argparse.ArgumentTypeError("a token is one word of ASCII characters")
    return text.strip()


def parse_positive(text: str) -> float:
    """A number above 0."""
    value = float(text) if re.fullmatch(r"\d{1,9}\.?\d{0,9}|\.\d{1,9}", text) else 0.0
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def is_loopback(url: str) -> bool:
    """Whether a URL is of this machine: no proxy stands between, whatever the environment says."""
    return LOOPBACK.fullmatch(urlsplit(url).hostname or "") is not None


def retry_after_s(error: Exception) -> float:
    """The wait an HTTP refusal asks for with `Retry-After`, else 0."""
    value = ""
    if isinstance(error, refused.InvalidStatus):
        value = error.response.headers.get("Retry-After", "")
    return min(float(value), LONGEST_PLANNED_DELAY_S) if re.fullmatch(r"\d{1,6}", value) else 0.0
