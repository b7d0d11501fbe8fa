"""The gateway and its peers: how each is started, reached and fed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.agents import Agents, JetStreamAgents, QueueAgents, Wires
from bench.feeds import PROJECT, Feed, LineFeed, NatsFeed, NchanFeed, QueueFeed, filler
from bench.load import OFFER_DEFLATE, Load
from bench.processes import BUILD, ROOT, BenchError, Process, compiled, wait_until
from bench.tokens import issuer

EVENT_MARKER = '"t":'
PEERS = Path(__file__).parent / "peers"


@dataclasses.dataclass(slots=True)
class Running:
    """A started server: the process that is measured, and how clients reach it.

    What is sent by clients may hold placeholders: see load.c.
    """

    process: Process
    port: int
    feed: Feed
    path: str = "/ws"
    first_message: str | None = None
    setup_frames: int = 0
    marker: str | None = None
    deflate: bool = False
    headers: tuple[str, ...] = ()
    aws: Aws | None = None
    token: Callable[[str], str] | None = None
    tokens: Path | None = None

    def viewers(self, projects: int) -> Load:
        """A load generator whose connections view so many projects in turn: p0, p1, ...

        Every delivery is counted by its time stamp, and every latency is recorded.
        """
        return self.load(
            path="/ws?project_id=p%d", modulus=projects, marker=EVENT_MARKER, sample_every=1
        )

    def wait_for_viewers(self, count: int) -> None:
        """Wait until so many viewers get what is sent; the gateway has confirmed it to each."""

    def agents(self) -> Agents:
        """Agents that report."""
        assert self.aws is not None
        return QueueAgents(self.aws.environment["SQS_QUEUE_URL_UPDATES"])

    def forward(self) -> str:
        """What a client forwards."""
        data = {"instruction": filler(160)}
        return json.dumps({"action": "forward", "type": "dev", "data": data})

    def load(self, *, path: str | None = None, marker: str | None = None, **options: Any) -> Load:
        """A load generator for this server."""
        return Load(
            self.port,
            path or self.path,
            headers=[*self.headers, *([OFFER_DEFLATE] if self.deflate else [])],
            first_message=self.first_message,
            setup_frames=self.setup_frames,
            marker=marker or self.marker,
            **{"tokens": self.tokens, **options},
        )


def no_fleet(*_: Any, **__: Any) -> contextlib.AbstractContextManager[list[Running]]:
    """For servers that are measured alone."""
    raise BenchError("only the gateway is measured with several tasks")


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """One server of the comparison.

    Attributes:
        start: a context manager that starts it, with or without compression.
        version: of what is compared; raises `BenchError` with the reason if it is not here.
        deflates: whether it knows permessage-deflate.
        fleet: a context manager that starts several tasks of it, on an AWS of a latency; only of
            the gateway.
    """

    name: str
    start: Callable[[bool], contextlib.AbstractContextManager[Running]]
    version: Callable[[], str]
    deflates: bool = True
    fleet: Callable[..., contextlib.AbstractContextManager[list[Running]]] = no_fleet


# --- The gateway --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Used:
    """What AWS would bill: see aws_standin/usage.py."""

    calls: Counter[str]
    requests: Counter[str]
    read_units: float
    write_units: float

    def since(self, earlier: Used) -> Used:
        """What came after `earlier`."""
        return Used(
            self.calls - earlier.calls,
            self.requests - earlier.requests,
            self.read_units - earlier.read_units,
            self.write_units - earlier.write_units,
        )

    def of_events(self) -> Counter[str]:
        """The gateway's calls but for forwards: neither agents' sends nor those to agents."""
        return Counter({k: n for k, n in self.calls.items() if not k.startswith("sqs SendMessage")})


class Aws:
    """The AWS stand-in in a process of its own."""

    def __init__(self, latency_ms: str = "0", *, fifo_updates: bool = False) -> None:
        command = [sys.executable, "-m", "aws_standin", "--latency-ms", latency_ms]
        command += ["--fifo-updates"] * fifo_updates
        self.process = Process(command)
        self.process.read_line()
        self.environment: dict[str, str] = self.process.read_json()

    def used(self) -> Used:
        """What was used since the start."""
        self.process.write_line("")
        counts = self.process.read_json()
        calls, requests = Counter(counts.pop("calls")), Counter(counts.pop("requests"))
        return Used(calls, requests, **counts)


@contextlib.contextmanager
def stand_in(latency_ms: str = "0") -> Iterator[Aws]:
    """An AWS whose every call takes so long."""
    aws = Aws(latency_ms)
    try:
        yield aws
    finally:
        aws.process.stop()


NEVER_REACHED = "100000"
LARGEST_ALLOWED = {"MAX_SUBSCRIPTIONS_PER_CONNECTION": "10000"}


@functools.cache
def limits(program: Path) -> frozenset[str]:
    """The settings of a `server.py` that are limits and can be off, from its ``--help``."""
    command = [sys.executable, str(program), "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return frozenset(re.findall(r"^  (MAX_\w+) .*\b0 is no limit", help_text, re.MULTILINE))


def generous_limits(program: Path) -> dict[str, str]:
    """On, as in production, so that their bookkeeping is in the figures; but never reached."""
    return {name: LARGEST_ALLOWED.get(name, NEVER_REACHED) for name in limits(program)}


ORIGIN = "https://console.invalid"
USERS = 250


@contextlib.contextmanager
def gateways(
    tasks: int,
    settings: Mapping[str, str] | None = None,
    *,
    per_task: Sequence[Mapping[str, str]] = (),
    deflate: bool = False,
    latency_ms: str = "0",
    program: Path = ROOT / "server.py",
    launcher: Path | None = None,
) -> Iterator[list[Running]]:
    """So many tasks on one stand-in: update queue, log and topic all in use.

    Args:
        tasks: how many.
        settings: beside the usual ones.
        per_task: more of them, of each task.
        deflate: whether clients are to offer it.
        latency_ms: what each call to AWS takes, ``5-10`` or ``5``.
        program: the `server.py`.
        launcher: what is run in its place.
    """
    with stand_in(latency_ms) as aws, contextlib.ExitStack() as stack:
        environment = {
            **aws.environment,
            "DRAIN_SECONDS": "0",
            **generous_limits(program),
            **(settings or {}),
        }
        fleet: list[Running] = []
        for own in per_task or [{}] * tasks:
            log = stack.enter_context(tempfile.TemporaryFile())
            process = Process(
                [sys.executable, launcher or program], {**environment, **own}, stdout=log
            )
            stack.callback(process.stop)
            port = _gateway_port(process, log)
            feed = QueueFeed(environment["SQS_QUEUE_URL_UPDATES"])
            stack.callback(feed.close)
            path = f"/ws?project_id={PROJECT}"
            running = Running(process, port, feed, path, setup_frames=2, deflate=deflate, aws=aws)
            fleet.append(running)
        for running in fleet:
            wait_until("the gateway's health", functools.partial(_healthy, running.port))
        yield fleet


@contextlib.contextmanager
def gateway(
    deflate: bool, settings: Mapping[str, str] | None = None, **options: Any
) -> Iterator[Running]:
    """server.py as it is deployed, one task of it."""
    with gateways(1, settings, deflate=deflate, **options) as [running]:
        yield running


@contextlib.contextmanager
def gateway_without_limits(deflate: bool) -> Iterator[Running]:
    """The same with every limit off."""
    with gateway(deflate, dict.fromkeys(limits(ROOT / "server.py"), "0")) as running:
        yield running


@contextlib.contextmanager
def gateways_with_tokens(
    tasks: int, settings: Mapping[str, str] | None = None, **options: Any
) -> Iterator[list[Running]]:
    """Tasks with all that can be on: each client brings an origin, and the token of a user.

    There are `USERS`: one would have one account of work, and wait for what all have caused.
    """
    with (
        tempfile.NamedTemporaryFile("w", suffix=".tokens") as file,
        issuer() as (trusted, token),
        gateways(
            tasks, {**trusted, "ALLOWED_ORIGINS": ORIGIN, **(settings or {})}, **options
        ) as fleet,
    ):
        file.write("".join(f"{token(f'user-{n}')}\n" for n in range(USERS)))
        file.flush()
        for running in fleet:
            running.headers = (f"Origin: {ORIGIN}",)
            running.token, running.tokens = token, Path(file.name)
        yield fleet


@contextlib.contextmanager
def gateway_with_tokens(deflate: bool, **options: Any) -> Iterator[Running]:
    """One such task."""
    with gateways_with_tokens(1, deflate=deflate, **options) as [running]:
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
    with stand_in() as aws, fed_by_lines(command, deflate, aws.environment) as running:
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


def free_ports(count: int) -> list[int]:
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
    port, feed_port = free_ports(2)
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


@dataclasses.dataclass(slots=True)
class JetStream(Running):
    """nats-server with two streams: of events, a subject a project, and of forwards.

    A viewer has a consumer of its own on its project's subject, which it would make anew from the
    last sequence it has seen; what is ephemeral comes by a subject outside the streams.
    """

    admin: Wires | None = None

    def viewers(self, projects: int) -> Load:
        config = (
            '{"stream_name":"EVENTS","config":{"deliver_subject":"_D.%c","deliver_policy":"new",'
            '"ack_policy":"none","filter_subject":"event.%5d","mem_storage":true,'
            '"inactive_threshold":300000000000}}'
        )
        size = len(config.replace("%c", "00000").replace("%5d", "00000"))
        return Load(
            self.port,
            "/",
            first_message='CONNECT {"verbose":false,"protocol":1}%nSUB _D.%c 1%n'
            f"SUB ephemeral.%5d 2%nPUB $JS.API.CONSUMER.CREATE.EVENTS _D.%c {size}%n{config}%n"
            "PING%n",
            setup_frames=2,  # INFO and PONG
            marker=EVENT_MARKER,
            sample_every=1,
            modulus=projects,
            confirmation='"stream":"FORWARDS"',
        )

    def wait_for_viewers(self, count: int) -> None:
        def all_there() -> bool:
            assert self.admin is not None
            answer = self.admin.request("$JS.API.STREAM.INFO.EVENTS", {})
            return bool(answer["state"]["consumer_count"] == count)

        wait_until("every viewer's consumer", all_there)

    def agents(self) -> Agents:
        assert self.admin is not None
        return JetStreamAgents(self.admin.port)

    def forward(self) -> str:
        data = json.dumps({"type": "dev", "data": {"instruction": filler(160)}})
        return f"PUB forward.dev _D.%c {len(data)}%n{data}%n"


@contextlib.contextmanager
def jetstream(_tasks: int, *_: Any, **__: Any) -> Iterator[list[Running]]:
    """nats-server with its streams in files; it is one server, whatever is asked for."""
    port, feed_port = free_ports(2)
    with tempfile.TemporaryDirectory() as directory:
        configuration = _configured("jetstream.conf", directory, port=port, feed=feed_port)
        process = Process(["nats-server", "-c", configuration])
        try:
            wait_until("nats-server's start", lambda: _accepts(port) and _accepts(feed_port))
            admin = Wires(feed_port)
            for name, subjects in (("EVENTS", "event.*"), ("FORWARDS", "forward.*")):
                stream = {"name": name, "subjects": [subjects], "storage": "file"}
                limits_of = {"retention": "limits", "max_age": 86_400_000_000_000}
                answer = admin.request(f"$JS.API.STREAM.CREATE.{name}", {**stream, **limits_of})
                if "error" in answer:
                    raise BenchError(f"JetStream: {answer['error']}")
            yield [JetStream(process, port, NatsFeed(feed_port), admin=admin)]
            admin.close()
        finally:
            process.stop()


def _nats_version() -> str:
    if not shutil.which("nats-server"):
        raise BenchError("nats-server is not installed (Debian: nats-server)")
    return _output("nats-server", "--version")


@contextlib.contextmanager
def nchan(deflate: bool) -> Iterator[Running]:
    """An nginx with nchan, which deflates a message once for all, where that is on."""
    [port] = free_ports(1)
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

_LIBRARIES = ("websockets", "msgspec", "aiobotocore", "uvloop")
GATEWAY = Server("gateway", gateway, _of_packages(*_LIBRARIES), fleet=gateways)
ASYNCIO_GATEWAY = Server(
    "gateway on asyncio",
    functools.partial(gateway, launcher=PEERS / "gateway_on_asyncio.py"),
    _of_packages(*_LIBRARIES[:-1]),
)
TOKENS_GATEWAY = Server(
    "gateway with tokens",
    gateway_with_tokens,
    _of_packages("PyJWT"),
    fleet=gateways_with_tokens,
)
UNLIMITED_GATEWAY = Server(
    "gateway without limits", gateway_without_limits, _of_packages(*_LIBRARIES)
)
GATEWAYS = [GATEWAY, TOKENS_GATEWAY, UNLIMITED_GATEWAY, ASYNCIO_GATEWAY]
WEBSOCKETS = Server("websockets", _python("websockets_broadcast"), _of_packages("websockets"))
FLOOR = Server("C floor", _floor, _floor_version, deflates=False)
FORWARD_EACH = Server(
    "send_message each", _forward_each, _of_packages("aiobotocore"), deflates=False
)
NATS = Server("nats-server", nats, _nats_version)
JETSTREAM = Server("nats JetStream", nats, _nats_version, fleet=jetstream)
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


def gateway_of(revision: str) -> Server:
    """The gateway with tokens as it was at a git revision, with the packages installed now.

    Raises:
        BenchError: there is no such revision here.
    """
    found = subprocess.run(
        ["git", "show", f"{revision}:server.py"], cwd=ROOT, capture_output=True, check=False
    )
    if found.returncode:
        raise BenchError(found.stderr.decode().strip())
    program = BUILD / f"server-{hashlib.sha256(found.stdout).hexdigest()[:12]}.py"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_bytes(found.stdout)
    return Server(
        f"gateway with tokens at {revision}",
        functools.partial(gateway_with_tokens, program=program),
        lambda: revision,
        fleet=functools.partial(gateways_with_tokens, program=program),
    )


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
