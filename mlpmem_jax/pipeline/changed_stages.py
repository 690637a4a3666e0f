"""Stages that bring training rows and neighbours up to date after the training text has changed."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mlpmem_jax.config.data import CorpusConfig, SplitPaths
from mlpmem_jax.console import progress, say
from mlpmem_jax.errors import ArtifactError, ConfigError, UserError
from mlpmem_jax.pipeline.changed import held_out_tokens
from mlpmem_jax.pipeline.checks import check_devices, check_retrieval
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.manifest import Artifact, Completion

if TYPE_CHECKING:
    from mlpmem_jax.retrieval.index_builder import ExactCache

_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zstd")


def segment_corpus(
    corpus: CorpusConfig, paths: tuple[str, ...], split: Split = "train"
) -> CorpusConfig:
    """Returns the corpus of text that is appended: documents of a split, cut as the others are."""
    kinds = {path.endswith(_JSONL) for path in paths}
    if len(kinds) > 1:
        raise ConfigError("append: text and JSONL files in one segment; append them one by one")
    new = CorpusConfig(
        source="jsonl" if kinds == {True} else "text",
        field=corpus.field,
        document_regex=corpus.document_regex,
        on_error=corpus.on_error,
        attention=corpus.attention,
    )
    return new.model_copy(update={split: SplitPaths(paths=paths)})


def row_stages(run: Artifacts, base: Callable[[Artifacts], list[Stage]]) -> list[Stage]:
    """Returns the stages of the training rows.

    Args:
        base: Returns those of the text as it was first read.
    """
    if not run.corpus.changes:
        return [] if "datastore/train" in run.given else base(run)
    joined = Stage(
        artifact=run.datastore("train"),
        build=functools.partial(_build_rows, run),
        check=functools.partial(check_alone, run),
    )
    stages = row_stages(run.before, base)
    if run.corpus.changes[-1].kind == "append":
        stages += _segment_stages(run)
    return [*stages, joined]


def neighbors_stage(run: Artifacts, split: Split, exact: "ExactCache") -> Stage:
    """Returns the stage of the neighbours of a split after the last change.

    Args:
        split: Which it is.
        exact: Exact search among the training rows.
    """
    return Stage(
        artifact=run.neighbors(split),
        build=functools.partial(_build_neighbors, run, split, exact),
        check=functools.partial(_check_neighbors, run),
    )


def exact_cache(run: Artifacts) -> "ExactCache":
    """Returns exact search among the training rows, which is opened once it is needed."""
    from mlpmem_jax.retrieval.index_builder import ExactCache

    config = run.config
    return ExactCache(run.datastore("train"), config.retrieval, config.mesh)


def check_reads_rows(run: Artifacts) -> None:
    """Refuses settings that look up tokens by row, which no longer agree once rows have changed.

    Raises:
        ConfigError: Names the key, its value and what is allowed.
    """
    config = run.config
    for key, value, needed in (
        ("retrieval.exclude", config.retrieval.exclude, "row"),
        ("retrieval.exclude_repeats_tokens", config.retrieval.exclude_repeats_tokens, 0),
        ("targets.share", config.targets.share, 1),
        ("targets.teacher", config.targets.teacher, "knn"),
    ):
        if value != needed:
            raise ConfigError(
                f"{key}={value} reads tokens by row of the text as it was first read; a training "
                f"text that changes needs {key}={needed}"
            )


def check_alone(run: Artifacts) -> None:
    """Refuses several processes, and settings under which rows depend on other documents.

    Raises:
        ConfigError: Names the key, its value and what is allowed.
    """
    from mlpmem_jax.parallel.sharing import process_count

    config = run.config
    if process_count() > 1:
        raise ConfigError("a changed training text is brought up to date by one process")
    check_reads_rows(run)
    if config.corpus.near_duplicates is not None:
        raise ConfigError(
            f"corpus.near_duplicates={config.corpus.near_duplicates}: appended documents are not "
            "compared with those before; a training text that changes needs "
            "corpus.near_duplicates=null"
        )
    if config.corpus.attention != "within":
        raise ConfigError(
            f"corpus.attention={config.corpus.attention}: states depend on the document before; "
            "a training text that changes needs corpus.attention=within (and its own decoder)"
        )
    exact_rows = config.retrieval.exact_rows
    if exact_rows != "all":
        raise ConfigError(
            f"retrieval.exact_rows={exact_rows}: a training text that changes needs exact "
            "neighbours of valid and test; set retrieval.exact_rows=all and run `retrieve`"
        )
    if config.targets.workdir is not None:
        raise ConfigError(
            f"targets.workdir={config.targets.workdir}: targets of a teacher cannot follow a "
            "change of the training text; change it in the teacher's workdir"
        )


def _check_neighbors(run: Artifacts) -> None:
    check_alone(run)
    check_retrieval(run)


def _segment_stages(run: Artifacts) -> list[Stage]:
    return [
        Stage(
            artifact=run.segment_tokens,
            build=functools.partial(_build_tokens, run),
            estimate=functools.partial(_text_estimate, run),
        ),
        Stage(
            artifact=run.segment,
            build=functools.partial(_embed, run),
            check=functools.partial(check_devices, run, "datastore"),
        ),
    ]


def _text_estimate(run: Artifacts) -> dict[str, int]:
    listing = run.corpus.changes[-1].text["listing"]
    return {"text_bytes": listing["bytes"], "files": listing["files"]}


def _build_tokens(run: Artifacts) -> Completion:
    """Makes the tokens of a segment, without the documents that the corpus has already."""
    from mlpmem_jax.corpus.tokens import TokenSplit

    change, before = run.corpus.changes[-1], run.before.datastore("train")
    known = known_documents(run, before)
    held_out = [
        TokenSplit.open(one, "test").document_digest
        for one in held_out_tokens(run, change.num_held_out)
    ]
    known["test"] = np.concatenate([known["test"], *held_out])
    return tokenized(run, run.segment_tokens, change.paths, change.text, "train", known)


def known_documents(run: Artifacts, rows: Artifact) -> dict[Split, np.ndarray]:
    """Returns the digests of the documents of the first text, and of training rows, by split."""
    from mlpmem_jax.corpus.tokens import TokenSplit
    from mlpmem_jax.corpus.train_documents import TrainDocuments

    return {
        "train": TrainDocuments.of(rows, run.tokens).digest,
        "valid": TokenSplit.open(run.tokens, "valid").document_digest,
        "test": TokenSplit.open(run.tokens, "test").document_digest,
    }


def tokenized(
    run: Artifacts,
    artifact: Artifact,
    paths: tuple[str, ...],
    text: Mapping[str, Any],
    split: Split,
    known: Mapping[Split, np.ndarray],
) -> Completion:
    """Makes the tokens of appended text.

    Args:
        run: The artifacts after the change.
        artifact: Where they go.
        paths: The files.
        text: Settings and digest of what they held.
        split: Where its documents go.
        known: Digests of documents that are left out, by split.

    Raises:
        ArtifactError: The files hold something else by now.
        UserError: No document is left.
    """
    from mlpmem_jax.corpus.stream import Corpus
    from mlpmem_jax.corpus.tokenizer import load_tokenizer
    from mlpmem_jax.corpus.writer import PROGRESS_FILE, TokenWriter

    corpus = Corpus(segment_corpus(run.config.corpus, paths, split))
    if run.sources.digests.listing_of(corpus.parts, None) != text["listing"]:
        raise ArtifactError(
            f"{', '.join(paths)}: not the text that was appended; its tokens cannot be made"
        )
    tokenizer = load_tokenizer(run.tokenizer)
    writer = TokenWriter(artifact.path, tokenizer, known)
    with progress(text["listing"]["bytes"], "B", "tokenize") as bar:
        writer.write(corpus, bar.update)
    counts, arrays = writer.close(near_duplicates=False)
    left_out = counts["duplicate_documents"]
    if not counts[f"{split}_documents"]:
        artifact.remove()
        raise UserError(
            f"{', '.join(paths)}: no new document ({left_out:,} are in the corpus already)"
        )
    say(
        f"{artifact.label}: {counts[f'{split}_documents']:,} new documents, "
        f"{counts[f'{split}_tokens']:,} tokens; {left_out:,} documents left out, which the "
        f"corpus has already ({counts['copied_documents']:,} of them in another split)"
    )
    (artifact.path / PROGRESS_FILE).unlink(missing_ok=True)
    return Completion({**tokenizer.counts(), **counts}, arrays)


def _embed(run: Artifacts) -> Completion:
    from mlpmem_jax.pipeline.embed import embedded

    return embedded(run, run.segment_tokens, "train", run.segment)


def _build_rows(run: Artifacts) -> Completion:
    """Joins the rows before the last change with those that it appended, or takes some away."""
    from mlpmem_jax.corpus.train_documents import TrainDocuments
    from mlpmem_jax.store.joined import Rows, first_part

    change, artifact, before = run.corpus.changes[-1], run.datastore("train"), run.before
    rows = Rows.of(before.datastore("train"))
    documents = TrainDocuments.of(before.datastore("train"), run.tokens)
    if change.kind == "append":
        new = TrainDocuments.of(run.segment, run.segment_tokens)
        documents = documents.followed_by(new, rows.num_rows)
        rows = rows.followed_by(Rows.of(run.segment))
    else:
        digests = {int(one, 16) for one in change.documents}
        documents, is_kept_N = documents.without(digests, rows.num_rows)
        rows = rows.kept(is_kept_N)
    like = first_part(before.datastore("train")).load()
    counts = {**rows.counts(), "documents": len(documents.digest)}
    return Completion(counts, rows.arrays(like), [documents.write(artifact.path)])


def _build_neighbors(run: Artifacts, split: Split, exact: "ExactCache") -> Completion:
    from mlpmem_jax.retrieval.index_builder import ExactCache
    from mlpmem_jax.retrieval.search import Search, keep_neighbors
    from mlpmem_jax.retrieval.update import UpdateInputs, update_neighbors

    config, before, artifact = run.config, run.before, run.neighbors(split)
    if not before.neighbors(split).is_complete():  # Removed, or of another K: all is searched.
        train, settings = run.datastore("train"), config.retrieval
        search = Search(train, None, exact, settings, config.seed, run.tokens)
        return keep_neighbors(artifact, run.datastore(split), split, config.datastore, search)
    appended = run.corpus.changes[-1].kind == "append"
    inputs = UpdateInputs(
        before=before.datastore("train"),
        after=run.datastore("train"),
        all=exact,
        new=ExactCache(run.segment, config.retrieval, config.mesh) if appended else None,
        kept=before.neighbors(split),
        retrieval=config.retrieval,
        chunking=config.datastore,
    )
    return update_neighbors(artifact, run.datastore(split), split, inputs)
