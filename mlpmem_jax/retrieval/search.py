"""Search among the training rows for every row of a split, and the neighbours that are kept."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mlpmem_jax.config.data import DatastoreConfig, RetrievalConfig
from mlpmem_jax.console import say
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.retrieval import recall
from mlpmem_jax.retrieval.approximate import ApproximateEngine
from mlpmem_jax.retrieval.engine import Engine, Keys, StoredKeys
from mlpmem_jax.retrieval.index_builder import (
    CALIBRATION_SEED,
    MEASUREMENT_SEED,
    ExactCache,
    Settings,
    open_index,
    searching_with,
)
from mlpmem_jax.retrieval.key_major import search_by_shards
from mlpmem_jax.retrieval.key_shards import KeyShards
from mlpmem_jax.retrieval.merge import Neighbors
from mlpmem_jax.retrieval.neighbors import Consume, SplitSearch, check_enough_rows, search_split
from mlpmem_jax.retrieval.queries import Queries, exclusion_of
from mlpmem_jax.retrieval.routed import RoutedEngine
from mlpmem_jax.retrieval.shares import Share
from mlpmem_jax.store.array_specs import Split, neighbors_arrays
from mlpmem_jax.store.joined import first_part
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.store.shards import ShardWriter


@dataclasses.dataclass(frozen=True)
class Search:
    """Which rows are searched, and how.

    Attributes:
        train: The datastore of the training rows.
        index: Their index; None: they are searched exactly.
        exact: The exact engine over them.
        seed: Seed of the sample on which recall is measured, and of the rows to search for.
        tokens: The token stream; not read unless rows of a document are excluded.
    """

    train: Artifact
    index: Artifact | None
    exact: ExactCache
    retrieval: RetrievalConfig
    seed: int
    tokens: Artifact

    def queries(self, split: Split, share: Share | None = None) -> Queries:
        """Returns which rows of a split are searched for, and what is no neighbour of theirs."""
        if split != "train":
            return Queries(are_keys=False)
        return Queries(True, exclusion_of(self.retrieval, self.tokens, self.train), share)

    def check_rows(self) -> None:
        """Refuses more neighbours than there are.

        Raises:
            ConfigError: Names the key and both numbers.
        """
        num_rows = int(self.train.load().counts["rows"])
        check_enough_rows(self.retrieval.num_neighbors, num_rows, str(self.train.path))

    def opened_engine(self, split: Split) -> tuple[Engine, dict[str, Any]]:
        """Opens the engine that searches for a split, and what a manifest says of it.

        Of the rows of valid nothing says how well they are searched for; that of training rows
        is measured for the others.
        """
        if self.index is None:
            return self.exact(), {"engine": "exact"}
        if split != "valid":
            return self.measured_engine()
        width = StoredKeys(self.train).width
        engine, _ = open_index(self.index, self.retrieval, width, self.exact)
        return engine, {"engine": engine.name}

    def measured_engine(self, floor: float | None = None) -> tuple[Engine, dict[str, Any]]:
        """Opens the engine of the index and measures its recall; warns where it is low.

        Args:
            floor: Search only as thoroughly as this recall takes; None: as the index is searched.

        Raises:
            ConfigError: The exact engine does not find what a plain search finds.
        """
        assert self.index is not None
        retrieval, keys = self.retrieval, StoredKeys(self.train)
        is_exact = self.index.load().counts["engine"] == "exact"
        reference = recall.plain_search(keys) if is_exact else self.exact().search
        sample = self._sample(keys, reference, MEASUREMENT_SEED)
        if floor is not None and not is_exact:
            chosen_on = self._sample(keys, reference, CALIBRATION_SEED)
        if not is_exact:  # Keys and index need not fit in memory together.
            self.exact.release()
        engine, settings = open_index(self.index, retrieval, keys.width, self.exact)
        if floor is not None and settings is not None:
            engine, settings = self._less_thorough(engine, settings, floor, chosen_on)
        found = recall.measure(engine, sample)
        num_queries = len(sample.row_Q)
        say(
            f"retrieve: recall@{retrieval.num_neighbors} of the {engine.name} engine is "
            f"{found:.4f} on {num_queries:,} random rows"
        )
        recall.check(found, retrieval, settings, num_queries, floor)
        about = {"engine": engine.name, "recall": found, "recall_queries": num_queries}
        return engine, about if settings is None else {**about, **dataclasses.asdict(settings)}

    def _sample(
        self, keys: StoredKeys, search: Callable[[np.ndarray, int], Neighbors], seed: int
    ) -> recall.Sample:
        asked = self.retrieval.recall_queries, self.retrieval.num_neighbors
        return recall.draw_sample(keys, search, *asked, (self.seed, seed))

    def _less_thorough(
        self,
        engine: Engine,
        settings: Settings,
        floor: float,
        sample: recall.Sample,
    ) -> tuple[Engine, Settings]:
        """Returns the engine with the least thorough settings whose recall suffices."""
        assert self.index is not None
        index, retrieval, width = self.index, self.retrieval, StoredKeys(self.train).width

        def searching(tried: Settings) -> Engine:
            if isinstance(engine, KeyShards):  # Each load opens its shards with the settings.
                return searching_with(tried, index, retrieval, width)
            assert isinstance(engine, ApproximateEngine | RoutedEngine)
            engine.settings = tried
            return engine

        def found(tried: Settings) -> float:
            return recall.measure(searching(tried), sample)

        lowest: Settings = settings.lowest(retrieval)
        chosen, reached = recall.calibrate(found, lowest, settings, floor)
        say(f"retrieve: {chosen}, calibrated recall {reached:.4f} for targets.min_recall={floor}")
        return searching(chosen), chosen

    def search_split(
        self,
        engine: Engine,
        keys: Keys,
        split: Split,
        writer: ShardWriter,
        consume: Consume,
        share: Share | None = None,
    ) -> dict[str, Any]:
        """Searches for the rows of a split, of the training split for a share where one is given.

        See `neighbors.search_split`.
        """
        job = SplitSearch(
            keys=keys,
            writer=writer,
            consume=consume,
            num_neighbors=self.retrieval.num_neighbors,
            query_batch=self.retrieval.query_batch,
            queries=self.queries(split, share),
            description=f"retrieve {split}",
        )
        if isinstance(engine, KeyShards):
            numbers = search_by_shards(engine, job)
        else:
            numbers = search_split(engine, job)
        if numbers["queries"]:
            say(
                f"retrieve: {numbers['queries']:,} rows of {split} by the {engine.name} engine, "
                f"{numbers['queries_per_sec']:,.0f} rows/s"
            )
        return numbers


def keep_neighbors(
    artifact: Artifact,
    rows: Artifact,
    split: Split,
    chunking: DatastoreConfig,
    search: Search,
    keys: Keys | None = None,
) -> Completion:
    """Finds and stores the neighbours of a split among the training rows.

    Args:
        artifact: Where they go.
        rows: The datastore of the split.
        split: Which it is; a training row is never its own neighbour.
        chunking: How arrays are cut: as those of the datastore.
        search: What is searched, and how.
        keys: Those of the rows that are searched for; None: of all rows of the split.
    """
    _check_same_origin(search.train, rows)
    keys = StoredKeys(rows) if keys is None else keys
    search.check_rows()
    specs = neighbors_arrays(chunking, search.retrieval.num_neighbors)
    # The distance of a neighbour that does not exist is infinite.
    writer = ShardWriter(artifact.path, specs, keys.num_rows, refuse_non_finite=False)
    engine, measured = search.opened_engine(split)

    def consume(row_Q: np.ndarray, found: Neighbors) -> Mapping[str, np.ndarray]:
        del row_Q
        return {"row": found.row_QK, "distance": found.distance_QK}

    measured |= search.search_split(engine, keys, split, writer, consume)
    return Completion({"rows": keys.num_rows}, writer.describe(), measured=measured)


def _check_same_origin(train: Artifact, rows: Artifact) -> None:
    """Refuses splits that different decoders or tokenizers made."""
    first, other = (first_part(one).load().made_from for one in (train, rows))
    for name in first:
        # Held-out text that was appended has tokens of its own.
        if first[name] != other.get(name, first[name] if name.startswith("tokens/") else None):
            raise ArtifactError(
                f"{rows.path}: made from another {name} ({other.get(name)}) than {train.path} "
                f"({first[name]}); run embed again with --rebuild"
            )
