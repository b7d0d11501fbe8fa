"""From records to tables, plots and the verdict on what was to be reached."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import prices
from bench.bill import dollars_per_million
from bench.cluster import PUBLISHING, ceiling, line
from bench.processes import ROOT
from bench.scenarios import Record
from bench.small_projects import HISTORY, STRETCH

DOCUMENT = ROOT / "docs" / "PERFORMANCE.md"
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "bench" / "results"


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One run of the benchmark: what it ran on, and all it recorded."""

    when: str
    effort: dict[str, Any]
    machine: dict[str, str]
    versions: dict[str, str]
    absent: dict[str, str]
    records: list[Record]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = dataclasses.asdict(self)
        records = ",\n".join(json.dumps(r) for r in fields.pop("records"))
        head = json.dumps(fields, indent=1).removesuffix("\n}")
        whole = path.with_suffix(".new")
        whole.write_text(f'{head},\n "records": [\n{records}\n]}}\n')
        whole.replace(path)  # so that there is no half of one

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what `save` wrote."""
        fields = json.loads(path.read_text())
        return cls(**{**fields, "records": [Record(**r) for r in fields["records"]]})

    def by_round(self, scenario: str, server: str, key: str, **parameters: Any) -> dict[int, float]:
        """One figure, round by round."""
        return {
            r.round: r.values[key]
            for r in self.records
            if (r.scenario, r.server) == (scenario, server)
            and key in r.values
            and parameters.items() <= r.parameters.items()
        }

    def parameters(self, scenario: str) -> list[tuple[str, dict[str, Any]]]:
        """What was measured in a scenario: servers with their parameters, in their order."""
        found = {
            (r.server, *r.parameters.items()): (r.server, r.parameters)
            for r in self.records
            if r.scenario == scenario
        }
        return list(found.values())

    def servers(self, scenario: str) -> list[str]:
        """Who was measured in a scenario, in order of appearance."""
        return list(dict.fromkeys(r.server for r in self.records if r.scenario == scenario))


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of one figure over the rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        found = list(values)
        return cls(statistics.median(found), min(found), max(found)) if found else None


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    if abs(value) >= 1000:
        digits = len(str(int(abs(value)))) - 3
        return f"{round(value, -digits):,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def shown(values: Iterable[float], unit: str = "") -> str:
    """A cell: the median, and what it lay between."""
    spread = Spread.of(values)
    if spread is None:
        return "-"
    return f"{number(spread.median)}{unit} ({number(spread.least)}-{number(spread.greatest)})"


def median(values: Iterable[float]) -> str:
    """A cell: the median alone."""
    spread = Spread.of(values)
    return "-" if spread is None else number(spread.median)


def ratios(above: dict[int, float], below: dict[int, float]) -> list[float]:
    """Round by round, so that what slows the machine for a while slows both."""
    return [above[n] / below[n] for n in above if below.get(n)]


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """The straight line through points: intercept, slope, and r squared."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    slope, intercept = statistics.linear_regression(xs, ys)
    return intercept, slope, statistics.correlation(xs, ys) ** 2


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left, the others to the right."""
    lines = [" | ".join(head), "|".join(["---", *["---:"] * (len(head) - 1)])]
    lines += [" | ".join(row) for row in rows]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


# --- Tables -------------------------------------------------------------------------------------

RATE = "deliveries_per_cpu_s"


def machine(run: Run) -> str:
    """What the run was made on and with."""
    rows = [*run.machine.items(), ("measured", run.when)]
    rows += [
        ("rounds", f"{run.effort['rounds']}, medians, in brackets the least and the greatest"),
        ("measurement", f"{run.effort['cpu_s']} CPU seconds of the server and round"),
    ]
    rows += [(name, version) for name, version in run.versions.items()]
    rows += [(name, f"absent: {reason}") for name, reason in run.absent.items()]
    return table(("", ""), rows)


def real_shape(run: Run) -> str:
    """Thousands of projects with two viewers each, and agents that report at a rate."""
    rows = []
    for server, parameters in run.parameters("real shape"):
        cells = [
            shown(run.by_round("real shape", server, key, **parameters).values(), unit)
            for key, unit in (
                ("core_share", ""),
                ("cpu_us_per_event", ""),
                ("p50_ms", ""),
                ("p99_ms", ""),
                ("aws_calls_per_event", ""),
                ("events_per_publish", ""),
                ("forward_p99_ms", ""),
            )
        ]
        rows.append([_tasks(server, parameters), f"{parameters['rate']:,}", *cells])
    head = ("", "events/s", "cores used", "CPU us an event", "p50, ms", "p99, ms")
    more = ("AWS calls an event", "events a `Publish`", "p99 of a forward, ms")
    return table((*head, *more), rows)


def _tasks(server: str, parameters: dict[str, Any]) -> str:
    tasks = parameters["tasks"]
    return server if tasks == 1 else f"{server}, {tasks} tasks"


def spread(run: Run) -> str:
    """Bursts of 20 events over one or many projects with two viewers each."""
    rows = []
    for server, parameters in run.parameters("spread"):
        cost, calls = (
            run.by_round("spread", server, key, **parameters)
            for key in ("cpu_us_per_event", "aws_calls_per_event")
        )
        alone = {**parameters, "projects": 1}
        one = run.by_round("spread", server, "cpu_us_per_event", **alone)
        cells = [shown(cost.values()), shown(ratios(cost, one), "x"), shown(calls.values())]
        rows.append([_tasks(server, parameters), f"{parameters['projects']}", *cells])
    head = ("bursts of 20", "projects", "CPU us an event", "to one project", "AWS calls an event")
    return table(head, rows)


def bill(run: Run) -> str:
    """What AWS bills for a million logged events."""
    rows = []
    for server, parameters in run.parameters("bill"):
        keys = ("calls", "write_units", "read_units", "sqs_requests", "sns_requests")
        values = {
            key: value
            for key in (*keys, "agents_requests")
            for value in run.by_round("bill", server, key, **parameters).values()
        }
        tasks, pattern = parameters["tasks"], parameters["pattern"]
        size = "at most 1,024 bytes" if parameters["kilobytes"] == 1 else "at most 4,096 bytes"
        count = "1 task" if tasks == 1 else f"{tasks} tasks"
        rows.append(
            [
                f"{count}, {'ten at once' if pattern == 'bursts' else pattern}, {size}",
                *(number(values[key]) for key in keys),
                f"${dollars_per_million(values):.2f}",
                f"${values['agents_requests'] * prices.SQS_REQUESTS:.2f}",
            ]
        )
    head = ("items, an event", "AWS calls", "write units", "read units", "SQS requests")
    return table((*head, "SNS requests", "a million events", "agents' own sends"), rows)


def streams(run: Run) -> str:
    """Text that is written while it is read."""
    rows = []
    for server, parameters in run.parameters("streams"):
        gathered = parameters["gathered"]
        keys = ("offered_per_s", "cpu_us_per_event", "core_share", "p50_ms", "p99_ms")
        cells = [shown(run.by_round("streams", server, k, **parameters).values()) for k in keys]
        label = "a message a token" if gathered == 1 else f"{gathered} tokens a message"
        rows.append([label, *cells])
    head = ("", "tokens/s offered", "CPU us a token", "cores used", "p50, ms", "p99, ms")
    return table(head, rows)


def history(run: Run) -> str:
    """The cost of an event against how many the project has already."""
    rows = []
    for server, parameters in run.parameters("history"):
        keys = ("cpu_us_per_event", "read_units_per_event", "aws_calls_per_event")
        figures = [run.by_round("history", server, key, **parameters) for key in keys]
        first = run.by_round("history", server, keys[0], events=STRETCH)
        cells = [shown(figures[0].values()), shown(ratios(figures[0], first), "x")]
        cells += [median(figure.values()) for figure in figures[1:]]
        end = parameters["events"]
        rows.append([f"{end - STRETCH + 1:,} to {end:,}", *cells])
    head = (
        "events",
        "CPU us an event",
        "to the first",
        "read units an event",
        "AWS calls an event",
    )
    return table(head, rows)


def unwanted(run: Run) -> str:
    """An event on a task none of whose clients wants it."""
    rows = []
    for server, parameters in run.parameters("unwanted"):
        keys = ("events_per_message", "cpu_us_per_event", "cpu_us_per_message", "calls_per_message")
        cells = [shown(run.by_round("unwanted", server, k, **parameters).values()) for k in keys]
        fill = parameters["fill"]
        rows.append([f"{fill} in each" if fill else "as many as fit", *cells])
    head = ("events", "in a message", "CPU us an event", "CPU us a message", "SQS calls a message")
    return table(head, rows)


def cluster(run: Run) -> str:
    """What a cluster can do at most, by arithmetic from what was measured."""
    found = run.parameters("unwanted")
    figures = [
        [
            statistics.median(run.by_round("unwanted", server, key, **parameters).values())
            for key in ("events_per_message", "cpu_us_per_event", "calls_per_message")
        ]
        for server, parameters in found
    ]
    if len(figures) < 2:
        return "not measured"
    event_s, message_s = line({fill: cost for fill, cost, _ in figures})
    rows = []
    for tasks in PUBLISHING:
        events, fill = ceiling(event_s, message_s, tasks)
        calls = min(figures, key=lambda figure: abs(math.log(figure[0] / fill)))[2]
        calls_per_s = events / fill * calls * tasks
        dollars = calls_per_s * prices.SQS_REQUESTS / 1e6
        per_million = dollars / events * 1e6
        cells = [f"{events:,.0f}", number(fill), f"{calls_per_s:,.0f}", f"${per_million:,.2f}"]
        rows.append([f"{tasks}", *cells])
    head = ("tasks that publish", "events/s at most", "events in a message", "SQS calls/s of all")
    return table((*head, "SQS for a million events"), rows)


def fan_out(run: Run) -> str:
    """Deliveries per CPU second by burst."""
    bursts = _fan_out_bursts(run)
    head = ("deliveries per CPU second", *(_burst(b) for b in bursts))
    return table(
        head,
        (
            (s, *(shown(run.by_round("fan-out", s, RATE, burst=b).values()) for b in bursts))
            for s in run.servers("fan-out")
        ),
    )


def _fan_out_bursts(run: Run) -> list[int]:
    return sorted({r.parameters["burst"] for r in run.records if r.scenario == "fan-out"} - {0})


def _burst(burst: int) -> str:
    return "one at a time" if burst == 1 else f"bursts of {burst}"


def latency(run: Run) -> str:
    """From the making of an event to a client, and whether server or generator was the limit."""
    bursts = _fan_out_bursts(run)
    rows = []
    for server in run.servers("fan-out"):
        row = [
            server,
            *(
                median(run.by_round("fan-out", server, key, burst=burst).values())
                for burst in bursts
                for key in ("p50_ms", "p99_ms")
            ),
        ]
        share = Spread.of(run.by_round("fan-out", server, "generator_share", burst=20).values())
        row.append(f"{share.median:.0%}" if share else "-")
        rows.append(row)
    names = ["one" if burst == 1 else f"of {burst}" for burst in bursts]
    head = ("ms", *(f"{p}, {name}" for name in names for p in ("p50", "p99")), "generator busy")
    return table(head, rows)


def connections(run: Run) -> str:
    """Memory and handshakes."""
    rows = []
    for server in run.servers("fan-out"):
        row = [server]
        for scenario, key in (
            ("fan-out", "idle_kb"),
            ("deflated", "idle_kb"),
            ("fan-out", "active_kb"),
            ("fan-out", "handshake_cpu_ms"),
        ):
            row.append(shown(run.by_round(scenario, server, key).values()))
        rows.append(row)
    head = ("", "KB, idle", "KB, idle, deflate", "KB, after the bursts", "handshake, CPU ms")
    return table(head, rows)


def sizes(run: Run) -> str:
    """Larger events, and deflated ones."""
    rows = []
    for scenario, label in (
        ("plain 1 KB", "1 KB plain"),
        ("deflated", "1 KB deflated"),
        ("4 KB", "4 KB plain"),
        ("4 KB deflated", "4 KB deflated"),
    ):
        for server in run.servers(scenario):
            rates = [run.by_round(scenario, server, RATE, burst=burst) for burst in (1, 20)]
            size = run.by_round(scenario, server, "bytes_per_delivery", burst=20)
            cells = [shown(rate.values()) for rate in rates]
            rows.append([label, server, *cells, median(size.values())])
    head = ("event", "server", "one at a time", "bursts of 20", "bytes a delivery")
    return table(head, rows)


def subscribers(run: Run) -> str:
    """CPU microseconds an event, against the number of subscribers."""
    counts = _counts(run)
    rows = []
    for server in run.servers("subscribers"):
        for burst in (1, 20):
            row = [f"{server}, {_burst(burst)}"]
            for count in (1, *counts):
                values = _per_event(run, server, count, burst)
                row.append(shown(values.values()))
            _, slope, r2 = _line(run, server, burst)
            rows.append([*row, f"{slope:.2f}", f"{r2:.3f}"])
    head = ("CPU us an event", "fixed", *(f"{c:,} subscribers" for c in counts), "each", "r2")
    return table(head, rows)


def _counts(run: Run) -> list[int]:
    """How many subscribers there were, in turn, but for the one that shows the fixed cost."""
    found = {r.parameters["subscribers"] for r in run.records if r.scenario == "subscribers"}
    return sorted(found - {1})


def _per_event(run: Run, server: str, count: int, burst: int) -> dict[int, float]:
    parameters = {"subscribers": count, "burst": burst}
    return run.by_round("subscribers", server, "cpu_us_per_event", **parameters)


def _line(run: Run, server: str, burst: int) -> tuple[float, float, float]:
    return fit(
        [
            (count, value)
            for count in _counts(run)
            for value in _per_event(run, server, count, burst).values()
        ]
    )


def projects(run: Run) -> str:
    """What projects cost: idle ones, and events spread over several."""
    rows = []
    for scenario, parameter, label in (
        ("idle projects", "idle_projects", "{} idle projects beside it"),
        ("projects", "projects", "spread over {} projects"),
    ):
        found = sorted(
            {
                (r.parameters[parameter], r.parameters["subscribers"])
                for r in run.records
                if r.scenario == scenario
            }
        )
        cost = {
            count: run.by_round(scenario, "gateway", "cpu_us_per_event", **{parameter: count})
            for count, _ in found
        }
        for count, subscribers_each in found:
            rows.append(
                (
                    label.format(f"{count:,}"),
                    f"{subscribers_each:,}",
                    shown(cost[count].values()),
                    shown(ratios(cost[count], cost[found[0][0]]), "x"),
                    shown(_project_kb(run, count) if scenario == "idle projects" else []),
                )
            )
    head = ("bursts of 20", "subscribers each", "CPU us an event", "ratio", "KB, idle project")
    return table(head, rows)


def _project_kb(run: Run, idle: int) -> list[float]:
    """What a connection with a project of its own takes beyond one of many that share one."""
    own = run.by_round("idle projects", "gateway", "idle_kb", idle_projects=idle)
    shared = run.by_round("subscribers", "gateway", "idle_kb", subscribers=idle)
    return [own[n] - shared[n] for n in own if n in shared]


def forwards(run: Run) -> str:
    """Forwards per CPU second."""
    rows = []
    for server in run.servers("forwards"):
        for count in (1, 100):
            figures = [
                run.by_round("forwards", server, key, connections=count)
                for key in ("forwards_per_cpu_s", "forwards_per_s", "p50_ms", "p99_ms")
            ]
            cells = [shown(f.values()) for f in figures[:2]]
            cells += [median(f.values()) for f in figures[2:]]
            rows.append([f"{server}, {count} clients", *cells])
    return table(("", "per CPU second", "per second", "p50, ms", "p99, ms"), rows)


def storm(run: Run) -> str:
    """All clients cut off, and back."""
    rows = [
        [
            server,
            *(shown(run.by_round("storm", server, k).values()) for k in ("seconds", "cpu_ms_each")),
            *(median(run.by_round("storm", server, k).values()) for k in ("p50_ms", "p99_ms")),
        ]
        for server in run.servers("storm")
    ]
    head = ("", "all back, s", "CPU ms each", "p50 of a client, ms", "p99 of a client, ms")
    return table(head, rows)


def catch_up(run: Run) -> str:
    """Clients that have missed much, and come back at once."""
    counts = sorted({r.parameters["clients"] for r in run.records if r.scenario == "catch-up"})
    rows = [
        [
            f"{count:,} clients",
            *(
                shown(run.by_round("catch-up", "gateway", key, clients=count).values())
                for key in ("seconds", "cpu_ms_each")
            ),
        ]
        for count in counts
    ]
    return table(("900 events of 4 KB missed", "all have them, s", "CPU ms each"), rows)


# --- What was to be reached ---------------------------------------------------------------------


Measured = Callable[[Run, str], list[float]]
"""The figures of one of our own servers, round by round."""

# Limits are on in both.
MEASURED = {"gateway": "limits on", "gateway with tokens": "limits, tokens and origins on"}


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A figure to reach: at least `goal`, or at most if `at_most`."""

    label: str
    goal: float
    measured: Measured
    unit: str = "x"
    at_most: bool = False

    def row(self, run: Run, servers: Iterable[str] = MEASURED) -> list[str]:
        """Label and goal, then of each server what was measured, and the verdict on the median."""
        label = self.label.format(**run.effort)
        goal = f"{'at most' if self.at_most else 'at least'} {self.goal}{self.unit}"
        cells = [cell for server in servers for cell in self._verdict(self.measured(run, server))]
        return [label, goal, *cells]

    def _verdict(self, values: list[float]) -> tuple[str, str]:
        if not values:
            return "not measured", "-"
        middle = statistics.median(values)
        met = middle <= self.goal if self.at_most else middle >= self.goal
        return shown(values, self.unit), "yes" if met else "**no**"


def _against(peer: str, scenario: str, burst: int) -> Measured:
    def measured(run: Run, own: str) -> list[float]:
        rates = run.by_round(scenario, own, RATE, burst=burst)
        return ratios(rates, run.by_round(scenario, peer, RATE, burst=burst))

    return measured


def _deflated_against_plain(run: Run, own: str) -> list[float]:
    deflated = run.by_round("deflated", own, RATE, burst=1)
    return ratios(deflated, run.by_round("plain 1 KB", own, RATE, burst=1))


def _many_without_fixed(burst: int) -> Measured:
    def measured(run: Run, own: str) -> list[float]:
        many = run.effort["many"]
        other = _per_event(run, "websockets", many, burst)
        return ratios(other, _deliveries_alone(run, own, _per_event(run, own, many, burst), burst))

    return measured


def _floor_without_fixed(run: Run, own: str) -> list[float]:
    cost, floor = (
        run.by_round("fan-out", server, "cpu_us_per_event", burst=1) for server in (own, "C floor")
    )
    return ratios(floor, _deliveries_alone(run, own, cost, 1))


def _deliveries_alone(run: Run, own: str, cost: dict[int, float], burst: int) -> dict[int, float]:
    """The cost of an event without what one to a single client costs: the calls to AWS."""
    fixed = _per_event(run, own, 1, burst)
    return {n: cost[n] - fixed[n] for n in cost if n in fixed}


def _forwards(run: Run, own: str) -> list[float]:
    rates, plain = (
        run.by_round("forwards", server, "forwards_per_cpu_s", connections=100)
        for server in (own, "send_message each")
    )
    return ratios(rates, plain)


def _figure(scenario: str, key: str) -> Measured:
    return lambda run, own: list(run.by_round(scenario, own, key).values())


def _parameterised(scenario: str, key: str, **parameters: Any) -> Measured:
    return lambda run, own: list(run.by_round(scenario, own, key, **parameters).values())


def _against_first(scenario: str, key: str, first: Any, other: dict[str, Any]) -> Measured:
    """The ratio of a figure to the same with other parameters, round by round."""

    def measured(run: Run, own: str) -> list[float]:
        return ratios(
            run.by_round(scenario, own, key, **other), run.by_round(scenario, own, key, **first)
        )

    return measured


def _dollars(tasks: int, pattern: str) -> Measured:
    def measured(run: Run, own: str) -> list[float]:
        return [
            dollars_per_million(r.values)
            for r in run.records
            if (r.scenario, r.server) == ("bill", own)
            and r.parameters == {"tasks": tasks, "pattern": pattern, "kilobytes": 1}
        ]

    return measured


CPU = "cpu_us_per_event"
REAL = {"tasks": 1, "rate": 300}

# Of projects with two viewers each; measured with tokens and limits on.
SMALL_TARGETS = [
    Target(
        "2,000 projects, 300 events/s: cores used, forwards and all",
        0.25,
        _parameterised("real shape", "core_share", **REAL),
        "",
        at_most=True,
    ),
    Target(
        "the same: p99 from `SendMessage` to a socket, calls to AWS of 5-10 ms",
        150,
        _parameterised("real shape", "p99_ms", **REAL),
        " ms",
        at_most=True,
    ),
    Target(
        "bursts of 20 spread over 20 projects, against one project",
        1.8,
        _against_first("spread", CPU, {"tasks": 1, "projects": 1}, {"tasks": 1, "projects": 20}),
        at_most=True,
    ),
    Target(
        "bursts of 20 over 200 projects, CPU an event",
        600,
        _parameterised("spread", CPU, tasks=1, projects=200),
        " us",
        at_most=True,
    ),
    Target(
        "bursts of 20 over 20 projects, two tasks: AWS calls an event, of both",
        0.5,
        _parameterised("spread", "aws_calls_per_event", tasks=2, projects=20),
        "",
        at_most=True,
    ),
    Target(
        "a million logged events, two tasks, ten at once", 2.8, _dollars(2, "bursts"), " $", True
    ),
    Target("a million logged events, two tasks, alone", 4.5, _dollars(2, "alone"), " $", True),
    Target(
        "an event of a project with 20,000, against one with 2,000",
        1.2,
        _against_first("history", CPU, {"events": STRETCH}, {"events": HISTORY}),
        at_most=True,
    ),
    Target(
        "an event that nobody on the task wants, from full messages",
        10,
        _parameterised("unwanted", CPU, fill=0),
        " us",
        at_most=True,
    ),
    Target(
        "a handshake with a remembered token, against none",
        1.2,
        _against_first("handshake", "handshake_cpu_ms", {"token": "none"}, {"token": "remembered"}),
        at_most=True,
    ),
    Target(
        "a handshake with a token never seen, against none",
        1.5,
        _against_first("handshake", "handshake_cpu_ms", {"token": "none"}, {"token": "never seen"}),
        at_most=True,
    ),
]


def small_targets(run: Run) -> str:
    """What was to be reached with small projects."""
    rows = (t.row(run, ["gateway with tokens"]) for t in SMALL_TARGETS)
    return table(("", "to reach", "measured", "reached"), rows)


def handshakes(run: Run) -> str:
    """CPU time of a handshake by what is known of its token."""
    rows = [
        [
            f"{parameters['token']}",
            shown(run.by_round("handshake", server, "handshake_cpu_ms", **parameters).values()),
            shown(
                _against_first("handshake", "handshake_cpu_ms", {"token": "none"}, parameters)(
                    run, server
                ),
                "x",
            ),
        ]
        for server, parameters in run.parameters("handshake")
    ]
    return table(("token", "CPU ms", "to none"), rows)


TARGETS = [
    Target(
        "bursts of 20, against `websockets.broadcast()`", 15, _against("websockets", "fan-out", 20)
    ),
    Target(
        "the same with {many:,} subscribers, without the calls to AWS", 15, _many_without_fixed(20)
    ),
    Target("bursts of 20, against nats-server", 2.5, _against("nats-server", "fan-out", 20)),
    Target("bursts of 20, against nchan", 8, _against("nchan", "fan-out", 20)),
    Target(
        "one at a time, against `websockets.broadcast()`", 1.2, _against("websockets", "fan-out", 1)
    ),
    Target(
        "the same with {many:,} subscribers, without the calls to AWS", 1.2, _many_without_fixed(1)
    ),
    Target("one at a time, against the C floor", 0.85, _against("C floor", "fan-out", 1)),
    Target("the same without the calls to AWS", 0.7, _floor_without_fixed),
    Target("deflated by all, against plain, one at a time", 0.8, _deflated_against_plain),
    Target(
        "deflated by all, bursts of 20, against `websockets.broadcast()`",
        20,
        _against("websockets", "deflated", 20),
    ),
    Target(
        "memory of an idle connection, deflate negotiated",
        6,
        _figure("deflated", "idle_kb"),
        " KB",
        at_most=True,
    ),
    Target("handshake, CPU", 0.3, _figure("fan-out", "handshake_cpu_ms"), " ms", at_most=True),
    Target("forwards, against one `send_message` each", 6, _forwards),
]


def targets(run: Run) -> str:
    """All targets and whether they were met."""
    head = ("", "to reach", *(cell for name in MEASURED.values() for cell in (name, "reached")))
    return table(head, (t.row(run) for t in TARGETS))


# --- Two revisions ------------------------------------------------------------------------------

# What is compared, and whether more of it is better.
COMPARED = {
    "cpu_us_per_message": False,
    "read_units_per_event": False,
    "calls": False,
    "write_units": False,
    "read_units": False,
    "sqs_requests": False,
    "sns_requests": False,
    "cpu_us_per_event": False,
    "aws_calls_per_event": False,
    "core_share": False,
    "p50_ms": False,
    "p99_ms": False,
    "forward_p99_ms": False,
    "forwards_per_cpu_s": True,
    "handshake_cpu_ms": False,
    "idle_kb": False,
    "cpu_ms_each": False,
    "seconds": False,
}


def pairs(run: Run, now: str, then: str) -> str:
    """Each figure of both, and the ratio of the one to the other within a round."""
    measured: dict[tuple[str, str, str], dict[str, Any]] = {}
    for r in run.records:
        for key in (key for key in COMPARED if key in r.values):
            name = ", ".join(f"{k} {v}" for k, v in r.parameters.items())
            measured[r.scenario, name, key] = r.parameters
    rows = []
    for (scenario, name, key), parameters in measured.items():
        values = [run.by_round(scenario, server, key, **parameters) for server in (then, now)]
        ratio = ratios(values[1], values[0])
        sign = "better if more" if COMPARED[key] else ""
        row = [f"{scenario}: {name}", key, *(shown(v.values()) for v in values)]
        rows.append([*row, shown(ratio, "x"), sign])
    return table(("", "", then, now, "ratio, round by round", ""), rows)


# --- Plots and document -------------------------------------------------------------------------

OWN, OTHER, LIGHT = "#0b6e99", "#8a8f98", "#c9ccd1"


def plot(run: Run) -> None:
    """Draw the pictures of docs/PERFORMANCE.md."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    )
    IMAGES.mkdir(parents=True, exist_ok=True)
    pyplot = importlib.import_module("matplotlib.pyplot")
    _plot_fan_out(run, pyplot)
    _plot_memory(run, pyplot)
    _plot_subscribers(run, pyplot)


def _plot_fan_out(run: Run, pyplot: Any) -> None:
    servers = [s for s in run.servers("fan-out") if run.by_round("fan-out", s, RATE, burst=20)]
    rate = {
        (s, b): Spread.of(run.by_round("fan-out", s, RATE, burst=b).values())
        for s in servers
        for b in (1, 20)
    }
    servers.sort(key=lambda s: (rate[s, 20] or Spread(0, 0, 0)).median)
    figure, axes = pyplot.subplots(figsize=(8, 0.55 * len(servers) + 1.2))
    for offset, burst in ((-0.2, 1), (0.2, 20)):
        for y, server in enumerate(servers):
            if (spread := rate[server, burst]) is None:
                continue
            own = server.startswith("gateway")
            colour = (OWN if own else OTHER) if burst == 20 else ("#8cc3dc" if own else LIGHT)
            error = [[spread.median - spread.least], [spread.greatest - spread.median]]
            axes.barh(y + offset, spread.median, 0.38, color=colour, xerr=error, ecolor="#444")
            label = f" {number(spread.median)}"
            axes.text(spread.greatest, y + offset, label, va="center", size=8)
    axes.set_yticks(range(len(servers)), servers)
    axes.set_xlabel("deliveries per CPU second: light one at a time, dark bursts of 20")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=7)
    axes.margins(x=0.12)
    _save(figure, "fan-out.png")


def _plot_memory(run: Run, pyplot: Any) -> None:
    found = {
        (server, scenario): Spread.of(run.by_round(scenario, server, "idle_kb").values())
        for server in run.servers("fan-out")
        for scenario in ("fan-out", "deflated")
    }
    servers = sorted(
        (s for s in run.servers("fan-out") if found[s, "fan-out"]),
        key=lambda s: -(found[s, "fan-out"] or Spread(0, 0, 0)).median,
    )
    figure, axes = pyplot.subplots(figsize=(8, 0.55 * len(servers) + 1.2))
    for offset, scenario in ((-0.2, "deflated"), (0.2, "fan-out")):
        for y, server in enumerate(servers):
            if (spread := found[server, scenario]) is None:
                continue
            own = server.startswith("gateway")
            plain = scenario == "fan-out"
            colour = (OWN if own else OTHER) if plain else ("#8cc3dc" if own else LIGHT)
            axes.barh(y + offset, spread.median, 0.38, color=colour)
            axes.text(spread.median, y + offset, f" {number(spread.median)}", va="center", size=8)
    axes.set_yticks(range(len(servers)), servers)
    axes.set_xlabel("KB of resident memory an idle connection: dark plain, light with deflate")
    _save(figure, "memory.png")


def _plot_subscribers(run: Run, pyplot: Any) -> None:
    counts = _counts(run)
    if len(counts) < 2:
        return
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for server in run.servers("subscribers"):
        for burst, style in ((1, "-"), (20, "--")):
            points = [
                (count, value / 1e3)
                for count in counts
                for value in _per_event(run, server, count, burst).values()
            ]
            intercept, slope, _ = fit(points)
            colour = {"gateway": OWN, "gateway with tokens": "#8cc3dc"}.get(server, OTHER)
            axes.plot([p[0] for p in points], [p[1] for p in points], ".", color=colour)
            ends = [0, max(counts)]
            label = f"{server}, {_burst(burst)}"
            axes.plot(ends, [intercept + slope * x for x in ends], style, color=colour, label=label)
    axes.set_xlabel("subscribers")
    axes.set_ylabel("CPU ms an event")
    axes.legend(frameon=False)
    axes.set_ylim(bottom=0)
    _save(figure, "subscribers.png")


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(IMAGES / name, dpi=110)
    figure.clear()


TABLES: dict[str, Callable[[Run], str]] = {
    "real-shape": real_shape,
    "small-targets": small_targets,
    "spread": spread,
    "bill": bill,
    "streams": streams,
    "history": history,
    "unwanted": unwanted,
    "cluster": cluster,
    "machine": machine,
    "targets": targets,
    "fan-out": fan_out,
    "latency": latency,
    "connections": connections,
    "sizes": sizes,
    "subscribers": subscribers,
    "projects": projects,
    "forwards": forwards,
    "handshakes": handshakes,
    "storm": storm,
    "catch-up": catch_up,
}


def fill(text: str, run: Run) -> str:
    """The document with each ``<!-- bench:NAME -->`` block replaced by its table."""

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- bench:{name} -->\n{TABLES[name](run)}\n<!-- /bench -->"

    return re.sub(r"<!-- bench:([\w-]+) -->.*?<!-- /bench -->", replaced, text, flags=re.DOTALL)


def write_document(run: Run) -> None:
    """Put the run's tables and plots into docs/."""
    plot(run)
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), run))
