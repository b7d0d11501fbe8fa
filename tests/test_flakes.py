"""How `python -m tests` tells a flake from a failure, by tests that fail so many times."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import tests.__main__ as everything

TEST = """
from pathlib import Path

import pytest

@pytest.mark.parametrize("failures", [0, 1, 2])
def test_fails(failures):
    runs = Path(__file__).with_name(f"runs-{failures}")
    count = int(runs.read_text()) if runs.exists() else 0
    runs.write_text(str(count + 1))
    assert count >= failures
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project whose tests fail the first so many times."""
    (tmp_path / "test_it.py").write_text(TEST, "utf-8")
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n", "utf-8")
    last_failed = tmp_path / everything.LAST_FAILED.relative_to(everything.ROOT)
    monkeypatch.setattr(everything, "ROOT", tmp_path)
    monkeypatch.setattr(everything, "LAST_FAILED", last_failed)


def run(*failures: int) -> list[str]:
    """Run tests that fail so many times; return those that failed."""
    everything.pytest(7, "--no-cov", *(f"test_it.py::test_fails[{count}]" for count in failures))
    return everything.last_failed()


def test_flake(capsys: pytest.CaptureFixture[str]) -> None:
    """Who passes twice after a failure is named with the seed, and excused."""
    failed = run(0, 1)
    assert failed == ["test_it.py::test_fails[1]"]
    assert everything.only_flakes(failed, seed=7)
    line = "flake, passed twice more: test_it.py::test_fails[1] (--seed 7)"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("failures", [2])
def test_fails_again(failures: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Who fails a second time has failed, and nobody else is excused for it."""
    failed = run(1, failures)
    assert not everything.only_flakes(failed, seed=7)
    assert f"failed again: test_it.py::test_fails[{failures}]" in capsys.readouterr().out


def test_too_many() -> None:
    """Where much has failed, or nothing has, there is nothing to excuse."""
    assert not everything.only_flakes([], seed=7)
    assert not everything.only_flakes(["x"] * (everything.FLAKES_AT_MOST + 1), seed=7)


@pytest.mark.parametrize(
    ("code", "again", "expected"), [(0, False, 0), (1, False, 1), (1, True, 0), (2, True, 2)]
)
def test_exit_code(code: int, again: bool, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flakes are excused where that is wanted, and a run that broke off never is."""
    monkeypatch.setattr(everything, "run_all", lambda *_: code)
    monkeypatch.setattr(everything, "only_flakes", lambda *_: True)
    monkeypatch.setattr(sys, "argv", ["tests", *(["--again"] if again else [])])
    assert everything.main() == expected


def test_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some paths only those run, at once and without a bound on their coverage."""
    runs: list[tuple[str, ...]] = []

    def pytest_of(_seed: int, *arguments: str) -> int:
        runs.append(arguments)
        return 0

    monkeypatch.setattr(everything, "pytest", pytest_of)
    assert everything.run_all(7, "2", ["tests/server"]) == 0
    (arguments,) = runs
    assert arguments[-1] == "tests/server"
    assert "--no-cov" in arguments
