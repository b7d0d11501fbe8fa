"""An embedded AWS for the whole run, and a platform of its own for each test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from local.aws import EmbeddedAws, Platform

prefixes = (f"test{number}" for number in itertools.count(1))


@pytest.fixture(scope="session")
def embedded_aws() -> Iterator[EmbeddedAws]:
    with EmbeddedAws.start() as aws:
        yield aws


@pytest.fixture
def platform(embedded_aws: EmbeddedAws) -> Platform:
    return embedded_aws.create_platform(prefix=next(prefixes))


@pytest.fixture
def fifo_platform(embedded_aws: EmbeddedAws) -> Platform:
    """A platform whose updates queue is a FIFO queue."""
    return embedded_aws.create_platform(prefix=next(prefixes), fifo_updates=True)
