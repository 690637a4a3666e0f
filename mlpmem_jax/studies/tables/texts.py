"""Rows with tokens of their own: a table compares them on the same documents."""

from collections.abc import Sequence

from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.studies.tables.part_scores import SCORED


def refuse_other_documents(run: Artifacts, stages: Sequence[Stage]) -> None:
    """Refuses rows whose validation or test text is not the table's, before networks are trained.

    Args:
        run: The artifacts of the configuration of the table.
        stages: Those of all rows; the tokens that they read are finished.

    Raises:
        ConfigError: Names the tokens of the row.
    """
    from mlpmem_jax.corpus.tokens import TokenSplit

    read: dict[str, Artifact] = {}
    for one in (one for stage in stages for one in stage.artifact.inputs):
        if one.kind == "tokens" and one.relative != run.tokens.relative:
            read.setdefault(one.relative, one)
    mistakes = [
        f"{one.title}: other {split} documents than those of the configuration; rows of a table "
        "are scored on the same text: give corpus.train, corpus.valid and corpus.test files of "
        "their own, and leave those of valid and test as they are"
        for one in read.values()
        for split in SCORED
        if not TokenSplit.open(one, split).has_documents_of(TokenSplit.open(run.tokens, split))
    ]
    if mistakes:
        raise ConfigError(mistakes)
