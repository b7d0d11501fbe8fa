"""Processes that this package starts, and that end with the one that started them.

`python -m local.child server.py` runs a script that knows nothing of this as such a process.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
"""The project's directory, where `server.py` is."""


def end_with_stdin() -> None:
    """In a child: end this process when its standard input does, and leave Ctrl-C to its parent.

    Standard input is a pipe whose other end closes with the parent, however the parent ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_read_stdin_and_exit, daemon=True).start()


def _read_stdin_and_exit() -> None:
    # Not through sys.stdin: its lock, held here, would stop the interpreter from ending in order.
    while os.read(0, 65536):
        pass
    os._exit(0)  # there is nothing to clean up, and no thread to wait for


# Where it exists, keeps Ctrl-C in the terminal from a child, as `start_new_session` does elsewhere.
NEW_PROCESS_GROUP: int = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)


class Child:
    """A Python process of ours, and what it prints, line by line.

    It is started in a process group of its own: Ctrl-C reaches the parent alone, which ends its
    children in the right order. Its program has to call `end_with_stdin`.
    """

    def __init__(
        self,
        name: str,
        arguments: list[str],
        environment: dict[str, str],
        lines: SimpleQueue[tuple[Child, str | None]],
    ) -> None:
        """Start `python *arguments`; put each line it prints into `lines`, and None at its end."""
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment | {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            creationflags=NEW_PROCESS_GROUP,
        )
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: SimpleQueue[tuple[Child, str | None]]) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                lines.put((self, line.rstrip("\n")))
        lines.put((self, None))

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def interrupt(self) -> None:
        """Ask the process to end in order."""
        if sys.platform == "win32":
            self.process.send_signal(signal.CTRL_BREAK_EVENT)
        else:
            self.process.terminate()

    def kill(self) -> None:
        """End the process at once, and wait until it has."""
        self.process.kill()
        self.process.wait()


def main() -> None:
    """Run the script named on the command line, as Python itself would."""
    end_with_stdin()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
