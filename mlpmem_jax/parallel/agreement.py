"""What the processes of a run must agree on: how they were started, and what is on disk."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpmem_jax.errors import ConfigError
from mlpmem_jax.parallel.multihost import is_active, is_writer

_HOW = "was started with different settings"
_MOST_SHOWN = 4
_BROADCAST_ROWS = 1 << 20


def of_first(value: Any) -> Any:
    """Returns what process 0 knows, on every process: file systems show others old listings.

    Args:
        value: JSON-ready; what the other processes give is not looked at.
    """
    return _gathered(value if is_writer() else None)[0] if is_active() else value


def array_of_first(array_N: np.ndarray | None) -> np.ndarray:
    """Returns an array of process 0, on every process, in parts of bounded size.

    Args:
        array_N: One dimension, at most 32 bits an element; that of the others is not looked at.
    """
    if not is_active():
        assert array_N is not None
        return array_N
    from jax.experimental import multihost_utils

    length, dtype = of_first(None if array_N is None else (len(array_N), array_N.dtype.name))
    found_N = np.zeros(length, dtype)
    for start in range(0, length, _BROADCAST_ROWS):
        part = found_N[start : start + _BROADCAST_ROWS]
        own = array_N[start : start + len(part)] if array_N is not None else part
        part[:] = multihost_utils.broadcast_one_to_all(own)
    return found_N


def of_all(value: Any) -> list[Any]:
    """Returns what each process knows, on every process.

    Args:
        value: JSON-ready.
    """
    return _gathered(value) if is_active() else [value]


def smallest_of_all(value: int | None) -> int | None:
    """Returns the smallest of the values that processes know; None: no process knows one."""
    return min((one for one in of_all(value) if one is not None), default=None)


def refuse_different(settings: Mapping[str, Any], how: str = _HOW) -> None:
    """Compares what the processes of a run were started with; does nothing in one that is alone.

    Args:
        settings: JSON-ready; nested mappings are compared key by key.
        how: What is said of a process that differs.

    Raises:
        ConfigError: On every process: a process and the keys in which it differs from the first.
    """
    if is_active():
        refuse_differences([_flat(each) for each in _gathered(settings)], how)


def refuse_differences(settings: list[dict[str, Any]], how: str = _HOW) -> None:
    """Compares settings, by dotted key, of each process with those of the first.

    Raises:
        ConfigError: One line for each process that differs.
    """
    lines = []
    for index, own in enumerate(settings[1:], 1):
        names = sorted(set(settings[0]) | set(own))
        different = [name for name in names if settings[0].get(name) != own.get(name)]
        if different:
            shown = [
                f"{name}={_text(own, name)}, process 0 has {_text(settings[0], name)}"
                for name in different[:_MOST_SHOWN]
            ]
            more = len(different) - len(shown)
            lines.append(
                f"process {index} {how}: {'; '.join(shown)}"
                + (f"; and {more} more" if more else "")
            )
    if lines:
        raise ConfigError(lines)


def _text(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "nothing"


def _gathered(value: Any) -> list[Any]:
    """Returns the value of every process, in every process."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    return [json.loads(one.tobytes()) for one in gathered_arrays(text)]


def gathered_arrays(array_N: np.ndarray) -> list[np.ndarray]:
    """Returns the array of every process, in every process.

    Args:
        array_N: One dimension, of a length that may differ; at most 32 bits an element.
    """
    from jax.experimental import multihost_utils

    length_P = np.ravel(multihost_utils.process_allgather(np.int32(len(array_N))))
    # Few sizes: XLA compiles a program for each.
    padded = np.zeros(1 << max(0, int(length_P.max()) - 1).bit_length(), array_N.dtype)
    padded[: len(array_N)] = array_N
    array_PN = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(length_P), -1)
    return [
        row[:length].astype(array_N.dtype) for row, length in zip(array_PN, length_P, strict=True)
    ]


def _flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{path}.{name}" if path else name
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, key)
        else:
            flat[key] = value
    return flat
