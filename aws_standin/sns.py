"""SNS: standard topics and their subscriptions by queues."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

from aws_standin.model import (
    ACCOUNT,
    ILLEGAL_IN_MESSAGE,
    MAX_BATCH_ENTRIES,
    REGION,
    AwsError,
    Fault,
    Json,
    attributes_bytes,
    handler_name,
)
from aws_standin.queues import Queue
from aws_standin.sqs import Sqs

MAX_SNS_BYTES: Final = 262_144
MAX_RAW_ATTRIBUTES: Final = 10
SUBSCRIPTIONS_PAGE: Final = 100


@dataclasses.dataclass(slots=True, eq=False)
class Subscription:
    """A queue's subscription to a topic."""

    arn: str
    topic_arn: str
    endpoint: str
    attributes: dict[str, str]


class Sns:
    """Standard topics that deliver to queues of the same stand-in, if the policies allow it."""

    def __init__(self, sqs: Sqs) -> None:
        self.topics: set[str] = set()
        self.subscriptions: dict[str, Subscription] = {}
        self._sqs = sqs

    def perform(self, operation: str, request: Json, fault: Fault) -> Json:
        """Do one operation and return its result for `_xml`."""
        if operation == "Publish":
            self._check(request)
            return {"MessageId": self._publish(request["TopicArn"], request, fault)}
        if operation == "PublishBatch":
            return self._publish_batch(request, fault)
        handler: Callable[[Json], Json] | None = getattr(self, handler_name(operation), None)
        if handler is None:
            raise AwsError("InvalidAction", f"SNS has no operation {operation} here.")
        return handler(request)

    def create(self, name: str) -> str:
        """Make a topic and return its ARN."""
        arn = f"arn:aws:sns:{REGION}:{ACCOUNT}:{name}"
        self.topics.add(arn)
        return arn

    def _do_create_topic(self, request: Json) -> Json:
        return {"TopicArn": self.create(request["Name"])}

    def _do_delete_topic(self, request: Json) -> Json:
        self.topics.discard(request["TopicArn"])
        for arn, subscription in list(self.subscriptions.items()):
            if subscription.topic_arn == request["TopicArn"]:
                del self.subscriptions[arn]
        return {}

    def _topic(self, request: Json) -> str:
        arn: str = request.get("TopicArn") or ""
        if arn not in self.topics:
            raise AwsError("NotFound", "Topic does not exist", 404)
        return arn

    def _do_subscribe(self, request: Json) -> Json:
        topic, endpoint = self._topic(request), request.get("Endpoint") or ""
        if request.get("Protocol") != "sqs" or not endpoint.startswith("arn:aws:sqs:"):
            raise AwsError("InvalidParameter", "Invalid parameter: SQS endpoint ARN")
        attributes = dict(request.get("Attributes") or {})
        _check_filter(attributes.get("FilterPolicy"))
        for subscription in self.subscriptions.values():
            if (subscription.topic_arn, subscription.endpoint) == (topic, endpoint):
                if subscription.attributes != attributes:
                    raise AwsError(
                        "InvalidParameter",
                        "Invalid parameter: Attributes Reason: Subscription already exists with "
                        "different attributes",
                    )
                return {"SubscriptionArn": subscription.arn}
        arn = f"{topic}:{uuid.uuid4()}"
        self.subscriptions[arn] = Subscription(arn, topic, endpoint, attributes)
        return {"SubscriptionArn": arn}

    def _do_unsubscribe(self, request: Json) -> Json:
        self.subscriptions.pop(request["SubscriptionArn"], None)
        return {}

    def _do_get_subscription_attributes(self, request: Json) -> Json:
        subscription = self.subscriptions.get(request["SubscriptionArn"])
        if subscription is None:
            raise AwsError("NotFound", "Subscription does not exist", 404)
        attributes = {
            "SubscriptionArn": subscription.arn,
            "TopicArn": subscription.topic_arn,
            "Protocol": "sqs",
            "Endpoint": subscription.endpoint,
            "Owner": ACCOUNT,
            "PendingConfirmation": "false",
            "RawMessageDelivery": "false",
            **subscription.attributes,
        }
        return {"Attributes": {"entry": [{"key": k, "value": v} for k, v in attributes.items()]}}

    def _do_list_subscriptions_by_topic(self, request: Json) -> Json:
        topic, start = self._topic(request), int(request.get("NextToken") or 0)
        found = [s for s in self.subscriptions.values() if s.topic_arn == topic]
        members = [
            {
                "SubscriptionArn": s.arn,
                "Owner": ACCOUNT,
                "Protocol": "sqs",
                "Endpoint": s.endpoint,
                "TopicArn": s.topic_arn,
            }
            for s in found[start : start + SUBSCRIPTIONS_PAGE]
        ]
        answer: Json = {"Subscriptions": {"member": members}}
        if start + SUBSCRIPTIONS_PAGE < len(found):
            answer["NextToken"] = str(start + SUBSCRIPTIONS_PAGE)
        return answer

    def _check(self, entry: Json) -> int:
        message = entry.get("Message") or ""
        if not message:
            raise AwsError("InvalidParameter", "Invalid parameter: Empty message")
        if ILLEGAL_IN_MESSAGE.search(message):
            raise AwsError(
                "InvalidParameter", "Invalid parameter: Message has an invalid character"
            )
        size = len(message.encode()) + attributes_bytes(entry.get("MessageAttributes") or {})
        if size > MAX_SNS_BYTES:
            raise AwsError("InvalidParameter", "Invalid parameter: Message too long")
        return size

    def _publish_batch(self, request: Json, fault: Fault) -> Json:
        topic = self._topic(request)
        entries: list[Json] = request.get("PublishBatchRequestEntries") or []
        ids = [e.get("Id", "") for e in entries]
        if not entries:
            raise AwsError("EmptyBatchRequest", "The batch request doesn't contain any entries.")
        if len(entries) > MAX_BATCH_ENTRIES:
            raise AwsError(
                "TooManyEntriesInBatchRequest", "The batch request contains more entries than 10."
            )
        if len(set(ids)) < len(ids):
            raise AwsError("BatchEntryIdsNotDistinct", "Two or more entries have the same Id.")
        if sum(self._check(e) for e in entries) > MAX_SNS_BYTES:
            raise AwsError(
                "BatchRequestTooLong",
                "The length of all the batch messages put together is more than the limit.",
            )
        successful: list[Json] = []
        failures: list[Json] = []
        for index, entry in enumerate(entries):
            if index in fault.failed:
                failures.append(
                    {
                        "Id": entry["Id"],
                        "Code": "InvalidParameter" if fault.failed[index] else "InternalError",
                        "Message": "as the test asked",
                        "SenderFault": "true" if fault.failed[index] else "false",
                    }
                )
            else:
                message_id = self._publish(topic, entry, fault)
                successful.append({"Id": entry["Id"], "MessageId": message_id})
        return {"Successful": {"member": successful}, "Failed": {"member": failures}}

    def _publish(self, topic: str, entry: Json, fault: Fault) -> str:
        if topic not in self.topics:
            raise AwsError("NotFound", "Topic does not exist", 404)
        message_id = str(uuid.uuid4())
        loop = asyncio.get_running_loop()
        for subscription in self.subscriptions.values():
            if subscription.topic_arn != topic:
                continue
            deliver = functools.partial(self._deliver, subscription, message_id, entry)
            queue_name = subscription.endpoint.rpartition(":")[2]
            for delay_s in fault.deliveries(queue_name) if fault.deliveries else (0.0,):
                if delay_s:
                    loop.call_later(delay_s, deliver)
                else:
                    loop.call_soon(deliver)
        return message_id

    def _deliver(self, subscription: Subscription, message_id: str, entry: Json) -> None:
        """Put one copy into a queue. What cannot be delivered is lost, as AWS does it."""
        queue = self._sqs.by_arn(subscription.endpoint)
        if queue is None or not _may_send(queue.attributes.get("Policy"), queue, subscription):
            return
        attributes: Json = entry.get("MessageAttributes") or {}
        if not _wanted(subscription.attributes.get("FilterPolicy"), attributes):
            return
        if subscription.attributes.get("RawMessageDelivery") == "true":
            if len(attributes) <= MAX_RAW_ATTRIBUTES:
                queue.push(entry["Message"], attributes)
        else:
            envelope = {
                "Type": "Notification",
                "MessageId": message_id,
                "TopicArn": subscription.topic_arn,
                "Message": entry["Message"],
                "Timestamp": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
                "UnsubscribeURL": f"arn={subscription.arn}",
            }
            if attributes:
                envelope["MessageAttributes"] = {
                    k: {"Type": a["DataType"], "Value": a.get("StringValue") or ""}
                    for k, a in attributes.items()
                }
            queue.push(json.dumps(envelope))
        queue.wake()


@functools.lru_cache(maxsize=1024)
def _filter_policy(policy: str) -> dict[str, list[Any]]:
    rules: dict[str, list[Any]] = json.loads(policy)
    return rules


def _check_filter(policy: str | None) -> None:
    """Raise if SNS would refuse a subscription with this filter policy."""
    try:
        rules = _filter_policy(policy or "{}")
        for alternatives in rules.values():
            if not isinstance(alternatives, list):
                raise TypeError("a rule must be in an array")
            for rule in alternatives:
                _matches(rule, "")
    except (ValueError, TypeError, AttributeError) as error:
        raise AwsError("InvalidParameter", f"Invalid parameter: FilterPolicy: {error}") from None


def _wanted(policy: str | None, attributes: Json) -> bool:
    """Whether a filter policy lets a message with these attributes through: all names, any rule."""
    for name, rules in _filter_policy(policy or "{}").items():
        value = attributes.get(name, {}).get("StringValue")
        if not any(_matches(rule, value) for rule in rules):
            return False
    return True


def _matches(rule: Any, value: str | None) -> bool:
    """One rule of a filter policy: a string, or one of the operators a gateway might use.

    Raises:
        AwsError: an operator this stand-in does not know.
    """
    if not isinstance(rule, dict):
        return value is not None and value == rule
    [(operator, operand)] = rule.items()
    match operator:
        case "exists":
            return bool(operand) == (value is not None)
        case "anything-but":
            others = operand if isinstance(operand, list) else [operand]
            return value is not None and value not in others
        case "prefix":
            return value is not None and value.startswith(operand)
    raise AwsError("InvalidParameter", f"Invalid parameter: FilterPolicy: {operator}")


@functools.lru_cache(maxsize=1024)
def _statements(policy: str) -> list[Json]:
    statements = json.loads(policy).get("Statement", [])
    return statements if isinstance(statements, list) else [statements]


def _may_send(policy: str | None, queue: Queue, subscription: Subscription) -> bool:
    """Whether the queue's policy lets this topic send to it."""

    def values(value: Any) -> list[str]:
        return [value] if isinstance(value, str) else list(value or ())

    for statement in _statements(policy or "{}"):
        principal = statement.get("Principal")
        named = principal if isinstance(principal, dict) else {"AWS": principal}
        allowed = (
            statement.get("Effect") == "Allow"
            and ("sns.amazonaws.com" in values(named.get("Service")) or named.get("AWS") == "*")
            and {a.lower() for a in values(statement.get("Action"))}
            & {"sqs:sendmessage", "sqs:*", "*"}
            and {queue.arn, "*"} & set(values(statement.get("Resource")))
        )
        sources = [
            source
            for operator, keys in (statement.get("Condition") or {}).items()
            if operator in ("ArnEquals", "ArnLike", "StringEquals", "StringLike")
            for key, source in keys.items()
            if key.lower() == "aws:sourcearn"
        ]
        if allowed and all(subscription.topic_arn in values(source) for source in sources):
            return True
    return False
