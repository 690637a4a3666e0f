"""Signals where an exception from a handler would be lost, changed or late."""

import signal
import subprocess
import sys

import pytest

from mlpmem_jax.errors import EXIT_INTERRUPTED, PREEMPTED
from tests.conftest import ROOT

CODES = {signal.SIGTERM: PREEMPTED, signal.SIGINT: EXIT_INTERRUPTED}
START = "import gc, hashlib, os, signal, sys, time\nfrom mlpmem_jax import signals\n"
READY = "signals.listen()\nprint('ready', flush=True)\n"
# Each goes on for ten seconds or more and then ends with 0.
PLACES = {
    "a callback of the garbage collector": "gc.callbacks.append(lambda *_: time.sleep(10))\n"
    + READY
    + "gc.collect()\n",
    "a handler of everything": READY
    + "try:\n    time.sleep(10)\nexcept BaseException:\n    raise ImportError('half a module')\n",
    "a destructor": READY
    + "class Late:\n    def __del__(self):\n        time.sleep(10)\nlate = Late()\ndel late\n",
    "a call that returns to no instruction": READY
    + "hashlib.pbkdf2_hmac('sha512', b'x', b'y', 30_000_000)\n",
}


def started(text, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", START + text],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_is_answered_at_once_wherever_it_comes(place, number):
    process = started(PLACES[place])
    process.send_signal(number)
    _, err = process.communicate(timeout=9)
    assert process.returncode == CODES[number], err
    assert err.count("\n") == 1 and err.startswith(("error: interrupted;", "preempted: stopped by"))


HELD = (
    "signals.listen()\nwith signals.held():\n    print('ready', flush=True)\n"
    + "    deadline = time.monotonic() + 60\n"
    + "    while not signals.came() and time.monotonic() < deadline: time.sleep(0.01)\n"
    + "    print('noted', flush=True)\n"
    + "    time.sleep({seconds})\nsys.exit(7)\n"
)


def test_a_loop_that_asks_ends_by_itself():
    process = started(HELD.format(seconds=0))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (7, "noted\n", "")


def test_an_interrupt_does_not_wait_for_the_loop():
    process = started(HELD.format(seconds=60))
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGTERM)  # says nothing new
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == EXIT_INTERRUPTED


def test_after_the_end_the_code_stands():
    process = started(
        READY + "signals.finish()\nprint('done', flush=True)\ntime.sleep(1)\nsys.exit(3)\n"
    )
    assert process.stdout.readline() == "done\n"
    for number in CODES:
        process.send_signal(number)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 3


def test_what_is_ignored_stays_ignored():
    process = started(
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + READY + "time.sleep(1)\nsys.exit(4)\n"
    )
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 4


def test_nobody_who_reads_keeps_a_process():
    """Standard error is a pipe that is full."""
    fill = (
        "os.set_blocking(2, False)\ntry:\n    while True: os.write(2, b'x' * 4096)\n"
        "except BlockingIOError:\n    os.set_blocking(2, True)\n"
    )
    process = started(fill + READY + "time.sleep(60)\n")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == PREEMPTED
