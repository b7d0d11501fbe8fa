"""server.py on asyncio's own event loop, although uvloop is installed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.modules["uvloop"] = None  # type: ignore[assignment]  # importing it now fails
    runpy.run_path(str(Path(__file__).parents[2] / "server.py"), run_name="__main__")
