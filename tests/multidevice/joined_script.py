"""A command that does what it is told, in one of several processes. Not a test itself."""

import os
import signal
import sys
import time
import types
from pathlib import Path

from mlpmem_jax.errors import ConfigError, UserError

MODE = sys.argv[1]


def main(config, options):
    import jax

    from mlpmem_jax.parallel.multihost import barrier, is_writer

    print(f"process {jax.process_index()} of {jax.process_count()}", jax.device_count())
    assert is_writer() == (os.environ["MLPMEM_PROCESS_INDEX"] == "0")
    barrier("all here")
    if jax.process_index() == 1:
        if MODE == "raise":
            raise ValueError("mine")
        if MODE == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    if MODE == "refuse":
        raise UserError("all refuse")
    if MODE == "slow" and is_writer():
        time.sleep(25)  # longer than the shutdown of jax.distributed may take
    if MODE in ("raise", "kill"):
        barrier("never")
    return 0


def unreachable(settings, sections):
    raise ConfigError("corpus.paths=gs://ours/a.txt: cannot be reached (no credentials)")


if __name__ == "__main__":
    from mlpmem_jax import __main__ as command_line
    from mlpmem_jax import commands

    stand_in = types.ModuleType("stand_in")
    stand_in.main = main
    sys.modules["mlpmem_jax.pipeline.tokenize"] = stand_in
    tiny = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"
    if MODE == "unreachable" and os.environ["MLPMEM_PROCESS_INDEX"] == "1":
        commands.check_reachable = unreachable
    differs = MODE == "differ" and os.environ["MLPMEM_PROCESS_INDEX"] == "1"
    changed = ["seed=7", "memory.width=64"] if differs else []
    sys.exit(command_line.main(["tokenize", "--config", str(tiny), *changed]))
