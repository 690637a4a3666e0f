"""append: more training text, as a segment beside what is there."""

from mlpmem_jax.errors import UserError
from mlpmem_jax.pipeline.changed_stages import segment_corpus
from mlpmem_jax.pipeline.corpus_changes import apply, change, recorded, report, stages_of
from mlpmem_jax.pipeline.corpus_record import Change
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.sources import Sources
from mlpmem_jax.store.files import absolute


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    if not options.text:
        raise UserError("append: which text? give --text FILE (files, folders or patterns)")
    paths = tuple(str(absolute(path)) for path in options.text)

    def make(latest: Artifacts) -> None:
        corpus = segment_corpus(latest.config.corpus, paths)
        try:
            text = Sources(latest.config.workdir, reads=True).text(corpus)
        except UserError as error:
            raise UserError(
                [line.replace("corpus.train.paths", "--text") for line in error.messages]
            ) from None
        after = latest.with_corpus(recorded(latest, Change("append", paths, text)))
        if apply(latest, after, stages_of(after), options):
            report("append", after, int(after.segment.load().counts["rows"]))

    return change(run, options, make)
