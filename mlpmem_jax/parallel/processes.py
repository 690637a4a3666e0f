"""Processes of one run on this machine: started together, ended together.

Process 0 has the terminal, the others write to files. When one fails the rest are stopped and
its error is shown once; a signal to the launcher reaches all of them.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mlpmem_jax import signals
from mlpmem_jax.errors import PREEMPTED

POLL_SECS = 0.05
# Between the first failure and SIGTERM: where all fail alike (a mistake that each of them
# finds), process 0 has then said so itself.
SETTLE_SECS = 1.0
# Between SIGTERM and SIGKILL for processes that have lost one of them: they cannot save.
STOP_SECS = 10.0
# For how long the rest may save after the first has left with the code of preemption.
SAVE_SECS = 60.0
# Between a SIGTERM to the launcher, which is passed on, and SIGKILL.
GRACE_SECS = 120.0
INTERRUPT_SECS = 10.0

_SHOWN_LINES = 40
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


def run_processes(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], logs: Path
) -> int:
    """Runs one command in several processes.

    Args:
        command: Program and arguments, the same for all.
        environments: What each process has in its environment.
        logs: Directory of `process-1.log` and so on.

    Returns:
        The exit code of the first that failed; 0 if none did; 75 if all saved and left;
        128 + number of a signal to this process that ended them.
    """
    received: list[int] = []
    children: list[subprocess.Popen[bytes]] = []
    with _collected(received):
        group = _Group(children, received, logs)
        try:
            for index, environment in enumerate(environments):
                children.append(_start(command, environment, group.log(index) if index else None))
            return group.supervise()
        finally:
            group.send(signal.SIGKILL)
            for child in children:
                child.wait()


def _start(
    command: Sequence[str], environment: Mapping[str, str], log: Path | None
) -> "subprocess.Popen[bytes]":
    """Starts a process with the terminal, or with a log."""
    if log is None:
        return _in_session(command, environment)
    with open(log, "ab") as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {log.stem}\n".encode())
        file.flush()
        return _in_session(command, environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def _in_session(
    command: Sequence[str], environment: Mapping[str, str], **streams: Any
) -> "subprocess.Popen[bytes]":
    # A session of its own: Ctrl-C reaches the launcher, and the launcher decides.
    return subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=_die_with_parent(),
        **streams,
    )


class _Group:
    """The processes, and what has happened to them."""

    def __init__(self, children: list["subprocess.Popen[bytes]"], signals: list[int], logs: Path):
        self._children = children
        self._signals = signals
        self._logs = logs
        self._kill_at: float | None = None
        self._received: int | None = None

    def log(self, index: int) -> Path:
        """Returns the file that a process other than 0 writes to."""
        return self._logs / f"process-{index}.log"

    def supervise(self) -> int:
        """Waits for all; returns the exit code of the run."""
        code = 0
        ended: set[int] = set()
        while len(ended) < len(self._children):
            self._answer_signals()
            for index, child in enumerate(self._children):
                if index in ended or child.poll() is None:
                    continue
                ended.add(index)
                status = _shell_code(child.returncode)
                if status == 0 or self._kill_at is not None:
                    continue  # Nothing new: the first failure, or a signal, ended the rest.
                code = status
                if status == PREEMPTED:
                    self.send(signal.SIGTERM)  # Before they have joined, none tells the others.
                    self._kill_within(SAVE_SECS)
                else:
                    self._stop_rest(index, status)
            if self._kill_at is not None and time.monotonic() > self._kill_at:
                self.send(signal.SIGKILL)
            time.sleep(POLL_SECS)
        return self._code_of_signals(code)

    def _stop_rest(self, failed: int, code: int) -> None:
        first = self._children[0]
        deadline = time.monotonic() + SETTLE_SECS
        while failed and first.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECS)
        self.send(signal.SIGTERM)
        self._kill_within(STOP_SECS)
        spoke = failed == 0 or _shell_code(first.returncode or 0) == code
        self._report(failed, code, spoke)

    def _report(self, failed: int, code: int, spoke: bool) -> None:
        number = len(self._children)
        lines = [f"launch: process {failed} of {number} failed ({_described(code)})"]
        if not spoke:
            lines += [f"launch: its log, {self.log(failed)}, ends with"]
            lines += last_error(self.log(failed).read_text("utf-8", "replace"))
        lines += [f"launch: the others are stopped; their logs: {self._logs}/process-*.log"]
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _answer_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if self._kill_at is not None:  # The second one: no more patience.
                self._kill_within(0)
                return
            self._received = number
            self.send(number)
            self._kill_within(INTERRUPT_SECS if number == signal.SIGINT else GRACE_SECS)

    def _code_of_signals(self, code: int) -> int:
        if self._received is None:
            return code
        codes = {_shell_code(child.returncode) for child in self._children}
        if codes == {0}:
            return 0
        return PREEMPTED if codes == {PREEMPTED} else 128 + self._received

    def _kill_within(self, seconds: float) -> None:
        self._kill_at = time.monotonic() + seconds

    def send(self, number: int) -> None:
        """Sends a signal to all that still run."""
        for child in self._children:
            if child.poll() is None:
                # The group: what a process has started ends with it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)


def last_error(text: str) -> list[str]:
    """Returns the lines of a log from its last error on, at most 40 of them."""
    lines = text.rstrip().splitlines()
    marks = [
        number
        for number, line in enumerate(lines)
        if line.startswith(("Traceback (most recent", "error: ", "Fatal Python error"))
    ]
    return lines[marks[-1] if marks else 0 :][-_SHOWN_LINES:]


def _shell_code(returncode: int) -> int:
    """Returns an exit code as a shell reports it: 128 + number of the signal."""
    return returncode if returncode >= 0 else 128 - returncode


def _described(code: int) -> str:
    if code == 128 + signal.SIGKILL:
        return "killed by SIGKILL; out of memory?"
    if code > 128:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(code - 128).name}"
    return f"exit code {code}"


@contextlib.contextmanager
def _collected(received: list[int]) -> Iterator[None]:
    """Collects signals to this process instead of dying of them."""

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    # What is ignored stays ignored: nohup.
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    signals.pass_on()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> Callable[[], object] | None:
    """Returns what a child calls so that SIGKILL to the launcher leaves no orphans (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # Loaded here: after the fork it might deadlock.
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
