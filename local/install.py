"""Install a pinned set of packages into a virtual environment, and say how far it is.

    python local/install.py .venv requirements-local.txt "30 MB to download, 15 s"

`make` calls this with a Python that has no packages yet, so that it uses the standard library only.
A failure is one sentence; everything that pip said is then in `pip.log` in the environment.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LOG_NAME = "pip.log"
LINE_INTERVAL_S = 5.0
"""How often a line of progress is printed where lines cannot be overwritten."""

# A file that lies on this machine is only processed.
BEGINS_PACKAGE = re.compile(
    r"(?:Collecting |Requirement already satisfied: |Processing \S*?)([\w.]+(?:-[a-zA-Z][\w.]*)*)"
    r"(?=[=\s\[]|-\d)"
)
SIZE = re.compile(r"\((\d+(?:\.\d+)?) ?(kB|MB|GB)\)\s*$")
BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9}
NOTHING_FOUND = re.compile(r"from versions: none|No matching distribution|ConnectionPool\(")
# What pip says before that when it did not reach an index, for one reason or another.
UNREACHABLE = re.compile(
    r"Failed to establish a new connection|NameResolution|name resolution|getaddrinfo|ProxyError"
    r"|Connection re(fused|set)|Network is unreachable|timed out|SSLError|No route to host"
)


class InstallError(Exception):
    """The packages could not be installed; the message says what to do about it."""


def python_of(environment: Path) -> Path:
    """Return the path of a virtual environment's own interpreter."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def create(environment: Path) -> None:
    """Make a virtual environment with pip, unless there is a working one already."""
    probe: list[str | Path] = [python_of(environment), "-m", "pip", "--version"]
    if (
        python_of(environment).exists()
        and not subprocess.run(probe, capture_output=True).returncode
    ):
        return
    command: list[str | Path] = [sys.executable, "-m", "venv", "--clear", environment]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        reason = (made.stderr + made.stdout).strip().splitlines() or ["no reason was given"]
        raise InstallError(f"{environment} could not be made: {reason[-1]}")


def pinned(requirements: Path) -> int:
    """Return how many packages a requirements file names, on whatever platform."""
    return len(re.findall(r"^[\w.\[\],-]+==", requirements.read_text("utf-8"), re.MULTILINE))


class Progress:
    """How far pip is, from what it prints: packages found, and the size of what was downloaded."""

    def __init__(self, total: int, show: Callable[[str], None]) -> None:
        self.packages: set[str] = set()
        self.downloaded = 0
        self._total = total
        self._unpacking = False
        self._show = show
        self._began_at = time.monotonic()

    def read(self, line: str) -> None:
        """Take in one line of pip's output."""
        if package := BEGINS_PACKAGE.match(line):
            self.packages.add(package[1].lower().replace("_", "-"))
        elif "Downloading" in line and (size := SIZE.search(line)):
            self.downloaded += int(float(size[1]) * BYTES[size[2]])
        elif line.startswith("Installing collected packages"):
            self._unpacking = True
        step = f"{len(self.packages)} of {self._total} packages"
        if self._unpacking:
            step = "unpacking"
        self._show(f"  {step}, {self.downloaded / 1e6:.0f} MB downloaded, {self.seconds:.0f} s")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began_at


class Line:
    """One line that is overwritten in a terminal, and else printed anew now and then."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._next_at = time.monotonic() + LINE_INTERVAL_S

    def show(self, text: str) -> None:
        if self._terminal:
            print(f"\r{text:<60}", end="", flush=True)
        elif time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + LINE_INTERVAL_S
            print(text, flush=True)

    def end(self) -> None:
        if self._terminal:
            print("\r" + " " * 60 + "\r", end="", flush=True)


def install(environment: Path, requirements: Path) -> Progress:
    """Run pip, and raise InstallError when it fails."""
    line = Line()
    progress = Progress(pinned(requirements), line.show)
    command: list[str | Path] = [
        *(python_of(environment), "-m", "pip", "install", "--require-hashes", "--no-input"),
        *("--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"),
        *("--requirement", requirements),
    ]
    log = environment / LOG_NAME
    with (
        log.open("w", encoding="utf-8") as copy,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"},
        ) as pip,
    ):
        assert pip.stdout is not None
        for text in pip.stdout:
            copy.write(text)
            progress.read(text.strip())
    line.end()
    if pip.returncode:
        raise InstallError(why(log))
    return progress


def why(log: Path) -> str:
    """Return in a sentence why pip failed, and what to do about it."""
    said = log.read_text("utf-8")
    errors = re.findall(r"^ERROR: (.+)$", said, re.MULTILINE) or said.strip().splitlines()[-1:]
    if NOTHING_FOUND.search(" ".join(errors)) and UNREACHABLE.search(said):
        return (
            "The packages cannot be downloaded: this machine does not reach the package index. "
            "Connect it to the network, or name an index that it reaches in PIP_INDEX_URL, and run "
            f"this again. ({log} has pip's own words.)"
        )
    return f"pip could not install the packages: {' '.join(errors[:1])} ({log} has all it said.)"


def main() -> int:
    environment, requirements, expected = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    print(f"Setting up {environment} from {requirements.name}: {expected}.", flush=True)
    try:
        create(environment)
        progress = install(environment, requirements)
    except InstallError as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. What was downloaded is kept for the next time.", file=sys.stderr)
        return 130
    print(f"{environment} is ready after {progress.seconds:.0f} s.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
