"""What the services have in common: calls, errors, and the faults a test can ask for."""

from __future__ import annotations

import base64
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

Json = dict[str, Any]
Service = Literal["sqs", "sns", "dynamodb", "elb"]

REGION: Final = "us-east-1"
ACCOUNT: Final = "000000000000"
MAX_BATCH_ENTRIES: Final = 10

# In the text of a message, of SQS and of SNS (SendMessage API, "Message characters").
ILLEGAL_IN_MESSAGE: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

# The older names of SQS errors, which SDKs still report as ``Error.Code``.
SQS_QUERY_CODES: Final = {
    "QueueDoesNotExist": "AWS.SimpleQueueService.NonExistentQueue",
    "QueueDeletedRecently": "AWS.SimpleQueueService.QueueDeletedRecently",
    "QueueNameExists": "QueueAlreadyExists",
    "TooManyEntriesInBatchRequest": "AWS.SimpleQueueService.TooManyEntriesInBatchRequest",
    "BatchRequestTooLong": "AWS.SimpleQueueService.BatchRequestTooLong",
    "EmptyBatchRequest": "AWS.SimpleQueueService.EmptyBatchRequest",
    "BatchEntryIdsNotDistinct": "AWS.SimpleQueueService.BatchEntryIdsNotDistinct",
    "InvalidBatchEntryId": "AWS.SimpleQueueService.InvalidBatchEntryId",
    "MessageNotInflight": "AWS.SimpleQueueService.MessageNotInflight",
}


class AwsError(Exception):
    """An answer that is an error: `code` as the service's model names it, and an HTTP status."""

    def __init__(self, code: str, message: str, status: int = 400, **fields: Any) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.status = status
        self.fields = fields


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One request: `request` has the shape of the SDK's keyword arguments."""

    service: Service
    operation: str
    request: Json


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with one call, here or in a proxy before another AWS.

    Fields combine; at most one of the answers is given.

    Attributes:
        delay_s: the call waits so long before anything happens.
        after_effect: the answers below replace the answer of a call that took effect; otherwise
            nothing happens but the answer.
        cut: the connection is reset instead of an answer.
        halfway: with `cut` and `after_effect`, half of the answer's body is sent before.
        silent: no answer at all; the connection stays open.
        garbage: this body is sent, with `status` (200 if that is 0).
        status, code, fields: an AWS error with this HTTP status and code; `fields` are added to
            the error's body (``CancellationReasons`` of a transaction, for one).
        failed: entries of a batch that fail: index in the batch to "the sender's fault". For
            ``BatchGetItem`` these keys come back unprocessed.
        page: a ``Query`` ends after so many items, as it does after 1 MB; 0 for no such end.
        deliveries: of an SNS publish, when copies reach a queue: given the queue's name, a delay
            in seconds for each copy. ``[]`` drops it, ``[0, 0]`` doubles it, ``[0.3]`` lets
            later ones pass.
    """

    delay_s: float = 0.0
    after_effect: bool = False
    cut: bool = False
    halfway: bool = False
    silent: bool = False
    garbage: bytes | None = None
    status: int = 0
    code: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    failed: Mapping[int, bool] = dataclasses.field(default_factory=dict)
    page: int = 0
    deliveries: Callable[[str], Sequence[float]] | None = None

    @property
    def answers(self) -> bool:
        """Whether the ordinary answer is replaced."""
        return self.cut or self.silent or self.garbage is not None or bool(self.status)

    @property
    def error(self) -> AwsError:
        """The error that answers the call, where `status` is given."""
        code = self.code or ("InternalError" if self.status >= 500 else "Throttling")
        return AwsError(code, "as the test asked", self.status, **self.fields)

    def paged(self, call: Call) -> Json:
        """The request of the call, with no more than `page` items to a page."""
        if not self.page or call.operation != "Query":
            return call.request
        return {**call.request, "Limit": min(self.page, call.request.get("Limit", self.page))}


NO_FAULT: Final = Fault()


@functools.lru_cache(maxsize=256)
def handler_name(operation: str) -> str:
    """``GetQueueUrl`` is done by ``_do_get_queue_url``."""
    return "_do" + re.sub("(?=[A-Z])", "_", operation).lower()


def attribute_value(attribute: Json) -> bytes:
    """A message attribute's value; SQS and SNS write them alike."""
    if attribute["DataType"].startswith("Binary"):
        return base64.b64decode(attribute.get("BinaryValue") or "")
    return str(attribute.get("StringValue") or "").encode()


def attributes_bytes(attributes: Json) -> int:
    """The size of message attributes as SQS and SNS count it: names, types and values."""
    return sum(
        len(name.encode()) + len(a["DataType"].encode()) + len(attribute_value(a))
        for name, a in attributes.items()
    )
