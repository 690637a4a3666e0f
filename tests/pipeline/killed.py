"""Runs a command and kills its own process, as `kill -9` would, at a call of a function.

    python killed.py FUNCTION N before|after ARGUMENTS…

FUNCTION is a dotted name; at its N-th call the process dies, before the call's body or
right after it (writes that it began are then half done). With N = 0 it lives.

KILLED_PACE makes each call of the function, in every process, take so many seconds longer, so that
there is time for a notice to arrive; KILLED_WAIT the call at which the signal is sent.

KILLED_BY names another signal, which the process may survive; KILLED_PROCESS one of several
processes, the others live on. KILLED_STEPS names a file that gets a line for each step of
training: the directory of its artifact, and how many steps are finished with it.
"""

import functools
import importlib
import os
import signal
import sys
import time


def _owner(dotted):
    parts = dotted.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:-1]:
            owner = getattr(owner, name)
        return owner, parts[-1]
    raise SystemExit(f"{dotted}: no such function")


SIGNAL = signal.Signals[os.environ.get("KILLED_BY", "SIGKILL")]


def _die_at_call(dotted, number, when):
    index = os.environ.get("MLPMEM_PROCESS_INDEX", "0")
    pace = float(os.environ.get("KILLED_PACE", "0"))
    if os.environ.get("KILLED_PROCESS", index) != index:
        number = 0
    owner, name = _owner(dotted)
    function = getattr(owner, name)
    calls = 0

    @functools.wraps(function)
    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            os.kill(os.getpid(), SIGNAL)
        result = function(*args, **kwargs)
        time.sleep(pace)
        if calls == number:
            os.kill(os.getpid(), SIGNAL)
            time.sleep(float(os.environ.get("KILLED_WAIT", "0")))
        return result

    setattr(owner, name, counted)


def _record_steps(file):
    from mlpmem_jax.training.monitor import Monitor

    dispatched = Monitor.dispatched

    @functools.wraps(dispatched)
    def recorded(self, step, *args):
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(f"{self._checkpoints._directory} {step}\n")
        return dispatched(self, step, *args)

    Monitor.dispatched = recorded


if __name__ == "__main__":
    dotted, number, when, *arguments = sys.argv[1:]
    if "KILLED_STEPS" in os.environ:
        _record_steps(os.environ["KILLED_STEPS"])
    _die_at_call(dotted, int(number), when)
    from mlpmem_jax.program import run

    run(arguments=arguments)
