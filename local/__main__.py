"""`python -m local`: the whole platform on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, NoReturn

try:
    from aws_standin import Platform, without_aws
    from aws_standin.model import REGION
    from aws_standin.thread import ThreadedStandIn
except ModuleNotFoundError as error:
    sys.exit(
        f"{error}. `make run` sets up all that is needed, or: pip install -r requirements-dev.txt"
    )
from local.child import Child
from local.console import console_link, serve_console

HOST = "127.0.0.1"
MAX_TASKS = 16
READY_TIMEOUT_S = 60.0
HEALTH_TIMEOUT_S = 2.0
TICK_S = 0.25
"""How long the wait for a line of output lasts: on Windows, Ctrl-C is noticed between two."""

DRAIN_SECONDS = 2
"""For the servers, unless the environment says otherwise: nobody waits for a laptop to drain."""
STOP_TIMEOUT_S = 130.0
"""Then the servers are killed. Longer than the time that ECS can give them."""


class LocalError(Exception):
    """Something did not start, or ended by itself. The message says what to do next."""


# --- What a person sees ---


COLORS = {"WARNING": "33", "ERROR": "31", "CRITICAL": "31", "name": "36", "banner": "1"}


def colored(text: str, color: str) -> str:
    """Return `text` in a colour of COLORS when it goes to a terminal that shows colours."""
    code = COLORS.get(color)
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or sys.platform == "win32"
    return text if plain or code is None else f"\033[{code}m{text}\033[0m"


def log_line(name: str, line: str) -> str | None:
    """Return a child's line of output as a person reads it, or None when it is for machines."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        return _columns(datetime.now().astimezone(), name, "", printable(line))
    if "message" not in record or "_aws" in record:  # figures, for CloudWatch
        return None
    level = str(record.pop("level", ""))
    try:
        when = datetime.fromisoformat(record.pop("time")).astimezone()
    except (KeyError, TypeError, ValueError):
        when = datetime.now().astimezone()
    text = printable(str(record.pop("message")))
    for key, value in record.items():
        if isinstance(value, str) and "\n" in value:  # a traceback
            text += "".join(f"\n    {printable(part)}" for part in value.splitlines())
        else:
            text += f"  {key}={field(value)}"
    return _columns(when, name, level, text)


def _columns(when: datetime, name: str, level: str, text: str) -> str:
    return f"{when:%H:%M:%S} {colored(f'{name:<11}', 'name')} {colored(f'{level:<8}{text}', level)}"


def field(value: Any) -> str:
    """Return a value of a log record: words as they are, all else as JSON."""
    if isinstance(value, str) and value and value.isprintable() and " " not in value:
        return value
    return json.dumps(value)


def printable(text: str) -> str:
    """Return `text` without characters that could steer the terminal: a client may have sent it."""
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def banner(platform: Platform, console: str, ports: list[int]) -> str:
    """Return what to try next; `console` is where the console page is."""
    python = "python"
    with contextlib.suppress(ValueError):  # another drive, on Windows
        relative = os.path.relpath(sys.executable)
        python = python if relative.startswith("..") else relative
    urls = [f"ws://{HOST}:{port}" for port in ports]
    clients = "\n    ".join(f"{python} test-websocket.py {url}" for url in urls)
    url = urls[0]
    order = (
        '{"action":"forward","type":"dev","project_id":"proj_123","data":{"task":"A login page"}}'
    )
    update = {"project_id": "proj_123", "type": "project_updated", "data": {"hello": "browser"}}
    arguments = [
        *("aws", "--region", REGION, "--endpoint-url", platform.endpoint_url),
        *("sqs", "send-message", "--queue-url", platform.queue_urls["updates"]),
        *("--message-body", json.dumps(update)),
    ]
    if platform.queue_urls["updates"].endswith(".fifo"):
        arguments += ["--message-group-id", "proj_123"]
    if sys.platform == "win32":
        credentials = "set AWS_ACCESS_KEY_ID=local&& set AWS_SECRET_ACCESS_KEY=local&&"
        aws_cli = subprocess.list2cmdline(arguments)
    else:
        credentials = "AWS_ACCESS_KEY_ID=local AWS_SECRET_ACCESS_KEY=local"
        aws_cli = shlex.join(arguments)
    return f"""
{colored(f"Ready: {', '.join(urls)}", "banner")}

  In another terminal, a client to type into, or a round trip that checks itself:
    {clients}
    {python} test-websocket.py {url} --once

  In a browser, the console page:
    {console_link(console, f"{url}/ws", "proj_123")}

  In the JavaScript console of any page, an order to an agent and its answers:
    ws = new WebSocket("{url}/ws?project_id=proj_123")
    ws.onmessage = event => console.log(event.data)
    ws.onopen = () => ws.send('{order}')

  What an agent does, by hand:
    {credentials} {aws_cli}

  Ctrl-C ends all of it.
"""


# --- What runs ---


class Local:
    """The embedded AWS, the agents and the servers, started and ended in this order and back."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.lines: SimpleQueue[tuple[Child, str | None]] = SimpleQueue()
        self.aws: ThreadedStandIn | None = None
        self.platform: Platform | None = None
        self.in_this_process = contextlib.ExitStack()
        self.agents: Child | None = None
        self.servers: list[Child] = []
        self.ports: dict[Child, int] = {}
        """Of the servers that accept connections."""
        self.ended: set[Child] = set()
        """Those whose last line has been shown."""

    def run(self) -> NoReturn:
        """Start everything, and show what happens until Ctrl-C. Raises LocalError."""
        platform = self.start()
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self.ready():
            if time.monotonic() > deadline:
                raise LocalError(
                    f"The server is not ready after {READY_TIMEOUT_S:.0f} s; see above."
                )
            self.show_next_line()
        console = self.in_this_process.enter_context(serve_console())
        ports = [self.ports[server] for server in self.servers]
        print(banner(platform, console, ports), flush=True)
        while True:
            self.show_next_line()

    def start(self) -> Platform:
        """Start the processes; they are not ready yet."""
        options = self.options
        ports = [options.port + n if options.port else 0 for n in range(options.tasks)]
        for port, option in [(options.aws_port, "--aws-port"), *((p, "--port") for p in ports)]:
            require_free(port, option)
        print("Starting an embedded AWS, the sample agents and the server ...", flush=True)
        self.aws = aws = ThreadedStandIn(options.aws_port)
        self.platform = aws.call(lambda: aws.stand_in.create_platform(fifo_updates=options.fifo))
        environment = without_aws(os.environ) | self.platform.environment()
        self.agents = Child("agents", ["-m", "local.event_source"], environment, self.lines)
        for number, port in enumerate(ports, start=1):
            self.servers.append(self.start_server(f"server-{number}", port))
        return self.platform

    def start_server(self, name: str, port: int) -> Child:
        assert self.platform is not None
        environment = without_aws(os.environ) | self.platform.environment(port)
        environment.setdefault("DRAIN_SECONDS", str(DRAIN_SECONDS))
        return Child(name, ["server.py"], environment, self.lines)

    def ready(self) -> bool:
        """Return whether every server can do its job."""
        return len(self.ports) == len(self.servers) and all(map(healthy, self.ports.values()))

    def show_next_line(self) -> None:
        """Print the next line, if one comes soon. Raises LocalError when something has ended."""
        child = self.show_line()
        if child in self.ended:
            self.replace(child)

    def show_line(self) -> Child | None:
        """Print the next line, if one comes soon; return whose it is, also if it was its end."""
        try:
            child, line = self.lines.get(timeout=TICK_S)
        except Empty:
            return None
        if line is None:
            self.ended.add(child)
            return child
        if child in self.servers and child not in self.ports:
            port = listening_port(line)
            if port is not None:
                self.ports[child] = port
        text = log_line(child.name, line)
        if text is not None:
            print(text, flush=True)
        return child

    def replace(self, child: Child) -> None:
        """Start a server that has ended anew, as ECS would, if others go on meanwhile.

        Raises LocalError where that would hide a fault.
        """
        fate = f"{child.name} ended by itself (exit code {child.process.wait()})"
        if child not in self.ports or len(self.servers) == 1:
            raise LocalError(f"{fate}; see above.")
        print(colored(f"{fate}; starting another in its place.", "ERROR"), flush=True)
        position = self.servers.index(child)
        self.servers[position] = self.start_server(child.name, self.ports.pop(child))

    def stop(self) -> None:
        """End everything: the servers first, as they still have to talk to AWS."""
        # 1. The servers tell their clients, flush and delete their queues.
        for server in self.servers:
            if server.running:
                server.interrupt()
        # 2. What they print meanwhile is shown, until they are done or their time is up.
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while not self.ended.issuperset(self.servers) and time.monotonic() < deadline:
            self.show_line()
        for server in self.servers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(max(0.0, deadline - time.monotonic()))
        # 3. The rest has nothing to lose.
        self.kill()

    def kill(self) -> None:
        """End everything at once."""
        for child in [*self.servers, *([self.agents] if self.agents else [])]:
            if child in self.servers and child.running:
                print(f"{child.name} did not end in time, and was killed.", flush=True)
            child.kill()
        if self.aws is not None:
            self.aws.close()
        self.in_this_process.close()


def listening_port(line: str) -> int | None:
    """Return the port of a server's "listening" log line, or None for any other line."""
    try:
        record = json.loads(line)
        return int(record["port"]) if record["message"] == "listening" else None
    except (ValueError, TypeError, KeyError):
        return None


def healthy(port: int) -> bool:
    """Return whether the server on `port` says that it can do its job."""
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with without_proxy.open(f"http://{HOST}:{port}/health", timeout=HEALTH_TIMEOUT_S):
            return True
    except OSError:  # not listening, too slow, or 503
        return False


def require_free(port: int, option: str) -> None:
    """Raise Failure when something listens on `port` already (0: any free one, always good)."""
    with socket.socket() as probe:
        if sys.platform != "win32":  # there it would mean to take the port from its owner
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            make = f" (make run PORT={port + 10})" if option == "--port" else ""
            raise LocalError(
                f"Port {port} cannot be used: {error.strerror}. End what listens there, "
                f"or choose another: python -m local {option} {port + 10}{make}"
            ) from None


# --- The command ---


def port_number(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535 - MAX_TASKS:
        raise ValueError
    return number


def task_count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= MAX_TASKS:
        raise ValueError
    return number


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m local",
        description="Run the whole platform on this machine: an embedded AWS, sample agents and "
        "the server itself. Nothing leaves this machine, and nothing is kept when it ends.",
        epilog="All settings of server.py can be given in the environment as usual.",
    )
    parser.add_argument(
        "--port",
        type=port_number,
        default=8080,
        help="the server's port; further tasks get the next ones; 0: free ones (default: 8080)",
    )
    parser.add_argument(
        "--aws-port",
        type=port_number,
        default=0,
        metavar="PORT",
        help="the embedded AWS's port (default: a free one)",
    )
    parser.add_argument(
        "--tasks",
        type=task_count,
        default=os.environ.get("TASKS") or "1",
        help=f"how many servers run side by side, 1 to {MAX_TASKS} (default: $TASKS, or 1)",
    )
    parser.add_argument("--fifo", action="store_true", help="make the updates queue a FIFO queue")
    return parser.parse_args()


def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    options = parse_options()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # A closed terminal and a plain `kill` end everything as Ctrl-C does.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), interrupt)
    local = Local(options)
    status = 0
    try:
        try:
            local.run()
        except KeyboardInterrupt:
            print("\nStopping; Ctrl-C again to stop at once ...", flush=True)
        except LocalError as failure:
            print(f"\n{colored(str(failure), 'ERROR')}", file=sys.stderr, flush=True)
            status = 1
        local.stop()
    except KeyboardInterrupt:
        pass
    finally:
        local.kill()
    return status


if __name__ == "__main__":
    sys.exit(main())
