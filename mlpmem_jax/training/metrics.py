"""Metrics of a run: a JSON line a record, TensorBoard events, a progress bar."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from etils import epath
from tensorboardX import SummaryWriter

from mlpmem_jax.console import is_speaker, progress
from mlpmem_jax.datastore.files import is_local, write_bytes

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends records; a resumed run drops what the interrupted one wrote too far.

    Attributes:
        directory: Where `metrics.jsonl` and the TensorBoard events lie.
    """

    def __init__(self, directory: epath.Path, start_step: int):
        self.directory = directory
        self._file = directory / METRICS
        self._writer: SummaryWriter | None = None
        if not is_speaker():
            return
        directory.mkdir(parents=True, exist_ok=True)
        write_bytes(self._file, _lines_up_to(self._file, start_step))
        # purge_step hides events of steps that are about to be repeated.
        self._writer = SummaryWriter(
            os.fspath(directory), purge_step=start_step + 1 if start_step else None
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one record: values by name, after `step` finished steps."""
        if self._writer is None:
            return
        record = {"step": step} | {
            name: value if math.isfinite(value) else str(value) for name, value in values.items()
        }
        line = json.dumps(record) + "\n"
        if is_local(self._file):
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(line)
        else:  # Object stores cannot append.
            write_bytes(self._file, self._file.read_bytes() + line.encode())
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes the events."""
        if self._writer is not None:
            self._writer.close()


def _lines_up_to(file: epath.Path, step: int) -> bytes:
    if not file.exists() or step == 0:
        return b""
    kept = []
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # The line that a kill cut off; nothing follows it.
        if record["step"] <= step:
            kept.append(line + "\n")
    return "".join(kept).encode()


class TrainingBar:
    """The progress bar of a training run."""

    def __init__(self, total_steps: int, start_step: int, description: str):
        self._bar = progress(total_steps, "step", description, initial=start_step)

    def update(self, **shown: Any) -> None:
        """Advances by one step; keyword values are shown behind the bar."""
        if shown:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(1)

    def close(self) -> None:
        """Leaves the bar."""
        self._bar.close()
