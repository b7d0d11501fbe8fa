"""Several tasks at once: what the promise of this system is worth when things go wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.chaos.checker import Event, Kind, first_divergence, log_faults
from tests.chaos.clients import Client
from tests.chaos.fleet import Fleet
from tests.chaos.plan import EVERYONE, TO_CLIENTS, Deed, make_plan
from tests.chaos.run import run_on_moto
from tests.moto_aws import MotoAws


@pytest.fixture(scope="module")
def aws() -> Iterator[MotoAws]:
    with MotoAws.start() as embedded:
        yield embedded


def event(seq: int) -> Event:
    return Event(seq, 100 + seq, "project_updated", "2025-11-24T12:00:00Z")


def events(*seqs: int) -> list[Event]:
    return [event(seq) for seq in seqs]


class TestPlan:
    """A run follows from its seed."""

    def test_same_seed(self) -> None:
        """The same seed gives the same plan, another one another."""
        assert make_plan(5, faults=True) == make_plan(5, faults=True)
        assert make_plan(5, faults=True) != make_plan(6, faults=True)

    @pytest.mark.parametrize("seed", range(1, 4))
    def test_updates(self, seed: int) -> None:
        """Every update is sent once, in order, in calls that SQS takes."""
        plan = make_plan(seed, faults=False)
        assert [update.number for update in plan.logged] == list(range(1, 501))
        assert all(1 <= len(burst.updates) <= 10 for burst in plan.bursts)
        assert len({update.project for update in plan.logged}) == plan.scale.projects + 1

    def test_deeds(self) -> None:
        """Processes are killed and stopped, clients cut off, while updates are sent."""
        plan = make_plan(1, faults=True)
        deeds = [action.deed for action in plan.actions]
        assert {Deed.KILL, Deed.STOP, Deed.FREEZE} < set(deeds)
        assert sum(deed in TO_CLIENTS for deed in deeds) == 2 * plan.scale.clients
        assert all(0 < action.after < plan.scale.updates for action in plan.actions)

    def test_both_kinds_of_queue(self) -> None:
        """Seeds take turns with standard and FIFO updates queues."""
        assert {make_plan(seed, faults=False).fifo for seed in (1, 2)} == {True, False}


class TestFeedChecker:
    """The checker finds what is wrong with a client's feed."""

    @pytest.mark.parametrize(
        ("received", "kind", "index"),
        [
            ((1, 2, 4, 5), Kind.MISSING, 2),
            ((2, 3, 4, 5), Kind.MISSING, 0),
            ((1, 2, 3, 4), Kind.MISSING, 4),
            ((), Kind.MISSING, 0),
            ((1, 2, 2, 3, 4, 5), Kind.DOUBLED, 2),
            ((1, 2, 3, 4, 5, 1), Kind.DOUBLED, 5),
            ((1, 3, 2, 4, 5), Kind.SWAPPED, 1),
            ((5, 1, 2, 3, 4), Kind.SWAPPED, 0),
            ((1, 2, 3, 4, 5, 6), Kind.UNKNOWN, 5),
        ],
    )
    def test_wrong(self, received: Sequence[int], kind: Kind, index: int) -> None:
        """The first departure from the log is named."""
        divergence = first_divergence(events(*received), events(1, 2, 3, 4, 5))
        assert divergence is not None
        assert (divergence.kind, divergence.index) == (kind, index)

    def test_altered(self) -> None:
        """An event with the right seq and other contents is found."""
        altered = dataclasses.replace(event(2), number=7)
        divergence = first_divergence([event(1), altered], events(1, 2))
        assert divergence is not None
        assert divergence.kind is Kind.ALTERED

    def test_right(self) -> None:
        """A feed that equals the log is right, over whatever connections it came."""
        over_another = dataclasses.replace(event(2), where="connection 2")
        assert first_divergence([event(1), over_another], events(1, 2)) is None
        assert first_divergence([], []) is None

    def test_says_where(self) -> None:
        """The report names the connections by which a doubled event came."""
        received = [dataclasses.replace(event(1), where=f"connection {i}") for i in (1, 2)]
        assert str(first_divergence(received, events(1))) == (
            "doubled at event 1: seq 1 came by connection 2 after it had come by connection 1"
        )


class TestLogChecker:
    """The checker finds what is wrong with a log."""

    SENT = (101, 102, 103)

    def test_right(self) -> None:
        """A log of exactly what was sent is right."""
        assert log_faults("p", events(1, 2, 3), 3, self.SENT, in_order=True) == []

    def test_order_of_a_standard_queue(self) -> None:
        """A standard queue promises no order, a FIFO queue does."""
        sent = (102, 101, 103)
        assert log_faults("p", events(1, 2, 3), 3, sent, in_order=False) == []
        assert log_faults("p", events(1, 2, 3), 3, sent, in_order=True) == [
            "log of p: seq 1 is update 101 where 102 was due"
        ]

    @pytest.mark.parametrize(
        ("seqs", "head", "sent", "fault"),
        [
            ((1, 3), 2, (101, 103), "place 2 holds seq 3"),
            ((1, 2), 3, (101, 102), "the head says 3, 2 events are there"),
            ((1, 2), 2, (101, 102, 103), "updates 103 are not in it"),
            ((1, 2, 3), 3, (101, 102), "updates 103 do not belong there"),
        ],
    )
    def test_wrong(self, seqs: Sequence[int], head: int, sent: Sequence[int], fault: str) -> None:
        """Holes, a head that is off, lost and foreign updates are found."""
        found = log_faults("p", events(*seqs), head, sent, in_order=False)
        assert found == [f"log of p: {fault}"]

    def test_appended_twice(self) -> None:
        """An update that is in the log twice is found, with both places."""
        twice = [event(1), dataclasses.replace(event(2), number=101)]
        assert log_faults("p", twice, 2, (101,), in_order=True) == [
            "log of p: update 101 is in it 2 times: [1, 2]"
        ]


class TestClient:
    """The client keeps what it is sent as it came, and complains of what it was not promised."""

    @pytest.fixture
    async def client(self) -> Client:
        fleet = Fleet(0, {}, "", 0)
        await fleet.close()
        client = Client(0, ["p"], fleet, 0)
        client.feeds["p"].phase = client.feeds["p"].phase.ASKED
        return client

    @staticmethod
    def hears(client: Client, **message: Any) -> None:
        client.on_message(json.dumps(message))

    def confirmed(self, client: Client, seq: int, **members: Any) -> None:
        self.hears(
            client,
            type="subscription_confirmed",
            project_id="p",
            seq=seq,
            epoch="e",
            **members,
        )

    def event(self, client: Client, seq: int, project: str = "p") -> None:
        self.hears(
            client,
            type="project_updated",
            project_id=project,
            seq=seq,
            data={"n": 100 + seq},
            timestamp="2025-11-24T12:00:00Z",
        )

    @pytest.mark.parametrize(
        ("seqs", "kind"),
        [((4, 6), Kind.MISSING), ((4, 4, 5, 6), Kind.DOUBLED), ((5, 4, 6), Kind.SWAPPED)],
    )
    async def test_faulty_feed(self, client: Client, seqs: Sequence[int], kind: Kind) -> None:
        """A server that loses, doubles or swaps an event is found out."""
        self.confirmed(client, 3)
        for seq in seqs:
            self.event(client, seq)
        feed = client.feeds["p"]
        divergence = first_divergence(feed.events, events(1, 2, 3, 4, 5, 6)[feed.start :])
        assert divergence is not None
        assert divergence.kind is kind
        assert not client.problems

    async def test_good_feed(self, client: Client) -> None:
        """A resumed feed is whole: the confirmation's seq does not move its cursor."""
        self.confirmed(client, 0)
        self.event(client, 1)
        feed = client.feeds["p"]
        feed.phase = feed.phase.ASKED
        self.confirmed(client, 3, recovered=True)
        assert feed.cursor == 1
        self.event(client, 2)
        self.event(client, 3)
        assert first_divergence(feed.events, events(1, 2, 3)) is None
        assert not client.problems

    async def test_not_recovered(self, client: Client) -> None:
        """`recovered: false` is a broken promise here."""
        client.begin_from_the_first_event()
        self.confirmed(client, 3, recovered=False)
        assert client.feeds["p"].cursor == 3
        assert len(client.problems) == 1

    async def test_event_before_confirmation(self, client: Client) -> None:
        """An event that comes before its subscription was confirmed is a fault."""
        self.event(client, 1)
        assert len(client.problems) == 1

    async def test_foreign_event(self, client: Client) -> None:
        """An event of a project it has no part in is a fault, a broadcast is none."""
        self.confirmed(client, 0)
        self.event(client, 1, EVERYONE)
        assert not client.problems
        self.event(client, 1, "other")
        self.event(client, 1, EVERYONE)  # again
        assert len(client.problems) == 2

    async def test_error(self, client: Client) -> None:
        """An error is a fault unless it says to try again."""
        self.hears(client, type="error", code="upstream", project_id="p", retryable=True)
        assert not client.problems
        self.hears(client, type="error", code="bad_message")
        assert len(client.problems) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="freezes and stops tasks by POSIX signals")
class TestChaos:
    """No event is lost, doubled or out of order, and nothing of the dead is left."""

    @pytest.mark.parametrize("seed", [1, 2])
    async def test_tasks_and_clients(self, aws: MotoAws, seed: int) -> None:
        """Tasks are killed and started, clients cut off."""
        outcome = await run_on_moto(make_plan(seed, faults=False), aws)
        assert outcome.tasks > outcome.plan.scale.tasks
        assert outcome.connections > outcome.plan.scale.clients

    @pytest.mark.parametrize("seed", [1, 2])
    async def test_faults_of_aws(self, aws: MotoAws, seed: int) -> None:
        """All that, and AWS throttles, fails, hangs up, loses and repeats."""
        outcome = await run_on_moto(make_plan(seed, faults=True), aws)
        assert outcome.faults > 50
