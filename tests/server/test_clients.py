"""The clients of AWS: what they raise, and that they do not retry by themselves."""

from __future__ import annotations

from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
from aiobotocore.session import AioSession
from botocore.exceptions import ClientError, NoCredentialsError

import aws_standin
import server
from aws_standin import Fault, StandIn
from server import Aws
from tests.server.aws import always, aws_clients, each_passing_fault


class TestClients:
    async def test_without_credentials(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where there are none, the SDK says so."""
        monkeypatch.setattr(AioSession, "get_credentials", AsyncMock(return_value=None))
        async with aws_clients(platform) as aws:
            with pytest.raises(NoCredentialsError):
                await aws.sqs.list_queues()

    @pytest.mark.parametrize("body", [b"[]", b"<html>", b'{"Messages": [', b"\xff{}", b'"{}"'])
    async def test_not_an_answer(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn, body: bytes
    ) -> None:
        """An answer that is none of AWS's is an error that passes, and not taken for a success."""
        stand_in.fault = always("TransactWriteItems", Fault(garbage=body))
        item = {"PK": {"S": "a"}, "SK": {"S": "b"}}
        put: Any = {"Put": {"TableName": platform.table_name, "Item": item}}
        with pytest.raises(server.AWS_ERRORS) as caught:
            await aws.dynamodb.transact_write_items(TransactItems=[put])
        assert server.passes(caught.value)

    async def test_errors_are_the_sdks(self, platform: aws_standin.Platform, aws: Aws) -> None:
        """What AWS refuses is raised with all that it says of it."""
        key = {"PK": {"S": "a"}, "SK": {"S": "b"}}
        with pytest.raises(ClientError) as caught:
            await aws.dynamodb.transact_write_items(
                TransactItems=[
                    {
                        "Put": {
                            "TableName": platform.table_name,
                            "Item": key,
                            "ConditionExpression": "attribute_exists(PK)",
                        }
                    }
                ]
            )
        reasons = cast("Any", caught.value.response)["CancellationReasons"]
        assert [reason["Code"] for reason in reasons] == ["ConditionalCheckFailed"]
        with pytest.raises(aws.sqs.exceptions.QueueDoesNotExist):
            await aws.sqs.receive_message(QueueUrl=platform.queue_urls["dev"] + "-not")

    @each_passing_fault
    async def test_one_attempt(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn, fault: Fault
    ) -> None:
        """The SDK asks nobody whether to retry, and does not."""
        stand_in.fault = always("ReceiveMessage", fault)
        with pytest.raises(server.AWS_ERRORS):
            await aws.sqs.receive_message(QueueUrl=platform.queue_urls["dev"])
        assert stand_in.calls["sqs", "ReceiveMessage"] == 1
        for client, service in ((aws.sqs, "sqs"), (aws.sns, "sns"), (aws.dynamodb, "dynamodb")):
            assert await cast("Any", client).meta.events.emit(f"needs-retry.{service}.Any") == []
