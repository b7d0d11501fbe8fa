"""``docs/deployer-policy.json``: what whoever deploys has to be allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parent.parent.parent / "docs" / "deployer-policy.json"


def statements() -> list[dict[str, Any]]:
    policy: dict[str, Any] = json.loads(PATH.read_text("utf-8"))
    return list(policy["Statement"])


def actions(*, called_via: str | None) -> set[str]:
    """What is allowed to the caller itself (None), or through a service that calls for it."""
    found = set()
    for statement in statements():
        via = statement.get("Condition", {}).get("ForAnyValue:StringEquals", {})
        if via.get("aws:CalledVia", [None])[0] == called_via:
            found.update(statement["Action"])
    return found
