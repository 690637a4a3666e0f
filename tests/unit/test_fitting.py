"""Stages that do not fit the machine are refused before the first of them starts."""

import dataclasses
import math
import re

import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.corpus.row_estimates import least_rows, likely_rows
from mlpmem_jax.errors import UserError
from mlpmem_jax.parallel import hardware
from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.parallel.mesh import mesh_sizes
from mlpmem_jax.pipeline import (
    embed,
    evaluate,
    fitting,
    index,
    needs,
    pretrain,
    retrieve,
    tokenize,
    train,
)
from mlpmem_jax.pipeline.fitting import Moment, Need, check_fit, shortages
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.sources import Unread
from mlpmem_jax.pipeline.stage import Stage, run_stages
from mlpmem_jax.store.manifest import Artifact, Completion
from tests.conftest import ROOT, load_shipped
from tests.unit.test_search_plans import ACCELERATED

GIB = 1 << 30
GB = 10**9


def _machine(**changes):
    one = Machine("tpu", "TPU v5e", 8, 8, 1, 16 * GIB, 384 * GB, None)
    return dataclasses.replace(one, **changes)


SHIPPED = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
OF_TEXT = [name for name in SHIPPED if name not in ACCELERATED]


def _header(name):
    return re.match(r"(?:#.*\n)+", (ROOT / "configs" / f"{name}.yaml").read_text("utf-8"))[0]


def _stages(config, header=""):
    """The stages after the text, which need not be there: of `run`, or those that a head names."""
    commands = (pretrain, embed, index, retrieve, train, evaluate)
    if named := re.search(r"for stage in ([a-z ]+);", header):
        commands = [one for one in commands if one.__name__.split(".")[-1] in named[1].split()]
        assert commands
    run = Artifacts(config, Unread(config.workdir))
    return [stage for command in commands for stage in command.stages(run)]


def _roles(lines):
    """What is refused, "ROLE (ID): …" each."""
    return [line.split(":")[0].split(" ")[0] for line in lines]


@pytest.mark.parametrize("name", OF_TEXT)
def test_configurations_for_two_cores_fit_them(name):
    config, header = load_shipped(ROOT / "configs" / f"{name}.yaml"), _header(name)
    memory = int(re.search(r"(\d+) GB of memory", header)[1]) * GB
    disk = re.search(r"(\d+) GB of disk", header)
    machine = _machine(
        platform="cpu",
        num_devices=1,
        local_devices=1,
        device_bytes=None,
        host_bytes=memory,
        disk_bytes=int(disk[1]) * GB if disk else None,
    )
    assert shortages(_stages(config, header), machine, likely_rows) == []


def _stage(tmp_path, name, need, made=None):
    def build():
        made.append(name)
        return Completion()

    artifact = Artifact(tmp_path / "run", name, "memory")
    return Stage(artifact, build, need=lambda machine, count: need)


@pytest.fixture
def on(monkeypatch):
    def set_machine(**changes):
        monkeypatch.setattr(fitting, "this_machine", lambda workdir: _machine(**changes))

    return set_machine


def test_all_stages_are_refused_together_before_the_first_is_made(tmp_path, on):
    on(disk_bytes=10 * GIB)
    made = []
    stages = [
        _stage(tmp_path, "memory/fits", Need(GIB, (Moment("x", "y", GIB, GIB),)), made),
        _stage(tmp_path, "memory/device", Need(0, (Moment("keys", "use more", 17 * GIB),)), made),
        _stage(tmp_path, "memory/host", Need(0, (Moment("shards", "use less", 0, 1 << 40),)), made),
        _stage(tmp_path, "memory/disk", Need(10 * GIB), made),
    ]  # fmt: skip
    with pytest.raises(UserError) as caught:
        run_stages(stages)
    assert made == [] and not (tmp_path / "run").exists()
    disk, device, host = caught.value.messages
    assert (
        "need at least 11.0 GiB (memory/disk (disk) 10.0 GiB, memory/fits (fits) 1.0 GiB)" in disk
    )
    assert (
        disk.startswith(f"{tmp_path / 'run'}: the artifacts to be made")
        and "10.0 GiB are free" in disk
    )
    assert device == (
        "memory/device (device): keys: at least 17.0 GiB on each of 8 devices (TPU v5e), which "
        "have 16.0 GiB; use more"
    )
    assert host == (
        "memory/host (host): shards: at least 1.0 TiB of host memory, and 357.6 GiB are free; "
        "use less"
    )


def test_what_is_there_counts_and_what_is_complete_is_not_asked(tmp_path, on):
    on(disk_bytes=GIB)
    made = []
    stage = _stage(tmp_path, "memory/base", Need(GIB + 1000), made)
    with pytest.raises(UserError, match="need at least 1.0 GiB"):
        run_stages([stage])
    stage.artifact.path.mkdir(parents=True)
    (stage.artifact.path / "building.json.tmp").write_bytes(
        b"x" * 1000
    )  # An interrupted start left it.
    check_fit([stage])
    run_stages([stage])
    on(disk_bytes=0, device_bytes=0)
    run_stages([dataclasses.replace(stage, need=lambda machine, count: Need(GIB))])
    assert made == ["memory/base"]


def test_moments_are_not_added_and_on_cpu_devices_share_the_host(tmp_path):
    moments = tuple(Moment("x", "y", 10 * GIB, 300 * GB) for _ in range(3))
    stage = _stage(tmp_path, "memory/base", Need(0, moments))
    assert shortages([stage], _machine(), lambda *_: {}) == []
    cpu = _machine(platform="cpu", device_bytes=None, local_devices=8)
    (line,) = shortages([stage], cpu, lambda *_: {})
    assert "at least 359.4 GiB of host memory" in line
    unknown = _machine(device_bytes=None, host_bytes=None, disk_bytes=None)
    assert shortages([stage], unknown, lambda *_: {}) == []


def test_a_frozen_decoder_counts_in_its_compute_dtype():
    """That of the machine where it is `auto`: 14 GB for 7 billion parameters in bfloat16."""
    config = load_shipped(ROOT / "configs" / "mistral_7b.yaml")
    assert config.decoder.compute_dtype == "auto"
    run = Artifacts(config, Unread(config.workdir))
    parts = math.prod(size for size in mesh_sizes(config.mesh, 256)[1:])
    machines = (_machine(platform=platform, num_devices=256) for platform in ("tpu", "cpu"))
    rows = {"train": 1000, "valid": 1000, "test": 1000}
    found = [needs.embedding_need(run, "valid", machine, lambda _: rows) for machine in machines]
    held = [need.moments[0].device_bytes * parts / 1e9 for need in found]
    assert 14 < held[0] < 14.6 and held[1] == pytest.approx(2 * held[0], rel=1e-3)


def test_a_run_is_refused_before_its_text_is_tokenized(tmp_path, monkeypatch, capsys):
    machine = _machine(num_devices=1, local_devices=1, device_bytes=100_000)
    monkeypatch.setattr(fitting, "this_machine", lambda workdir: machine)
    workdir = tmp_path / "run"
    arguments = ["run", "--config", str(ROOT / "configs" / "tiny.yaml"), "--workdir", str(workdir)]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert not workdir.exists()
    searches = [line for line in lines if "key shards for exact search" in line]
    assert [re.match(r"error: ([\w/-]+)", line)[1] for line in searches] == [
        "neighbors/valid", "neighbors/test", "targets/train", "results/evaluate",
    ]  # fmt: skip
    # All keys need not fit, one key shard must.
    assert all("at least 132.0 KiB on each of 1 devices" in line for line in searches)
    assert all(line.endswith("; lower datastore.shard_rows=1024") for line in searches)
    assert all(len(line) < 300 for line in lines)


def test_what_most_likely_will_not_fit_is_warned_of(tmp_path, monkeypatch, capsys, make_config):
    """Between the rows that there are at least and those that there most likely are."""
    run = Artifacts(make_config("datastore.shard_rows=1048576"))  # One key shard.
    config = run.config
    text = config.corpus, run.tokens
    least, likely = (rows(*text)["train"] for rows in (least_rows, likely_rows))
    assert 2 * least < likely
    width = config.decoder.width
    memory = 4 * (width + 1) * (least + likely) // 2 // 8
    monkeypatch.setattr(fitting, "this_machine", lambda workdir: _machine(device_bytes=memory))
    check_fit([*tokenize.stages(run), *retrieve.stages(run)])
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3 and all("refused after `tokenize`" in line for line in warnings)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_counts_and_its_caches_do_not(tmp_path, monkeypatch, version):
    group = tmp_path / ("memory/jobs/mine" if version == 1 else "jobs/mine")
    group.mkdir(parents=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
        2: ("memory.max", "memory.current", "file"),
    }[version]
    (group / names[0]).write_text("1000000\n")
    (group / names[1]).write_text("700000\n")
    (group / "memory.stat").write_text(f"anon 400000\n{names[2]} 300000\n")
    # Of a group above: no limit.
    (group.parent / names[0]).write_text("max\n")
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    proc = tmp_path / "cgroup"
    proc.write_text("9:memory:/jobs/mine\n" if version == 1 else "0::/jobs/mine\n")
    monkeypatch.setattr(hardware, "_OWN_CGROUP", proc)
    assert hardware._container_limits(0) == [600_000]
    assert hardware._container_limits(100_000) == [700_000]


def test_the_memory_of_a_device():
    class Device:
        platform, device_kind, limit = "gpu", "NVIDIA H100 80GB HBM3", {"bytes_limit": 123}

        def memory_stats(self):
            return self.limit

    assert hardware.device_memory(Device()) == 123
    Device.limit = None  # The table then says it.
    assert hardware.device_memory(Device()) == 80 * GB
    Device.device_kind = "something new"
    assert hardware.device_memory(Device()) is None
    Device.platform = "cpu"
    assert hardware.device_memory(Device()) is None


def test_this_machine_has_memory_and_disk(tmp_path):
    found = hardware.this_machine(str(tmp_path / "not" / "there"))
    assert found.device_bytes is None and found.platform == "cpu"
    assert found.host_bytes > 1 << 28 and found.disk_bytes > 0
    assert hardware.this_machine("gs://bucket/run").disk_bytes is None
