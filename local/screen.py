"""What a person sees of the processes: log lines as words, on a terminal that may go away."""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import sys
import threading
from datetime import datetime
from typing import Any, TextIO

MAX_WAITING_LINES = 10_000
"""Beyond these, lines are left out while a terminal is held (Ctrl-S) or a pipe is not read."""

CLOSE_TIMEOUT_S = 1.0
COLORS = {"WARNING": "33", "ERROR": "31", "CRITICAL": "31", "name": "36", "banner": "1"}


class Screen:
    """Prints lines in a thread of its own, so that nobody else waits for a terminal.

    Attributes:
        lost: whether nothing can be printed any more: the terminal was closed, or the reader of a
            pipe has gone.
    """

    def __init__(self) -> None:
        self.lost = False
        self._lines: queue.Queue[tuple[str, TextIO | None] | None] = queue.Queue(MAX_WAITING_LINES)
        self._left_out = 0
        self._thread = threading.Thread(target=self._print, name="screen", daemon=True)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        self._thread.start()

    def show(self, text: str, stream: TextIO | None = None) -> None:
        """Print `text` as soon as the terminal takes it. Never waits, never raises."""
        try:
            self._lines.put_nowait((text, stream or sys.stdout))
        except queue.Full:
            self._left_out += 1

    def close(self) -> bool:
        """Return whether all has been printed; what a held terminal does not take is given up."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=CLOSE_TIMEOUT_S)
        self._thread.join(CLOSE_TIMEOUT_S)
        return not self._thread.is_alive()

    def _print(self) -> None:
        while (line := self._lines.get()) is not None:
            text, stream = line
            if self._left_out and not self._lines.qsize():
                text += (
                    f"\n({self._left_out} lines were left out: this terminal did not take them.)"
                )
                self._left_out = 0
            if stream is not None:
                self._write(text, stream)

    def _write(self, text: str, stream: TextIO) -> None:
        try:
            print(text, file=stream, flush=True)
        except (OSError, ValueError):  # a broken pipe, a closed terminal, a closed file
            self.lost = True
            # What is still in the buffer must not fail once more when the interpreter ends.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def colored(text: str, color: str) -> str:
    """Return `text` in a colour of COLORS when it goes to a terminal that shows colours."""
    code = COLORS.get(color)
    terminal = sys.stdout is not None and sys.stdout.isatty()
    plain = not terminal or "NO_COLOR" in os.environ or sys.platform == "win32"
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
