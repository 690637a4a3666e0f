"""A command that makes one small artifact: one of two runs that want the same. Not a test itself.

    python making.py WORKDIR PATIENCE [HEARTBEAT]

In the midst of making it, it prints "building" and waits until the file PATIENCE is there.
HEARTBEAT shortens the seconds between two renewals of a lease, and sets when leases run out.
"""

import os
import sys
import time
import types
from pathlib import Path

LEASE_SECS = 2.0


def main(run, options):
    from mlpmem_jax.pipeline.stage import Builders, Stage, run_stage
    from mlpmem_jax.store.manifest import Artifact, Completion

    artifact = Artifact(run.workdir, "tokenizer", "tokenizer", recipe={"size": 1})

    def build():
        print("building", flush=True)
        (artifact.path / "tokenizer.json").write_text("unfinished")
        while not Path(sys.argv[2]).exists():
            time.sleep(0.01)
        (artifact.path / "tokenizer.json").write_text(str(os.getpid()))
        return Completion(files=["tokenizer.json"])

    run_stage(Stage(artifact, build, builders=Builders.FIRST))
    return 0


if __name__ == "__main__":
    from mlpmem_jax import __main__ as command_line
    from mlpmem_jax.store import lease

    if len(sys.argv) > 3:
        from tests.pipeline.bucket_server import reading_from_server

        reading_from_server()
        lease.HEARTBEAT_SECS, lease.LEASE_SECS = float(sys.argv[3]), LEASE_SECS
    stand_in = types.ModuleType("stand_in")
    stand_in.main = main
    sys.modules["mlpmem_jax.pipeline.tokenize"] = stand_in
    tiny = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"
    sys.exit(command_line.main(["tokenize", "--config", str(tiny), "--workdir", sys.argv[1]]))
