"""Any JSON, byte for byte: half surrogate pairs, characters that AWS refuses, depth, refusals."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, get_args, get_type_hints

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import server
from server import (
    MAX_NESTING,
    AgentMessage,
    BadMessage,
    ErrorCode,
    Event,
    EventMessage,
    Forward,
    RelayedBatch,
    RelayedEvent,
    Subscribe,
    decode_message,
    decode_update,
)
from tests.server.listeners import event, text_messages
from tests.server.messages import refusal
from tests.server.peers import client_protocol

HALVES = (r"\ud83d", r"\uD83D", r"\udc00", r"\uDFFF", r"\ud83d\ud83d\ude00", r"\ud83dA")

# What may stand between the quotes of a JSON string, piece by piece (RFC 8259, section 7).
pieces = st.sampled_from(
    [
        *HALVES,
        r"\ud83d\ude00",
        r"\\",
        r"\"",
        r"\\ud83d",
        r"\/",
        r"\n",
        r"\uffff",
        "é",
        "{",
        "]",
        " u",
    ]
)
texts = st.lists(pieces, max_size=8).map(lambda found: f'"{"".join(found)}"')
json_texts = st.recursive(
    texts | st.sampled_from(["0", "-0", "1E+2", "123456789012345678901234567890", "null", "true"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda found: f"[{', '.join(found)}]")
        | st.lists(st.tuples(texts, inner), max_size=3).map(
            lambda found: "{" + ",".join(f"{name} :{value}" for name, value in found) + "}"
        )
    ),
    max_leaves=12,
)


def forward(data: str, **fields: Any) -> bytes:
    head = json.dumps({"action": "forward", "type": "dev", "message_id": "m1", **fields})
    return f'{head[:-1]},"data":{data}}}'.encode()


class TestHalfSurrogatePairs:
    @given(data=json_texts)
    @example(data=r'"caf\ud83d"')
    @example(data=r'"C:\\udev\\\ud83d"')
    @example(data=r'{"\ud83d":"\udc00","\\u":["\\\\ud800"]}')
    def test_data_pass_both_ways(self, data: str) -> None:
        """Text cut inside an emoji goes byte for byte to agents and to clients."""
        message = decode_message(forward(data))
        assert isinstance(message, Forward)
        assert bytes(message.data) == data.encode()
        body = AgentMessage("dev", "m1", None, message.data, "c1", "c1", None, "now")
        assert f'"data":{data},'.encode() in msgspec.json.encode(body)
        update = decode_update(f'{{"type":"t","event_id":"\\ud83d\\ude00","data":{data}}}')
        assert bytes(update.data) == data.encode()
        assert update.event_id == "😀"

    @pytest.mark.parametrize(
        ("before", "data", "after"),
        [
            (r'"x":{"data":"\uD83d"},', r'"\ud83d"', ""),
            (r'"x":{"data":"\ud83d"},', r'"\uc83c"', ""),
            ("", r'"\uc83c"', r',"x":{"data":"\ud83d"}'),
            (r'"data":"\uD83d",', r'"\ud83d"', ""),
            (r'"data":"\ud83d",', r'"\uc83c"', ""),
            (r'"data":"\ud83d","\u0064ata":"\ud83d",', "null", ""),
            (r'"data":"\ud83d",', "1", r',"d\u0061ta":null,"data":1'),
            ("", r'"\ud83d"', r',"cata":"\uc83c"'),
            (r'"cata":"\ud83d",', '"data"', ""),
            (r'"x":"\"data\":\ud83d",', r'["d\ud83d","c\ud83d"]', ' ,"y":1'),
            (r'"\ud83d":"data",', r'{"data":"\uDE00"}', r',"message_ic":"\ud83d"'),
            ("", "null", r',"x":"\ud83d"'),
            (r'"x":{"data":"\uD83d"},"cata":"\uc83d",', "null", ""),
        ],
    )
    def test_which_data(self, before: str, data: str, after: str) -> None:
        """The data that count are found, also beside others that look like them."""
        for head in ('"action":"forward","type":"dev"', '"type":"t"'):
            text = f'{{{before}{head},"data" :\t{data}{after}}}'
            read = decode_update(text) if "action" not in text else decode_message(text.encode())
            assert bytes(read.data) == data.encode()  # type: ignore[union-attr]

    def test_data_by_another_spelling(self) -> None:
        """A name may be written with escapes, too."""
        message = decode_message(rb'{"\u0064ata":"\ud83d","action":"forward","type":"\u0064ev"}')
        assert message == Forward("dev", data=msgspec.Raw(rb'"\ud83d"'))

    @pytest.mark.parametrize("half", HALVES)
    @pytest.mark.parametrize("field", ["action", "type", "message_id", "project_id", "client_id"])
    def test_fields_that_are_read(self, field: str, half: str) -> None:
        """In a field that the gateway reads, the answer has the field's name."""
        fields = {"action": '"forward"', "type": '"dev"', field: f'"{half}"'}
        payload = ",".join(f'"{name}":{value}' for name, value in fields.items())
        exc = refusal(f"{{{payload}}}".encode())
        assert (exc.code, str(exc)) == (
            ErrorCode.INVALID_FIELD,
            f'"{field}" has half a surrogate pair.',
        )

    @pytest.mark.parametrize("field", ["type", "project_id", "event_id", "connection_id"])
    def test_fields_of_an_update(self, field: str) -> None:
        fields = {"type": '"t"', field: r'"\ud83d"'}
        body = ",".join(f'"{name}":{value}' for name, value in fields.items())
        with pytest.raises(BadMessage, match=f'"{field}" has half a surrogate pair'):
            decode_update(f"{{{body}}}")

    def test_fields_that_are_read_beside_others(self) -> None:
        """The name in the answer is that of a field that is read."""
        payload = rb'{"epoch":"\ud83d","client_id":"\ud83d","action":"forward","type":"dev"}'
        assert str(refusal(payload)) == '"client_id" has half a surrogate pair.'

    def test_fields_beside_data(self) -> None:
        """Beside data with half a pair, a field that is missing or wrong is named as ever."""
        for rest in ("", ',"type":7'):
            exc = refusal(rf'{{"action":"forward","data":"\ud83d"{rest}}}'.encode())
            assert str(exc) == 'The field "type" must be a string of 1 to 256 characters.'

    def test_fields_that_nobody_reads(self) -> None:
        """Fields that are not known are ignored, whatever is in them."""
        message = decode_message(rb'{"\ud83d":"\udc00","action":"ping","x":["\ud83d"]}')
        assert message == server.Ping()
        message = decode_message(rb'{"action":"ping","epoch":"\ud83d","token":"\ud83d"}')
        assert message == server.Ping()
        message = decode_message(rb'{"action":"ping","ref":"\ud83d"}')
        assert server.ref_of(message) is msgspec.UNSET
        update = decode_update(r'{"token":"\ud83d","type":"t","data":"\ud83d","since":["\udc00"]}')
        assert bytes(update.data) == rb'"\ud83d"'

    @pytest.mark.parametrize(
        "data",
        [
            "1d",
            "nuld",
            r'["\ud83d",1D]',
            r'"\d"',
            r'"\ud83d\uzzzz"',
            r'"\ud8"',
            r'"\ud83d',
            r'["\ud83d",]',
            r'"\ud83d"}',
            '"\\ud83d\n"',
        ],
    )
    def test_no_json(self, data: str) -> None:
        """What is no JSON for another reason is refused as before, with its ids."""
        exc = refusal(forward(data))
        assert exc.code is ErrorCode.INVALID_JSON
        assert exc.context == {"action": "forward", "message_id": "m1"}

    def test_no_objects(self) -> None:
        """The way around the parser builds nothing, however much there is in a message."""
        data = "[" + ",".join(['["\\ud83d"]'] * 20_000) + "]"
        payload = forward(data)
        tracemalloc.start()
        try:
            decode_message(payload)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 8 * len(payload)  # copies of the text; 40,000 objects would be five megabytes


class TestUnsendable:
    """SQS and SNS refuse U+FFFE and U+FFFF, and nothing else that JSON may hold."""

    @pytest.mark.parametrize("escape", [r"\uffff", r"\uFFFE", "\uffff"])
    def test_what_is_encoded_here(self, escape: str) -> None:
        """Ids that a client wrote as escapes leave as escapes; all other text as it is."""
        payload = forward("1").replace(b'"m1"', f'"é😀\U0001ffff{escape}"'.encode())
        message = decode_message(payload)
        assert isinstance(message, Forward)
        body = AgentMessage("dev", str(message.message_id), None, message.data, "c", "c", None, "")
        sent = server.sendable(msgspec.json.encode(body)).decode()
        assert "\uffff" not in sent
        assert "\ufffe" not in sent
        assert f'"é😀\U0001ffff{escape.lower()}"'.replace("\uffff", r"\uffff") in sent
        assert json.loads(sent)["message_id"] == message.message_id

    @given(text=st.text(alphabet=st.sampled_from('a\\"\ufffd\ufffe\uffff\U0001fffe\n')))
    def test_reads_the_same(self, text: str) -> None:
        sent = server.sendable(msgspec.json.encode([text]))
        assert json.loads(sent) == [text]


class TestNesting:
    """One bound on depth, for clients and agents alike."""

    @staticmethod
    def nested(depth: int, opening: str = "[", closing: str = "]", core: str = "") -> str:
        return opening * depth + core + closing * depth

    def deep(self) -> dict[str, Callable[[int], str]]:
        return {
            "lists": self.nested,
            "objects": lambda depth: self.nested(depth - 1, '{"a":', "}", "{}"),
            "with strings": lambda depth: self.nested(depth, '["]]\\"]\\\\",', "]", "1"),
            "beside others": lambda depth: f"[{'[],' * 500}{self.nested(depth - 1)}]",
        }

    @pytest.mark.parametrize("shape", ["lists", "objects", "with strings", "beside others"])
    def test_bound(self, shape: str) -> None:
        """As deep as the bound is fine; one deeper is refused, with the bound in the sentence."""
        fits, deeper = (self.deep()[shape](MAX_NESTING - 1 + more) for more in (0, 1))
        decode_message(forward(fits))
        decode_update(f'{{"type":"t","data":{fits}}}')
        exc = refusal(forward(deeper))
        assert exc.code is ErrorCode.INVALID_MESSAGE
        assert str(exc) == f"The message nests arrays and objects more than {MAX_NESTING} deep."
        assert exc.context["message_id"] == "m1"
        with pytest.raises(BadMessage, match=f"more than {MAX_NESTING} deep"):
            decode_update(f'{{"type":"t","data":{deeper}}}')

    @pytest.mark.parametrize("depth", [500, 5_000, 100_000])
    def test_beyond_the_parser(self, depth: int) -> None:
        """What is too deep even for the parser is refused in the same words."""
        assert f"more than {MAX_NESTING} deep" in str(refusal(forward(self.nested(depth))))
        assert f"more than {MAX_NESTING} deep" in str(
            refusal(forward(self.nested(depth, core='"\\ud83d"')))
        )
        with pytest.raises(BadMessage, match=f"more than {MAX_NESTING} deep"):
            decode_update(f'{{"type":"t","data":{self.nested(depth)}}}')

    def test_brackets_in_strings(self) -> None:
        """Brackets in text are text."""
        data = json.dumps(["[{" * 5_000, '"[' * 5_000, "\\"])
        assert bytes(decode_message(forward(data)).data) == data.encode()  # type: ignore[union-attr]

    @given(data=json_texts)
    def test_depth_is_counted(self, data: str) -> None:
        """Whatever the text is, its depth is found."""

        def depth(value: Any) -> int:
            if not isinstance(value, list | dict):
                return 0
            inner = value.values() if isinstance(value, dict) else value
            return 1 + max(map(depth, inner), default=0)

        found = depth(json.loads(data, object_pairs_hook=lambda pairs: [v for _, v in pairs]))
        missing = MAX_NESTING - found
        assert not server.too_deep((self.nested(missing, core=data) + " []" * 99).encode())
        assert server.too_deep((self.nested(missing + 1, core=data) + " []" * 99).encode())


class TestByteOrderMark:
    def test_is_ignored(self) -> None:
        """Some programs begin every text with one."""
        assert decode_update('\ufeff{"type":"t","data":"\ufeff"}').type == "t"
        assert decode_message(b'\xef\xbb\xbf{"action":"ping"}') == server.Ping()
        assert refusal(b'\xef\xbb\xbf{"action":"x"}').code is ErrorCode.UNKNOWN_ACTION

    def test_before_a_token(self) -> None:
        """The first message of a client without a token is read by the same rules."""
        first = rb'{"action":"authenticate","token":"t","x":"\ud83d"}'
        for payload in (first, b"\xef\xbb\xbf" + first):
            assert server.decode_first_message(payload) == server.Authenticate("t")
        wrong = [first.replace(word, rb'"\ud83d"') for word in (b'"authenticate"', b'"t"')]
        for payload in (*wrong, b"[" * 3_000, first[:-1]):
            with pytest.raises(BadMessage, match="Authenticate first"):
                server.decode_first_message(payload)


class TestContext:
    """A refusal says which message it refuses, as far as that stands at its beginning."""

    @pytest.mark.parametrize(
        ("payload", "context"),
        [
            (b'{"action":"ping"', {"action": "ping"}),
            (b'{"message_id":"m","data":{"message_id":"x"},"project_id":"p",', None),
            (b'{ "project_id" : "p" ,"message_id":"m" !', None),
            (b'{"data":[{"project_id":"x"}],"message_id":"m","project_id":"p", nonsense', None),
            (rb'{"data":"\"message_id\":\"x","message_id":"\u006d","project_id":"p"', None),
            (
                b'{"message_id":"m","project_id":"p","data":"' + b'\\",\\"message_id\\":\\"x' * 99,
                None,
            ),
            (b'{"data":"' + b"x" * 2_000 + b'","message_id":"m"', {}),
            (b'{"message_id":"' + b"x" * 257 + b'"', {}),
            (b'{"message_id":7,"project_id":["p"]', {}),
            (b'[{"message_id":"m"}', {}),
            (b'"message_id":"m"', {}),
            (b"\xff\xfe\x00", {}),
        ],
    )
    def test_found(self, payload: bytes, context: dict[str, str] | None) -> None:
        expected = {"message_id": "m", "project_id": "p"} if context is None else context
        assert server.context_of(payload) == expected

    @given(payload=st.binary(max_size=300))
    def test_any_bytes(self, payload: bytes) -> None:
        assert set(server.context_of(payload)) <= {"action", "message_id", "project_id"}

    def test_looks_at_the_beginning_only(self) -> None:
        """To refuse a large message costs no more than to read it."""

        def seconds(payload: bytes) -> float:
            def once() -> float:
                started = time.thread_time()
                try:
                    decode_message(payload)
                except BadMessage:
                    pass
                return time.thread_time() - started

            return min(once() for _ in range(9))

        data = "[" + ",".join(['{"a":[1,"b"]}'] * 15_000) + "]"
        good = forward(data)
        for bad in (good.replace(b'"dev"', b"5"), good.replace(b"forward", b"dance"), good[:-1]):
            assert seconds(bad) < 2 * seconds(good) + 0.001


class TestRelayed:
    """What tasks say to each other, event by event, each with any JSON."""

    @given(data=json_texts)
    @example(data=r'"\ud83d"')
    @example(data=r'"\\ud83d"')
    def test_any_json(self, data: str) -> None:
        """An event comes out as it went in."""
        payload = msgspec.Raw(f'{{"data":{data}}}'.encode())
        event = RelayedEvent(r'p"\\', 1, "c\uffff", 1.5, payload, "id")
        found = server.decode_relayed(server.sendable(msgspec.json.encode(event)))
        assert bytes(found.payload) == server.sendable(bytes(payload))
        found.payload = payload
        assert found == event

    @pytest.mark.parametrize(
        "line",
        [
            r'"\ud83d"',
            r'["\ud83d"]',
            r'["p",1,null,0.0,"\ud83d"',
            r'["\ud83d",1,null,0.0,1]',
        ],
    )
    def test_of_nobody(self, line: str) -> None:
        with pytest.raises(msgspec.DecodeError):
            server.decode_relayed(line.encode())


PROJECT_ID = 'The field "project_id" must be a string of 1 to 256 characters.'
SINCE = 'The field "since" must be a whole number from 0 to 9007199254740991.'
ACTION = 'The field "action" must be subscribe, unsubscribe, forward, stop, ping or authenticate.'


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        ('{"action":"subscribe"}', PROJECT_ID),
        ('{"action":"subscribe","project_id":""}', PROJECT_ID),
        ('{"action":"subscribe","project_id":"%s"}' % ("x" * 257), PROJECT_ID),
        ('{"action":"subscribe","project_id":7}', PROJECT_ID),
        ('{"action":"subscribe","project_id":"p","since":-1}', SINCE),
        ('{"action":"subscribe","project_id":"p","since":[]}', SINCE),
        ('{"action":"subscribe","project_id":"p","since":1e400}', SINCE),
        ('{"project_id":"p"}', ACTION),
        ('{"action":"dance"}', ACTION),
        ("[1]", "The message must be a JSON object."),
        ('{"action":"ping"', "The message is not valid JSON: Input data was truncated."),
        ("hello", "The message is not valid JSON: invalid character (byte 0)."),
    ],
)
def test_refusal_is_a_sentence(payload: str, sentence: str) -> None:
    """A client's author reads of fields and JSON, not of the parser's types and paths."""
    with pytest.raises(server.BadMessage) as caught:
        server.decode_message(payload.encode())
    assert str(caught.value) == sentence


def test_fields_in_words() -> None:
    """What a refusal says of a field is what the field's type says."""
    written: dict[str, Any] = {}
    for message in (*get_args(server.ClientMessage), server.Update):
        written |= get_type_hints(message, include_extras=True)
    for name, hint in written.items():
        bound = next((each for each in walk(hint) if isinstance(each, msgspec.Meta)), None)
        complaint = msgspec.ValidationError(f"Anything - at `$.{name}`")
        sentence = str(server.explain(complaint))
        if bound and bound.le is not None:
            assert sentence.endswith(f"a whole number from {bound.ge} to {bound.le}.")
        elif bound:
            lengths = (
                f"1 to {bound.max_length}" if bound.min_length else f"at most {bound.max_length}"
            )
            assert sentence.endswith(f"a string of {lengths} characters.")
        elif hint is bool:
            assert sentence.endswith("true or false.")
        else:
            assert name in {"ref", "data", "type"}  # of any kind, or looked up


def walk(hint: Any) -> Iterator[Any]:
    """A type hint and everything in it."""
    yield hint
    for inner in (*get_args(hint), *getattr(hint, "__metadata__", ())):
        yield from walk(inner)


SIZES_AT_LIMITS = [0, 1, 124, 125, 126, 127, 65_534, 65_535, 65_536, 65_537, 300_000]


class TestWire:
    def test_long_ids(self) -> None:
        """An id has at most 256 characters, and a longer one is not echoed."""
        message = {"action": "subscribe", "project_id": "\u00e9" * 256}
        assert isinstance(decode_message(msgspec.json.encode(message)), Subscribe)
        exc = refusal(msgspec.json.encode({"action": "subscribe", "project_id": "x" * 257}))
        assert exc.code is ErrorCode.INVALID_FIELD
        assert exc.context == {"action": "subscribe"}
        assert "project_id" in str(exc)

    @given(payload=st.binary(max_size=200) | st.sampled_from(SIZES_AT_LIMITS).map(bytes))
    @hypothesis_settings(max_examples=60)
    def test_frame(self, payload: bytes) -> None:
        """A frame is what the library reads as one text message."""
        assert text_messages(server.frame(payload), client_protocol()) == [payload]

    @given(
        payload=st.binary(max_size=200)
        | st.sampled_from(SIZES_AT_LIMITS).map(lambda size: b"ab" * (size // 2) + b"c" * (size % 2))
        | st.sampled_from(SIZES_AT_LIMITS).map(lambda size: random.Random(size).randbytes(size))
    )
    @hypothesis_settings(max_examples=60)
    def test_deflate(self, payload: bytes) -> None:
        """A deflated frame is what the library inflates to the same message, twice over."""
        data = server.frame(server.deflate(payload), 0xC1)
        assert text_messages(data + data, client_protocol(deflates=True)) == [payload, payload]

    def test_frames_in_a_row(self) -> None:
        """Frames that are joined come apart again."""
        payloads = [bytes(size) for size in SIZES_AT_LIMITS]
        data = b"".join(map(server.frame, payloads))
        assert text_messages(data, client_protocol()) == payloads

    def test_event_is_deflated_where_that_pays(self) -> None:
        """An event is deflated once, if that makes it smaller."""
        long, short = event(1, size=5_000), event(1)
        noise = Event("p", 1, random.Random(1).randbytes(5_000))
        assert len(long.deflated) < 200
        assert long.deflated is long.deflated
        assert short.deflated is short.frame
        assert noise.deflated is noise.frame

    def test_largest_update_fits_the_topic(self) -> None:
        """The largest update, under the ids that take most room, is one message of the topic."""
        widest = "\x01" * server.ID_MAX_CHARS  # six bytes each in JSON
        data = '"' + "x" * (server.EVENT_MAX_BYTES - 2) + '"'
        body = {"type": widest, "project_id": widest, "connection_id": widest}
        found = decode_update(json.dumps(body)[:-1] + f',"data":{data}}}')
        message = EventMessage(found.type, widest, found.data, server.SEQ_MAX, server.timestamp())
        payload = msgspec.Raw(Event.of(message).payload)
        carried = RelayedEvent(widest, server.SEQ_MAX, found.connection_id, time.time(), payload)
        carrier = msgspec.json.encode(RelayedBatch("t" * 80, [carried]))
        assert len(carrier) <= server.SNS_MESSAGE_BYTES

    def test_snapshot_numbers_and_sets(self) -> None:
        """DynamoDB's numbers and sets are numbers and arrays in a snapshot."""
        state = {"cost": Decimal("1.50"), "tags": {"b", "a"}, "none": None, "raw": b"\x00"}
        encoded = server.Encoders.snapshot.encode(server.ProjectSnapshot("p", state))
        assert json.loads(encoded)["data"] == {
            "cost": 1.5,
            "tags": ["a", "b"],
            "none": None,
            "raw": "AA==",
        }
        with pytest.raises(TypeError, match="Event"):
            server.Encoders.snapshot.encode(server.ProjectSnapshot("p", event(1)))
