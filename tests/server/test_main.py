"""Main: what an operator reads when the server cannot start, or is asked for its settings."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

import aws_standin
import server
from tests.server.processes import SERVER, clean_environment, process_of
from tests.waiting import DEADLINE_S


async def test_port_in_use_is_a_sentence(platform: aws_standin.Platform) -> None:
    """It names the port and the setting, and has no words of the operating system."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with process_of(platform.environment(port)) as process:
            assert await process.ends() == (1, "")
    message = process.log[-1]["message"]
    assert message.startswith(f"Port {port} is in use: ")
    assert "WEBSOCKET_PORT" in message
    assert "Errno" not in message


@pytest.mark.parametrize("missing", ["both", "secret"])
async def test_no_credentials_is_a_sentence(
    platform: aws_standin.Platform, tmp_path: Path, missing: str
) -> None:
    """It says what is missing and how to do without, and has no words of the SDK."""
    environment = platform.environment() | {"HOME": str(tmp_path)}
    del environment["AWS_SECRET_ACCESS_KEY"]
    if missing == "both":
        del environment["AWS_ACCESS_KEY_ID"]
    async with process_of(environment) as process:
        assert await process.ends() == (1, "")
    message = process.log[-1]["message"]
    assert message.startswith("There are no AWS credentials. ")
    assert "make run" in message
    assert "CredentialsError" not in message


async def test_wrong_profile_is_a_sentence(platform: aws_standin.Platform) -> None:
    """So is what else keeps the SDK from making its clients."""
    async with process_of(platform.environment(), AWS_PROFILE="absent") as process:
        assert await process.ends() == (1, "")
    assert "absent" in process.log[-1]["message"]


def test_help_shows_defaults_as_they_are_written() -> None:
    """As in the environment: no None, no True, no tuples, no fractions that say nothing."""
    command = [sys.executable, str(SERVER), "--help"]
    shown = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, check=True
    ).stdout
    defaults = dict(re.findall(r"^  ([A-Z0-9_]+) .* \[([^\]]*)\]$", shown, re.MULTILINE))
    assert defaults["COMPRESSION"] == "on"
    assert defaults["AUTH_ALGORITHMS"] == "RS256"
    assert defaults["DRAIN_SECONDS"] == "30"
    assert "ALLOWED_ORIGINS" not in defaults
    assert not {"None", "True", "False", "()"} & set(defaults.values())


def test_missing_packages_are_a_sentence() -> None:
    """A Python with nothing installed is told what to install, without a traceback."""
    command = [sys.executable, "-S", str(SERVER), "--help"]
    result = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert result.returncode == 1
    assert "python -m pip install -r requirements.txt" in result.stderr
    assert result.stderr.count("\n") == 1


async def test_signals_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where loops know no signals, the signal's handler wakes the loop."""
    loop = asyncio.get_running_loop()
    handlers: dict[int, Callable[..., None]] = {}
    monkeypatch.setattr(loop, "add_signal_handler", Mock(side_effect=NotImplementedError))
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    told = asyncio.Event()
    server.on_signals(loop, told.set)
    assert handlers.keys() == {signal.SIGTERM, signal.SIGINT}
    handlers[signal.SIGINT](signal.SIGINT, None)
    async with asyncio.timeout(DEADLINE_S):
        await told.wait()
