"""`python -m local`: the whole platform on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from queue import Empty, SimpleQueue
from types import FrameType

from local import lacking

try:
    from aws_standin import Platform, without_aws
    from aws_standin.thread import ThreadedStandIn
except ModuleNotFoundError as error:
    sys.exit(lacking(error))
from local.child import Child
from local.console import console_link, serve_console
from local.ports import port_number, port_refused
from local.screen import Screen, colored, log_line

HOST = "127.0.0.1"
MAX_TASKS = 16
READY_TIMEOUT_S = 60.0
HEALTH_TIMEOUT_S = 2.0
TICK_S = 0.25
"""How long one wait for a line of output lasts: signals are acted upon between two."""

DRAIN_SECONDS = 2
"""For the servers, unless the environment says otherwise: nobody waits for a laptop to drain."""
STOP_TIMEOUT_S = 130.0
"""Then the servers are killed. Longer than the time that ECS can give them."""


class LocalError(Exception):
    """Something did not start, or ended by itself. The message says what to do next."""


class Interrupted(Exception):
    """A signal, a closed terminal or the end of the parent asks to end everything."""


# --- What a person sees ---


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

  In an agent's place, an update for the browsers that watch proj_123:
    {python} test-websocket.py publish proj_123 "hello, browser" \\
      --queue {platform.queue_urls["updates"]}

  Ctrl-C ends all of it.
"""


# --- What runs ---


class Local:
    """The stand-in for AWS, the agents and the servers, started in this order and ended in reverse.

    The stand-in is a thread of this process. The others are children that end when this process
    does, however it does; to end in order is a courtesy to those who look on.
    """

    def __init__(self, options: argparse.Namespace, screen: Screen) -> None:
        self.options = options
        self.screen = screen
        self.interruptions = 0
        """How often somebody has asked for the end; the second time, nothing is waited for."""
        self.lines: SimpleQueue[tuple[Child, str | None]] = SimpleQueue()
        self.in_this_process = contextlib.ExitStack()
        self.platform: Platform | None = None
        self.agents: Child | None = None
        self.servers: list[Child] = []
        self.ports: dict[Child, int] = {}
        """Of the servers that accept connections."""
        self.ended: set[Child] = set()
        """Those whose last line has been shown."""
        self._parent = os.getppid() if options.end_with_parent else None

    def interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        """Note that a signal came; it is acted upon between two lines, never within something."""
        self.interruptions += 1

    def run(self) -> None:
        """Start everything, and show what happens. Raises Interrupted, LocalError."""
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
        self.screen.show(banner(platform, console, ports))
        while True:
            self.show_next_line()

    def start(self) -> Platform:
        """Start the processes; they are not ready yet."""
        options = self.options
        ports = [options.port + n if options.port else 0 for n in range(options.tasks)]
        for port, option in [(options.aws_port, "--aws-port"), *((p, "--port") for p in ports)]:
            require_free(port, option)
        self.screen.show("Starting a stand-in for AWS, the sample agents and the server ...")
        aws = ThreadedStandIn(options.aws_port)
        self.in_this_process.callback(aws.close)
        self.platform = platform = aws.call(
            lambda: aws.stand_in.create_platform(fifo_updates=options.fifo)
        )
        environment = without_aws(os.environ) | platform.environment()
        self.agents = Child("agents", ["-m", "local.event_source"], environment, self.lines)
        for number, port in enumerate(ports, start=1):
            self.servers.append(self.start_server(f"server-{number}", port))
        return platform

    def start_server(self, name: str, port: int) -> Child:
        assert self.platform is not None
        environment = without_aws(os.environ) | self.platform.environment(port)
        environment["DRAIN_SECONDS"] = os.environ.get("DRAIN_SECONDS") or str(DRAIN_SECONDS)
        return Child(name, ["-m", "local.child", "server.py"], environment, self.lines)

    def ready(self) -> bool:
        """Return whether every server can do its job."""
        return len(self.ports) == len(self.servers) and all(map(healthy, self.ports.values()))

    def show_next_line(self) -> None:
        """Show the next line, if one comes soon. Raises Interrupted, LocalError."""
        orphaned = self._parent is not None and os.getppid() != self._parent
        if self.interruptions or self.screen.lost or orphaned:
            raise Interrupted
        child = self.show_line()
        if child in self.ended:
            self.replace(child)

    def show_line(self) -> Child | None:
        """Show the next line, if one comes soon; return whose it is, also if it was its end."""
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
            self.screen.show(text)
        return child

    def replace(self, child: Child) -> None:
        """Start a server that has ended anew, as ECS would, if others go on meanwhile.

        Raises LocalError where that would hide a fault.
        """
        fate = f"{child.name} ended by itself (exit code {child.process.wait()})"
        if child not in self.ports or len(self.servers) == 1:
            raise LocalError(f"{fate}; see above.")
        self.screen.show(colored(f"{fate}; starting another in its place.", "ERROR"))
        position = self.servers.index(child)
        self.servers[position] = self.start_server(child.name, self.ports.pop(child))

    def stop(self) -> None:
        """End everything: the servers first, as they still have to talk to AWS."""
        # 1. The servers tell their clients, flush and delete their queues.
        for server in self.servers:
            if server.running:
                server.interrupt()
        # 2. What they print meanwhile is shown, until they are done, their time is up or somebody
        #    asks again.
        asked = self.interruptions
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while not self.ended.issuperset(self.servers) and self.interruptions == asked:
            if time.monotonic() > deadline:
                self.screen.show("The servers did not end in time, and are killed.")
                break
            self.show_line()
        # 3. The rest has nothing to lose.
        self.kill()

    def kill(self) -> None:
        """End everything at once."""
        for child in [*self.servers, *([self.agents] if self.agents else [])]:
            child.kill()
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
    """Raise LocalError when something listens on `port` already (0: any free one, always good)."""
    with socket.socket() as probe:
        if sys.platform != "win32":  # there it would mean to take the port from its owner
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            make = [f"make run PORT={port + 10}"] if option == "--port" else []
            command = f"python -m local {option} {port + 10}"
            raise LocalError(port_refused(port, error, *make, command)) from None


# --- The command ---


def task_count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_TASKS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_TASKS}")
    return int(text)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m local",
        description="Run the whole platform on this machine: a stand-in for AWS, sample agents and "
        "the server itself. Nothing leaves this machine, and nothing is kept when it ends.",
        epilog="The settings of server.py can be given in the environment as usual.",
    )
    add = parser.add_argument
    add(
        "--port",
        type=port_number,
        default=8080,
        help="the server's port; further tasks get the next ones; 0: free ones (default: 8080)",
    )
    add(
        "--aws-port",
        type=port_number,
        default=0,
        metavar="PORT",
        help="the port of the stand-in for AWS (default: a free one)",
    )
    add(
        "--tasks",
        type=task_count,
        default=os.environ.get("TASKS") or "1",
        help=f"how many servers run side by side, 1 to {MAX_TASKS} (default: $TASKS, or 1)",
    )
    add("--fifo", action="store_true", help="make the updates queue a FIFO queue")
    add(
        "--end-with-parent", action="store_true", help="end when the process that started this does"
    )
    return parser.parse_args()


def handle_signals(local: Local) -> None:
    """Let a closed terminal and a plain `kill` end everything as Ctrl-C does."""
    for name in {"SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"} & signal.__dict__.keys():
        number = getattr(signal, name)
        # Under `nohup` SIGHUP is ignored, so that a closed terminal ends nothing. A script's
        # background job has SIGINT ignored as well, but who sends it then means it.
        if name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, local.interrupt)


def main() -> int:
    screen = Screen()
    local = Local(parse_options(), screen)
    handle_signals(local)
    status = 0
    try:
        local.run()
    except Interrupted:
        screen.show("\nStopping; Ctrl-C again to stop at once ...")
    except LocalError as failure:
        screen.show(f"\n{colored(str(failure), 'ERROR')}", sys.stderr)
        status = 1
    finally:
        local.stop()
    if not screen.close():
        os._exit(status)  # to end in order would be to wait for the terminal
    return status


if __name__ == "__main__":
    sys.exit(main())
