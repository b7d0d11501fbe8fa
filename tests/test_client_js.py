"""The browser client: its tests and types under Node, its package, and the console."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from local.console import FILES, console_link, content_security_policy, serve_console

CLIENT = Path(__file__).resolve().parent.parent / "client"
MODULES = ("agenticai-ws", "react", "ag-ui")
NODE_MIN_MAJOR = 20
NODE_TIMEOUT_S = 300


def node(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Node, or a program that comes with it, in `client/`; skip where it is missing or old."""
    command = shutil.which(arguments[0])
    node_command = shutil.which("node")
    if command is None or node_command is None:
        pytest.skip(f"{arguments[0]} is not installed")
    version = subprocess.run(
        [node_command, "--version"], capture_output=True, text=True, check=True
    )
    if int(version.stdout.strip().removeprefix("v").partition(".")[0]) < NODE_MIN_MAJOR:
        pytest.skip(f"Node {version.stdout.strip()} is older than {NODE_MIN_MAJOR}")
    return subprocess.run(
        [command, *arguments[1:]],
        cwd=CLIENT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=NODE_TIMEOUT_S,
        check=False,
    )


class TestModule:
    def test_unit_tests_pass(self) -> None:
        """Every transition and item with clock and sockets faked, and ten thousand random runs."""
        files = sorted(str(path.relative_to(CLIENT)) for path in CLIENT.glob("test/*.test.js"))
        done = node("node", "--test", *files)
        assert done.returncode == 0, done.stdout + done.stderr
        count = re.search(r"^(?:#|\N{INFORMATION SOURCE}) pass (\d+)", done.stdout, re.MULTILINE)
        assert count, done.stdout
        assert int(count[1]) >= 205, done.stdout

    def test_types_are_checked(self) -> None:
        """The module keeps what its declarations promise, and those say what users write."""
        tsc = CLIENT / "node_modules" / "typescript" / "bin" / "tsc"
        if not tsc.exists():
            pytest.skip("TypeScript is not installed: run `npm ci` in client/")
        done = node("node", str(tsc), "--project", ".")
        assert done.returncode == 0, done.stdout

    def test_package_holds_what_a_user_needs(self) -> None:
        """And nothing else: no tests, no console, no lock file."""
        done = node("npm", "pack", "--dry-run", "--json", "--offline")
        assert done.returncode == 0, done.stderr
        packed = json.loads(done.stdout)
        package = packed[0] if isinstance(packed, list) else next(iter(packed.values()))
        assert sorted(file["path"] for file in package["files"]) == [
            "LICENSE",
            "README.md",
            "ag-ui.d.ts",
            "ag-ui.js",
            "agenticai-ws.d.ts",
            "agenticai-ws.js",
            "dist/ag-ui.d.ts",
            "dist/ag-ui.js",
            "dist/agenticai-ws.d.ts",
            "dist/agenticai-ws.js",
            "dist/package.json",
            "dist/react.d.ts",
            "dist/react.js",
            "package.json",
            "react.d.ts",
            "react.js",
        ]

    def test_license(self) -> None:
        """The package carries the repository's licence, and says which one it is."""
        licence = (CLIENT.parent / "LICENSE").read_text()
        assert licence.startswith("MIT License\n")
        assert (CLIENT / "LICENSE").read_text() == licence
        assert json.loads((CLIENT / "package.json").read_text())["license"] == "MIT"
        for name in (f"{each}.{kind}" for each in MODULES for kind in ("js", "d.ts")):
            assert "SPDX-License-Identifier: MIT" in (CLIENT / name).read_text(), name

    def test_size_is_what_the_readme_says(self) -> None:
        """Of the file for pages, minified and gzipped, to a tenth of a kilobyte."""
        size = len(gzip.compress((CLIENT / "dist" / "agenticai-ws.js").read_bytes(), 9))
        said = re.search(r"minified and gzipped\s+([\d.]+) KB", (CLIENT / "README.md").read_text())
        assert said, "README.md does not say how large it is"
        assert abs(float(said[1]) - size / 1000) < 0.1, f"it has {size / 1000:.1f} KB"

    def test_lock_file_names_no_registry(self) -> None:
        """Each machine installs from its own; integrity hashes say what."""
        lock = json.loads((CLIENT / "package-lock.json").read_text())
        packages = {name: package for name, package in lock["packages"].items() if name}
        assert packages
        for name, package in packages.items():
            assert package["integrity"].startswith("sha512-"), name
            assert "resolved" not in package, name

    def test_every_option_and_code_is_declared(self) -> None:
        """What the module reads from its options, and the codes it makes, its declarations name."""
        module = (CLIENT / "agenticai-ws.js").read_text()
        declarations = (CLIENT / "agenticai-ws.d.ts").read_text()
        signature = re.search(
            r"export function connect\(url, \{(.*?)\} = \{\}\)", module, re.DOTALL
        )
        assert signature
        options = re.findall(r"\b([a-zW]\w+)(?: = |,)", re.sub(r"= \{.*\}", "= 0", signature[1]))
        assert {"getToken", "minDelay", "clock", "random"} <= set(options)
        for option in options:
            assert re.search(rf"^  {option}\?", declarations, re.MULTILINE), option
        codes = set(re.findall(r"GatewayError\('(\w+)'", module))
        assert len(codes) >= 9
        for code in codes:
            assert f"| `{code}` |" in declarations, code


class TestConsole:
    """The page, and the server that brings it to a browser."""

    page = (CLIENT / "console.html").read_text(encoding="utf-8")

    def test_policy_allows_its_own_script_and_style_only(self) -> None:
        """By their hashes: no inline code of anybody else runs."""
        policy = content_security_policy()
        for directive, element in (
            ("script-src 'self'", r'<script type="module">(.*?)</script>'),
            ("style-src", r"<style>(.*?)</style>"),
        ):
            (content,) = re.findall(element, self.page, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            expected = f"{directive} 'sha256-{digest}';"
            assert expected in policy, f"write into console.html's policy: {expected}"
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy
        assert "*" not in policy

    def test_nothing_comes_from_outside(self) -> None:
        """No address in the page but those of the SVG namespace and of the examples."""
        assert re.findall(r"\bsrc=|@import|url\(", self.page) == []
        addresses = set(re.findall(r"(?:https?|wss?)://[\w.:]+", self.page))
        examples = {"ws://127.0.0.1:8080", "wss://gateway.example.com"}
        assert addresses == {"http://www.w3.org", *examples}

    def test_peers_words_are_never_markup(self) -> None:
        """Nothing in the page makes markup or code from text."""
        found = re.findall(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|srcdoc"
            r"|setAttribute\(|DOMParser|createContextualFragment",
            self.page,
        )
        assert found == []

    def test_served_with_its_policy(self) -> None:
        """Both files, with types and headers; the policy also forbids being framed."""
        with serve_console() as address:
            where = urlsplit(address)
            connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=10)
            for path, (name, content_type) in FILES.items():
                for method in ("GET", "HEAD"):
                    connection.request(method, f"{path}?query=ignored")
                    response = connection.getresponse()
                    body = response.read()
                    assert response.status == 200
                    assert response.headers["Content-Type"] == content_type
                    assert response.headers["X-Content-Type-Options"] == "nosniff"
                    policy = response.headers["Content-Security-Policy"]
                    assert policy.endswith("frame-ancestors 'none'")
                    assert body == ((CLIENT / name).read_bytes() if method == "GET" else b"")
            connection.close()

    @pytest.mark.parametrize(
        "path", ["/package.json", "/../server.py", "/%2e%2e/server.py", "/test/"]
    )
    def test_serves_nothing_else(self, path: str) -> None:
        """Only the files of the list exist, however they are asked for."""
        with serve_console() as address:
            where = urlsplit(address)
            connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=10)
            connection.request("GET", path)
            assert connection.getresponse().status == 404
            connection.close()

    def test_link_carries_gateway_and_projects(self) -> None:
        """In the fragment, which no server sees."""
        link = console_link("http://127.0.0.1:1/", "ws://127.0.0.1:2/ws", "a b", "*")
        assert link == "http://127.0.0.1:1/#url=ws://127.0.0.1:2/ws&project=a+b&project=%2A"
