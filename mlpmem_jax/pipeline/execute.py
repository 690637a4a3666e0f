"""What every command does with its stages."""

from collections.abc import Callable, Sequence

from etils import epath

from mlpmem_jax.config.load import dump_config
from mlpmem_jax.config.yaml_text import YamlError, parse_yaml, write_yaml
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.parallel.multihost import is_writer
from mlpmem_jax.pipeline.changed import BEFORE, late_role
from mlpmem_jax.pipeline.corpus_record import CorpusRecord
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.plan import print_plan
from mlpmem_jax.pipeline.stage import Rebuild, Stage, run_stages
from mlpmem_jax.store.files import write_bytes
from mlpmem_jax.store.run_record import RunRecord

CONFIG = "config.yaml"
# Configurations that were written before they began with this line hold all of these sections.
_MARK = "# Written by mlpmem_jax and replaced by it: what the run here was made with.\n"
_TRAINED = {"memory", "joint"}
_SECTIONS = {"workdir", "seed", "corpus", "decoder", "memory", "train", "evaluate"}


def execute(
    stages_of: Callable[[Artifacts], Sequence[Stage]],
    run: Artifacts,
    options: Options,
    when_rebuilding: Rebuild = Rebuild.ALWAYS,
    report: Callable[[Artifacts], None] = lambda run: None,
) -> int:
    """Plans or runs the stages of a command; returns the exit code.

    Args:
        stages_of: Returns the stages.
        when_rebuilding: What `--rebuild` does with complete artifacts.
        report: Prints what was found once everything is there.
    """
    rebuild = when_rebuilding if options.rebuild else Rebuild.REFUSE
    stages = stages_of(run)
    if options.rebuild or not all(stage.artifact.is_complete() for stage in stages):
        check_config_file(run)
    if options.dry_run:
        print_plan(run, stages, rebuild)
        return 0
    run_stages(stages, rebuild, before_building=lambda: write_run(run, stages))
    if stages:
        record(run, stages)
    report(run)
    return 0


def write_run(run: Artifacts, stages: Sequence[Stage]) -> None:
    """Writes what a run is made with, before something is made for it."""
    write_config(run)
    record(run, stages)


def record(run: Artifacts, stages: Sequence[Stage]) -> None:
    """Writes to `run.json` which artifacts the stages make or have made.

    Where another command has changed the training text since this one began, what was made of the
    text before takes no role of what is there now.
    """
    if not is_writer():
        return
    if not (run.workdir / CONFIG).exists():
        write_config(run)  # All of it lies in a store that others have filled.
    roles = {
        one.label: one.relative
        for stage in stages
        for one in (*stage.artifact.inputs, stage.artifact)
        if one.root == run.store and BEFORE not in one.label
    }
    if not CorpusRecord.read(run.workdir).is_same(run.corpus):
        made = {stage.artifact.label for stage in stages}
        number = len(run.corpus.changes) + 1
        roles = {late_role(role, number): roles[role] for role in made & _TRAINED}
    # Not as given: other commands may read it from another current directory.
    store = None if run.config.store is None else str(run.store)
    RunRecord.update(run.workdir, store, roles, run.sources.found)


def write_config(run: Artifacts) -> None:
    """Writes what a run is made with; a command that was refused leaves no trace."""
    check_config_file(run)
    run.workdir.mkdir(parents=True, exist_ok=True)
    write_bytes(run.workdir / CONFIG, (_MARK + dump_config(run.config)).encode())


def check_config_file(run: Artifacts) -> None:
    """Refuses to replace a file of the user's by the resolved configuration.

    Raises:
        ConfigError: `config.yaml` in the work directory holds what this program does not write.
    """
    file = run.workdir / CONFIG
    if is_writer() and file.exists() and not _is_ours(file):
        raise ConfigError(
            f"{file}: not as this program writes it, and the resolved configuration goes there; "
            "rename it, or use another workdir"
        )


def _is_ours(file: epath.Path) -> bool:
    """Returns whether a file is as `write_config` leaves it: comments and edits would be lost."""
    if not file.is_file():
        return False
    try:
        text = file.read_bytes().decode()
        body = text.removeprefix(_MARK)
        value, _ = parse_yaml(body)
    except (UnicodeDecodeError, YamlError):
        return False
    is_whole = body != text or (isinstance(value, dict) and value.keys() >= _SECTIONS)
    return is_whole and write_yaml(value) == body
