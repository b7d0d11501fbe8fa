"""HTTP/1.1 and the two protocols the SDKs speak over it."""

from __future__ import annotations

import asyncio
import functools
import urllib.parse
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final
from xml.sax.saxutils import escape

import msgspec

from aws_standin.model import NO_FAULT, SQS_QUERY_CODES, AwsError, Call, Fault, Json, Service
from aws_standin.queues import Message, Poll, Queue

if TYPE_CHECKING:
    from aws_standin import StandIn

MAX_HEAD_BYTES: Final = 65_536
MAX_BODY_BYTES: Final = 16_777_216
ELB_VERSION: Final = "2015-12-01"  # of its API, by which its calls are told from those of SNS
XML_SPACE: Final = {
    "sns": "http://sns.amazonaws.com/doc/2010-03-31/",
    "elb": f"http://elasticloadbalancing.amazonaws.com/doc/{ELB_VERSION}/",
}

_REASONS: Final = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found"}


def read_call(headers: Mapping[str, str], body: bytes) -> Call:
    """The call in an HTTP request; header names are lower-case."""
    if target := headers.get("x-amz-target"):
        api, _, operation = target.partition(".")
        service: Service = "sqs" if api == "AmazonSQS" else "dynamodb"
        try:
            request = msgspec.json.decode(body or b"{}", type=Json)
        except msgspec.DecodeError as error:
            raise AwsError("SerializationException", str(error)) from None
        return Call(service, operation, request)
    try:
        flat = dict(urllib.parse.parse_qsl(body.decode(), True, True))
    except ValueError as error:
        raise AwsError("MalformedQueryString", str(error)) from None
    operation = flat.pop("Action", "")
    version = flat.pop("Version", "")
    return Call("elb" if version == ELB_VERSION else "sns", operation, _unflattened(flat))


def _unflattened(flat: Mapping[str, str]) -> Json:
    """The query protocol's ``A.member.1.B`` and ``A.entry.1.key`` as lists and maps."""
    tree: Json = {}
    for name, value in flat.items():
        *way, last = name.split(".")
        node = tree
        for part in way:
            node = node.setdefault(part, {})
        node[last] = value

    def shaped(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if set(node) == {"member"}:
            return [shaped(node["member"][i]) for i in sorted(node["member"], key=int)]
        if set(node) == {"entry"}:
            return {
                e.get("key") or e.get("Name"): shaped(e.get("value") or e.get("Value"))
                for e in node["entry"].values()
            }
        return {k: shaped(v) for k, v in node.items()}

    result: Json = shaped(tree)
    return result


def _xml(value: Any) -> str:
    """A result as XML: a list repeats its element."""
    if not isinstance(value, dict):
        return escape(str(value))
    return "".join(
        f"<{name}>{_xml(one)}</{name}>"
        for name, child in value.items()
        for one in (child if isinstance(child, list) else [child])
    )


def write_answer(call: Call, result: Json) -> bytes:
    """A successful HTTP response."""
    if call.service not in XML_SPACE:
        return _http(200, "application/x-amz-json-1.0", msgspec.json.encode(result))
    body = (
        f'<{call.operation}Response xmlns="{XML_SPACE[call.service]}">'
        f"<{call.operation}Result>{_xml(result)}</{call.operation}Result><ResponseMetadata>"
        f"<RequestId>{uuid.uuid4()}</RequestId></ResponseMetadata></{call.operation}Response>"
    )
    return _http(200, "text/xml", body.encode())


def write_error(service: Service, error: AwsError) -> bytes:
    """An HTTP response that says what went wrong."""
    return _http(error.status, *error_answer(service, error))


def error_answer(service: Service, error: AwsError) -> tuple[str, bytes, dict[str, str]]:
    """Content type, body and further headers of an error, the way the service says it."""
    sender = "Sender" if error.status < 500 else "Receiver"
    if service in XML_SPACE:
        body = (
            f'<ErrorResponse xmlns="{XML_SPACE[service]}"><Error>'
            f"<Type>{sender}</Type><Code>{escape(error.code)}</Code>"
            f"<Message>{escape(error.message)}</Message></Error>"
            f"<RequestId>{uuid.uuid4()}</RequestId></ErrorResponse>"
        )
        return "text/xml", body.encode(), {}
    if service == "sqs":
        answer = {"__type": f"com.amazonaws.sqs#{error.code}", "message": error.message}
        code = SQS_QUERY_CODES.get(error.code, error.code)
        headers = {"x-amzn-query-error": f"{code};{sender}"}
    else:
        answer = {"__type": f"com.amazonaws.dynamodb.v20120810#{error.code}"}
        # The service spells this one member with a capital, and SDKs look for it so.
        cancelled = error.code == "TransactionCanceledException"
        answer["Message" if cancelled else "message"] = error.message
        headers = {}
    body_bytes = msgspec.json.encode({**answer, **error.fields})
    return "application/x-amz-json-1.0", body_bytes, headers


def _http(status: int, content_type: str, body: bytes, headers: Mapping[str, str] = {}) -> bytes:
    reason = _REASONS.get(status, "Error")
    extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = (
        f"HTTP/1.1 {status} {reason}\r\nContent-Type: {content_type}\r\n{extra}"
        f"x-amzn-RequestId: {uuid.uuid4()}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection: a request at a time, kept alive."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in
        self._buffer = bytearray()
        self._busy = False
        self._waiting: tuple[Queue, Poll] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._stand_in.connections.add(self)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._transport = None
        self._stand_in.connections.discard(self)
        self._stop_waiting()

    def eof_received(self) -> None:
        # At once, not with connection_lost a turn later: a message sent meanwhile would be lost
        # to a caller who has gone.
        self._stop_waiting()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > MAX_HEAD_BYTES + MAX_BODY_BYTES:
            self.cut()
        self._next()

    def cut(self) -> None:
        """Reset the connection."""
        if self._transport:
            self._transport.abort()

    def _stop_waiting(self) -> None:
        if self._waiting:
            queue, poll = self._waiting
            queue.cancel(poll)
            self._waiting = None

    def _next(self) -> None:
        """Serve what is complete in the buffer, until a request has to wait."""
        while self._transport and not self._busy:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            headers = {}
            for line in self._buffer[:end].decode("latin-1").split("\r\n")[1:]:
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            start, length = end + 4, int(headers.get("content-length") or 0)
            if len(self._buffer) < start + length:
                if headers.get("expect", "").lower() == "100-continue":
                    self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                return
            body = bytes(self._buffer[start : start + length])
            del self._buffer[: start + length]
            self._busy = True
            self._serve(headers, body)

    def _serve(self, headers: Mapping[str, str], body: bytes) -> None:
        try:
            call = read_call(headers, body)
        except AwsError as error:
            self._answer(write_error("sqs", error))
            return
        self._stand_in.calls[call.service, call.operation] += 1
        self._stand_in.usage.called(call)
        hook = self._stand_in.fault
        fault = (hook(call) if hook else None) or NO_FAULT
        if delay_s := fault.delay_s + self._stand_in.half_latency_s():
            asyncio.get_running_loop().call_later(delay_s, self._perform, call, fault)
        else:
            self._perform(call, fault)

    def _perform(self, call: Call, fault: Fault) -> None:
        """Do a call, now that its delay is over. Its effect does not need the caller any more."""
        if fault.answers and not fault.after_effect:
            self._finish(call, fault, b"")
            return
        try:
            result = self._stand_in.perform(call, fault)
        except AwsError as error:
            self._finish(call, fault, write_error(call.service, error))
            return
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # A request that lacks a parameter or has one of the wrong type.
            malformed = AwsError("ValidationException", f"Malformed request: {error!r}")
            self._finish(call, fault, write_error(call.service, malformed))
            return
        if not isinstance(result, Poll):
            if call.operation == "ReceiveMessage":
                self._stand_in.usage.answered(call, result.get("Messages") or [])
            self._finish(call, fault, write_answer(call, result))
        elif self._transport:
            result.answer = functools.partial(self._polled, call, fault)
            self._waiting = self._stand_in.sqs.wait(call.request, result), result

    def _polled(self, call: Call, fault: Fault, messages: list[Message]) -> None:
        self._waiting = None
        answer = self._stand_in.sqs.received(call.request, messages)
        self._stand_in.usage.answered(call, answer.get("Messages") or [])
        self._finish(call, fault, write_answer(call, answer))

    def _finish(self, call: Call, fault: Fault, response: bytes) -> None:
        if fault.cut and fault.halfway and self._transport:
            head = response.index(b"\r\n\r\n") + 4
            self._transport.write(response[: (head + len(response)) // 2])
            self._transport.close()
        elif fault.cut:
            self.cut()
        elif fault.garbage is not None:
            self._answer(_http(fault.status or 200, "text/plain", fault.garbage))
        elif fault.status:
            self._answer(write_error(call.service, fault.error))
        elif not fault.silent:
            self._answer(response)

    def _answer(self, response: bytes) -> None:
        if delay_s := self._stand_in.half_latency_s():
            asyncio.get_running_loop().call_later(delay_s, self._send, response)
        else:
            self._send(response)

    def _send(self, response: bytes) -> None:
        if self._transport:
            self._transport.write(response)
        self._busy = False
        self._next()
