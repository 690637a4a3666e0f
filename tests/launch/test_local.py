"""run.sh on this machine: its flags, with a stand-in for Python that prints what it is given, and
two real processes."""

import os
import shutil
import subprocess

import pytest

from mlpmem_jax.launching import environments_of
from mlpmem_jax.store.run_record import RunRecord
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "launch" / "golden"
SEVERAL = ["--processes", "3", "--devices-per-process=2", "--logs", "a b", "--with", "gpu"]
STAND_IN = """
case "$1 ${2:-}" in
  "-c "*) exit 0 ;;
  "-m venv") for d in "$@"; do :; done; mkdir -p "$d/bin"; cp "$0" "$d/bin/python"
             : >"$d/pyvenv.cfg"; exit 0 ;;
  "-m pip" | "-m ensurepip") exit 0 ;;
esac
printf '%s\\0' "devices=${MLPMEM_DEVICES_PER_PROCESS:-}" "$@"
[ -z "${VARIABLES:-}" ] || env | grep -E '^(PYTHONPATH|GLIBC_TUNABLES)=' >"$VARIABLES"
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


@pytest.mark.parametrize(
    ("name", "flags"),
    [("local.txt", ["--devices-per-process", "4"]), ("local-several.txt", SEVERAL)],
)
def test_dry_run(checkout, hard_words, check_golden, name, flags):
    checkout.program("python3.12", STAND_IN)
    check_golden(GOLDEN / name, checkout.dry_run(*flags, "--dry-run", "train", *hard_words))
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize("flags", [[], ["--devices-per-process", "4"], SEVERAL])
def test_dry_run_prints_what_would_run(checkout, tmp_path, hard_words, flags):
    checkout.program("python3.12", STAND_IN)
    variables = tmp_path / "variables"
    given = {"VARIABLES": str(variables), "PYTHONPATH": "/their own"}
    planned = checkout.start(*flags, "--dry-run", "train", *hard_words, **given)
    assert planned.returncode == 0, planned.stderr
    done = checkout.start(*flags, "train", *hard_words, **given)
    found = variables.read_text()
    assert "PYTHONPATH=" in found and "GLIBC_TUNABLES=" in found
    shutil.rmtree(checkout.root / ".venv")
    by_hand = subprocess.run(
        ["bash", "-c", planned.stdout],
        capture_output=True,
        text=True,
        env={**checkout.environment, **given},
        cwd=checkout.root,
    )
    assert (by_hand.returncode, by_hand.stdout) == (0, done.stdout)
    assert variables.read_text() == found


def test_dry_run_prints_each_process(checkout, hard_words, words_of):
    planned = checkout.start(*SEVERAL, "--dry-run", "train", *hard_words).stdout.splitlines()
    assert planned[2] == "# which starts"
    expected = environments_of(3, 2, {})
    assert len(planned[3:]) == len(expected)
    for index, (line, environment) in enumerate(zip(planned[3:], expected, strict=True)):
        command, _, streams = line.removeprefix("# ").removesuffix(" &").partition(" </dev/null")
        assert streams == (f" >>'a b/process-{index}.log' 2>&1" if index else "")
        words = words_of(command)
        python = words.index(f"{checkout.root}/.venv/bin/python")
        assert words[python:] == [words[python], "-P", "-m", "mlpmem_jax", "train", *hard_words]
        environment["MLPMEM_COORDINATOR"] = "localhost:PORT"
        del environment["PYTHONPATH"]  # (is the launcher's own already)
        assert dict(word.split("=") for word in words[1:python]) == environment


def test_dry_run_after_the_command_is_the_commands_own(words, checkout):
    assert words("train", "--dry-run")[-2:] == ["train", "--dry-run"]
    # Without COMMAND it is `run`; what is no flag of the launcher is the command's all the same.
    assert words("seed=1", "--dry-run")[-2:] == ["seed=1", "--dry-run"]
    assert words("--config", "a.yaml", "--dry-run")[-4:] == [
        "run", "--config", "a.yaml", "--dry-run",
    ]  # fmt: skip
    text = checkout.start("--dry-run").stdout
    assert "mlpmem_jax run --config" in text and "--dry-run" not in text


def test_further_requirements(words, checkout):
    words("--with", "gpu", "train")
    installs = [call for call in checkout.calls() if call[1:4] == ["-m", "pip", "install"]]
    assert installs[0][-1].endswith("/requirements-gpu.txt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "0"], "--processes=0: must be a whole number of at least 1 "),
        (["--processes=two"], "--processes=two: must be a whole number"),
        (["--devices-per-process", "0"], "--devices-per-process=0: must be a whole number"),
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


@pytest.mark.multidevice
def test_two_real_processes(installed, tmp_path):
    workdir = tmp_path / "run"
    environment = os.environ | {"MLPMEM_VENV": str(installed)}
    environment.pop("MLPMEM_PYTHON", None)  # would ask for an environment of its own
    done = subprocess.run(
        [
            "bash", str(ROOT / "launch" / "run.sh"), "--processes", "2", "--devices-per-process",
            "2", "tokenize", "--config", str(ROOT / "configs" / "tiny.yaml"), "--workdir",
            str(workdir), "corpus.max_bytes=50_000",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"JAX_LOGGING_LEVEL": "INFO"},
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "launch: 2 processes" in done.stderr and "installing" not in done.stderr
    made = [line.split(" (")[0] for line in done.stdout.splitlines() if "made in" in line]
    assert made == ["tokenizer", "tokens"]
    log = (workdir / "logs" / "process-1.log").read_text()
    assert log.startswith("--- ") and "process-1\n" in log
    assert "Connecting to JAX distributed service" in log and "Connecting" in done.stderr
    assert "made in" not in log  # process 0 speaks
    assert not (workdir / "logs" / "process-0.log").exists()
    record = RunRecord.read(workdir)
    tokens, tokenizer = (record.artifact(role, "this test") for role in ("tokens", "tokenizer"))
    for split in ("train", "valid", "test"):
        assert (tokens.path / split / "token").is_dir()
    assert tokens.is_complete() and tokenizer.is_complete()
