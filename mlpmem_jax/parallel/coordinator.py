"""What processes tell each other beside their devices, through the coordinator of JAX.

Collectives belong to the thread that trains; what goes on in the background may not use them.
"""

import itertools
import json
from typing import Any

from mlpmem_jax.parallel.multihost import is_active

# A process that is lost ends the others long before; this only bounds a slow one.
_LIMIT_MILLISECONDS = 24 * 3600 * 1000
_meetings = itertools.count()


class Exchange:
    """One exchange between process 0 and the others, from any thread. Alone it does nothing.

    All processes must call the same methods in the same order.
    """

    def __init__(self, name: str):
        """Prepares.

        Args:
            name: The same on all processes, and of no other exchange that goes on meanwhile.
        """
        self._name = f"mlpmem/{name}"

    def first_says(self, value: Any) -> Any:
        """Returns what process 0 gives, JSON-ready."""
        if not is_active():
            return value
        client, index, _ = _cluster()
        key = f"{self._name}/said"
        if index == 0:
            client.key_value_set(key, json.dumps(value))
            return value
        return json.loads(client.blocking_key_value_get(key, _LIMIT_MILLISECONDS))

    def first_hears(self, value: Any) -> list[Any] | None:
        """Returns what each process gives, JSON-ready, on process 0; None elsewhere.

        It is the end of the exchange. Before another one of the same name all must have met: what
        process 0 removes here could be the next one's.
        """
        if not is_active():
            return [value]
        client, index, count = _cluster()
        if index:
            client.key_value_set(f"{self._name}/heard/{index}", json.dumps(value))
            return None
        heard = [value] + [
            json.loads(
                client.blocking_key_value_get(f"{self._name}/heard/{other}", _LIMIT_MILLISECONDS)
            )
            for other in range(1, count)
        ]
        client.key_value_delete(f"{self._name}/")  # A name with a slash: all below it.
        return heard


def meet(name: str) -> None:
    """Waits until all processes are here; all must come to the same meetings in the same order.

    Not on the devices: their collectives give up after half an hour on CPU, and one process may
    build a shard of an index for longer while the others wait.
    """
    client, _, _ = _cluster()
    client.wait_at_barrier(f"mlpmem/{next(_meetings)}/{name}", _LIMIT_MILLISECONDS)


def told_by_all(name: str, value: Any) -> list[Any]:
    """Returns what each process gives, on every process, without touching a device.

    Args:
        name: Used once in a run.
        value: JSON-ready.
    """
    # One reads from all, and all from one.
    heard = Exchange(f"{name}/from-all").first_hears(value)
    return list(Exchange(f"{name}/to-all").first_says(heard))


def _cluster() -> tuple[Any, int, int]:
    """Returns the coordinator's client, this process's index and their number.

    JAX has no public name for the client; Orbax takes it from here too.
    """
    from jax._src import distributed

    state = distributed.global_state
    assert state.client is not None
    return state.client, state.process_id, state.num_processes
