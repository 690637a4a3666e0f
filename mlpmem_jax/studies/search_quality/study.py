"""Measures every setting, and holds all against the exact one.

Suffixes: N rows of a split, D documents, R draws, M systems and then tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from mlpmem_jax.config.studies import SearchSetting
from mlpmem_jax.console import say
from mlpmem_jax.evaluation.draws import Settings, drawn_nats
from mlpmem_jax.evaluation.evaluate_table import SplitScores
from mlpmem_jax.evaluation.labels import StoredSplit
from mlpmem_jax.evaluation.metrics import DocumentCounts, document_notes
from mlpmem_jax.evaluation.run_scores import EVALUATED
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_networks
from mlpmem_jax.pipeline.scoring import memory_scores, stored_split
from mlpmem_jax.retrieval import recall
from mlpmem_jax.retrieval.engine import Engine, StoredKeys
from mlpmem_jax.retrieval.index_builder import ExactCache, open_index
from mlpmem_jax.retrieval.knn_lm import read_labels
from mlpmem_jax.retrieval.merge import drop_own_row
from mlpmem_jax.retrieval.temperature import temperature_notes, weight_notes
from mlpmem_jax.stats.bootstrap import Draws, PairedSums
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.checked_json import read_checked_json, write_checked_json
from mlpmem_jax.studies.search_quality.divergence import compare_neighbors
from mlpmem_jax.studies.search_quality.search_scores import SearchedKnn
from mlpmem_jax.studies.search_quality.settings import reference_of, with_setting

SCHEMA_VERSION = 1
MEASURED = ("knn", "memory")
BY_DRAW = "test_nats_by_draw"
_SAMPLE_SEED = 3
_CHOSEN: Mapping[Split, None] = {}  # λ is chosen on validation.


def measure_settings(run: Artifacts, mesh: jax.sharding.Mesh, path: epath.Path) -> dict[str, Any]:
    """Measures all settings whose indices, targets and memories are finished.

    Args:
        path: Where what was measured of each setting is kept.

    Returns:
        What `search-quality.json` holds.
    """
    config = run.config
    stored = {split: stored_split(run, split) for split in EVALUATED}
    train = run.datastore("train")
    exact = ExactCache(train, config.retrieval, config.mesh)
    study = _Study(run, mesh, stored, read_labels(train), exact)
    found = []
    for setting in config.search_quality.settings:
        file = path / f"setting-{setting.name}.json"
        if not file.exists():
            write_checked_json(file, study.measure(setting))
        found.append(read_checked_json(file))
    return summarize(run, stored["test"].counts, stored["test"].logprob_N, found)


@dataclasses.dataclass(frozen=True)
class _Study:
    """What the settings share."""

    run: Artifacts
    mesh: jax.sharding.Mesh
    stored: Mapping[Split, StoredSplit]
    train_label: np.ndarray
    exact: ExactCache

    def measure(self, setting: SearchSetting) -> dict[str, Any]:
        """Measures one setting: its neighbours, its kNN-LM, its memory."""
        run = with_setting(self.run, setting)
        say(f"search-quality: measuring {setting.name}")
        config = run.config
        width = config.decoder.width
        engine, settings = open_index(run.index, config.retrieval, width, self.exact)
        targets = run.targets("train").load()
        temperature = float(targets.counts["temperature"])
        index, searched = run.index.load(), dataclasses.asdict(settings) if settings else {}
        # Of the last start, which need not have searched all rows.
        rate = targets.measured.get("queries_per_sec") or None
        return {
            "name": setting.name,
            "engine": engine.name,
            "num_leaves": index.counts.get("num_leaves"),
            "num_leaves_to_search": searched.get("num_leaves_to_search"),
            "num_reorder": searched.get("num_reorder"),
            "cells": index.counts.get("cells"),
            "cells_to_search": searched.get("cells_to_search"),
            "index_secs": index.measured.get("seconds"),
            "search_secs": rate and int(targets.counts["rows"]) / rate,
            "queries_per_sec": rate,
            "temperature_of_targets": temperature,
            **self._neighbors(run, engine, temperature),
            "knn": self._knn(run, engine),
            "memory": self._memory(run),
        }

    def _neighbors(self, run: Artifacts, engine: Engine, temperature: float) -> dict[str, float]:
        """Compares the neighbours of sampled training rows with the exact ones."""
        config, retrieval = run.config, run.config.retrieval
        sample = recall.draw_sample(
            StoredKeys(run.datastore("train")),
            self.exact().search,
            config.search_quality.sample_rows,
            retrieval.num_neighbors,
            (config.seed, _SAMPLE_SEED),
        )
        found = engine.search(sample.query_QD, retrieval.num_neighbors + 1)
        found = drop_own_row(found, sample.row_Q)
        divergence = compare_neighbors(found, sample.truth, self.train_label, temperature)
        return {"recall": recall.recall(found, sample.truth), **divergence}

    def _knn(self, run: Artifacts, engine: Engine) -> dict[str, Any]:
        config, retrieval = run.config, run.config.retrieval
        searched = {
            split: SearchedKnn(
                engine,
                run.datastore(split),
                one.label_N,
                self.train_label,
                retrieval.num_neighbors,
                retrieval.query_batch,
            )
            for split, one in self.stored.items()
        }
        valid, most = self.stored["valid"], config.evaluate.knn_valid_rows
        tuned = searched["valid"].tune(valid.counts.scored_N, valid.logprob_N, most, config.seed)
        part_N = {
            split: searched[split].logprob(one.counts.scored_N, tuned.temperature)
            for split, one in self.stored.items()
        }
        return self._scores("knn", part_N) | {
            "temperature": tuned.temperature,
            "temperature_at_bound": tuned.at_bound,
        }

    def _memory(self, run: Artifacts) -> dict[str, Any]:
        networks = finished_networks(run, self.mesh, frozen=True)
        weight = run.config.trained_interpolation
        remembered = {s: memory_scores(run, s, *networks, self.mesh, weight) for s in EVALUATED}
        part_N = {split: one.logprob_N for split, one in remembered.items()}
        return self._scores("memory", part_N, {s: one.weight for s, one in remembered.items()})

    def _scores(
        self,
        name: str,
        part_N: Mapping[Split, np.ndarray],
        trained: Mapping[Split, np.ndarray | float | None] = _CHOSEN,
    ) -> dict[str, Any]:
        """Returns nats per token, by test document and by draw of the bootstrap.

        λ is that of training, or else chosen on validation, in each draw anew.
        """
        scores = {
            split: SplitScores(
                one.counts,
                one.logprob_N,
                part_N[split],
                part_N[split],
                memory_weight=trained.get(split),
            )
            for split, one in self.stored.items()
        }
        valid, test = scores["valid"], scores["test"]
        system, evaluate = valid.systems[name], self.run.config.evaluate
        weight_M = valid.parts.tuned_weights(system)
        nats = {s: one.parts.nats_by_document(system, weight_M) for s, one in scores.items()}
        tokens = {split: int(one.counts.tokens_D.sum()) for split, one in scores.items()}
        settings = Settings(
            evaluate.bootstrap_samples, evaluate.confidence, self.run.config.seed, "decoder", "knn"
        )
        return {
            "interpolation": valid.weight(name, weight_M),
            "valid_nats": float(nats["valid"].sum()) / tokens["valid"],
            "test_nats": float(nats["test"].sum()) / tokens["test"],
            "test_nats_by_document": nats["test"].tolist(),
            BY_DRAW: drawn_nats(valid.parts, test.parts, system, settings).tolist(),
        }


def summarize(
    run: Artifacts,
    counts: DocumentCounts,
    decoder_N: np.ndarray,
    found: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Adds what is paired: differences to the decoder and to the exact setting.

    Args:
        counts: Documents of test.
        decoder_N: log p_LM of the labels of test.
        found: What was measured of each setting.
    """
    config = run.config
    reference = reference_of(config.search_quality)
    decoder_D = -counts.sum_by_document(decoder_N)
    column = {"decoder": 0}
    draws = Draws(counts.num_clusters, config.evaluate.bootstrap_samples, config.seed)
    values = [decoder_D]
    drawn = [draws.sums(counts.by_cluster(decoder_D)[:, None])[:, 0]]
    for one in found:
        for system in MEASURED:
            column[f"{one['name']} {system}"] = len(values)
            values.append(np.asarray(one[system]["test_nats_by_document"]))
            drawn.append(np.asarray(one[system][BY_DRAW]))
    values_DM = np.stack([*values, counts.tokens_D.astype(np.float64)], axis=1)
    drawn.append(draws.sums(counts.tokens_C[:, None])[:, 0])
    paired = PairedSums(
        values_DM.sum(axis=0),
        np.stack(drawn, axis=1),
        config.evaluate.confidence,
        has_interval=counts.num_clusters > 1,
    )

    def difference(first: str, second: str) -> dict[str, float | None]:
        a, b = column[first], column[second]

        def statistic(sums: np.ndarray) -> np.ndarray:
            return np.asarray((sums[..., a] - sums[..., b]) / sums[..., -1])

        number = paired.number(statistic, bounded=a != b)
        return {"nats": number["value"], "low": number["low"], "high": number["high"]}

    settings = []
    for one in found:
        row = {name: value for name, value in one.items() if name not in MEASURED}
        for system in MEASURED:
            name = f"{one['name']} {system}"
            row[system] = {
                **{key: value for key, value in one[system].items() if key != BY_DRAW},
                "against_decoder": difference(name, "decoder"),
                "against_exact": difference(name, f"{reference} {system}") if reference else None,
            }
        settings.append(row)
    notes = [
        "one training of each memory: differences smaller than the spread of seeds are not "
        "significant; each interval is for one comparison alone and includes the choice of λ; τ is "
        "held fixed",
        *document_notes(counts),
    ]
    for one in found:
        knn, name = one["knn"], one["name"]
        said = temperature_notes(knn["temperature"], knn["temperature_at_bound"])
        chosen = ("knn",) if config.brings_interpolation else MEASURED
        said += [note for s in chosen for note in weight_notes(one[s]["interpolation"], s)]
        notes += [f"{note} (setting {name})" for note in said]
    return {
        "schema_version": SCHEMA_VERSION,
        "test": counts.summary,
        "confidence": config.evaluate.confidence,
        "bootstrap_samples": config.evaluate.bootstrap_samples,
        "seed": config.seed,
        "num_neighbors": config.retrieval.num_neighbors,
        "sample_rows": config.search_quality.sample_rows,
        "reference": reference,
        "decoder_test_nats": float(decoder_D.sum() / counts.tokens_D.sum()),
        "documents": {"tokens": counts.tokens_D.tolist(), "decoder": decoder_D.tolist()},
        "settings": settings,
        "notes": notes,
    }
