"""The fixtures of `test_server.py` are those of its sections' further tests, too."""

from tests.server.fixtures import (
    aws,
    either_platform,
    gateway,
    impatient,
    issuer,
    platform,
    stand_in,
    standing,
)

__all__ = [
    "aws",
    "either_platform",
    "gateway",
    "impatient",
    "issuer",
    "platform",
    "stand_in",
    "standing",
]
