"""What every command does with its stages."""

from collections.abc import Callable, Sequence

from etils import epath

from mlpmem_jax.config.load import dump_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.datastore.files import write_bytes
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.plan import print_plan
from mlpmem_jax.pipeline.stage import Rebuild, Stage, run_stages


def execute(
    stages_of: Callable[[Config], Sequence[Stage]],
    config: Config,
    options: Options,
    when_rebuilding: Rebuild = Rebuild.ALWAYS,
) -> int:
    """Plans or runs the stages of a command; returns the exit code."""
    rebuild = when_rebuilding if options.rebuild else Rebuild.REFUSE
    stages = stages_of(config)
    if options.dry_run:
        print_plan(config, stages, rebuild)
        return 0
    run_stages(stages, rebuild, before_building=lambda: write_config(config))
    return 0


def write_config(config: Config) -> None:
    """Writes what a run is made with; a command that was refused leaves no trace."""
    workdir = epath.Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    write_bytes(workdir / "config.yaml", dump_config(config).encode())


def execute_and_report(
    stages_of: Callable[[Config], Sequence[Stage]],
    report: Callable[[Config], None],
    config: Config,
    options: Options,
    when_rebuilding: Rebuild = Rebuild.ALWAYS,
) -> int:
    """As `execute`, and prints what was found once everything is there."""
    code = execute(stages_of, config, options, when_rebuilding)
    if code == 0 and not options.dry_run:
        report(config)
    return code
