"""The image, built and run as the service runs it, where podman or buildah is at hand."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from aws_standin import without_aws
from tests.moto_aws import Platform
from tests.talking import client_at

ROOT = Path(__file__).resolve().parent.parent
TAG = "localhost/agenticai-websocket:test"
MEMORY_MB = 512  # the template's default for a task, and for its container
PULL_TIMEOUT_S = 300.0
BUILD_TIMEOUT_S = 600.0
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0  # half of what the task definition allows, and one client is soon gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="containers are Linux's")


def base_images(dockerfile: str) -> set[str]:
    """The images that one is built upon, as it names them; its own stages are none."""
    lines = re.findall(r"^FROM (?:--\S+ )*(\S+)(?: AS (\S+))?$", dockerfile, re.MULTILINE)
    stages = {stage for _, stage in lines}
    return {name for name, _ in lines if name not in stages}


def ask(*command: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )


class Engine:
    """What builds images and runs them."""

    name = ""
    build_options: tuple[str, ...] = ()

    def lacks(self, base_image: str) -> str:
        """What it lacks to build upon an image and run the result here; empty if nothing."""
        if not shutil.which(self.name):
            return "not installed"
        if reason := self.pull(base_image):
            return f"{base_image} cannot be had: {reason}"
        return ""

    def pull(self, image: str) -> str:
        """Pull an image unless it is there; return why it cannot be had, or nothing."""
        if ask(self.name, "inspect", "--type", "image", image).returncode == 0:
            return ""
        try:
            answer = ask(self.name, "pull", image, timeout_s=PULL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"it did not come in {PULL_TIMEOUT_S:.0f} s"
        return answer.stderr.strip().rpartition("\n")[2] if answer.returncode else ""

    def build(self) -> None:
        options = [*self.build_options, "--tag", TAG, "."]
        answer = ask(self.name, "build", *options, timeout_s=BUILD_TIMEOUT_S)
        assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-4000:]

    def remove(self) -> None:
        ask(self.name, "rmi", TAG)

    def sandbox(
        self, environment: Mapping[str, str], command: Sequence[str] = ()
    ) -> contextlib.AbstractContextManager[list[str]]:
        """A command line that runs the image's command, or another, as the service would.

        That is as the image's user, read-only and without privileges; the network is the host's.
        """
        raise NotImplementedError


class Podman(Engine):
    name = "podman"
    RUN = (
        *("podman", "run", "--rm", "--network=host"),
        *("--read-only", "--read-only-tmpfs=false"),
        *("--cap-drop=ALL", "--security-opt=no-new-privileges"),
        f"--memory={MEMORY_MB}m",
    )

    def lacks(self, base_image: str) -> str:
        if reason := super().lacks(base_image):
            return reason
        trial = ask(*self.RUN, base_image, "true")
        return trial.stderr.strip().rpartition("\n")[2] if trial.returncode else ""

    @contextlib.contextmanager
    def sandbox(
        self, environment: Mapping[str, str], command: Sequence[str] = ()
    ) -> Iterator[list[str]]:
        settings = [f"--env={name}={value}" for name, value in environment.items()]
        name = f"agenticai-websocket-test-{uuid.uuid4().hex[:12]}"
        try:
            yield [*self.RUN, f"--name={name}", *settings, TAG, *command]
        finally:
            ask("podman", "rm", "--force", name)  # if it still runs, whatever became of the client


class Buildah(Engine):
    """buildah builds; it cannot run read-only, so a namespace made by util-linux does that.

    The limit of memory is a control group of the test's own, which the server sees where a
    container would show it its own: in version 1 or 2, whichever this machine has.
    """

    name = "buildah"
    build_options = ("--isolation=chroot",)  # no runtime, so it also builds inside a container
    SCRIPT = """
        set -e
        root=$1 user=$2 group=$3; shift 3
        echo $$ > "$group/cgroup.procs"
        mount --bind "$root" "$root"
        mount -o remount,bind,ro "$root"
        mount --rbind /proc "$root/proc"
        mount --rbind /dev "$root/dev"
        mount -t tmpfs none "$root/sys"
        mkdir -p "$root/sys/fs/cgroup/memory"
        case $group in
            */memory/*) mount --bind "$group" "$root/sys/fs/cgroup/memory" ;;
            *) mount --bind "$group" "$root/sys/fs/cgroup" ;;
        esac
        mount -o remount,ro "$root/sys"
        exec chroot --userspec="$user" "$root" env -i "$@"
    """

    def lacks(self, base_image: str) -> str:
        if reason := super().lacks(base_image):
            return reason
        if os.geteuid():
            return "what it builds is run here by root alone"
        try:
            with memory_group():
                return ""
        except OSError as exc:
            return f"no limit of memory can be set here: {exc}"

    @contextlib.contextmanager
    def sandbox(
        self, environment: Mapping[str, str], command: Sequence[str] = ()
    ) -> Iterator[list[str]]:
        described = json.loads(ask("buildah", "inspect", "--type", "image", TAG).stdout)
        image: dict[str, Any] = described["OCIv1"]["config"]
        settings = [f"{name}={value}" for name, value in environment.items()]
        container = ask("buildah", "from", "--pull-never", TAG).stdout.strip()
        try:
            root = ask("buildah", "mount", container).stdout.strip()
            with memory_group() as group:
                yield [
                    *("unshare", "--mount", "sh", "-c", self.SCRIPT, "sh"),
                    *(root, image["User"], str(group)),
                    *(f"--chdir={image['WorkingDir']}", *image["Env"], *settings),
                    *(command or image["Cmd"]),
                ]
        finally:
            ask("buildah", "rm", container)


@contextlib.contextmanager
def memory_group() -> Iterator[Path]:
    """A control group with the limit of memory, in version 1 or 2.

    Raises OSError where none can be made.
    """
    version_1 = Path("/sys/fs/cgroup/memory")
    parent, name = (
        (version_1, "memory.limit_in_bytes")
        if version_1.is_dir()
        else (Path("/sys/fs/cgroup"), "memory.max")
    )
    group = parent / f"agenticai-websocket-test-{uuid.uuid4().hex[:12]}"
    group.mkdir()
    try:
        (group / name).write_text(str(MEMORY_MB * 1024**2))
        yield group
    finally:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while True:  # what ran in it may take a moment to end
            try:
                group.rmdir()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine that has built the image; skips, with the reasons, where there is none."""
    (base_image,) = base_images((ROOT / "Dockerfile").read_text())
    reasons = []
    for chosen in (Podman(), Buildah()):
        if reason := chosen.lacks(base_image):
            reasons.append(f"{chosen.name}: {reason}")
            continue
        chosen.build()
        yield chosen
        chosen.remove()
        return
    pytest.skip("; ".join(reasons))


class Service:
    """The image's server, while it runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[dict[str, Any]] = []

    def address(self) -> str:
        """Read its log until it listens; return where. It goes on being read, unseen."""
        assert self.process.stdout is not None
        watchdog = threading.Timer(START_TIMEOUT_S, self.process.kill)
        watchdog.start()
        for line in self.process.stdout:
            self.log.append(json.loads(line))
            if self.log[-1]["message"] == "listening":
                break
        watchdog.cancel()
        assert self.log, "it ended without a word"
        assert self.log[-1]["message"] == "listening", self.log
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        return f"127.0.0.1:{self.log[-1]['port']}"


@contextlib.contextmanager
def serving(engine: Engine, environment: Mapping[str, str]) -> Iterator[Service]:
    with (
        engine.sandbox(environment) as command,
        subprocess.Popen(
            command, env=without_aws(os.environ), stdout=subprocess.PIPE, text=True
        ) as process,
    ):
        try:
            yield Service(process)
        finally:
            process.kill()


def get_health(address: str) -> str:
    """Ask until it no longer says that it is starting; return what it says then."""
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with without_proxy.open(f"http://{address}/health", timeout=5) as answer:
                status = str(json.load(answer)["status"])
        except urllib.error.HTTPError as refusal:
            status = str(json.load(refusal)["status"])
        if status != "starting" or time.monotonic() > deadline:
            return status
        time.sleep(0.1)


class TestBaseImages:
    """The Dockerfile's own stages are told from what is pulled."""

    def test_stages(self) -> None:
        """A stage is no base image, wherever it is used."""
        dockerfile = "FROM python:3 AS a\nFROM --platform=x images.example/b/c\nFROM a\n"
        assert base_images(dockerfile) == {"python:3", "images.example/b/c"}

    def test_dockerfile(self) -> None:
        """There is one base image, and it has a version."""
        (image,) = base_images((ROOT / "Dockerfile").read_text())
        assert re.fullmatch(r"python:3\.\d+-slim", image)


class TestImage:
    """The image is fit for the service's task definition."""

    def test_contents_and_rights(self, engine: Engine) -> None:
        """It runs as nobody in particular, can write nowhere, and holds no more than it needs."""
        probe = """
import errno, importlib.util, json, os
writable = {}
for folder in ("/", "/app", "/packages", "/tmp", "/var/tmp", "/usr/local/bin", "/run"):
    try:
        open(os.path.join(folder, "probe"), "w")
        writable[folder] = None
    except OSError as exc:
        writable[folder] = exc.errno
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "ids": [os.getuid(), os.geteuid(), os.getgid()],
    "capabilities": status["CapEff"].strip(),
    "writing": writable,
    "app": os.listdir("/app"),
    "pip": importlib.util.find_spec("pip") is not None,
}))
"""
        with engine.sandbox({}, ["python", "-c", probe]) as command:
            answer = ask(*command)
        assert answer.returncode == 0, answer.stderr
        found = json.loads(answer.stdout)
        assert 0 not in found["ids"]
        assert int(found["capabilities"], 16) == 0
        assert set(found["writing"].values()) == {errno.EROFS}
        assert found["app"] == ["server.py"]
        assert not found["pip"]

    def test_reads_its_own_limit(self, engine: Engine) -> None:
        """The server finds the container's limit of memory, from which its budget follows."""
        probe = "import server; print(server.container_limit_mb())"
        with engine.sandbox({}, ["python", "-c", probe]) as command:
            answer = ask(*command)
        assert answer.stdout.strip() == str(MEMORY_MB), answer.stderr

    def test_without_settings(self, engine: Engine) -> None:
        """It names the settings it lacks, and ends with exit code 2."""
        with engine.sandbox({}) as command:
            answer = ask(*command)
        assert answer.returncode == 2
        assert "DYNAMODB_TABLE_NAME" in answer.stderr

    def test_commands_of_the_readme(self, engine: Engine, tmp_path: Path) -> None:
        """README's two lines build an image and run it; without settings it names them."""
        text = " ".join((ROOT / "README.md").read_text("utf-8").split())
        build, run = (
            shlex.split(each) for each in re.findall(r"`(docker (?:build|run) [^`]+)`", text)
        )
        name = build[build.index("-t") + 1]
        assert run[-1] == name
        try:
            built = ask(engine.name, "build", *engine.build_options, *build[2:], timeout_s=600)
            assert built.returncode == 0, built.stderr
            if engine.name == "podman":
                settings = tmp_path / "settings"
                settings.touch()
                words = [str(settings) if word == ".env" else word for word in run[1:]]
                answer = ask("podman", *words)
                assert answer.returncode == 2
                assert "DYNAMODB_TABLE_NAME" in answer.stderr
        finally:
            ask(engine.name, "rmi", name)

    def test_serves_and_drains(self, engine: Engine, platform: Platform) -> None:
        """It is healthy, takes a client, and on SIGTERM sends it away and ends in time."""
        with serving(engine, platform.environment() | {"DRAIN_SECONDS": "1"}) as service:
            address = service.address()
            assert get_health(address) == "ok"
            with client_at(f"ws://{address}/ws", STOP_TIMEOUT_S) as client:
                service.process.terminate()
                assert client.receive()["type"] == "reconnect"
                assert client.close_code() == 1012
            assert service.process.wait(STOP_TIMEOUT_S) == 0
