"""What searches need: the keys that are in memory at a time, and running lists on disk."""

import contextlib

from mlpmem_jax.corpus.row_estimates import Rows
from mlpmem_jax.errors import ArtifactError, ConfigError
from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.pipeline.fitting import Moment, Need
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.retrieval.engine import choose_engine
from mlpmem_jax.retrieval.estimates import (
    KeyShardPlan,
    exact_plan,
    index_plan,
    routed_plan,
    spilled_bytes,
    spilled_rows,
)
from mlpmem_jax.store.array_specs import Split


def exact_search_plan(run: Artifacts, machine: Machine, rows: Rows) -> KeyShardPlan:
    """Returns how exact search goes through the keys of the training rows."""
    config, memory = run.config, machine.device_bytes
    if machine.platform == "cpu" and machine.host_bytes is not None:
        memory = machine.host_bytes // machine.local_devices
    shape = max(1, rows["train"]), config.decoder.width, config.datastore.shard_rows
    return exact_plan(*shape, config.retrieval, machine.num_devices, memory)


def _index_plan(run: Artifacts, machine: Machine, rows: Rows) -> KeyShardPlan:
    config = run.config
    shape = max(1, rows["train"]), config.decoder.width
    if chosen_engine(run, machine, rows["train"]) == "routed":
        return routed_plan(*shape, config.retrieval, machine.host_bytes)
    return index_plan(*shape, config.retrieval, machine.num_processes, machine.host_bytes)


def exact_moment(run: Artifacts, machine: Machine, rows: Rows) -> Moment:
    """Returns the keys that exact search holds at a time, over the devices."""
    plan = exact_search_plan(run, machine, rows)
    return Moment(
        f"{plan.at_once} of {plan.num_shards} key shards for exact search, in float32",
        plan.way_out,
        device_bytes=plan.held_bytes,
    )


def index_moment(run: Artifacts, machine: Machine, rows: Rows) -> Moment:
    """Returns the shards of the index that each process holds at a time."""
    plan = _index_plan(run, machine, rows)
    engine = {"routed": "routed search"}.get(chosen_engine(run, machine, rows["train"]), "ScaNN")
    return Moment(
        f"{plan.at_once} of {plan.num_shards} shards of the index for {engine}",
        plan.way_out,
        host_bytes=plan.held_bytes,
    )


def measured_search(
    run: Artifacts,
    machine: Machine,
    rows: Rows,
    split: Split,
    disk_bytes: int,
    share: float = 1.0,
) -> Need:
    """Returns a search by the engine of the index, with its recall against the exact one.

    Args:
        machine: Where it runs.
        rows: Rows of each split.
        split: Whose rows are searched for.
        disk_bytes: What is kept of it.
        share: Of these rows, about.
    """
    exact = exact_moment(run, machine, rows)
    if chosen_engine(run, machine, rows["train"]) == "exact":
        plan = exact_search_plan(run, machine, rows)
        return search_need(run, rows, split, disk_bytes, (exact,), plan, share)
    index, plan = (index_moment(run, machine, rows), exact), _index_plan(run, machine, rows)
    return search_need(run, rows, split, disk_bytes, index, plan, share)


def search_need(
    run: Artifacts,
    rows: Rows,
    split: Split,
    disk_bytes: int,
    moments: tuple[Moment, ...],
    plan: KeyShardPlan,
    share: float = 1.0,
) -> Need:
    """Returns a search for rows of a split; running lists need disk where keys do not fit."""
    wanted, num_queries = num_neighbors(run, rows), rows[split]
    if share < 1:  # Whole documents may be drawn: it can be fewer, never refused for more.
        num_queries = int(num_queries * share / 2)
    lists = spilled_bytes(num_queries, wanted, plan)
    waves = -(-num_queries // spilled_rows(wanted)) if lists else 1
    shown = {
        "key shards": plan.num_shards,
        "key shards in memory at a time": plan.at_once,
        "times that each key shard is loaded": waves,
    }
    return Need(disk_bytes, moments, lists, shown if rows["train"] else {})


def num_neighbors(run: Artifacts, rows: Rows) -> int:
    """Returns K; of more than there are rows another check says so."""
    config = run.config
    return min(config.retrieval.num_neighbors, rows["train"])


def chosen_engine(run: Artifacts, machine: Machine, num_rows: int) -> str:
    """Returns the engine of the index that is there, or that `retrieval.engine` leads to."""
    config, found = run.config, indexed_engine(run)
    if found is not None:
        return found
    try:
        return choose_engine(config.retrieval, num_rows, machine.platform).engine
    except ConfigError:  # Another check refuses what is not installed.
        return "scann"


def indexed_engine(run: Artifacts) -> str | None:
    """Returns the engine of a finished index: not always the one that `auto` leads to today."""
    with contextlib.suppress(ArtifactError):
        if run.index.is_complete():
            return str(run.index.load().counts["engine"])
    return None
