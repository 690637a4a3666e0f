"""Which processes make up a run: read from the environment, without starting JAX.

The launcher names them in `MLPMEM_*` variables. On TPU pods, SLURM and GKE JAX knows them by
itself, but it is asked only on clear evidence of more than one process: half-set variables,
an interactive shell of an allocation, or one machine that merely has a TPU must run alone.
"""

import dataclasses
import functools
import glob
import importlib.util
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from mlpmem_jax.errors import ConfigError

COORDINATOR = "MLPMEM_COORDINATOR"
NUM_PROCESSES = "MLPMEM_NUM_PROCESSES"
PROCESS_INDEX = "MLPMEM_PROCESS_INDEX"
DEVICES_PER_PROCESS = "MLPMEM_DEVICES_PER_PROCESS"
JOIN_SECS = "MLPMEM_JOIN_SECS"
DEFAULT_JOIN_SECS = 300

# All that JAX reads, and the size of the step: an interactive shell in an allocation of
# eight tasks has SLURM_NTASKS=8 and is alone all the same.
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_STEP_NUM_TASKS",
)
_XPK_GPU = ("JAX_COORDINATOR_IP", "JAX_COORDINATOR_PORT", "NNODES", "NODE_RANK")
_METADATA = "metadata.google.internal"
_ATTRIBUTES = "computeMetadata/v1/instance/attributes"
_WORKERS = "worker-network-endpoints"
_WORKER = "agent-worker-number"
_TPU_DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
# JAX's port on TPUs. Under SLURM it takes one of 4096 by the number of the job; so does the roll
# call, but of others: the port above JAX's is that of the next job, which may share the node.
_TPU_PORT = 8482
_SLURM_PORTS = 4096
_SLURM_FIRST_PORT = 24576
_LAST_PORT = 65535


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run.

    Attributes:
        num_processes: How many there are, at least 2.
        detection: JAX's method that finds address and index, or None where they are given.
        coordinator: "host:port" of process 0, where it is given.
        process_index: Which of them this is; None where only JAX can tell.
        roll_call: "host:port" below the port at which process 0 hears who has come, where it
            is not the coordinator's; "" where it is, or is not known.
    """

    num_processes: int
    detection: str | None = None
    coordinator: str = ""
    process_index: int | None = None
    roll_call: str = ""


def find_cluster(
    environment: Mapping[str, str] = os.environ,
    ask_metadata: Callable[[str], str] | None = None,
) -> Cluster | None:
    """Returns the processes of this run, or None where this process is alone.

    Args:
        environment: Variables to read.
        ask_metadata: Asks the metadata server of a TPU VM for an attribute; for tests.

    Raises:
        ConfigError: The launcher's variables are incomplete or contradict each other.
    """
    if any(environment.get(name) for name in (COORDINATOR, NUM_PROCESSES, PROCESS_INDEX)):
        return _named(environment)
    if all(name in environment for name in _SLURM):
        return _slurm(environment)
    if all(name in environment for name in _XPK_GPU) and _count(environment["NNODES"]) > 1:
        address, port, nodes, rank = (environment[name] for name in _XPK_GPU)
        return Cluster(_count(nodes), None, f"{address}:{port}", _count(rank))
    if not _may_use_tpu(environment):
        return None
    return _tpu(environment, ask_metadata or functools.partial(_metadata, environment))


def devices_per_process(environment: Mapping[str, str] = os.environ) -> int | None:
    """Returns how many CPU devices to simulate in each process, or None for the default.

    Raises:
        ConfigError: The variable holds no whole number of at least 1.
    """
    return _at_least(environment, DEVICES_PER_PROCESS, 1)


def join_secs(environment: Mapping[str, str] = os.environ) -> int:
    """Returns for how long processes wait for each other at the start, in seconds."""
    return _at_least(environment, JOIN_SECS, 1) or DEFAULT_JOIN_SECS


def _named(environment: Mapping[str, str]) -> Cluster | None:
    number = _at_least(environment, NUM_PROCESSES, 1)
    if number == 1:
        return None
    index = _at_least(environment, PROCESS_INDEX, 0)
    coordinator = environment.get(COORDINATOR, "")
    given = {NUM_PROCESSES: number, PROCESS_INDEX: index, COORDINATOR: coordinator or None}
    missing = [name for name, value in given.items() if value is None]
    if missing or number is None or index is None:
        raise ConfigError(
            f"{', '.join(missing)}: not set, though {_first_set(given)} is; several processes "
            f"need {COORDINATOR}=HOST:PORT, {NUM_PROCESSES} and {PROCESS_INDEX} "
            "(launch/run.sh --processes sets them)"
        )
    if index >= number:
        raise ConfigError(
            f"{PROCESS_INDEX}={index}: must be less than {NUM_PROCESSES}={number} (counted from 0)"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < _LAST_PORT:
        raise ConfigError(
            f"{COORDINATOR}={coordinator}: must be HOST:PORT of process 0 (the port above it is "
            "used too)"
        )
    return Cluster(number, None, coordinator, index)


def _slurm(environment: Mapping[str, str]) -> Cluster | None:
    tasks = _count(environment["SLURM_STEP_NUM_TASKS"])
    if tasks < 2 or tasks != _count(environment["SLURM_NTASKS"]):
        return None
    port = _SLURM_FIRST_PORT + _count(environment["SLURM_JOB_ID"]) % _SLURM_PORTS
    node = _first_node(environment["SLURM_STEP_NODELIST"])
    index = _number(environment["SLURM_PROCID"])
    return Cluster(tasks, "slurm", "", index, _roll_call(node, port, index))


def _first_node(nodes: str) -> str:
    """Returns the first of nodes as SLURM writes them: node07,b1 or node[07-12,15],b1."""
    match = re.match(r"([^,\[]*)(?:\[([^],-]*))?", nodes)
    return "".join(match.groups("")) if match else ""


def _tpu(environment: Mapping[str, str], ask_metadata: Callable[[str], str]) -> Cluster | None:
    listed = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if listed and "TPU_WORKER_ID" in environment:
        method, hosts, worker = "gketpu", listed.split(","), environment["TPU_WORKER_ID"]
    else:
        method, hosts = "gcetpu", ask_metadata(_WORKERS).split(",")
        worker = ask_metadata(_WORKER) if len(hosts) > 1 else ""
    slices = max(1, _count(environment.get("MEGASCALE_NUM_SLICES", "1")))
    if len(hosts) * slices < 2:
        return None
    index = _number(worker)
    if index is not None:
        index += len(hosts) * _count(environment.get("MEGASCALE_SLICE_ID", "0"))
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0]
    port = _count(environment.get("JAX_COORDINATOR_PORT", "")) or _TPU_PORT
    roll_call = _roll_call(first or _address(hosts[0]), port, index)
    return Cluster(len(hosts) * slices, method, "", index, roll_call)


def _address(worker: str) -> str:
    """Returns the address of a worker: "host", "host:port", or "name:number:address"."""
    parts = worker.split(":")
    return parts[2] if len(parts) == 3 else parts[0]


def _roll_call(host: str, port: int, index: int | None) -> str:
    """Returns where processes report; "" where that is not known, or not who they are."""
    return f"{host}:{port}" if host and index is not None and port < _LAST_PORT else ""


def _first_set(given: Mapping[str, object]) -> str:
    return next(name for name, value in given.items() if value is not None)


def _at_least(environment: Mapping[str, str], name: str, least: int) -> int | None:
    text = environment.get(name, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}={text}: must be a whole number of at least {least}")
    return int(text)


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _count(text: str) -> int:
    return _number(text) or 0


def _may_use_tpu(environment: Mapping[str, str]) -> bool:
    platforms = environment.get("JAX_PLATFORMS", "")
    if (platforms and "tpu" not in platforms) or environment.get("TPU_SKIP_MDS_QUERY"):
        return False
    return any(glob.glob(path) for path in _TPU_DEVICES) and bool(
        importlib.util.find_spec("libtpu")
    )


def _metadata(environment: Mapping[str, str], attribute: str) -> str:
    """Asks the metadata server of a Cloud TPU VM; returns "" where there is none."""
    host = environment.get("GCE_METADATA_IP", _METADATA)
    request = urllib.request.Request(
        f"http://{host}/{_ATTRIBUTES}/{attribute}", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return str(answer.read().decode()).strip()
    except (urllib.error.URLError, OSError, UnicodeDecodeError):
        return ""
