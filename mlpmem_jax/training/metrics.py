"""Metrics of a run: a JSON line a record, TensorBoard events, a progress bar."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from etils import epath
from tensorboardX import SummaryWriter

from mlpmem_jax.console import is_speaker, warn
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.store.files import is_local, write_bytes
from mlpmem_jax.training.uploads import GrowingObject, Uploads, pieces_of

METRICS = "metrics.jsonl"
_BEGIN = b'{"step": '
_EVENTS = "events.out.tfevents.*"


class MetricsLog:
    """Takes records; this one, of processes other than 0, keeps none."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one record: values by name, after `step` finished steps."""

    def poll(self) -> None:
        """Sends records away if it is time to. Never waits for that."""

    def flush(self) -> None:
        """Sends records away now."""

    def close(self) -> None:
        """Writes what is left; waits for it."""


def metrics_log(directory: epath.Path, start_step: int) -> MetricsLog:
    """Returns what appends records; a resumed run drops what the interrupted one wrote too far.

    In a bucket they arrive once a minute and at checkpoints, in pieces (training/uploads.py);
    what a kill loses is the last minute. Process 0 alone writes.
    """
    if not is_speaker():
        return MetricsLog()
    directory.mkdir(parents=True, exist_ok=True)
    return (_Folder if is_local(directory) else _Bucket)(directory, start_step)


def _line(step: int, values: Mapping[str, float]) -> bytes:
    record = {"step": step} | {
        name: value if math.isfinite(value) else str(value) for name, value in values.items()
    }
    return (json.dumps(record) + "\n").encode()


class _Folder(MetricsLog):
    """A local directory: lines are there at once, events by a thread of the writer's own."""

    def __init__(self, directory: epath.Path, start_step: int):
        self._file = directory / METRICS
        _shorten(self._file, start_step)
        _remove_abandoned_events(directory, start_step)
        self._writer = _event_writer(directory, start_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with open(self._file, "ab") as file:
            file.write(_line(step, values))
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Bucket(MetricsLog):
    """A directory in a bucket. TensorBoard's writer would send a whole file at each flush."""

    def __init__(self, directory: epath.Path, start_step: int):
        self._directory = directory
        self._temporary = tempfile.TemporaryDirectory(prefix="mlpmem-metrics-")
        self._uploads = Uploads()
        file = directory / METRICS
        self._lines = GrowingObject(file, _shorten(file, start_step))
        _remove_abandoned_events(directory, start_step)
        self._events = self._event_object(start_step)
        self._new_lines = b""
        self._writer: SummaryWriter | None = None

    def _event_object(self, start_step: int) -> GrowingObject:
        """Opens a file of events, which says from which step on earlier ones are void."""
        _event_writer(self._temporary.name, start_step).close()
        (local,) = Path(self._temporary.name).iterdir()
        target = self._directory / local.name
        data = local.read_bytes()
        local.unlink()
        write_bytes(target, data)
        return GrowingObject(target, data)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._new_lines += _line(step, values)
        if self._writer is None:
            self._writer = _event_writer(self._temporary.name, 0)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self.poll()

    def poll(self) -> None:
        if self._new_lines and self._uploads.due():
            self._uploads.send(self._additions())

    def flush(self) -> None:
        if self._new_lines and not self._uploads.busy():
            self._uploads.send(self._additions())

    def close(self) -> None:
        self._uploads.finish(self._additions())
        self._temporary.cleanup()

    def _additions(self) -> dict[GrowingObject, bytes]:
        """Returns what was written since it was last asked."""
        lines, self._new_lines = self._new_lines, b""
        return {self._lines: lines, self._events: self._new_events()}

    def _new_events(self) -> bytes:
        if self._writer is None:
            return b""
        self._writer.close()  # Only then are the events whole.
        self._writer = None
        # Files of events may be put one behind the other.
        files = sorted(Path(self._temporary.name).iterdir())
        events = b"".join(file.read_bytes() for file in files)
        for file in files:
            file.unlink()
        return events


def _event_writer(directory: str | os.PathLike[str], start_step: int) -> SummaryWriter:
    # purge_step hides events of steps that are about to be repeated. The suffix keeps attempts
    # apart that begin in the same second.
    return SummaryWriter(
        os.fspath(directory),
        purge_step=start_step + 1 if start_step else None,
        filename_suffix=f".{start_step}",
    )


def _remove_abandoned_events(directory: epath.Path, start_step: int) -> None:
    """Removes the events of earlier attempts where a run begins from step 0 again.

    TensorBoard would show both as one curve that goes back and forth.
    """
    for file in directory.glob(_EVENTS) if start_step == 0 else ():
        file.unlink(missing_ok=True)


def _shorten(file: epath.Path, step: int) -> bytes:
    """Drops the lines after a step, and makes one file of all pieces; returns its content."""
    _refuse_foreign(file)
    kept = _lines_up_to(file, step)
    write_bytes(file, kept)
    for piece in pieces_of(file)[1:]:
        piece.unlink()
    return kept


def _refuse_foreign(file: epath.Path) -> None:
    """Refuses to write over a file that holds no records of a run.

    Raises:
        ArtifactError: Names it.
    """
    if file.exists() and file.read_bytes()[: len(_BEGIN)] not in (b"", _BEGIN):
        raise ArtifactError(
            f"{file}: not written by this program, and metrics of the run go there; move it away, "
            "or use another workdir"
        )


def _lines_up_to(file: epath.Path, step: int) -> bytes:
    if step == 0:
        return b""
    kept: dict[bytes, None] = {}  # Without the lines that stand in two pieces.
    for piece in pieces_of(file):
        lines = piece.read_bytes().splitlines()
        for number, line in enumerate(lines, 1):
            written_at = _step_of(line)
            if written_at is None and number < len(lines):  # The last one a kill may have cut off.
                warn(f"{piece}: line {number} is damaged; it is left out")
            elif written_at is not None and written_at <= step:
                kept[line + b"\n"] = None
    return b"".join(kept)


def _step_of(line: bytes) -> int | None:
    """Returns the step of a record, or None where the line is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None
