"""The WebSocket protocol by Autobahn's test suite: ``python -m tests.conformance``.

Autobahn's fuzzing client is a program for Python 2.7, long unmaintained and still the reference.
It talks to `tests.conformance.echo`: the gateway's own connections, which echo what they get.
"""
