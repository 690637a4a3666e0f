"""append: more training text, as a segment beside what is there."""

from collections.abc import Mapping
from typing import Any

from mlpmem_jax.errors import UserError
from mlpmem_jax.pipeline.changed_stages import segment_corpus
from mlpmem_jax.pipeline.corpus_changes import apply, change, recorded, report, stages_of
from mlpmem_jax.pipeline.corpus_record import Change, HeldOut
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.sources import Sources
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.files import absolute


def _text(run: Artifacts, paths: tuple[str, ...], flag: str, split: Split) -> Mapping[str, Any]:
    """Returns settings and digest of text that a flag names.

    Raises:
        UserError: Files are missing or cannot be read; names the flag.
    """
    corpus = segment_corpus(run.config.corpus, paths, split)
    try:
        return Sources(run.config.workdir, reads=True).text(corpus)
    except UserError as error:
        raise UserError(
            [line.replace(f"corpus.{split}.paths", flag) for line in error.messages]
        ) from None


def _held_out(run: Artifacts, given: tuple[str, ...]) -> HeldOut:
    paths = tuple(str(absolute(path)) for path in given)
    name = f"held-out-{len(run.corpus.held_out) + 1}"
    text = _text(run, paths, "--held-out", "test")
    return HeldOut(name, paths, text, run.datastore("train").relative)


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    if not options.text:
        raise UserError("append: which text? give --text FILE (files, folders or patterns)")
    paths = tuple(str(absolute(path)) for path in options.text)

    def make(latest: Artifacts) -> None:
        held_out = None
        if options.held_out:
            held_out = _held_out(latest, options.held_out)
        text = _text(latest, paths, "--text", "train")
        record = recorded(latest, Change("append", paths, text), held_out)
        after = latest.with_corpus(record)
        if apply(latest, after, stages_of(after), options):
            report("append", after, int(after.segment.load().counts["rows"]))

    return change(run, options, make)
