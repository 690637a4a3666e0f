"""What is shown: lines where nobody watches, bars that messages do not stick to, any encoding."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from mlpmem_jax import console
from tests.conftest import ROOT

CONFIG = str(ROOT / "configs" / "tiny.yaml")
HELP = ["train", "--help"]


def run(*arguments, shell=None, **variables):
    """Runs a command line; `shell` says where its streams go."""
    command = [sys.executable, "-m", "mlpmem_jax", *arguments]
    if shell:
        command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(command, env=environment, capture_output=True, cwd=ROOT)


@pytest.fixture
def after(monkeypatch):
    """Moves a clock on; standard error is no terminal."""
    monkeypatch.delenv("MLPMEM_PROGRESS", raising=False)
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def test_progress_in_a_log_is_a_line_now_and_then(after, capsys):
    with console.progress(5000, "step", "pretrain", initial=1000) as bar:
        for _ in range(100):
            after(1.0)
            bar.set_postfix({"loss": "3.2"}, refresh=False)
            bar.update(20)
    lines = capsys.readouterr().err.splitlines(keepends=True)
    assert lines == [
        "pretrain: 1.60k of 5.00k steps (32%) in 00:30, 20 steps/s, 02:50 left, loss 3.2\n",
        "pretrain: 2.20k of 5.00k steps (44%) in 01:00, 20 steps/s, 02:20 left, loss 3.2\n",
        "pretrain: 2.80k of 5.00k steps (56%) in 01:30, 20 steps/s, 01:50 left, loss 3.2\n",
        "pretrain: 3.00k of 5.00k steps (60%) in 01:40, 20 steps/s, loss 3.2\n",
    ]


def test_progress_without_a_total(after, capsys):
    bar = console.progress(None, "B", "reading")
    after(2.0)
    bar.update(500)
    bar.close()
    bar.close()
    assert capsys.readouterr().err == "reading: 500B in 00:02, 250B/s\n"


def test_progress_can_be_switched_off(after, capsys, monkeypatch):
    monkeypatch.setenv("MLPMEM_PROGRESS", "off")
    with console.progress(10, "step", "x") as bar:
        after(100.0)
        bar.update(10)
    assert capsys.readouterr().err == ""


def test_messages_do_not_stick_to_a_bar():
    """On a terminal of 80 columns, read as a person reads it."""
    program = (
        "import time\nfrom mlpmem_jax.console import complain, progress, say, warn\n"
        "bar = progress(10, 'step', 'train')\nfor _ in range(3):\n"
        "    time.sleep(0.25); bar.update(1)\n"
        "say('hello'); warn('careful'); bar.update(1); complain('over')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    del environment["MLPMEM_PROGRESS"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:
            break
        if not block:
            break
        written += block
    assert process.wait() == 0
    lines = [_as_seen(line) for line in written.decode().split("\n")]
    assert {"hello", "warning: careful", "error: over"} <= set(lines), written
    assert sum("step" in line for line in lines) == 1


def _as_seen(line):
    """Returns what is left of a line that carriage returns have written over."""
    seen = ""
    for part in line.split("\r"):
        seen = part + seen[len(part) :]
    return seen.strip()


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "utf-8:strict"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_what_an_encoding_lacks_is_replaced(variables):
    whole = run("compare", "--help", PYTHONIOENCODING="utf-8").stdout.decode()
    assert not whole.isascii()
    done = run("compare", "--help", **variables)
    assert (done.returncode, done.stderr) == (0, b"")
    # Character for character, so that the columns of tables stay where they are.
    encoding = "latin-1" if variables.get("PYTHONIOENCODING") == "latin-1" else "utf-8"
    assert len(done.stdout.decode(encoding)) == len(whole)
    # A name of a file that is no text, in a message.
    done = run("train", "--config", b"\xff\xce\xbb.yaml", **variables)
    assert done.returncode == 2 and done.stderr.startswith(b"error: ")
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_streams_that_are_closed_or_full_are_no_failure(streams):
    done = run(*HELP, shell=streams)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    done = run("train", "--config", "none.yaml", shell=streams)
    assert done.returncode == 2 and b"Traceback" not in done.stderr


def test_output_that_cannot_be_written_is_one_line():
    done = run("--version", shell=">/dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: standard output: no space left") and (
        done.stderr.count(b"\n") == 1
    )


TOO_FEW_FILES = b"files, and needs up to 128: raise `ulimit -n`"
TOO_LARGE = b"the file would be larger than the file system or `ulimit -f` allows"


@pytest.mark.parametrize(
    ("command", "limit", "expected"),
    [
        ("tokenize", "-n 6", TOO_FEW_FILES),
        ("evaluate", "-n 14", TOO_FEW_FILES),  # it waited for ever
        ("run", "-n 127", TOO_FEW_FILES),
        ("tokenize", "-f 8", TOO_LARGE),
        ("pretrain", "-f 8", TOO_LARGE),  # Orbax says it
    ],
)
def test_limits_of_the_process_are_named(tmp_path, command, limit, expected):
    """They were taken for a full disk, and for damage."""
    place = ["--config", CONFIG, "--workdir", str(tmp_path / "run")]
    if command == "pretrain":
        assert run("tokenize", *place).returncode == 0
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        # Python writes compiled modules in part under `ulimit -f`, for other tests to import.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        ["bash", "-c", f'ulimit {limit} && exec "$@"', "bash", sys.executable, "-m", "mlpmem_jax",
         command, *place],
        env=environment, capture_output=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2, done
    assert expected in done.stderr and b"damaged" not in done.stderr
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
