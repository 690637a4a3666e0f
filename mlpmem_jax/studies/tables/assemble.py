"""From stored scores and manifests to what the files of a table hold."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.evaluation.draws import Settings
from mlpmem_jax.evaluation.labels import SplitLabels
from mlpmem_jax.evaluation.metrics import FITTED_GATE_NOTE
from mlpmem_jax.evaluation.statistics import summarise
from mlpmem_jax.evaluation.systems import SeedScores, SplitParts, System
from mlpmem_jax.pipeline import networks
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.retrieval.neighbors import StoredNeighbors
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.studies.tables.ledger import Ledger
from mlpmem_jax.studies.tables.part_scores import SCORED, Part
from mlpmem_jax.studies.tables.rows import Row
from mlpmem_jax.training.flops import decoder_parameters, memory_parameters

Rows = Mapping[int, Sequence[Row]]


def table_results(run: Artifacts, rows: Rows, settings: Settings) -> dict[str, Any]:
    """Returns the numbers of a table, from stored scores.

    Args:
        run: The artifacts of the configuration, for the tokens.
        rows: The rows of each seed, the same keys in the same order.
    """
    labels = {split: _labels_by_tokens(run, rows, split) for split in SCORED}
    names = _part_names(rows)
    seeds = {}
    for seed, of_seed in rows.items():
        parts = {
            names[number, place]: part
            for number, row in enumerate(of_seed)
            for place, part in enumerate(row.parts)
        }
        read = {split: _split_parts(run, parts, split, labels[split]) for split in SCORED}
        seeds[seed] = SeedScores(read["valid"], read["test"])
    systems = [
        System(
            row.key,
            _label(row),
            tuple(names[number, place] for place in range(len(row.parts))),
        )
        for number, row in enumerate(next(iter(rows.values())))
    ]
    results = summarise(systems, seeds, settings)
    mixtures = (part for row in rows[next(iter(rows))] for part in row.parts)
    if any(part.kind == "mixture" and part.run.config.memory.gate == "fitted" for part in mixtures):
        results["notes"].append(FITTED_GATE_NOTE)
    return results


def _label(row: Row) -> str:
    """Returns the label of a row; `auto` may have given ScaNN up after the row was planned."""
    for part in row.parts:
        if part.kind == "knn_by_index":
            engine = part.run.neighbors_by_index("test").load().measured["engine"]
            return row.label if engine == "scann" else f"{row.label} (given up, {engine} search)"
        if part.kind == "knn" and part.run.config.retrieval.exact_rows != "all":
            engine = part.run.neighbors("test").load().measured["engine"]
            return row.label.replace("exact", engine)
    return row.label


def _labels_by_tokens(run: Artifacts, rows: Rows, split: Split) -> dict[str, SplitLabels]:
    """Returns the labels of the table's tokens and of those that rows have of their own."""
    runs = [run, *(part.run for of_seed in rows.values() for row in of_seed for part in row.parts)]
    tokens = {one.tokens.relative: one.tokens for one in runs}
    return {name: SplitLabels.open(TokenSplit.open(one, split)) for name, one in tokens.items()}


def _split_parts(
    run: Artifacts, parts: Mapping[str, Part], split: Split, labels: Mapping[str, SplitLabels]
) -> SplitParts:
    """Reads the scores of parts, each beside the labels of its own tokens."""
    whole = labels[run.tokens.relative]
    logprob, others = {}, {}
    for name, part in parts.items():
        own = labels[part.run.tokens.relative]
        logprob[name] = own.read(part.scores(split))
        if not np.array_equal(own.label_N, whole.label_N):
            others[name] = own.counts
    return SplitParts(whole.counts, logprob, others)


def _part_names(rows: Rows) -> dict[tuple[int, int], str]:
    """Returns a name for each part by row and place: one for parts that are equal in all seeds.

    A part is named after its kind and the first row that has it, for example "decoder-longer".
    """
    scores: dict[tuple[int, int], list[str]] = {}
    names: dict[tuple[int, int], str] = {}
    for of_seed in rows.values():
        for number, row in enumerate(of_seed):
            for place, part in enumerate(row.parts):
                found = part.scores("valid").relative
                scores.setdefault((number, place), []).append(found)
                again = any(other.kind == part.kind for other in row.parts[:place])
                names[number, place] = f"{part.kind}-{row.key}" + f"-{place}" * again
    first: dict[tuple[str, ...], str] = {}
    return {key: first.setdefault(tuple(found), names[key]) for key, found in scores.items()}


def table_costs(run: Artifacts, rows: Rows, *, with_costs: bool = True) -> dict[str, Any]:
    """Returns sizes, costs and temperatures of every row and seed, from manifests.

    Args:
        run: The artifacts of the configuration, for the measured peak.
        rows: The rows of each seed.
        with_costs: Off where rows are parts of a run: manifests know what the whole cost.
    """
    peak = float(run.machine.load().counts["peak_flops"])
    ledger = Ledger(run.store, peak)
    found: dict[str, dict[str, Any]] = {}
    for seed, of_seed in rows.items():
        for row in of_seed:
            made_of = row.made_of()
            found.setdefault(row.key, {})[str(seed)] = {
                **_size(row),
                **_temperature(row),
                "trained_weight": _trained_weight(row),
                "recall": _recall(row),
                "recall_of_targets": _recall_of_targets(row),
                "made_of": made_of,
            }
            if with_costs:
                cost = ledger.cost(made_of, row.decoders())
                added = {"steps": ledger.steps(made_of), "cost": cost.as_json()}
                found[row.key][str(seed)] |= added
    return {"peak_flops": peak, "rows": found}


def _size(row: Row) -> dict[str, int]:
    """Returns the parameters of all networks of a row."""
    total = {"parameters": 0, "non_embedding_parameters": 0}
    for part in row.parts:
        config, vocab_size = part.run.config, networks.vocab_size(part.run)
        counted = []
        if part.kind in ("decoder", "mixture", "joint"):
            counted.append(decoder_parameters(config.decoder, vocab_size))
        if part.kind in ("memory", "mixture", "joint"):
            counted.append(memory_parameters(config.memory, config.decoder.width, vocab_size))
        for counts in counted:
            total["parameters"] += counts["total"]
            total["non_embedding_parameters"] += counts["non_embedding"]
    return total


def _temperature(row: Row) -> dict[str, Any]:
    """Returns τ, and which end of its range it reached."""
    names = ("temperature", "temperature_at_bound")
    for part in row.parts:
        if part.kind.startswith("knn"):
            counts = part.scores("valid").load().counts
            return {name: counts.get(name) for name in names}
    return dict.fromkeys(names)


def _trained_weight(row: Row) -> float | None:
    """Returns λ of networks that were trained with one, the mean over test tokens."""
    for part in row.parts:
        if part.kind in ("mixture", "joint"):
            return float(part.scores("test").load().counts["interpolation"])
    return None


def _recall(row: Row) -> float | None:
    """Returns how many of the true neighbours of test rows the engine of a row finds.

    Where the true ones were not searched it is the recall of a sample of training rows.
    """
    for part in row.parts:
        if part.kind == "knn_by_index":
            found, truth = part.run.neighbors_by_index("test"), part.run.neighbors("test")
            is_exact = not part.run.config.retrieval.searches_by_index("test")
            if is_exact and truth.is_complete():
                return StoredNeighbors(found).recall(StoredNeighbors(truth))
            return float(found.load().measured["recall"])
    return None


def _recall_of_targets(row: Row) -> float | None:
    """Returns the recall of the search that made a memory's targets, on training rows."""
    for part in row.parts:
        if part.kind in ("memory", "mixture", "joint"):
            targets = part.run.targets("train")
            if targets.is_complete():
                found = targets.load().measured.get("recall")
                return None if found is None else float(found)
    return None
