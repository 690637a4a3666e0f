"""Analyses a finished run: where it helps, and how sharp its distributions are.

Suffixes: N rows of the test split or of the sample, D documents, M sums.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.evaluation.labels import StoredSplit
from mlpmem_jax.evaluation.metrics import DocumentCounts, document_notes
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_decoder, finished_memory
from mlpmem_jax.pipeline.scoring import memory_scores, stored_split
from mlpmem_jax.retrieval.knn_lm import StoredKnn, draw_rows, read_labels
from mlpmem_jax.stats.bootstrap import bootstrap_sums, interval
from mlpmem_jax.stats.mixing import mixture_logprob
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.studies.analyze.distributions import DISTRIBUTIONS, Sample, measure_sample
from mlpmem_jax.studies.analyze.frequency import Bins, count_tokens
from mlpmem_jax.studies.analyze.groups import gains_by_group
from mlpmem_jax.studies.analyze.ngrams import counts_of_labels

SCHEMA_VERSION = 1
_SPLIT: Split = "test"
# What is compared with the decoder, in the order of tables.
COMPARED = {"knn": "+ kNN-LM", "memory": "+ memory"}


def analyze_run(
    run: Artifacts, evaluated: Mapping[str, Any], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Analyses the test split with λ and τ as `evaluate` chose them.

    Returns:
        What `analyze.json` holds.

    Raises:
        ArtifactError: Something is missing, damaged, or speaks of other tokens.
    """
    config = run.config
    decoder = finished_decoder(run, mesh, frozen=True)
    memory = finished_memory(run, mesh, frozen=True)
    stored = stored_split(run, _SPLIT)
    systems = evaluated["systems"]
    temperature = float(systems["knn"]["temperature"])
    weights = {name: float(systems[name]["interpolation"]) for name in COMPARED}
    neighbors = StoredKnn(
        run.neighbors(_SPLIT), stored.label_N, read_labels(run.datastore("train"))
    )
    parts = {
        "knn": neighbors.logprob(stored.counts.scored_N, temperature),
        "memory": memory_scores(run, _SPLIT, decoder, memory, mesh, None).logprob_N,
    }
    system_N = {
        name: mixture_logprob(part, stored.logprob_N, weights[name]) for name, part in parts.items()
    }
    sample = measure_sample(
        run,
        decoder,
        memory,
        _SPLIT,
        draw_rows(stored.counts.scored_N, config.analyze.sharpness_rows, config.seed),
        temperature=temperature,
        weight=weights["memory"],
        mesh=mesh,
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "test": stored.counts.summary,
        "confidence": config.evaluate.confidence,
        "bootstrap_samples": config.evaluate.bootstrap_samples,
        "seed": config.seed,
        "temperature": temperature,
        "interpolation": weights,
        "labels": COMPARED,
        **_groups(run, stored, system_N),
        "sharpness": _sharpness(run, sample, stored),
        "notes": [
            *document_notes(stored.counts),
            "λ and τ are those of evaluate, held fixed in the intervals; each interval is for one "
            "comparison alone",
        ],
    }


def _groups(
    run: Artifacts, stored: StoredSplit, system_N: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Returns gains by frequency of the label and by whether the n-gram was seen."""
    train, test = (TokenSplit.open(run.tokens, split) for split in ("train", _SPLIT))
    config, settings = run.config, run.config.analyze

    def gains(group_N: np.ndarray, labels: list[str]) -> list[dict[str, Any]]:
        return gains_by_group(
            stored.counts,
            group_N,
            labels,
            stored.logprob_N,
            system_N,
            bootstrap_samples=config.evaluate.bootstrap_samples,
            confidence=config.evaluate.confidence,
            seed=config.seed,
        )

    count_V = count_tokens(train, settings.read_tokens)
    bins = Bins.up_to(int(count_V.max(initial=0)), settings.frequency_base)
    frequency = gains(bins.of(count_V[stored.label_N]), bins.labels)
    for first, group in zip(bins.edges, frequency, strict=True):
        group["first_count"] = first
    found = counts_of_labels(test, train, settings.ngram_orders, settings.read_tokens)
    ngrams = [
        {"n": order, "groups": gains(np.minimum(count_N, 1), ["unseen", "seen"])}
        for order, count_N in found.items()
    ]
    everything = gains(np.zeros(len(stored.label_N), np.int64), ["all"])[0]
    return {"all": everything, "frequency": frequency, "ngrams": ngrams}


def _sharpness(run: Artifacts, sample: Sample, stored: StoredSplit) -> dict[str, Any]:
    """Returns means and medians over the sample, with intervals over clusters."""
    document_N = stored.counts.document_N[sample.row_N]
    knn_top_N = sample.of["knn"].top_C
    report: dict[str, Any] = {
        "rows": len(sample.row_N),
        "masses": list(run.config.analyze.masses),
        "steps": sample.steps,
        # How far the decoder, run again here, is from what `embed` stored.
        "decoder_label_nats_difference": float(
            np.abs(sample.decoder_label_N - stored.logprob_N[sample.row_N]).mean()
        ),
    }
    systems = {}
    for name in DISTRIBUTIONS:
        one = sample.of[name]
        means = {
            "label_top1": (one.top_C == sample.label_N).astype(np.float64),
            "knn_top1": (one.top_C == knn_top_N).astype(np.float64),
            "kl_from_knn": one.kl_C.astype(np.float64),
            "entropy": one.entropy_C.astype(np.float64),
        }
        systems[name] = {
            "mean_tokens": [_number(x) for x in one.tokens_CP.mean(axis=0, dtype=np.float64)],
            "median_tokens": [_number(x) for x in np.median(one.tokens_CP, axis=0)],
            "mean_mass": [_number(x) for x in one.mass_CJ.mean(axis=0, dtype=np.float64)],
        } | _means(run, means, document_N, stored.counts)
    return report | {"systems": systems}


def _means(
    run: Artifacts,
    values: Mapping[str, np.ndarray],
    document_N: np.ndarray,
    counts: DocumentCounts,
) -> dict[str, float | None]:
    """Returns means over sampled rows, each with an interval over clusters."""
    evaluate, num_documents = run.config.evaluate, len(counts.tokens_D)
    columns = [np.ones(len(document_N)), *values.values()]
    values_DM = np.stack(
        [np.bincount(document_N, column, minlength=num_documents) for column in columns], axis=1
    )
    values_CM = counts.by_cluster(values_DM)
    sums_RM = bootstrap_sums(values_CM, evaluate.bootstrap_samples, run.config.seed)
    means: dict[str, float | None] = {}
    for place, (name, value_N) in enumerate(values.items(), start=1):

        def mean(sums: np.ndarray, place: int = place) -> np.ndarray:
            return np.asarray(sums[..., place] / sums[..., 0])

        several = np.count_nonzero(values_CM[:, 0]) > 1
        found = interval(mean, sums_RM, evaluate.confidence) if several else None
        means[name] = _number(value_N.mean())
        means[f"{name}_low"] = found.low if found else None
        means[f"{name}_high"] = found.high if found else None
    return means


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
