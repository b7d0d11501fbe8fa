"""The gateway and its peers: how each is started, reached and fed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.feeds import PROJECT, Feed, LineFeed, NatsFeed, NchanFeed, QueueFeed
from bench.load import OFFER_DEFLATE, Load
from bench.processes import BenchError, Process, compiled, wait_until
from bench.tokens import issuer

PEERS = Path(__file__).parent / "peers"


@dataclasses.dataclass(slots=True)
class Running:
    """A started server: the process that is measured, and how clients reach it."""

    process: Process
    port: int
    feed: Feed
    path: str = "/ws"
    first_message: str | None = None
    setup_frames: int = 0
    marker: str | None = None
    deflate: bool = False
    headers: tuple[str, ...] = ()

    def load(self, *, path: str | None = None, **options: Any) -> Load:
        """A load generator for this server."""
        return Load(
            self.port,
            path or self.path,
            headers=[*self.headers, *([OFFER_DEFLATE] if self.deflate else [])],
            first_message=self.first_message,
            setup_frames=self.setup_frames,
            marker=self.marker,
            **options,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """One server of the comparison.

    Attributes:
        start: a context manager that starts it, with or without compression.
        version: of what is compared; raises `BenchError` with the reason if it is not here.
        deflates: whether it knows permessage-deflate.
    """

    name: str
    start: Callable[[bool], contextlib.AbstractContextManager[Running]]
    version: Callable[[], str]
    deflates: bool = True


# --- The gateway --------------------------------------------------------------------------------


@contextlib.contextmanager
def stand_in() -> Iterator[dict[str, str]]:
    """The AWS stand-in in a process of its own; yields the settings of a gateway on it."""
    process = Process([sys.executable, "-m", "aws_standin"])
    try:
        process.read_line()
        environment: dict[str, str] = process.read_json()
        yield environment
    finally:
        process.stop()


# On, as in production, so that their bookkeeping is in the figures; but never reached.
GENEROUS_LIMITS = {
    "MAX_CONNECTIONS": "1000000",
    "MAX_HANDSHAKES_PER_SECOND": "100000",
    "MAX_SUBSCRIPTIONS_PER_CONNECTION": "10000",
    "MAX_MESSAGES_PER_SECOND": "100000",
    "MAX_CONNECTIONS_PER_IP": "1000000",
    "MAX_HANDSHAKES_PER_SECOND_PER_IP": "100000",
    "MAX_FAILED_AUTHENTICATIONS_PER_IP": "100000",
}
NO_LIMITS = dict.fromkeys(GENEROUS_LIMITS, "0")
ORIGIN = "https://console.invalid"


@contextlib.contextmanager
def gateway(
    deflate: bool,
    settings: Mapping[str, str] | None = None,
    *,
    topic: bool = True,
    launcher: Sequence[str | Path] = ("server.py",),
) -> Iterator[Running]:
    """server.py as it is deployed, on the stand-in: update queue, log and topic all in use."""
    with stand_in() as environment, tempfile.TemporaryFile() as log:
        if not topic:
            del environment["UPDATES_TOPIC_ARN"]
        environment |= {"DRAIN_SECONDS": "0", **GENEROUS_LIMITS}
        process = Process(
            [sys.executable, *launcher], {**environment, **(settings or {})}, stdout=log
        )
        try:
            port = _gateway_port(process, log)
            wait_until("the gateway's health", functools.partial(_healthy, port))
            feed = QueueFeed(environment["SQS_QUEUE_URL_UPDATES"])
            path = f"/ws?project_id={PROJECT}"
            yield Running(process, port, feed, path, setup_frames=2, deflate=deflate)
            feed.close()
        finally:
            process.stop()


@contextlib.contextmanager
def gateway_with_tokens(deflate: bool) -> Iterator[Running]:
    """The same with all that can be on: a token is verified for each client, and its origin."""
    with (
        issuer() as (settings, token),
        gateway(deflate, {**settings, "ALLOWED_ORIGINS": ORIGIN}) as running,
    ):
        running.headers = (f"Authorization: Bearer {token}", f"Origin: {ORIGIN}")
        yield running


def _gateway_port(process: Process, log: Any) -> int:
    """The port in the gateway's log line "listening"."""
    found: list[int] = []

    def listening() -> bool:
        if process.process.poll() is not None:
            raise BenchError(f"server.py ended: {process.complaint()}")
        text = os.pread(log.fileno(), 65536, 0).decode()
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                entry = json.loads(line)
                if entry.get("message") == "listening":
                    found.append(entry["port"])
        return bool(found)

    wait_until("the gateway's start", listening)
    return found[0]


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


# --- Peers written for this ---------------------------------------------------------------------


@contextlib.contextmanager
def fed_by_lines(
    command: list[str | Path],
    deflate: bool,
    environment: Mapping[str, str] | None = None,
    **reached: Any,
) -> Iterator[Running]:
    """A peer that prints its ports and reads events as lines."""
    process = Process(command, environment)
    try:
        ports = process.read_json()
        feed = LineFeed(ports["feed"])
        yield Running(process, ports["port"], feed, deflate=deflate, **reached)
        feed.close()
    finally:
        process.stop()


def _python(
    module: str, *options: str
) -> Callable[[bool], contextlib.AbstractContextManager[Running]]:
    command: list[str | Path] = [sys.executable, "-m", f"bench.peers.{module}", *options]
    return lambda deflate: fed_by_lines(command, deflate)


def _node(
    script: str, **reached: Any
) -> Callable[[bool], contextlib.AbstractContextManager[Running]]:
    def start(deflate: bool) -> contextlib.AbstractContextManager[Running]:
        options = ["--deflate"] if deflate else []
        return fed_by_lines(["node", PEERS / script, *options], deflate, **reached)

    return start


def _floor(deflate: bool) -> contextlib.AbstractContextManager[Running]:
    return fed_by_lines([compiled(PEERS / "floor.c")], deflate)


@contextlib.contextmanager
def _forward_each(deflate: bool) -> Iterator[Running]:
    """The plain forwarder: one ``send_message`` a message."""
    command: list[str | Path] = [sys.executable, "-m", "bench.peers.forward_each"]
    with stand_in() as environment, fed_by_lines(command, deflate, environment) as running:
        yield running


def _of_packages(*names: str) -> Callable[[], str]:
    def version() -> str:
        try:
            return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        except importlib.metadata.PackageNotFoundError as error:
            raise BenchError(f"{error.name} is not installed (bench/requirements.txt)") from None

    return version


def _of_node_package(name: str) -> Callable[[], str]:
    def version() -> str:
        if not shutil.which("node"):
            raise BenchError("node is not installed")
        try:
            manifest = json.loads((PEERS / "node_modules" / name / "package.json").read_text())
        except FileNotFoundError:
            raise BenchError(f"{name} is not installed (npm ci in bench/peers)") from None
        return f"{name} {manifest['version']}, node {_output('node', '--version')}"

    return version


def _floor_version() -> str:
    compiled(PEERS / "floor.c")
    return _output("cc", "--version").splitlines()[0]


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


# --- Peers that come as they are ----------------------------------------------------------------

NCHAN_MODULE = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def _configured(name: str, directory: str, **values: object) -> Path:
    """A peer's configuration with its ``@placeholders@`` filled in, among them the directory."""
    text = (PEERS / name).read_text().replace("@directory@", directory)
    for key, value in values.items():
        text = text.replace(f"@{key}@", str(value))
    path = Path(directory) / name
    path.write_text(text)
    return path


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def nats(deflate: bool) -> Iterator[Running]:
    """nats-server; several messages may share a WebSocket frame, so markers are counted."""
    port, feed_port = _free_ports(2)
    with tempfile.TemporaryDirectory() as directory:
        values = {"port": port, "feed": feed_port, "deflate": str(deflate).lower()}
        configuration = _configured("nats.conf", directory, **values)
        process = Process(["nats-server", "-c", configuration])
        try:
            wait_until("nats-server's start", lambda: _accepts(port) and _accepts(feed_port))
            yield Running(
                process,
                port,
                NatsFeed(feed_port),
                path="/",
                first_message='CONNECT {"verbose":false,"protocol":1}\r\n'
                f"SUB {PROJECT} 1\r\nPING\r\n",
                setup_frames=2,  # INFO and PONG
                marker='"t":',
                deflate=deflate,
            )
        finally:
            process.stop()


def _nats_version() -> str:
    if not shutil.which("nats-server"):
        raise BenchError("nats-server is not installed (Debian: nats-server)")
    return _output("nats-server", "--version")


@contextlib.contextmanager
def nchan(deflate: bool) -> Iterator[Running]:
    """An nginx with nchan, which deflates a message once for all, where that is on."""
    [port] = _free_ports(1)
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)  # nginx's worker is another user
        configuration = _configured(
            "nchan.conf",
            directory,
            module=NCHAN_MODULE,
            port=port,
            deflate="on" if deflate else "off",
        )
        command: list[str | Path] = [_nginx(), "-p", directory, "-c", configuration]
        process = Process([*command, "-e", f"{directory}/error.log"])
        try:
            wait_until("nginx's start", lambda: _accepts(port))
            yield Running(process, port, NchanFeed(port), path="/sub", deflate=deflate)
        finally:
            process.stop()


def _nginx() -> str:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin") or "nginx"


def _nchan_version() -> str:
    if not NCHAN_MODULE.exists():
        raise BenchError("nchan is not installed (Debian: nginx libnginx-mod-nchan)")
    found = re.search(r"nginx/[\d.]+", _output(_nginx(), "-v"))
    package = _output("dpkg-query", "-W", "-f", "${Version}", "libnginx-mod-nchan")
    return f"nchan {package}, {found[0] if found else 'nginx'}"


# --- All of them --------------------------------------------------------------------------------

GATEWAY = Server("gateway", gateway, _of_packages("websockets", "msgspec", "aiobotocore", "uvloop"))
ASYNCIO_GATEWAY = Server(
    "gateway on asyncio",
    functools.partial(gateway, launcher=[PEERS / "gateway_on_asyncio.py"]),
    _of_packages("websockets", "msgspec", "aiobotocore"),
)
TOKENS_GATEWAY = Server("gateway with tokens", gateway_with_tokens, _of_packages("PyJWT"))
UNLIMITED_GATEWAY = Server(
    "gateway without limits",
    functools.partial(gateway, settings=NO_LIMITS),
    _of_packages("websockets", "msgspec", "aiobotocore", "uvloop"),
)
GATEWAYS = [GATEWAY, TOKENS_GATEWAY, UNLIMITED_GATEWAY, ASYNCIO_GATEWAY]
WEBSOCKETS = Server("websockets", _python("websockets_broadcast"), _of_packages("websockets"))
FLOOR = Server("C floor", _floor, _floor_version, deflates=False)
FORWARD_EACH = Server(
    "send_message each", _forward_each, _of_packages("aiobotocore"), deflates=False
)
NATS = Server("nats-server", nats, _nats_version)
NCHAN = Server("nchan", nchan, _nchan_version)
PEER_SERVERS = [
    WEBSOCKETS,
    Server(
        "websockets on uvloop",
        _python("websockets_broadcast", "--uvloop"),
        _of_packages("websockets", "uvloop"),
    ),
    FLOOR,
    NATS,
    NCHAN,
    Server("picows", _python("picows_server"), _of_packages("picows", "uvloop"), deflates=False),
    Server("aiohttp", _python("aiohttp_server"), _of_packages("aiohttp")),
    Server(
        "Starlette", _python("starlette_server"), _of_packages("starlette", "uvicorn", "uvloop")
    ),
    Server("node ws", _node("ws.mjs"), _of_node_package("ws")),
    Server(
        "socket.io",
        _node(
            "socketio.mjs",
            path="/socket.io/?EIO=4&transport=websocket",
            first_message="40",
            setup_frames=2,  # the engine's open packet, and the namespace's
        ),
        _of_node_package("socket.io"),
    ),
]


def present(servers: list[Server]) -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the servers that are here, and the reasons why others are absent."""
    versions: dict[str, str] = {}
    absent: dict[str, str] = {}
    for server in servers:
        try:
            versions[server.name] = server.version()
        except BenchError as error:
            absent[server.name] = str(error)
    return versions, absent
