"""The whole platform on one machine: a stand-in for AWS, sample agents and the real server.

`python -m local` runs it. None of it is in the image.
"""

from __future__ import annotations

import sys


def lacking(error: ModuleNotFoundError) -> str:
    """Return in a sentence that a package is not installed, and how it comes to be."""
    return (
        f"{sys.executable} lacks the package {error.name}. `make run` sets up a Python that has "
        "all in .venv; without make: python -m pip install -r requirements-local.txt"
    )
