"""What all tests have: the fixtures of a gateway, and assertions that say what they compared."""

import signal

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests")  # of what tests share, too

# A shell begins its background jobs with SIGINT ignored, and processes hand that on to the programs
# that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything makes settings of its own out of these.
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")

pytest_plugins = ["tests.server.fixtures", "tests.schedule"]
