"""Cost of each system while the datastore grows by doublings.

Suffixes: S sizes, R rounds, T values of a round.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from mlpmem_jax.config.studies import CostConfig
from mlpmem_jax.console import progress
from mlpmem_jax.evaluation.cost import parameter_bytes
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_decoder, finished_memory
from mlpmem_jax.pipeline.scoring import compiled_models
from mlpmem_jax.retrieval.approximate import AH_MIN_ROWS
from mlpmem_jax.retrieval.knn_lm import read_labels
from mlpmem_jax.store.array_specs import datastore_arrays
from mlpmem_jax.studies.cost import slopes
from mlpmem_jax.studies.cost.measurements import PLAIN, Timer, sizes

SCHEMA_VERSION = 1
LABELS = {
    "decoder": "decoder",
    "memory": "+ memory",
    "scann": "+ kNN-LM, ScaNN",
    "exact": "+ kNN-LM, exact",
}


def measure_growth(
    run: Artifacts, evaluated: Mapping[str, Any], mesh: jax.sharding.Mesh, path: epath.Path
) -> dict[str, Any]:
    """Measures, or continues to.

    Returns:
        What `cost.json` holds, without quality.
    """
    config = run.config
    timer, bytes_of = _timer(run, evaluated, mesh, path)
    rows_S = sizes(len(timer.train_label), config.cost.doublings, config.retrieval.num_neighbors)
    prepared = {rows: timer.prepare(rows) for rows in rows_S}
    rounds: dict[int, list[dict[str, Any]]] = {rows: [] for rows in rows_S}
    bar = progress(config.cost.rounds * len(rows_S), "size", "cost")
    # Sizes inside rounds, in an order of each round's own: what the machine does meanwhile falls
    # on all sizes alike, and no drift within a round looks like a slope.
    for number in range(config.cost.rounds):
        for rows in np.random.default_rng((config.seed, number)).permutation(rows_S).tolist():
            rounds[rows].append(timer.time(number, rows, prepared[rows]))
            bar.update(1)
    bar.close()
    timer.remove_indices()
    names = [*PLAIN, *config.cost.engines]
    value_SRT = {
        name: {
            what: np.asarray([[one[name][what] for one in rounds[rows]] for rows in rows_S])
            for what in ("token", "search", "first", "step")
        }
        for name in names
    }
    about = _bytes(run, rows_S, prepared, bytes_of, names)
    return {
        "schema_version": SCHEMA_VERSION,
        "rows": rows_S,
        "labels": {name: LABELS[name] for name in names},
        "confidence": config.cost.confidence,
        "machine": machine(mesh),
        "protocol": config.cost.model_dump(mode="json"),
        "recall": [prepared[rows].get("recall") for rows in rows_S],
        "settings": [prepared[rows].get("settings") for rows in rows_S],
        "systems": summarize(config.cost, rows_S, value_SRT, about),
        "milliseconds": {
            name: {what: value.tolist() for what, value in of.items()}
            for name, of in value_SRT.items()
        },
        "notes": _notes(run, rows_S, prepared),
    }


def machine(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns what the times depend on besides the programme."""
    device = mesh.devices.flat[0]
    return {
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "devices": mesh.size,
        "platform": device.platform,
        "device_kind": device.device_kind,
    }


def _timer(
    run: Artifacts, evaluated: Mapping[str, Any], mesh: jax.sharding.Mesh, path: epath.Path
) -> tuple[Timer, dict[str, int]]:
    """Returns the timer, and the bytes of the parameters of both models."""
    decoder = finished_decoder(run, mesh, frozen=True)
    memory = finished_memory(run, mesh, frozen=True)
    systems = evaluated["systems"]
    alone = parameter_bytes(decoder)
    timer = Timer(
        run,
        mesh,
        path,
        compiled_models(run, decoder, memory, systems, mesh),
        train_label=read_labels(run.datastore("train")),
        temperature=float(systems["knn"]["temperature"]),
        weight=float(systems["knn"]["interpolation"]),
    )
    return timer, {"decoder": alone, "memory": alone + parameter_bytes(memory)}


def _bytes(
    run: Artifacts,
    rows_S: Sequence[int],
    prepared: Mapping[int, Mapping[str, Any]],
    bytes_of: Mapping[str, int],
    names: Sequence[str],
) -> dict[str, list[int]]:
    """Returns the bytes that each system keeps: weights, labels, and keys or index.

    An index of ScaNN holds the keys.
    """
    specs = datastore_arrays(run.config.datastore, run.config.decoder.width)
    key, label = specs["key"].row_bytes, specs["label"].row_bytes
    kept = {}
    for name in names:
        base = bytes_of.get(name, bytes_of["decoder"])
        if name in PLAIN:
            kept[name] = [base] * len(rows_S)
            continue
        searched = [prepared[n]["index_bytes"] if name == "scann" else n * key for n in rows_S]
        kept[name] = [base + n * label + s for n, s in zip(rows_S, searched, strict=True)]
    return kept


def summarize(
    cost: CostConfig,
    rows_S: Sequence[int],
    value_SRT: Mapping[str, Mapping[str, np.ndarray]],
    kept_bytes: Mapping[str, Sequence[int]],
) -> dict[str, dict[str, Any]]:
    """Returns percentiles at each size, and slopes with intervals.

    Slopes stand beside their differences to the decoder's, paired by round: the decoder
    searches nothing, so that its own slope is the clock's.

    Args:
        value_SRT: Milliseconds of each system, "decoder" among them, and of each kind.
        kept_bytes: Bytes of each system at each size.
    """
    summary: dict[str, dict[str, Any]] = {}
    slope_R: dict[str, dict[str, np.ndarray]] = {}
    for name, values in value_SRT.items():
        summary[name] = {"bytes": list(kept_bytes[name])}
        slope_R[name] = {}
        for quantity, (what, statistic) in _quantities(cost.batch_size).items():
            if not values[what].any():  # Nothing is searched.
                summary[name][quantity] = [None] * len(rows_S)
                continue
            summary[name][quantity] = statistic(values[what].reshape(len(rows_S), -1)).tolist()
            # Of each round alone.
            slope_R[name][quantity] = slopes.fit(np.asarray(rows_S), statistic(values[what]).T)
    for name, found in slope_R.items():
        growth = float(slopes.fit(np.asarray(rows_S), np.asarray(kept_bytes[name])))
        level, clock_R = cost.confidence, slope_R["decoder"]
        summary[name]["slopes"] = {"bytes": {"slope": growth, "low": None, "high": None}} | {
            quantity: slopes.over_rounds(one, level) for quantity, one in found.items()
        }
        summary[name]["slopes_above_decoder"] = {
            quantity: slopes.over_rounds(one - clock_R[quantity], level)
            for quantity, one in found.items()
            if name != "decoder" and quantity in clock_R
        }
    return summary


def _quantities(batch: int) -> dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Returns what is summarised: of which times, and how values [..., n] become one number."""
    median, high = (functools.partial(np.percentile, q=q, axis=-1) for q in (50, 95))
    return {
        "token_ms_p50": ("token", median),
        "token_ms_p95": ("token", high),
        "search_ms_p50": ("search", median),
        "first_ms_p50": ("first", median),
        "first_ms_p95": ("first", high),
        "tokens_per_sec": ("step", lambda values: 1000 * batch / values.mean(axis=-1)),
    }


def _notes(
    run: Artifacts, rows_S: Sequence[int], prepared: Mapping[int, Mapping[str, Any]]
) -> list[str]:
    config, notes = run.config, []
    if "scann" in config.cost.engines:
        notes.append("ScaNN searches a token, and a batch of up to 256, in one thread")
        floor = config.retrieval.min_recall
        low = [f"{rows:,}" for rows in rows_S if prepared[rows]["recall"] < floor]
        if low:
            notes.append(
                f"ScaNN stays below retrieval.min_recall={floor} at {', '.join(low)} rows: sizes "
                "are not compared at equal recall"
            )
        if rows_S[0] < AH_MIN_ROWS:
            notes.append(f"below {AH_MIN_ROWS:,} rows ScaNN scores every row: it has no tree")
    if "exact" in config.cost.engines:
        notes.append("the exact engine uses all cores or devices")
    return notes
