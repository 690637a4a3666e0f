"""Kills a rebuild before each of its operations on files, and starts the same command again.

    python rebuild_script.py DIRECTORY [NUMBER]

With NUMBER, a rebuild before it was killed at that operation already. Prints, for each kill, which
artifacts were whole after it, and what the next starts made of it.
"""

import json
import os
import signal
import sys
from pathlib import Path

from mlpmem_jax.pipeline.stage import Rebuild, Stage, run_stage
from mlpmem_jax.store.manifest import Artifact, Completion

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
FILE = "checkpoints/1/part"
RESULTS, sys.stdout = sys.stdout, sys.stderr


def _make(workdir, content, rebuild):
    artifact = Artifact(workdir, "decoder/base", "decoder")

    def build():
        file = Path(artifact.path / FILE)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        return Completion(files=[FILE])

    run_stage(Stage(artifact, build), rebuild)


def _in_child(work, *arguments):
    """Runs something in a process of its own; returns the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), status
    return os.waitstatus_to_exitcode(status) != 0


def _rebuild_and_die(workdir, number):
    count = 0

    def watch(event, arguments):
        nonlocal count
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in OPERATIONS and not reads:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    _make(workdir, "new", Rebuild.ALWAYS)


def _whole(workdir):
    """Returns the contents of the whole artifacts in a work directory, by the folder's name."""
    return {
        file.parent.name: (file.parent / FILE).read_text()
        for file in (workdir / "decoder").glob("*/manifest.json")
        if not file.parent.name.startswith(".discarded")
    }


def main(directory, before=0):
    number = 0
    while True:
        number += 1
        workdir = directory / str(number)
        _make(workdir, "old", Rebuild.REFUSE)
        if before:
            assert _in_child(_rebuild_and_die, workdir, before)
        died = _in_child(_rebuild_and_die, workdir, number)
        found = {"killed": _whole(workdir)}
        _in_child(_make, workdir, "new", Rebuild.REFUSE)
        found["continued"] = _whole(workdir)
        _in_child(_make, workdir, "again", Rebuild.ALWAYS)
        found["rebuilt"] = _whole(workdir)
        found["left"] = sorted(p.name for p in (workdir / "decoder").iterdir())
        print(json.dumps(found), file=RESULTS)
        if not died:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
