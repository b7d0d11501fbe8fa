"""A platform of each test's own, in the one moto of the whole run."""

from __future__ import annotations

import itertools

import pytest

from tests.moto_aws import MotoAws, Platform

prefixes = (f"test{number}" for number in itertools.count(1))


@pytest.fixture
def platform(moto_aws: MotoAws) -> Platform:
    return moto_aws.create_platform(prefix=next(prefixes))


@pytest.fixture
def fifo_platform(moto_aws: MotoAws) -> Platform:
    """A platform whose updates queue is a FIFO queue."""
    return moto_aws.create_platform(prefix=next(prefixes), fifo_updates=True)
