"""Answers that belong to their orders, and orders that are stopped."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aws_standin
import server
from aws_standin import Call, Fault, StandIn
from server import Gateway, Principal, Stop
from tests.server.aws import THROTTLED, agents_say, always, bodies, faults
from tests.server.event_logs import LogKit, head_of
from tests.server.feeds import settle
from tests.server.gateways import Client, client_of, running_gateway
from tests.waiting import eventually

Json = dict[str, Any]


def key_of(*parts: str | None) -> str:
    """The key as an agent writes it, with any language's JSON."""
    encoded = json.dumps(parts, ensure_ascii=False, separators=(",", ":")).encode()
    return f"STOP#{hashlib.sha256(encoded).hexdigest()}"


def stop_item(stand_in: StandIn, *parts: str | None) -> Json | None:
    key = {"PK": {"S": key_of(*parts)}, "SK": {"S": "STOP"}}
    items = (item for table in stand_in.tables.values() for item in table.items)
    return next((item for item in items if item.items() >= key.items()), None)


async def next_of(client: Client, kind: str) -> Json:
    """The next message of this type."""
    while (message := await client.receive())["type"] != kind:
        pass
    return message


async def stop(client: Client, message_id: str = "m", project_id: str | None = "p") -> Json:
    await client.send(action="stop", message_id=message_id, project_id=project_id)
    return await next_of(client, "stop_confirmed")


async def stops_logged(gateway: Gateway, project_id: str = "p") -> list[Json]:
    found = await gateway.log.read(project_id, 0)
    told = [json.loads(each.payload) for each in found]
    return [each for each in told if each["type"] == "stop_requested"]


class TestAnswers:
    async def test_order_to_event(self, gateway: Gateway, stand_in: StandIn) -> None:
        """The order's id and its trace come back with the events that answer it, replayed too."""
        trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        async with client_of(gateway, project_id="p") as client:
            await next_of(client, "subscription_confirmed")
            await client.send(
                action="forward", type="dev", message_id="m", project_id="p", traceparent=trace
            )
            confirmed = await next_of(client, "forward_confirmed")
            assert confirmed["project_id"] == "p"
            assert (confirmed["seq"], confirmed["epoch"]) == (0, gateway.log.epoch)
            order = json.loads(bodies(stand_in, "agenticai-dev-queue")[0])
            assert order["traceparent"] == trace
            answer = {"type": "t", "project_id": "p", "in_reply_to": "m", "traceparent": trace}
            agents_say(stand_in, answer, {**answer, "ephemeral": True})
            live = [await next_of(client, "t") for _ in range(2)]
        async with client_of(gateway, project_id="p", since=confirmed["seq"]) as late:
            await next_of(late, "subscription_confirmed")
            replayed = await next_of(late, "t")
        for event in (*live, replayed):
            assert (event["in_reply_to"], event["traceparent"]) == ("m", trace)

    async def test_absent(self, gateway: Gateway, stand_in: StandIn) -> None:
        """Who knows nothing of both gets what there was before them."""
        async with client_of(gateway, project_id="p") as client:
            await next_of(client, "subscription_confirmed")
            await client.send(action="forward", type="dev", message_id="m")
            confirmed = await next_of(client, "forward_confirmed")
            assert confirmed.keys() == {"type", "message_id", "sqs_message_id"}
            assert "traceparent" not in json.loads(bodies(stand_in, "agenticai-dev-queue")[0])
            agents_say(stand_in, {"type": "t", "project_id": "p"})
            assert not (await next_of(client, "t")).keys() & {"in_reply_to", "traceparent"}

    async def test_position_is_before_the_answer(self, gateway: Gateway, stand_in: StandIn) -> None:
        """However late the confirmation comes, all answers are after its `seq`."""
        async with client_of(gateway, project_id="p") as client:
            await next_of(client, "subscription_confirmed")
            agents_say(stand_in, {"type": "before", "project_id": "p"})
            await next_of(client, "before")
            stand_in.fault = faults("SendMessageBatch", Fault(delay_s=0.5))
            await client.send(action="forward", type="dev", message_id="m", project_id="p")
            agents_say(stand_in, {"type": "answer", "project_id": "p", "in_reply_to": "m"})
            answer = await next_of(client, "answer")
            confirmed = await next_of(client, "forward_confirmed")
            assert confirmed["seq"] < answer["seq"] == 2

    @pytest.mark.parametrize("reply", ["x" * 257, "", 7, {}, ["m"]], ids=str)
    def test_unreadable(self, reply: Any) -> None:
        """An answer to what can be no order is unreadable."""
        with pytest.raises(server.BadMessage):
            server.decode_update(json.dumps({"type": "t", "in_reply_to": reply}))


class TestStop:
    async def test_stop(self, gateway: Gateway, stand_in: StandIn) -> None:
        """A stop is where agents look for it, and every viewer gets it as an event."""
        async with client_of(gateway, project_id="p") as viewer, client_of(gateway) as client:
            await next_of(viewer, "subscription_confirmed")
            before = time.time()
            assert await stop(client) == {
                "type": "stop_confirmed",
                "message_id": "m",
                "project_id": "p",
            }
            event = await next_of(viewer, "stop_requested")
        assert (event["in_reply_to"], event["seq"]) == ("m", 1)
        item = stop_item(stand_in, "p", "m")
        assert item is not None
        assert before - 1 <= float(item["stopped_at"]["N"]) <= time.time() + 1
        assert int(item["expires_at"]["N"]) >= int(before) + server.EventLog.STOP_KEPT_S

    async def test_repeated(
        self, gateway: Gateway, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A repetition is confirmed and tells nobody; a later stop stops what was taken since."""
        async with client_of(gateway) as client:
            await stop(client)
            first = stop_item(stand_in, "p", "m")
            await asyncio.gather(
                *(client.send(action="stop", message_id="m", project_id="p") for _ in "ab")
            )
            for _ in "ab":
                await next_of(client, "stop_confirmed")
            assert len(await stops_logged(gateway)) == 1
            assert stop_item(stand_in, "p", "m") == first
            monkeypatch.setattr(server.EventLog, "STOP_SKEW_S", -1.0)
            await stop(client)
        assert len(await stops_logged(gateway)) == 2
        assert stop_item(stand_in, "p", "m") != first

    async def test_at_once(self, gateway: Gateway) -> None:
        """Many stops at once, the same and others, with answers between them: each once."""
        async with client_of(gateway) as client:
            for number in range(120):
                await client.send(action="stop", message_id=f"m{number % 60}", project_id="p")
            for _ in range(120):
                await next_of(client, "stop_confirmed")
        logged = [each["in_reply_to"] for each in await stops_logged(gateway)]
        assert sorted(logged) == sorted({f"m{number}" for number in range(60)})

    @pytest.mark.usefixtures("impatient")
    async def test_drain(self, platform: aws_standin.Platform, stand_in: StandIn) -> None:
        """A drain first has stops that are on their way written and confirmed."""
        stand_in.fault = always("TransactWriteItems", THROTTLED)
        async with running_gateway(platform) as gateway, client_of(gateway) as client:
            await client.send(action="stop", message_id="m", project_id="p")
            await eventually(lambda: stand_in.calls["dynamodb", "TransactWriteItems"])
            gateway.drain.wanted.set()
            await eventually(lambda: gateway.health() == {"status": "draining"})
            stand_in.fault = None
            answers = [(await client.receive())["type"] for _ in range(2)]
        assert answers == ["stop_confirmed", "reconnect"]

    @pytest.mark.usefixtures("impatient")
    async def test_drain_without_client(self, gateway: Gateway, stand_in: StandIn) -> None:
        """A drain also waits for the stop of a client that has left."""
        assert gateway.intake is not None
        stand_in.fault = always("TransactWriteItems", THROTTLED)
        async with client_of(gateway) as client:
            await client.send(action="stop", message_id="m", project_id="p")
            await eventually(lambda: stand_in.calls["dynamodb", "TransactWriteItems"])
        finished = asyncio.create_task(gateway.intake.idle())
        await settle()
        assert not finished.done()
        stand_in.fault = None
        await finished
        assert stop_item(stand_in, "p", "m") is not None

    async def test_without_project(self, gateway: Gateway, stand_in: StandIn) -> None:
        """An order of nobody's project is stopped under its user's name, and in no log."""
        async with client_of(gateway) as client:
            confirmed = await stop(client, project_id=None)
            assert "project_id" not in confirmed
            await stop(client, project_id=None)
        assert stop_item(stand_in, None, "m", None) is not None
        assert await head_of(gateway.log, "*") == 0

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize(
        "fault", [Fault(status=500), Fault(after_effect=True, cut=True)], ids=str
    )
    async def test_once_over_faults(
        self, gateway: Gateway, stand_in: StandIn, fault: Fault
    ) -> None:
        """Whatever becomes of the call, there is one item and one event in the end."""
        stand_in.fault = faults("TransactWriteItems", *[fault] * 6)
        async with client_of(gateway) as client:
            await stop(client)
        assert len(await stops_logged(gateway)) == 1
        assert stop_item(stand_in, "p", "m") is not None

    async def test_refused_by_the_table(self, gateway: Gateway, stand_in: StandIn) -> None:
        """A stop that cannot be written is refused for good, and the next one is not."""
        stand_in.fault = always("TransactWriteItems", Fault(status=400, code="ValidationException"))
        async with client_of(gateway) as client:
            await client.send(action="stop", message_id="m", project_id="p")
            refused = await next_of(client, "error")
            assert (refused["code"], refused["action"], refused["message_id"]) == (
                "rejected",
                "stop",
                "m",
            )
            assert "ValidationException" in refused["message"]
            stand_in.fault = None
            await stop(client)

    async def test_without_updates(self, platform: aws_standin.Platform) -> None:
        """A gateway that takes no answers from agents takes no stops either."""
        async with (
            running_gateway(platform, sqs_queue_url_updates="") as gateway,
            client_of(gateway) as client,
        ):
            refused = await client.ask(action="stop", message_id="m", project_id="p")
            assert (refused["code"], refused["action"]) == ("unavailable", "stop")

    async def test_neither_without_the_other(self, gateway: Gateway, stand_in: StandIn) -> None:
        """Item and event are of one transaction, with the answers that come at the same time."""
        transactions: list[Call] = []

        def note(call: Call) -> None:
            if call.operation == "TransactWriteItems":
                transactions.append(call)

        stand_in.fault = note
        async with client_of(gateway) as client:
            await stop(client)
        [call] = transactions
        keys = [
            next(iter(each.values())).get("Item", {}).get("PK", {}).get("S", "")
            for each in call.request["TransactItems"]
        ]
        assert keys == ["", "PROJECT#p", key_of("p", "m")]

    async def test_other_task(self, platform: aws_standin.Platform) -> None:
        """Viewers on other tasks get it, and a race for the head loses neither."""
        async with (
            running_gateway(platform, "one", topic=True) as one,
            running_gateway(platform, "two", topic=True) as two,
            client_of(one, project_id="p") as here,
            client_of(two, project_id="p") as there,
        ):
            for client in (here, there):
                await next_of(client, "subscription_confirmed")
            for number in range(10):
                await here.send(action="stop", message_id=f"h{number}", project_id="p")
                await there.send(action="stop", message_id=f"t{number}", project_id="p")
            for client in (here, there):
                told = [await next_of(client, "stop_requested") for _ in range(20)]
                assert [each["seq"] for each in told] == list(range(1, 21))
                assert len({each["in_reply_to"] for each in told}) == 20

    async def test_rights(self, gateway: Gateway, stand_in: StandIn) -> None:
        """It takes the right that the forward took."""
        async with client_of(gateway) as client:
            (connection,) = gateway.registry.connections.values()
            connection.principal = Principal("u", frozenset({"q"}), math.inf)
            for project_id in ("p", "*"):
                await client.send(action="stop", message_id="m", project_id=project_id)
                refused = await next_of(client, "error")
                assert (refused["code"], refused["action"]) == ("forbidden", "stop")
            await stop(client, project_id="q")
            await stop(client, project_id=None)
        assert stop_item(stand_in, None, "m", "u") is not None
        assert stop_item(stand_in, None, "m", None) is None
        assert await stops_logged(gateway) == []

    async def test_charged(self, gateway: Gateway) -> None:
        """Stops count in the account of work, as a page of the log does."""
        async with client_of(gateway) as client:
            (connection,) = gateway.registry.connections.values()
            before = connection.account.paid_at
            for number in range(5):
                await stop(client, message_id=f"m{number}")
            spent_s = (connection.account.paid_at - max(before, gateway.now() - 60)) / 5
        assert spent_s >= server.PAGE_PRICE_S

    @given(st.text(), st.text())
    def test_key(self, project_id: str, message_id: str) -> None:
        """Agents of every language find the same key, for whatever ids."""
        stop = Stop(message_id or "m", project_id or "p")
        key = server.stop_key(stop, "u")
        assert key["PK"] == {"S": key_of(stop.project_id, stop.message_id)}


class TestLog:
    def test_reserved(self) -> None:
        """Agents may not say that somebody wants a stop."""
        with pytest.raises(server.BadMessage):
            server.decode_update('{"type": "stop_requested", "project_id": "p"}')

    async def test_older_items(self, aws: server.Aws, platform: aws_standin.Platform) -> None:
        """What a task of an earlier version has logged is read as it is."""
        assert LogKit(aws, platform).log().known_seq("p") is None
        item = {
            "SK": {"S": server.event_key(3)},
            "type": {"S": "t"},
            "data": {"S": "1"},
            "timestamp": {"S": "2025-11-24T12:00:00.000Z"},
        }
        message = server.event_message("p", item)
        assert (message.seq, message.in_reply_to) == (3, None)
