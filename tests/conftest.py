"""One moto for the whole run, and a platform of its own for each test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.moto_aws import MotoAws, Platform

prefixes = (f"test{number}" for number in itertools.count(1))


@pytest.fixture(scope="session")
def moto_aws() -> Iterator[MotoAws]:
    with MotoAws.start() as aws:
        yield aws


@pytest.fixture
def platform(moto_aws: MotoAws) -> Platform:
    return moto_aws.create_platform(prefix=next(prefixes))


@pytest.fixture
def fifo_platform(moto_aws: MotoAws) -> Platform:
    """A platform whose updates queue is a FIFO queue."""
    return moto_aws.create_platform(prefix=next(prefixes), fifo_updates=True)
