"""One SQS queue: what is visible to whom and when. No wire format, no other queue."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import heapq
import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from typing import Final

from aws_standin.model import ACCOUNT, REGION, AwsError, Json

MAX_SQS_BYTES: Final = 1_048_576
DEDUPLICATION_WINDOW_S: Final = 300.0

DEFAULT_QUEUE_ATTRIBUTES: Final = {
    "VisibilityTimeout": "30",
    "MaximumMessageSize": str(MAX_SQS_BYTES),
    "MessageRetentionPeriod": "345600",
    "DelaySeconds": "0",
    "ReceiveMessageWaitTimeSeconds": "0",
    "SqsManagedSseEnabled": "true",
}


@dataclasses.dataclass(slots=True, eq=False)
class Message:
    """One message of one queue. Times are milliseconds since the epoch unless said otherwise."""

    sequence: int
    message_id: str
    body: str
    attributes: Json
    sent_ms: int
    group: str | None = None
    deduplication_id: str | None = None
    in_flight: bool = False
    visible_at: float = 0.0  # on the event loop's clock, seconds; while in flight
    receive_count: int = 0
    first_receive_ms: int = 0
    receipt: str = ""


@dataclasses.dataclass(slots=True, eq=False)
class Group:
    """Messages in order of sending, also those in flight. A standard queue's have one each."""

    messages: dict[int, Message] = dataclasses.field(default_factory=dict)
    in_flight: int = 0


@dataclasses.dataclass(slots=True, eq=False)
class Poll:
    """A long poll that waits for its first message."""

    limit: int
    visibility_s: float
    answer: Callable[[list[Message]], None]
    timer: asyncio.TimerHandle | None = None


class Queue:
    """One SQS queue: groups of messages, of which only those with none in flight can be received.

    It knows no wire format and no other queue; `bury` takes what has been received too often.
    """

    def __init__(self, name: str, attributes: Mapping[str, str], tags: Mapping[str, str]) -> None:
        self.name = name
        self.arn = f"arn:aws:sqs:{REGION}:{ACCOUNT}:{name}"
        self.fifo = name.endswith(".fifo")
        self.attributes = {**DEFAULT_QUEUE_ATTRIBUTES, **attributes}
        self.tags = dict(tags)
        self.created_s = int(time.time())
        self.bury: Callable[[str, Message], bool] = lambda _arn, _message: False
        self._messages: dict[str, Message] = {}
        self._groups: dict[Hashable, Group] = {}
        self._ready: dict[Hashable, Group] = {}
        self._polls: deque[Poll] = deque()
        self._due: list[tuple[float, int, Message]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._seen: dict[str, tuple[float, Message]] = {}
        self._sequence = 0

    @property
    def bodies(self) -> list[str]:
        """The bodies of all messages not deleted, in order of sending."""
        return [m.body for m in sorted(self._messages.values(), key=lambda m: m.sequence)]

    @property
    def messages(self) -> list[Message]:
        """All messages not deleted, in order of sending."""
        return sorted(self._messages.values(), key=lambda m: m.sequence)

    @property
    def in_flight(self) -> int:
        """How many messages are received and not yet deleted or visible again."""
        return sum(m.in_flight for m in self._messages.values())

    def redrive(self) -> tuple[str, int] | None:
        """The dead-letter queue's ARN and the number of receives after which a message goes."""
        policy = json.loads(self.attributes.get("RedrivePolicy") or "null")
        return (policy["deadLetterTargetArn"], int(policy["maxReceiveCount"])) if policy else None

    def push(
        self,
        body: str,
        attributes: Json | None = None,
        group: str | None = None,
        deduplication_id: str | None = None,
        delay_s: float = 0.0,
        message_id: str | None = None,
    ) -> Message:
        """Add a message, or return the one it duplicates. Call `wake` after the last of a batch."""
        if self.fifo and deduplication_id is None:
            deduplication_id = hashlib.sha256(body.encode()).hexdigest()
        if self.fifo and (earlier := self._duplicate(str(deduplication_id))):
            return earlier
        self._sequence += 1
        message = Message(
            self._sequence,
            message_id or str(uuid.uuid4()),
            body,
            attributes or {},
            int(time.time() * 1000),
            group,
            deduplication_id,
        )
        if self.fifo:
            self._seen[str(deduplication_id)] = (time.monotonic(), message)
        self._messages[message.message_id] = message
        key = self._group_key(message)
        members = self._groups.get(key)
        if members is None:
            members = self._groups[key] = Group()
        members.messages[message.sequence] = message
        if delay_s:
            self._hold(message, members, delay_s)
        elif not members.in_flight:
            self._ready[key] = members
        return message

    def take(self, limit: int, visibility_s: float) -> list[Message]:
        """Receive up to `limit` messages; what was received too often leaves instead."""
        taken: list[Message] = []
        still_visible: dict[Hashable, Group] = {}
        redrive = self.redrive() if self._ready else None
        expired_ms = int(time.time() - float(self.attributes["MessageRetentionPeriod"])) * 1000
        while self._ready and len(taken) < limit:
            key, members = next(iter(self._ready.items()))
            del self._ready[key]
            for message in list(members.messages.values()):
                if len(taken) == limit:
                    break
                too_often = redrive is not None and message.receive_count >= redrive[1]
                if message.sent_ms < expired_ms or (
                    redrive is not None and too_often and self.bury(redrive[0], message)
                ):
                    self._forget(message, members)
                    continue
                message.receive_count += 1
                message.first_receive_ms = message.first_receive_ms or int(time.time() * 1000)
                message.receipt = f"{message.message_id}/{message.receive_count}"
                if visibility_s:
                    self._hold(message, members, visibility_s)
                taken.append(message)
            if members.messages and not members.in_flight:
                still_visible[key] = members
        self._ready |= still_visible
        return taken

    def poll(self, poll: Poll, wait_s: float) -> None:
        """Let `poll` be answered with the next messages, or with none after `wait_s` seconds."""
        self._polls.append(poll)
        poll.timer = asyncio.get_running_loop().call_later(wait_s, self._give_up, poll)

    def cancel(self, poll: Poll) -> None:
        """The poll's caller is gone."""
        if poll.timer:
            poll.timer.cancel()
        with contextlib.suppress(ValueError):
            self._polls.remove(poll)

    def wake(self) -> None:
        """Hand visible messages to those who wait for them."""
        while self._polls and self._ready:
            poll = self._polls[0]
            if messages := self.take(poll.limit, poll.visibility_s):
                self.cancel(poll)
                poll.answer(messages)

    def delete(self, receipt: str) -> None:
        """Delete by receipt handle; a handle that is not the latest deletes nothing."""
        message = self._by_receipt(receipt)
        if message is None or message.receipt != receipt:
            return
        if self.fifo and not message.in_flight:
            raise AwsError(
                "InvalidParameterValue",
                f"Value {receipt} for parameter ReceiptHandle is invalid. "
                "Reason: The receipt handle has expired.",
            )
        key = self._group_key(message)
        members = self._groups[key]
        self._release(message, members)
        self._forget(message, members)
        if members.messages and not members.in_flight:
            self._ready[key] = members
        self.wake()

    def change_visibility(self, receipt: str, visibility_s: float) -> None:
        """Make a message in flight visible in `visibility_s` seconds from now; 0 is at once."""
        message = self._by_receipt(receipt)
        if message is None:
            raise AwsError(
                "InvalidParameterValue",
                f"Value {receipt} for parameter ReceiptHandle is invalid. "
                "Reason: Message does not exist or is not available for visibility timeout change.",
            )
        if not message.in_flight or message.receipt != receipt:
            raise AwsError("MessageNotInflight", "The message referred to isn't in flight.")
        if visibility_s:
            self._release(message, self._groups[self._group_key(message)])
            self._hold(message, self._groups[self._group_key(message)], visibility_s)
        else:
            self._show(message)
            self.wake()

    def purge(self) -> None:
        """Delete all messages."""
        self._messages.clear()
        self._groups.clear()
        self._ready.clear()
        self._due.clear()

    def close(self) -> None:
        """Answer the waiting with nothing and stop the clock."""
        while self._polls:
            self._give_up(self._polls[0])
        if self._timer:
            self._timer.cancel()

    def _group_key(self, message: Message) -> Hashable:
        return message.group if self.fifo else message.sequence

    def _duplicate(self, deduplication_id: str) -> Message | None:
        """The message sent with this id within the window."""
        oldest = time.monotonic() - DEDUPLICATION_WINDOW_S
        while self._seen and (first := next(iter(self._seen.items())))[1][0] < oldest:
            del self._seen[first[0]]
        return self._seen.get(deduplication_id, (0.0, None))[1]

    def _by_receipt(self, receipt: str) -> Message | None:
        """The message a handle of this queue is for; None if it was deleted."""
        message_id, slash, count = receipt.rpartition("/")
        if not slash or not count.isdigit():
            raise AwsError(
                "ReceiptHandleIsInvalid",
                f'The input receipt handle "{receipt}" is not a valid receipt handle.',
                404,
            )
        return self._messages.get(message_id)

    def _hold(self, message: Message, members: Group, seconds: float) -> None:
        """Put a message in flight."""
        loop = asyncio.get_running_loop()
        message.in_flight = True
        message.visible_at = loop.time() + seconds
        members.in_flight += 1
        heapq.heappush(self._due, (message.visible_at, message.sequence, message))
        if self._timer is None or self._due[0][2] is message:
            if self._timer:
                self._timer.cancel()
            self._timer = loop.call_at(self._due[0][0], self._expire)

    def _release(self, message: Message, members: Group) -> None:
        if message.in_flight:
            message.in_flight = False
            members.in_flight -= 1

    def _forget(self, message: Message, members: Group) -> None:
        self._messages.pop(message.message_id, None)
        members.messages.pop(message.sequence, None)
        if not members.messages:
            self._groups.pop(self._group_key(message), None)

    def _show(self, message: Message) -> None:
        """Make a message in flight visible again."""
        key = self._group_key(message)
        members = self._groups[key]
        self._release(message, members)
        if not members.in_flight:
            self._ready[key] = members

    def _expire(self) -> None:
        """Show what is due. Entries of deleted and of changed messages are stale and skipped."""
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._due and self._due[0][0] <= loop.time():
            visible_at, _, message = heapq.heappop(self._due)
            current = self._messages.get(message.message_id) is message
            if current and message.in_flight and message.visible_at == visible_at:
                self._show(message)
        if self._due:
            self._timer = loop.call_at(self._due[0][0], self._expire)
        self.wake()

    def _give_up(self, poll: Poll) -> None:
        self.cancel(poll)
        poll.answer([])
