"""The two programs that a person runs against a gateway: what they print and how they end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from tests.moto_aws import MotoAws, Platform
from tests.waiting import free_port

ROOT = Path(__file__).resolve().parent.parent
CLIENT = "test-websocket.py"
CHECKER = "integration_test.py"
TIMEOUT_S = 30.0


@dataclass
class Process:
    """A program of ours under way, and the lines it has printed."""

    popen: subprocess.Popen[str]
    lines: SimpleQueue[str] = field(default_factory=SimpleQueue)
    seen: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, arguments: Sequence[str], environment: dict[str, str] | None = None) -> Process:
        """Start `python arguments...` with pipes; both outputs end up in `lines`."""
        popen = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONUTF8": "1", **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        process = cls(popen)
        threading.Thread(target=process._read, daemon=True).start()
        return process

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout:
            for line in self.popen.stdout:
                self.lines.put(line.rstrip("\n"))

    def type(self, line: str) -> None:
        """Send a line to its standard input."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{line}\n")
        self.popen.stdin.flush()

    def until(self, pattern: str) -> str:
        """Read on to the first line in which `pattern` is found, and return that line."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                printed = "\n".join(self.seen)
                raise AssertionError(f"no line with {pattern!r} in:\n{printed}") from None
            self.seen.append(line)
            if re.search(pattern, line):
                return line

    def end(self) -> int:
        """Wait for the exit code."""
        return self.popen.wait(TIMEOUT_S)

    def kill(self) -> None:
        """End it if it still runs."""
        self.popen.kill()
        self.popen.wait()
        if self.popen.stdin:
            with contextlib.suppress(OSError):
                self.popen.stdin.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Start programs that do not outlive the test."""
    processes: list[Process] = []

    def start_one(*arguments: str, environment: dict[str, str] | None = None) -> Process:
        processes.append(Process.start(arguments, environment))
        return processes[-1]

    yield start_one
    for process in processes:
        process.kill()


def run(
    *arguments: str, typed: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with piped input and output."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1", **(environment or {})},
        input=typed,
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT_S,
        check=False,
    )


def start_server(platform: Platform, port: int = 0) -> tuple[Process, int]:
    """Start a gateway and return it with its port once it can do its job."""
    server = Process.start(["server.py"], platform.environment(port))
    listening = json.loads(server.until('"listening"'))
    actual: int = listening["port"]
    health = f"import sys,urllib.request as u;u.urlopen('http://127.0.0.1:{actual}/health')"
    deadline = time.monotonic() + TIMEOUT_S
    while subprocess.run(
        [sys.executable, "-c", health], capture_output=True, check=False
    ).returncode:
        assert time.monotonic() < deadline, "the server did not become healthy"
    return server, actual


def send_update(platform: Platform, **update: Any) -> None:
    """Put an update into the queue, as an agent does."""
    body = json.dumps(update, ensure_ascii=False)
    platform.client("sqs").send_message(QueueUrl=platform.queue_urls["updates"], MessageBody=body)


def answer_orders(platform: Platform, stopped: threading.Event) -> None:
    """Be the dev agent: two updates for each order, until stopped."""
    sqs, queue_url = platform.client("sqs"), platform.queue_urls["dev"]
    while not stopped.is_set():
        batch = sqs.receive_message(QueueUrl=queue_url, MaxNumberOfMessages=10, WaitTimeSeconds=1)
        for message in batch.get("Messages", []):
            project = json.loads(message["Body"])["project_id"]
            for step in (1, 2) if project else ():
                data = {"step": step}
                send_update(platform, project_id=project, type="project_updated", data=data)
            sqs.delete_message(QueueUrl=queue_url, ReceiptHandle=message["ReceiptHandle"])


@dataclass(frozen=True)
class Gateway:
    """A gateway with a dev agent behind it, and no other agent."""

    platform: Platform
    place: str


@pytest.fixture(scope="session")
def gateway(moto_aws: MotoAws) -> Iterator[Gateway]:
    """One gateway for all tests that leave it as it is."""
    platform = moto_aws.create_platform(prefix="clients")
    stopped = threading.Event()
    agent = threading.Thread(target=answer_orders, args=(platform, stopped))
    agent.start()
    server, port = start_server(platform)
    yield Gateway(platform, f"127.0.0.1:{port}")
    server.kill()
    stopped.set()
    agent.join()


posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
needs_editor = pytest.mark.skipif(
    importlib.util.find_spec("prompt_toolkit") is None, reason="prompt_toolkit is not installed"
)


def type_into_terminal(lines: Sequence[bytes], **more: str) -> tuple[bytes, bool]:
    """Type lines into the client, each once the one before was answered, then send it away.

    Returns what it printed, and whether it left the terminal as it was.
    """
    import pty
    import termios

    def answer(websocket: ServerConnection) -> None:
        say(websocket, "connected", **CONNECTED)
        for _ in lines:
            assert json.loads(websocket.recv(TIMEOUT_S)) == {"action": "ping"}
            say(websocket, "pong", timestamp="2025-11-24T12:00:00Z")
        websocket.close(1008)

    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    kept = {"TERM": "xterm", "NO_COLOR": "", "PROMPT_TOOLKIT_NO_CPR": "1"}
    with websocket_stub(answer) as place:
        client = subprocess.Popen(
            [sys.executable, CLIENT, place],
            cwd=ROOT, env=os.environ | kept | more, stdin=theirs, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        printed = b""

        def read_until(wanted: bytes, times: int = 1) -> None:
            nonlocal printed
            while printed.count(wanted) < times:
                printed += os.read(ours, 65536)

        read_until(b"<- connected")
        for number, line in enumerate(lines, start=1):
            os.write(ours, line)
            read_until(b"<- pong", number)
        read_until(b"error: connection closed (1008")
        assert client.wait(TIMEOUT_S) == 1
    unchanged = termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)
    return printed, unchanged


@contextlib.contextmanager
def websocket_stub(handler: Callable[[ServerConnection], None]) -> Iterator[str]:
    """A WebSocket server that does what `handler` says; its address."""
    with serve(handler, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def http_stub(status: int, seen: list[dict[str, str]] | None = None) -> Iterator[str]:
    """An HTTP server that answers every GET with `status` and notes its headers; its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if seen is not None:
                seen.append(dict(self.headers))
            self.send_response(status)
            self.send_header("Content-Length", "8")
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"starting")

        def log_message(self, *arguments: object) -> None:
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def say(websocket: ServerConnection, kind: str, **fields: Any) -> None:
    """Send a message of the protocol."""
    websocket.send(json.dumps({"type": kind, **fields}))


CONNECTED = {"message": "", "timestamp": "2025-11-24T12:00:00Z", "connection_id": "1"}


class TestOnce:
    """`test-websocket.py --once`."""

    @pytest.mark.parametrize("form", ["{}", "http://{}/ws"])
    def test_round_trip(self, gateway: Gateway, form: str) -> None:
        """A round trip ends with exit code 0, whatever form the address has."""
        result = run(CLIENT, form.format(gateway.place), "--once")
        steps = [line.split()[:2] for line in result.stdout.splitlines()]
        expected = ["connected", "subscribed", "forwarded", "updated", "all"]
        assert steps == [["ok", step] for step in expected], result.stdout + result.stderr
        assert result.returncode == 0

    def test_without_an_agent(self, gateway: Gateway) -> None:
        """An agent that keeps silent is a failure, and the line says what to look for."""
        result = run(CLIENT, gateway.place, "--once", "--agent", "qa", "--timeout", "1")
        last = result.stdout.splitlines()[-1]
        assert last.startswith("FAIL updated"), result.stdout
        assert "--no-expect-updates" in last
        assert result.returncode == 1

    def test_no_expect_updates(self, gateway: Gateway) -> None:
        """An agent that keeps silent does not matter with --no-expect-updates."""
        result = run(CLIENT, gateway.place, "--once", "--agent", "qa", "--no-expect-updates")
        assert "updated" not in result.stdout
        assert result.returncode == 0

    def test_server_refuses(self, gateway: Gateway) -> None:
        """An error from the server is shown in the step it belongs to."""
        result = run(CLIENT, gateway.place, "--once", "--agent", "chef")
        assert re.search(
            r"^FAIL forwarded +the server answered unknown_type", result.stdout, re.MULTILINE
        )
        assert result.returncode == 1

    def test_json(self, gateway: Gateway) -> None:
        """With --json the messages are on stdout and the steps on stderr."""
        result = run(CLIENT, gateway.place, "--once", "--json")
        types = [json.loads(line)["type"] for line in result.stdout.splitlines()]
        assert types[:2] == ["connected", "subscription_confirmed"]
        assert {"forward_confirmed", "project_updated"} <= set(types)
        assert "ok   all well" in result.stderr

    def test_silent_server(self) -> None:
        """A server that says nothing fails the first step after the time limit."""

        def keep_silent(websocket: ServerConnection) -> None:
            for _ in websocket:
                pass

        with websocket_stub(keep_silent) as place:
            result = run(CLIENT, place, "--once", "--timeout", "0.5")
        assert "FAIL connected    nothing within 0.5 s" in result.stdout
        assert result.returncode == 1


class TestConversation:
    """`test-websocket.py` with typed lines."""

    def test_piped_commands_are_answered(self, gateway: Gateway) -> None:
        """Every piped command has its answer on the screen before the client leaves."""
        typed = 'ping\nsubscribe talk\nforward qa {"a": 1}\nunsubscribe other\n{"action":"ping"}'
        result = run(CLIENT, gateway.place, typed=typed)
        shown = re.findall(r"(<-|->) (\w+)", result.stdout)
        assert [kind for arrow, kind in shown if arrow == "->"] == [
            *("ping", "subscribe", "forward", "unsubscribe", "ping")
        ]
        assert sorted(kind for arrow, kind in shown if arrow == "<-") == [
            *("connected", "forward_confirmed", "pong", "pong"),
            *("subscription_confirmed", "unsubscription_confirmed"),
        ]
        assert result.returncode == 0

    def test_output_is_plain_when_piped(self, gateway: Gateway) -> None:
        """Piped output has no colours, and a local time on each line."""
        result = run(CLIENT, gateway.place, typed="ping\n")
        assert "\x1b" not in result.stdout
        for line in result.stdout.splitlines():
            assert re.match(r"\d\d:\d\d:\d\d\.\d{3} (<-|->|--) ", line)

    def test_forward_uses_the_only_project(self, gateway: Gateway) -> None:
        """A forward goes to the one subscribed project unless it names another."""
        result = run(CLIENT, gateway.place, "--project", "only", typed="forward qa [1]\n")
        sent = re.search(r"-> forward (.*)", result.stdout)
        assert sent
        message = json.loads(sent[1])
        assert (message["project_id"], message["data"]) == ("only", [1])
        assert re.fullmatch(r"[0-9a-f-]{36}", message["message_id"])

    def test_typed_lines_that_need_an_answer(self, gateway: Gateway) -> None:
        """Each line the client does not understand is explained, not sent."""
        answers = {
            "dance": "unknown command 'dance'; type help",
            "subscribe": "expected: subscribe PROJECT",
            "subscribe p since x": "expected: subscribe PROJECT",
            "unsubscribe": "expected: unsubscribe PROJECT",
            "forward": "expected: forward AGENT",
            "forward dev {oops": "the data is not valid JSON",
            "help": "  raw TEXT ",
            '{"action":': "not valid JSON; to send it all the same: raw TEXT",
        }
        result = run(CLIENT, gateway.place, typed="\n".join(answers))
        rest = result.stdout
        for line, answer in answers.items():
            assert answer in rest, f"{line!r} has no answer in:\n{result.stdout}"
            rest = rest.partition(answer)[2]
        assert "->" not in result.stdout
        assert result.returncode == 0

    def test_raw_text_is_sent(self, gateway: Gateway) -> None:
        """`raw` sends what would not be sent otherwise, and the server's answer is shown."""
        result = run(CLIENT, gateway.place, typed='raw {"action":\n')
        assert '-> {"action":\n' in result.stdout
        assert re.search("<- error .*invalid_json", result.stdout)

    def test_quit_leaves_at_once(self, gateway: Gateway, start: Callable[..., Process]) -> None:
        """`quit` ends the client while its input is still open."""
        client = start(CLIENT, gateway.place)
        client.until("<- connected")
        client.type("quit")
        assert client.end() == 0

    def test_peer_cannot_drive_the_terminal(
        self, gateway: Gateway, start: Callable[..., Process]
    ) -> None:
        """Escape sequences, bidirectional overrides and line breaks are shown, not obeyed."""
        evil = "\x1b[31m\x07\x9b\u202etxt.exe\u2028\n"
        client = start(CLIENT, gateway.place, "--project", "evil")
        client.until("<- subscription_confirmed")
        send_update(gateway.platform, project_id="evil", type="e\x1b[2J\u202e", data={"x": evil})
        line = client.until("<- e")
        assert r"<- e\u001b[2J\u202e " in line
        assert r"\u001b[31m\u0007\u009b\u202etxt.exe\u2028\n" in line
        assert line.isprintable()

    def test_peer_cannot_end_the_client(self) -> None:
        """Nonsense from the server is shown as it is; it ends nothing."""
        nonsense = [
            *("", "hello", "[]", '"\\ud800"', '{"type":["x"],"project_id":{}}', "9" * 5000),
            *(
                '{"type":"reconnect","after_ms":1e999}',
                '{"type":"note","project_id":"p","seq":1e9}',
            ),
            '{"type":"subscription_confirmed","project_id":"p","seq":"x","epoch":5,"recovered":1}',
            *(f'{{"type":"deep","x":{"[" * depth}{"]" * depth}}}' for depth in range(900, 1000, 5)),
        ]

        def rave(websocket: ServerConnection) -> None:
            for message in nonsense:
                websocket.send(message)
            websocket.send(b"\x00\x1b")
            say(websocket, "the end")
            websocket.recv(TIMEOUT_S)
            websocket.close(1008, "\x1b[2J")

        with websocket_stub(rave) as place:
            result = run(CLIENT, place, "--project", "p", "--listen")
        shown = result.stdout.splitlines()
        assert len([line for line in shown if "<-" in line]) == len(nonsense) + 1
        assert "a binary message of 2 bytes: 00 1b" in result.stdout
        assert all(line.isprintable() for line in [*shown, *result.stderr.splitlines()])
        assert "Traceback" not in result.stderr
        assert result.returncode == 1

    def test_json_lines_are_the_messages(
        self, gateway: Gateway, start: Callable[..., Process]
    ) -> None:
        """With --json, what is escaped for the terminal is still the same JSON."""
        evil = {"x": "\x1b[31m\u202e \U000e0041 größer"}
        client = start(CLIENT, gateway.place, "--project", "raw", "--json")
        client.until('"subscription_confirmed"')
        send_update(gateway.platform, project_id="raw", type="note", data=evil)
        line = client.until('"note"')
        assert json.loads(line)["data"] == evil
        assert line.isprintable()

    def test_console_of_another_encoding(self, gateway: Gateway) -> None:
        """What a console cannot show is escaped; a BOM and CRLF, as PowerShell sends, are read."""
        environment = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
        result = run(CLIENT, gateway.place, typed="\ufeffraw \u2713\r\n", environment=environment)
        assert r"-> \u2713" in result.stdout
        assert "invalid_json" in result.stdout
        assert result.returncode == 0

    @posix
    @needs_editor
    def test_terminal(self) -> None:
        """A terminal gets colours and a history, and is left as it was in the middle of a line."""
        # The second line is the first one again, by the key for "up".
        printed, unchanged = type_into_terminal([b"ping\r", b"\x1b[A\r"])
        assert b"\x1b[32m<- pong" in printed
        assert unchanged

    @posix
    @needs_editor
    @pytest.mark.parametrize(("key", "code"), [(b"\x03", 130), (b"\x04", 0)], ids=["c", "d"])
    def test_leaves_the_terminal_in_order(self, key: bytes, code: int) -> None:
        """Ctrl-C and Ctrl-D end the connection with 1000, and the terminal is as it was."""
        import pty
        import termios

        codes: SimpleQueue[int | None] = SimpleQueue()

        def listen(websocket: ServerConnection) -> None:
            say(websocket, "connected", **CONNECTED)
            with contextlib.suppress(ConnectionClosed):
                websocket.recv(TIMEOUT_S)
            codes.put(websocket.close_code)

        ours, theirs = pty.openpty()
        before = termios.tcgetattr(theirs)
        environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        with websocket_stub(listen) as place:
            client = subprocess.Popen(
                [sys.executable, CLIENT, place],
                cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
            )  # fmt: skip
            printed = b""
            # The last is what announces the prompt: from then on keys are read one by one.
            while b"\x1b[?2004h" not in printed.partition(b"connected")[2]:
                printed += os.read(ours, 65536)
            os.write(ours, key)
            reader = threading.Thread(target=os.read, args=(ours, 65536), daemon=True)
            reader.start()
            assert client.wait(TIMEOUT_S) == code
            assert codes.get(timeout=TIMEOUT_S) == 1000
        assert termios.tcgetattr(theirs) == before
        os.close(theirs)
        reader.join()
        os.close(ours)

    @posix
    @needs_editor
    def test_pasted_lines(self) -> None:
        """JSON that is pasted over several lines is one message."""
        pasted = b'\x1b[200~{\r  "action": "ping"\r}\x1b[201~\r'
        printed, _ = type_into_terminal([pasted, b"ping\r"])
        assert b"not valid" not in printed

    @posix
    def test_terminal_without_an_editor(self, tmp_path: Path) -> None:
        """Without prompt_toolkit, lines are read as they are."""
        (tmp_path / "prompt_toolkit.py").write_text("raise ImportError")
        printed, unchanged = type_into_terminal([b"ping\n", b"ping\n"], PYTHONPATH=str(tmp_path))
        assert b"\x1b[32m<- pong" in printed
        assert unchanged

    @pytest.mark.parametrize("way", ["quit", "end of input", "ctrl-c"])
    def test_leaves_in_order(self, start: Callable[..., Process], way: str) -> None:
        """However a person leaves, the server sees a normal closure."""
        codes: SimpleQueue[int | None] = SimpleQueue()

        def listen(websocket: ServerConnection) -> None:
            say(websocket, "connected", **CONNECTED)
            with contextlib.suppress(ConnectionClosed):
                websocket.recv(TIMEOUT_S)
            codes.put(websocket.close_code)

        with websocket_stub(listen) as place:
            client = start(CLIENT, place)
            client.until("<- connected")
            assert client.popen.stdin is not None
            if way == "quit":
                client.type("quit")
            elif way == "ctrl-c":
                client.popen.send_signal(signal.SIGINT)
            else:
                client.popen.stdin.close()
            assert client.end() == (130 if way == "ctrl-c" else 0)
            assert codes.get(timeout=TIMEOUT_S) == 1000
        assert "Traceback" not in "\n".join(client.seen)

    @pytest.mark.parametrize(
        ("typed", "sent"),
        [
            ('{\n  "action":\n  "ping"\n}\nping\n', ["ping", "ping"]),
            ('forward qa {"a":\n\n[1,\n2]}\nping\n', ["forward", "ping"]),
            ('{"action":"ping"}\n{"action":\n"ping"}', ["ping", "ping"]),
        ],
    )
    def test_json_over_several_lines(self, gateway: Gateway, typed: str, sent: list[str]) -> None:
        """JSON that goes on in the next line is one message."""
        result = run(CLIENT, gateway.place, typed=typed)
        assert re.findall(r"-> (\w+)", result.stdout) == sent
        assert "not valid" not in result.stdout

    def test_server_speaks_first(self, gateway: Gateway) -> None:
        """What the client wants comes after `connected`, on the screen too."""
        result = run(CLIENT, gateway.place, "--project", "p", typed="ping\n")
        shown = re.findall(r"(?:<-|->) \w+", result.stdout)
        assert shown[:2] == ["<- connected", "-> subscribe"]


class TestResuming:
    """`test-websocket.py` when the connection is lost."""

    def test_server_restarts(self, moto_aws: MotoAws, start: Callable[..., Process]) -> None:
        """What happens while the server is down arrives after its restart, once and in order."""
        platform = moto_aws.create_platform(prefix="clients-restart")

        def tell(number: int) -> None:
            send_update(platform, project_id="p", type="note", data=number)

        server, port = start_server(platform)
        try:
            client = start(CLIENT, f"127.0.0.1:{port}", "--listen", "--project", "p")
            client.until("<- subscription_confirmed")
            tell(1)
            client.until('<- note .*"seq":1')
            server.kill()
            client.until("-- connection lost")
            client.until("-- connecting again in ")
            tell(2)
            server, _ = start_server(platform, port)
            client.until('-> subscribe .*"since":1,"epoch":')
            client.until('<- subscription_confirmed .*"recovered":true.*resumed after 1')
            tell(3)
            client.until('<- note .*"seq":3')
        finally:
            server.kill()
        notes = [line for line in client.seen if "<- note" in line]
        assert [re.findall(r'"data":(\d)', line) for line in notes] == [["1"], ["2"], ["3"]]
        assert not any("seen before" in line or "gap" in line for line in notes)

    def test_reconnect_delay_is_obeyed(self, start: Callable[..., Process]) -> None:
        """After `reconnect` the client comes back when the server asked it to, not before."""
        times: list[float] = []

        def restart(websocket: ServerConnection) -> None:
            times.append(time.monotonic())
            say(websocket, "connected", **CONNECTED)
            if len(times) == 1:
                say(websocket, "reconnect", after_ms=700)
                websocket.close(1012, "draining")
            else:
                websocket.recv(TIMEOUT_S)

        with websocket_stub(restart) as place:
            client = start(CLIENT, place)
            client.until("-- connection lost: 1012, the server restarts: draining")
            client.until("-- connecting again in 0.[67] s")
            client.until("<- connected")
            client.type("quit")
            assert client.end() == 0
        assert 0.65 <= times[1] - times[0] < 5

    def test_unconfirmed_forward_is_reported(self, start: Callable[..., Process]) -> None:
        """A forward that lost its connection before its confirmation is named."""

        def lose(websocket: ServerConnection) -> None:
            say(websocket, "connected", **CONNECTED)
            websocket.recv(TIMEOUT_S)
            websocket.close(1011)

        with websocket_stub(lose) as place:
            client = start(CLIENT, place)
            client.type('{"action":"forward","type":"dev","message_id":"m-1"}')
            client.until("-- forward m-1 was not confirmed")
            client.kill()

    def test_gaps_and_repetitions_are_pointed_out(self, start: Callable[..., Process]) -> None:
        """A seq that comes twice and one that is missing are remarked upon."""

        def stutter(websocket: ServerConnection) -> None:
            say(websocket, "connected", **CONNECTED)
            websocket.recv(TIMEOUT_S)
            say(websocket, "subscription_confirmed", project_id="p", seq=1, epoch="e")
            for seq in (2, 2, 5):
                say(websocket, "note", project_id="p", seq=seq, data=None)
            say(websocket, "note", project_id="p", data=None)
            websocket.recv(TIMEOUT_S)

        with websocket_stub(stutter) as place:
            client = start(CLIENT, place, "--project", "p")
            notes = [client.until("<- note") for _ in range(4)]
            client.type("quit")
            assert client.end() == 0
        remarks = [line.partition("} ")[2] for line in notes]
        assert remarks == ["", "(seen before, the last was 2)", "(gap: 3 to 4 did not arrive)", ""]

    def test_log_that_does_not_reach_back(self, start: Callable[..., Process]) -> None:
        """`recovered: false` is said in words, and the position is the server's."""
        requests: list[dict[str, Any]] = []

        def forget(websocket: ServerConnection) -> None:
            say(websocket, "connected", **CONNECTED)
            requests.append(json.loads(websocket.recv(TIMEOUT_S)))
            number = len(requests)
            answer: dict[str, Any] = {"project_id": "p", "seq": 10 * number, "epoch": f"e{number}"}
            if number > 1:
                answer["recovered"] = False
            say(websocket, "subscription_confirmed", **answer)
            if number < 3:
                websocket.close(1012)
            else:
                websocket.recv(TIMEOUT_S)

        with websocket_stub(forget) as place:
            client = start(CLIENT, f"{place}/?project_id=p")
            client.until("fetch the project's state anew")
            client.until("fetch the project's state anew")
            client.type("quit")
            assert client.end() == 0
        subscribe = {"action": "subscribe", "project_id": "p"}
        assert requests == [
            subscribe,
            {**subscribe, "since": 10, "epoch": "e1"},
            {**subscribe, "since": 20, "epoch": "e2"},
        ]

    def test_log_that_is_shorter_than_before(self, start: Callable[..., Process]) -> None:
        """A log that ends before what the client has is another one, and not too short."""

        def restored(websocket: ServerConnection) -> None:
            say(websocket, "connected", **CONNECTED)
            asked = json.loads(websocket.recv(TIMEOUT_S))
            answer: dict[str, Any] = {"project_id": "p", "seq": 3, "epoch": "e1"}
            if asked.get("since") == 7:
                say(websocket, "subscription_confirmed", **answer, recovered=False)
                websocket.recv(TIMEOUT_S)
            say(websocket, "subscription_confirmed", **{**answer, "seq": 7})
            websocket.close(1012)

        with websocket_stub(restored) as place:
            client = start(CLIENT, f"{place}/?project_id=p")
            client.until("the log was replaced by another one: fetch the project's state anew")
            client.type("quit")
            assert client.end() == 0

    @pytest.mark.parametrize(("code", "advice"), [(1008, "send less"), (4401, "--token")])
    def test_refusal_is_final(self, code: int, advice: str) -> None:
        """A close code that says "not you" ends the client with exit code 1."""

        def refuse(websocket: ServerConnection) -> None:
            say(websocket, "connected", **CONNECTED)
            websocket.close(code, "no")

        with websocket_stub(refuse) as place:
            result = run(CLIENT, place, "--listen")
        assert f"error: connection closed ({code}, " in result.stderr
        assert advice in result.stderr.partition("next:")[2]
        assert result.returncode == 1


class TestNoConnection:
    """`test-websocket.py` where there is nothing to talk to."""

    def test_refused(self) -> None:
        """A refused connection says what to start."""
        port = free_port()
        result = run(CLIENT, f"127.0.0.1:{port}")
        problem, advice = result.stderr.splitlines()
        assert problem == f"error: connection refused: nothing listens at 127.0.0.1:{port}"
        assert advice == "next:  start the server (make run), or check host and port"
        assert result.returncode == 1

    def test_refused_with_input(self) -> None:
        """Typed lines that come to nothing add no words of Python's own."""
        port = free_port()
        result = run(CLIENT, f"127.0.0.1:{port}", typed="ping\n" * 100)
        assert len(result.stderr.splitlines()) == 2
        assert result.returncode == 1

    def test_refused_once(self) -> None:
        """With --once the same is one FAIL line."""
        port = free_port()
        result = run(CLIENT, f"127.0.0.1:{port}", "--once")
        assert re.match("FAIL connected    connection refused: .* Next: ", result.stdout)
        assert result.returncode == 1

    @pytest.mark.parametrize(
        ("status", "advice"),
        [(404, "/ws"), (503, "starting, draining")],
    )
    def test_http_status(self, status: int, advice: str) -> None:
        """Another HTTP answer than the upgrade is named, with the next step."""
        with http_stub(status) as place:
            result = run(CLIENT, place)
        assert result.stderr.startswith(f"error: the server answered HTTP {status}: starting\n")
        assert advice in result.stderr.partition("next:")[2]
        assert result.returncode == 1

    def test_no_tls_there(self, gateway: Gateway) -> None:
        """wss:// to a port without TLS suggests ws://."""
        result = run(CLIENT, f"wss://{gateway.place}")
        assert "does not answer in TLS" in result.stderr
        assert "try ws://" in result.stderr
        assert result.returncode == 1

    def test_token_is_a_bearer_header(self) -> None:
        """The token goes into the Authorization header, and onto no screen."""
        seen: list[dict[str, str]] = []
        with http_stub(401, seen) as place:
            by_option = run(CLIENT, place, "--token", "abc.def")
            by_variable = run(CLIENT, place, environment={"WEBSOCKET_TOKEN": "ghi.jkl"})
        assert [h["Authorization"] for h in seen] == ["Bearer abc.def", "Bearer ghi.jkl"]
        assert "abc.def" not in by_option.stdout + by_option.stderr
        assert "ghi.jkl" not in by_variable.stdout + by_variable.stderr

    @pytest.mark.parametrize(
        "arguments",
        [
            [CLIENT, "ftp://host"],
            [CLIENT, "host", "--timeout", "0"],
            [CLIENT, "host", "--timeout", "1e3"],
            [CLIENT, "host", "--token", "two words"],
            [CHECKER, "ws://"],
            [CHECKER, "host", "--max-message-bytes", "-1"],
        ],
    )
    def test_wrong_command_line(self, arguments: list[str]) -> None:
        """A wrong command line is exit code 2 and a sentence."""
        result = run(*arguments)
        assert result.returncode == 2
        assert "error: " in result.stderr
        assert "Traceback" not in result.stderr


class TestCommandLine:
    """What both programs say of themselves."""

    @pytest.mark.parametrize("program", [CLIENT, CHECKER])
    def test_missing_package(self, program: str) -> None:
        """A Python that lacks a package is told what to install, without a traceback."""
        result = run("-S", program, "127.0.0.1:8080")
        assert "lacks the package websockets" in result.stderr
        assert "make run" in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.returncode == 1

    @pytest.mark.parametrize("arguments", [[CLIENT], [CLIENT, "publish"], [CHECKER]])
    def test_help(self, arguments: list[str]) -> None:
        """Defaults are in words, not in Python."""
        result = run(*arguments, "--help")
        assert result.returncode == 0
        assert not re.search(r"default: (None|True|False|\[|\d+\.0)", result.stdout)


class TestIntegrationTest:
    """`integration_test.py`."""

    def test_gateway_passes(self, gateway: Gateway) -> None:
        """Every check passes against the real server with an agent, and none is skipped."""
        result = run(CHECKER, gateway.place, "--json")
        *checks, summary = [json.loads(line) for line in result.stdout.splitlines()]
        assert [c for c in checks if c["result"] != "ok"] == []
        assert summary["summary"] == {"ok": len(checks), "failed": 0, "skipped": 0}
        assert len({c["check"] for c in checks}) == len(checks)
        assert result.returncode == 0

    def test_faults_are_found(self) -> None:
        """A server that only echoes fails, and the lines say what was expected."""

        def echo(websocket: ServerConnection) -> None:
            say(websocket, "connected", **CONNECTED)
            for message in websocket:
                websocket.send(message)

        with websocket_stub(echo) as place:
            result = run(CHECKER, place, "--timeout", "0.3", "-k", "message:")
        lines = result.stdout.splitlines()
        assert re.search(
            r"^FAIL .*`ping` is answered.*: nothing within 0.3 s$", result.stdout, re.MULTILINE
        )
        assert re.match(r"\d+ checks in .*: 0 ok, \d+ failed, 0 skipped", lines[-1])
        assert result.returncode == 1

    def test_no_forward(self, gateway: Gateway) -> None:
        """--no-forward skips what would reach an agent, and says so."""
        result = run(CHECKER, gateway.place, "--no-forward", "-k", "forward: ")
        verdicts = {line.split()[0] for line in result.stdout.splitlines()[:-1]}
        assert verdicts == {"skip"}
        assert result.returncode == 0

    def test_out_of_reach(self) -> None:
        """A gateway that cannot be reached is one error, not a hundred."""
        port = free_port()
        result = run(CHECKER, f"127.0.0.1:{port}")
        assert result.stdout == ""
        problem, advice = result.stderr.splitlines()
        assert problem == f"error: connection refused: nothing listens at 127.0.0.1:{port}"
        assert advice.startswith("next:  ")
        assert result.returncode == 1

    def test_unknown_check(self, gateway: Gateway) -> None:
        """-k without a match is a wrong command line, not a success."""
        assert run(CHECKER, gateway.place, "-k", "no such check").returncode == 2

    def test_pytest_collects_nothing(self) -> None:
        """It is a program: pytest finds no test in it, even when it is told to look."""
        result = run("-m", "pytest", "--collect-only", "-q", "--noconftest", CHECKER)
        assert "no tests collected" in result.stdout
        assert result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED


class TestPublish:
    """`test-websocket.py publish`: an agent's part, by hand."""

    def publish(
        self, platform: Platform, *arguments: str, queue: str = "updates"
    ) -> subprocess.CompletedProcess[str]:
        environment = {"SQS_QUEUE_URL_UPDATES": platform.queue_urls[queue], "AWS_PROFILE": "absent"}
        return run(CLIENT, "publish", *arguments, environment=environment)

    def test_reaches_subscribers(self, gateway: Gateway, start: Callable[..., Process]) -> None:
        """Words and JSON arrive as events, an ephemeral one without `seq`."""
        client = start(CLIENT, gateway.place, "--project", "by hand", "--json")
        client.until("subscription_confirmed")
        for arguments in (
            ["hello, browser"],
            ['{"a":[1]}', "--type", "built"],
            ["x", "--ephemeral"],
        ):
            result = self.publish(gateway.platform, "by hand", *arguments)
            assert result.returncode == 0, result.stderr
            assert result.stdout.startswith("sent: ")
        first = json.loads(client.until("hello, browser"))
        assert (first["type"], first["data"]) == ("project_updated", {"message": "hello, browser"})
        second = json.loads(client.until("built"))
        assert (second["data"], second["seq"]) == ({"a": [1]}, first["seq"] + 1)
        assert "seq" not in json.loads(client.until('"x"'))

    def test_fifo_queue(self, fifo_platform: Platform) -> None:
        """A FIFO queue gets a group and an id for each message."""
        for text in ("one", "one"):
            assert self.publish(fifo_platform, "a b", text).returncode == 0
        sqs, url = fifo_platform.client("sqs"), fifo_platform.queue_urls["updates"]
        messages = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10)["Messages"]
        assert [json.loads(m["Body"])["project_id"] for m in messages] == ["a b", "a b"]

    def test_failure_is_a_sentence(self, gateway: Gateway) -> None:
        """A queue that is not there is said, without a traceback."""
        missing = gateway.platform.queue_urls["updates"] + "-absent"
        result = run(CLIENT, "publish", "p", "x", "--queue", missing)
        assert result.returncode == 1
        assert result.stderr.startswith("error: SQS did not take the update: ")
        assert "Traceback" not in result.stderr

    def test_queue_is_needed(self) -> None:
        """Without a queue the command line is wrong."""
        kept = {"SQS_QUEUE_URL_UPDATES": ""}
        result = run(CLIENT, "publish", "p", "x", environment=kept)
        assert result.returncode == 2
        assert "--queue" in result.stderr
