"""The sample agents, and `python -m local` as a person uses it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent import agenticai_agent
from aws_standin import Platform
from aws_standin.thread import ThreadedStandIn
from local import agents
from local.event_source import deliver_batch, queue_arn
from local.screen import log_line
from tests.talking import client_at
from tests.waiting import alive, free_port, wait_until

ROOT = Path(__file__).resolve().parent.parent


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def running_aws() -> Iterator[ThreadedStandIn]:
    with ThreadedStandIn() as aws:
        yield aws


@pytest.fixture
def platform(running_aws: ThreadedStandIn) -> Platform:
    return running_aws.call(running_aws.stand_in.create_platform)


@pytest.fixture
def fifo_platform(running_aws: ThreadedStandIn) -> Platform:
    make = running_aws.stand_in.create_platform
    return running_aws.call(lambda: make(fifo_updates=True, prefix="fifo"))


class TestAgents:
    """The sample agents, without their queues and behind them."""

    @pytest.fixture(autouse=True)
    def environment(self, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
        self.use(platform, monkeypatch)

    def use(self, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
        for client in (agenticai_agent.sqs_client, agenticai_agent.dynamodb_client):
            client.cache_clear()
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        for name, value in (platform.environment() | {"AGENT_STEP_SECONDS": "0"}).items():
            monkeypatch.setenv(name, value)

    def record(self, number: int, body: str) -> dict[str, Any]:
        return {
            "messageId": f"message-{number}",
            "eventSourceARN": "arn:aws:sqs:us-east-1:123456789012:agenticai-dev",
            "body": body,
        }

    def order(self, project_id: str | None = "proj") -> str:
        return json.dumps(
            {
                "action": "forward",
                "type": "dev",
                "message_id": "m",
                "project_id": project_id,
                "data": None,
                "connection_id": "c",
                "client_id": "c",
                "user": None,
                "timestamp": "2025-11-24T12:00:00.000Z",
            }
        )

    def received(self, platform: Platform) -> list[dict[str, Any]]:
        answer = platform.client("sqs").receive_message(
            QueueUrl=platform.queue_urls["updates"],
            MaxNumberOfMessages=10,
            AttributeNames=["All"],
        )
        return list(answer.get("Messages", []))

    def test_report_each_step_to_the_project(self, platform: Platform) -> None:
        answer = agents.lambda_handler({"Records": [self.record(1, self.order())]}, None)
        assert answer == {"batchItemFailures": []}
        updates = [json.loads(message["Body"]) for message in self.received(platform)]
        assert {update["project_id"] for update in updates} == {"proj"}
        assert {update["in_reply_to"] for update in updates} == {"m"}
        steps = [update for update in updates if "step" in update["data"]]
        assert len({step["event_id"] for step in steps}) == 4
        assert [step["data"]["status"] for step in steps] == ["working"] * 3 + ["done"]
        logged = [u["data"] for u in updates if u["type"] == "stream" and not u.get("ephemeral")]
        assert "".join(piece["text"] for piece in logged) == agents.CODE
        assert logged[-1]["state"] == "done"

    def test_report_to_the_sender_alone_when_there_is_no_project(self, platform: Platform) -> None:
        agents.lambda_handler({"Records": [self.record(1, self.order(None))]}, None)
        updates = [json.loads(message["Body"]) for message in self.received(platform)]
        assert len(updates) >= 5
        assert all(u["connection_id"] == "c" and "project_id" not in u for u in updates)

    def test_name_the_orders_that_failed(self) -> None:
        good = self.order()
        records = [self.record(1, good), self.record(2, "no JSON"), self.record(3, good)]
        answer = agents.lambda_handler({"Records": records}, None)
        assert answer == {"batchItemFailures": [{"itemIdentifier": "message-2"}]}

    def test_keep_a_projects_updates_in_fieldsin_a_fifo_queue(
        self, fifo_platform: Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.use(fifo_platform, monkeypatch)
        project = "a project \N{SNOWMAN}"
        event = {"Records": [self.record(1, self.order(project))]}
        agents.lambda_handler(event, None)
        agents.lambda_handler(event, None)  # delivered again, within the deduplication interval
        messages = self.received(fifo_platform)
        said = [json.loads(message["Body"])["data"] for message in messages]
        assert [each["step"] for each in said if "step" in each] == [1, 2, 3, 4]
        assert [each.get("state") for each in said].count("done") == 1
        assert len({message["Attributes"]["MessageGroupId"] for message in messages}) == 1

    def test_get_lambda_records_and_lose_only_what_they_have_done(self, platform: Platform) -> None:
        sqs, url = platform.client("sqs"), platform.queue_urls["qa"]
        attribute = {"DataType": "String", "StringValue": "qa"}
        for body in ("good", "bad"):
            sqs.send_message(
                QueueUrl=url, MessageBody=body, MessageAttributes={"MessageType": attribute}
            )
        seen: list[dict[str, Any]] = []

        def handler(event: dict[str, Any], _context: object) -> dict[str, Any]:
            seen.extend(event["Records"])
            failed = [r["messageId"] for r in event["Records"] if r["body"] == "bad"]
            return {"batchItemFailures": [{"itemIdentifier": item} for item in failed]}

        assert deliver_batch(sqs, url, queue_arn(sqs, url), handler, batch_size=10) == 2
        assert [record["body"] for record in seen] == ["good", "bad"]
        first = seen[0]
        assert first["eventSourceARN"].endswith(":" + url.rpartition("/")[2])
        assert first["messageAttributes"]["MessageType"]["stringValue"] == "qa"
        assert first["attributes"]["ApproximateReceiveCount"] == "1"
        left = sqs.get_queue_attributes(
            QueueUrl=url, AttributeNames=["ApproximateNumberOfMessagesNotVisible"]
        )
        assert left["Attributes"] == {"ApproximateNumberOfMessagesNotVisible": "1"}


class TestLogLines:
    """What children print, as a person reads it."""

    def test_shows_a_record_as_words(self) -> None:
        record = {
            "time": "2025-11-24T12:00:00.000Z",
            "level": "INFO",
            "message": "listening",
            "host": "127.0.0.1",
            "port": 8080,
            "words": "two words",
        }
        text = log_line("server:8080", json.dumps(record))
        assert text is not None
        assert re.fullmatch(
            r"\d\d:00:00 server:8080 INFO    listening  host=127.0.0.1  port=8080"
            r'  words="two words"',
            text,
        )

    def test_keeps_control_characters_from_the_terminal(self) -> None:
        for line in ("\033[2J", '{"message":"\\u001b[2J","x":"\\u009b2J\\u202e"}'):
            text = log_line("server", line)
            assert text is not None
            assert text.isprintable()
            assert "2J" in text

    def test_shows_a_traceback_line_by_line(self) -> None:
        text = log_line("server", json.dumps({"message": "fault", "exception": "one\ntwo\033"}))
        assert text is not None
        assert text.endswith("fault\n    one\n    two\\x1b")

    def test_leaves_figures_to_machines(self) -> None:
        assert log_line("server", '{"_aws": {}, "Connections": 1}') is None

    def test_shows_what_is_no_record(self) -> None:
        for line in ("Traceback (most recent call last):", "[1]", '{"message": 1, "time": 5}'):
            assert log_line("server", line) is not None


class Command:
    """A running `python -m local`, and what it has printed."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "local", *arguments],
            cwd=ROOT,
            env=os.environ | {"AGENT_STEP_SECONDS": "0.05"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                self.lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_until_ready(self) -> list[str]:
        """Return the URLs of its servers."""
        wait_until(lambda: "Ctrl-C ends" in self.output or not self.reader.is_alive(), 60)
        ready = re.search(r"^Ready: (.+)$", self.output, re.MULTILINE)
        assert ready is not None, self.output
        return ready[1].split(", ")

    def children(self) -> list[int]:
        """Return the ids of the processes it has started."""
        pid = self.process.pid
        listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in listing.split()]

    def servers(self) -> list[int]:
        return [
            pid
            for pid in self.children()
            if b"server.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def stop(self) -> int:
        """Press Ctrl-C; return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(30)
        self.reader.join(10)
        return code


@contextmanager
def running(*arguments: str, **environment: str) -> Iterator[Command]:
    """Run `python -m local`; see to it that nothing of it is left."""
    command = Command("--port", "0", *arguments, **environment)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.terminate()
            command.wait()


def status(url: str, path: str = "/health") -> int | None:
    """Return the status of a server's answer, or None when there is none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url.replace('ws:', 'http:', 1)}{path}", timeout=2) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@linux_only
class TestCommand:
    """`python -m local`, with real sockets and real signals."""

    @pytest.mark.parametrize("arguments", [(), ("--fifo",)], ids=["standard", "fifo"])
    def test_carries_an_fieldsto_an_agent_and_its_updates_back(
        self, arguments: tuple[str, ...]
    ) -> None:
        with running(*arguments) as command:
            (url,) = command.wait_until_ready()
            with client_at(url) as client:
                client.send(action="subscribe", project_id="proj_123")
                client.receive_until(type="subscription_confirmed", project_id="proj_123")
                for message_id in ("first", "second"):
                    client.send(
                        action="forward",
                        type="dev",
                        message_id=message_id,
                        project_id="proj_123",
                        data={"task": "A login page"},
                    )
                seen: list[dict[str, Any]] = []
                while sum(m.get("data", {}).get("status") == "done" for m in seen) < 2:
                    seen += client.receive_until(type="project_updated")
            confirmed = {m["message_id"] for m in seen if m["type"] == "forward_confirmed"}
            assert confirmed == {"first", "second"}
            for message_id in confirmed:
                steps = [
                    m["data"]["step"]
                    for m in seen
                    if m.get("in_reply_to") == message_id and m["type"] != "stream"
                ]
                assert steps == [1, 2, 3, 4]

    def test_agents_work_on_several_orders_at_once(self) -> None:
        """An order does not wait for those before it."""
        with running(AGENT_STEP_SECONDS="0.5") as command:
            (url,) = command.wait_until_ready()
            with client_at(f"{url}/?project_id=proj_123") as client:
                client.receive_until(type="subscription_confirmed")
                orders = {f"order-{number}" for number in range(8)}
                for order in orders:
                    client.send(
                        action="forward",
                        type="dev",
                        message_id=order,
                        project_id="proj_123",
                    )
                started, done = set(), 0
                while done < len(orders):
                    event = client.receive_until(type="project_updated")[-1]
                    data = event["data"]
                    started |= {event["in_reply_to"]}
                    done += data["status"] == "done"
                    assert not done or started == orders

    def test_ends_all_it_has_started_on_ctrl_c(self) -> None:
        with running(TASKS="2") as command:
            urls = command.wait_until_ready()
            assert len(set(urls)) == 2
            console = re.search(r"http://\S+#url=\S+", command.output)
            assert console is not None
            assert status(console[0].partition("#")[0].rstrip("/"), "/") == 200
            children = command.children()
            assert len(children) == 3  # the agents and two servers
            with client_at(urls[0]) as client:
                assert command.stop() == 0
                client.receive_until(type="reconnect")
            assert not any(map(alive, children)), command.output
            assert "killed" not in command.output
            assert "Traceback" not in command.output

    def test_does_not_wait_for_the_servers_on_a_second_ctrl_c(self) -> None:
        with running(DRAIN_SECONDS="60") as command:
            (url,) = command.wait_until_ready()
            children = command.children()
            with client_at(url):
                command.process.send_signal(signal.SIGINT)
                wait_until(lambda: "draining" in command.output)
                assert command.stop() == 0
            assert not any(map(alive, children))

    def test_says_which_process_has_died(self) -> None:
        with running() as command:
            command.wait_until_ready()
            children = command.children()
            os.kill(command.servers()[0], signal.SIGKILL)
            assert command.wait() == 1
            assert "server-1 ended by itself (exit code -9)" in command.output
            assert not any(map(alive, children))

    def test_replaces_a_server_that_has_died_while_another_goes_on(self) -> None:
        with running(TASKS="2") as command:
            urls = command.wait_until_ready()
            dead = command.servers()[1]
            os.kill(dead, signal.SIGKILL)
            wait_until(lambda: "server-2 ended by itself (exit code -9)" in command.output)
            wait_until(lambda: len(command.servers()) == 2 and dead not in command.servers())
            wait_until(lambda: status(urls[1]) == 200, 30)

    def test_ignores_a_persons_own_aws_settings(self, tmp_path: Path) -> None:
        config = tmp_path / "config"
        config.write_text("[profile work]\nregion = eu-west-1\n")
        with running(
            AWS_PROFILE="absent",
            AWS_CONFIG_FILE=str(config),
            AWS_ENDPOINT_URL_SQS="http://127.0.0.1:1",
            HTTP_PROXY="http://127.0.0.1:1",
        ) as command:
            (url,) = command.wait_until_ready()
            assert status(url) == 200

    def test_says_what_to_do_when_a_port_is_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            command = Command("--port", str(port))
            assert command.wait() == 1
        assert f"Port {port} cannot be used" in command.output
        assert f"make run PORT={port + 10}, or python -m local --port {port + 10}" in command.output
        assert len(command.output.strip().splitlines()) == 1

    @pytest.mark.parametrize(
        "program", [["-m", "local.console"], ["-m", "aws_standin", "--port"]], ids=" ".join
    )
    def test_other_programs_say_that_a_port_is_taken(self, program: list[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = str(other.getsockname()[1])
            command = [sys.executable, *program, port]
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 1
        assert result.stderr.startswith(f"Port {port} cannot be used (address already in use)")
        assert result.stderr.count("\n") == 1

    def test_says_so_when_it_runs_already(self) -> None:
        with running() as command:
            (url,) = command.wait_until_ready()
            second = Command("--port", url.rpartition(":")[2])
            assert second.wait() == 1
            assert "is this running already?" in second.output
            assert len(second.output.strip().splitlines()) == 1
            assert status(url) == 200

    @pytest.mark.parametrize(
        "arguments", [["--tasks", "0"], ["--tasks", "two"], ["--port", "65535"], ["--nonsense"]]
    )
    def test_refuses_bad_options(self, arguments: list[str]) -> None:
        command = Command(*arguments)
        assert command.wait() == 2
        assert arguments[0] in command.output
        assert "_" not in command.output  # as in the name of a function

    def test_explains_its_options(self) -> None:
        command = Command("--help")
        assert command.wait() == 0
        for option in ("--port", "--aws-port", "--tasks", "--fifo"):
            assert option in command.output


@contextmanager
def process(*command: str | Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command with `options` of Popen, without the agents' pauses; kill it in the end."""
    environment = os.environ | {"AGENT_STEP_SECONDS": "0.05"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **options) as started:
        try:
            yield started
        finally:
            started.kill()


def family(pid: int) -> list[int]:
    """Return a process and all that it and its children have started, by id."""
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [pid, *(each for child in listing.split() for each in family(int(child)))]


def ignore_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@linux_only
class TestDeadTerminal:
    """However the terminal or the parent goes, nothing is left, and the port is free again."""

    @pytest.fixture
    def port(self) -> int:
        return free_port()

    @pytest.fixture
    def command(self, port: int) -> list[str]:
        return [sys.executable, "-m", "local", "--port", str(port), "--tasks", "1"]

    def when_ready(self, pid: int, port: int) -> list[int]:
        """Wait until the server does its job; return all processes there are."""
        wait_until(lambda: status(f"ws://127.0.0.1:{port}") == 200, 30)
        pids = family(pid)
        assert len(pids) >= 3  # itself, the agents, the server
        return pids

    def all_have_ended(self, pids: list[int], port: int) -> None:
        wait_until(lambda: not any(map(alive, pids)), 20)
        # Of a process that is gone, another thread may still hold the port for a moment.
        wait_until(lambda: is_free(port))

    def test_reader_of_the_output_ends_with_ctrl_c(self, command: list[str], port: int) -> None:
        """As `| tee log` does: Ctrl-C ends it first, and nothing can be printed any more."""
        with process(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as started:
            pids = self.when_ready(started.pid, port)
            assert started.stdout is not None
            started.stdout.close()
            started.send_signal(signal.SIGINT)
            self.all_have_ended(pids, port)

    def test_reader_of_the_output_has_seen_enough(self, command: list[str], port: int) -> None:
        """As `| head` does: what is printed next ends everything."""
        with process(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as started:
            pids = self.when_ready(started.pid, port)
            assert started.stdout is not None
            started.stdout.close()
            with client_at(f"ws://127.0.0.1:{port}"):  # which the server notes in its log
                self.all_have_ended(pids[1:], port)

    def test_nobody_reads_the_output(self, command: list[str], port: int) -> None:
        """As when a terminal is held by Ctrl-S: Ctrl-C ends everything all the same."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(write_end, b"x" * 65536):
                pass
        os.set_blocking(write_end, True)
        with process(*command, stdout=write_end, stderr=write_end) as started:
            os.close(write_end)
            pids = self.when_ready(started.pid, port)
            started.send_signal(signal.SIGINT)
            self.all_have_ended(pids, port)
        os.close(read_end)

    def test_terminal_is_closed(self, command: list[str], port: int) -> None:
        """Its window is gone: there is SIGHUP, and printing fails."""
        # Who runs these tests under `nohup` has SIGHUP ignored, and then nothing is to end.
        code = "import pty, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL)"
        emulator = [sys.executable, "-c", f"{code}; pty.spawn(sys.argv[1:])", *command]
        with process(*emulator, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as started:
            pids = self.when_ready(started.pid, port)
            started.kill()
            started.wait()
            self.all_have_ended(pids, port)

    def test_it_is_killed(self, command: list[str], port: int) -> None:
        with process(*command, stdout=subprocess.DEVNULL) as started:
            pids = self.when_ready(started.pid, port)
            started.kill()
            started.wait()
            self.all_have_ended(pids, port)

    def test_its_parent_is_killed(self, command: list[str], port: int) -> None:
        """As make may be; without the option, it goes on as a daemon does."""
        shell = ["sh", "-c", f"{shlex.join(command)} --end-with-parent & wait"]
        with process(*shell, stdout=subprocess.DEVNULL) as started:
            pids = self.when_ready(started.pid, port)
            started.kill()
            started.wait()
            self.all_have_ended(pids, port)

    def test_background_job_of_a_script(self, command: list[str], port: int) -> None:
        """A shell has SIGINT ignored there; who sends it all the same is obeyed."""
        with process(*command, stdout=subprocess.DEVNULL, preexec_fn=ignore_sigint) as started:
            pids = self.when_ready(started.pid, port)
            started.send_signal(signal.SIGINT)
            self.all_have_ended(pids, port)

    def test_nohup_is_respected(self, command: list[str], port: int) -> None:
        """Who has SIGHUP ignored wants it to go on when the terminal is closed."""
        with process("nohup", *command, stdout=subprocess.DEVNULL) as started:
            pids = self.when_ready(started.pid, port)
            started.send_signal(signal.SIGHUP)
            assert all(map(alive, pids))
            started.send_signal(signal.SIGTERM)
            self.all_have_ended(pids, port)


def test_a_missing_package_is_said_in_a_sentence() -> None:
    """With a Python that has nothing installed, and `make run` is named."""
    result = subprocess.run(
        [sys.executable, "-S", "-m", "local"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "lacks the package msgspec" in result.stderr
    assert "make run" in result.stderr
    assert result.stderr.count("\n") == 1
