"""tokenize: an error or a kill at any moment, and the start after it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlpmem_jax.corpus import writer
from mlpmem_jax.store.run_record import RunRecord
from tests.pipeline.tokenizing import contents, failing_at, make, settings

pytestmark = pytest.mark.usefixtures("small_shards")


def test_an_error_in_the_middle_and_then_a_second_start(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(settings(text, "straight"))
    expected = contents(text / "straight")
    for failing in (1, 2, 5, 9):
        name = f"failing{failing}"
        with monkeypatch.context() as patch:
            patch.setattr(writer.TokenWriter, "save", failing_at(failing))
            with pytest.raises(OSError, match="No space"):
                make(settings(text, name))
        redone: list[int] = []
        real = writer.SplitWriter.add

        def counting(self: Any, pieces: Any, tokens: Any, real: Any = real) -> bool:
            redone.extend(piece.num_bytes for piece in pieces)  # noqa: B023
            return bool(real(self, pieces, tokens))

        monkeypatch.setattr(writer.SplitWriter, "add", counting)
        make(settings(text, name))
        monkeypatch.setattr(writer.SplitWriter, "add", real)
        assert contents(text / name) == expected
        total = sum(path.stat().st_size for path in (text / "text").iterdir())
        assert (sum(redone) < total) == (failing > 1)


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}]
from mlpmem_jax.store import appender
from tests.pipeline.tokenizing import make, shrink
shrink(setattr)

calls = 0
def seam(real):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == {kill_before}:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return wrapped

# Every rename, every shard and every resize is a moment to die before.
os.replace = seam(os.replace)
appender.write_rows = seam(appender.write_rows)
appender.create_array = seam(appender.create_array)
make({values!r})
print("calls", calls)
"""


def start(root: Path, values: dict[str, Any], kill_before: int) -> subprocess.CompletedProcess[str]:
    program = KILLED.format(root=str(root), kill_before=kill_before, values=values)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )


def test_sigkill_at_any_moment(text: Path, root: Path) -> None:
    straight = start(root, settings(text, "straight"), 0)
    assert straight.returncode == 0, straight.stderr
    expected = contents(text / "straight")
    calls = int(straight.stdout.split("calls ")[1])
    values = settings(text, "killed")
    step = max(2, calls // 6)
    # Each start dies a little later, each continues the one before.
    for kill_before in (2, 5, step, step, 2 * step):
        assert start(root, values, kill_before).returncode == -9
    finished = start(root, values, 0)
    assert finished.returncode == 0, finished.stderr
    assert "continuing" in finished.stdout
    assert contents(text / "killed") == expected
    for name in ("tokenizer", "tokens"):
        one, other = (
            RunRecord.read(text / run).artifact(name, "test").load().fingerprint
            for run in ("straight", "killed")
        )
        assert one == other
