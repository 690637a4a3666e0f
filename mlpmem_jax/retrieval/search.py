"""Search among the training rows for every row of a split, and the neighbours that are kept."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpmem_jax.config.data import DatastoreConfig, RetrievalConfig
from mlpmem_jax.console import say
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.retrieval import recall
from mlpmem_jax.retrieval.engine import Engine, StoredKeys
from mlpmem_jax.retrieval.index_builder import MEASUREMENT_SEED, ExactCache, open_index
from mlpmem_jax.retrieval.key_major import search_by_shards
from mlpmem_jax.retrieval.key_shards import KeyShards
from mlpmem_jax.retrieval.merge import Neighbors
from mlpmem_jax.retrieval.neighbors import Consume, SplitSearch, check_enough_rows, search_split
from mlpmem_jax.retrieval.queries import Queries, exclusion_of
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

    def measured_engine(self) -> tuple[Engine, dict[str, Any]]:
        """Opens the engine of the index and measures its recall; warns where it is low.

        Raises:
            ConfigError: The exact engine does not find what a plain search finds.
        """
        assert self.index is not None
        retrieval, keys = self.retrieval, StoredKeys(self.train)
        is_exact = self.index.load().counts["engine"] == "exact"
        reference = recall.plain_search(keys) if is_exact else self.exact().search
        sample = recall.draw_sample(
            keys,
            reference,
            retrieval.recall_queries,
            retrieval.num_neighbors,
            (self.seed, MEASUREMENT_SEED),
        )
        if not is_exact:  # Keys and index need not fit in memory together.
            self.exact.release()
        engine, settings = open_index(self.index, retrieval, keys.width, self.exact)
        found = recall.measure(engine, sample)
        num_queries = len(sample.row_Q)
        say(
            f"retrieve: recall@{retrieval.num_neighbors} of the {engine.name} engine is "
            f"{found:.4f} on {num_queries:,} random rows"
        )
        recall.check(found, retrieval, settings, num_queries)
        return engine, {"engine": engine.name, "recall": found, "recall_queries": num_queries}

    def search_split(
        self,
        engine: Engine,
        keys: StoredKeys,
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
    artifact: Artifact, rows: Artifact, split: Split, chunking: DatastoreConfig, search: Search
) -> Completion:
    """Finds and stores the neighbours of a split among the training rows.

    Args:
        artifact: Where they go.
        rows: The datastore of the split.
        split: Which it is; a training row is never its own neighbour.
        chunking: How arrays are cut: as those of the datastore.
        search: What is searched, and how.
    """
    _check_same_origin(search.train, rows)
    keys = StoredKeys(rows)
    search.check_rows()
    specs = neighbors_arrays(chunking, search.retrieval.num_neighbors)
    # The distance of a neighbour that does not exist is infinite.
    writer = ShardWriter(artifact.path, specs, keys.num_rows, refuse_non_finite=False)
    measured: dict[str, Any] = {"engine": "exact"}
    engine: Engine
    if search.index is None:
        engine = search.exact()
    else:
        engine, about = search.measured_engine()
        measured |= about

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
