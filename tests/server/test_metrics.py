"""What is measured: counters, gauges and samples."""

from __future__ import annotations

import json
import time

import pytest

import aws_standin
import server
from server import EVERYONE, Event, Metrics, Registry, Sample
from tests.server.gateways import running_gateway
from tests.server.listeners import Listener
from tests.server.peers import peer_of


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


class TestMetrics:
    @pytest.fixture
    def registry(self) -> Registry:
        return Registry()

    @pytest.fixture
    def metrics(self, registry: Registry) -> Metrics:
        return Metrics("prod", registry)

    def test_sample(self) -> None:
        """A sample keeps a hundred values, of which each has had the same chance."""
        sample = Sample()
        for value in range(10_000):
            sample.add(value)
        values = sample.take()
        assert len(set(values)) == 100
        assert set(values) <= set(range(10_000))
        assert 2_500 < sum(values) / 100 < 7_500
        assert sample.take() == []

    def test_small_sample(self) -> None:
        """Up to a hundred values are all kept."""
        sample = Sample()
        for value in range(100):
            sample.add(value + 0.12345)
        assert sample.take() == [pytest.approx(value + 0.123) for value in range(100)]

    def test_line(self, metrics: Metrics, registry: Registry) -> None:
        """A line is one object in CloudWatch's Embedded Metric Format, and names every value."""
        registry.connections["a"] = listener = Listener("a")
        registry.join(listener, registry.channel("p"))
        registry.join(listener, registry.channel(EVERYONE))
        metrics.forwarded(0.25)
        metrics.delivered([Event("p", 1, b"{}", time.time() - 2)], 1)
        metrics.connection_duration.add(12.0)
        line = json.loads(json.dumps(metrics.line()))
        [definition] = line["_aws"]["CloudWatchMetrics"]
        assert abs(line["_aws"]["Timestamp"] / 1000 - time.time()) < 60
        assert definition["Namespace"] == "AgenticAI/WebSocket"
        assert definition["Dimensions"] == [["Environment", "Service"]]
        assert (line["Environment"], line["Service"]) == ("prod", "websocket-gateway")
        assert {each["Name"]: each["Unit"] for each in definition["Metrics"]} == {
            name: str(unit)
            for name, (unit, _) in server.Metrics.described().items()
            if name in line  # a gauge that has no owner here is missing
        }
        assert (line["ActiveConnections"], line["Subscriptions"]) == (1, 1)
        assert (line["MessagesForwarded"], line["EventsDelivered"]) == (1, 1)
        assert (line["ForwardLatency"], line["ConnectionDuration"]) == ([250.0], [12.0])
        assert line["EventLatency"] == [pytest.approx(2_000, rel=0.5)]

    def test_line_counts_since_the_last(self, metrics: Metrics) -> None:
        """A line has what happened since the one before, and leaves out samples without values."""
        metrics.forwarded(0.1)
        metrics.forward_errors += 3
        first, second = metrics.line(), metrics.line()
        assert (first["MessagesForwarded"], first["ForwardErrors"]) == (1, 3)
        assert (second["MessagesForwarded"], second["ForwardErrors"]) == (0, 0)
        assert "ForwardLatency" not in second
        names = {each["Name"] for each in second["_aws"]["CloudWatchMetrics"][0]["Metrics"]}
        assert names == set(second) - {"_aws", "Environment", "Service"}

    def test_stats(self, metrics: Metrics) -> None:
        """The figures for people count from the start, and a line does not reset them."""
        for took_s in (0.1, 0.2, 0.3):
            metrics.forwarded(took_s)
        stats = metrics.stats()
        assert stats["MessagesForwarded"] == 3
        assert stats["ForwardLatency"] == {"p50": 200.0, "max": 300.0}
        assert "EventLatency" not in stats
        metrics.line()
        assert metrics.stats()["MessagesForwarded"] == 3
        assert set(metrics.stats()) <= set(server.Metrics.described())
