"""What all tests have: the fixtures of a gateway, and assertions that say what they compared."""

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests")  # of what tests share, too

# Before anything makes settings of its own out of these.
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")

pytest_plugins = ["tests.server.fixtures", "tests.schedule"]
