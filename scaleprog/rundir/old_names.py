"""What earlier versions wrote into checkpoints, and how it is read today."""

from collections.abc import Mapping
from typing import Any

OLD_STATE = {"due": "pending"}
"""Keys of a checkpoint's state: old name -> current name."""
FIRST_STATE: dict[str, Any] = {
    "skipped": [],
    "arithmetic": 1,
    "data": {},
    "weights": "",
    "damaged": [],
    "last_search": [0, 0],
}
"""Keys that the state of the first version did not have, and what they mean for it."""


def renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`values` under the current names. An old name beside its current name stays, so that the reader refuses it."""
    return {names[key] if key in names and names[key] not in values else key: value for key, value in values.items()}
