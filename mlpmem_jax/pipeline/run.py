"""All stages in order, each skipped when complete and current; then the table and a sample."""

from mlpmem_jax.config.schema import Config
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
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.stage import Rebuild, Stage, check_stages


def stages(config: Config) -> list[Stage]:
    """Returns every stage, in the order of the data flow."""
    commands = (tokenize, pretrain, embed, index, retrieve, train, evaluate)
    found: list[Stage] = []
    mistakes = Mistakes()
    for command in commands:
        with mistakes.gather():
            found += command.stages(config)
    if mistakes:
        with mistakes.gather():
            check_stages(found)
    mistakes.refuse()
    return found


def main(config: Config, options: Options) -> int:
    """Runs the whole pipeline."""
    code = execute(stages, config, options, when_rebuilding=Rebuild.STALE)
    if code or options.dry_run:
        return code
    evaluate.print_report(config)
    return generate.main(config, options)
