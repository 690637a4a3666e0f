"""Several processes on JAX's own multi-controller runtime.

`joined()` is entered in one place, before a device is touched, and does nothing where the
process is alone. Within it a process that fails leaves at once: the shutdown barrier of
`jax.distributed` would keep it, and hide its error, until a time-out.
"""

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from mlpmem_jax.errors import EXIT_RUN_FAILED, ConfigError
from mlpmem_jax.parallel.cluster import Cluster, devices_per_process, find_cluster, join_secs
from mlpmem_jax.parallel.rollcall import RollCall

# A process that is lost is noticed after this long, and all the others end with it.
HEARTBEAT_SECS = 40
SHUTDOWN_SECS = 20
# How long a process waits with its own error: where another one failed first, that error is
# the one to show, and the launcher stops this process meanwhile. Process 0 waits longer,
# because its errors are on the terminal at once.
YIELD_SECS = 1.0
YIELD_SECS_OF_FIRST = 4.0


def initialize() -> bool:
    """Joins the processes of this run, if there are others. Call it before anything of JAX.

    Returns:
        Whether there are several processes.

    Raises:
        ConfigError: The launcher's variables are incomplete or contradict each other, or the
            name of this machine leads nowhere.
    """
    devices = devices_per_process()
    cluster = find_cluster()
    if devices is not None:
        import jax

        jax.config.update("jax_num_cpu_devices", devices)
    if cluster is None:
        return False
    _join(cluster, join_secs())
    return True


def _join(cluster: Cluster, limit_secs: int) -> None:
    import jax

    _refuse_a_name_without_address()
    _keep_standard_output_ours()
    given = cluster.detection is None
    with RollCall(
        cluster.roll_call or cluster.coordinator,
        cluster.num_processes,
        cluster.process_index,
        limit_secs,
        _give_up,
    ):
        jax.distributed.initialize(
            cluster.coordinator if given else None,
            num_processes=cluster.num_processes if given else None,
            process_id=cluster.process_index if given else None,
            cluster_detection_method="deactivate" if given else cluster.detection,
            # Later than the roll call, which can say what is wrong: JAX aborts.
            initialization_timeout=limit_secs + 30,
            heartbeat_timeout_seconds=HEARTBEAT_SECS,
            shutdown_timeout_seconds=SHUTDOWN_SECS,
        )


def _refuse_a_name_without_address() -> None:
    """Refuses a machine whose name is nobody's, or another machine's.

    Gloo, which CPU devices speak over, listens at the address of the machine's own name; where it
    cannot, JAX ends with a traceback that names neither.

    Raises:
        ConfigError: No address of this machine belongs to its name.
    """
    if "cpu" not in (os.environ.get("JAX_PLATFORMS") or "cpu"):
        return
    name = socket.gethostname()
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        found = []
    if not any(_is_of_this_machine(family, address) for family, _, _, _, address in found):
        raise ConfigError(
            f"this machine is called {name}, and no address of its own belongs to that name; "
            f"processes cannot find each other: add the line `127.0.0.1 {name}` to /etc/hosts (its "
            "address in the network, where other machines take part)"
        )


def _is_of_this_machine(family: int, address: tuple[Any, ...]) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind(address)
    except OSError:
        return False
    return True


def is_active() -> bool:
    """Returns whether this process has joined others. Starts nothing."""
    jax = sys.modules.get("jax")
    return jax is not None and bool(jax.distributed.is_initialized())


def is_writer() -> bool:
    """Returns whether this process writes what a run has one of (process 0)."""
    if not is_active():
        return True
    import jax

    return bool(jax.process_index() == 0)


def barrier(name: str) -> None:
    """Waits until all processes are here, however long one of them takes."""
    if is_active():
        from mlpmem_jax.parallel.coordinator import meet

        meet(name)


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Lets process 0 through before the others, which find what it has made."""
    if not is_writer():
        barrier(name)
    yield
    if is_writer():
        barrier(name)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the processes of this run and leaves together with them."""
    if not initialize():
        yield
        return
    yield
    _part()


def _part() -> None:
    import jax

    # The shutdown waits for SHUTDOWN_SECS only, and process 0 may have more to do than the rest.
    barrier("mlpmem: end")
    jax.distributed.shutdown()


def yield_to_first_error() -> None:
    """Gives the launcher a moment to stop this process, if another one failed first.

    Call it before an error is shown that a lost process may have caused.
    """
    if not is_active():
        return
    # jax.distributed takes SIGTERM for a notice of preemption; from here on it kills again.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(YIELD_SECS_OF_FIRST if is_writer() else YIELD_SECS)


def leave(code: int) -> int:
    """Ends a failed process without waiting for the others; returns where it is alone."""
    if is_active():
        _exit(code)
    return code


def leave_together(code: int) -> int:
    """Ends a process that stops at the same point as all others; returns the code."""
    if is_active():
        _part()
    return code


def leave_with_traceback() -> None:
    """Shows the current exception and ends the process; returns where it is alone."""
    if is_active():
        traceback.print_exc()
        _exit(EXIT_RUN_FAILED)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _give_up(message: str) -> None:
    print(
        f"error: {message}: start the same command on every machine of the run, or set "
        "MLPMEM_NUM_PROCESSES=1 to run alone (MLPMEM_JOIN_SECS sets the limit)",
        file=sys.stderr,
    )
    _exit(EXIT_RUN_FAILED)


def _keep_standard_output_ours() -> None:
    # Gloo reports its connections on standard output, where a sample or a table belongs.
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):
        return  # A stand-in, in tests.
    sys.stdout.flush()
    ours = os.dup(number)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), number)
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    sys.stdout = os.fdopen(ours, "w", buffering=1, encoding=encoding, errors=errors)
