"""What is built and installed: requirements, the image, the Makefile."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, files, packages_distributions, requires
from pathlib import Path
from typing import cast

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()

PLATFORMS = [
    {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
    {"sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64"},
]
ENVIRONMENTS: list[dict[str, str]] = [
    {
        **cast("dict[str, str]", default_environment()),
        **platform,
        "os_name": "nt" if platform["sys_platform"] == "win32" else "posix",
        "python_version": version,
        "python_full_version": f"{version}.0",
    }
    for platform in PLATFORMS
    for version in ("3.11", "3.12", "3.13")
]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows needs no Makefile")


class TestRequirements:
    """One `pip install -r` brings the same packages everywhere."""

    @pytest.fixture(params=["requirements", "requirements-local", "requirements-dev"])
    def name(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_every_package_is_pinned_and_hashed(self, name: str) -> None:
        entries = logical_lines(f"{name}.txt")
        assert len(entries) > 10
        for entry in entries:
            pin = r"[A-Za-z0-9._-]+(\[[a-z0-9, -]+\])?==[^ ]+ (; .+ )?--hash=sha256:[0-9a-f]{64}"
            assert re.match(pin, entry)

    def test_nothing_says_where_the_packages_come_from(self, name: str) -> None:
        text = (ROOT / f"{name}.txt").read_text()
        assert not re.search(r"^-|--index|--find-links|://|file:|@ ", text, re.MULTILINE)

    @pytest.mark.parametrize(
        "environment",
        ENVIRONMENTS,
        ids=[f"{e['sys_platform']}-{e['python_version']}" for e in ENVIRONMENTS],
    )
    def test_all_that_is_needed_is_pinned_on_every_platform(
        self, name: str, environment: dict[str, str]
    ) -> None:
        """With hashes, pip installs nothing that is not listed, `name[extra]` like any name.

        It looks for the newest `name[extra]` first, and ends when that is not the one listed
        without it: the file works until the package's next release.
        """
        pinned = {
            wanted
            for pin in map(Requirement, pins(name))
            if pin.marker is None or pin.marker.evaluate(environment)
            for wanted in with_extras(pin)
        }
        needed = set(closure(list(sources(name)), environment))
        assert needed - pinned == set()

    def test_each_set_contains_the_smaller_ones(self) -> None:
        """`make run` runs what production runs, and `make test` tests what `make run` runs."""
        production, local, development = (
            {pin.partition(" ;")[0] for pin in pins(name)}
            for name in ("requirements", "requirements-local", "requirements-dev")
        )
        assert production < local < development

    def test_what_make_run_needs_is_small(self) -> None:
        """It promises its size before it downloads anything."""
        environment = next(e for e in ENVIRONMENTS if e["sys_platform"] == sys.platform)
        names = {
            pin.split("[")[0] for pin in closure(list(sources("requirements-local")), environment)
        }
        files = [file for name in names for file in files_of(name)]
        size_mb = sum(path.stat().st_size for path in files if path.exists()) / 1e6
        promised = re.search(r"^LOCAL_COST := .* (\d+) MB on disk", MAKEFILE, re.MULTILINE)
        assert promised is not None
        assert size_mb < int(promised[1]) <= 200

    @pytest.mark.parametrize(
        "path",
        [
            *(ROOT / "local").glob("*.py"),
            *(ROOT / "aws_standin").glob("*.py"),
            *(ROOT / "agent").glob("*.py"),
            *(ROOT / "test-websocket.py", ROOT / "integration_test.py"),
        ],
        ids=lambda path: path.name,
    )
    def test_make_run_needs_nothing_else(self, path: Path) -> None:
        listed = {
            canonicalize_name(Requirement(line).name) for line in sources("requirements-local")
        }
        providers = packages_distributions()
        own = {"agent", "aws_standin", "local", "server"}
        imported = {
            canonicalize_name(providers[module][0]) if module in providers else module
            for module in runtime_imports(path)
            if module not in sys.stdlib_module_names | own
        }
        assert imported - listed <= {"prompt-toolkit", "prompt_toolkit"}

    def test_what_the_server_imports_is_asked_for_by_name(self) -> None:
        listed = {canonicalize_name(Requirement(line).name) for line in sources("requirements")}
        providers = packages_distributions()
        imported = {
            canonicalize_name(providers[module][0])
            for module in runtime_imports(ROOT / "server.py")
            if module not in sys.stdlib_module_names
        }
        assert imported == listed


def files_of(distribution: str) -> Iterator[Path]:
    """Yield the installed files of a package; none when it is not installed here."""
    try:
        for file in files(distribution) or []:
            yield Path(str(file.locate()))
    except PackageNotFoundError:
        return


def logical_lines(file_name: str) -> list[str]:
    """Return the entries of a requirements file, each on one line, without comments."""
    text = (ROOT / file_name).read_text()
    text = re.sub(r"#.*", "", text).replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def pins(name: str) -> list[str]:
    return [entry.partition(" --hash")[0] for entry in logical_lines(f"{name}.txt")]


def sources(name: str) -> Iterator[str]:
    """Yield what is asked for by hand, in `name`.in and what it includes."""
    for line in logical_lines(f"{name}.in"):
        if line.startswith("-r "):
            yield from sources(line.removeprefix("-r ").removesuffix(".txt"))
        else:
            yield line


def with_extras(requirement: Requirement) -> set[str]:
    """Return the package that is asked for, and each of its extras: `name`, `name[extra]`."""
    name = canonicalize_name(requirement.name)
    return {name, *(f"{name}[{canonicalize_name(extra)}]" for extra in requirement.extras)}


def closure(roots: list[str], environment: Mapping[str, str]) -> Iterator[str]:
    """Yield all that `roots` need in an environment, as far as it is installed here."""
    waiting = [(Requirement(root), frozenset({""})) for root in roots]
    seen = set()
    while waiting:
        requirement, extras = waiting.pop()
        if requirement.marker and not any(
            requirement.marker.evaluate({**environment, "extra": extra}) for extra in extras
        ):
            continue
        wanted = (canonicalize_name(requirement.name), frozenset({"", *requirement.extras}))
        if wanted in seen:
            continue
        seen.add(wanted)
        yield from with_extras(requirement)
        waiting += [(dependency, wanted[1]) for dependency in dependencies_of(requirement.name)]


@functools.cache
def dependencies_of(name: str) -> tuple[Requirement, ...]:
    """What a package needs; nothing if it is not installed, as it is for another platform."""
    try:
        return tuple(map(Requirement, requires(name) or []))
    except PackageNotFoundError:
        return ()


def runtime_imports(path: Path) -> Iterator[str]:
    """Yield the top-level modules that a file imports, but for those that type checkers need."""
    for node in ast.walk(without_type_checking(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def without_type_checking(module: ast.Module) -> ast.Module:
    module.body = [
        node
        for node in module.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return module


class TestImage:
    """The image: server.py and its packages, and no way to become root."""

    @pytest.fixture
    def instructions(self) -> list[tuple[str, str]]:
        """Return the Dockerfile's instructions and their arguments."""
        text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
        lines = text.replace("\\\n", " ").splitlines()
        return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]

    def test_is_built_from_two_files_alone(self, instructions: list[tuple[str, str]]) -> None:
        patterns = logical_lines(".dockerignore")
        assert patterns[0] == "*"
        assert sorted(patterns[1:]) == ["!requirements.txt", "!server.py"]
        copied = [a.split()[0] for i, a in instructions if i == "COPY" and "--from" not in a]
        assert sorted(copied) == ["requirements.txt", "server.py"]
        assert not any(instruction == "ADD" for instruction, _ in instructions)

    def test_runs_as_a_numbered_user_who_is_not_root(
        self, instructions: list[tuple[str, str]]
    ) -> None:
        users = [argument for instruction, argument in instructions if instruction == "USER"]
        assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", users[-1])
        # Nothing after it is done as somebody else.
        assert [i for i, _ in instructions][-3:] == ["USER", "EXPOSE", "CMD"]

    def test_starts_python_itself_so_that_sigterm_reaches_it(
        self, instructions: list[tuple[str, str]]
    ) -> None:
        command = [argument for instruction, argument in instructions if instruction == "CMD"]
        assert [json.loads(argument) for argument in command] == [["python", "server.py"]]
        assert not any(instruction == "ENTRYPOINT" for instruction, _ in instructions)

    def test_follows_the_rules_of_hadolint(self) -> None:
        hadolint = Path(sys.executable).parent / "hadolint"
        subprocess.run([hadolint, ROOT / "Dockerfile"], check=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
class TestMakefile:
    """`make` on a fresh machine: it works, or says what is missing."""

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        # Free of what an outer `make test` hands down.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        return subprocess.run(
            ["make", "-f", str(ROOT / "Makefile"), *arguments],
            cwd=ROOT,
            env=inherited | environment,
            capture_output=True,
            text=True,
        )

    def test_lists_every_target_with_its_purpose(self) -> None:
        listed = re.findall(r"^  make (\S+) +\S", self.make().stdout, re.MULTILINE)
        phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert phony is not None
        assert listed == phony[1].split()
        assert {"run", "test", "lint", "image"} <= set(listed)

    @pytest.mark.parametrize(
        ("works_for", "sentence"),
        [
            ("nothing", "This needs Python 3.11 or newer"),
            ("version", "cannot make virtual environments here"),
        ],
    )
    def test_says_what_python_lacks(self, tmp_path: Path, works_for: str, sentence: str) -> None:
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\ncase "$2" in *{works_for}*) exit 0;; esac\nexit 1\n')
        python.chmod(0o755)
        result = self.make("lint", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
        assert result.returncode == 2
        assert sentence in result.stderr
        assert not (tmp_path / "venv").exists()

    @pytest.mark.parametrize(
        ("target", "stamp", "requirements"),
        [
            ("run", ".runnable", "requirements-local.txt"),
            ("lint", ".installed", "requirements-dev.txt"),
        ],
    )
    def test_installs_only_when_the_requirements_have_changed(
        self, tmp_path: Path, target: str, stamp: str, requirements: str
    ) -> None:
        command = f"local/install.py {tmp_path} {requirements}"
        assert command in self.make("-n", target, f"VENV={tmp_path}").stdout
        (tmp_path / stamp).touch()
        newer = (ROOT / requirements).stat().st_mtime + 1
        os.utime(tmp_path / stamp, (newer, newer))
        assert "install.py" not in self.make("-n", target, f"VENV={tmp_path}").stdout

    @pytest.mark.parametrize(
        ("fifo", "is_on"), [("1", True), ("yes", True), ("0", False), ("no", False), ("", False)]
    )
    def test_a_switch_can_be_turned_off(self, tmp_path: Path, fifo: str, is_on: bool) -> None:
        shown = self.make("-n", "run", f"VENV={tmp_path}", f"FIFO={fifo}").stdout
        assert ("--fifo" in shown) is is_on


class TestInstall:
    """local/install.py, with a real pip and one small package, and no index."""

    @pytest.fixture
    def wheel(self, tmp_path: Path) -> Path:
        """Make a package that holds nothing but its name."""
        wheel = tmp_path / "wheels" / "tiny-1.0-py3-none-any.whl"
        wheel.parent.mkdir()
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny.py", "")
            info = "tiny-1.0.dist-info"
            archive.writestr(
                f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
        return wheel

    @pytest.fixture
    def empty(self, tmp_path: Path) -> Path:
        """An environment that has nothing but the pip of this one: to install it takes seconds."""
        venv.create(tmp_path / "venv", symlinks=True)
        pip = Path(sysconfig.get_path("purelib")) / "pip"
        installed = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")})
        (Path(installed) / "pip").symlink_to(pip)
        return tmp_path

    def install(
        self, tmp_path: Path, wheel: Path, digest: str = "", **settings: str
    ) -> subprocess.CompletedProcess[str]:
        requirements = tmp_path / "requirements.txt"
        digest = digest or hashlib.sha256(wheel.read_bytes()).hexdigest()
        requirements.write_text(f"tiny==1.0 \\\n    --hash=sha256:{digest}\n")
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        return subprocess.run(
            [sys.executable, "local/install.py", tmp_path / "venv", requirements, "1 MB"],
            cwd=ROOT,
            env=kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"} | settings,
            capture_output=True,
            text=True,
        )

    def test_installs_and_says_what_it_costs(self, tmp_path: Path, wheel: Path) -> None:
        """It does so in place of an environment that is broken, too."""
        (tmp_path / "venv" / "bin").mkdir(parents=True)
        (tmp_path / "venv" / "bin" / "python").symlink_to(tmp_path / "gone")
        result = self.install(tmp_path, wheel, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheel.parent))
        assert result.returncode == 0, result.stderr
        assert f"Setting up {tmp_path / 'venv'} from requirements.txt: 1 MB." in result.stdout
        assert re.search(r"is ready after \d+ s\.$", result.stdout)
        python = tmp_path / "venv" / "bin" / "python"
        subprocess.run([python, "-c", "import tiny"], check=True)

    @pytest.mark.parametrize(
        "index", ["http://127.0.0.1:9/simple", "https://absent.invalid/simple"]
    )
    def test_says_that_it_is_offline(self, empty: Path, wheel: Path, index: str) -> None:
        result = self.install(empty, wheel, PIP_INDEX_URL=index)
        assert result.returncode == 1
        assert result.stderr.startswith("The packages cannot be downloaded: this machine does not")
        assert result.stderr.count("\n") == 1

    def test_says_what_pip_says_otherwise(self, empty: Path, wheel: Path) -> None:
        """A package that is not the pinned one is refused, and no network is blamed for it."""
        result = self.install(
            empty, wheel, "0" * 64, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheel.parent)
        )
        assert result.returncode == 1
        assert "DO NOT MATCH THE HASHES" in result.stderr
        assert result.stderr.count("\n") == 1


class TestContinuousIntegration:
    """.ci/run, which runs what a person runs."""

    def test_is_a_script_that_bash_accepts(self) -> None:
        script = ROOT / ".ci" / "run"
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", script], check=True)

    def test_checks_style_and_then_runs_the_tests(self) -> None:
        assert "\nmake lint\nmake test AGAIN=1 #" in (ROOT / ".ci" / "run").read_text()
