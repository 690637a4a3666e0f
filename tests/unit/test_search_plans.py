"""How the shipped configurations for accelerators search on the hardware that they name."""

import dataclasses
import re

import pytest

from mlpmem_jax.config.load import load_config
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.pipeline import embed, evaluate, index, needs, pretrain, retrieve, train
from mlpmem_jax.pipeline.fitting import Need, shortages
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.sources import Sources
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.retrieval import engine
from mlpmem_jax.retrieval.estimates import exact_bytes, routed_plan
from mlpmem_jax.store.manifest import Artifact, Completion
from tests.conftest import ROOT

GIB, GB = 1 << 30, 10**9


def _slice(kind, devices, local, device_bytes, host_bytes):
    platform = "gpu" if "NVIDIA" in kind else "tpu"
    processes = devices // local
    return Machine(platform, kind, devices, local, processes, device_bytes, host_bytes, None)


# Hardware as the header names it, and tokens; hosts by the vendors.
ACCELERATED = {
    "gpt2_small": (_slice("TPU v5e", 8, 8, 16 * GIB, 384 * GB), 1e8),
    "gpt2_medium": (_slice("TPU v5e", 16, 4, 16 * GIB, 192 * GB), 1e8),
    "gpt2_large": (_slice("TPU v5e", 32, 4, 16 * GIB, 192 * GB), 1e8),
    "gpt2_xl": (_slice("TPU v5e", 64, 4, 16 * GIB, 192 * GB), 1e8),
    "gpt2_xl_h200": (_slice("NVIDIA H200", 8, 8, int(0.75 * 141 * GB), 2000 * GB), 1e8),
    # Hosts are not named there: let them have any memory.
    "llama_1b": (_slice("an accelerator", 32, 8, 32 * GIB, 1 << 60), 1e9),
    "llama2_7b": (_slice("TPU v5p", 64, 4, 95 * GIB, 448 * GB), 1e9),
    "mistral_7b": (_slice("TPU v5p", 64, 4, 95 * GIB, 448 * GB), 1e9),
    "llama2_70b": (_slice("TPU v5p", 512, 4, 95 * GIB, 448 * GB), 1e9),
}
H100 = _slice("NVIDIA H100", 8, 8, int(0.75 * 80 * GB), 2000 * GB)


@pytest.fixture(autouse=True)
def _without_texts_but_with_scann(monkeypatch):
    monkeypatch.setattr(engine, "is_approximate_installed", lambda: True)
    monkeypatch.setattr(Sources, "text", lambda self, corpus: {"corpus": "made up"})


def _planned(name, *overrides):
    run = Artifacts(load_config(ROOT / "configs" / f"{name}.yaml", overrides))
    corpus, tokens = run.config.corpus, ACCELERATED[name][1]
    shares = {"valid": corpus.valid_fraction, "test": corpus.test_fraction}
    shares["train"] = 1 - sum(shares.values())
    rows = {split: int(tokens * share) for split, share in shares.items()}
    commands = (pretrain, embed, index, retrieve, train, evaluate)
    return run, rows, [stage for command in commands for stage in command.stages(run)]


@pytest.mark.parametrize("name", ACCELERATED)
def test_what_a_header_says_of_disk_and_retrieval_is_what_is_computed(name):
    machine = ACCELERATED[name][0]
    run, rows, stages = _planned(name)
    assert shortages(stages, machine, lambda *_: rows) == []
    found = [stage.need(machine, lambda _: rows) for stage in stages]
    found.append(needs.tokens_need(run, machine, lambda _: rows))
    text = (ROOT / "configs" / f"{name}.yaml").read_text("utf-8")
    header = " ".join(re.match(r"(?:#.*\n)+", text)[0].replace("#", "").split())
    disk = sum(need.disk_bytes for need in found) + max(need.temporary_bytes for need in found)
    number, unit = re.search(r"([\d.]+) (GB|TB) of disk for", header).groups()
    assert float(number) * (1000 if unit == "TB" else 1) == pytest.approx(disk / GB, rel=0.05)
    # All keys on the devices, and in how many parts they and the index are searched.
    keys = exact_bytes(rows["train"], run.config.decoder.width, machine.num_devices) / GIB
    exact, of_index = (
        -(-need.plan["key shards"] // need.plan["key shards in memory at a time"])
        for stage, need in zip(stages, found[:-1], strict=True)
        if stage.artifact in (run.neighbors("valid"), run.targets("train"))
    )
    parts = "as a whole" if of_index == 1 else f"in {of_index} parts"
    assert (
        f"the keys take {keys:.1f} GiB of each device and are searched in {exact} parts, the index "
        f"{parts}" in header
    )


def test_what_an_h200_holds_an_h100_searches_in_more_parts():
    machine, _ = ACCELERATED["gpt2_xl_h200"]
    _, rows, stages = _planned("gpt2_xl_h200")
    assert shortages(stages, H100, lambda *_: rows) == []
    at_once = [
        next(need.plan["key shards in memory at a time"] for need in found if need.plan)
        for found in ([s.need(one, lambda _: rows) for s in stages] for one in (machine, H100))
    ]
    assert 0 < at_once[1] < at_once[0]


def test_a_routed_search_is_planned_before_it_begins():
    """Cells lie on the hosts, in parts; their index needs its disk twice while it is made."""
    machine = ACCELERATED["gpt2_small"][0]
    run, rows, stages = _planned("gpt2_small")  # `auto` routes so many rows.
    assert shortages(stages, machine, lambda *_: rows) == []
    needed = {stage.artifact.relative: stage.need(machine, lambda _: rows) for stage in stages}
    made, searched = needed[run.index.relative], needed[run.targets("train").relative]
    count, width = rows["train"], run.config.decoder.width
    assert made.disk_bytes == made.temporary_bytes == count * (2 * width + 12) + (1 << 20)
    shards = -(-count // run.config.retrieval.shard_rows)
    at_once = searched.plan["key shards in memory at a time"]
    assert searched.plan["key shards"] == shards and 1 < at_once < shards
    keys = exact_bytes(count, width, 1) * at_once / shards
    held = max(moment.host_bytes for moment in searched.moments)
    assert keys < held < 1.01 * keys + 10**9 and held <= machine.host_bytes // 2
    assert searched.temporary_bytes > 0  # Running lists.
    # A budget that holds no key shard is refused where the configuration is checked.
    small = run.config.retrieval.model_copy(update={"memory_bytes": 10**9})
    with pytest.raises(ConfigError, match=r"holds no key shard.* or lower retrieval.shard_rows"):
        routed_plan(count, width, small, None).check()


def test_disk_for_a_time_is_needed_once_and_what_lies_there_counts(tmp_path):
    machine = dataclasses.replace(H100, disk_bytes=1000)
    artifacts = [Artifact(tmp_path, f"memory/{name}", "memory") for name in "ab"]
    stages = [
        Stage(one, Completion, need=lambda *_, size=size: Need(400, temporary_bytes=size))
        for one, size in zip(artifacts, (200, 201), strict=True)
    ]
    (line,) = shortages(stages, machine, lambda *_: {})
    assert "need at least 1001 B" in line and line.count("for a time 201 B") == 1
    # Results and lists of an interrupted start: 500 of 601 bytes are there.
    (artifacts[1].path / "running").mkdir(parents=True)
    (artifacts[1].path / "running" / "0-1.lists").write_bytes(b"x" * 500)
    machine = dataclasses.replace(machine, disk_bytes=600)
    assert shortages(stages, machine, lambda *_: {}) == []
    machine = dataclasses.replace(machine, disk_bytes=599)
    assert len(shortages(stages, machine, lambda *_: {})) == 1
