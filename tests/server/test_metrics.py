"""What is measured: counters, gauges and samples."""

from __future__ import annotations

from server import Metrics, Registry


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
