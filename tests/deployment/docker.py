"""What Docker does for a deployment: build, log in, push. A program; see ``person``.

An image is a folder with the files that the Dockerfile copies into it. Pushed, it lies in the
simulated AWS, whose service runs its ``server.py``. A file ``fail-build`` among the images lets the
next build fail, and so on.
"""

import json
import os
import pathlib
import re
import shutil
import sys
import time
import urllib.error
import urllib.request


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # as docker's progress comes


def ask(action: str, **request: str) -> None:
    url = os.environ["DOCKER_STANDIN_URL"] + "/docker/" + action
    try:
        urllib.request.urlopen(url, json.dumps(request).encode(), 30).close()
    except urllib.error.HTTPError as refusal:
        sys.exit(refusal.read().decode())


def images() -> pathlib.Path:
    return pathlib.Path(os.environ["DOCKER_STANDIN_FOLDER"])


def folder_of(image: str) -> pathlib.Path:
    return images() / re.sub(r"\W", "_", image)


def build(arguments: list[str]) -> None:
    flags = [a for a in arguments if a in ("--pull", "--no-cache")]
    rest = [a for a in arguments if a not in flags]
    options = dict(zip(rest[:-1:2], rest[1:-1:2], strict=True))
    context = pathlib.Path(rest[-1])
    dockerfile = pathlib.Path(options.get("--file", context / "Dockerfile")).read_text()
    target = folder_of(options["--tag"])
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE):
        for name in line.split():
            shutil.copy(context / name, target)
            say(f"#1 COPY {name}")
    time.sleep(float(os.environ.get("DOCKER_BUILD_SECONDS", "0")))
    say(f"#2 naming to {options['--tag']} done")


def main(command: str, *arguments: str) -> None:
    fails = images() / f"fail-{command}"
    if fails.exists():
        fails.unlink()
        sys.exit(f"ERROR: {command} failed, as it was told to")
    with open(images() / "calls", "a") as calls:
        calls.write(json.dumps([command, *arguments]) + "\n")
    if command == "version":
        print("linux")
    elif command == "build":
        build(list(arguments))
    elif command == "login":
        if sys.stdin.read().strip() != "secret":
            sys.exit("Error: 401 Unauthorized")
        ask("login", registry=arguments[-1])
        print("Login Succeeded")
    elif command == "push":
        ask("push", image=arguments[0], folder=str(folder_of(arguments[0])))
        say("latest: digest: sha256:0 size: 1")
    else:
        sys.exit(f"docker: '{command}' is not a docker command")


if __name__ == "__main__":
    main(*sys.argv[1:])
