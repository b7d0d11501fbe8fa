"""Who deploys: a folder with the project's files, a shell, the real AWS CLI, and what they show."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.deployment.cloud import Cloud

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ("deploy-ecs.ps1", "test-connection.ps1", "ecs-common.ps1")
FILES = (
    *SCRIPTS,
    "ecs-template.yaml",
    "Dockerfile",
    ".dockerignore",
    "requirements.txt",
    "server.py",
)
KEY = "AKIAENVIRONMENT"
TIMEOUT_S = 150.0


def aws_cli() -> str | None:
    """Where the AWS CLI is: the one installed for the tests, else the path's."""
    own = ROOT / ".venv" / "aws-cli" / "bin" / "aws"
    return str(own) if own.exists() else shutil.which("aws")


def aws_cli_2() -> str | None:
    """Version 2 of the AWS CLI, where the path has it."""
    path = shutil.which("aws")
    if path is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return path if said.stdout.startswith("aws-cli/2.") else None


def lacking() -> str:
    """What a deployment cannot be played through without; empty where all is there."""
    missing = [name for name in ("pwsh", "git") if not shutil.which(name)]
    if aws_cli() is None:
        missing.append("aws")
    return ", ".join(missing)


class WarmCli:
    """The AWS CLI ready to be called, by forks; ``command`` is what calls it. A context manager."""

    def __init__(self, folder: Path) -> None:
        cli = aws_cli()
        assert cli is not None
        self._cold = f'exec "{cli}"'
        self._socket = str(folder / "cli")
        shebang = re.match(rb"#!(\S*python\S*)\n", Path(cli).read_bytes()[:200])
        self._python = shebang[1].decode() if shebang else ""
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> WarmCli:
        if self._python:  # else it is a program of its own, such as version 2's
            self._process = subprocess.Popen(
                [self._python, str(Path(__file__).with_name("warm_cli.py")), self._socket],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()

    def command(self, *, warm: bool) -> str:
        if not warm or not self._process:
            return self._cold
        caller = Path(__file__).with_name("warm_cli.py")
        return f'exec "{self._python}" -S -E "{caller}" "{self._socket}" call'


@dataclass(frozen=True)
class Run:
    """What a command ended with and showed: output and errors, as they came."""

    code: int
    text: str

    def line(self, pattern: str) -> str:
        """The first line that a pattern is found in; an error that shows everything if none."""
        for line in self.text.splitlines():
            if re.search(pattern, line):
                return line
        raise AssertionError(f"no line has {pattern!r}:\n{self.text}")


class Person:
    """A person at a shell, in a checkout of their own."""

    def __init__(self, cloud: Cloud, folder: Path, home: Path, cli: str) -> None:
        self.cloud = cloud
        self.project = folder / "project"
        self.home = home
        self.bin = folder / "bin"
        self.images = folder / "images"
        for each in (self.project, self.bin, self.images):
            each.mkdir(parents=True)
        for name in FILES:
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, self.project)
        # By an option, as versions before 2.13 do not read the variable.
        self._program("aws", f'{cli} --endpoint-url "$AWS_ENDPOINT_URL" "$@"')
        docker = Path(__file__).with_name("docker.py")
        self._program("docker", f'exec "{sys.executable}" -S -E "{docker}" "$@"')
        self.environment = {
            "PATH": os.pathsep.join([str(self.bin), *os.environ["PATH"].split(os.pathsep)]),
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "AWS_ENDPOINT_URL": cloud.endpoint_url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_CONFIG_FILE": str(folder / "config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
            "DOCKER_STANDIN_URL": cloud.endpoint_url,
            "DOCKER_STANDIN_FOLDER": str(self.images),
            "POWERSHELL_TELEMETRY_OPTOUT": "1",
            "POWERSHELL_UPDATECHECK": "Off",
            "no_proxy": "127.0.0.1,localhost",
            "GIT_CONFIG_GLOBAL": os.devnull,
        }
        (folder / "config").write_text("[default]\noutput = table\nregion = eu-north-1\n")
        (folder / "credentials").write_text(
            "[other]\naws_access_key_id = AKIAOTHERPROFILE\naws_secret_access_key = x\n"
        )
        self.git("init", "--quiet")
        self.commit()

    def _program(self, name: str, line: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def git(self, *arguments: str) -> None:
        identity = ("-c", "user.name=o", "-c", "user.email=o@example.com")
        subprocess.run(
            ["git", *identity, *arguments], cwd=self.project, check=True, capture_output=True
        )

    def commit(self) -> None:
        """Commit what is in the project's folder."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "Work")

    def docker_fails(self, command: str) -> None:
        """Let the next such command of Docker fail."""
        (self.images / f"fail-{command}").touch()

    def deploy(self, *arguments: str, **environment: str) -> Run:
        """Run deploy-ecs.ps1 with the arguments as one would type them."""
        return self.shell(
            f"./deploy-ecs.ps1 {' '.join(arguments)}; exit $LASTEXITCODE", **environment
        )

    def check(self, *arguments: str, **environment: str) -> Run:
        return self.shell(
            f"./test-connection.ps1 {' '.join(arguments)}; exit $LASTEXITCODE", **environment
        )

    def shell(self, command: str, **environment: str) -> Run:
        process = self.start(command, **environment)
        try:
            text, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            raise AssertionError(f"{command} did not end:\n{text}") from None
        return Run(process.returncode, text)

    def bash(self, text: str) -> Run:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.project,
            env=self.environment | {"AWS_DEFAULT_REGION": "us-east-1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return Run(done.returncode, done.stdout)

    def start(self, command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["pwsh", "-NoProfile", "-NonInteractive", "-Command", command],
            cwd=self.project,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def interrupt(self, command: str, when: Callable[[], bool], **environment: str) -> Run:
        """Start a command and press Ctrl-C, which reaches all its programs, at a moment."""
        process = self.start(command, **environment)
        deadline = time.monotonic() + TIMEOUT_S
        while not when():
            if process.poll() is not None or time.monotonic() > deadline:
                text, _ = process.communicate(timeout=10)
                raise AssertionError(f"that moment did not come:\n{text}")
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        text, _ = process.communicate(timeout=TIMEOUT_S)
        return Run(process.returncode, text)
