"""How the gateway behaves: a class a section of server.py, in its order, over real sockets.

This is the part to read. What is rare, inside, or AWS's fault is in `tests/server/`, in a file of
the section; so is what tests have in common: gateways and clients of them (`gateways.py`), raw
sockets (`peers.py`), processes (`processes.py`), faults of AWS (`aws.py`) and the fixtures
(`fixtures.py`). ``stand_in`` (aws_standin) plays AWS in the test's own event loop, and fails on
command. Nothing waits for a fixed time: ``eventually`` waits for a condition.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
import re
import signal
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode, Opcode

import aws_standin
import server
from aws_standin import Call, Fault, StandIn
from server import (
    EVERYONE,
    AgentMessage,
    Aws,
    BadMessage,
    ErrorCode,
    EventLog,
    Forward,
    Gateway,
    Settings,
    SettingsError,
    Subscribe,
    UpstreamLost,
    decode_message,
    decode_update,
    deflate,
)
from tests.issuer import running_issuer, token_of
from tests.server.aws import (
    GARBAGE,
    PASSING_FAULTS,
    SERVER_ERROR,
    SILENT_AFTER,
    THROTTLED,
    Json,
    Platform,
    agents_say,
    always,
    aws_clients,
    bodies,
    each_passing_fault,
    faults,
    fifo_platform,
    hold_back,
    news,
    push,
    sent_ids,
    subscriptions,
)
from tests.server.event_logs import (
    LogKit,
    append,
    entries,
    entry,
    head_of,
    places,
    seqs,
    whole_log,
)
from tests.server.feeds import MemoryLog, Office, check_story, office_of, settle
from tests.server.forwarders import desk_of
from tests.server.gateways import (
    AUTHENTICATION,
    REQUIRED,
    asked_again,
    balanced_gateway,
    client_of,
    errors_logged,
    fill_log,
    narrow,
    over_one_gateway,
    received_in_order,
    register,
    running_gateway,
    settings,
    standing_loop,
    task_group,
    unsettled,
)
from tests.server.listeners import Listener, event
from tests.server.messages import TOO_LONG, any_json, json_space, nearly_a_message, outcome, refusal
from tests.server.peers import (
    DEFLATED,
    Peer,
    dialled,
    fetch,
    masked,
    peer_of,
    request,
    seqs_until,
    upgrade,
)
from tests.server.processes import SERVER, clean_environment, posix, process_of, task_metadata
from tests.waiting import DEADLINE_S, eventually

# --- Vocabulary -----------------------------------------------------------------------------


class TestVocabulary:
    def test_aliases(self) -> None:
        """Every agent has the aliases that the protocol promises."""
        aliases: dict[str, list[str]] = {}
        for alias, agent in server.QUEUE_OF_TYPE.items():
            aliases.setdefault(agent, []).append(alias)
        assert aliases == {
            "pm": ["pm", "plan", "planning"],
            "dev": ["dev", "code", "develop"],
            "qa": ["qa", "test", "quality"],
            "ops": ["ops", "deploy", "operations"],
        }

    def test_reserved_types(self) -> None:
        """What the server says itself is reserved, so that no agent can say it."""
        own = {
            struct.__struct_config__.tag
            for struct in vars(server).values()
            if isinstance(struct, type)
            and issubclass(struct, msgspec.Struct)
            and struct.__struct_config__.tag_field == "type"
        }
        assert {"connected", "error", "pong", "reconnect"} <= own
        assert own - {"busy"} <= server.RESERVED_TYPES  # which has no project, so tells itself

    def test_a_visibility_timeout_outlasts_its_renewals(self) -> None:
        """An update in hand is held on to more often than its visibility timeout needs."""
        assert server.CALL_TIMEOUT_S + server.Intake.VISIBILITY_S / 4 < server.Intake.VISIBILITY_S

    def test_long_poll_fits_its_timeout(self) -> None:
        """A long poll that returns nothing is no failure."""
        assert server.RECEIVE_TIMEOUT_S > server.LONG_POLL_S


# --- Settings -------------------------------------------------------------------------------


class TestSettings:
    def test_defaults(self) -> None:
        """Five settings are enough, and the others have the defaults that are documented."""
        found = Settings.from_mapping(REQUIRED)
        assert found.queue_urls == {
            agent: REQUIRED[f"SQS_QUEUE_URL_{agent.upper()}"]
            for agent in ("pm", "dev", "qa", "ops")
        }
        assert found.log_table == "platform-data"
        assert (found.aws_region, found.websocket_host) == ("us-east-1", "0.0.0.0")
        assert (found.websocket_port, found.max_message_bytes) == (8080, 262_144)
        assert (found.ping_interval_seconds, found.drain_seconds) == (25, 30)
        assert (found.sqs_queue_url_updates, found.updates_topic_arn) == (None, None)
        assert found.compression is True

    def test_all_values(self) -> None:
        """Every setting is read from the variable of its name in capitals."""
        values = {
            **REQUIRED,
            "SQS_QUEUE_URL_UPDATES": "http://127.0.0.1:4100/000000000000/updates.fifo",
            "UPDATES_TOPIC_ARN": "arn:aws:sns:us-east-1:123456789012:events",
            "EVENTS_TABLE_NAME": "events",
            "WEBSOCKET_PORT": "0",
            "COMPRESSION": "Off",
            "LOG_LEVEL": "debug",
            "PING_INTERVAL_SECONDS": "0.5",
            "MAX_MESSAGE_BYTES": " 1024 ",
        }
        found = Settings.from_mapping(values)
        assert found.sqs_queue_url_updates == values["SQS_QUEUE_URL_UPDATES"]
        assert found.updates_topic_arn == values["UPDATES_TOPIC_ARN"]
        assert found.log_table == "events"
        assert (found.websocket_port, found.compression, found.log_level) == (0, False, "DEBUG")
        assert (found.ping_interval_seconds, found.max_message_bytes) == (0.5, 1024)

    def test_faults_come_together(self) -> None:
        """Everything that is missing or wrong is named at once, with its value."""
        values = {**REQUIRED, "WEBSOCKET_PORT": "eighty", "LOG_LEVEL": "LOUD"}
        del values["SQS_QUEUE_URL_QA"]
        with pytest.raises(SettingsError) as caught:
            Settings.from_mapping(values)
        missing, port, log_level = caught.value.faults
        assert missing == "SQS_QUEUE_URL_QA is missing: URL of the QA agent's queue, likewise"
        assert port == "WEBSOCKET_PORT must be a whole number from 0 to 65535, not 'eighty'"
        assert log_level == "LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR, not 'LOUD'"

    @pytest.mark.parametrize("name", REQUIRED)
    @pytest.mark.parametrize("blank", ["", "  \n"])
    def test_blank_is_missing(self, name: str, blank: str) -> None:
        """A required setting that is blank is missing."""
        with pytest.raises(SettingsError, match=f"^{name} is missing"):
            Settings.from_mapping({**REQUIRED, name: blank})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("SQS_QUEUE_URL_PM", "pm-queue"),
            ("SQS_QUEUE_URL_PM", "ftp://sqs/1/pm"),
            ("SQS_QUEUE_URL_PM", "https://"),
            ("SQS_QUEUE_URL_PM", "https://sqs.us-east-1.amazonaws.com/"),
            ("SQS_QUEUE_URL_PM", "http://[::1/queue"),
            ("UPDATES_TOPIC_ARN", "events"),
            ("UPDATES_TOPIC_ARN", "arn:aws:sqs:us-east-1:123456789012:events"),
            ("UPDATES_TOPIC_ARN", "arn:aws:sns:us-east-1:123456789012:events:subscription"),
            ("WEBSOCKET_PORT", "-1"),
            ("WEBSOCKET_PORT", "65536"),
            ("WEBSOCKET_PORT", "1e3"),
            ("MAX_MESSAGE_BYTES", "1023"),
            ("EVENT_RETENTION_HOURS", "9" * 30),
            ("COMPRESSION", "yes"),
            ("PING_INTERVAL_SECONDS", "0"),
            ("PING_INTERVAL_SECONDS", "nan"),
            ("PING_INTERVAL_SECONDS", "inf"),
            ("DRAIN_SECONDS", "120"),
            ("DRAIN_SECONDS", "-0"),
            ("LOG_LEVEL", "TRACE"),
            ("ALLOWED_ORIGINS", "app.example"),
            ("ALLOWED_ORIGINS", "https://app.example/"),
            ("ALLOWED_ORIGINS", "https://app.example, *"),
            ("ALLOWED_ORIGINS", ","),
            ("AUTH_ALGORITHMS", "HS256"),
            ("AUTH_ALGORITHMS", "RS256,none"),
            ("AUTH_ALGORITHMS", ","),
        ],
    )
    def test_wrong_value(self, name: str, value: str) -> None:
        """A value that cannot be is refused by the name of its setting."""
        with pytest.raises(SettingsError) as caught:
            Settings.from_mapping({**REQUIRED, **AUTHENTICATION, name: value})
        [fault] = caught.value.faults
        assert fault.startswith(f"{name} ")

    def test_every_setting_is_explained(self) -> None:
        """Every setting has a parser and a sentence, from which the documentation is made."""
        for field in dataclasses.fields(Settings):
            assert callable(field.metadata["parse"])
            assert field.metadata["doc"]


# --- Wire -----------------------------------------------------------------------------------


class TestWire:
    @given(payload=st.binary(max_size=400))
    @example(payload=b'{"action":"\xff"}')
    @example(payload=b'{"action":"x","y":"\\ud800"}')
    @example(payload=b'{"action":"x","y":' + b"9" * 5_000 + b"}")
    @example(payload=b"[" * 100_000)
    @example(payload=b'{"action":"forward","type":"pm","data":' + b"[" * 100_000)
    def test_any_bytes(self, payload: bytes) -> None:
        """Whatever bytes come, they are a message or refused with a sentence."""
        assert isinstance(outcome(payload), server.ClientMessage | BadMessage)

    @given(content=any_json | nearly_a_message)
    def test_any_json(self, content: Any) -> None:
        """Whatever JSON comes, it is a message or refused in words for its author."""
        message = outcome(json.dumps(content).encode())
        if isinstance(message, BadMessage):
            assert str(message).endswith(".")
            assert "`" not in str(message)
            assert set(message.context) <= {"action", "message_id", "project_id"}
            assert all(len(value) <= 256 for value in message.context.values())
        else:
            assert message.__struct_config__.tag == content["action"]

    @given(content=any_json, before=json_space, after=json_space, ascii_only=st.booleans())
    def test_forward_keeps_data(
        self, content: Any, before: str, after: str, ascii_only: bool
    ) -> None:
        """The data of a forward come to the agent byte for byte as the client wrote them."""
        data = json.dumps(content, ensure_ascii=ascii_only, indent=len(before))
        sent = f'{{"type":"dev","data":{before}{data}{after},"action":"forward"}}'
        message = decode_message(sent.encode())
        assert isinstance(message, Forward)
        body = AgentMessage("dev", "m1", None, message.data, "c1", "c1", None, "now")
        assert f'"data":{data},'.encode() in msgspec.json.encode(body)

    @pytest.mark.parametrize("data", [r'"caf\ud83d"', r'{"\ud83d":["\udc00"]}'])
    def test_half_of_a_character(self, data: str) -> None:
        """Text that was cut inside a character goes on byte for byte, in both directions."""
        message = decode_message(f'{{"action":"forward","type":"dev","data":{data}}}'.encode())
        assert isinstance(message, Forward)
        body = AgentMessage("dev", "m1", None, message.data, "c1", "c1", None, "now")
        assert f'"data":{data},'.encode() in msgspec.json.encode(body)
        for before in ("", '"x":{"data":1},'):
            text = f'{{{before}"type":"t","data":{data}}}'
            assert bytes(decode_update(text).data) == data.encode()
        exc = refusal(rb'{"action":"subscribe","project_id":"\ud83d"}')
        assert exc.code is ErrorCode.INVALID_FIELD

    @pytest.mark.parametrize(
        ("payload", "code", "context"),
        [
            (b"", "invalid_json", {}),
            (b"hello", "invalid_json", {}),
            (b'{"action":"ping","data":NaN}', "invalid_json", {"action": "ping"}),
            (b'{"action":"ping"', "invalid_json", {"action": "ping"}),
            (b'{"action":"ping"} {}', "invalid_json", {"action": "ping"}),
            (b"[]", "invalid_message", {}),
            (b"null", "invalid_message", {}),
            (b"{}", "invalid_message", {}),
            (b'{"project_id":"p"}', "invalid_message", {"project_id": "p"}),
            (b'{"action":"dance"}', "unknown_action", {"action": "dance"}),
            (b'{"action":7,"message_id":"m"}', "unknown_action", {"message_id": "m"}),
            (b'{"action":"subscribe"}', "invalid_field", {"action": "subscribe"}),
            (b'{"action":"subscribe","project_id":""}', "invalid_field", None),
            (b'{"action":"subscribe","project_id":5}', "invalid_field", {"action": "subscribe"}),
            (b'{"action":"subscribe","project_id":"p","since":-1}', "invalid_field", None),
            (b'{"action":"subscribe","project_id":"p","since":1.5}', "invalid_field", None),
            (b'{"action":"subscribe","project_id":"p","since":"1"}', "invalid_field", None),
            (
                b'{"action":"subscribe","project_id":"p","since":9007199254740992}',
                "invalid_field",
                None,
            ),
            (b'{"action":"subscribe","project_id":"p","snapshot":1}', "invalid_field", None),
            (b'{"action":"unsubscribe"}', "invalid_field", None),
            (b'{"action":"forward"}', "invalid_field", None),
            (b'{"action":"forward","type":null}', "invalid_field", None),
            (b'{"action":"forward","type":"pm","message_id":""}', "invalid_field", None),
        ],
    )
    def test_refusals(self, payload: bytes, code: str, context: Json | None) -> None:
        """A message that is wrong is refused with its own code and what it names."""
        exc = refusal(payload)
        assert exc.code == code
        if context is not None:
            assert exc.context == context

    def test_unknown_fields(self) -> None:
        """Fields that are not known are ignored."""
        message = decode_message(b'{"action":"subscribe","project_id":"p","colour":[{}]}')
        assert message == Subscribe("p")

    def test_optional_fields_may_be_null(self) -> None:
        """An optional field that is null counts as left out."""
        message = decode_message(b'{"action":"subscribe","project_id":"p","since":null}')
        assert message == Subscribe("p")

    @pytest.mark.parametrize(("alias", "agent"), server.QUEUE_OF_TYPE.items())
    def test_queue_of(self, alias: str, agent: str) -> None:
        """A forward's type names its agent, in capitals too."""
        assert server.queue_of(Forward(alias)) == agent
        assert server.queue_of(Forward(alias.upper())) == agent

    @pytest.mark.parametrize("unknown", ["", "devs", " dev", "design", "\u0130"])
    def test_queue_of_nobody(self, unknown: str) -> None:
        """A forward's type that names no agent is refused, with those that do."""
        with pytest.raises(BadMessage, match="pm, plan, planning, dev") as caught:
            server.queue_of(Forward(unknown))
        assert caught.value.code is ErrorCode.UNKNOWN_TYPE

    def test_event_message(self) -> None:
        """Clients get an event's type, project, data, seq and time, and nothing else."""
        assert json.loads(event(7).payload) == {
            "type": "project_updated",
            "project_id": "p",
            "data": 7,
            "seq": 7,
            "timestamp": "2025-11-24T12:00:00Z",
        }
        assert "seq" not in json.loads(event(None).payload)

    def test_timestamp(self) -> None:
        """A timestamp is UTC in ISO 8601, with milliseconds."""
        assert server.timestamp(1_763_985_600) == "2025-11-24T12:00:00.000Z"
        assert server.timestamp(1_763_985_600.0426) == "2025-11-24T12:00:00.042Z"
        assert abs(server.unix_s(server.timestamp()) - time.time()) < 60

    def test_update_defaults(self) -> None:
        """An update needs only a type; without a project it is for everyone."""
        found = decode_update('{"type":"news"}')
        assert (found.project_id, found.event_id, found.connection_id) == (None, None, None)
        assert bytes(found.data) == b"null"
        assert not found.ephemeral

    @given(content=any_json)
    def test_update_keeps_data(self, content: Any) -> None:
        """The data of an update are kept byte for byte as the agent wrote them."""
        data = json.dumps(content)
        assert bytes(decode_update(f'{{"type":"t","data": {data} }}').data) == data.encode()

    @pytest.mark.parametrize(
        "body",
        [
            "",
            "hello",
            "[]",
            "{}",
            '{"type":""}',
            '{"type":5}',
            '{"type":"t","project_id":""}',
            '{"type":"t","project_id":"' + "x" * 257 + '"}',
            '{"type":"t","ephemeral":"yes"}',
            '{"type":"t","event_id":""}',
            '{"type":"t","data":' + "[" * 100_000,
            '{"type":"\ud800"}',
            '{"type":"error"}',
            '{"type":"project_snapshot"}',
            '{"type":"t","data":"' + "x" * server.EVENT_MAX_BYTES + '"}',
        ],
        ids=lambda body: body[:40].encode("ascii", "replace").decode(),
    )
    def test_unreadable_update(self, body: str) -> None:
        """An update that clients could not get is refused."""
        with pytest.raises(BadMessage):
            decode_update(body)


# --- Access ---------------------------------------------------------------------------------


def bearer(token: str) -> str:
    """A token as browsers send it: as a subprotocol, in unpadded base64url."""
    return "bearer." + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


class TestAccess:
    @pytest.mark.parametrize(
        ("forwarded_for", "hops", "address"),
        [
            ([], 1, "10.0.0.1"),
            (["203.0.113.7"], 0, "10.0.0.1"),
            (["203.0.113.7"], 1, "203.0.113.7"),
            (["6.6.6.6, 203.0.113.7"], 1, "203.0.113.7"),
            (["6.6.6.6", "203.0.113.7"], 1, "203.0.113.7"),
            (["6.6.6.6, 203.0.113.7, 198.51.100.1"], 2, "203.0.113.7"),
            (["203.0.113.7"], 5, "203.0.113.7"),
            (["203.0.113.7:4711"], 1, "203.0.113.7"),
            (["2001:db8:1:2:3:4:5:6"], 1, "2001:db8:1:2::/64"),
            (["[2001:db8:1:2::9]:4711"], 1, "2001:db8:1:2::/64"),
            (["[2001:db8:1:2::9]"], 1, "2001:db8:1:2::/64"),
            (["::ffff:203.0.113.7"], 1, "203.0.113.7"),
            (["unknown"], 1, "10.0.0.1"),
            ([""], 1, "10.0.0.1"),
            (["203.0.113.7, "], 1, "10.0.0.1"),
        ],
    )
    def test_client_address(self, forwarded_for: list[str], hops: int, address: str) -> None:
        """Limits apply to the last address that no client can have written."""
        assert server.client_address("10.0.0.1", forwarded_for, hops) == address

    def test_admission_by_address(self) -> None:
        """One address has so many connections, and others are not affected."""
        admission = server.Admission(settings(max_connections_per_ip=2))
        for _ in range(2):
            assert admission.refusal("a") is None
            admission.count("a", +1)
        assert admission.refusal("a") == (429, "Too many connections from this address.")
        assert admission.refusal("b") is None
        admission.count("a", -1)
        assert admission.refusal("a") is None
        admission.count("a", -1)
        assert admission.refusal("a") is None

    def test_admission_in_all(self) -> None:
        """All addresses together have so many connections."""
        admission = server.Admission(settings(max_connections=2))
        for address in "ab":
            admission.count(address, +1)
        assert admission.refusal("c") == (503, "This server is full.")

    @pytest.mark.parametrize(
        ("projects", "project_id", "allowed"),
        [
            (None, "p", True),
            (frozenset("p"), "p", True),
            (frozenset("p"), "q", False),
            (frozenset(), EVERYONE, True),
        ],
    )
    def test_rights(self, projects: frozenset[str] | None, project_id: str, allowed: bool) -> None:
        """A client may use the projects of its token, and hear what is for everyone."""
        principal = server.Principal("me", projects, 0.0)
        assert principal.may_use(project_id) is allowed

    def test_rights_to_speak(self) -> None:
        """Only who may use all projects may have an agent answer everyone."""
        assert server.Principal("me", None, 0.0).may_use(EVERYONE, strictly=True)
        assert not server.Principal("me", frozenset("p"), 0.0).may_use(EVERYONE, strictly=True)

    @pytest.mark.parametrize(
        ("claims", "projects"),
        [
            ({}, set()),
            ({"projects": []}, set()),
            ({"projects": ["p", "q", 5, None]}, {"p", "q"}),
            ({"projects": "p q"}, {"p", "q"}),
            ({"projects": "*"}, None),
            ({"projects": ["p", "*"]}, None),
            ({"projects": {"p": 1}}, set()),
            ({"projects": True}, set()),
        ],
        ids=str,
    )
    def test_projects_in(self, claims: Json, projects: set[str] | None) -> None:
        """A claim grants the projects it lists, in whichever form, and nothing by accident."""
        granted = server.projects_in(claims, "projects")
        assert granted == (None if projects is None else frozenset(projects))

    @pytest.mark.parametrize(
        ("headers", "token"),
        [
            ([], None),
            ([("Authorization", "Bearer abc")], "abc"),
            ([("Authorization", "bearer  abc ")], "abc"),
            ([("Authorization", "Basic abc")], None),
            ([("Sec-WebSocket-Protocol", "agenticai.v1")], None),
            ([("Sec-WebSocket-Protocol", f"agenticai.v1, {bearer('a.b.c')}")], "a.b.c"),
            ([("Sec-WebSocket-Protocol", "x"), ("Sec-WebSocket-Protocol", bearer("abcd"))], "abcd"),
            ([("Sec-WebSocket-Protocol", "bearer.!")], ""),
            ([("Sec-WebSocket-Protocol", "bearer.a")], ""),
            ([("Sec-WebSocket-Protocol", "bearer._w")], ""),
        ],
    )
    def test_bearer_token(self, headers: list[tuple[str, str]], token: str | None) -> None:
        """A handshake brings its token in a header or, from browsers, in a subprotocol."""
        assert server.bearer_token(Headers(headers)) == token


# --- Forwarder ------------------------------------------------------------------------------


class TestForwarder:
    async def test_confirmed(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """A forward is confirmed with the id that SQS gave the message in the queue."""
        async with desk_of(platform, aws) as desk:
            desk.submit("m1", data=b'{ "spaced" :1.0}')
            settled = await desk.settled()
        [message] = stand_in.queues["agenticai-dev-queue"].messages
        assert settled == {"m1": message.message_id}
        assert message.body.startswith('{"action":"forward","type":"dev","message_id":"m1",')
        sent = '"data":{ "spaced" :1.0},"connection_id":"c1","client_id":"c1","user":null,'
        assert sent in message.body
        assert message.attributes["MessageType"]["StringValue"] == "dev"
        sent_at = json.loads(message.body)["timestamp"]
        assert message.attributes["Timestamp"]["StringValue"] == sent_at
        assert (desk.metrics.messages_forwarded, desk.metrics.forward_errors) == (1, 0)

    async def test_batches(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """A lone forward goes at once, and what comes while a call is under way goes together."""
        stand_in.fault = always("SendMessageBatch", Fault(delay_s=0.05))
        async with desk_of(platform, aws) as desk:
            desk.submit("first")
            await eventually(lambda: stand_in.calls["sqs", "SendMessageBatch"])
            message_ids = desk.submit_many(25)
            assert await desk.codes() == {}
        assert sorted(sent_ids(stand_in)) == ["first", *message_ids]
        assert stand_in.calls["sqs", "SendMessageBatch"] == 4  # 1 + 10 + 10 + 5

    @each_passing_fault
    @pytest.mark.usefixtures("impatient")
    async def test_passing_fault(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn, fault: Fault
    ) -> None:
        """A call that fails in passing is made again, and every forward confirmed."""
        stand_in.fault = faults("SendMessageBatch", fault, fault, fault)
        async with desk_of(platform, aws) as desk:
            message_ids = desk.submit_many(15)
            assert await desk.codes() == {}
        assert set(sent_ids(stand_in)) == set(message_ids)

    @pytest.mark.usefixtures("impatient")
    async def test_partial_failure(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """Of a batch, what SQS could not take is retried and what it would not take refused."""
        stand_in.fault = faults(
            "SendMessageBatch", Fault(failed={0: True, 3: False, 4: True, 9: False})
        )
        async with desk_of(platform, aws) as desk:
            message_ids = desk.submit_many(11)
            codes = await desk.codes()
        assert codes == {"m000": "rejected", "m004": "rejected"}
        assert sorted(sent_ids(stand_in)) == [each for each in message_ids if each not in codes]
        assert (desk.metrics.messages_forwarded, desk.metrics.forward_errors) == (9, 2)

    @pytest.mark.usefixtures("impatient")
    async def test_one_bad_entry(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """One message that makes SQS refuse the whole batch does not take the others along."""

        def fault(call: Call) -> Fault | None:
            if "poison" in str(call.request.get("Entries")):
                return Fault(status=400, code="InvalidMessageContents")
            return None

        stand_in.fault = fault
        async with desk_of(platform, aws) as desk:
            for number in range(21):
                desk.submit(f"m{number:03}", data=b'"poison"' if number == 13 else b"1")
            settled = await desk.settled()
        error = settled.pop("m013")
        assert isinstance(error, BadMessage)
        assert (error.code, error.context) == (ErrorCode.REJECTED, {"retryable": False})
        assert sorted(sent_ids(stand_in)) == sorted(settled)
        assert not any(isinstance(each, BadMessage) for each in settled.values())

    async def test_no_answer(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """A queue that never answers is an error within the deadline.

        It is another one for messages that may have arrived than for those that waited in vain.
        """
        stand_in.fault = always("SendMessageBatch", SILENT_AFTER)
        async with desk_of(platform, aws, timeout_s=0.5) as desk:
            started_at = time.monotonic()
            desk.submit_many(29)
            codes = await desk.codes()
            took_s = time.monotonic() - started_at
        assert Counter(codes.values()) == {"timeout": 20, "unavailable": 9}
        assert took_s < 5

    @each_passing_fault
    @pytest.mark.usefixtures("impatient")
    async def test_fifo_keeps_order(self, stand_in: StandIn, fault: Fault) -> None:
        """Whatever passing fault a call meets, a FIFO queue has every message once, in order."""
        platform = fifo_platform(stand_in)
        slow = Fault(delay_s=0.01)
        stand_in.fault = faults("SendMessageBatch", slow, fault, slow, fault, fault)
        async with aws_clients(platform) as aws, desk_of(platform, aws) as desk:
            message_ids = desk.submit_many(60)
            assert await desk.codes() == {}
        assert sent_ids(stand_in, "dev.fifo") == message_ids


# --- Event log ------------------------------------------------------------------------------


class TestEventLog:
    @pytest.fixture
    async def either(self, either_platform: Platform) -> AsyncIterator[LogKit]:
        """A table in the stand-in, and once more one in moto."""
        async with aws_clients(either_platform) as aws:
            yield LogKit(aws, either_platform)

    @pytest.fixture
    def kit(self, aws: Aws, platform: aws_standin.Platform) -> LogKit:
        """A table in the stand-in."""
        return LogKit(aws, platform)

    @pytest.fixture
    def log(self, kit: LogKit) -> EventLog:
        return kit.log()

    async def test_append_and_read(self, either: LogKit) -> None:
        """What is appended has the next numbers, and is read back as clients get it."""
        log = either.log()
        assert (await head_of(log, "p"), await log.read("p", 0)) == (0, [])
        first, second = entries(1, 2), entries(3)
        await append(log, "p", first, second)
        assert (places(first), places(second)) == ([1, 2], [3])
        found = await log.read("p", 0)
        assert seqs(found) == [1, 2, 3]
        assert [each.payload for each in found] == [
            each.event.payload for each in (*first, *second) if each.event
        ]
        assert seqs(await log.read("p", 2)) == [3]
        assert (await head_of(log, "p"), await log.read("p", 3)) == (3, [])
        assert await head_of(log, "other") == 0

    async def test_two_tasks_race(self, either: LogKit) -> None:
        """Two tasks that append at once have every number once, without a hole."""
        logs = [either.log(), either.log()]
        batches = [
            [entries(*range(start, start + 3)) for start in range(base, base + 30, 3)]
            for base in (0, 100)
        ]
        await asyncio.gather(
            *(append(log, "p", *own) for log, own in zip(logs, batches, strict=True))
        )
        found = await whole_log(logs[0])
        assert [seq for seq, _ in found] == list(range(1, 61))
        for own in batches:
            own_seqs = [seq for batch in own for seq in places(batch)]
            assert own_seqs == sorted(cast("list[int]", own_seqs))
            assert [data for seq, data in found if seq in own_seqs] == [
                int(bytes(each.update.data)) for batch in own for each in batch
            ]

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize(
        ("operation", "fault"),
        [
            pytest.param(operation, fault, id=f"{operation} {name}")
            for operation in ("TransactWriteItems", "UpdateItem", "Query", "BatchGetItem")
            for name, fault in PASSING_FAULTS.items()
            if name != "garbage" or operation in ("Query", "BatchGetItem")
        ],
    )
    async def test_passing_fault(
        self, kit: LogKit, stand_in: StandIn, operation: str, fault: Fault
    ) -> None:
        """Whatever passing fault a call meets, every event is in the log once, in order."""
        stand_in.fault = faults(operation, fault, fault)
        log = kit.log()
        await log.open()
        appended = entries(1, 2), entries(3)
        await append(log, "p", *appended)
        assert [places(batch) for batch in appended] == [[1, 2], [3]]
        assert await whole_log(log) == [(1, 1), (2, 2), (3, 3)]
        assert await log.heads(["p"]) == {"p": 3}

    @pytest.mark.parametrize("restarted", [False, True])
    async def test_redelivery(self, either: LogKit, restarted: bool) -> None:
        """An update that SQS delivers again is recognised, by this task and by another one."""
        log = either.log()
        first = entries(1, 2, 3)
        await append(log, "p", first)
        if restarted:
            log = either.log()
        again = entries(2, 3, 4, look_back_to=time.time() - 60)
        await append(log, "p", again)
        assert places(again) == [2, 3, 4]
        assert again[0].event is not None
        assert first[1].event is not None
        assert again[0].event.payload == first[1].event.payload
        assert len(await whole_log(log)) == 4

    async def test_same_event_id(self, kit: LogKit) -> None:
        """An agent that sends an event id again, in one batch or in the next, says nothing new."""
        log = kit.log()
        batch = [entry(1, "a"), entry(2, "b"), entry(3, "a"), entry(4, "a")]
        await append(log, "p", batch)
        assert places(batch) == [1, 2, 1, 1]
        window = time.time() - server.EVENT_ID_WINDOW_S
        for other in (log, kit.log()):
            batch = [entry(5, "b", window), entry(6, "c", window)]
            await append(other, "p", batch)
            assert places(batch) == [2, 3]
            assert [json.loads(each.event.payload)["data"] for each in batch if each.event] == [
                2,
                6,
            ]
        assert await whole_log(log) == [(1, 1), (2, 2), (3, 6)]


# --- Backplane ------------------------------------------------------------------------------


class TestFeed:
    @pytest.fixture
    def log(self) -> MemoryLog:
        return MemoryLog()

    async def test_live(self, log: MemoryLog) -> None:
        """A subscriber is told where the log is and gets what comes after it, in order."""
        log.add(3)
        listener = Listener()
        async with office_of(log) as office:
            confirmation = await office.subscribe(listener)
            assert confirmation["seq"] == 3
            assert "recovered" not in confirmation
            office.accept(log.add(2))
            await settle()
        assert listener.seqs() == [4, 5]

    async def test_resume(self, log: MemoryLog) -> None:
        """A subscriber that knows the last seq it saw gets what it missed, then live events."""
        log.add(500)
        listener = Listener()
        async with office_of(log) as office:
            confirmation = await office.subscribe(listener, since=17, epoch=log.epoch)
            assert (confirmation["seq"], confirmation["recovered"]) == (500, True)
            office.accept(log.add(2))
            await settle()
        assert listener.seqs() == list(range(18, 503))

    @pytest.mark.parametrize(
        "fields",
        [
            {"since": 31},
            {"since": 30, "epoch": "epoch-0"},
            {"since": 0, "epoch": ""},
            {"since": 2**53 - 1},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("warm", [False, True])
    async def test_no_resume(self, log: MemoryLog, warm: bool, fields: Json) -> None:
        """A subscriber from the future, or of another log, is told so."""
        log.add(30)
        listener = Listener()
        async with office_of(log) as office:
            if warm:
                await office.subscribe(Listener())
            confirmation = await office.subscribe(listener, **fields)
            assert (confirmation["seq"], confirmation["recovered"]) == (30, False)
            office.accept(log.add())
            await settle()
        assert listener.seqs() == [31]

    async def test_expired(self, log: MemoryLog) -> None:
        """A subscriber whose next event has expired is told so."""
        log.add(200)
        log.expire(*range(1, 60))
        early, late = Listener(), Listener()
        async with office_of(log) as office:
            assert (await office.subscribe(early, since=58))["recovered"] is False
            assert (await office.subscribe(late, since=59))["recovered"] is True
        assert early.seqs() == []
        assert late.seqs() == list(range(60, 201))

    async def test_hole_in_the_log(self) -> None:
        """A subscriber is told where events are missing, also in the middle of a page.

        Events expire out of order when the retention was changed.
        """
        log, listener = MemoryLog(page=8), Listener()
        log.add(300)
        log.expire(50, 51, 52)
        async with office_of(log) as office:
            await office.subscribe(listener, since=45)
        assert check_story(list(listener.messages), after=45) == 300

    async def test_gap(self, log: MemoryLog) -> None:
        """What is missing before an event is read from the log and delivered first."""
        listener = Listener()
        async with office_of(log) as office:
            await office.subscribe(listener)
            office.accept(log.add(5)[4:])
            office.accept(log.add(2))
            await settle()
            assert office.metrics.gaps_filled == 1
        assert listener.seqs() == [1, 2, 3, 4, 5, 6, 7]

    async def test_expired_gap(self, log: MemoryLog, caplog: pytest.LogCaptureFixture) -> None:
        """Listeners are told when what was missing has expired, and go on after it."""
        listener = Listener()
        async with office_of(log) as office:
            await office.subscribe(listener)
            log.add(9)
            log.expire(1, 2, 3, 7, 8)
            office.accept(log.add())
            await eventually(lambda: len(listener.messages) == 7)
        assert check_story(list(listener.messages), after=0) == 10
        told = [message for message in caplog.messages if "hole" in message]
        assert told == [f"the log of 'p' has a hole up to {seq}" for seq in (3, 8)]

    @pytest.mark.parametrize("state", [None, [1, {"a": 2}]])
    async def test_snapshot(self, log: MemoryLog, state: Any) -> None:
        """A snapshot comes after the confirmation and before the events that were missed."""
        log.add(3)
        listener = Listener()
        async with office_of(log) as office:
            office.state = state
            await office.subscribe(listener, snapshot=True, since=1)
        snapshot = listener.messages.popleft()
        data = {"project": "p", "state": state} if state else None
        assert snapshot == {"type": "project_snapshot", "project_id": "p", "data": data}
        assert listener.seqs() == [2, 3]

    async def test_catch_up_waits_for_its_reader(self) -> None:
        """A catch-up is written no faster than the client reads, and goes on when it does."""
        log, listener = MemoryLog(page=20), Listener()
        log.add(200, size=10_000)
        async with office_of(log) as office:
            listener.reads.clear()
            office.feed.subscribe(listener, Subscribe("p", 0))
            await eventually(lambda: listener.transport.writes[1:])
            await settle()
            written = sum(map(len, listener.transport.writes))
            assert written <= server.Chunk.MAX_BYTES + 1_000
            office.accept(log.add(3))
            listener.reads.set()
            await eventually(lambda: "p" in listener.subscriptions)
        listener.messages.popleft()
        assert listener.seqs() == list(range(1, 204))

    async def test_audit(self, log: MemoryLog) -> None:
        """An event that never came, with no other after it, is found by looking."""
        listener = Listener()
        async with task_group() as tasks:
            office = Office(tasks, log)
            await office.subscribe(listener)
            audit = tasks.create_task(office.feed.audit(0.01))
            log.add(3)
            await eventually(lambda: len(listener.messages) == 3)
            audit.cancel()
        assert listener.seqs() == [1, 2, 3]


# The promise itself: whatever happens in whatever order, what a client has seen of a project has
# no hole that it was not told of, nothing twice, and in the end nothing is missing.


class TestRelay:
    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize(
        "operation", ["CreateQueue", "Subscribe", "Publish", "ReceiveMessage", "DeleteMessageBatch"]
    )
    async def test_passing_faults(
        self, stand_in: StandIn, platform: aws_standin.Platform, operation: str
    ) -> None:
        """Whatever call fails in passing, events come across once, in order."""
        passing = [fault for fault in PASSING_FAULTS.values() if fault is not GARBAGE]
        stand_in.fault = faults(operation, *passing)
        stand_in.queues["agenticai-updates"].attributes["VisibilityTimeout"] = "1"
        audits = {"audit_interval_seconds": 0.5}
        async with (
            running_gateway(platform, "task-1", topic=True, **audits) as one,
            running_gateway(platform, "task-2", topic=True, **audits) as other,
            client_of(one, project_id="p") as here,
            client_of(other, project_id="p") as there,
        ):
            for client in (here, there):
                assert (await client.receive())["seq"] == 0
            for number in range(6):
                push(stand_in, *news(number))
                for client in (here, there):
                    await received_in_order(client, number)
            for client in (here, there):
                assert await client.has_nothing_more()
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))

    async def test_everything_crosses(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """Events, broadcasts, ephemeral ones and those for one client reach the other task."""
        async with (
            running_gateway(platform, "task-1", topic=True) as one,
            running_gateway(platform, "task-2", topic=True) as other,
            client_of(one, project_id="p") as here,
            client_of(other, project_id="p") as there,
        ):
            for client in (here, there):
                await client.receive()
            sent = [
                *news(1),
                *news(2, project_id=None),
                *news(3, project_id="*"),
                *news(4, ephemeral=True),
                *news(5, project_id=None, ephemeral=True),
            ]
            for update in sent:
                push(stand_in, update)
                for client in (here, there):
                    got = await client.receive()
                    assert got["data"] == update["data"]
                    assert got["project_id"] == (update["project_id"] or "*")
                    assert ("seq" in got) == (not update.get("ephemeral"))
            for client, other_client in ((here, there), (there, here)):
                for number in range(3):
                    push(stand_in, *news(number, connection_id=client.greeting["connection_id"]))
                    got = await client.receive()
                    assert (got["data"], "seq" in got) == (number, False)
                assert await other_client.has_nothing_more()
            push(stand_in, *news(9, connection_id="nobody's"))
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
            assert await here.has_nothing_more()

    async def test_topic_misbehaves(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """What the topic doubles, reorders and drops comes to clients once, in order."""
        chance = random.Random(7)
        stand_in.fault = always(
            "Publish",
            Fault(
                deliveries=lambda _queue: [
                    chance.random() / 20 for _ in range(chance.choice([0, 1, 1, 2]))
                ]
            ),
        )
        async with (
            running_gateway(platform, "task-1", topic=True, audit_interval_seconds=0.2) as one,
            running_gateway(platform, "task-2", topic=True, audit_interval_seconds=0.2) as other,
            client_of(one, project_id="p") as here,
            client_of(other, project_id="p") as there,
        ):
            for client in (here, there):
                await client.receive()
            for number in range(60):
                push(stand_in, *news(number))
                await asyncio.sleep(0)
            for client in (here, there):
                events = await client.receive_many(60)
                assert [each["seq"] for each in events] == list(range(1, 61))
                assert {each["data"] for each in events} == set(range(60))
            for client in (here, there):
                assert await client.has_nothing_more()

    async def test_reaping(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """What killed tasks have left is removed; what is alive, or somebody else's, is not."""
        now, prefix = int(time.time()), "agenticai-updates-task-"
        old, young = {"heartbeat": str(now - 10_000)}, {"heartbeat": str(now + 10_000)}
        made = {
            f"{prefix}dead": old,
            f"{prefix}without-a-sign": {},
            f"{prefix}still-alive": young,
            "agenticai-updates-other": old,
        }
        for name, tags in made.items():
            stand_in.sqs.create(name, tags=tags)
        endpoints = [*made, f"{prefix}without-a-queue"]
        for name in endpoints:
            request = {
                "TopicArn": platform.topic_arn,
                "Protocol": "sqs",
                "Endpoint": f"arn:aws:sqs:us-east-1:000000000000:{name}",
            }
            stand_in.perform(Call("sns", "Subscribe", request))
        async with running_gateway(platform, topic=True, task_heartbeat_seconds=0.2):
            kept = {f"{prefix}still-alive", "agenticai-updates-other", f"{prefix}task-1"}
            await eventually(
                lambda: (
                    {each.endpoint.rpartition(":")[2] for each in subscriptions(stand_in)} == kept
                )
            )
            await eventually(
                lambda: not {f"{prefix}dead", f"{prefix}without-a-sign"} & set(stand_in.queues)
            )
            assert kept <= set(stand_in.queues)
            rounds = stand_in.calls["sns", "ListSubscriptionsByTopic"]
            await eventually(lambda: stand_in.calls["sns", "ListSubscriptionsByTopic"] > rounds + 2)
            assert kept <= set(stand_in.queues)
            assert len(subscriptions(stand_in)) == 3


UNREADABLE = [
    "hello",
    '{"project_id":"p"}',
    '{"type":"error","project_id":"p"}',
    json.dumps({"type": "t", "project_id": "p", "data": "x" * server.EVENT_MAX_BYTES}),
]


class TestIntake:
    async def test_order(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """Updates of many projects come in order, with a seq each, and leave the queue."""
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id=["p", "q"]) as client,
        ):
            await client.receive_many(2)
            push(
                stand_in,
                *(each for n in range(50) for name in "pq" for each in news(n, project_id=name)),
            )
            events = await client.receive_many(100)
            for name in "pq":
                own = [each for each in events if each["project_id"] == name]
                assert [(each["seq"], each["data"]) for each in own] == [
                    (number + 1, number) for number in range(50)
                ]
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
            assert await head_of(gateway.log, "p") == 50

    @pytest.mark.parametrize("fifo", [False, True])
    async def test_unreadable(self, stand_in: StandIn, fifo: bool) -> None:
        """Updates that cannot be read are in the dead-letter queue at once.

        The rest of their batch comes in order.
        """
        platform = stand_in.create_platform(fifo_updates=fifo)
        queue, dead_letters = (platform.queue_names[each] for each in ("updates", "updates_dlq"))
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            good = iter(news(*range(len(UNREADABLE))))
            push(stand_in, *(each for bad in UNREADABLE for each in (bad, next(good))), queue=queue)
            await received_in_order(client, *range(len(UNREADABLE)))
            await eventually(lambda: sorted(bodies(stand_in, dead_letters)) == sorted(UNREADABLE))
            await eventually(lambda: not bodies(stand_in, queue))
            push(stand_in, *news(9), queue=queue)
            await received_in_order(client, 9)

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("fifo", [False, True])
    async def test_crash_before_delete(self, stand_in: StandIn, fifo: bool) -> None:
        """What a task has delivered but not deleted when it dies repeats nothing to clients."""
        platform = stand_in.create_platform(fifo_updates=fifo)
        queue = stand_in.queues[platform.queue_names["updates"]]
        queue.attributes["VisibilityTimeout"] = "1"
        stand_in.fault = always("DeleteMessageBatch", SERVER_ERROR)
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            epoch = (await client.receive())["epoch"]
            push(stand_in, *news(1, 2, 3), queue=queue.name)
            await received_in_order(client, 1, 2, 3)
        assert len(queue.bodies) == 3
        stand_in.fault = None
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p", since=1, epoch=epoch) as client,
        ):
            assert (await client.receive())["recovered"] is True
            await received_in_order(client, 2, 3)
            await eventually(lambda: not queue.bodies)
            push(stand_in, *news(4), queue=queue.name)
            [last] = await received_in_order(client, 4)
            assert last["seq"] == 4

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize(
        "operation",
        [
            "ReceiveMessage",
            "GetQueueAttributes",
            "TransactWriteItems",
            "Query",
            "DeleteMessageBatch",
        ],
    )
    async def test_passing_faults(
        self, stand_in: StandIn, platform: aws_standin.Platform, operation: str
    ) -> None:
        """Whatever call fails in passing, every update comes once, in order."""
        stand_in.queues["agenticai-updates"].attributes["VisibilityTimeout"] = "1"
        passing = [each for each in PASSING_FAULTS.values() if each is not GARBAGE]
        stand_in.fault = faults(operation, *passing)
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            for number in range(6):
                push(stand_in, *news(number))
                await received_in_order(client, number)
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
            assert await client.has_nothing_more()

    async def test_same_event_id(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """An agent that sends an update twice under one event id is heard once."""
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            for number in (1, 2, 3):
                push(stand_in, *news(number, number, event_id=f"e{number // 2}"))
            push(stand_in, *news(4))
            events = await client.receive_many(3)
            assert [(each["data"], each["seq"]) for each in events] == [(1, 1), (2, 2), (4, 3)]

    async def test_drain_finishes_what_is_in_hand(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """Updates in hand at the end are brought through, and no others taken."""
        stand_in.fault = always("TransactWriteItems", Fault(delay_s=0.2))
        async with running_gateway(platform) as gateway:
            push(stand_in, *news(1, 2))
            await eventually(lambda: stand_in.calls["dynamodb", "TransactWriteItems"])
        assert bodies(stand_in, "agenticai-updates") == []
        async with aws_clients(platform) as aws:
            log = LogKit(aws, platform).log()
            assert await head_of(log, "p") == 2
        assert gateway.health() == {"status": "draining"}


# --- Connection ----------------------------------------------------------------------------


class TestConnection:
    @standing_loop
    @over_one_gateway
    @given(
        text=st.text(min_size=1, max_size=256),
        cuts=st.lists(st.integers(0, 1_100), max_size=8),
        pings=st.lists(st.tuples(st.integers(0, 8), st.binary(max_size=125)), max_size=4),
        deflated=st.booleans(),
    )
    async def test_fragments(
        self,
        standing: Gateway,
        text: str,
        cuts: list[int],
        pings: list[tuple[int, bytes]],
        deflated: bool,
    ) -> None:
        """Server puts any text in any fragments together, with control frames between them."""
        message = {"action": "unsubscribe", "project_id": text}
        payload = json.dumps(message, ensure_ascii=False).encode()
        data = deflate(payload) if deflated else payload
        bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        fragments = [data[start:end] for start, end in itertools.pairwise(bounds)]
        async with peer_of(standing, deflates=True) as peer:
            for i, fragment in enumerate(fragments):
                opcode = Opcode.CONT if i else Opcode.TEXT
                fin = i == len(fragments) - 1
                rsv = DEFLATED if deflated and not i else 0
                peer.send_frame(fragment, opcode, fin=fin, rsv=rsv)
                for place, content in pings:
                    if place == i and not fin:
                        peer.send_frame(content, Opcode.PING)
            peer.send_frame(b"", Opcode.CLOSE)
            answers = [(each.opcode, bytes(each.data)) for each in await peer.rest()]
        [answer] = [content for opcode, content in answers if opcode is Opcode.TEXT]
        assert json.loads(answer) == {"type": "unsubscription_confirmed", "project_id": text}
        pongs = [content for opcode, content in answers if opcode is Opcode.PONG]
        ordered = sorted(pings, key=lambda ping: ping[0])
        assert pongs == [content for place, content in ordered if place < len(fragments) - 1]

    @pytest.mark.parametrize("sizes", [[2_001], [1_000, 1_001], [0, 500, 500, 500, 501]])
    async def test_too_large(self, platform: aws_standin.Platform, sizes: list[int]) -> None:
        """Server closes with 1009 what exceeds the bound, be it over many fragments."""
        async with (
            running_gateway(platform, max_message_bytes=2_000) as gateway,
            peer_of(gateway) as peer,
        ):
            for i, size in enumerate(sizes):
                opcode = Opcode.CONT if i else Opcode.TEXT
                peer.send_frame(b" " * size, opcode, fin=False)
            assert await peer.close_code() == CloseCode.MESSAGE_TOO_BIG

    @standing_loop
    @pytest.mark.parametrize(
        "fragments",
        [[b"\xff"], [b'"\xc3', b'"'], [b"\xed\xa0\x80"], [b"\xf0\x9f", b"\x92"], [b"\xc0\x80"]],
        ids=repr,
    )
    async def test_invalid_utf8(self, standing: Gateway, fragments: list[bytes]) -> None:
        """Server closes with 1007 a text that is not UTF-8."""
        async with peer_of(standing) as peer:
            for i, fragment in enumerate(fragments):
                opcode, fin = (Opcode.CONT if i else Opcode.TEXT), fragment is fragments[-1]
                peer.send_frame(fragment, opcode, fin=fin)
            assert await peer.close_code() == CloseCode.INVALID_DATA

    @standing_loop
    @pytest.mark.parametrize(
        "frames",
        {
            "not masked": [server.frame(b"{}")],
            "RSV1": [masked(b"{}", rsv=0b100)],
            "RSV2": [masked(b"{}", rsv=0b010)],
            "RSV3": [masked(b"{}", rsv=0b001)],
            "unknown opcode": [masked(b"", 0x3)],
            "unknown control opcode": [masked(b"", 0xB)],
            "fragmented ping": [masked(b"", Opcode.PING, fin=False)],
            "ping of 126 bytes": [masked(bytes(126), Opcode.PING)],
            "length over 63 bits": [b"\x81\xff\xff" + bytes(7)],
            "nothing to continue": [masked(b"{}", Opcode.CONT)],
            "text within a text": [masked(b"", Opcode.TEXT, fin=False)] * 2,
            "close of one byte": [masked(b"\x03", Opcode.CLOSE)],
            "close with 1005": [masked(b"\x03\xed", Opcode.CLOSE)],
            "close with 999": [masked(b"\x03\xe7", Opcode.CLOSE)],
        }.items(),
        ids=lambda item: item[0],
    )
    async def test_protocol_violation(
        self, standing: Gateway, frames: tuple[str, list[bytes]]
    ) -> None:
        """Server closes with 1002 what RFC 6455 forbids."""
        async with peer_of(standing) as peer:
            peer.write(b"".join(frames[1]))
            assert await peer.close_code() in (CloseCode.PROTOCOL_ERROR, CloseCode.MESSAGE_TOO_BIG)

    @standing_loop
    async def test_ping(self, standing: Gateway) -> None:
        """Server answers a ping frame with its content, and takes an unasked pong in silence."""
        async with peer_of(standing) as peer:
            peer.send_frame(b"anybody?", Opcode.PONG)
            peer.send_frame(b"anybody?", Opcode.PING)
            pong = await peer.next_frame()
            assert pong is not None
            assert (pong.opcode, bytes(pong.data)) == (Opcode.PONG, b"anybody?")

    # The opening handshake.

    @standing_loop
    @pytest.mark.parametrize("path", ["/", "/ws", "/ws?token=x"])
    async def test_opening_handshake(self, standing: Gateway, path: str) -> None:
        """Server completes the handshake of RFC 6455's own example."""
        async with dialled(standing) as peer:
            peer.write(upgrade(path))
            status, headers, _ = await peer.response()
            assert status == 101
            assert headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
            assert "sec-websocket-extensions" not in headers
            assert (await peer.receive())["type"] == "connected"

    @standing_loop
    @pytest.mark.parametrize(
        ("garbage", "status"),
        [
            (b"\x16\x03\x01\x02\0 a TLS client\r\n\r\n", 400),
            (b"\r\n", 400),
            (b"GET\r\n\r\n", 400),
            (b"GET / HTTP/2.0\r\n\r\n", 400),
            (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
            (request("/ws", "POST", Content_Length="3") + b"abc", 400),
            (request("/ws", "POST", Transfer_Encoding="chunked"), 400),
            (request("/ws", "POST"), 405),
            (upgrade().replace(b"GET", b"PUT"), 405),
            (upgrade(Sec_WebSocket_Version="12"), 400),
            (upgrade(Sec_WebSocket_Key="short"), 400),
            (request("/ws"), 426),
            (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n", 414),
            (request(**{f"X_{i}": "x" for i in range(200)}), 431),
            (request(X_Long="x" * 20_000), 431),
            (b"GET / HTTP/1.1\r\n" + b"X: %s\r\n" % (b"x" * 8_000) * 3, 431),
            (request("/nowhere"), 404),
        ],
        ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else None,
    )
    async def test_bad_request(self, standing: Gateway, garbage: bytes, status: int) -> None:
        """Server answers a request it cannot serve with its status, and hangs up."""
        opened = standing.metrics.connections_opened
        async with dialled(standing) as peer:
            peer.write(garbage)
            assert (await peer.response())[0] == status
            assert await peer.rest() == []
            peer.end()
        await eventually(lambda: not unsettled(standing))
        assert standing.metrics.connections_opened == opened

    @pytest.mark.parametrize("begun", [b"", b"GET /ws HTTP/1.1\r\nHost: a"], ids=["mute", "slow"])
    async def test_slow_handshake(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch, begun: bytes
    ) -> None:
        """A peer that does not finish its request is dropped."""
        monkeypatch.setattr(server.Connection, "HANDSHAKE_TIMEOUT_S", 0.1)
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
        async with running_gateway(platform) as gateway, dialled(gateway) as peer:
            peer.write(begun)
            assert await peer.rest() == []
            assert not unsettled(gateway)

    # The closing handshake.

    @standing_loop
    @pytest.mark.parametrize("content", [b"", b"\x03\xe8", b"\x03\xe9bye", b"\x0f\xa0"], ids=repr)
    async def test_client_closes(self, standing: Gateway, content: bytes) -> None:
        """Server returns the close frame and then closes the socket; what follows is ignored."""
        async with peer_of(standing) as peer:
            peer.send_frame(content, Opcode.CLOSE)
            peer.send(action="ping")
            [close] = await peer.rest()
            assert (close.opcode, bytes(close.data)) == (Opcode.CLOSE, content)
            peer.end()
            await eventually(lambda: not standing.registry.sockets)

    async def test_server_closes(self, gateway: Gateway) -> None:
        """Server sends one close frame, and hears nothing that comes after it but the answer."""
        async with peer_of(gateway) as peer:
            [connection] = gateway.registry.connections.values()
            connection.close(CloseCode.GOING_AWAY, "enough")
            connection.close(CloseCode.NORMAL_CLOSURE, "once more")
            assert not gateway.registry.connections
            received = gateway.metrics.messages_received
            peer.send(action="ping")
            close = await peer.next_frame()
            assert close is not None
            assert bytes(close.data) == b"\x03\xe9enough"
            peer.send_frame(b"\x03\xe9", Opcode.CLOSE)
            assert await peer.rest() == []
            assert gateway.metrics.messages_received == received
            peer.end()
            await eventually(lambda: not unsettled(gateway))

    async def test_close_is_not_answered(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A peer that does not answer a close frame is cut off after a while."""
        monkeypatch.setattr(server.Connection, "CLOSE_TIMEOUT_S", 0.1)
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
        async with running_gateway(platform) as gateway, peer_of(gateway) as peer:
            [connection] = gateway.registry.connections.values()
            connection.close(CloseCode.GOING_AWAY)
            assert await peer.close_code() == CloseCode.GOING_AWAY
            await eventually(lambda: not unsettled(gateway))

    # Compression.

    @standing_loop
    @pytest.mark.parametrize(
        ("offer", "answer"),
        [
            ("permessage-deflate", ""),
            ("permessage-deflate; server_no_context_takeover; client_no_context_takeover", ""),
            ("permessage-deflate; client_max_window_bits", ""),
            ("x-unknown, permessage-deflate", ""),
            ("permessage-deflate; server_max_window_bits=10", "; server_max_window_bits=10"),
        ],
    )
    async def test_negotiation(self, standing: Gateway, offer: str, answer: str) -> None:
        """Server takes permessage-deflate only without context takeover on either side."""
        async with dialled(standing) as peer:
            peer.write(upgrade(Sec_WebSocket_Extensions=offer))
            status, headers, _ = await peer.response()
        both = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
        assert (status, headers["sec-websocket-extensions"]) == (101, both + answer)

    async def test_compression_off(self, platform: aws_standin.Platform) -> None:
        """With `COMPRESSION=off` nothing is negotiated."""
        async with (
            running_gateway(platform, compression=False) as gateway,
            dialled(gateway) as peer,
        ):
            peer.write(upgrade(Sec_WebSocket_Extensions="permessage-deflate"))
            assert "sec-websocket-extensions" not in (await peer.response())[1]

    async def test_deflated_event(self, gateway: Gateway) -> None:
        """All who negotiated it read the one deflated frame, and nobody else gets it."""
        narrow = upgrade(Sec_WebSocket_Extensions="permessage-deflate; server_max_window_bits=10")
        async with (
            peer_of(gateway, deflates=True) as one,
            peer_of(gateway, deflates=True) as two,
            peer_of(gateway) as plain,
            peer_of(gateway, narrow) as small_window,
        ):
            peers = (one, two, plain, small_window)
            for peer in peers:
                await peer.ask(action="subscribe", project_id="p")
                peer.received_bytes = 0
            gateway.feed.accept(event(None, size=20_000), None)
            gateway.feed.accept(event(None, size=10), None)
            for peer in peers:
                assert [(await peer.receive())["data"] for _ in range(2)] == [
                    "x" * 20_000,
                    "x" * 10,
                ]
        assert one.received_bytes == two.received_bytes < 2_000
        assert plain.received_bytes == small_window.received_bytes > 20_000

    @standing_loop
    @pytest.mark.parametrize("count", [1, 10])
    async def test_bomb(self, standing: Gateway, count: int) -> None:
        """What grows too large as it is inflated closes with 1009, fragmented or not."""
        bomb = deflate(bytes(20_000_000))
        assert len(bomb) < 50_000
        size = len(bomb) // count + 1
        async with peer_of(standing, deflates=True) as peer:
            for i in range(count):
                part, opcode = bomb[i * size : (i + 1) * size], Opcode.CONT if i else Opcode.TEXT
                peer.send_frame(part, opcode, fin=i == count - 1, rsv=0 if i else DEFLATED)
            assert await peer.close_code() == CloseCode.MESSAGE_TOO_BIG

    # Back-pressure.

    async def test_much_at_once(self, platform: aws_standin.Platform) -> None:
        """Who reads is not closed for what comes at once, turn after turn of the loop."""
        async with (
            running_gateway(platform, max_backlog_bytes=65_536) as gateway,
            peer_of(gateway) as peer,
        ):
            narrow(gateway)
            await peer.ask(action="subscribe", project_id="p")
            for _ in range(20):  # no turn of the loop leaves the peer the time to read it all
                for _ in range(40):
                    gateway.feed.accept(event(None, size=10_000), None)
                await asyncio.sleep(0)
            [connection] = gateway.registry.connections.values()
            assert connection.backlog_bytes > 10 * 65_536
            for _ in range(800):
                await peer.receive()
            assert gateway.metrics.slow_consumers_closed == 0

    async def test_slow_reader(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who reads too slowly is closed with 1013, and costs the others nothing."""
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
        async with (
            running_gateway(platform, max_backlog_bytes=200_000) as gateway,
            peer_of(gateway) as slow,
            client_of(gateway) as quick,
        ):
            narrow(gateway)
            await slow.ask(action="subscribe", project_id="p")
            await quick.ask(action="subscribe", project_id="p")
            while gateway.registry.subscriptions == 2:
                gateway.feed.accept(event(None, size=50_000), None)
                assert len((await quick.receive())["data"]) == 50_000
            assert gateway.metrics.slow_consumers_closed == 1
            assert await slow.close_code() == CloseCode.TRY_AGAIN_LATER
            assert await quick.has_nothing_more()

    @pytest.mark.usefixtures("impatient")
    async def test_reading_pauses_for_forwards(self, gateway: Gateway, stand_in: StandIn) -> None:
        """While many forwards wait for SQS no more are read, and in the end all are confirmed."""
        go_on = hold_back(stand_in)
        data = "x" * 20_000
        count = 300  # more than is read before the pause, and kept by the kernel
        async with peer_of(gateway) as peer:
            for number in range(count):
                peer.send(action="forward", type="dev", message_id=f"m{number}", data=data)
            await eventually(
                lambda: gateway.metrics.messages_received >= server.Connection.FORWARDS_IN_FLIGHT
            )
            async with peer_of(gateway) as other:
                for _ in range(20):  # many turns of the loop, in which more could be read
                    assert await other.is_answered()
            assert gateway.metrics.messages_received < count / 2
            go_on.set()
            received = [await peer.receive() for _ in range(count)]
        assert {each["type"] for each in received} == {"forward_confirmed"}
        assert {each["message_id"] for each in received} == {f"m{i}" for i in range(count)}
        assert set(sent_ids(stand_in)) == {f"m{i}" for i in range(count)}


# --- Gateway --------------------------------------------------------------------------------


class TestGateway:
    @standing_loop
    @pytest.mark.parametrize("fragments", [1, 2])
    async def test_binary_frame(self, standing: Gateway, fragments: int) -> None:
        """Server answers a binary frame with an error; the connection stays."""
        async with peer_of(standing) as peer:
            peer.send_frame(b"\xff\xfe", Opcode.BINARY, fin=fragments == 1)
            if fragments == 2:
                peer.send_frame(b"\xff", Opcode.CONT)
            assert (await peer.receive())["code"] == "binary_frame"
            assert await peer.is_answered()

    @standing_loop
    async def test_unknown_fields(self, standing: Gateway) -> None:
        """Fields that nobody knows are ignored."""
        async with client_of(standing) as client:
            assert (await client.ask(action="ping", colour="blue"))["type"] == "pong"

    @standing_loop
    async def test_greeting(self, standing: Gateway) -> None:
        """Every client is greeted first, with an id of its own."""
        async with client_of(standing) as one, client_of(standing, "/") as two:
            stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
            for client in (one, two):
                announced = {"ref", "max_message_bytes"}
                plain = {"type", "message", "timestamp", "connection_id"}
                assert client.greeting.keys() == plain | announced
                assert client.greeting["message"] == "WebSocket connection established"
                assert re.fullmatch(stamp, client.greeting["timestamp"])
            assert one.greeting["connection_id"] != two.greeting["connection_id"]

    # Forwards.

    async def test_forward(self, gateway: Gateway, stand_in: StandIn) -> None:
        """What lands in the agent's queue is what the protocol promises, `data` byte for byte."""
        data = r'{ "a":1.00, "b" :[1e5,"\u00e9\n"],"a":2 }'
        async with peer_of(gateway) as peer:
            peer.send_frame(
                b'{"data":%s,"action":"forward","message_id":"m1","type":"Code","project_id":"p"}'
                % data.encode()
            )
            answer = await peer.receive()
        [message] = stand_in.queues["agenticai-dev-queue"].messages
        assert answer == {
            "type": "forward_confirmed",
            "message_id": "m1",
            "sqs_message_id": message.message_id,
            "project_id": "p",
        }
        body = json.loads(message.body)
        assert list(body) == [
            "action", "type", "message_id", "project_id", "data", "connection_id", "client_id",
            "user", "timestamp",
        ]  # fmt: skip
        assert f'"data":{data},' in message.body
        assert (body["action"], body["type"], body["user"]) == ("forward", "Code", None)
        assert message.attributes["MessageType"]["StringValue"] == "Code"
        assert message.attributes["Timestamp"]["StringValue"] == body["timestamp"]

    @pytest.mark.parametrize("agent", ["pm", "dev", "qa", "ops"])
    async def test_forward_to_each(self, gateway: Gateway, stand_in: StandIn, agent: str) -> None:
        """Every alias, in any case, leads to its agent; a missing message id is made up."""
        aliases = [alias for alias, name in server.QUEUE_OF_TYPE.items() if name == agent]
        async with client_of(gateway) as client:
            answers = [
                await client.ask(action="forward", type=kind)
                for alias in aliases
                for kind in (alias, alias.upper())
            ]
        message_ids = [uuid.UUID(each["message_id"]) for each in answers]
        assert len(set(message_ids)) == len(answers)
        assert sent_ids(stand_in, f"agenticai-{agent}-queue") == [str(each) for each in message_ids]

    async def test_forward_times_out(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """A forward that SQS does not take in time is an error that says so."""
        stand_in.fault = always("SendMessageBatch", Fault(silent=True))
        async with (
            running_gateway(platform, forward_timeout_seconds=0.2) as gateway,
            client_of(gateway) as client,
        ):
            error = await client.ask(action="forward", type="dev", message_id="m1")
            assert (error["code"], error["message_id"], error["action"]) == (
                "timeout",
                "m1",
                "forward",
            )
            assert await client.has_nothing_more()

    # HTTP.

    async def test_health(self, gateway: Gateway) -> None:
        """A task that can do its job says so, to HEAD without a body."""
        status, headers, body = await fetch(gateway, "/health")
        assert (status, json.loads(body)) == (200, {"status": "ok"})
        assert headers["content-type"] == "application/json"
        assert headers["cache-control"] == "no-store"
        assert headers["connection"] == "close"
        async with dialled(gateway) as peer:
            peer.write(request("/health", "HEAD"))
            peer.end()
            assert (await peer.everything()).endswith(b"\r\n\r\n")
        for method in ("POST", "PUT", "OPTIONS"):
            status, headers, _ = await fetch(gateway, "/health", method)
            assert (status, headers["allow"]) == (405, "GET, HEAD")

    @pytest.mark.usefixtures("impatient")
    async def test_health_while_starting(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """Until the log can be read a task is alive, not healthy, and lets nobody in."""
        stand_in.fault = always("UpdateItem", THROTTLED)
        async with aws_clients(platform) as aws, task_group() as tasks:
            gateway = Gateway(settings(platform), tasks, aws, "task-1")
            running = tasks.create_task(gateway.run())
            await eventually(lambda: gateway.address[1])
            status, _, body = await fetch(gateway, "/health")
            assert (status, json.loads(body)) == (503, {"status": "starting"})
            assert (await fetch(gateway, "/live"))[0] == 200
            async with dialled(gateway) as peer:
                peer.write(upgrade())
                status, headers, _ = await peer.response()
            assert status == 503
            assert 1 <= int(headers["retry-after"]) <= 5
            stand_in.fault = None
            await eventually(gateway.ready.is_set)
            assert (await fetch(gateway, "/health"))[0] == 200
            gateway.drain.wanted.set()
            await running

    @standing_loop
    @pytest.mark.parametrize("path", ["/nowhere", "/ws/", "//", "/health/", "/stats/x", "/healthz"])
    async def test_not_found(self, standing: Gateway, path: str) -> None:
        """Every other path is 404, for upgrades too."""
        assert (await fetch(standing, path))[0] == 404
        async with dialled(standing) as peer:
            peer.write(upgrade(path))
            assert (await peer.response())[0] == 404

    async def test_stats(self, gateway: Gateway) -> None:
        """The figures are there for who asks on the machine itself."""
        async with client_of(gateway) as client:
            await client.ask(action="subscribe", project_id="p")
            await client.ask(action="forward", type="dev")
            status, _, body = await fetch(gateway, "/stats")
        stats = json.loads(body)
        assert status == 200
        assert stats["ActiveConnections"] == stats["Subscriptions"] == 1
        assert stats["MessagesReceived"] == 2
        assert stats["MessagesForwarded"] == 1
        assert stats["ForwardLatency"]["max"] > 0

    # Admission.

    async def test_max_connections(self, platform: aws_standin.Platform) -> None:
        """Beyond `MAX_CONNECTIONS` it is 503 with a time to come back, until somebody leaves."""
        async with running_gateway(platform, max_connections=2) as gateway:
            async with client_of(gateway), client_of(gateway), dialled(gateway) as peer:
                peer.write(upgrade())
                status, headers, _ = await peer.response()
                assert status == 503
                assert 1 <= int(headers["retry-after"]) <= 5
            await eventually(lambda: not gateway.registry.sockets)
            async with client_of(gateway):
                pass

    async def test_max_connections_per_ip(self, platform: aws_standin.Platform) -> None:
        """Beyond `MAX_CONNECTIONS_PER_IP` it is 429 for that address, and for no other."""
        async with (
            running_gateway(platform, max_connections_per_ip=1) as gateway,
            peer_of(gateway, upgrade(X_Forwarded_For="203.0.113.7")),
            dialled(gateway) as second,
            peer_of(gateway, upgrade(X_Forwarded_For="203.0.113.7, 203.0.113.8")),
        ):
            second.write(upgrade(X_Forwarded_For="198.51.100.1, 203.0.113.7"))
            status, headers, _ = await second.response()
            assert (status, "retry-after" in headers) == (429, True)

    @pytest.mark.parametrize(
        ("origin", "status"),
        [("https://app.example", 101), ("https://evil.example", 403), ("null", 403), (None, 101)],
    )
    async def test_origin(
        self, platform: aws_standin.Platform, origin: str | None, status: int
    ) -> None:
        """Pages of other origins may not connect; programs without an origin may."""
        headers = {"Origin": origin} if origin else {}
        async with (
            running_gateway(platform, allowed_origins=("https://app.example",)) as gateway,
            dialled(gateway) as peer,
        ):
            peer.write(upgrade(**headers))
            assert (await peer.response())[0] == status

    # Subscriptions.

    async def test_subscribe(self, gateway: Gateway, stand_in: StandIn) -> None:
        """A subscriber gets its projects' events, and of no others."""
        async with client_of(gateway) as client, client_of(gateway) as other:
            confirmed = await client.ask(action="subscribe", project_id="p")
            assert confirmed == {
                "type": "subscription_confirmed",
                "project_id": "p",
                "seq": 0,
                "epoch": gateway.log.epoch,
            }
            agents_say(stand_in, {"project_id": "q"}, {"project_id": "p", "data": {"step": 1}})
            received = await client.receive()
            stamp = received.pop("timestamp")
            assert received == {
                "type": "project_updated",
                "project_id": "p",
                "data": {"step": 1},
                "seq": 1,
            }
            assert stamp.endswith("Z")
            assert await other.has_nothing_more()
            ended = await client.ask(action="unsubscribe", project_id="p")
            assert ended == {"type": "unsubscription_confirmed", "project_id": "p"}
            agents_say(stand_in, {"project_id": "p"})
            await eventually(lambda: not stand_in.queues["agenticai-updates"].messages)
            assert await client.has_nothing_more()

    async def test_url(self, gateway: Gateway) -> None:
        """`?project_id=` subscribes, as often as it is given."""
        async with client_of(gateway, project_id=["p", "q r", "é"]) as client:
            confirmed = await client.receive_many(3)
            assert [each["project_id"] for each in confirmed] == ["p", "q r", "é"]
            assert {each["type"] for each in confirmed} == {"subscription_confirmed"}
            assert await client.has_nothing_more()

    async def test_url_resumes(self, gateway: Gateway) -> None:
        """`&since=` and `&epoch=` go with a single project."""
        await fill_log(gateway, 3)
        epoch = gateway.log.epoch
        async with client_of(gateway, project_id="p", since=1, epoch=epoch) as client:
            assert (await client.receive())["recovered"] is True
            assert [each["seq"] for each in await client.receive_many(2)] == [2, 3]
        async with client_of(gateway, project_id="p", since=1, epoch="another") as client:
            confirmed = await client.receive()
            assert (confirmed["recovered"], confirmed["seq"]) == (False, 3)
            assert await client.has_nothing_more()

    @standing_loop
    @pytest.mark.parametrize(
        "query",
        [
            {"project_id": ["p", "q"], "since": 1},
            {"since": 1},
            {"epoch": "e"},
            {"project_id": "p", "since": "soon"},
            {"project_id": "p", "since": "-1"},
            {"project_id": ""},
            {"project_id": TOO_LONG},
        ],
        ids=str,
    )
    async def test_bad_url(self, standing: Gateway, query: Json) -> None:
        """What cannot be done with a URL's query is an error; the connection stays."""
        async with client_of(standing, **query) as client:
            assert (await client.receive())["code"] == "invalid_field"
            assert await client.has_nothing_more()

    async def test_subscription_limit(self, platform: aws_standin.Platform) -> None:
        """A connection may have so many subscriptions; the same again is no further one."""
        async with (
            running_gateway(platform, max_subscriptions_per_connection=2) as gateway,
            client_of(gateway, project_id=["p", "q"]) as client,
        ):
            await client.receive_many(2)
            error = await client.ask(action="subscribe", project_id="r")
            assert (error["code"], error["project_id"]) == ("too_many_subscriptions", "r")
            for project_id in ("p", "*"):
                confirmed = await client.ask(action="subscribe", project_id=project_id)
                assert confirmed["type"] == "subscription_confirmed"
            await client.ask(action="unsubscribe", project_id="q")
            confirmed = await client.ask(action="subscribe", project_id="r")
            assert confirmed["type"] == "subscription_confirmed"

    async def test_broadcast(self, gateway: Gateway, stand_in: StandIn) -> None:
        """What is for everyone reaches everyone, subscribed or not, also after an unsubscribe."""
        async with client_of(gateway) as client, client_of(gateway) as other:
            answer = await client.ask(action="unsubscribe", project_id="*")
            assert answer == {"type": "unsubscription_confirmed", "project_id": "*"}
            agents_say(stand_in, {"data": 1}, {"project_id": "*", "data": 2})
            for each in (client, other):
                received = await each.receive_many(2)
                assert {(x["project_id"], x["data"]) for x in received} == {("*", 1), ("*", 2)}
                assert [x["seq"] for x in received] == [1, 2]
        async with client_of(gateway, project_id="*", since=0) as late:
            assert (await late.receive())["recovered"] is True
            assert [each["seq"] for each in await late.receive_many(2)] == [1, 2]
            assert await late.has_nothing_more()

    async def test_for_one_client(self, gateway: Gateway, stand_in: StandIn) -> None:
        """An update with a `connection_id` reaches that client alone, without a seq."""
        async with client_of(gateway) as client, client_of(gateway) as other:
            for connection_id in ("nobody", client.greeting["connection_id"]):
                agents_say(stand_in, {"connection_id": connection_id, "data": connection_id})
            received = await client.receive()
            assert received["data"] == client.greeting["connection_id"]
            assert "seq" not in received
            assert await other.has_nothing_more()
        await eventually(lambda: not stand_in.queues["agenticai-updates"].messages)

    async def test_snapshot(
        self, gateway: Gateway, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """The platform's own state of a project comes as JSON: numbers, sets and all."""
        key = ("PROJECT#p", "METADATA")
        item: Json = {
            "PK": {"S": key[0]},
            "SK": {"S": key[1]},
            "name": {"S": "é"},
            "count": {"N": "12345678901234567890"},
            "share": {"N": "0.1"},
            "tags": {"SS": ["b", "a"]},
            "sizes": {"NS": ["1", "2.5"]},
            "nested": {"M": {"list": {"L": [{"BOOL": True}, {"NULL": True}]}}},
            "bytes": {"B": "AAE="},
        }
        stand_in.tables[platform.table_name].put(key, item)
        async with client_of(gateway) as client:
            await client.send(action="subscribe", project_id="p", snapshot=True)
            assert (await client.receive())["type"] == "subscription_confirmed"
            snapshot = await client.receive()
            data = snapshot.pop("data")
            assert snapshot == {"type": "project_snapshot", "project_id": "p"}
            assert (data["name"], data["count"], data["share"]) == ("é", 12345678901234567890, 0.1)
            assert (sorted(data["tags"]), sorted(data["sizes"])) == (["a", "b"], [1, 2.5])
            assert data["nested"] == {"list": [True, None]}
            assert data.keys().isdisjoint({"PK", "SK"})
            await client.send(action="subscribe", project_id="empty", snapshot=True)
            await client.receive()
            assert (await client.receive())["data"] is None

    async def test_several_tasks(self, platform: aws_standin.Platform, stand_in: StandIn) -> None:
        """Clients of every task get what agents say, whichever task received it."""
        async with (
            running_gateway(platform, "task-1", topic=True) as one,
            running_gateway(platform, "task-2", topic=True) as two,
            client_of(one, project_id="p") as first,
            client_of(two, project_id="p") as second,
        ):
            for client in (first, second):
                assert (await client.receive())["type"] == "subscription_confirmed"
            for number in range(1, 6):
                agents_say(stand_in, {"project_id": "p"}, {"project_id": "elsewhere"})
                for client in (first, second):
                    assert (await client.receive())["seq"] == number
            for client in (first, second):
                agents_say(stand_in, {"connection_id": client.greeting["connection_id"]})
                assert "seq" not in await client.receive()
            for client in (first, second):
                assert await client.has_nothing_more()

    # Tokens.

    async def test_token(self, platform: aws_standin.Platform, stand_in: StandIn) -> None:
        """A token in the handshake says who the client is and what it may use."""
        async with running_issuer() as issuer:
            token = token_of("alice", projects=["p"])
            async with (
                running_gateway(platform, **issuer.settings) as gateway,
                peer_of(gateway, upgrade(Authorization=f"Bearer {token}")) as peer,
            ):
                assert (await peer.ask(action="subscribe", project_id="q"))["code"] == "forbidden"
                confirmed = await peer.ask(action="subscribe", project_id="p")
                assert confirmed["type"] == "subscription_confirmed"
                await peer.ask(action="forward", type="dev", project_id="p")
                [body] = stand_in.queues["agenticai-dev-queue"].bodies
                assert json.loads(body)["user"] == "alice"
                for opening in (upgrade(), upgrade(Authorization="Bearer x.y.z")):
                    async with dialled(gateway) as stranger:
                        stranger.write(opening)
                        status, headers, _ = await stranger.response()
                        assert (status, headers["www-authenticate"]) == (401, "Bearer")

    async def test_token_as_first_message(self, platform: aws_standin.Platform) -> None:
        """Where it is allowed, a token may come as a message, before which nothing is answered."""
        async with (
            running_issuer() as issuer,
            running_gateway(platform, auth_first_message=True, **issuer.settings) as gateway,
            peer_of(gateway) as peer,
            peer_of(gateway) as wrong,
        ):
            assert (await peer.ask(action="ping"))["code"] == "unauthenticated"
            gateway.feed.accept(event(None, EVERYONE), None)
            answer = await peer.ask(action="authenticate", token=token_of(projects=["p"]))
            assert answer["type"] == "authenticated"
            assert 0 < answer["expires_in_seconds"] <= 630
            await peer.ask(action="subscribe", project_id="p")
            peer.send(action="authenticate", token=token_of(projects=["q"]))
            assert (await peer.receive())["type"] == "authenticated"
            assert await peer.receive() == {"type": "unsubscription_confirmed", "project_id": "p"}
            peer.send(action="authenticate", token=token_of("somebody else"))
            assert await peer.close_code() == server.CLOSE_UNAUTHENTICATED
            wrong.send(action="authenticate", token="x.y.z")
            assert await wrong.close_code() == server.CLOSE_UNAUTHENTICATED

    async def test_no_token_in_time(self, platform: aws_standin.Platform) -> None:
        """Who does not say who it is in time is closed with 4401."""
        options: Json = {"auth_first_message": True, "auth_deadline_seconds": 0.1}
        async with (
            running_issuer() as issuer,
            running_gateway(
                platform, ping_interval_seconds=0.4, **options, **issuer.settings
            ) as gateway,
            peer_of(gateway) as peer,
        ):
            assert await peer.close_code() == server.CLOSE_UNAUTHENTICATED

    async def test_token_ends(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A token's end is announced, and is the session's end unless a fresh one came."""
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
        monkeypatch.setattr(server, "TOKEN_LEEWAY_S", 0)
        async with (
            running_issuer() as issuer,
            running_gateway(platform, **issuer.settings) as gateway,
        ):
            opening = upgrade(Authorization=f"Bearer {token_of(valid_s=3)}")
            async with peer_of(gateway, opening) as peer, peer_of(gateway, opening) as careless:
                for each in (peer, careless):
                    warning = await each.receive()
                    assert warning == {
                        "type": "token_expiring",
                        "in_seconds": warning["in_seconds"],
                    }
                    assert warning["in_seconds"] <= 3
                assert (await peer.ask(action="authenticate", token=token_of()))["type"] == (
                    "authenticated"
                )
                assert await careless.close_code() == server.CLOSE_UNAUTHENTICATED
                assert await peer.is_answered()

    # Catching up.

    async def test_resume_after_slow_reading(
        self,
        platform: aws_standin.Platform,
        stand_in: StandIn,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Who was closed with 1013 gets by `since` what was missed; the others miss nothing."""
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.01)
        count = 40
        async with (
            running_gateway(platform, max_backlog_bytes=100_000) as gateway,
            peer_of(gateway) as slow,
            peer_of(gateway) as quick,
        ):
            narrow(gateway)
            await slow.ask(action="subscribe", project_id="p")
            await quick.ask(action="subscribe", project_id="p")
            for number in range(count):
                agents_say(stand_in, {"project_id": "p", "data": str(number) + "x" * 40_000})
                assert (await quick.receive())["seq"] == number + 1
            await eventually(lambda: gateway.metrics.slow_consumers_closed == 1)
            seen = []
            while (frame := await slow.next_frame()) and frame.opcode is Opcode.TEXT:
                seen.append(json.loads(bytes(frame.data))["seq"])
            assert frame is not None
            assert int.from_bytes(frame.data[:2], "big") == CloseCode.TRY_AGAIN_LATER
            async with peer_of(gateway, upgrade(f"/ws?project_id=p&since={seen[-1]}")) as again:
                assert (await again.receive())["recovered"] is True
                missed = await seqs_until(again, count)
            assert seen + missed == list(range(1, count + 1))

    # Time.

    async def test_silent_peer(self, platform: aws_standin.Platform) -> None:
        """Who says nothing is pinged; who does not answer that is dropped, who does stays."""
        async with (
            running_gateway(platform, ping_interval_seconds=0.1) as gateway,
            peer_of(gateway) as silent,
            peer_of(gateway) as quiet,
        ):
            for _ in range(3):
                ping = await quiet.next_frame()
                assert ping is not None
                assert ping.opcode is Opcode.PING
                quiet.send_frame(bytes(ping.data), Opcode.PONG)
            frames = await silent.rest()
            assert [frame.opcode for frame in frames] == [Opcode.PING]
            assert len(gateway.registry.connections) == 1

    # Draining.

    async def test_drain(
        self, platform: aws_standin.Platform, stand_in: StandIn, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A drain sends each client away with a delay of its own and 1012; no new ones come in."""
        async with (
            running_gateway(platform, topic=True, drain_seconds=1.0) as gateway,
            contextlib.AsyncExitStack() as stack,
        ):
            [fan_out_queue] = [name for name in stand_in.queues if "-task-" in name]
            peers = [await stack.enter_async_context(peer_of(gateway)) for _ in range(8)]
            begun = time.monotonic()
            gateway.drain.wanted.set()
            status, _, body = await fetch(gateway, "/health")
            assert (status, json.loads(body)) == (503, {"status": "draining"})
            async with dialled(gateway) as late:
                late.write(upgrade())
                assert (await late.response())[0] == 503
            closed_at = []
            delays = set()

            async def see_off(peer: Peer) -> None:
                message = await peer.receive()
                assert message["type"] == "reconnect"
                delays.add(message["after_ms"])
                assert await peer.close_code() == CloseCode.SERVICE_RESTART
                closed_at.append(time.monotonic() - begun)
                await peer.answer_close()

            await asyncio.gather(*map(see_off, peers))
            assert len(delays) > 1
            assert all(0 <= delay <= 60_000 for delay in delays)
            assert max(closed_at) - min(closed_at) > 0.4
            await eventually(lambda: fan_out_queue not in stand_in.queues)
        assert not errors_logged(caplog)

    @pytest.mark.parametrize("taken", [True, False])
    @pytest.mark.usefixtures("impatient")
    async def test_drain_answers_forwards(
        self, platform: aws_standin.Platform, stand_in: StandIn, taken: bool
    ) -> None:
        """A forward that is in flight when a drain begins is confirmed, or answered by an error."""
        go_on = hold_back(stand_in)
        async with (
            running_gateway(platform, forward_timeout_seconds=2.0) as gateway,
            peer_of(gateway) as peer,
        ):
            peer.send(action="forward", type="dev", message_id="m1")
            await eventually(lambda: stand_in.calls["sqs", "SendMessageBatch"])
            gateway.drain.wanted.set()
            if taken:
                go_on.set()
            types = []
            while (frame := await peer.next_frame()) and frame.opcode is Opcode.TEXT:
                types.append(json.loads(bytes(frame.data))["type"])
            await peer.answer_close()
            assert sorted(types) == sorted(["reconnect", "forward_confirmed" if taken else "error"])
        assert ("m1" in sent_ids(stand_in)) == taken

    async def test_order_and_answer(self, gateway: Gateway, stand_in: StandIn) -> None:
        """What answers an order names it, and comes after the place in its confirmation."""
        async with client_of(gateway, project_id="p") as client:
            await client.receive()
            order = {"message_id": "m", "project_id": "p"}
            confirmed = await client.ask(action="forward", type="dev", **order)
            agents_say(stand_in, {"project_id": "p", "data": 1, "in_reply_to": "m"})
            answer = await client.receive()
            assert (answer["in_reply_to"], answer["seq"]) == ("m", confirmed["seq"] + 1)

    async def test_stop(self, gateway: Gateway) -> None:
        """A stop is confirmed, and told to all who see the project; its repetition is only that."""
        stop = {"message_id": "m", "project_id": "p"}
        async with client_of(gateway, project_id="p") as viewer, client_of(gateway) as client:
            await viewer.receive()
            for _ in range(2):
                confirmed = await client.ask(action="stop", **stop)
                assert confirmed == {"type": "stop_confirmed", **stop}
            told = await viewer.receive()
            assert (told["type"], told["in_reply_to"]) == ("stop_requested", "m")
            assert await viewer.has_nothing_more()

    async def test_memory_budget(self, platform: aws_standin.Platform) -> None:
        """Over the memory budget, who holds most for longest has to go, and nobody else."""
        async with contextlib.AsyncExitStack() as stack:
            gateway = await stack.enter_async_context(running_gateway(platform, memory_budget_mb=2))
            client = await stack.enter_async_context(client_of(gateway))
            peers = [await stack.enter_async_context(peer_of(gateway)) for _ in range(15)]
            for peer in peers:
                peer.send_frame(b" " * 200_000, fin=False)  # and never the rest
            await eventually(lambda: gateway.metrics.memory_closed)
            assert await client.has_nothing_more()

    async def test_drain_by_the_load_balancer(
        self, platform: aws_standin.Platform, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A task whose target is being deregistered drains, long before its SIGTERM."""
        monkeypatch.setattr(server.TargetHealth, "EVERY_S", 0.01)
        async with balanced_gateway(platform) as gateway, client_of(gateway) as client:
            register(stand_in, gateway, "healthy")
            await asked_again(stand_in)
            assert gateway.health() == {"status": "ok"}
            register(stand_in, gateway, "draining")
            assert (await client.receive())["type"] == "reconnect"


# --- Main -----------------------------------------------------------------------------------


def record(message: str, **extra: Any) -> logging.LogRecord:
    fields = {"msg": message, "levelname": "INFO", "levelno": logging.INFO, "created": 1.5, **extra}
    return logging.makeLogRecord(fields)


class TestMain:
    @posix
    @pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
    async def test_from_start_to_end(
        self, platform: aws_standin.Platform, stand_in: StandIn, tmp_path: Path, loop: str
    ) -> None:
        """A task serves, is told to end, sends its clients away and exits with 0, on any loop."""
        environment = platform.environment() | {"DRAIN_SECONDS": "0"}
        if loop == "asyncio":
            (tmp_path / "uvloop.py").write_text("raise ImportError")
            environment["PYTHONPATH"] = str(tmp_path)
        async with process_of(environment) as process:
            await process.listening()
            [queue] = [name for name in stand_in.queues if "-task-" in name]
            async with client_of(process, project_id="p") as client:
                await client.receive()
                answer = await client.ask(action="forward", type="dev", message_id="m1")
                assert answer["type"] == "forward_confirmed"
                agents_say(stand_in, {"project_id": "p"})
                assert (await client.receive())["seq"] == 1
                process.signal(signal.SIGTERM if loop == "uvloop" else signal.SIGINT)
                assert (await client.receive())["type"] == "reconnect"
                with pytest.raises(ConnectionClosed):
                    await client.receive()
                assert client.socket.close_code == CloseCode.SERVICE_RESTART
            assert await process.ends() == (0, "")
        assert queue not in stand_in.queues
        assert process.log[-1]["message"] == "drained"
        assert all({"time", "level", "message"} <= line.keys() for line in process.log)

    @posix
    async def test_second_signal(self, platform: aws_standin.Platform, stand_in: StandIn) -> None:
        """A second signal ends a drain that would take long."""
        async with process_of(platform.environment(), DRAIN_SECONDS="100") as process:
            await process.listening()
            async with client_of(process), client_of(process):
                process.signal(signal.SIGTERM)
                await process.logged("draining")
                process.signal(signal.SIGINT)
                assert await process.ends() == (0, "")
        assert not [name for name in stand_in.queues if "-task-" in name]

    @posix
    async def test_signal_while_starting(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """A task that still waits for AWS ends as well."""
        stand_in.fault = always("UpdateItem", THROTTLED)
        async with process_of(platform.environment()) as process:
            await process.logged("listening")
            process.signal(signal.SIGTERM)
            assert await process.ends() == (0, "")

    async def test_wrong_settings(self) -> None:
        """Every fault of the settings is named at once; exit code 2, and no traceback."""
        environment = {
            "SQS_QUEUE_URL_DEV": "no url",
            "WEBSOCKET_PORT": "many",
            "DYNAMODB_TABLE_NAME": "t",
        }
        async with process_of(environment) as process:
            code, stderr = await process.ends()
        assert (code, process.log) == (2, [])
        for name in ("DEV", "PM", "QA", "OPS"):
            assert f"  SQS_QUEUE_URL_{name} " in stderr
        assert "  WEBSOCKET_PORT " in stderr
        assert "DYNAMODB_TABLE_NAME" not in stderr
        assert "Traceback" not in stderr

    @pytest.mark.parametrize("when", ["at the start", "later"])
    async def test_lost_table(
        self, platform: aws_standin.Platform, stand_in: StandIn, when: str
    ) -> None:
        """A table that is not there ends the process: exit code 1, one sentence that names it."""
        if when == "at the start":
            del stand_in.tables[platform.events_table_name]
        async with process_of(platform.environment()) as process:
            if when == "later":
                await process.listening()
                del stand_in.tables[platform.events_table_name]
                agents_say(stand_in, {"project_id": "p"})
            code, stderr = await process.ends()
        assert (code, stderr) == (1, "")
        assert process.log[-1]["level"] == "CRITICAL"
        assert process.log[-1]["message"].startswith("event log: ")
        assert "ResourceNotFoundException" in process.log[-1]["message"]
        assert "exception" not in process.log[-1]

    async def test_port_in_use(self, platform: aws_standin.Platform) -> None:
        """A port that is taken is said in one sentence, with exit code 1."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            async with process_of(platform.environment(port)) as process:
                code, stderr = await process.ends()
        assert (code, stderr) == (1, "")
        assert process.log[-1]["level"] == "CRITICAL"
        assert str(port) in process.log[-1]["message"]

    @pytest.mark.parametrize("answer", [b"", b"{", b"[]", b'{"Family":"x"}'], ids=repr)
    async def test_metadata_of_no_use(
        self, answer: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A task that cannot learn its id warns of it and makes one up."""
        async with task_metadata(answer) as (address, asked):
            own_id, own_address = await asyncio.to_thread(server.own_id_and_address, address)
        assert own_id
        assert own_address == ""
        assert len(asked) == 1
        [warning] = caplog.messages
        assert warning.startswith("the task's metadata cannot be read: ")

    def test_no_metadata(self, caplog: pytest.LogCaptureFixture) -> None:
        """The same if nobody answers."""
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        assert all(server.own_id_and_address(f"http://127.0.0.1:{port}/v4/abc")) is False
        assert len(caplog.messages) == 1

    @posix
    async def test_terminal(self, platform: aws_standin.Platform) -> None:
        """On a terminal the lines are for people."""
        import pty

        ours, theirs = pty.openpty()
        environment = {**clean_environment(), **platform.environment()}
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(SERVER), env=environment, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        shown = b""
        while b"ready" not in shown:
            shown += await asyncio.to_thread(os.read, ours, 4_096)
        process.terminate()
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == 0
        os.close(ours)
        line = next(line for line in shown.decode().splitlines() if "listening" in line)
        assert re.fullmatch(
            r"\x1b\[2m\d\d:\d\d:\d\d INFO   \x1b\[0m +listening host='127\.0\.0\.1' port=\d+", line
        )

    @posix
    async def test_ecs(
        self,
        platform: aws_standin.Platform,
        stand_in: StandIn,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """In ECS a task's queue is named after the task, and goes with it."""
        for name, value in platform.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        arn = b'{"TaskARN":"arn:aws:ecs:us-east-1:123456789012:task/cluster/0123abc"}'
        loop = asyncio.get_running_loop()
        async with task_metadata(arn) as (address, asked):
            options = settings(platform, topic=True, ecs_container_metadata_uri_v4=address)
            serving = asyncio.create_task(server.serve(options))
            try:
                await eventually(lambda: "agenticai-updates-task-0123abc" in stand_in.queues)
                os.kill(os.getpid(), signal.SIGTERM)
                async with asyncio.timeout(DEADLINE_S):
                    await serving
            finally:
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.remove_signal_handler(number)
        assert asked == [b"GET /v4/abc/task HTTP/1.1"]
        assert not [name for name in stand_in.queues if "-task-" in name]

    def test_id_elsewhere(self) -> None:
        """Outside ECS every task has an id of its own too."""
        assert server.own_id_and_address(None)[0] != server.own_id_and_address(None)[0]

    def test_help(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """``--help`` names every setting with its default."""
        monkeypatch.setattr(sys, "argv", ["server.py", "--help"])
        with pytest.raises(SystemExit) as exit_:
            server.main()
        assert exit_.value.code == 0
        shown = capsys.readouterr().out
        for field in dataclasses.fields(Settings):
            assert f"  {field.name.upper()} " in shown
        assert "[required]" in shown

    @pytest.fixture
    def main(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
        """`main` with something else to serve, and pytest's own logging left alone."""

        def run(outcome: BaseException | None, environment: Mapping[str, str] = REQUIRED) -> int:
            async def serve(_: Settings) -> None:
                if outcome is not None:
                    raise outcome

            monkeypatch.setattr(sys, "argv", ["server.py"])
            for name in (field.name.upper() for field in dataclasses.fields(Settings)):
                monkeypatch.delenv(name, raising=False)
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            monkeypatch.setattr(server, "set_up_logging", lambda _: None)
            monkeypatch.setattr(server, "serve", serve)
            return server.main()

        return run

    def test_exit_codes(self, main: Callable[..., int], caplog: pytest.LogCaptureFixture) -> None:
        """0 is a drain, 1 is something lost, with the first sentence about it."""
        assert main(None) == 0
        inner = ExceptionGroup("inner", [UpstreamLost("the table is gone"), OSError("later")])
        assert main(ExceptionGroup("outer", [inner])) == 1
        assert [each.message for each in caplog.records if each.levelname == "CRITICAL"] == [
            "the table is gone"
        ]

    def test_exit_code_of_wrong_settings(
        self, main: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """2 is wrong settings, and says where all of them are listed."""
        assert main(None, {}) == 2
        assert "--help" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "faults", [[ValueError("ours")], [UpstreamLost("theirs"), ValueError("ours")]], ids=len
    )
    def test_mistake_of_ours(self, main: Callable[..., int], faults: list[Exception]) -> None:
        """A fault of the program is not hidden in a sentence: its traceback is wanted."""
        with pytest.raises(ExceptionGroup):
            main(ExceptionGroup("", faults))

    def test_loops(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Server takes uvloop where there is one, and asyncio's own loop elsewhere."""
        uvloop = pytest.importorskip("uvloop")
        assert server.fastest_loop() is uvloop.new_event_loop
        monkeypatch.setitem(sys.modules, "uvloop", None)
        assert server.fastest_loop() is None

    @pytest.fixture
    def logging_restored(self) -> Iterator[None]:
        """Whatever the test does to logging is undone."""
        loggers = [logging.getLogger(name) for name in (None, *LOGGERS)]
        before = [(each, each.level, each.handlers, each.propagate) for each in loggers]
        for each in loggers:
            each.handlers = []
        yield
        for each, level, handlers, propagate in before:
            each.setLevel(level)
            each.handlers, each.propagate = handlers, propagate

    @pytest.mark.usefixtures("logging_restored")
    def test_logging(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Logs go to stdout from `LOG_LEVEL` on; metrics do so at every level."""
        server.set_up_logging("WARNING")
        logging.getLogger("gateway").info("too much")
        logging.getLogger("gateway").warning("just right")
        logging.getLogger("asyncio").warning("socket.send() raised exception")
        logging.getLogger("gateway.metrics").info("metrics", extra={"_aws": {}})
        log, metrics = map(json.loads, capsys.readouterr().out.splitlines())
        assert (log["level"], log["message"]) == ("WARNING", "just right")
        assert (metrics["level"], metrics["message"], metrics["_aws"]) == ("INFO", "metrics", {})

    def test_json_lines(self) -> None:
        """A log line is one JSON object, with what was passed along and any exception in it."""
        line = server.JsonLines().format(
            record("%s\n", args=("hello",), port=1, what={1, 2}, exc_info=FAULT)
        )
        assert "\n" not in line
        fields = json.loads(line)
        assert fields.pop("exception").endswith("ValueError: a fault")
        assert fields == {
            "time": "1970-01-01T00:00:01.500Z",
            "level": "INFO",
            "message": "hello\n",
            "port": 1,
            "what": "{1, 2}",
        }

    def test_pretty_lines(self) -> None:
        """A line for people has no control characters but its own colours."""
        formatter = server.PrettyLines()
        line = formatter.format(record("a\x1b[2Jb\nc\x9b", name_="x\x1b\n", levelname="ERROR"))
        assert line.count("\x1b") == 2
        assert "a?[2Jb?c?" in line
        assert r"'x\x1b\n'" in line
        assert formatter.format(record("m", exc_info=FAULT)).endswith("\nValueError: a fault")


LOGGERS = ("gateway", "gateway.metrics", "asyncio")
FAULT = (ValueError, ValueError("a fault"), None)
