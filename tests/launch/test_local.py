"""Flags of run.sh on this machine, with a stand-in for Python that prints what it is given."""

import pytest

STAND_IN = """
case "$1 ${2:-}" in
  "-c "*) exit 0 ;;
  "-m venv") for d in "$@"; do :; done; mkdir -p "$d/bin"; cp "$0" "$d/bin/python"
             : >"$d/pyvenv.cfg"; exit 0 ;;
  "-m pip" | "-m ensurepip") exit 0 ;;
esac
printf '%s\\0' "devices=${MLPMEM_DEVICES_PER_PROCESS:-}" "$@"
"""


@pytest.fixture
def words(checkout):
    checkout.program("python3.12", STAND_IN)

    def start(*arguments):
        done = checkout.start(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\0")[:-1]

    return start


def test_one_process(words, hard_words):
    assert words("train", *hard_words) == [
        "devices=", "-P", "-m", "mlpmem_jax", "train", *hard_words,
    ]  # fmt: skip
    found = words("--processes=1", "--devices-per-process", "4", "train")
    assert found == ["devices=4", "-P", "-m", "mlpmem_jax", "train"]


def test_several_processes(words, hard_words):
    given = ["--processes", "3", "--devices-per-process=2", "--logs", "a b", "--restarts", "1"]
    assert words(*given, "train", *hard_words) == [
        "devices=", "-P", "-m", "mlpmem_jax.launching", "--processes", "3",
        "--devices-per-process", "2", "--logs", "a b", "train", *hard_words,
    ]  # fmt: skip


def test_further_requirements(words, checkout):
    words("--with", "gpu", "train")
    installs = [call for call in checkout.calls() if call[1:4] == ["-m", "pip", "install"]]
    assert installs[0][-1].endswith("/requirements-gpu.txt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "0"], "--processes=0: must be at least 1"),
        (["--processes=two"], "--processes=two: must be a whole number"),
        (["--devices-per-process", "0"], "--devices-per-process=0: must be at least 1"),
        (["--with", "sun"], "--with=sun: there is no requirements-sun.txt"),
        (["--processes"], "--processes needs a value"),
    ],
)
def test_mistakes(checkout, flags, message):
    done = checkout.start(*flags, *(["train"] if len(flags) > 1 or "=" in flags[0] else []))
    assert done.returncode == 2 and message in done.stderr
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize("target", ["local", "tpu-vm", "gke", "slurm"])
def test_help_lists_the_flags_that_there_are(checkout, target):
    done = checkout.start("--target", target, "--help")
    assert done.returncode == 0, done.stderr
    text = (checkout.root / "launch" / "targets" / f"{target}.sh").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("switches=", "values"))]
    names = " ".join(lines).replace('"', " ").replace("+=", " ").replace("=", " ").split()
    for name in names:
        assert not name.startswith("--") or name in done.stdout, name
