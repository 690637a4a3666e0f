"""tokenize: text to a tokenizer and to the token stream of each split."""

import functools
import time
from collections.abc import Mapping

from mlpmem_jax.config.data import CorpusConfig
from mlpmem_jax.console import progress, say, warn
from mlpmem_jax.corpus.checks import (
    Scan,
    Window,
    check_before,
    check_splits,
    check_window,
    tokenizer_for,
)
from mlpmem_jax.corpus.encoding import encoded
from mlpmem_jax.corpus.row_estimates import BYTES_PER_TOKEN
from mlpmem_jax.corpus.stream import Corpus, Position
from mlpmem_jax.corpus.tokenizer import (
    TOKENIZER_FILE,
    TextTokenizer,
    load_tokenizer,
)
from mlpmem_jax.corpus.writer import PROGRESS_FILE, TokenWriter, batches, seen_by_first
from mlpmem_jax.errors import ArtifactError, UserError
from mlpmem_jax.parallel.agreement import of_first
from mlpmem_jax.parallel.multihost import is_writer
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.needs import tokens_need
from mlpmem_jax.pipeline.stage import Builders, Stage
from mlpmem_jax.store.array_specs import SPLITS, token_dtype
from mlpmem_jax.store.files import check_free_space, write_bytes
from mlpmem_jax.store.manifest import Artifact, Completion, Status


def stages(run: Artifacts) -> list[Stage]:
    """Returns the stages tokenizer and tokens.

    Raises:
        UserError: The sources, the tokenizer or the text cannot do; nothing is written yet.
    """
    config, digests = run.config, run.sources.digests
    has_path = config.tokenizer.path is not None
    given = run.sources.given_tokenizer(config.tokenizer) if has_path else None
    corpus = Corpus(config.corpus)
    listing = run.sources.text(config.corpus)["listing"]
    current = _is_current(run.tokenizer) and _is_current(run.tokens)
    scan = None if current else check_before(corpus, config.tokenizer, given, _window(run))
    if current and is_writer():
        digests.save()  # Files that were moved or touched are not read again next time.
    text_bytes = _text_bytes(config.corpus.max_bytes, listing["bytes"], scan)
    estimate = functools.partial(_estimate, run, text_bytes, scan)
    if current:
        estimate = functools.partial(_found, run.tokens)
    return [
        Stage(
            artifact=run.tokenizer,
            build=functools.partial(_make_tokenizer, run, corpus, given),
            builders=Builders.FIRST,
        ),
        Stage(
            artifact=run.tokens,
            build=functools.partial(_make_tokens, run, corpus, text_bytes, scan),
            estimate=estimate,
            need=functools.partial(tokens_need, run),
        ),
    ]


def _window(run: Artifacts) -> Window:
    config = run.config
    given = config.pretrain.window_tokens != "auto"
    key = "pretrain.window_tokens" if given else "decoder.context_tokens"
    return Window(config.pretrain_window_tokens, key)


def _is_current(artifact: Artifact) -> bool:
    try:
        made_from = {one.relative: one.load().fingerprint for one in artifact.inputs}
        return artifact.status(made_from) is Status.COMPLETE
    except ArtifactError:
        return False


def _make_tokenizer(run: Artifacts, corpus: Corpus, given: TextTokenizer | None) -> Completion:
    config = run.config
    run.sources.digests.save()
    tokenizer = given
    if tokenizer is None:
        _find_near_duplicates(corpus)
        with progress(None, "B", "tokenizer: reading") as bar:
            tokenizer = tokenizer_for(corpus, config.tokenizer, bar.update)
    write_bytes(run.tokenizer.path / TOKENIZER_FILE, tokenizer.to_json())
    say(
        f"tokenizer: {tokenizer.vocab_size} entries (models hold {tokenizer.padded_vocab}), "
        f"separator {tokenizer.separator!r} = {tokenizer.separator_id}"
    )
    return Completion(counts=tokenizer.counts(), files=[TOKENIZER_FILE])


def _find_near_duplicates(corpus: Corpus) -> None:
    """Finds the documents to leave out; on several processes each finds the same."""
    if corpus.config.near_duplicates is not None:
        with progress(None, "B", "near-duplicates") as bar:
            corpus.find_near_duplicates(bar.update)


def _make_tokens(
    run: Artifacts, corpus: Corpus, text_bytes: int | None, scan: Scan | None
) -> Completion:
    """Makes the tokens: all processes encode, process 0 writes."""
    artifact = run.tokens
    tokenizer = load_tokenizer(run.tokenizer)
    writer = None
    if is_writer():
        needed = _estimate(run, text_bytes, scan).get("disk_bytes", 0)
        check_free_space(artifact.path, needed, "the token stream")
        run.sources.digests.save()
        writer = TokenWriter(artifact.path, tokenizer)
    _find_near_duplicates(corpus)
    begun = of_first(None if writer is None else writer.position.to_json())
    if writer is None:
        source = batches(corpus, Position(**begun), seen_by_first(None))
        for _ in encoded(tokenizer, source):
            pass  # Process 0 has got them.
        return Completion()
    return _written(run, tokenizer, corpus, writer, text_bytes, scan)


def _written(
    run: Artifacts,
    tokenizer: TextTokenizer,
    corpus: Corpus,
    writer: TokenWriter,
    text_bytes: int | None,
    scan: Scan | None,
) -> Completion:
    config, artifact = run.config, run.tokens
    started = time.monotonic()
    done = writer.num_bytes
    with progress(text_bytes, "B", "tokenize", initial=done) as bar:
        writer.write(corpus, bar.update)
    rate = (writer.num_bytes - done) / 1e6 / max(time.monotonic() - started, 1e-9)
    counts, arrays = writer.close(near_duplicates=config.corpus.near_duplicates is not None)
    if scan is None or not scan.complete:  # Else the scan has said them.
        for note in corpus.notes():
            warn(note)
    try:
        documents = {str(split): counts[f"{split}_documents"] for split in SPLITS}
        num_near = sum(counts.get(f"{split}_near_duplicate_documents", 0) for split in SPLITS)
        check_splits(documents, config.corpus, counts["duplicate_documents"] + num_near)
        check_window(counts["train_tokens"], _window(run))
    except UserError:
        artifact.remove()  # Nothing in it can be used, whatever the user changes.
        raise
    bytes_per_token: dict[str, float] = {
        split: round(counts[f"{split}_bytes"] / counts[f"{split}_tokens"], 4) for split in SPLITS
    }
    _report(counts, bytes_per_token, rate)
    _report_limit(config.corpus, counts, corpus.stopped_at)
    (artifact.path / PROGRESS_FILE).unlink(missing_ok=True)
    measured = {
        "tokenize_seconds": round(writer.seconds, 3),
        "megabytes_per_second": round(rate, 3),
        "bytes_per_token": bytes_per_token,
    }
    return Completion({**tokenizer.counts(), **counts}, arrays, measured=measured)


def _report(counts: Mapping[str, int], bytes_per_token: Mapping[str, float], rate: float) -> None:
    for split in SPLITS:
        say(
            f"tokens/{split}: {counts[f'{split}_documents']:,} documents, "
            f"{counts[f'{split}_bytes']:,} bytes, {counts[f'{split}_tokens']:,} tokens, "
            f"{bytes_per_token[split]:.2f} bytes a token"
        )
    if counts["skipped_files"] or counts["skipped_records"]:
        say(
            f"tokens: files left out, not UTF-8 text: {counts['skipped_files']:,}; "
            f"records left out, without usable text: {counts['skipped_records']:,}"
        )
    if counts["duplicate_documents"]:
        copied = counts["copied_documents"]
        say(
            f"tokens: duplicate documents left out: {counts['duplicate_documents']:,} "
            f"({counts['duplicate_bytes']:,} bytes)"
            + f"; copies of another split: {copied:,} (test comes before valid, valid before train)"
            * bool(copied)
        )
    if "near_copied_documents" in counts:
        _report_near_duplicates(counts)
    say(f"tokens: {rate:.1f} MB/s")


def _report_near_duplicates(counts: Mapping[str, int]) -> None:
    found = ", ".join(
        f"{split} {counts[f'{split}_near_duplicate_documents']:,} "
        f"({counts[f'{split}_near_duplicate_bytes']:,} bytes)"
        for split in SPLITS
    )
    say(
        f"tokens: near-duplicate documents left out: {found}; they resemble one of another split: "
        f"{counts['near_copied_documents']:,} (test comes before valid, valid before train)"
    )


def _report_limit(
    config: CorpusConfig, counts: Mapping[str, int], stopped_at: Mapping[str, int]
) -> None:
    """Logs how much of the text `corpus.max_bytes` allowed: documents are never cut."""
    if config.max_bytes is None:
        return
    documents, taken = (
        sum(counts[f"{split}_{what}"] for split in SPLITS) for what in ("documents", "bytes")
    )
    each = " for each split" * bool(config.train.paths)
    sizes = ", ".join(f"{size:,}" for size in stopped_at.values())
    end = f"the next document ({sizes} bytes) would exceed it" if sizes else "all of the text"
    say(
        f"tokens: {documents:,} documents, {taken:,} bytes "
        f"(corpus.max_bytes={config.max_bytes:,}{each}); {end}"
    )


def _text_bytes(limit: int | None, listed_bytes: int, scan: Scan | None) -> int | None:
    """Returns how much text there is, as far as that is known beforehand."""
    if scan is not None and scan.complete:
        return sum(scan.num_bytes.values())
    if limit is not None:
        return min(listed_bytes or limit, limit)
    return listed_bytes or None


def _found(tokens: Artifact) -> dict[str, int]:
    """Returns how much text finished tokens were made from."""
    counts = tokens.load().counts
    return {
        shown: sum(int(counts[f"{split}_{name}"]) for split in SPLITS)
        for shown, name in (("text_bytes", "bytes"), ("documents", "documents"))
    }


def _estimate(run: Artifacts, text_bytes: int | None, scan: Scan | None) -> dict[str, int]:
    """Returns how much text will be taken, and what the token arrays will take."""
    if text_bytes is None:
        return {}
    found = {"text_bytes": text_bytes}
    if scan is not None and scan.complete:
        found["documents"] = sum(scan.documents.values())
        if scan.stopped_at:
            found["next document, beyond max_bytes"] = max(scan.stopped_at.values())
    itemsize = token_dtype(run.config.tokenizer.vocab_size)().itemsize
    return found | {"disk_bytes": text_bytes // BYTES_PER_TOKEN * itemsize}
