"""Where two recipes differ, in words."""

import json
from collections.abc import Mapping
from typing import Any


def differences(made: Any, asked: Any, path: str = "") -> list[str]:
    """Returns where two recipes differ, "key=value, now value" each."""
    if isinstance(made, Mapping) and isinstance(asked, Mapping):
        lines = []
        for name in sorted(set(made) | set(asked)):
            inner = f"{path}.{name}" if path else name
            lines += differences(made.get(name), asked.get(name), inner)
        return lines
    if made == asked:
        return []
    shown = [json.dumps(v, ensure_ascii=False) for v in (made, asked)]
    shown = [text if len(text) <= 60 else text[:57] + "…" for text in shown]
    return [f"{path}={shown[0]}, now {shown[1]}"]
