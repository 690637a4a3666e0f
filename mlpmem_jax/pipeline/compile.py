"""A step compiled ahead of time: does it fit, and what bounds it."""

import os
from pathlib import Path

from mlpmem_jax.console import say
from mlpmem_jax.errors import ArtifactError, UserError
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.store.files import read_json, write_json

EXIT_DOES_NOT_FIT = 3


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    config = run.config
    if options.dry_run:
        return execute(lambda _: [], run, options)
    output = _checked(options.output)
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.pipeline.compiled_steps import lower_step
    from mlpmem_jax.roofline.analysis import analyse
    from mlpmem_jax.roofline.report import as_text, verdict
    from mlpmem_jax.roofline.topology import devices_of

    settings = config.compile
    mesh = make_mesh(config.mesh, devices_of(settings.topology, config.mesh.dcn_data))
    report = analyse(lower_step(run, mesh), mesh, settings)
    say(as_text(report))
    say(verdict(report))
    if output:
        write_json(output, report)
    return 0 if report["memory"]["fits"] else EXIT_DOES_NOT_FIT


def _checked(output: str | None) -> Path | None:
    """Refuses a place for the report that cannot be written, before minutes of compiling.

    Raises:
        UserError: There is no such directory, it cannot be written to, or another file is there.
    """
    if output is None:
        return None
    directory = Path(output).absolute().parent
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        raise UserError(f"--output {output}: {directory} is no directory that can be written to")
    if os.path.lexists(output) and not _is_report(Path(output)):
        raise UserError(f"--output {output}: is there, and no report of compile; name another file")
    return Path(output)


def _is_report(file: Path) -> bool:
    try:
        found = read_json(file)
    except (OSError, ArtifactError):
        return False
    return isinstance(found, dict) and {"schema", "topology", "memory"} <= found.keys()
