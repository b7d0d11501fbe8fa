"""The workflows of GitHub Actions: well formed, allowed little, and running what there is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(path: Path) -> dict[Any, Any]:
    workflow: dict[Any, Any] = yaml.safe_load(path.read_text("utf-8"))
    return workflow


def steps(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each step, with the name of its job."""
    for name, job in load(path)["jobs"].items():
        for step in job["steps"]:
            yield name, step


def program(name: str) -> str | None:
    """Where a program is, be it beside this Python or on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
class TestEveryWorkflow:
    def test_actionlint_finds_nothing(self, path: Path) -> None:
        actionlint = program("actionlint")
        if actionlint is None:
            pytest.skip("actionlint is not installed; the workflow `check` runs it")
        done = subprocess.run([actionlint, path], capture_output=True, text=True, check=False)
        assert done.stdout == ""

    def test_zizmor_finds_nothing(self, path: Path) -> None:
        """Nothing that an attacker could use: injected text, rights, actions that can change."""
        zizmor = program("zizmor")
        if zizmor is None:
            pytest.skip("zizmor is not installed: pip install zizmor")
        command = [zizmor, "--offline", "--no-progress", "--no-ignores", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout

    def test_actions_cannot_change(self, path: Path) -> None:
        """An action is named by its commit, with the version beside it; an image by its version."""
        for line in path.read_text("utf-8").splitlines():
            if found := re.search(r"uses: (.*)$", line):
                pinned = r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+"
                image = r"docker://[\w/-]+:\d+\.\d+\.\d+"
                assert re.fullmatch(f"{pinned}|{image}", found[1]), line

    def test_token_may_only_read(self, path: Path) -> None:
        assert load(path)["permissions"] == {"contents": "read"}

    def test_credentials_are_not_left_behind(self, path: Path) -> None:
        for _, step in steps(path):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False

    def test_jobs_end(self, path: Path) -> None:
        assert all("timeout-minutes" in job for job in load(path)["jobs"].values())

    def test_what_is_run_exists(self, path: Path) -> None:
        """Make's targets, the scripts and the test files that the steps name."""
        makefile = (ROOT / "Makefile").read_text("utf-8")
        for _, step in steps(path):
            text = step.get("run", "")
            for target in re.findall(r"\bmake ([a-z][\w-]*)", text):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE)
            for name in re.findall(r"(?<![\w$/])(?:\./)?([\w./-]+\.(?:py|ps1|psd1|txt))\b", text):
                assert (ROOT / name).exists(), name


class TestDeploy:
    PATH = ROOT / ".github" / "workflows" / "deploy.yml"

    def test_is_started_by_hand(self) -> None:
        workflow = load(self.PATH)
        assert list(workflow[True]) == ["workflow_dispatch"]  # YAML reads `on` as true

    def test_waits_for_approval(self) -> None:
        """The job belongs to an environment, whose reviewers approve it."""
        job = load(self.PATH)["jobs"]["deploy"]
        assert job["environment"] == "${{ inputs.environment }}"

    def test_takes_a_role_and_no_key(self) -> None:
        job = load(self.PATH)["jobs"]["deploy"]
        assert job["permissions"] == {"contents": "read", "id-token": "write"}
        assert "secrets." not in self.PATH.read_text("utf-8")

    def test_runs_the_script_that_people_run(self) -> None:
        script = (ROOT / "deploy-ecs.ps1").read_text("utf-8")
        *_, (_, step) = steps(self.PATH)
        assert "./deploy-ecs.ps1 @arguments" in step["run"]
        given = re.findall(r"^ *(\w+) += ", step["run"], re.MULTILINE)
        given += re.findall(r"\$arguments\['(\w+)'\]", step["run"])
        header = script.partition("$ErrorActionPreference")[0]
        assert set(given) == {
            *("Environment", "AwsRegion", "StackName", "MainStackName"),
            *("CertificateArn", "ParameterOverride", "Rebuild", "WhatIf"),
        }
        for name in set(given) - {"WhatIf"}:
            assert re.search(rf"\]\${name}\b", header)
        assert "SupportsShouldProcess" in header
