"""moto's server, made to behave like AWS where this project would notice the difference.

This module runs in a process of its own (`python -m tests.moto_aws`). What it corrects:

- moto is not thread-safe: concurrent requests lose DynamoDB updates and SQS messages, and hand one
  message to two receivers. Here every request runs under one lock. A transaction also copied the
  whole table each time; here it saves the items that it touches.
- Long polls answered late and kept their thread busy. Here `ReceiveMessage` waits outside the lock
  and is woken by whatever changes a queue; a poll whose client has gone takes no message with it.
- A FIFO group whose messages were received together and timed out came back out of order. So did
  one whose first message was hidden again, after its time, by whoever had received it before.
- One deleted queue behind an SNS topic failed the publication for all the others.
- Characters that SQS and SNS refuse, such as U+FFFF, were taken.
- Each message received cost a look at all messages of its queue, by a slow clock, and each request
  a look at moto's directory.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import select
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import moto.backends
import moto.dynamodb.models
import moto.sqs.models
from moto.dynamodb.models import DynamoDBBackend
from moto.dynamodb.models.dynamo_type import DynamoType, Item
from moto.dynamodb.models.table import Table
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from moto.sns.exceptions import SNSInvalidParameter
from moto.sns.models import Subscription, Topic
from moto.sqs.exceptions import QueueDoesNotExist, ReceiptHandleIsInvalid, SQSException
from moto.sqs.models import Message, Queue, SQSBackend
from werkzeug.serving import BaseWSGIServer, make_server

from aws_standin.model import ILLEGAL_IN_MESSAGE

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

HOST = "127.0.0.1"

# Held while moto works on a request; notified whenever a request may have changed a queue.
moto_turn = threading.Condition()

# `.connection` is the client's socket, for as long as this thread works on its request.
current_request = threading.local()


# --- HTTP ---


def one_at_a_time(app: WSGIApplication) -> WSGIApplication:
    """Wrap `app` so that its requests run one after the other, and wake the long polls."""

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        # Read before the lock is taken: a slow sender must not hold up the others.
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        current_request.connection = environ["werkzeug.socket"]
        with moto_turn:
            try:
                return list(app(environ, start_response))
            finally:
                if not environ.get("HTTP_X_AMZ_TARGET", "").startswith("DynamoDB"):
                    moto_turn.notify_all()

    return application


_list_moto_modules = moto.backends.list_of_moto_modules


@functools.cache
def _moto_modules() -> tuple[str, ...]:
    return tuple(_list_moto_modules())


# --- SQS ---


class _Clock:
    """Stand in for moto's clock, which goes through a datetime: it is read for each message.

    During a receive it stands still. Else the time of a FIFO group's messages, received together,
    ends one after the other while moto looks at them: the first is found hidden, the last is not.
    """

    def __init__(self) -> None:
        self._still_ms: float | None = None

    def __call__(self) -> float:
        return time.time() * 1000 if self._still_ms is None else self._still_ms

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        self._still_ms = self()
        try:
            yield
        finally:
            self._still_ms = None


_now_ms = _Clock()


_receive_now = SQSBackend.receive_message


def _receive_message(
    backend: SQSBackend,
    queue_name: str,
    count: int,
    wait_seconds_timeout: int,
    visibility_timeout: int,
    message_attribute_names: list[str] | None = None,
) -> list[Message]:
    """Receive as soon as there is something to receive, or nothing once the wait is over."""
    deadline = time.monotonic() + wait_seconds_timeout
    while True:
        if _client_has_gone():
            return []
        queue = backend.get_queue(queue_name)  # again each time: it may be deleted meanwhile
        with _now_ms.standing_still():
            _release_timed_out(queue)
            messages = _receive_now(
                backend, queue_name, count, 0, visibility_timeout, message_attribute_names
            )
        remaining = deadline - time.monotonic()
        if messages or remaining <= 0:
            return messages
        moto_turn.wait(min(remaining, _seconds_to_next_visible(queue)))


def _client_has_gone() -> bool:
    """Return whether the client closed its connection while it waited for the answer."""
    connection: socket.socket = current_request.connection
    readable, _, _ = select.select([connection], [], [], 0)
    if not readable:
        return False
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except OSError:
        return True


def _release_timed_out(queue: Queue) -> None:
    """Free the FIFO groups of messages whose visibility timeout has passed.

    moto frees them one by one as it goes through the queue, and so passes over the first message
    of a group while the second one still blocks it.
    """
    for message in [message for message in queue.pending_messages if message.visible]:
        queue.pending_messages.remove(message)


_change_visibility = SQSBackend.change_message_visibility


@functools.wraps(_change_visibility)
def _change_message_visibility(
    backend: SQSBackend, queue_name: str, receipt_handle: str, visibility_timeout: int
) -> None:
    """Change it for a message in flight, by the receipt of its latest receive, as SQS does."""
    for message in backend.get_queue(queue_name)._messages:
        late = message.visible or message.receipt_handle != receipt_handle
        if message.had_receipt_handle(receipt_handle) and late:
            raise ReceiptHandleIsInvalid
    _change_visibility(backend, queue_name, receipt_handle, visibility_timeout)


_validate = SQSBackend._validate_message


class _InvalidMessageContents(SQSException):
    """The body has a character that SQS refuses; one such fails a whole batch."""

    code = "InvalidMessageContents"

    def __init__(self) -> None:
        super().__init__("Invalid binary character was found in the message body.")


@functools.wraps(_validate)
def _validate_message(
    backend: SQSBackend, queue: Queue, message_body: str, *args: Any, **kwargs: Any
) -> None:
    if ILLEGAL_IN_MESSAGE.search(message_body):
        raise _InvalidMessageContents
    _validate(backend, queue, message_body, *args, **kwargs)


def _seconds_to_next_visible(queue: Queue) -> float:
    now_ms = _now_ms()
    times = (max(message.visible_at, message.delayed_until) for message in queue._messages)
    next_ms = min((at for at in times if at >= now_ms), default=now_ms + 60_000)
    return (next_ms - now_ms + 1) / 1000  # 1 ms more, as moto compares with `>`


def _is_within_retention_period(backend: SQSBackend, queue_name: str, message: Message) -> bool:
    """Answer what moto asks for each message received, without counting the whole queue."""
    retention_s: int = vars(backend.get_queue(queue_name))["message_retention_period"]
    sent_ms: float = vars(message)["sent_timestamp"]
    return sent_ms + retention_s * 1000 > _now_ms()


# --- SNS ---


_publish = Subscription.publish


@functools.wraps(_publish)
def _publish_to_subscription(subscription: Subscription, *args: Any, **kwargs: Any) -> None:
    """Publish to one subscriber; a queue that was deleted is no concern of the publisher."""
    try:
        _publish(subscription, *args, **kwargs)
    except QueueDoesNotExist:
        pass


_publish_to_topic = Topic.publish


@functools.wraps(_publish_to_topic)
def _publish_message(topic: Topic, message: str, *args: Any, **kwargs: Any) -> str:
    if ILLEGAL_IN_MESSAGE.search(message):
        raise SNSInvalidParameter("Invalid parameter: Message has an invalid character")
    return _publish_to_topic(topic, message, *args, **kwargs)


# --- DynamoDB ---


_transact = DynamoDBBackend.transact_write_items


def _copy_all_but_tables(value: Any) -> Any:
    """Stand in for `copy.deepcopy` in moto's models: a transaction needs no copy of its tables."""
    return value if isinstance(value, Table) else copy.deepcopy(value)


def _transact_write_items(backend: DynamoDBBackend, transact_items: list[dict[str, Any]]) -> None:
    """Run a transaction; when it fails, put every item it names back as it was."""
    saved = [
        (table, hash_key, range_key, copy.deepcopy(table.get_item(hash_key, range_key)))
        for table, hash_key, range_key in map(functools.partial(_locate, backend), transact_items)
    ]
    try:
        _transact(backend, transact_items)
    except Exception:
        for table, hash_key, range_key, item in saved:
            _put_back(table, hash_key, range_key, item)
        raise


def _locate(
    backend: DynamoDBBackend, operation: dict[str, Any]
) -> tuple[Table, DynamoType, DynamoType | None]:
    """Return the table and the key that one operation of a transaction is about."""
    kind, details = next(iter(operation.items()))
    table = backend.get_table(details["TableName"])
    key = details["Item"] if kind == "Put" else details["Key"]
    range_key = DynamoType(key[table.range_key_attr]) if table.range_key_attr else None
    return table, DynamoType(key[table.hash_key_attr]), range_key


def _put_back(
    table: Table, hash_key: DynamoType, range_key: DynamoType | None, item: Item | None
) -> None:
    if item is None:
        table.delete_item(hash_key, range_key)
    elif range_key is None:
        table.items[hash_key] = item  # type: ignore[assignment]  # such a table is flat
    else:
        table.items[hash_key][range_key] = item


# --- The server ---

CORRECTIONS: list[tuple[object, str, object]] = [
    (SQSBackend, "receive_message", _receive_message),
    (SQSBackend, "change_message_visibility", _change_message_visibility),
    (SQSBackend, "is_message_valid_based_on_retention_period", _is_within_retention_period),
    (moto.sqs.models, "unix_time_millis", _now_ms),
    (moto.backends, "list_of_moto_modules", _moto_modules),
    (SQSBackend, "_validate_message", _validate_message),
    (Subscription, "publish", _publish_to_subscription),
    (Topic, "publish", _publish_message),
    (DynamoDBBackend, "transact_write_items", _transact_write_items),
    (moto.dynamodb.models, "copy", SimpleNamespace(deepcopy=_copy_all_but_tables)),
]


class _QuietRequestHandler(MotoRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log nothing: long polls alone would fill the terminal."""


def make_moto_server(port: int) -> BaseWSGIServer:
    """Return a server bound to `port` (0: any free one) on the loopback interface."""
    for owner, name, replacement in CORRECTIONS:
        setattr(owner, name, replacement)
    app = one_at_a_time(DomainDispatcherApplication(create_backend_app))
    return make_server(HOST, port, app, threaded=True, request_handler=_QuietRequestHandler)
