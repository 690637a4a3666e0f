"""Stages of appended text that is held out: its tokens, rows and neighbours."""

import functools
from typing import TYPE_CHECKING

from mlpmem_jax.pipeline.changed import neighbors_of, rows_of, tokens_of
from mlpmem_jax.pipeline.changed_stages import check_alone, known_documents, tokenized
from mlpmem_jax.pipeline.checks import check_devices, check_retrieval
from mlpmem_jax.pipeline.corpus_record import HeldOut
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.manifest import Artifact, Completion

if TYPE_CHECKING:
    from mlpmem_jax.retrieval.index_builder import ExactCache


def token_stages(run: Artifacts) -> list[Stage]:
    """Returns one stage a text; they come before those of text that is trained on."""
    return [
        Stage(
            artifact=tokens_of(run, held),
            build=functools.partial(_build_tokens, run, held),
            check=functools.partial(check_alone, run),
        )
        for held in run.corpus.held_out
    ]


def row_stages(run: Artifacts) -> list[Stage]:
    """Returns one stage a text."""
    return [
        Stage(
            artifact=rows_of(run, held),
            build=functools.partial(_build_rows, run, held),
            check=functools.partial(check_devices, run, "datastore"),
        )
        for held in run.corpus.held_out
    ]


def neighbor_stages(run: Artifacts, exact: "ExactCache") -> list[Stage]:
    """Returns one stage a text.

    Args:
        run: The artifacts of the configuration.
        exact: Exact search among the training rows.
    """
    return [
        Stage(
            artifact=neighbors_of(run, held),
            build=functools.partial(_build_neighbors, run, held, exact),
            check=functools.partial(check_retrieval, run),
        )
        for held in run.corpus.held_out
    ]


def _build_tokens(run: Artifacts, held: HeldOut) -> Completion:
    """Makes the tokens of the documents that the corpus did not have before."""
    known = known_documents(run, Artifact(run.store, held.rows, "datastore"))
    return tokenized(run, tokens_of(run, held), held.paths, held.text, "test", known)


def _build_rows(run: Artifacts, held: HeldOut) -> Completion:
    from mlpmem_jax.pipeline.embed import embedded

    return embedded(run, tokens_of(run, held), "test", rows_of(run, held))


def _build_neighbors(run: Artifacts, held: HeldOut, exact: "ExactCache") -> Completion:
    from mlpmem_jax.retrieval.search import Search, keep_neighbors

    config, rows = run.config, rows_of(run, held)
    train = run.datastore("train")
    search = Search(train, None, exact, config.retrieval, config.seed, run.tokens)
    return keep_neighbors(neighbors_of(run, held), rows, "test", config.datastore, search)
