"""Which processes make up a run, from the environment alone."""

import contextlib
import os
import re
import socket
import threading

import pytest

from mlpmem_jax.errors import ConfigError
from mlpmem_jax.parallel import cluster, multihost
from mlpmem_jax.parallel.cluster import Cluster, devices_per_process, find_cluster, join_secs
from mlpmem_jax.parallel.rollcall import RollCall
from tests.conftest import ROOT

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
        ({"MLPMEM_COORDINATOR": "host:65535"}, "the port above it is used too"),
    ],
)
def test_mistakes_in_the_launchers_variables(change, message):
    with pytest.raises(ConfigError) as error:
        find_cluster(NAMED | change)
    assert message in str(error.value)


def test_slurm_only_where_everything_is_set():
    assert find_cluster(SLURM) == Cluster(16, "slurm", "", 3, "node1:24583")
    for name in SLURM:
        assert find_cluster({k: v for k, v in SLURM.items() if k != name}) is None
    # An interactive shell in an allocation of 16 tasks, and one of a single task.
    assert find_cluster(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert find_cluster(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}) is None


def test_gpu_nodes_of_gke():
    assert find_cluster(XPK) == Cluster(2, None, "a.b:80", 1)
    assert find_cluster(XPK | {"NNODES": "1"}) is None
    assert find_cluster({k: v for k, v in XPK.items() if k != "NODE_RANK"}) is None


@pytest.fixture
def tpu(monkeypatch):
    monkeypatch.setattr(cluster, "_may_use_tpu", lambda environment: True)


GKE = {"TPU_WORKER_HOSTNAMES": "a.svc,b.svc", "TPU_WORKER_ID": "1"}


def metadata(workers, number="0"):
    answers = {"worker-network-endpoints": workers, "agent-worker-number": number}
    return answers.__getitem__


def test_a_slice_of_gke(tpu):
    def no_server(attribute):
        raise AssertionError("the variables say it all")

    assert find_cluster(GKE, no_server) == Cluster(2, "gketpu", "", 1, "a.svc:8482")
    several = GKE | {
        "MEGASCALE_NUM_SLICES": "4",
        "MEGASCALE_SLICE_ID": "2",
        "MEGASCALE_COORDINATOR_ADDRESS": "first.svc:8080",
        "JAX_COORDINATOR_PORT": "90",
    }
    assert find_cluster(several, no_server) == Cluster(8, "gketpu", "", 5, "first.svc:90")
    addresses = GKE | {"TPU_PROCESS_ADDRESSES": "c:8476,d:8476"}
    assert find_cluster(addresses, no_server).roll_call == "c:8482"
    alone = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    assert find_cluster(alone, no_server) is None


def test_a_tpu_vm(tpu):
    ask = metadata("pod-w-0:1:10.0.0.2,pod-w-1:2:10.0.0.3", "1")
    assert find_cluster({}, ask) == Cluster(2, "gcetpu", "", 1, "10.0.0.2:8482")
    assert find_cluster({}, metadata("pod-w-0,pod-w-1")).roll_call == "pod-w-0:8482"
    assert find_cluster({}, metadata("pod-w-0:1:10.0.0.2")) is None
    # Where it is not known who this process is, nobody is named, and the run starts all the same.
    assert find_cluster({}, metadata("a,b", "")) == Cluster(2, "gcetpu", "", None, "")


def test_without_a_tpu_its_variables_say_nothing():
    assert find_cluster(GKE, metadata("a,b")) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[007,010-015]", "node007"),
        ("b1,node[2-3]", "b1"),
        ("big-node[07]", "big-node07"),
    ],
)
def test_first_node_of_a_slurm_step(nodes, first):
    assert find_cluster(SLURM | {"SLURM_STEP_NODELIST": nodes}).roll_call == f"{first}:24583"


@pytest.mark.parametrize("nodes", ["node001", "node001,host2", "n[01-15],h2", "n[1,7-15]"])
def test_jax_finds_the_same_under_slurm(monkeypatch, nodes):
    slurm = pytest.importorskip("jax._src.clusters.slurm_cluster").SlurmCluster
    environment = SLURM | {"SLURM_STEP_NODELIST": nodes}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("JAX_COORDINATOR_PORT", raising=False)
    ours = find_cluster(environment)
    assert slurm.is_env_present()
    assert ours.process_index == slurm.get_process_id()
    assert ours.num_processes == slurm.get_process_count()
    host, port = slurm.get_coordinator_address(1, None).split(":")
    ours_host, ours_port = ours.roll_call.split(":")
    assert ours_host == host
    # JAX takes the last 4096 ports by the number of the job; those of the next job too.
    assert int(port) >= 65535 - 4096 and int(ours_port) + 1 < 65535 - 4096


def test_jax_finds_the_same_on_gke(monkeypatch, tpu):
    gke = pytest.importorskip("jax._src.clusters.cloud_tpu_cluster").GkeTpuCluster
    slices = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}
    environment = GKE | slices | {"MEGASCALE_COORDINATOR_ADDRESS": "first:8080"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(gke, "wait_for_coordinator", lambda *_: None)
    ours = find_cluster(environment)
    assert ours.process_index == gke.get_process_id() == 5
    assert ours.num_processes == gke.get_process_count()
    assert ours.roll_call == gke.get_coordinator_address(1, None)


def test_a_tpu_is_not_asked_for_where_jax_would_not_use_it():
    assert not cluster._may_use_tpu({"JAX_PLATFORMS": "cpu"})
    assert not cluster._may_use_tpu({"TPU_SKIP_MDS_QUERY": "1"})


def test_no_metadata_server_means_one_worker(tpu):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert find_cluster({"GCE_METADATA_IP": f"127.0.0.1:{port}"}) is None


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


class Joined:
    """Stands in for the roll call and for jax.distributed; remembers what each was told."""

    def __init__(self, monkeypatch):
        import jax

        self.roll_call = self.jax = None
        monkeypatch.setattr(multihost, "RollCall", self._called)
        monkeypatch.setattr(multihost, "_keep_standard_output_ours", lambda: None)
        monkeypatch.setattr(jax.distributed, "initialize", self._initialized)

    def _called(self, *given):
        self.roll_call = given[:3]
        return contextlib.nullcontext()

    def _initialized(self, coordinator, **given):
        self.jax = (coordinator, given["process_id"], given["cluster_detection_method"])


@pytest.mark.parametrize(
    ("environment", "roll_call", "jax"),
    [
        (SLURM, ("node1:24583", 16, 3), (None, None, "slurm")),
        (GKE, ("a.svc:8482", 2, 1), (None, None, "gketpu")),
        (NAMED, ("host:123", 4, 3), ("host:123", 3, "deactivate")),
    ],
)
def test_the_roll_call_knows_who_it_is(monkeypatch, tpu, environment, roll_call, jax):
    joined = Joined(monkeypatch)
    multihost._join(find_cluster(environment), 5)
    assert (joined.roll_call, joined.jax) == (roll_call, jax)


def test_a_missing_task_of_slurm_is_named():
    tasks = SLURM | {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "3",
        "SLURM_STEP_NUM_TASKS": "3",
    }
    told, event = [], threading.Event()

    def give_up(message):
        told.append(message)
        event.set()

    calls = []
    for task, limit in (("0", 3), ("2", 100)):
        found = find_cluster(tasks | {"SLURM_PROCID": task})
        number, index = found.num_processes, found.process_index
        calls.append(RollCall(found.roll_call, number, index, limit, give_up))
    with calls[0], calls[1]:
        assert event.wait(30)
    assert told == ["process 1 of 3 did not come within 3 s"]


def _called(monkeypatch, name, *addresses):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    def lookup(asked, *_, **__):
        assert asked == name
        if not found:
            raise socket.gaierror(-2, "Name or service not known")
        return found

    monkeypatch.setattr(socket, "gethostname", lambda: name)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)


# Nobody's name; and that of another machine of the same name (an address for documentation).
@pytest.mark.parametrize("addresses", [[], ["192.0.2.1"]])
def test_a_machine_whose_name_leads_elsewhere_is_told(monkeypatch, addresses):
    _called(monkeypatch, "odd", *addresses)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    joined = Joined(monkeypatch)
    with pytest.raises(ConfigError, match="called odd, and no address .* `127.0.0.1 odd`"):
        multihost._join(find_cluster(NAMED), 5)
    assert joined.jax is None
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")  # nothing listens there
    multihost._join(find_cluster(NAMED), 5)
    assert joined.jax


def test_any_address_of_this_machine_is_enough(monkeypatch):
    _called(monkeypatch, "odd", "192.0.2.1", "127.0.0.1")
    multihost._refuse_a_name_without_address()


def test_processes_are_told_apart_by_number_and_wait_by_no_clock():
    """Hosts may have equal names, and clocks that are hours apart or are set while they wait."""
    for path in (ROOT / "mlpmem_jax" / "parallel").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\btime\.time\(|\bdatetime\b|\bst_mtime\b", text), path
        names = re.findall(r"\bgethostname\b|\bplatform\.node\b|\buname\b", text)
        assert len(names) == (path.name == "multihost.py"), path  # (only to look it up)
