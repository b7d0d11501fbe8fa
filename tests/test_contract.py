"""The documents of the contract say what the code says, and their examples really happen."""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import CloseCode
from websockets.typing import Subprotocol

import server
import tests.moto_aws
from aws_standin import Fault as AwsFault
from aws_standin import StandIn
from server import ErrorCode, Gateway
from tests import contract
from tests.contract import ERRORS, MESSAGES, PROMISES, ROOT, Json, Message, message_of
from tests.issuer import running_issuer, token_of
from tests.server.aws import THROTTLED, always
from tests.server.fixtures import stand_in
from tests.server.gateways import running_gateway

__all__ = ["stand_in"]

DEADLINE_S = 30.0
EXAMPLES = contract.examples()


# --- The documents ----------------------------------------------------------------------------


def all_tests() -> set[str]:
    """``Class.function``, or ``function``, of all tests there are."""
    found = set()
    for path in [ROOT / "test_server.py", *(ROOT / "tests").rglob("test_*.py")]:
        for node in ast.parse(path.read_text("utf-8")).body:
            functions = node.body if isinstance(node, ast.ClassDef) else [node]
            prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            found |= {
                prefix + function.name
                for function in functions
                if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


class TestDocuments:
    def test_up_to_date(self) -> None:
        """What is written from the code is; if not: python -m tests.contract."""
        assert contract.ASYNCAPI.read_text("utf-8") == contract.asyncapi_yaml()
        text = contract.PROTOCOL.read_text("utf-8")
        assert text == contract.protocol(text)

    def test_stale_part_is_found(self) -> None:
        """A number changed by hand does not survive, a part that is missing is named."""
        text = contract.PROTOCOL.read_text("utf-8")
        assert contract.protocol(text.replace("262,144", "262,145")) == text
        with pytest.raises(LookupError, match="closes"):
            contract.protocol(text.replace("<!-- /closes -->", ""))

    def test_every_message_type(self) -> None:
        """Every message type of the server is described, or is known to be internal."""
        structs = {
            value
            for value in vars(server).values()
            if isinstance(value, type) and issubclass(value, msgspec.Struct)
        }
        # What the server says as an event has no type of its own there.
        described = [m.struct for m in MESSAGES if m.struct is not contract.StopRequested]
        assert set(described) | contract.INTERNAL == structs - {msgspec.Struct}
        assert len(described) == len(set(described))

    @pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
    def test_every_field(self, message: Message) -> None:
        """Every field of a message is described, in its order."""
        fields = [field.name for field in msgspec.structs.fields(message.struct)]
        assert list(message.fields) == fields

    def test_server_types_are_reserved(self) -> None:
        """Agents may use no word of the server's own, and every other one."""
        own = {message.name for message in contract.SERVER_MESSAGES} - {"event", "busy"}
        assert own == server.RESERVED_TYPES

    def test_every_error_code(self) -> None:
        """Every error code is explained, in its order, with an example of it."""
        assert list(ERRORS) == list(ErrorCode)
        assert all(fault.example["code"] == code for code, fault in ERRORS.items())

    def test_every_close_code(self) -> None:
        """Every close code that the server sends or logs is explained."""
        source = Path(server.__file__).read_text("utf-8")
        named = {int(CloseCode[name]) for name in re.findall(r"\bCloseCode\.([A-Z_]+)", source)}
        assert len(named) >= 5
        assert named | {server.CLOSE_UNAUTHENTICATED} <= contract.CLOSES.keys()

    def test_promises_are_shown(self) -> None:
        """The tests that are said to show a promise exist."""
        names = all_tests()
        assert len(names) > 400
        shown = {test for promise in PROMISES for test in promise.tests}
        assert shown - names == set()

    def test_subprotocol(self) -> None:
        """The words that open a connection are those of the code."""
        text = contract.PROTOCOL.read_text("utf-8")
        assert f"`{server.SUBPROTOCOL}`" in text
        assert f"`{server.BEARER_PREFIX}`" in text
        for path in server.Door.PATHS:
            assert f"`{path}`" in text


# --- The schemas ------------------------------------------------------------------------------


def validate(title: str, payload: Json) -> None:
    """Check a message against the schema of its kind.

    Raises:
        ValidationError: it does not fit.
    """
    Draft202012Validator(contract.schema_of(message_of(title))).validate(payload)


class TestSchemas:
    @pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
    def test_schema_is_one(self, message: Message) -> None:
        Draft202012Validator.check_schema(contract.schema_of(message))

    @pytest.mark.parametrize("title", EXAMPLES)
    def test_example_fits(self, title: str) -> None:
        validate(title, EXAMPLES[title])

    @pytest.mark.parametrize(
        "messages",
        [contract.CLIENT_MESSAGES, contract.SERVER_MESSAGES],
        ids=["client", "server"],
    )
    def test_messages_are_told_apart(self, messages: tuple[Message, ...]) -> None:
        """An example fits the schema of its own kind alone."""
        validators = {m.name: Draft202012Validator(contract.schema_of(m)) for m in messages}
        for title, payload in EXAMPLES.items():
            own = message_of(title)
            if own in messages:
                assert [n for n, v in validators.items() if v.is_valid(payload)] == [own.name]

    @pytest.mark.parametrize(
        ("title", "change"),
        [
            ("subscribe", {"project_id": ""}),
            ("subscribe", {"project_id": None}),
            ("subscribe", {"since": -1}),
            ("subscribe", {"since": 2**53}),
            ("forward", {"message_id": "x" * 257}),
            ("authenticate", {"token": 5}),
            ("update", {"type": "pong"}),
            ("update", {"type": ""}),
            ("event", {"seq": "2"}),
            ("overloaded", {"code": "too_fast"}),
        ],
    )
    def test_wrong_message(self, title: str, change: Json) -> None:
        """What the server does not take, or never says, fits no schema."""
        with pytest.raises(ValidationError):
            validate(title, {**EXAMPLES[title], **change})

    @pytest.mark.parametrize("title", [t for m in contract.CLIENT_MESSAGES for t in m.examples])
    def test_server_reads_what_fits(self, title: str) -> None:
        message = server.decode_message(json.dumps(EXAMPLES[title]).encode())
        assert isinstance(message, message_of(title).struct)


# --- AsyncAPI ---------------------------------------------------------------------------------

ASYNCAPI_CHECK = Path(__file__).parent / "asyncapi"


@pytest.fixture(scope="module")
def asyncapi_faults() -> Iterator[Callable[[str], list[Json]]]:
    """Errors and warnings of the AsyncAPI initiative's parser; installed where that is possible."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("npm, with which the AsyncAPI parser is installed, is not there")
    if not (ASYNCAPI_CHECK / "node_modules" / "@asyncapi" / "parser").exists():
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        installed = subprocess.run(
            command, cwd=ASYNCAPI_CHECK, capture_output=True, text=True, timeout=300, check=False
        )
        if installed.returncode != 0:
            pytest.skip(f"npm could not install the AsyncAPI parser: {installed.stderr[-300:]}")

    with subprocess.Popen(
        [node, str(ASYNCAPI_CHECK / "check.mjs")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as parser:
        assert parser.stdin is not None
        assert parser.stdout is not None
        documents, answers = parser.stdin, parser.stdout

        def faults(document: str) -> list[Json]:
            print(json.dumps(document), file=documents, flush=True)
            return [found for found in json.loads(answers.readline()) if found["severity"] <= 1]

        yield faults
        documents.close()


class TestAsyncApi:
    def test_parser_finds_nothing(self, asyncapi_faults: Callable[[str], list[Json]]) -> None:
        """The document is one that the AsyncAPI initiative's own parser takes."""
        assert asyncapi_faults(contract.ASYNCAPI.read_text("utf-8")) == []

    @pytest.mark.parametrize(
        ("place", "fault"),
        [
            ("components.schemas.Ping.type", "thing"),
            ("operations.ping.action", "answer"),
            ("operations.ping.messages.0.$ref", "#/channels/gateway/messages/pang"),
        ],
        ids=["no schema", "no such action", "no such message"],
    )
    def test_parser_finds_faults(
        self, place: str, fault: Any, asyncapi_faults: Callable[[str], list[Json]]
    ) -> None:
        """What is wrong with the document would be found where it is."""
        document = found = contract.asyncapi()
        *way, last = [int(step) if step.isdigit() else step for step in place.split(".")]
        for step in way:
            found = found[step]  # type: ignore[index]
        found[last] = fault  # type: ignore[index]
        paths = [fault["path"] for fault in asyncapi_faults(json.dumps(document))]
        assert any(place.startswith(".".join(path)) for path in paths)

    def test_everything_is_in_it(self) -> None:
        document = yaml.safe_load(contract.ASYNCAPI.read_text("utf-8"))
        shown = {
            example["name"]: example["payload"]
            for message in document["components"]["messages"].values()
            for example in message["examples"]
        }
        assert shown == EXAMPLES
        used = json.dumps(document["operations"])
        for message in MESSAGES:
            assert f"/messages/{message.name}" in used

    def test_lock_file_names_no_registry(self) -> None:
        """Each machine installs from its own; integrity hashes say what."""
        lock = json.loads((ASYNCAPI_CHECK / "package-lock.json").read_text("utf-8"))
        packages = {name: package for name, package in lock["packages"].items() if name}
        assert len(packages) > 50
        for name, package in packages.items():
            assert package["integrity"].startswith("sha512-"), name
            assert "resolved" not in package, name


# --- The examples, for real -------------------------------------------------------------------

SHOWN: dict[str, str] = {}
"""Title of an example to the test that shows it; filled by ``shows``, when this file is read."""


def shows(*titles: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a test as the one in which these examples happen; its `Transcript` sees to it."""

    def mark(test: Callable[..., Any]) -> Callable[..., Any]:
        for title in titles:
            assert title not in SHOWN, f"{title} is shown twice"
            SHOWN[title] = test.__name__
        return test

    return mark


class Transcript:
    """Compares what is really said with the examples."""

    def __init__(self) -> None:
        self.noted: set[str] = set()

    def note(self, title: str, payload: Json) -> Json:
        """See that ``payload`` is the example of that title, but for values that always vary."""
        validate(title, payload)
        example = EXAMPLES[title]
        assert list(payload) == list(example)
        for name, value in example.items():
            if name in contract.VARYING and value is not None:
                assert type(payload[name]) is type(value)
                if isinstance(value, str) and name != "token":
                    assert shape(payload[name]) == shape(value)
            else:
                assert payload[name] == value
        self.noted.add(title)
        return payload


def shape(text: str) -> str:
    """``text`` with its letters and digits alike: what UUIDs and timestamps have in common."""
    return re.sub(r"[0-9a-f]", "x", text)


@pytest.fixture
def transcript(request: pytest.FixtureRequest) -> Iterator[Transcript]:
    transcript = Transcript()
    yield transcript
    name = request.node.originalname
    assert transcript.noted == {title for title, test in SHOWN.items() if test == name}


class Client:
    """A client that sends examples, and waits for the message it expects."""

    def __init__(self, socket: ClientConnection, transcript: Transcript) -> None:
        self.socket = socket
        self._transcript = transcript

    async def send(self, title: str, **varying: Any) -> None:
        """Send an example; ``varying`` replaces what had to be made up."""
        await self.socket.send(
            json.dumps(self._transcript.note(title, {**EXAMPLES[title], **varying}))
        )

    async def receive(self, title: str) -> Json:
        """Receive a message, which must be that example."""
        return self._transcript.note(title, await self.next())

    async def next(self) -> Json:
        async with asyncio.timeout(DEADLINE_S):
            return cast("Json", json.loads(await self.socket.recv()))

    async def close_code(self) -> int | None:
        """What the connection is closed with; messages before it are passed over."""
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.suppress(ConnectionClosed):
                async for _ in self.socket:
                    pass
            await self.socket.wait_closed()
        return self.socket.close_code


Connect = Callable[..., Any]


@pytest.fixture
async def connect(transcript: Transcript) -> AsyncIterator[Connect]:
    """Opens connections, which are closed at the end."""
    sockets = []

    async def open_connection(gateway: Gateway, query: str = "", **options: Any) -> Client:
        url = "ws://{}:{}/ws".format(*gateway.address) + query
        sockets.append(await connect_websocket(url, proxy=None, **options))
        return Client(sockets[-1], transcript)

    yield open_connection
    for socket in sockets:
        await socket.close()


class Agents:
    """The agents' side of moto."""

    def __init__(self, platform: tests.moto_aws.Platform) -> None:
        self._platform = platform
        self._sqs = platform.client("sqs")

    async def update(self, payload: Json) -> None:
        """Send an update, as an agent does."""
        await asyncio.to_thread(
            self._sqs.send_message,
            QueueUrl=self._platform.queue_urls["updates"],
            MessageBody=json.dumps(payload),
        )

    async def order(self, agent: str) -> dict[str, Any]:
        """Receive the next order of an agent."""
        answer = await asyncio.to_thread(
            self._sqs.receive_message,
            QueueUrl=self._platform.queue_urls[agent],
            MessageAttributeNames=["All"],
            WaitTimeSeconds=20,
        )
        return cast("dict[str, Any]", answer["Messages"][0])


PROJECT = "proj_123"


class TestExamples:
    def test_all_are_shown(self) -> None:
        """There is no example without a test in which it happens."""
        assert SHOWN.keys() == EXAMPLES.keys()

    @shows(
        "connected", "ping", "pong", "ping with ref", "pong with ref", "subscribe",
        "subscription confirmed", "unsubscribe",
        "unsubscription confirmed", "resume", "recovered", "not recovered", "event",
        "subscribe with snapshot", "project snapshot", "update", "update for everyone",
        "event for everyone", "ephemeral update", "update for one client", "ephemeral event",
    )  # fmt: skip
    async def test_events(
        self, platform: tests.moto_aws.Platform, transcript: Transcript, connect: Connect
    ) -> None:
        """Updates become events, live and missed ones."""
        agents = Agents(platform)
        record = {"name": {"S": "Shop"}, "progress": {"N": "40"}}
        key = {"PK": {"S": f"PROJECT#{PROJECT}"}, "SK": {"S": "METADATA"}}
        platform.client("dynamodb").put_item(TableName=platform.table_name, Item=key | record)
        async with running_gateway(platform) as gateway:
            client = await connect(gateway, subprotocols=[Subprotocol(server.SUBPROTOCOL)])
            assert client.socket.subprotocol == server.SUBPROTOCOL
            connection_id = (await client.receive("connected"))["connection_id"]
            await client.send("ping")
            await client.receive("pong")
            await client.send("ping with ref")
            await client.receive("pong with ref")

            await client.socket.send(json.dumps({"action": "subscribe", "project_id": PROJECT}))
            assert (await client.next())["seq"] == 0
            update = transcript.note("update", EXAMPLES["update"])
            for seq in (1, 2):
                await agents.update(update)
                assert (await client.next())["seq"] == seq

            await client.send("subscribe")
            epoch = (await client.receive("subscription confirmed"))["epoch"]
            await client.send("unsubscribe")
            await client.receive("unsubscription confirmed")
            await client.send("resume", epoch=epoch)
            await client.receive("recovered")
            await client.receive("event")
            await client.send("resume", epoch="f" * 32)
            await client.receive("not recovered")
            await client.send("subscribe with snapshot")
            await client.receive("subscription confirmed")
            await client.receive("project snapshot")

            await agents.update(transcript.note("ephemeral update", EXAMPLES["ephemeral update"]))
            await client.receive("ephemeral event")
            for_one = {**EXAMPLES["update for one client"], "connection_id": connection_id}
            await agents.update(transcript.note("update for one client", for_one))
            await client.receive("ephemeral event")
            for_all = transcript.note("update for everyone", EXAMPLES["update for everyone"])
            await agents.update(for_all)
            await client.receive("event for everyone")

    @shows(
        "forward", "forward confirmed", "order", "rejected", "forward confirmed with its place",
        "stop", "stop confirmed", "stop requested",
    )  # fmt: skip
    async def test_forwards(
        self, platform: tests.moto_aws.Platform, transcript: Transcript, connect: Connect
    ) -> None:
        """A forward arrives at its agent as it is shown, or the queue refuses it."""
        agents = Agents(platform)
        async with running_gateway(platform) as gateway:
            client = await connect(gateway)
            await client.next()
            await client.send("forward")
            await client.receive("forward confirmed")
            order = await agents.order("dev")
            body = transcript.note("order", json.loads(order["Body"]))
            attributes = {k: v["StringValue"] for k, v in order["MessageAttributes"].items()}
            assert attributes == {"MessageType": body["type"], "Timestamp": body["timestamp"]}

            await client.socket.send(json.dumps({"action": "subscribe", "project_id": PROJECT}))
            assert (await client.next())["seq"] == 0
            await client.send("forward")
            await client.receive("forward confirmed with its place")
            await client.send("stop")
            await client.receive("stop confirmed")
            await client.receive("stop requested")

            sqs = platform.client("sqs")
            await asyncio.to_thread(sqs.delete_queue, QueueUrl=platform.queue_urls["dev"])
            await client.send("forward")
            await client.receive("rejected")

    @shows(
        "invalid_json", "invalid_message", "invalid_field", "unknown_action", "unknown_type",
        "binary_frame", "invalid_character",
    )  # fmt: skip
    async def test_mistakes(self, platform: tests.moto_aws.Platform, connect: Connect) -> None:
        """What is wrong with a message is answered, and the connection stays."""
        forward = EXAMPLES["forward"]
        resume = EXAMPLES["resume"]
        mistakes: Mapping[str, str | bytes] = {
            "invalid_json": '{"action": "ping"',
            "invalid_message": "[]",
            "invalid_field": json.dumps({**resume, "since": -1}),
            "unknown_action": json.dumps({"action": "publish", "project_id": PROJECT}),
            "unknown_type": json.dumps({**forward, "type": "sales"}),
            "binary_frame": b"{}",
            "invalid_character": json.dumps({**forward, "data": "\uffff"}, ensure_ascii=False),
        }
        async with running_gateway(platform) as gateway:
            client = await connect(gateway, max_queue=None)
            await client.next()
            for title, mistake in mistakes.items():
                await client.socket.send(mistake)
                await client.receive(title)

    @shows("busy")
    async def test_sign_of_life(self, platform: tests.moto_aws.Platform, connect: Connect) -> None:
        """Who asked for it hears that nothing is read from it."""
        async with running_gateway(platform) as gateway:
            client = await connect(gateway, "?busy=1")
            await client.next()
            [connection] = gateway.registry.connections.values()
            connection.hold(+server.Connection.FORWARDS_IN_FLIGHT)
            await client.socket.send(json.dumps(EXAMPLES["ping"]))
            await client.receive("busy")
            connection.hold(-server.Connection.FORWARDS_IN_FLIGHT)

    @shows("too_large", "too_many_subscriptions", "overloaded", "unavailable", "timeout")
    async def test_troubles(
        self, stand_in: StandIn, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What cannot be done now, or would be too much, is answered."""
        platform = stand_in.create_platform()
        forward = EXAMPLES["forward"]
        overrides: Json = {"max_message_bytes": 2**20, "forward_timeout_seconds": 1.0}
        async with running_gateway(platform, **overrides) as gateway:
            client = await connect(gateway, compression=None)
            await client.next()
            envelope = len(json.dumps({**forward, "data": ""}))
            full = json.dumps({**forward, "data": "x" * (2**20 - envelope)})
            await client.socket.send(full)
            await client.receive("too_large")

            for number in range(100):
                subscribe = {"action": "subscribe", "project_id": f"proj_{1_000 + number}"}
                await client.socket.send(json.dumps(subscribe))
                assert (await client.next())["type"] == "subscription_confirmed"
            await client.socket.send(json.dumps(EXAMPLES["subscribe"]))
            await client.receive("too_many_subscriptions")

            stand_in.fault = always("SendMessageBatch", THROTTLED)
            await client.socket.send(json.dumps(forward))
            await client.receive("unavailable")
            stand_in.fault = always("SendMessageBatch", AwsFault(silent=True))
            monkeypatch.setattr(server.Forwarder, "MAX_WAITING", 1)
            await client.socket.send(json.dumps(forward))
            await client.socket.send(json.dumps(forward))
            await client.receive("overloaded")
            await client.receive("timeout")

    @shows("authenticate", "authenticated", "token expiring", "unauthenticated", "forbidden")
    async def test_tokens(self, platform: tests.moto_aws.Platform, connect: Connect) -> None:
        """A token is brought in each of the three ways, renewed, and refused in the end."""
        token = token_of(valid_s=600, projects=[PROJECT])
        encoded = base64.urlsafe_b64encode(token.encode()).rstrip(b"=").decode()
        offers = [Subprotocol(server.SUBPROTOCOL), Subprotocol(server.BEARER_PREFIX + encoded)]
        async with (
            running_issuer() as issuer,
            running_gateway(platform, auth_first_message=True, **issuer.settings) as gateway,
        ):
            by_header = {"additional_headers": {"Authorization": f"Bearer {token}"}}
            for options in ({"subprotocols": offers}, by_header):
                client = await connect(gateway, **options)
                assert (await client.next())["type"] == "connected"
                forbidden = {"action": "subscribe", "project_id": "proj_999"}
                await client.socket.send(json.dumps(forbidden))
                await client.receive("forbidden")

            client = await connect(gateway)
            await client.next()
            await client.socket.send(json.dumps(EXAMPLES["ping"]))
            await client.receive("unauthenticated")
            await client.send("authenticate", token=token)
            assert 600 < (await client.receive("authenticated"))["expires_in_seconds"] <= 630
            await client.send("authenticate", token=token_of(valid_s=40, projects=[PROJECT]))
            await client.receive("authenticated")
            assert 0 < (await client.receive("token expiring"))["in_seconds"] <= 40
            await client.send("authenticate", token=token_of(valid_s=-60))
            assert await client.close_code() == server.CLOSE_UNAUTHENTICATED

            bad = {"Authorization": f"Bearer {token_of(valid_s=-60)}"}
            with pytest.raises(InvalidStatus) as refused:
                await connect(gateway, additional_headers=bad)
            assert refused.value.response.status_code == 401

    @shows("reconnect")
    async def test_replacement(self, platform: tests.moto_aws.Platform, connect: Connect) -> None:
        """A server that is replaced says so, and closes with 1012."""
        async with running_gateway(platform) as gateway:
            client = await connect(gateway)
            await client.next()
            gateway.drain.wanted.set()
            await client.receive("reconnect")
            assert await client.close_code() == 1012


# --- The words around them --------------------------------------------------------------------


class TestRules:
    """What PROTOCOL.md says of resuming, where no other test says the same."""

    async def test_url_stands_for_subscribe(self, stand_in: StandIn, connect: Connect) -> None:
        """A subscription in the URL is answered like the message."""
        async with running_gateway(stand_in.create_platform()) as gateway:
            client = await connect(gateway, "?project_id=p&since=0")
            assert (await client.next())["type"] == "connected"
            confirmed = await client.next()
            assert (confirmed["project_id"], confirmed["recovered"]) == ("p", True)

    async def test_broadcasts_before_the_confirmation_come_again(
        self, stand_in: StandIn, connect: Connect
    ) -> None:
        """A broadcast that arrives while `*` catches up is repeated in its place."""
        platform = stand_in.create_platform()
        queue = stand_in.queues[platform.queue_names["updates"]]
        async with running_gateway(platform) as gateway:
            client = await connect(gateway)
            await client.next()
            for _ in range(3):
                queue.push(json.dumps(EXAMPLES["update for everyone"]))
            queue.wake()
            assert [(await client.next())["seq"] for _ in range(3)] == [1, 2, 3]
            resume = {"action": "subscribe", "project_id": server.EVERYONE, "since": 1}
            await client.socket.send(json.dumps(resume))
            confirmed = await client.next()
            assert (confirmed["seq"], confirmed["recovered"]) == (3, True)
            assert [(await client.next())["seq"] for _ in range(2)] == [2, 3]
