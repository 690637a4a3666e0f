"""compact: one datastore and one list of neighbours in place of segments and removals.

Nothing is embedded and nothing searched: the rows that are left are copied, with their numbers.
"""

import functools

from mlpmem_jax.console import say
from mlpmem_jax.corpus.train_documents import FILE
from mlpmem_jax.errors import UserError
from mlpmem_jax.pipeline import recipes
from mlpmem_jax.pipeline.changed import made_with
from mlpmem_jax.pipeline.corpus_changes import apply, change, stages_of
from mlpmem_jax.pipeline.corpus_record import CorpusRecord
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.array_specs import (
    SPLITS,
    Split,
    datastore_arrays,
    neighbors_arrays,
)
from mlpmem_jax.store.copies import copy_rows
from mlpmem_jax.store.files import write_bytes
from mlpmem_jax.store.joined import stream_starts
from mlpmem_jax.store.manifest import Artifact, Completion


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""

    def make(latest: Artifacts) -> None:
        if not latest.corpus.changes:
            raise UserError(
                f"compact: nothing was appended or removed in {latest.workdir} since it was made "
                "or compacted"
            )
        copies = _stages(latest)
        start = {one.artifact.label: one.artifact.relative for one in copies}
        record = CorpusRecord(
            made_with(latest, compacted=True), start, held_out=latest.corpus.held_out
        )
        after = latest.with_corpus(record)
        if apply(latest, after, [*copies, *stages_of(after)], options):
            rows = int(after.datastore("train").load().counts["rows"])
            say(
                f"compact: {rows:,} training rows in one datastore; `artifacts --remove-unused` "
                "frees what they were copied from"
            )

    return change(run, options, make)


def _stages(run: Artifacts) -> list[Stage]:
    """Returns the stages that copy rows and neighbours.

    What they copy is named by their recipes and is no input, so that it can be removed.
    """
    source = run.datastore("train")
    recipe = {"split": "train", "compacted": source.relative, **recipes.datastore(run.config)}
    rows = Artifact.of(run.store, "datastore", recipe, (run.decoder,), "datastore/train")
    stages = [Stage(artifact=rows, build=functools.partial(_copy_rows, run, rows))]
    for split in SPLITS:
        about = {"split": split, "compacted": run.neighbors(split).relative}
        queries = () if split == "train" else (run.datastore(split),)
        copy = Artifact.of(
            run.store,
            "neighbors",
            {**about, **recipes.exact_neighbors(run.config)},
            (rows, *queries),
            f"neighbors/{split}",
        )
        stages.append(
            Stage(artifact=copy, build=functools.partial(_copy_neighbors, run, split, copy))
        )
    return stages


def _copy_rows(run: Artifacts, copy: Artifact) -> Completion:
    source, config = run.datastore("train"), run.config
    counts = source.load().counts
    specs = datastore_arrays(config.datastore, config.decoder.width)
    arrays = copy_rows(source, copy, specs, int(counts["rows"]))
    write_bytes(copy.path / FILE, (source.path / FILE).read_bytes())
    kept = {"rows": counts["rows"], "streams": list(stream_starts(source))}
    return Completion({**kept, "documents": counts["documents"]}, arrays, [FILE])


def _copy_neighbors(run: Artifacts, split: Split, copy: Artifact) -> Completion:
    source, config = run.neighbors(split), run.config
    specs = neighbors_arrays(config.datastore, config.retrieval.num_neighbors)
    num_rows = int(source.load().counts["rows"])
    return Completion({"rows": num_rows}, copy_rows(source, copy, specs, num_rows))
