"""The operations of SQS, with its rules about names, sizes, characters and batches."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from aws_standin.model import (
    ACCOUNT,
    ILLEGAL_IN_MESSAGE,
    MAX_BATCH_ENTRIES,
    SQS_QUERY_CODES,
    AwsError,
    Json,
    attribute_value,
    attributes_bytes,
    handler_name,
)
from aws_standin.queues import DEFAULT_QUEUE_ATTRIBUTES, MAX_SQS_BYTES, Message, Poll, Queue

DELETED_NAME_BLOCKED_S: Final = 60.0

SETTABLE_QUEUE_ATTRIBUTES: Final = frozenset(DEFAULT_QUEUE_ATTRIBUTES) | {
    "ContentBasedDeduplication",
    "DeduplicationScope",
    "FifoQueue",
    "FifoThroughputLimit",
    "KmsDataKeyReusePeriodSeconds",
    "KmsMasterKeyId",
    "Policy",
    "RedriveAllowPolicy",
    "RedrivePolicy",
}

_ENTRY_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")
_QUEUE_NAME = re.compile(r"[A-Za-z0-9_-]{1,75}\.fifo|[A-Za-z0-9_-]{1,80}")
# Letters, digits and ASCII punctuation: everything printable but the space.
_GROUP_ID = re.compile(r"[!-~]{1,128}")


class Sqs:
    """The operations of SQS. A ``ReceiveMessage`` that has to wait is answered with a `Poll`."""

    def __init__(self) -> None:
        self.queues: dict[str, Queue] = {}
        self.base_url = ""
        self._deleted: dict[str, float] = {}

    def perform(self, operation: str, request: Json, failed: Mapping[int, bool]) -> Json | Poll:
        """Do one operation. `failed` names entries of a batch that must not succeed."""
        handler: Callable[[Json], Json | Poll] | None = getattr(self, handler_name(operation), None)
        if handler is not None:
            return handler(request)
        match operation:
            case "SendMessageBatch":
                return self._send_batch(request, failed)
            case "DeleteMessageBatch":
                queue = self._queue(request)
                return _batch(request, failed, lambda e: queue.delete(e["ReceiptHandle"]))
            case "ChangeMessageVisibilityBatch":
                return _batch(request, failed, functools.partial(self._change, request))
        raise AwsError("InvalidAction", f"SQS has no operation {operation} here.")

    def url(self, name: str) -> str:
        """The URL of the queue of this name."""
        return f"{self.base_url}/{ACCOUNT}/{name}"

    def by_arn(self, arn: str) -> Queue | None:
        """The queue with this ARN, if it exists."""
        return self.queues.get(arn.rpartition(":")[2])

    def create(
        self, name: str, attributes: Mapping[str, str] | None = None, tags: Json | None = None
    ) -> Queue:
        """Make a queue; the rules of ``CreateQueue`` apply."""
        attributes = attributes or {}
        if not _QUEUE_NAME.fullmatch(name):
            raise _bad_value(
                "Can only include alphanumeric characters, hyphens, or underscores. "
                "1 to 80 in length"
            )
        for attribute in attributes:
            if attribute not in SETTABLE_QUEUE_ATTRIBUTES:
                raise AwsError("InvalidAttributeName", f"Unknown Attribute {attribute}.")
        if name.endswith(".fifo") != (attributes.get("FifoQueue") == "true"):
            raise _bad_value(
                "The name of a FIFO queue can only include alphanumeric characters, hyphens, or "
                "underscores, must end with .fifo suffix and be 1 to 80 in length."
            )
        if queue := self.queues.get(name):
            if any(queue.attributes.get(k) != v for k, v in attributes.items()):
                raise AwsError(
                    "QueueNameExists",
                    "A queue already exists with the same name and a different value for "
                    "an attribute",
                )
            return queue
        if time.monotonic() - self._deleted.get(name, -1e9) < DELETED_NAME_BLOCKED_S:
            raise AwsError(
                "QueueDeletedRecently",
                "You must wait 60 seconds after deleting a queue before you can create "
                "another with the same name.",
            )
        queue = self.queues[name] = Queue(name, attributes, tags or {})
        queue.bury = self._bury
        return queue

    def delete(self, queue: Queue) -> None:
        """Remove a queue; those who wait on it are answered with nothing."""
        del self.queues[queue.name]
        self._deleted[queue.name] = time.monotonic()
        queue.close()

    def _bury(self, arn: str, message: Message) -> bool:
        dead_letters = self.by_arn(arn)
        if dead_letters is None:
            return False
        dead_letters.push(
            message.body,
            message.attributes,
            message.group,
            # A dead-letter queue deduplicates too: what is moved must not fall to what was.
            f"{message.deduplication_id}/{message.message_id}" if dead_letters.fifo else None,
            message_id=message.message_id,
        )
        asyncio.get_running_loop().call_soon(dead_letters.wake)
        return True

    def _queue(self, request: Json) -> Queue:
        url = str(request.get("QueueUrl") or "")
        queue = self.queues.get(url.rpartition("/")[2])
        if queue is None:
            raise AwsError("QueueDoesNotExist", "The specified queue does not exist.")
        return queue

    def _check(self, queue: Queue, entry: Json) -> int:
        """Raise if SQS would refuse this message; return its size in bytes."""
        body = entry.get("MessageBody") or ""
        if not body:
            raise _missing("MessageBody")
        attributes: Json = entry.get("MessageAttributes") or {}
        texts = [body, *(str(a.get("StringValue") or "") for a in attributes.values())]
        if any(ILLEGAL_IN_MESSAGE.search(text) for text in texts):
            raise AwsError(
                "InvalidMessageContents",
                "Invalid binary character was found in the message body, the set of allowed "
                "characters is #x9 | #xA | #xD | #x20 to #xD7FF | #xE000 to #xFFFD | "
                "#x10000 to #x10FFFF.",
            )
        if len(attributes) > 10:
            raise _bad_value("Number of message attributes [11] exceeds the allowed maximum [10].")
        group, deduplication_id = entry.get("MessageGroupId"), entry.get("MessageDeduplicationId")
        if queue.fifo and not group:
            raise _missing("MessageGroupId")
        content_based = queue.attributes.get("ContentBasedDeduplication") == "true"
        if queue.fifo and not deduplication_id and not content_based:
            raise _bad_value(
                "The queue should either have ContentBasedDeduplication enabled or "
                "MessageDeduplicationId provided explicitly"
            )
        if not queue.fifo and deduplication_id:
            raise _bad_value(
                f"Value {deduplication_id} for parameter MessageDeduplicationId is invalid. "
                "Reason: The request includes a parameter that is not valid for this queue type."
            )
        for name in ("MessageGroupId", "MessageDeduplicationId"):
            if entry.get(name) and not _GROUP_ID.fullmatch(entry[name]):
                raise _bad_value(
                    f"Value {entry[name]} for parameter {name} is invalid. Reason: {name} can "
                    "only include alphanumeric and punctuation characters. 1 to 128 in length."
                )
        return len(body.encode()) + attributes_bytes(attributes)

    def _push(self, queue: Queue, entry: Json) -> Json:
        message = queue.push(
            entry["MessageBody"],
            entry.get("MessageAttributes") or {},
            entry.get("MessageGroupId"),
            entry.get("MessageDeduplicationId"),
            float(entry.get("DelaySeconds", queue.attributes["DelaySeconds"])),
        )
        result = {"MessageId": message.message_id, "MD5OfMessageBody": _md5(message.body)}
        if message.attributes:
            result["MD5OfMessageAttributes"] = _attributes_md5(message.attributes)
        if queue.fifo:
            result["SequenceNumber"] = f"{message.sequence:020}"
        return result

    def _do_send_message(self, request: Json) -> Json:
        queue = self._queue(request)
        if self._check(queue, request) > int(queue.attributes["MaximumMessageSize"]):
            raise _too_long(queue)
        result = self._push(queue, request)
        queue.wake()
        return result

    def _send_batch(self, request: Json, failed: Mapping[int, bool]) -> Json:
        queue = self._queue(request)
        entries = _entries(request)
        sizes = {e["Id"]: self._check(queue, e) for e in entries}
        if (total := sum(sizes.values())) > MAX_SQS_BYTES:
            raise AwsError(
                "BatchRequestTooLong",
                f"Batch requests cannot be longer than 1048576 bytes. You have sent {total} bytes.",
            )

        def push(entry: Json) -> Json:
            if sizes[entry["Id"]] > int(queue.attributes["MaximumMessageSize"]):
                raise _too_long(queue)
            return self._push(queue, entry)

        result = _batch(request, failed, push)
        queue.wake()
        return result

    def _do_receive_message(self, request: Json) -> Json | Poll:
        queue = self._queue(request)
        limit = int(request.get("MaxNumberOfMessages", 1))
        wait_s = float(
            request.get("WaitTimeSeconds", queue.attributes["ReceiveMessageWaitTimeSeconds"])
        )
        visibility_s = float(
            request.get("VisibilityTimeout", queue.attributes["VisibilityTimeout"])
        )
        for name, value, low, high in (
            ("MaxNumberOfMessages", limit, 1, 10),
            ("WaitTimeSeconds", wait_s, 0, 20),
            ("VisibilityTimeout", visibility_s, 0, 43200),
        ):
            if not low <= value <= high:
                raise _bad_value(
                    f"Value {value} for parameter {name} is invalid. "
                    f"Reason: Must be between {low} and {high}, if provided."
                )
        messages = queue.take(limit, visibility_s)
        if messages or not wait_s:
            return self.received(request, messages)
        return Poll(limit, visibility_s, lambda _messages: None)

    def wait(self, request: Json, poll: Poll) -> Queue:
        """Start the waiting of a long poll; its `answer` is called once, unless cancelled."""
        queue = self._queue(request)
        queue.poll(
            poll,
            float(
                request.get("WaitTimeSeconds", queue.attributes["ReceiveMessageWaitTimeSeconds"])
            ),
        )
        return queue

    def received(self, request: Json, messages: list[Message]) -> Json:
        """The answer of ``ReceiveMessage`` for these messages."""
        wanted = {
            *(request.get("AttributeNames") or ()),
            *(request.get("MessageSystemAttributeNames") or ()),
        }
        names = list(request.get("MessageAttributeNames") or ())
        answer = []
        for message in messages:
            shown: Json = {
                "MessageId": message.message_id,
                "ReceiptHandle": message.receipt,
                "MD5OfBody": _md5(message.body),
                "Body": message.body,
            }
            if wanted:
                system = _system_attributes(message)
                shown["Attributes"] = {
                    k: v for k, v in system.items() if k in wanted or "All" in wanted
                }
            chosen = {k: v for k, v in message.attributes.items() if _matches(k, names)}
            if chosen:
                shown["MessageAttributes"] = chosen
                shown["MD5OfMessageAttributes"] = _attributes_md5(chosen)
            answer.append(shown)
        return {"Messages": answer} if answer else {}

    def _do_delete_message(self, request: Json) -> Json:
        self._queue(request).delete(request["ReceiptHandle"])
        return {}

    def _change(self, request: Json, entry: Json) -> None:
        seconds = int(entry.get("VisibilityTimeout", -1))
        if not 0 <= seconds <= 43200:
            raise _bad_value(
                f"Value {seconds} for parameter VisibilityTimeout is invalid. "
                "Reason: VisibilityTimeout must be an integer between 0 and 43200."
            )
        self._queue(request).change_visibility(entry["ReceiptHandle"], seconds)

    def _do_change_message_visibility(self, request: Json) -> Json:
        self._change(request, request)
        return {}

    def _do_create_queue(self, request: Json) -> Json:
        queue = self.create(request["QueueName"], request.get("Attributes"), request.get("tags"))
        return {"QueueUrl": self.url(queue.name)}

    def _do_delete_queue(self, request: Json) -> Json:
        self.delete(self._queue(request))
        return {}

    def _do_purge_queue(self, request: Json) -> Json:
        self._queue(request).purge()
        return {}

    def _do_get_queue_url(self, request: Json) -> Json:
        if request["QueueName"] not in self.queues:
            raise AwsError("QueueDoesNotExist", "The specified queue does not exist.")
        return {"QueueUrl": self.url(request["QueueName"])}

    def _do_list_queues(self, request: Json) -> Json:
        prefix = request.get("QueueNamePrefix") or ""
        names = sorted(name for name in self.queues if name.startswith(prefix))
        after = request.get("NextToken") or ""
        limit = int(request.get("MaxResults") or 1000)
        page = [name for name in names if name > after]
        answer: Json = {"QueueUrls": [self.url(name) for name in page[:limit]]} if page else {}
        # Without MaxResults AWS answers with the first thousand and no token.
        if len(page) > limit and request.get("MaxResults"):
            answer["NextToken"] = page[limit - 1]
        return answer

    def _do_list_queue_tags(self, request: Json) -> Json:
        tags = self._queue(request).tags
        return {"Tags": tags} if tags else {}

    def _do_tag_queue(self, request: Json) -> Json:
        self._queue(request).tags.update(request["Tags"])
        return {}

    def _do_untag_queue(self, request: Json) -> Json:
        for key in request["TagKeys"]:
            self._queue(request).tags.pop(key, None)
        return {}

    def _do_set_queue_attributes(self, request: Json) -> Json:
        self._queue(request).attributes.update(request["Attributes"])
        return {}

    def _do_get_queue_attributes(self, request: Json) -> Json:
        queue = self._queue(request)
        names = set(request.get("AttributeNames") or ())
        in_flight = queue.in_flight
        attributes = {
            **queue.attributes,
            "QueueArn": queue.arn,
            "CreatedTimestamp": str(queue.created_s),
            "LastModifiedTimestamp": str(queue.created_s),
            "ApproximateNumberOfMessages": str(len(queue.messages) - in_flight),
            "ApproximateNumberOfMessagesNotVisible": str(in_flight),
            "ApproximateNumberOfMessagesDelayed": "0",
        }
        if unknown := names - set(attributes) - SETTABLE_QUEUE_ATTRIBUTES - {"All"}:
            raise AwsError("InvalidAttributeName", f"Unknown Attribute {min(unknown)}.")
        shown = {k: v for k, v in attributes.items() if k in names or "All" in names}
        return {"Attributes": shown} if shown else {}


def _bad_value(message: str) -> AwsError:
    return AwsError("InvalidParameterValue", message)


def _missing(name: str) -> AwsError:
    return AwsError("MissingParameter", f"The request must contain the parameter {name}.")


def _too_long(queue: Queue) -> AwsError:
    limit = queue.attributes["MaximumMessageSize"]
    return _bad_value(
        f"One or more parameters are invalid. Reason: Message must be shorter than {limit} bytes."
    )


def _entries(request: Json) -> list[Json]:
    """The entries of an SQS batch; raises on what fails the call as a whole."""
    entries: list[Json] = request.get("Entries") or []
    ids = [e.get("Id", "") for e in entries]
    if not entries:
        raise AwsError("EmptyBatchRequest", "There should be at least one entry in the request.")
    if len(entries) > MAX_BATCH_ENTRIES:
        raise AwsError(
            "TooManyEntriesInBatchRequest",
            f"Maximum number of entries per request are 10. You have sent {len(entries)}.",
        )
    if not all(_ENTRY_ID.fullmatch(i) for i in ids):
        raise AwsError(
            "InvalidBatchEntryId",
            "A batch entry id can only contain alphanumeric characters, hyphens and underscores. "
            "It can be at most 80 letters long.",
        )
    if len(set(ids)) < len(ids):
        raise AwsError("BatchEntryIdsNotDistinct", "Two or more entries have the same Id.")
    return entries


def _batch(request: Json, failed: Mapping[int, bool], act: Callable[[Json], Json | None]) -> Json:
    """Do `act` for each entry, and sort the results into ``Successful`` and ``Failed``."""
    successful: list[Json] = []
    failures: list[Json] = []
    for index, entry in enumerate(_entries(request)):
        try:
            if index in failed:
                code = "InvalidParameterValue" if failed[index] else "InternalError"
                raise AwsError(code, "as the test asked", 400 if failed[index] else 500)
            successful.append({"Id": entry["Id"], **(act(entry) or {})})
        except AwsError as error:
            failures.append(
                {
                    "Id": entry["Id"],
                    "SenderFault": error.status < 500,
                    "Code": SQS_QUERY_CODES.get(error.code, error.code),
                    "Message": error.message,
                }
            )
    answer: Json = {"Successful": successful}
    if failures:
        answer["Failed"] = failures
    return answer


def _system_attributes(message: Message) -> dict[str, str]:
    attributes = {
        "SenderId": "AIDAIT2UOQQY3AUEKVGXU",
        "SentTimestamp": str(message.sent_ms),
        "ApproximateReceiveCount": str(message.receive_count),
        "ApproximateFirstReceiveTimestamp": str(message.first_receive_ms),
    }
    if message.group is not None:
        attributes["MessageGroupId"] = message.group
    if message.deduplication_id is not None:
        attributes["MessageDeduplicationId"] = message.deduplication_id
        attributes["SequenceNumber"] = f"{message.sequence:020}"
    return attributes


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a message attribute was asked for: by name, by ``prefix.*`` or by ``All``."""
    return any(
        p in (name, "All", ".*") or (p.endswith(".*") and name.startswith(p[:-2])) for p in patterns
    )


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _attributes_md5(attributes: Json) -> str:
    """The digest that SDKs compare: each name, type and value, length first, names in order."""
    digest = hashlib.md5(usedforsecurity=False)

    def add(value: bytes) -> None:
        digest.update(len(value).to_bytes(4, "big") + value)

    for name in sorted(attributes):
        attribute = attributes[name]
        add(name.encode())
        add(attribute["DataType"].encode())
        binary = attribute["DataType"].startswith("Binary")
        digest.update(b"\x02" if binary else b"\x01")
        add(attribute_value(attribute))
    return digest.hexdigest()
