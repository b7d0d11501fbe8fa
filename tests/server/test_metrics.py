"""What is measured: counters, gauges and samples."""

from __future__ import annotations

import aws_standin
from server import Metrics, Registry
from test_server import peer_of, running_gateway


class TestGauges:
    def test_by_kind(self) -> None:
        """Of figures by kind the sum is the metric; the kinds are in the line and for people."""
        metrics = Metrics("prod", Registry())
        metrics.subscriptions = lambda: {"live": 3, "pending": 4}
        line = metrics.line()
        for found in (line, metrics.stats()):
            assert found["Subscriptions"] == 7
            assert found["SubscriptionsByKind"] == {"live": 3, "pending": 4}
        [definition] = line["_aws"]["CloudWatchMetrics"]
        names = [each["Name"] for each in definition["Metrics"]]
        assert "Subscriptions" in names
        assert "SubscriptionsByKind" not in names

    def test_without_an_owner(self) -> None:
        """A gauge that nobody has set is missing, and not nought."""
        metrics = Metrics("prod", Registry())
        del metrics.subscriptions
        assert "Subscriptions" not in metrics.line()
        assert "ActiveConnections" in metrics.stats()

    async def test_work_owed(self, platform: aws_standin.Platform) -> None:
        """The CPU time that clients owe is told, by what their accounts are kept for."""
        async with running_gateway(platform) as gateway, peer_of(gateway):
            assert gateway.metrics.stats()["WorkOwed"] == 0
            [connection] = gateway.registry.connections.values()
            connection.account.charge(10.0, gateway.now())  # twice what may be owed
            stats = gateway.metrics.stats()
            assert 4.0 < stats["WorkOwed"] <= 5.0
            assert stats["WorkOwedByKind"] == {"subjects": 0, "addresses": stats["WorkOwed"]}
