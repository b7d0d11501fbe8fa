"""For agents behind the AgenticAI gateway: orders in, answers out. One file; needs boto3 only.

Copy it into your Lambda function, beside the code that does the work:

    from agenticai_agent import orders

    def lambda_handler(event, context):
        batch = orders(event)
        for order in batch:
            with order:
                order.step(1, {"message": "Reading the task"})
                with order.stream() as stream:
                    for token in model(order.data):
                        if order.stopped():
                            break
                        stream.write(token)
                if not order.stopped():
                    order.done({"message": "The code is ready"})
        return batch.failures()

In the environment:

    SQS_QUEUE_URL_UPDATES  where answers go; a FIFO queue or a standard one
    EVENTS_TABLE_NAME      the gateway's event log, where stops are, or DYNAMODB_TABLE_NAME as at
                           the gateway; with neither of them nothing is stopped

How answers look to clients, and which rights the function needs: docs/WRITING_AGENTS.md.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any

import boto3

logger = logging.getLogger(__name__)

GATHER_S = 0.04
"""How long text is gathered before it is sent for those who are watching."""
LOG_EVERY_S = 1.5
"""How often text is sent to be kept; so much of it a reload in the middle may take to come back."""
PIECE_MAX_CHARS = 16_000
"""Of one piece: at most 12 bytes each as JSON, where the gateway takes 250,000 bytes."""
STOP_CACHED_S = 1.0
STOP_SKEW_S = 5.0
"""So much later than the stop may the gateway have dated an order that it is for."""
ATTEMPTS_SUPERSEDED = 10
"""Streams of earlier attempts that a new one ends."""


class StreamError(Exception):
    """A stream was written to after its end, or its text could not be sent."""


def digest(*parts: Any) -> str:
    """A hash of any JSON values, in characters that SQS takes as an id."""
    encoded = json.dumps(parts, separators=(",", ":")).encode()
    return hashlib.sha256(encoded).hexdigest()


def stop_key(order: Mapping[str, Any]) -> dict[str, Any]:
    """Where the gateway notes that somebody wants this order stopped."""
    of_whom = [order["project_id"], order["message_id"]]
    if order["project_id"] is None:
        of_whom.append(order["user"])
    encoded = json.dumps(of_whom, ensure_ascii=False, separators=(",", ":")).encode()
    return {"PK": {"S": f"STOP#{hashlib.sha256(encoded).hexdigest()}"}, "SK": {"S": "STOP"}}


def code_units(text: str) -> int:
    """The length of a text as JavaScript counts it, in UTF-16 code units."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


@functools.cache
def sqs_client() -> Any:
    return boto3.client("sqs")


@functools.cache
def dynamodb_client() -> Any:
    return boto3.client("dynamodb")


def orders(event: Mapping[str, Any]) -> Batch:
    """The orders of a Lambda function's event, from a standard queue or a FIFO queue."""
    return Batch(event)


class Batch:
    """Orders that Lambda has handed over together; to be looped over once.

    An order that was stopped before it began is answered and left out. What cannot be read, and in
    a FIFO queue whatever follows an order of its group that failed, is left out and comes again.
    """

    def __init__(self, event: Mapping[str, Any]) -> None:
        self._records: list[dict[str, Any]] = list(event["Records"])
        self._done: set[str] = set()
        self._failed_groups: set[str] = set()

    def __iter__(self) -> Iterator[Order]:
        for record in self._records:
            group = record.get("attributes", {}).get("MessageGroupId")
            if group is not None and group in self._failed_groups:
                continue
            try:
                order = Order(self, record)
                if order.stopped():
                    order.cancelled()
                    self.settle(record)
                    continue
            except Exception:  # whatever is wrong with one order, the others must be worked on
                logger.exception("message %s cannot be begun", record["messageId"])
                self.settle(record, failed=True)
                continue
            yield order

    def settle(self, record: Mapping[str, Any], *, failed: bool = False) -> None:
        """Note how an order ended."""
        if not failed:
            self._done.add(record["messageId"])
        elif group := record.get("attributes", {}).get("MessageGroupId"):
            self._failed_groups.add(group)

    def failures(self) -> dict[str, Any]:
        """What the function returns: whatever was not worked on to its end comes again.

        The event source mapping needs ``ReportBatchItemFailures``.
        """
        left = [r["messageId"] for r in self._records if r["messageId"] not in self._done]
        return {"batchItemFailures": [{"itemIdentifier": each} for each in left]}


class Order:
    """What a client wants done. Work on it inside ``with order:``.

    An exception inside has SQS deliver this order again, and this one alone; what was streamed
    until then ends as ``failed``.

    Attributes:
        type, message_id, project_id, data, user, connection_id, client_id, timestamp,
            traceparent: as in the message; those that may be missing are ``None``.
        sqs_message_id: of the message that it came in.
        attempt: from 1; how often SQS has handed the order out.
    """

    def __init__(self, batch: Batch, record: Mapping[str, Any]) -> None:
        body = json.loads(record["body"])
        self._batch = batch
        self._record = record
        self._body = body
        self.type: str = body["type"]
        self.message_id: str = body["message_id"]
        self.project_id: str | None = body["project_id"]
        self.data: Any = body["data"]
        self.user: str | None = body.get("user")
        self.connection_id: str = body["connection_id"]
        self.client_id: str = body.get("client_id", self.connection_id)
        self.timestamp: str = body["timestamp"]
        self.traceparent: str | None = body.get("traceparent")
        self.sqs_message_id: str = record["messageId"]
        self.attempt = int(record.get("attributes", {}).get("ApproximateReceiveCount", "1"))
        # Clients choose message ids, and two of them may choose the same.
        self._id = digest(
            self.user, self.client_id, self.project_id, self.type.lower(), self.message_id
        )
        taken_at = datetime.fromisoformat(self.timestamp)
        self._taken_at = taken_at.timestamp()
        self._streams: dict[str, Stream] = {}
        self._stopped = False
        self._used_before = ""
        self._asked_at = -STOP_CACHED_S
        self._ended = False

    def __enter__(self) -> Order:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        for stream in self._streams.values():
            try:
                stream.close("failed" if error else None)
            except StreamError as failure:
                error = error or failure
        try:
            if error is None and self._stopped and not self._ended:
                self.cancelled()
        except Exception as failure:
            error = failure
        if error is not None:
            logger.error("message %s failed", self.sqs_message_id, exc_info=error)
        self._batch.settle(self._record, failed=error is not None)
        return error is None or isinstance(error, Exception)

    def step(self, number: int, data: Mapping[str, Any]) -> None:
        """Report a step: ``data`` with the status ``working``, unless they have one.

        Once for each number, however often the order is worked on within five minutes.
        """
        self._answer(f"step {number}", {"status": "working", **data})

    def done(self, data: Mapping[str, Any] = {}) -> None:
        """The last answer: ``data`` with the status ``done``."""
        self._end("done", data)

    def failed(self, data: Mapping[str, Any] = {}) -> None:
        """The last answer to what cannot be done, however often it were tried: ``failed``."""
        self._end("failed", data)

    def cancelled(self, data: Mapping[str, Any] = {}) -> None:
        """The last answer to what was stopped; by itself where ``stopped`` has said so."""
        self._end("cancelled", data)

    def _end(self, status: str, data: Mapping[str, Any]) -> None:
        for stream in self._streams.values():
            stream.close()
        if "" not in self._streams:
            self._supersede_streams()
        self._answer(f"end {status}", {**data, "status": status})
        self._ended = True

    def _answer(self, name: str, data: Mapping[str, Any]) -> None:
        self.send("project_updated", data, event_id=digest(self._id, self._used_before, name))

    def stopped(self) -> bool:
        """Whether somebody wants this order stopped; looked up once a second."""
        table = os.environ.get("EVENTS_TABLE_NAME") or os.environ.get("DYNAMODB_TABLE_NAME")
        now = time.monotonic()
        if self._stopped or not table or now < self._asked_at + STOP_CACHED_S:
            return self._stopped
        self._asked_at = now
        try:
            answer = dynamodb_client().get_item(
                TableName=table, Key=stop_key(self._body), ConsistentRead=True
            )
        except Exception as error:  # the work is worth more than the chance to end it early
            logger.warning("order %s: no look for a stop: %s", self.message_id, error)
            return False
        if stop := answer.get("Item"):
            stopped_at = stop["stopped_at"]["N"]
            self._stopped = self._taken_at <= float(stopped_at) + STOP_SKEW_S
            if not self._stopped:  # the id was used before, for what was stopped
                self._used_before = stopped_at
        return self._stopped

    def stream(self, name: str = "") -> Stream:
        """A text that clients see grow. ``name`` tells several of one order apart.

        Another attempt writes another text, so it is another stream, and ends the earlier ones.
        """
        if name in self._streams:
            raise StreamError(f"the order has a stream {name!r} already")
        stream_id = self._supersede_streams(name)
        stream = self._streams[name] = Stream(self, stream_id)
        return stream

    def _supersede_streams(self, name: str = "") -> str:
        """End what earlier attempts have streamed under a name; return this attempt's stream id.

        One that was killed in the middle has not ended its stream itself. Which names it used, an
        attempt that streams nothing cannot know: of those it ends the stream without one.
        """
        of_order = digest(self._id, self.sqs_message_id, name)[:24]
        for attempt in range(max(1, self.attempt - ATTEMPTS_SUPERSEDED), self.attempt):
            superseded = {"stream": f"{of_order}.{attempt}", "at": 0, "text": ""}
            self.send(
                "stream",
                {**superseded, "state": "superseded"},
                event_id=digest(of_order, attempt, "superseded"),
            )
        return f"{of_order}.{self.attempt}"

    def send(
        self, kind: str, data: Any, *, event_id: str | None = None, ephemeral: bool = False
    ) -> None:
        """Send any answer: to the project's subscribers, or without a project to the sender.

        Args:
            kind: the event's ``type``.
            event_id: the same for what is the same thing, said again.
            ephemeral: only for who is watching at this moment.
        """
        update = {"type": kind, "data": data, "in_reply_to": self.message_id}
        if self.project_id is None:
            update["connection_id"] = self.connection_id
        else:
            update["project_id"] = self.project_id
        if self.traceparent is not None:
            update["traceparent"] = self.traceparent
        if ephemeral:
            update["ephemeral"] = True
        elif event_id is not None:
            update["event_id"] = event_id
        queue_url = os.environ["SQS_QUEUE_URL_UPDATES"]
        fifo: dict[str, str] = {}
        if queue_url.endswith(".fifo"):
            fifo["MessageGroupId"] = digest(self.project_id or self.connection_id)
            # SQS compares these in the whole queue, event ids are compared in a project.
            once = event_id if event_id is not None and not ephemeral else uuid.uuid4().hex
            fifo["MessageDeduplicationId"] = digest(self.project_id, once)
        # As ASCII: SQS refuses some characters, and halves of surrogate pairs have no UTF-8.
        sqs_client().send_message(QueueUrl=queue_url, MessageBody=json.dumps(update), **fifo)


class Stream:
    """A text that grows, sent twice: early in small ephemeral pieces, and once for good.

    A piece is an event with the data ``{"stream", "at", "text"}``: the stream's id, where in the
    text it begins, in UTF-16 code units, and what comes there. The logged pieces alone are the
    whole text; the last of them has a ``state``: ``done``, ``cancelled``, ``failed`` or
    ``superseded``. One thread sends, one piece after the other, so that none passes the one before.
    """

    def __init__(self, order: Order, stream_id: str) -> None:
        self.id = stream_id
        self._order = order
        self._lock = threading.Condition()
        self._kept_back = ""  # the first half of a surrogate pair, until the second one comes
        self._early: list[str] = []  # written, and not yet sent to anybody
        self._unlogged: list[str] = []  # written, and not yet sent for good
        self._early_at = self._logged_at = 0
        self._state: str | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="agenticai-stream", daemon=True)
        self._thread.start()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close("failed" if error else None)

    def write(self, text: str) -> None:
        """Add to the text; returns at once.

        Raises:
            StreamError: it has ended, or what was written before could not be sent.
        """
        with self._lock:
            if self._error is not None:
                raise StreamError("the stream's text could not be sent") from self._error
            if self._state is not None:
                raise StreamError(f"the stream has ended: {self._state}")
            text = self._kept_back + text
            self._kept_back = text[-1] if "\ud800" <= text[-1:] <= "\udbff" else ""
            if text := text.removesuffix(self._kept_back) if self._kept_back else text:
                whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
                self._early.append(whole)
                self._unlogged.append(whole)
                self._lock.notify()

    def close(self, state: str | None = None) -> None:
        """End the text: ``done``, or ``cancelled`` if the order was stopped, or the state given.

        Returns once all of it is sent; of a stream that has ended, at once.

        Raises:
            StreamError: it could not be sent.
        """
        with self._lock:
            if self._state is None:
                self._state = state or ("cancelled" if self._order._stopped else "done")
                self._unlogged.append(self._kept_back)
                self._lock.notify()
        self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise StreamError("the stream's text could not be sent") from error

    def _ended(self) -> bool:
        return self._state is not None

    def _run(self) -> None:
        try:
            log_at = time.monotonic() + LOG_EVERY_S
            while not self._ended():
                with self._lock:
                    left_s = max(0.0, log_at - time.monotonic()) if self._unlogged else None
                    self._lock.wait_for(lambda: self._ended() or self._early, left_s)
                    if self._early:
                        self._lock.wait_for(self._ended, GATHER_S)
                if time.monotonic() >= log_at:
                    self._log()
                    log_at = time.monotonic() + LOG_EVERY_S
                else:
                    self._send_early()
            self._log(last=True)
        except Exception as error:  # told to whoever writes or closes
            with self._lock:
                self._error = error

    def _send_early(self) -> None:
        with self._lock:
            text, self._early = "".join(self._early), []
        for piece in pieces(text):
            data = {"stream": self.id, "at": self._early_at, "text": piece}
            self._early_at += code_units(piece)
            try:
                self._order.send("stream", data, ephemeral=True)
            except Exception as error:  # the text is late by that, the order is not to fail
                logger.warning("stream %s: nothing sent early: %s", self.id, error)

    def _log(self, *, last: bool = False) -> None:
        with self._lock:
            text, self._unlogged, self._early = "".join(self._unlogged), [], []
            state = self._state
        split = pieces(text) or ([""] if last else [])
        for number, piece in enumerate(split, start=1):
            data: dict[str, Any] = {"stream": self.id, "at": self._logged_at, "text": piece}
            if last and number == len(split):
                data["state"] = state
            event_id = digest(self.id, self._logged_at, data.get("state"))
            self._order.send("stream", data, event_id=event_id)
            self._logged_at += code_units(piece)
        self._early_at = self._logged_at


def pieces(text: str) -> list[str]:
    """A text in parts that an update takes; Python's characters are never halves of a pair."""
    return [text[at : at + PIECE_MAX_CHARS] for at in range(0, len(text), PIECE_MAX_CHARS)]
