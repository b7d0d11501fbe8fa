"""What a task depends on in AWS: what fails, what works again, and what `/health` says of it."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import Any

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    ParamValidationError,
    ReadTimeoutError,
)
from hypothesis import given
from hypothesis import strategies as st

import aws_standin
import server
from aws_standin import Fault, StandIn
from server import Aws, Dependency, UpstreamLost
from tests.server.aws import SERVER_ERROR, always, deny, faults, news, push
from tests.server.gateways import client_of, running_gateway
from tests.server.peers import fetch
from tests.waiting import eventually


class Clock:
    """A monotonic clock that a test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr("server.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def fail(dependency: Dependency, clock: Clock, operation: str, *, for_s: float) -> None:
    """Let an operation fail every five seconds, for ``for_s`` seconds."""
    until = clock.now + for_s
    dependency.failed(TimeoutError(), operation)
    while clock.now < until:
        clock.now += 5.0
        dependency.failed(TimeoutError(), operation)


class TestDependency:
    def test_fails_after_a_while(self, clock: Clock) -> None:
        """An operation fails after fifteen seconds of errors, and no longer once it works."""
        dependency = Dependency("queue")
        states = [dependency.failing_operation]
        for seconds_later in (0.0, server.Dependency.FAILING_AFTER_S, 0.1):
            clock.now += seconds_later
            dependency.failed(TimeoutError(), "Receive")
            states.append(dependency.failing_operation)
        dependency.worked("Receive")
        states.append(dependency.failing_operation)
        assert states == [None, None, None, "Receive", None]

    def test_success_of_another_operation(self, clock: Clock) -> None:
        """What works does not hide what fails."""
        dependency = Dependency("event log")
        fail(dependency, clock, "TransactWriteItems", for_s=20)
        dependency.worked("Query")
        assert dependency.failing_operation == "TransactWriteItems"

    def test_failure_that_nobody_repeats(self, clock: Clock) -> None:
        """An operation that is not called any more fails no longer; two errors are no outage."""
        dependency = Dependency("event log")
        fail(dependency, clock, "GetItem", for_s=20)
        clock.now += server.Dependency.FORGOTTEN_AFTER_S + 1
        assert dependency.failing_operation is None
        dependency.failed(TimeoutError(), "GetItem")
        assert dependency.failing_operation is None

    def test_logs_once(self, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
        """An outage is two lines in the log, however many calls of whatever operation fail."""
        dependency = Dependency("queue")
        with caplog.at_level("INFO", "gateway"):
            for _ in range(5):
                dependency.failed(deny("SlowDown"), "Receive")
                dependency.worked("Delete")
                clock.now += 1.0
            dependency.worked("Receive")
            dependency.worked("Receive")
        assert caplog.messages == [
            "queue: Receive failed with SlowDown, retrying",
            "queue: Receive works again",
        ]

    def test_logs_now_and_then(self, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
        """An operation that fails and works in turns is in the log about once a minute."""
        dependency = Dependency("queue")
        with caplog.at_level("INFO", "gateway"):
            for _ in range(1_000):  # of 100 s
                dependency.failed(deny("SlowDown"), "Receive")
                dependency.worked("Receive")
                clock.now += 0.1
        assert (
            caplog.messages
            == [
                "queue: Receive failed with SlowDown, retrying",
                "queue: Receive works again",
            ]
            * 2
        )

    def test_logs_a_second_outage(self, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
        """An outage soon after another one is in the log as well, if it lasts."""
        dependency = Dependency("queue")
        with caplog.at_level("INFO", "gateway"):
            dependency.failed(deny("SlowDown"), "Receive")
            dependency.worked("Receive")
            clock.now += 1.0
            fail(dependency, clock, "Receive", for_s=90)
            dependency.worked("Receive")
        assert caplog.messages == [
            "queue: Receive failed with SlowDown, retrying",
            "queue: Receive works again",
            "queue: Receive failed with TimeoutError, retrying",
            "queue: Receive works again",
        ]

    def test_logs_what_goes_on(self, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
        """An outage that goes on is in the log about once a minute, and its end once."""
        dependency = Dependency("queue")
        with caplog.at_level("INFO", "gateway"):
            fail(dependency, clock, "Receive", for_s=150)
            dependency.worked("Receive")
        assert caplog.messages == [
            *["queue: Receive failed with TimeoutError, retrying"] * 3,
            "queue: Receive works again",
        ]

    @pytest.mark.usefixtures("impatient")
    async def test_retry(self) -> None:
        """A call that fails in passing is made again until it works."""
        outcomes: deque[Exception | str] = deque([deny("SlowDown"), OSError(), "done"])

        async def receive_message() -> str:
            outcome = outcomes.popleft()
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        assert await Dependency("queue").retry(receive_message) == "done"

    @pytest.mark.usefixtures("impatient")
    async def test_retry_has_a_timeout(self) -> None:
        """A call that never returns is given up and made again."""
        calls = 0

        async def receive_message() -> int:
            nonlocal calls
            calls += 1
            if calls == 1:
                await asyncio.Event().wait()
            return calls

        assert await Dependency("queue").retry(receive_message) == 2

    @pytest.mark.usefixtures("impatient")
    async def test_retry_of_a_read_beside_a_write(self) -> None:
        """A read that is cancelled because of a write at the same time is made again."""
        outcomes: deque[Exception | dict[str, list[str]]] = deque()
        outcomes += [cancelled("TransactionConflict"), {}, {"Responses": []}]

        async def transact_get_items() -> dict[str, list[str]]:
            outcome = outcomes.popleft()
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        assert await Dependency("event log").retry(transact_get_items) == {"Responses": []}

    async def test_retry_gives_up(self) -> None:
        """A call that AWS refuses for good ends in one sentence that says what is lost."""

        async def query() -> None:
            raise deny("ResourceNotFoundException")

        with pytest.raises(UpstreamLost, match=r"^event log: Query .* ResourceNotFoundException"):
            await Dependency("event log").retry(query)

    @pytest.mark.parametrize("fault", [AttributeError, TypeError, ZeroDivisionError])
    async def test_retry_lets_faults_of_ours_through(self, fault: type[Exception]) -> None:
        """What is no error of AWS's is not retried."""

        async def query() -> None:
            raise fault

        with pytest.raises(fault):
            await asyncio.wait_for(Dependency("event log").retry(query), 5)

    async def test_parameter_that_cannot_be_sent(self, aws: Aws) -> None:
        """A parameter that the SDK cannot write down is a fault of ours, and not retried."""
        keys: Any = {"table": 5}
        with pytest.raises((AttributeError, TypeError)):
            await asyncio.wait_for(
                Dependency("event log").retry(aws.dynamodb.batch_get_item, RequestItems=keys), 5
            )

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("answer", [b'{"Items":5}', b'{"Items":[5]}', b'{"Items":[{"PK":5}]}'])
    async def test_answer_that_the_sdk_cannot_read(
        self, aws: Aws, platform: aws_standin.Platform, stand_in: StandIn, answer: bytes
    ) -> None:
        """An answer that is not of AWS's making is asked for again."""
        stand_in.fault = faults("Query", Fault(garbage=answer))
        found = await Dependency("event log").retry(
            aws.dynamodb.query,
            TableName=platform.events_table_name,
            KeyConditionExpression="PK = :pk",
            ExpressionAttributeValues={":pk": {"S": "x"}},
        )
        assert found["Items"] == []


class TestHealth:
    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize(
        ("operation", "part"),
        [("TransactWriteItems", "event log"), ("Publish", "fan-out")],
    )
    async def test_names_part_and_operation(
        self,
        platform: aws_standin.Platform,
        stand_in: StandIn,
        monkeypatch: pytest.MonkeyPatch,
        operation: str,
        part: str,
    ) -> None:
        """One operation fails while all others work: /health is 503 for as long, then 200."""
        monkeypatch.setattr(server.Dependency, "FAILING_AFTER_S", 0.2)
        async with running_gateway(platform, topic=True) as gateway, client_of(gateway) as client:
            stand_in.fault = always(operation, SERVER_ERROR)
            push(stand_in, *news(1))
            await eventually(lambda: gateway.health() != {"status": "ok"})
            for number in range(30):  # reads, which work, of projects that were never read
                await client.send(action="subscribe", project_id=f"p{number}")
                assert (await client.receive())["type"] == "subscription_confirmed"
                status, _, body = await fetch(gateway, "/health")
                assert status == 503
                assert json.loads(body) == {"status": part, "operation": operation}
            stand_in.fault = None
            await eventually(lambda: gateway.health() == {"status": "ok"})
            assert (await fetch(gateway, "/health"))[0] == 200


def cancelled(*codes: str) -> ClientError:
    """A transaction that was not done, with a reason for each of its items."""
    reasons = [{"Code": code} for code in codes]
    return deny("TransactionCanceledException", CancellationReasons=reasons)


class TestErrors:
    @pytest.mark.parametrize(
        "error",
        [
            deny("ThrottlingException"),
            deny("RequestThrottled"),
            deny("Whatever", status=500),
            deny("Whatever", status=503),
            deny("Whatever", status=429),
            deny("ExpiredToken", status=403),
            cancelled("None", "TransactionConflict", "ThrottlingError"),
            ConnectTimeoutError(endpoint_url="http://localhost"),
            ReadTimeoutError(endpoint_url="http://localhost"),
            EndpointConnectionError(endpoint_url="http://localhost"),
            CredentialRetrievalError(provider="test", error_msg="not now"),
            ConnectionResetError(),
            TimeoutError(),
        ],
        ids=repr,
    )
    def test_passing(self, error: Exception) -> None:
        """What AWS calls retryable is retried, and so is silence."""
        assert server.passes(error)
        assert isinstance(error, server.AWS_ERRORS)

    @pytest.mark.parametrize(
        "error",
        [
            deny("AccessDeniedException"),
            deny("ResourceNotFoundException"),
            deny("AWS.SimpleQueueService.NonExistentQueue"),
            deny("ValidationException"),
            cancelled("ThrottlingError", "ValidationError"),
            ParamValidationError(report="unknown parameter"),
        ],
        ids=repr,
    )
    def test_lasting(self, error: Exception) -> None:
        """What waiting does not change is not retried."""
        assert not server.passes(error)

    def test_error_code(self) -> None:
        """An error is named by AWS's code, and by its class where AWS did not answer."""
        assert server.error_code(deny("SlowDown")) == "SlowDown"
        assert server.error_code(ClientError({}, "Operation")) == "Unknown"
        assert server.error_code(TimeoutError()) == "TimeoutError"

    @given(attempt=st.integers(0, 10_000), base_s=st.floats(0.001, 1))
    def test_jitter_bounds(self, attempt: int, base_s: float) -> None:
        """A retry waits no longer than the doubling bound, and never longer than the cap."""
        wait_s = server.full_jitter_s(attempt, base_s=base_s)
        assert 0 <= wait_s <= min(5.0, base_s * 2 ** min(attempt, 30))
