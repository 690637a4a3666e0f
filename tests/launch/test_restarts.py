"""Restarts after a preemption, with a stand-in for Python that ends as it is told."""

import os
import signal
import subprocess
import time

import pytest

from mlpmem_jax import errors
from tests.conftest import ROOT

# Ends with the next code of $CODES each time; "wait" saves and leaves with 75 on SIGTERM.
STAND_IN = """
case "$1" in
  -c) exit 0 ;;
  -m) for d in "$@"; do :; done
      [ "$2" != venv ] || { mkdir -p "$d/bin"; cp "$0" "$d/bin/python"; : >"$d/pyvenv.cfg"; }
      exit 0 ;;
esac
code="$(head -n 1 "$CODES")"
sed -i 1d "$CODES"
if [ "$code" = wait ]; then
  trap 'echo saved; exit 75' TERM
  trap 'echo interrupted; exit 130' INT
  echo started
  while :; do sleep 0.1; done
fi
before=""
for word in "$@"; do
  [ "$before" != --config ] || [ -z "${READ:-}" ] || cat "$word" >>"$READ"
  before="$word"
done
echo "run $*"
[ -z "${STARTS:-}" ] || echo "${MLPMEM_RUN_ID:-}" >>"$STARTS"
exit "${code:-0}"
"""


@pytest.fixture
def run(checkout, tmp_path):
    checkout.program("python3.12", STAND_IN)
    codes = tmp_path / "codes"

    def start(given, *arguments, **environment):
        codes.write_text("\n".join(given) + "\n")
        done = checkout.start(*arguments, "train", "a=1", CODES=str(codes), **environment)
        return done.returncode, done.stdout.count("run -P"), done.stderr

    start.codes = codes
    start.checkout = checkout
    return start


def test_the_code_is_the_one_that_python_uses():
    text = (ROOT / "launch" / "restarts.sh").read_text()
    assert f"PREEMPTED={errors.PREEMPTED} " in text


def test_starts_again_until_it_is_done(run):
    code, starts, said = run(["75", "75", "0"])
    assert (code, starts) == (0, 3)
    assert "restart 1 of 100 in 0 s" in said and "restart 2 of 100" in said


@pytest.mark.parametrize("given", [["1"], ["2"], ["130"], ["143"], ["0"]])
def test_any_other_code_is_passed_on(run, given):
    code, starts, said = run([*given, "0"])
    assert (code, starts) == (int(given[0]), 1)
    assert "restart" not in said


def test_number_of_restarts(run):
    assert run(["75"] * 5, "--restarts", "2")[:2] == (75, 3)
    assert run(["75"] * 5, MLPMEM_RESTARTS="1")[:2] == (75, 2)
    code, starts, said = run(["75"] * 5, "--restarts=0")
    assert (code, starts) == (75, 1) and "not started again after 0 restarts" in said


def test_back_off_doubles(run):
    started = time.monotonic()
    _, _, said = run(["75", "75", "0"], MLPMEM_BACKOFF_SECS="1")
    assert "restart 1 of 100 in 1 s" in said and "restart 2 of 100 in 2 s" in said
    assert time.monotonic() - started >= 3


def test_restarts_have_the_name_of_the_run(run, tmp_path):
    starts = tmp_path / "starts"
    del run.checkout.environment["MLPMEM_RUN_ID"]
    for _ in range(2):
        assert run(["75", "75", "0"], STARTS=str(starts))[0] == 0
    names = starts.read_text().split("\n")[:-1]
    assert len(names) == 6 and len(set(names[:3])) == len(set(names[3:])) == 1
    assert names[0] != names[3] and "" not in names


@pytest.mark.parametrize("how", ["--config <(cat given)", "--config /dev/stdin <given"])
def test_a_configuration_that_can_be_read_once_is_there_after_a_restart(run, tmp_path, how):
    run(["0"])
    run.codes.write_text("75\n75\n0\n")
    read, temporary = tmp_path / "read", tmp_path / "temporary"
    temporary.mkdir()
    (tmp_path / "given").write_text("seed: 5\n")
    script = run.checkout.root / "launch" / "run.sh"
    done = subprocess.run(
        ["bash", "-c", f'bash "$0" train {how}', str(script)],
        cwd=tmp_path, capture_output=True, text=True,
        env={**run.checkout.environment, "CODES": str(run.codes), "READ": str(read),
             "TMPDIR": str(temporary)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read.read_text() == "seed: 5\n" * 3
    assert list(temporary.iterdir()) == []


def test_other_files_that_can_be_read_once_are_refused(run):
    code, starts, said = run(["0"], "train", "corpus.paths=/dev/fd/63")
    assert (code, starts) == (2, 0) and "cannot be read again after a restart" in said


@pytest.mark.parametrize("arguments", [["--restarts", "-1"], ["--restarts", "x"], ["--restarts"]])
def test_bad_numbers(run, arguments):
    # (`--restarts` swallows the word behind it, the command.)
    code, starts, said = run(["0"], *arguments)
    assert (code, starts) == (2, 0) and "whole number of at least 0" in said


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGTERM, 75, "saved"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_to_the_launcher_reaches_the_run_and_ends_it(run, number, code, said):
    run(["0"])  # makes the environment
    run.codes.write_text("wait\n0\n")
    checkout = run.checkout
    process = subprocess.Popen(
        ["bash", str(checkout.root / "launch" / "run.sh"), "train"],
        stdout=subprocess.PIPE,
        text=True,
        env={**checkout.environment, "CODES": str(run.codes)},
    )
    assert process.stdout.readline() == "started\n"
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, f"{said}\n")  # and no second start


def test_a_signal_to_the_run_alone_starts_it_again(run):
    run(["0"])
    run.codes.write_text("wait\n0\n")
    checkout = run.checkout
    process = subprocess.Popen(
        ["bash", str(checkout.root / "launch" / "run.sh"), "train"],
        stdout=subprocess.PIPE,
        text=True,
        env={**checkout.environment, "CODES": str(run.codes)},
    )
    assert process.stdout.readline() == "started\n"
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True
    )
    os.kill(int(children.stdout.split()[0]), signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out.startswith("saved\nrun -P -m mlpmem_jax train")
