"""Ports on a command line, and what to say when one cannot be had."""

from __future__ import annotations

import argparse

MAX_PORT = 65519
"""Leaves room for the ports after it: further tasks, and the one that is suggested instead."""


def port_number(text: str) -> int:
    """Return the port that is meant. Raises ArgumentTypeError, with a sentence."""
    if not (text.isascii() and text.isdigit() and int(text) <= MAX_PORT):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to {MAX_PORT}")
    return int(text)


def port_refused(port: int, error: OSError, *instead: str) -> str:
    """Return in a sentence that `port` cannot be had, and the commands that would do."""
    reason = (error.strerror or str(error)).lower()
    return (
        f"Port {port} cannot be used ({reason}): is this running already? End what listens there, "
        f"or choose another port: {', or '.join(instead)}"
    )
