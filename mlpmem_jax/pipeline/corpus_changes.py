"""What `append`, `remove` and `compact` share: a change is made whole, and recorded last.

Until then every command sees the text as it was before; the same command continues what a kill
has left.
"""

import dataclasses
from collections.abc import Callable, Sequence

from mlpmem_jax.console import say
from mlpmem_jax.errors import ConfigError, UserError
from mlpmem_jax.pipeline import embed, index, retrieve
from mlpmem_jax.pipeline.changed import BEFORE, finished_memory_of, made_with
from mlpmem_jax.pipeline.changed_stages import check_alone
from mlpmem_jax.pipeline.corpus_record import Change, CorpusRecord, HeldOut, changing
from mlpmem_jax.pipeline.execute import check_config_file, record, write_config
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.plan import print_plan
from mlpmem_jax.pipeline.stage import Rebuild, Stage, run_stages
from mlpmem_jax.store.array_specs import SPLITS
from mlpmem_jax.store.run_record import RunRecord

_PENDING = " (being changed)"
_SEGMENT = "/segment-"


def change(run: Artifacts, options: Options, make: Callable[[Artifacts], None]) -> int:
    """Changes the training text of a work directory, one command at a time.

    Args:
        make: Makes the change; gets the artifacts as they are once no other command changes them.
    """
    if options.rebuild:
        raise UserError("--rebuild: a change of the training text is made once; use `retrieve`")
    _check(run)  # Before anything is written.
    if options.dry_run:
        make(run)
        return 0
    with changing(run.workdir):
        latest = run.with_corpus(CorpusRecord.read(run.workdir))
        _check(latest)
        make(latest)
    return 0


def _check(run: Artifacts) -> None:
    """Refuses to change what is not there, or cannot be changed.

    Raises:
        UserError: One line.
    """
    check_alone(run)
    kept = run.config.retrieval.keep_train
    if kept != "all":
        raise ConfigError(
            f"retrieval.keep_train={kept}: a training text that changes needs the neighbours of "
            "its rows; set retrieval.keep_train=all and run `retrieve`"
        )
    check_config_file(run)
    run.datastore("train").load()
    for split in SPLITS:
        run.neighbors(split).load()


def recorded(run: Artifacts, change: Change, held_out: HeldOut | None = None) -> CorpusRecord:
    """Returns the record with one more change, and what the rows are made with.

    Args:
        run: The artifacts before the change.
        change: What happens.
        held_out: append: text to be scored alone.
    """
    found = made_with(run, compacted=bool(run.corpus.start))
    texts = run.corpus.held_out if held_out is None else (*run.corpus.held_out, held_out)
    change = dataclasses.replace(change, memory=finished_memory_of(run), num_held_out=len(texts))
    begun = dataclasses.replace(run.corpus, made_with=found, held_out=texts)
    return begun.and_then(change)


def stages_of(run: Artifacts) -> list[Stage]:
    """Returns the stages from rows to targets."""
    return [*embed.stages(run), *index.stages(run), *retrieve.stages(run)]


def apply(run: Artifacts, after: Artifacts, stages: Sequence[Stage], options: Options) -> bool:
    """Makes what follows from a change and records it; a dry run prints the plan.

    Args:
        run: The artifacts before it.
        after: Those after it.
        stages: What makes them.

    Returns:
        Whether it was made.
    """
    if options.dry_run:
        print_plan(after, stages, Rebuild.REFUSE)
        return False

    def before_building() -> None:
        write_config(run)
        roles = {f"{one.artifact.label}{_PENDING}": one.artifact.relative for one in stages}
        RunRecord.update(run.workdir, _store(run), roles, {})

    run_stages(stages, before_building=before_building)
    after.corpus.write(run.workdir)
    record(after, stages)
    _drop_roles(after)
    return True


def _store(run: Artifacts) -> str | None:
    return None if run.config.store is None else str(run.store)


def _drop_roles(run: Artifacts) -> None:
    """Forgets roles of the change under way, of the text before it, and of segments that are no
    longer read.
    """
    compacted = not run.corpus.changes

    def is_over(role: str) -> bool:
        is_before = role.endswith(_PENDING) or BEFORE in role
        return is_before or (compacted and _SEGMENT in role)

    RunRecord.update(run.workdir, _store(run), {}, {}, drop=is_over)


def report(command: str, run: Artifacts, embedded: int) -> None:
    """Prints what a change cost, beside what making everything anew would."""
    rows = int(run.datastore("train").load().counts["rows"])
    manifests = [run.neighbors(split).load().measured for split in SPLITS]
    pairs, anew = (sum(one[name] for one in manifests) for name in ("pairs", "pairs_of_a_rebuild"))
    seconds = sum(one["seconds"] for one in manifests)
    say(
        f"{command}: {embedded:,} of {rows:,} training rows embedded, {pairs / anew:.2%} of the "
        f"distances of a rebuild computed in {seconds:.1f} s; `train` learns from the new targets"
    )
