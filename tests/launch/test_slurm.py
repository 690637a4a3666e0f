"""run.sh --target slurm, with stand-ins for sbatch, srun and scontrol."""

import os
import re
import shlex
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "launch" / "golden"
FLAGS = ["--nodes", "2", "--gpus-per-node", "2"]
COMMAND = ["pretrain", "--config", "configs/tiny.yaml"]

# Runs the script at once, as job 7.
SBATCH = """
for script in "$@"; do :; done
SLURM_JOB_ID=7 bash "$script" >"$(sed -n 's/^#SBATCH --output=//p' "$script" | sed s/%j/7/)" 2>&1
code=$?
case " $* " in *" --wait "*) exit "$code" ;; esac
"""
# Starts as many tasks as the job asks for, and leaves with the highest code.
SRUN = """
while [ "${1#--}" != "$1" ]; do shift; done
code=0
for k in 0 1 2 3; do
  SLURM_PROCID=$k "$@" || { [ "$?" -le "$code" ] || code=$CODE; }
done
exit "$code"
"""
PYTHON = """#!/usr/bin/env bash
case "$1 ${2:-}" in
  "-c "*) exit 0 ;;
  "-m venv") for d in "$@"; do :; done; mkdir -p "$d/bin"; cp "$0" "$d/bin/python"
             : >"$d/pyvenv.cfg"; exit 0 ;;
  "-m pip" | "-m ensurepip") exit 0 ;;
esac
if [ "$3" = mlpmem_jax.launching ]; then
  printf '%s\\0' "$@" >"$WORDS-check"
  exit "${WRONG:-0}"
fi
printf '%s\\0' "$PWD" "$@" >"$WORDS-$SLURM_PROCID"
env | grep -E '^(MLPMEM|HF)_' | sort >"$WORDS-$SLURM_PROCID.variables"
echo "out $SLURM_PROCID"
[ "${CODE:-0}" = 0 ] || { echo "error: mine $SLURM_PROCID" >&2; exit "$CODE"; }
"""


@pytest.fixture
def cluster(checkout, tmp_path):
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", "")):
        checkout.program(name, text)
    (checkout.bin / "python3.12").write_text(PYTHON)
    (checkout.bin / "python3.12").chmod(0o755)
    checkout.environment["WORDS"] = str(tmp_path / "words")
    checkout.elsewhere = tmp_path / "elsewhere"
    (checkout.elsewhere / "configs").mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "tiny.yaml", checkout.elsewhere / "configs")
    return checkout


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("slurm.txt", ["--nodes", "2"]),
        (
            "slurm-flags.txt",
            [
                *FLAGS, "--name", "big", "--partition", "gpu", "--account", "ours", "--time",
                "2-00:00:00", "--sbatch", "--qos=long --exclusive", "--wait", "--restarts", "3",
            ],
        ),
    ],
)  # fmt: skip
def test_dry_run(cluster, hard_words, check_golden, name, flags):
    done = cluster.start(
        "--target", "slurm", *flags, "--dry-run", *COMMAND, *hard_words, cwd=cluster.elsewhere
    )
    assert done.returncode == 0, done.stderr
    assert cluster.calls() == [] and os.listdir(cluster.elsewhere) == ["configs"]
    text = done.stdout.replace(str(cluster.root), "PROJECT")
    check_golden(GOLDEN / name, text.replace(str(cluster.elsewhere), "HERE"))


def test_words_and_logs(cluster, hard_words, tmp_path):
    done = cluster.start(
        "--target", "slurm", *FLAGS, "--wait", *COMMAND, *hard_words, cwd=cluster.elsewhere
    )
    assert done.returncode == 0, done.stderr
    calls = cluster.calls()
    assert [call[0] for call in calls] == ["sbatch", "srun"]
    assert calls[0][1:] == ["--wait", str(cluster.elsewhere / "slurm" / "mlpmem.sbatch")]
    frozen = str(cluster.elsewhere / "slurm" / "mlpmem-a-run.yaml")
    words = [*COMMAND[:2], frozen, *hard_words]
    expected = [str(cluster.elsewhere), "-P", "-m", "mlpmem_jax", *words]
    for task in range(4):
        assert (tmp_path / f"words-{task}").read_text().split("\0")[:-1] == expected
    folder = cluster.elsewhere / "slurm"
    assert (folder / "mlpmem-7.log").read_text() == "out 0\n"
    assert (folder / "mlpmem-7" / "process-3.log").read_text() == "out 3\n"
    script = (folder / "mlpmem.sbatch").read_text()
    # Every task must see all GPUs of its node.
    assert "--gpus-per-task" not in script and "#SBATCH --gres=gpu:2" in script
    assert re.search(r"^#SBATCH --ntasks-per-node=2$", script, re.M)


def test_a_command_that_cannot_succeed_is_not_submitted(cluster, hard_words, tmp_path):
    given = ["--target", "slurm", *FLAGS, *COMMAND, *hard_words]
    done = cluster.start(*given, cwd=cluster.elsewhere, WRONG="2")
    assert done.returncode == 2 and cluster.calls() == []
    checked = (tmp_path / "words-check").read_text().split("\0")[:-1]
    frozen = str(cluster.elsewhere / "slurm" / "mlpmem-a-run.yaml")
    flags = ["-P", "-m", "mlpmem_jax.launching", "--check", "--shares-files"]
    assert checked == [*flags, *COMMAND[:2], frozen, *hard_words]


@pytest.mark.parametrize(("restarted", "requeued"), [("", 1), ("2", 1), ("3", 0)])
def test_a_preempted_job_is_queued_again(cluster, restarted, requeued):
    done = cluster.start(
        "--target", "slurm", *FLAGS, "--wait", "--restarts=3", *COMMAND,
        cwd=cluster.elsewhere, CODE="75", SLURM_RESTART_COUNT=restarted or "0",
    )  # fmt: skip
    assert done.returncode == 75
    calls = cluster.calls()
    assert calls.count(["scontrol", "requeue", "7"]) == requeued


def test_a_job_that_is_queued_again_keeps_its_name(cluster, tmp_path):
    del cluster.environment["MLPMEM_RUN_ID"]
    own = {k: v for k, v in cluster.environment.items() if k.startswith("MLPMEM_")}

    def run_id(script, **environment):
        done = cluster.start(*script, cwd=cluster.elsewhere, **environment)
        assert done.returncode == 0, done.stderr
        found = {(tmp_path / f"words-{task}.variables").read_text() for task in range(4)}
        assert len(found) == 1
        variables = dict(line.split("=") for line in found.pop().splitlines())
        name = variables.pop("MLPMEM_RUN_ID")
        # The environment comes along, which is sbatch's own way, and the script leaves it alone.
        assert variables == own | environment
        return name

    given = ["--target", "slurm", *FLAGS, "--wait", *COMMAND, "--rebuild"]
    first, second = run_id(given, HF_TOKEN="secret"), run_id(given)
    assert first != second and first.endswith("-7") and second.endswith("-7")
    script = (cluster.elsewhere / "slurm" / "mlpmem.sbatch").read_text()
    assert "--export" not in script
    # Queued again, the same script runs in the same job.
    assert re.findall("export MLPMEM_RUN_ID=(.*)", script) == [second[:-1] + "$SLURM_JOB_ID"]


def test_a_failure_is_shown(cluster):
    done = cluster.start(
        "--target", "slurm", *FLAGS, "--wait", *COMMAND, cwd=cluster.elsewhere, CODE="3"
    )
    assert done.returncode == 3
    assert not any(call[0] == "scontrol" for call in cluster.calls())
    log = (cluster.elsewhere / "slurm" / "mlpmem-7.log").read_text()
    assert "process-1.log ends with\nout 1\nerror: mine 1\n" in log


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--target slurm needs --nodes"),
        (["--nodes", "two"], "--nodes=two: must be a whole number of at least 1"),
        (["--nodes", "0"], "--nodes=0: must be a whole number of at least 1"),
        (["--nodes", "-1"], "--nodes=-1: must be a whole number of at least 1"),
        (["--nodes", "99999999999999999999"], "must be a whole number of at least 1"),
        (["--nodes", "1", "--gpus-per-node=0"], "--gpus-per-node=0: must be a whole number"),
        ([*FLAGS, "--restarts", "08"], "--restarts=08: must be a whole number"),
        ([*FLAGS, "--time", "1\n2"], "--time: must be one line"),
        ([*FLAGS, "--sbatch", "--comment='two"], "quotes are not closed"),
        ([*FLAGS, "--sbatch", "long"], "--sbatch=long: long belongs to no flag"),
        ([*FLAGS, "--sbatch", "--qos long more"], "more belongs to no flag"),
        ([*FLAGS, "--name", "a b"], "--name=a b: letters, digits"),
    ],
)
def test_mistakes_submit_nothing(cluster, flags, message):
    done = cluster.start("--target", "slurm", *flags, *COMMAND, cwd=cluster.elsewhere)
    assert done.returncode == 2 and message in done.stderr
    assert cluster.calls() == [] and os.listdir(cluster.elsewhere) == ["configs"]


def test_a_folder_with_a_space_is_refused(cluster):
    done = cluster.start("--target", "slurm", *FLAGS, *COMMAND)
    assert done.returncode == 2 and "sbatch cannot write logs to a path with spaces" in done.stderr


def test_flags_for_sbatch_are_shell_words(cluster):
    """One directive a flag, its value with it; no file name takes the place of a word."""
    (cluster.elsewhere / "--exclusive").touch()
    flags = """--qos long --comment="two words" --constraint 'a&b*' -* --nice=-5 --x "" -C 'q"\\'"""
    done = cluster.start(
        "--target", "slurm", *FLAGS, "--sbatch", flags, "--wait", *COMMAND, cwd=cluster.elsewhere
    )
    assert done.returncode == 0, done.stderr
    script = (cluster.elsewhere / "slurm" / "mlpmem.sbatch").read_text()
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    # sbatch reads a line as a shell would, but for what a shell replaces.
    given = [shlex.split(line.removeprefix("#SBATCH ")) for line in lines[8:]]
    assert given == [
        ["--qos", "long"], ["--comment=two words"], ["--constraint", "a&b*"], ["-*"],
        ["--nice=-5"], ["--x", ""], ["-C", 'q"\\'],
    ]  # fmt: skip


def test_a_job_reads_the_configuration_that_was_submitted(cluster, tmp_path):
    given = cluster.elsewhere / "configs" / "tiny.yaml"
    submitted = given.read_text()
    # It changes the file before the job starts.
    cluster.program("sbatch", "echo 'seed: 7' >configs/tiny.yaml\n" + SBATCH)
    done = cluster.start("--target", "slurm", *FLAGS, "--wait", *COMMAND, cwd=cluster.elsewhere)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "words-0").read_text().split("\0")
    frozen = words[words.index("--config") + 1]
    with open(frozen, encoding="utf-8") as file:
        assert file.read() == submitted
    assert given.read_text() == "seed: 7\n"
    # The same run cannot mean another configuration.
    done = cluster.start("--target", "slurm", *FLAGS, *COMMAND, cwd=cluster.elsewhere)
    assert done.returncode == 2 and "was submitted with another configuration" in done.stderr


def test_a_configuration_from_a_pipe_reaches_the_job(cluster, tmp_path):
    script = cluster.root / "launch" / "run.sh"
    done = subprocess.run(
        ["bash", "-c", 'bash "$0" "$@" --config <(echo seed: 5)', str(script), "--target", "slurm",
         *FLAGS, "--wait", "pretrain"],
        cwd=cluster.elsewhere, env=cluster.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "words-3").read_text().split("\0")
    with open(words[words.index("--config") + 1], encoding="utf-8") as file:
        assert file.read() == "seed: 5\n"


def test_a_script_of_the_users_own_is_not_replaced(cluster):
    own = cluster.elsewhere / "slurm" / "mlpmem.sbatch"
    own.parent.mkdir()
    own.write_text("mine")
    done = cluster.start("--target", "slurm", *FLAGS, *COMMAND, cwd=cluster.elsewhere)
    assert done.returncode == 2 and "use another --name" in done.stderr
    assert own.read_text() == "mine" and cluster.calls() == []
