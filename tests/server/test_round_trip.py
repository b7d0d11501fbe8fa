"""Any JSON that RFC 8259 allows, as `data`, from clients to agents and from agents to clients."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import server
from server import MAX_NESTING, Aws, EventLog, Gateway
from tests.server.aws import Platform, aws_clients
from tests.server.gateways import Client, client_of, running_gateway, settings
from tests.waiting import DEADLINE_S

# A character as RFC 8259, section 7, lets a program write it: as it is, or escaped in some way.
# Halves of surrogate pairs are possible as escapes only; of the rest, SQS takes all but two raw.
raw_characters = st.characters(
    exclude_categories=["Cs"],
    exclude_characters=[*map(chr, range(0x20)), '"', "\\", "\ufffe", "\uffff"],
)
escapes = st.sampled_from([r"\"", r"\\", r"\/", r"\b", r"\f", r"\n", r"\r", r"\t"])
code_units = st.builds(
    lambda number, upper: rf"\u{number:04X}" if upper else rf"\u{number:04x}",
    st.integers(0, 0xFFFF) | st.integers(0xD800, 0xDFFF) | st.sampled_from([0xFFFE, 0xFFFF, 0]),
    st.booleans(),
)
strings = st.lists(raw_characters | escapes | code_units, max_size=12).map(
    lambda found: f'"{"".join(found)}"'
)
numbers = st.from_regex(
    r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,4})?", fullmatch=True
)
spaces = st.text(alphabet=" \t\r\n", max_size=2)


@st.composite
def containers(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    def spaced(text: str) -> str:
        return draw(spaces) + text + draw(spaces)

    if draw(st.booleans()):
        return "[" + (",".join(map(spaced, draw(st.lists(values, max_size=4)))) or spaced("")) + "]"
    members = draw(st.lists(st.tuples(strings, values), max_size=4))
    texts = [f"{spaced(name)}:{spaced(value)}" for name, value in members]
    return "{" + (",".join(texts) or spaced("")) + "}"


json_texts = st.recursive(
    strings | numbers | st.sampled_from(["true", "false", "null"]), containers, max_leaves=20
)


def sizeable(size_bytes: int, seed: int) -> str:
    """A JSON text of exactly that size, of all that takes room or is taken apart."""
    chance = random.Random(seed)
    parts = [r"\ud83d", r"\udc00\uDFFF", r"\\ud800", "é", "😀", '["a",1]', r'"\uffff"', "}{", " "]
    text = "["
    while len(text.encode()) < size_bytes - 200:
        pieces = "".join(chance.choices(parts, k=12)).replace('"', r"\"")
        text += f'"{pieces}",[{{"k":-1.50E+3}}],'
    return text + '"' + "x" * (size_bytes - len(text.encode()) - 3) + '"]'


def deepest(core: str) -> str:
    """As deep as it may be: the message's own object is a level too."""
    return "[" * (MAX_NESTING - 1) + core + "]" * (MAX_NESTING - 1)


class Journey:
    """A client and an agent, and between them two tasks: the client's own takes no updates."""

    def __init__(self, client: Client, aws: Aws, platform: Platform, log: EventLog) -> None:
        self._client = client
        self._aws = aws
        self._urls = platform.queue_urls
        self._log = log
        self._sent = 0

    async def to_agent(self, data: str) -> str:
        """Forward ``data`` and return the text in the message that the agent receives."""
        await self._client.socket.send(f'{{"action":"forward","type":"dev","data":{data}}}')
        answer = await self._client.receive()
        assert answer["type"] == "forward_confirmed", answer
        url = self._urls["dev"]
        received = await self._aws.sqs.receive_message(QueueUrl=url, WaitTimeSeconds=5)
        [message] = received["Messages"]
        await self._aws.sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
        return between(message["Body"], '"project_id":null,"data":', ',"connection_id":"')

    async def to_client(self, data: str) -> tuple[str, str]:
        """Send ``data`` as an event; return the text that the client gets, and the log has."""
        self._sent += 1
        body = f'{{"project_id":"p","type":"t","data":{data}}}'
        await self._aws.sqs.send_message(QueueUrl=self._urls["updates"], MessageBody=body)
        async with asyncio.timeout(DEADLINE_S):
            came = str(await self._client.socket.recv())
        [logged] = await self._log.read("p", self._sent - 1)
        texts = (came, logged.payload.decode())
        delivered, kept = (between(each, '"data":', f',"seq":{self._sent},') for each in texts)
        return delivered, kept


def between(text: str, before: str, after: str) -> str:
    """What stands behind the first ``before`` and in front of the last ``after``."""
    return text.partition(before)[2].rpartition(after)[0]


@pytest.fixture
async def journey(either_platform: Platform) -> AsyncIterator[Journey]:
    started: asyncio.Future[Journey] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def hold() -> None:  # in one task, as a task group wants it
        async with (
            running_gateway(either_platform, "task-1", topic=True),
            running_gateway(
                either_platform, "task-2", topic=True, sqs_queue_url_updates=None
            ) as gateway,
            aws_clients(either_platform) as aws,
            client_of(gateway, project_id="p") as client,
        ):
            assert (await client.receive())["type"] == "subscription_confirmed"
            started.set_result(Journey(client, aws, either_platform, gateway.log))
            await over.wait()

    holding = asyncio.create_task(hold())
    holding.add_done_callback(lambda _: started.done() or started.cancel())
    yield await started
    over.set()
    await holding


class TestRoundTrip:
    """On the stand-in, and on moto."""

    @given(data=json_texts)
    @example(data=r'"caf\ud83d"')
    @example(data=r'{"\uffff":"\uFFFE\ude00\ud83d","C:\\udev":"\\\ud83d"}')
    @example(data=" [ ] ")
    @example(data=deepest("1"))
    @hypothesis_settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    async def test_any_json(self, journey: Journey, data: str) -> None:
        """Any JSON text arrives byte for byte, both ways; only the space around it may go."""
        assert await journey.to_agent(data) == data.strip(" \t\r\n")
        assert await journey.to_client(data) == (data.strip(" \t\r\n"),) * 2

    @pytest.mark.parametrize("seed", [1, 2])
    async def test_size_limits(self, journey: Journey, seed: int) -> None:
        """So do the largest."""
        envelope = len('{"action":"forward","type":"dev","data":}')
        forward = sizeable(settings().max_message_bytes - envelope, seed)
        assert await journey.to_agent(forward) == forward
        event = sizeable(server.EVENT_MAX_BYTES, seed)
        assert await journey.to_client(event) == (event, event)


class TestExceptions:
    """What does not arrive is refused by name."""

    @pytest.mark.parametrize("character", ["\ufffe", "\uffff"])
    async def test_characters(self, gateway: Gateway, character: str) -> None:
        async with client_of(gateway) as client:
            await client.socket.send(f'{{"action":"forward","type":"dev","data":"{character}"}}')
            answer = await client.receive()
            assert answer["code"] == "invalid_character"
            assert f"U+{ord(character):04X}" in answer["message"]

    async def test_nesting(self, gateway: Gateway) -> None:
        deeper = deepest("[]")
        async with client_of(gateway) as client:
            await client.socket.send(f'{{"action":"forward","type":"dev","data":{deeper}}}')
            answer = await client.receive()
            assert answer["code"] == "invalid_message"
            assert f"more than {MAX_NESTING} deep" in answer["message"]
