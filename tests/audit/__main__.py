"""Three checks: every pin has its hashes, ruff's security rules hold, no package has a known hole.

The last needs a database on the internet; where it cannot be reached, that is said, and no fault.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "audit"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
DEPLOYED = ROOT / "requirements.txt"
PINNED = (
    DEPLOYED,
    ROOT / "requirements-local.txt",
    ROOT / "requirements-dev.txt",
    ROOT / "bench" / "requirements.txt",
    REQUIREMENTS.with_name("uv.txt"),
    ROOT / "tests" / "deployment" / "aws-cli.txt",
    *sorted((ROOT / "tests").glob("*/requirements.txt")),
)
PRODUCTION = ("server.py",)
INSTALL_S = 300
AUDIT_S = 300


def unpinned(text: str) -> list[str]:
    """The requirements in a file that have no exact version, or no hash to prove it by."""
    lines = text.replace("\\\n", " ").splitlines()
    requirements = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    pinned = re.compile(
        r"[\w.-]+(\[[\w, -]+\])?==[\w.!+-]+\s*(;[^#]*?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*"
    )
    return [line.split()[0] for line in requirements if not pinned.fullmatch(line)]


def pins() -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {name} is not pinned with a hash"
        for path in PINNED
        for name in unpinned(path.read_text("utf-8"))
    ]


def security_rules() -> list[str]:
    """What ruff's rules from bandit find in what runs in production."""
    command = [sys.executable, "-m", "ruff", "check", "--select", "S", "--output-format", "concise"]
    done = subprocess.run(
        [*command, *PRODUCTION], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return [] if done.returncode == 0 else (done.stdout + done.stderr).splitlines()


class NotAudited(Exception):
    """The packages could not be looked up; the message says why."""


def auditor() -> Path:
    """The Python that has pip-audit, in an environment of its own.

    Raises:
        NotAudited: it cannot be installed.
    """
    python = BUILD / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    installed = BUILD / "installed.txt"
    if installed.exists() and installed.read_bytes() == REQUIREMENTS.read_bytes():
        return python
    venv.create(BUILD, with_pip=True, clear=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run(
            [*command, "--require-hashes", "-r", str(REQUIREMENTS)],
            capture_output=True,
            check=True,
            timeout=INSTALL_S,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
        raise NotAudited(f"pip-audit cannot be installed ({type(exc).__name__})") from None
    installed.write_bytes(REQUIREMENTS.read_bytes())
    return python


def known_holes(dependencies: Iterable[dict[str, Any]]) -> list[str]:
    """What pip-audit's JSON says of packages.

    Raises:
        NotAudited: it says nothing about any of them.
    """
    known = [each for each in dependencies if "skip_reason" not in each]
    if not known:
        raise NotAudited("the database of known holes cannot be reached, or knows none of them")
    return [
        f"{each['name']} {each['version']}: {hole['id']}"
        + (f", mended in {', '.join(hole['fix_versions'])}" if hole["fix_versions"] else "")
        for each in known
        for hole in each["vulns"]
    ]


def audit_packages() -> list[str]:
    """The known holes in what is deployed.

    Raises:
        NotAudited: they could not be looked up.
    """
    command = [str(auditor()), "-m", "pip_audit", "--disable-pip", "--no-deps", "--format", "json"]
    try:
        done = subprocess.run(
            [*command, "--progress-spinner", "off", "-r", str(DEPLOYED)],
            capture_output=True,
            text=True,
            check=False,
            timeout=AUDIT_S,
        )
        found = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        raise NotAudited("the database of known holes cannot be reached") from None
    return known_holes(found["dependencies"])


def say(name: str, faults: Sequence[str]) -> bool:
    print(f"{name}: {'no fault' if not faults else ''}", *faults, sep="\n  " if faults else "")
    return not faults


def main() -> int:
    """Exit code 1 if there is a fault."""
    good = [
        say("Pins with hashes", pins()),
        say("Security rules", security_rules()),
    ]
    try:
        good.append(say("Known holes in packages", audit_packages()))
    except NotAudited as exc:
        print(f"Known holes in packages: not looked up: {exc}.")
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
