"""What all tests have: the fixtures of a gateway, and assertions that say what they compared."""

import pytest

pytest.register_assert_rewrite("tests")  # of what tests share, too

pytest_plugins = ["tests.server.fixtures"]
