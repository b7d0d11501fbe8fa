"""The fixtures of `test_server.py`: a stand-in for AWS of each test's own, and what runs on it."""

from test_server import aws, either_platform, gateway, impatient, platform, stand_in

__all__ = ["aws", "either_platform", "gateway", "impatient", "platform", "stand_in"]
