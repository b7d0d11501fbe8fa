"""What is said about security is so: pins have hashes, holes are reported, tests exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.audit.__main__ import PINNED, NotAudited, known_holes, pins, security_rules, unpinned

ROOT = Path(__file__).parent.parent
SECURITY = ROOT / "docs" / "SECURITY.md"
HASH = "--hash=sha256:" + "0123456789abcdef" * 4


def makefile() -> str:
    return (ROOT / "Makefile").read_text("utf-8")


class TestPins:
    def test_all_have_hashes(self) -> None:
        """Every package that is installed is pinned, and can be proved to be that one."""
        assert pins() == []
        assert {path.parent.name for path in PINNED} >= {"audit", "bench", "conformance", "fuzz"}
        assert all("==" in path.read_text("utf-8") for path in PINNED)

    def test_makefile_installs_no_other(self) -> None:
        """What `make` installs is among them, and its hashes are asked for."""
        rules = re.findall(r"^\S+: (\S+).*((?:\n\t.*)+)", makefile(), re.MULTILINE)
        installs = [
            line.replace("$<", needs)
            for needs, recipe in rules
            for line in recipe.splitlines()
            if "pip install" in line or "install.py" in line
        ]
        assert len(installs) >= 5
        for line in installs:
            # local/install.py asks for hashes itself.
            way = r"(?:--require-hashes (?:-r|--requirement)|local/install.py \S+) (\S+)"
            [name] = re.findall(way, line)
            assert ROOT / name in PINNED

    @pytest.mark.parametrize("path", PINNED, ids=lambda path: str(path.relative_to(ROOT)))
    def test_say_not_where_packages_come_from(self, path: Path) -> None:
        """Each installation has its own source of packages."""
        assert "://" not in path.read_text("utf-8")

    def test_peers_are_of_the_same_versions(self) -> None:
        """Installing the benchmark's packages changes none that the tests run with."""
        development, peers = (
            dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)", path.read_text("utf-8"), re.MULTILINE))
            for path in (ROOT / "requirements-dev.txt", ROOT / "bench" / "requirements.txt")
        )
        shared = development.keys() & peers.keys()
        assert len(shared) > 5
        assert {name: peers[name] for name in shared} == {
            name: development[name] for name in shared
        }

    @pytest.mark.parametrize(
        ("line", "good"),
        [
            (f"jwt==1.0 {HASH}", True),
            (f"jwt[crypto]==1.0 ; python_version < '3.14' {HASH} {HASH}", True),
            (f"jwt==1.0 \\\n    {HASH}\n    # via x", True),
            ("jwt==1.0", False),
            (f"jwt>=1.0 {HASH}", False),
            (f"jwt {HASH}", False),
            (f"jwt==1.* {HASH}", False),
            ("jwt==1.0 --hash=sha256:abc", False),
            (f"-e . {HASH}", False),
        ],
    )
    def test_unpinned(self, line: str, good: bool) -> None:
        """A range, a name alone or a hash too short is no pin."""
        assert (unpinned(line + "\n") == []) == good


class TestSecurityRules:
    def test_no_finding(self) -> None:
        """Ruff's security rules find nothing in what runs in production."""
        assert security_rules() == []


class TestKnownHoles:
    def test_reported(self) -> None:
        """A hole is named with the version that mends it."""
        hole = {"id": "CVE-1", "fix_versions": ["1.1"], "description": "..."}
        good = {"name": "a", "version": "1.0", "vulns": []}
        bad = {"name": "b", "version": "1.0", "vulns": [hole, {**hole, "fix_versions": []}]}
        assert known_holes([good]) == []
        assert known_holes([good, bad]) == ["b 1.0: CVE-1, mended in 1.1", "b 1.0: CVE-1"]

    def test_nothing_known(self) -> None:
        """A database that knows no package at all is no all-clear."""
        with pytest.raises(NotAudited):
            known_holes([{"name": "a", "skip_reason": "not found"}])
        with pytest.raises(NotAudited):
            known_holes([])


def threats() -> list[tuple[str, list[str]]]:
    """The threats of the table, and the tests named beside each."""
    text = SECURITY.read_text("utf-8")
    section = text.partition("## Threats")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [(row[0], re.findall(r"`([\w.:/]+)`", row[2])) for row in rows if row[0] != "Threat"]


class TestThreats:
    def test_there_are_some(self) -> None:
        """The table can be read."""
        assert len(threats()) > 20

    @pytest.mark.parametrize(("threat", "names"), threats(), ids=lambda value: str(value)[:40])
    def test_is_proved(self, threat: str, names: list[str]) -> None:
        """Each threat has a test, and that test exists."""
        assert names, threat
        for name in names:
            file, *path = name.split("::")
            body = ast.parse((ROOT / "tests" / file).read_text("utf-8")).body
            for part in path:
                [found] = [each for each in body if getattr(each, "name", None) == part]
                body = getattr(found, "body", [])
            assert body
