"""The conformance suite's own parts; the suite itself takes minutes: ``make conformance``."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from websockets.asyncio.client import connect

import tests.conformance.__main__ as conformance
from tests.conformance.__main__ import Verdict, echo_server, main, report, verdicts


@pytest.mark.parametrize(
    ("verdict", "good", "documented"),
    [
        (Verdict("1.1.1", "OK", "OK"), True, False),
        (Verdict("7.1.6", "INFORMATIONAL", "INFORMATIONAL"), True, False),
        (Verdict("3.2", "NON-STRICT", "OK"), False, True),
        (Verdict("3.2", "FAILED", "OK"), False, False),
        (Verdict("3.2", "OK", "UNCLEAN"), False, False),
        (Verdict("7.1.5", "FAILED", "WRONG CODE"), False, True),
        (Verdict("7.1.4", "FAILED", "OK"), False, False),
        (Verdict("1.1.1", "NON-STRICT", "OK"), False, False),
        (Verdict("1.1.1", "UNIMPLEMENTED", "OK"), False, False),
    ],
)
def test_verdict(verdict: Verdict, good: bool, documented: bool) -> None:
    """Only what the library documents of itself may be other than good."""
    assert (verdict.good, verdict.documented) == (good, documented)


def test_report() -> None:
    """The report counts the cases, and names those that are not good, in their order."""
    found = {
        case: {"behavior": behavior, "behaviorClose": "OK"}
        for case, behavior in (("10.1.1", "OK"), ("3.2", "NON-STRICT"), ("2.11", "FAILED"))
    }
    lines = report(verdicts(found)).splitlines()
    assert lines[0] == "3 cases: 1 FAILED, 1 NON-STRICT, 1 OK"
    assert [line.split()[0] for line in lines[1:]] == ["2.11", "3.2"]
    assert "NOT DOCUMENTED" in lines[1]


def test_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is no Python 2.7, the reason is printed, and that is no failure."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PYTHON27", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr("sys.argv", ["conformance"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("Skipped: there is no Python 2.7")
    assert conformance.CASES[0] == "1.*"


@pytest.mark.parametrize("compression", ["deflate", None])
async def test_echo(compression: str | None) -> None:
    """The echo server gives back what it gets: text, bytes, fragments, nothing, much."""
    with echo_server() as port:
        async with (
            asyncio.timeout(20),
            connect(f"ws://127.0.0.1:{port}/ws", compression=compression, proxy=None) as socket,
        ):
            for message in ("", "x", "\u20ac" * 9, b"", b"\xff\xfe", "y" * 200_000, b"z" * 70_000):
                await socket.send(message)
                assert await socket.recv() == message
            await socket.send(["in ", "two ", "pieces"])
            assert await socket.recv() == "in two pieces"
