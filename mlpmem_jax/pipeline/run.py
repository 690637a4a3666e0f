"""All stages in order, each skipped when complete and current; then the table and a sample."""

from mlpmem_jax.errors import Mistakes
from mlpmem_jax.pipeline import (
    embed,
    evaluate,
    generate,
    index,
    pretrain,
    retrieve,
    tokenize,
    train,
)
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.sources import Unread
from mlpmem_jax.pipeline.stage import Rebuild, Stage, check_stages


def stages(run: Artifacts) -> list[Stage]:
    """Returns every stage, in the order of the data flow."""
    commands = (tokenize, pretrain, embed, index, retrieve, train, evaluate)
    found: list[Stage] = []
    mistakes = Mistakes()
    for command in commands:
        with mistakes.gather():
            found += command.stages(run)
        if mistakes:  # The stages that follow are checked, and never made.
            run = Artifacts(run.config, Unread(run.config.workdir), run.given, run.title)
    if mistakes:
        with mistakes.gather():
            check_stages(found)
    mistakes.refuse()
    return found


def main(run: Artifacts, options: Options) -> int:
    """Runs the whole pipeline."""
    report = evaluate.print_report
    code = execute(stages, run, options, Rebuild.STALE, report)
    return code if code or options.dry_run else generate.main(run, options)
