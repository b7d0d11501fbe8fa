"""The fixtures of `test_server.py`: a stand-in for AWS of each test's own, and what runs on it."""

from test_server import aws, gateway, impatient, platform, stand_in

__all__ = ["aws", "gateway", "impatient", "platform", "stand_in"]
