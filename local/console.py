"""The files of `client/` for a browser: `python -m local.console [port]`, or `serve_console()`.

Two files and nothing else, over HTTP/1.1, with the console's own content security policy as a
header too: a header also covers what a `<meta>` element cannot, such as being framed.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from local.ports import port_number, port_refused

CLIENT = Path(__file__).resolve().parent.parent / "client"
FILES = {
    "/": ("console.html", "text/html; charset=utf-8"),
    "/console.html": ("console.html", "text/html; charset=utf-8"),
    "/agenticai-ws.js": ("agenticai-ws.js", "text/javascript; charset=utf-8"),
}
HOST = "127.0.0.1"
IDLE_TIMEOUT_S = 30.0
POLICY = re.compile(r'http-equiv="Content-Security-Policy"\s+content="([^"]+)"')


def content_security_policy() -> str:
    """Return the policy that `console.html` states, made stricter by what only a header can say.

    Raises:
        ValueError: the page states none.
    """
    match = POLICY.search((CLIENT / "console.html").read_text(encoding="utf-8"))
    if match is None:
        raise ValueError("console.html states no Content-Security-Policy")
    return f"{' '.join(match[1].split())} frame-ancestors 'none'"


class ConsoleHandler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of FILES. The files are read anew each time: one may edit them."""

    protocol_version = "HTTP/1.1"
    server_version = "console"
    sys_version = ""
    timeout = IDLE_TIMEOUT_S

    def do_GET(self) -> None:
        """Send a file, or 404."""
        file = FILES.get(urlsplit(self.path).path)
        if file is None:
            self.send_error(404)
            return
        name, content_type = file
        body = (CLIENT / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", content_security_policy())
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 (http.server's name)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing: who runs the platform wants to see the gateway's lines."""


class ConsoleServer(ThreadingHTTPServer):
    """A browser that goes away in the middle is nothing to report."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what is wrong here."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serve_console(port: int = 0) -> Iterator[str]:
    """Serve the console on loopback for as long as the context lasts; yields its address.

    Raises:
        OSError: the port is taken.
    """
    server = ConsoleServer((HOST, port), ConsoleHandler)
    thread = threading.Thread(target=server.serve_forever, name="console", daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def console_link(address: str, gateway: str, *projects: str) -> str:
    """Return a link that opens the console, connects to `gateway`, subscribes to `projects`.

    All of it is in the fragment, which a browser sends to nobody.
    """
    fields = [("url", gateway), *(("project", project) for project in projects)]
    return f"{address}#{urlencode(fields, safe=':/')}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m local.console", description="Serve the console page on this machine."
    )
    parser.add_argument(
        "port", nargs="?", type=port_number, default=8090, help="default: 8090; 0: any free one"
    )
    port = parser.parse_args().port
    try:
        with serve_console(port) as address, contextlib.suppress(KeyboardInterrupt):
            link = console_link(address, "ws://127.0.0.1:8080/ws", "proj_123")
            print(f"{link}  (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
    except OSError as error:
        sys.exit(port_refused(port, error, f"python -m local.console {port + 10}"))


if __name__ == "__main__":
    main()
