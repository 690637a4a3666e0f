"""Which processes make up a run, from the environment alone."""

import socket
import threading

import pytest

from mlpmem_jax.errors import ConfigError
from mlpmem_jax.parallel import cluster
from mlpmem_jax.parallel.cluster import Cluster, devices_per_process, find_cluster, join_secs
from mlpmem_jax.parallel.rollcall import RollCall

NAMED = {
    "MLPMEM_COORDINATOR": "host:123",
    "MLPMEM_NUM_PROCESSES": "4",
    "MLPMEM_PROCESS_INDEX": "3",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
}
XPK = {
    "JAX_COORDINATOR_IP": "a.b",
    "JAX_COORDINATOR_PORT": "80",
    "NNODES": "2",
    "NODE_RANK": "1",
}


def test_alone():
    assert find_cluster({}) is None
    assert find_cluster({"MLPMEM_NUM_PROCESSES": "1"}) is None
    assert find_cluster({"MLPMEM_NUM_PROCESSES": "1", **SLURM}) is None  # the way out


def test_named_by_the_launcher():
    assert find_cluster(NAMED) == Cluster(4, None, "host:123", 3)
    assert find_cluster(NAMED | SLURM) == Cluster(4, None, "host:123", 3)
    assert find_cluster(NAMED | {"MLPMEM_COORDINATOR": "[::1]:9"}).coordinator == "[::1]:9"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MLPMEM_COORDINATOR": ""}, "MLPMEM_COORDINATOR: not set, though MLPMEM_NUM_PROCESSES"),
        ({"MLPMEM_NUM_PROCESSES": ""}, "MLPMEM_NUM_PROCESSES: not set"),
        ({"MLPMEM_PROCESS_INDEX": ""}, "MLPMEM_PROCESS_INDEX: not set"),
        ({"MLPMEM_PROCESS_INDEX": "4"}, "MLPMEM_PROCESS_INDEX=4: must be less than"),
        ({"MLPMEM_PROCESS_INDEX": "-1"}, "MLPMEM_PROCESS_INDEX=-1: must be a whole number"),
        ({"MLPMEM_NUM_PROCESSES": "0"}, "MLPMEM_NUM_PROCESSES=0: must be a whole number"),
        ({"MLPMEM_COORDINATOR": "host"}, "MLPMEM_COORDINATOR=host: must be HOST:PORT"),
        ({"MLPMEM_COORDINATOR": "host:0"}, "must be HOST:PORT"),
    ],
)
def test_mistakes_in_the_launchers_variables(change, message):
    with pytest.raises(ConfigError) as error:
        find_cluster(NAMED | change)
    assert message in str(error.value)


def test_slurm_only_where_everything_is_set():
    assert find_cluster(SLURM) == Cluster(16, "slurm")
    for name in SLURM:
        assert find_cluster({k: v for k, v in SLURM.items() if k != name}) is None
    # An interactive shell in an allocation of 16 tasks, and one of a single task.
    assert find_cluster(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert find_cluster(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}) is None


def test_gpu_nodes_of_gke():
    assert find_cluster(XPK) == Cluster(2, None, "a.b:80", 1)
    assert find_cluster(XPK | {"NNODES": "1"}) is None
    assert find_cluster({k: v for k, v in XPK.items() if k != "NODE_RANK"}) is None


def test_tpu_pods(monkeypatch):
    workers = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}

    def count(environment):
        return 8

    assert find_cluster(workers, count) is None  # no TPU here, whatever the variables say
    monkeypatch.setattr(cluster, "_may_use_tpu", lambda environment: True)
    assert find_cluster(workers, count) == Cluster(2, "gketpu")
    assert find_cluster(workers | {"MEGASCALE_NUM_SLICES": "4"}, count) == Cluster(8, "gketpu")
    assert find_cluster({}, count) == Cluster(8, "gcetpu")
    assert find_cluster({}, lambda environment: 1) is None
    assert find_cluster({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, count) is None


def test_a_tpu_is_not_asked_for_where_jax_would_not_use_it():
    assert not cluster._may_use_tpu({"JAX_PLATFORMS": "cpu"})
    assert not cluster._may_use_tpu({"TPU_SKIP_MDS_QUERY": "1"})


def test_no_metadata_server_means_one_worker():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert cluster._tpu_vm_workers({"GCE_METADATA_IP": f"127.0.0.1:{port}"}) == 1


def test_numbers():
    assert devices_per_process({}) is None
    assert devices_per_process({"MLPMEM_DEVICES_PER_PROCESS": "2"}) == 2
    assert join_secs({}) == cluster.DEFAULT_JOIN_SECS
    assert join_secs({"MLPMEM_JOIN_SECS": "5"}) == 5
    for name, read in (("DEVICES_PER_PROCESS", devices_per_process), ("JOIN_SECS", join_secs)):
        with pytest.raises(ConfigError, match=f"MLPMEM_{name}=x: must be a whole number"):
            read({f"MLPMEM_{name}": "x"})


def _roll_call(port, number, index, limit):
    told, event = [], threading.Event()

    def give_up(message):
        told.append(message)
        event.set()

    return RollCall(f"localhost:{port}", number, index, limit, give_up), told, event


def _port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_roll_call_names_who_is_missing():
    port = _port()
    first, told, event = _roll_call(port, 4, 0, 3)
    second, _, _ = _roll_call(port, 4, 2, 100)
    with first, second:
        assert event.wait(30)
    assert told == ["process 1, 3 of 4 did not come within 3 s"]


def test_roll_call_without_the_first():
    call, told, event = _roll_call(_port(), 2, 1, 0.5)
    with call:
        assert event.wait(30)
    assert told == ["process 0 of 2 did not come within 0.5 s"]


def test_roll_call_is_silent_when_all_came():
    call, told, event = _roll_call(_port(), 2, 0, 0.5)
    with call:
        pass
    assert not event.wait(1) and told == []
