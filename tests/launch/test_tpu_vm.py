"""run.sh --target tpu-vm, with a stand-in for gcloud that keeps TPUs in a directory.

Each worker is a home directory; ssh hands its one string to a shell there, as sshd does.
"""

import contextlib
import os
import signal
import subprocess
import time

import pytest

from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "launch" / "golden"
FLAGS = ["--name", "pod", "--zone", "us-east5-a", "--accelerator-type", "v5p-16"]
COMMAND = ["pretrain", "--config", "configs/tiny.yaml", "--workdir", "gs://bucket/run"]
NUM_WORKERS = 2

GCLOUD = r"""
[ "$1 $2" = "compute tpus" ] || { echo "gcloud: $1 $2?" >&2; exit 2; }
group="$3" verb="$4" name="$5"
shift 5
positional=() worker=0 command=""
while [ "$#" -gt 0 ]; do
  case "$1" in
    --worker) worker="$2"; shift 2 ;;
    --command) command="$2"; shift 2 ;;
    --spot | --force | --quiet) shift ;;
    --*) shift 2 ;;
    *) positional+=("$1"); shift ;;
  esac
done
there() {
  if [ "$worker" = all ]; then ls -d "$TPUS"/worker-*; else echo "$TPUS/worker-$worker"; fi
}
case "$group $verb" in
  "tpu-vm describe") cat "$TPUS/$name" ;;
  "queued-resources describe") cat "$TPUS/$name.request" ;;
  *" create")
    [ ! -e "$TPUS/$name" ] || { echo "ALREADY_EXISTS" >&2; exit 1; }
    sleep "${CREATE_SECS:-0}"
    for k in $(seq 0 $((NUM_WORKERS - 1))); do mkdir -p "$TPUS/worker-$k"; done
    [ "$group" = tpu-vm ] || echo ACTIVE >"$TPUS/$name.request"
    echo READY >"$TPUS/$name" ;;
  *" delete") rm -rf "${TPUS:?}/$name" "$TPUS/$name.request" "$TPUS"/worker-* ;;
  "tpu-vm scp")
    for home in $(there); do cp "$name" "$home/${positional[0]#*:}"; done ;;
  "tpu-vm ssh")
    [ "$(cat "$TPUS/$name")" = READY ] || exit 255
    code=0
    for home in $(there); do
      # As sshd does it: nothing of the launcher's environment comes along.
      (cd "$home" && exec env -i HOME="$home" PATH="$PATH" TPUS="$TPUS" RUNS="$RUNS" \
        CODES="$CODES" bash -c "$command") || code=$?
    done
    exit "$code" ;;
  *) echo "gcloud: $group $verb?" >&2; exit 2 ;;
esac
"""
# Makes environments of itself; a run writes down its words and ends with the next of $CODES.
PYTHON = r"""
case "$1 ${2:-}" in
  "-c "*) exit 0 ;;
  "-m venv") for d in "$@"; do :; done; mkdir -p "$d/bin"; cp "$0" "$d/bin/python"
             : >"$d/pyvenv.cfg"; exit 0 ;;
  "-m pip" | "-m ensurepip") exit 0 ;;
esac
name="${HOME##*/}"
printf '%s\0' "$@" >"$RUNS/$name.words"
ls -A >"$RUNS/$name.files"
env | grep -E '^(MLPMEM|HF)_' >>"$RUNS/$name.starts"
echo "$name says hello"
code="$(head -n 1 "$CODES.$name" 2>/dev/null)"
sed -i 1d "$CODES.$name" 2>/dev/null
case "$code" in
  late) [ "$name" = worker-0 ] || sleep 4; exit 75 ;;
  mine) [ "$name" != worker-1 ] || { echo "error: mine"; exit 1; }; sleep 2; exit 134 ;;
  gone) [ "$name" != worker-0 ] || echo PREEMPTED >"$TPUS/pod"; exit 134 ;;
  wait) trap 'echo saved >"$RUNS/$name.saved"; exit 75' TERM; while :; do sleep 0.1; done ;;
esac
exit "${code:-0}"
"""
# The flags that the reference of gcloud names (of those that could matter here).
KNOWN = {
    "tpu-vm describe": {"--format"},
    "queued-resources describe": {"--format"},
    "tpu-vm create": {"--accelerator-type", "--version", "--spot"},
    "queued-resources create": {
        "--accelerator-type", "--runtime-version", "--node-id", "--spot",
    },
    "tpu-vm delete": {"--quiet"},
    "queued-resources delete": {"--quiet", "--force"},
    "tpu-vm ssh": {"--worker", "--command"},
    "tpu-vm scp": {"--worker"},
}  # fmt: skip


@pytest.fixture
def tpus(checkout, tmp_path):
    for name in ("tpus", "runs"):
        (tmp_path / name).mkdir()
    checkout.program("gcloud", GCLOUD)
    (checkout.bin / "python3.12").write_text("#!/usr/bin/env bash\n" + PYTHON)
    (checkout.bin / "python3.12").chmod(0o755)
    (checkout.bin / "hostname").write_text('#!/usr/bin/env bash\necho "${HOME##*/}"\n')
    (checkout.bin / "hostname").chmod(0o755)
    checkout.environment |= {
        "TPUS": str(tmp_path / "tpus"),
        "RUNS": str(tmp_path / "runs"),
        "CODES": str(tmp_path / "codes"),
        "NUM_WORKERS": str(NUM_WORKERS),
    }
    return checkout


def codes(checkout, *given):
    for worker in range(NUM_WORKERS):
        with open(f"{checkout.environment['CODES']}.worker-{worker}", "w") as file:
            file.write("\n".join(given) + "\n")


def runs(tmp_path, name):
    return (tmp_path / "runs" / name).read_bytes()


def verbs(calls):
    for call in calls:
        assert call[:3] == ["gcloud", "compute", "tpus"], call
        verb = " ".join(call[3:5])
        flags = {word for word in call[6:] if word.startswith("--")}
        assert flags <= KNOWN[verb] | {"--zone", "--project"}, call
    return [call[4] for call in calls if call[4] != "describe"]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("tpu-vm.txt", ["--project", "ours"]),
        ("tpu-vm-queued-spot-keep.txt", ["--queued", "--spot", "--keep"]),
    ],
)
def test_dry_run(tpus, hard_words, check_golden, name, flags):
    text = tpus.dry_run("--target", "tpu-vm", *FLAGS, *flags, "--dry-run", *COMMAND, *hard_words)
    check_golden(GOLDEN / name, text)


def test_dry_run_prints_what_would_run(tpus, hard_words, words_of, tmp_path):
    given = ["--target=tpu-vm", *FLAGS]
    planned = tpus.start(*given, "--dry-run", *COMMAND, *hard_words)
    assert planned.returncode == 0 and tpus.calls() == []
    planned = [words_of(line) for line in planned.stdout.splitlines()]
    done = tpus.start(*given, *COMMAND, *hard_words)
    assert done.returncode == 0, done.stderr
    calls = tpus.calls()
    assert calls == [words for words in planned if words[0] == "gcloud"]
    assert verbs(calls) == ["create", "scp", "ssh", "ssh", "ssh", "delete"]
    # The words came through gcloud, ssh and two shells as they were, to each worker.
    expected = ["-P", "-m", "mlpmem_jax", *COMMAND, *hard_words]
    for worker in range(NUM_WORKERS):
        words = runs(tmp_path, f"worker-{worker}.words").decode().split("\0")[:-1]
        assert words == expected
        files = runs(tmp_path, f"worker-{worker}.files").decode().split()
        assert {"launch", "own", "configs"} <= set(files) and "untracked" not in files
    assert "worker-0 says hello" in done.stdout and "worker-1" not in done.stdout
    assert not (tmp_path / "tpus" / "pod").exists()


def test_starts_again_after_a_preemption_that_left_the_machine(tpus):
    codes(tpus, "75", "0")
    done = tpus.start("--target", "tpu-vm", *FLAGS, *COMMAND)
    assert done.returncode == 0, done.stderr
    assert "preempted (exit code 75); restart 1 of 100" in done.stderr
    assert verbs(tpus.calls()) == ["create", "scp", "ssh", "ssh", "ssh", "ssh", "ssh", "delete"]


def test_makes_the_machine_again_when_it_was_taken(tpus):
    codes(tpus, "gone", "0")
    done = tpus.start("--target", "tpu-vm", *FLAGS, "--spot", *COMMAND)
    assert done.returncode == 0, done.stderr
    assert "pod is PREEMPTED: making it again" in done.stderr
    assert verbs(tpus.calls()) == [
        "create", "scp", "ssh", "ssh", "ssh", "delete", "create", "scp", "ssh", "ssh", "ssh",
        "delete",
    ]  # fmt: skip


@pytest.mark.parametrize("taken", ["75", "gone"])
def test_a_restart_has_the_name_of_the_run(tpus, tmp_path, taken):
    codes(tpus, taken, "0")
    given = ["--target", "tpu-vm", *FLAGS, *COMMAND, "--rebuild"]
    done = tpus.start(*given, MLPMEM_RUN_ID="some run", HF_TOKEN="secret")
    assert done.returncode == 0, done.stderr
    for worker in range(NUM_WORKERS):
        starts = runs(tmp_path, f"worker-{worker}.starts").decode().splitlines()
        assert starts == ["MLPMEM_RUN_ID=some run"] * 2


def test_a_worker_that_ends_last_is_started_again_too(tpus, tmp_path):
    codes(tpus, "late", "0")
    done = tpus.start("--target", "tpu-vm", *FLAGS, *COMMAND, MLPMEM_BACKOFF_SECS="0")
    assert done.returncode == 0, done.stderr
    for worker in range(NUM_WORKERS):
        assert len(runs(tmp_path, f"worker-{worker}.starts").splitlines()) == 2


def test_the_first_failure_is_shown_once_and_nothing_is_started_again(tpus):
    codes(tpus, "mine", "0")
    done = tpus.start("--target", "tpu-vm", *FLAGS, "--keep", *COMMAND)
    assert done.returncode == 134
    assert done.stdout.count("error: mine") == 1
    assert "--- worker-1: exit code 1\n" in done.stdout and "--- worker-0" not in done.stdout
    assert "pod is kept, and costs money" in done.stderr
    assert verbs(tpus.calls())[-1] == "ssh"


def test_uses_a_machine_that_exists(tpus, tmp_path):
    assert tpus.start("--target", "tpu-vm", *FLAGS, "--keep", *COMMAND).returncode == 0
    tpus.calls()
    done = tpus.start("--target", "tpu-vm", *FLAGS, *COMMAND)
    assert done.returncode == 0 and "using pod, which exists" in done.stderr
    assert verbs(tpus.calls()) == ["scp", "ssh", "ssh", "ssh", "delete"]


def test_what_else_lies_beside_the_code_stays(tpus, tmp_path):
    assert tpus.start("--target", "tpu-vm", *FLAGS, "--keep", *COMMAND).returncode == 0
    homes = [tmp_path / "tpus" / f"worker-{worker}" / "mlpmem" for worker in range(NUM_WORKERS)]
    for home in homes:
        (home / "out" / "one").mkdir(parents=True)
        (home / "out" / "one" / "manifest.json").write_text("results")
    tpus.git("rm", "--quiet", "--force", "own")
    done = tpus.start("--target", "tpu-vm", *FLAGS, "--keep", *COMMAND)
    assert done.returncode == 0, done.stderr
    for home in homes:
        assert (home / "out" / "one" / "manifest.json").read_text() == "results"
        # Of the code, what is no more in the project is no more on the worker.
        assert (home / "launch" / "run.sh").exists() and not (home / "own").exists()


def test_a_configuration_from_a_pipe_is_refused(tpus):
    script = tpus.root / "launch" / "run.sh"
    done = subprocess.run(
        ["bash", "-c", 'bash "$0" "$@" --config <(echo seed: 5)', str(script), "--target",
         "tpu-vm", *FLAGS, "pretrain"],
        env=tpus.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "a pipe cannot be copied" in done.stderr
    assert done.stderr.count("\n") == 1 and tpus.calls() == []


def test_a_request_that_was_used_up_is_made_again(tpus, tmp_path):
    (tmp_path / "tpus" / "pod.request").write_text("SUSPENDED\n")
    done = tpus.start("--target", "tpu-vm", *FLAGS, "--queued", *COMMAND)
    assert done.returncode == 0, done.stderr
    assert verbs(tpus.calls())[:3] == ["delete", "create", "scp"]


@pytest.fixture
def waiting(tpus, tmp_path):
    """A launcher whose run goes on until it is told to stop."""
    codes(tpus, "wait")
    process = subprocess.Popen(
        ["bash", str(tpus.root / "launch" / "run.sh"), "--target", "tpu-vm", *FLAGS, *COMMAND],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=tpus.environment,
        cwd=tpus.root,
        start_new_session=True,
    )
    while process.stdout.readline() != "worker-0 says hello\n":
        assert process.poll() is None
    deadline = time.monotonic() + 60
    while not (tmp_path / "runs" / "worker-1.words").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    groups = [int(file.read_text()) for file in (tmp_path / "tpus").glob("*/mlpmem/.run/pid")]
    yield process
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def test_ctrl_c_saves_and_deletes(waiting, tmp_path):
    os.killpg(waiting.pid, signal.SIGINT)
    _, said = waiting.communicate(timeout=120)
    assert waiting.returncode != 0
    assert "stopping the run on pod" in said
    for worker in range(NUM_WORKERS):
        assert (tmp_path / "runs" / f"worker-{worker}.saved").exists()
    assert not (tmp_path / "tpus" / "pod").exists()


def test_a_lost_launcher_leaves_the_run_and_the_same_command_finds_it(tpus, waiting, tmp_path):
    os.killpg(waiting.pid, signal.SIGKILL)
    waiting.communicate(timeout=60)
    again = subprocess.Popen(
        [*waiting.args[:2], "--target", "tpu-vm", *FLAGS, "--restarts=0", *COMMAND],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=tpus.environment,
        cwd=tpus.root,
    )
    assert "worker-0 says hello\n" in iter(again.stdout.readline, "")
    for worker in range(NUM_WORKERS):
        group = (tmp_path / "tpus" / f"worker-{worker}" / "mlpmem" / ".run" / "pid").read_text()
        os.killpg(int(group), signal.SIGTERM)
    _, said = again.communicate(timeout=120)
    assert again.returncode == 75
    assert said.count("a run is going on here") == NUM_WORKERS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "pod"], "--target tpu-vm needs --zone --accelerator-type"),
        ([*FLAGS[:-1], "x9-8"], "--accelerator-type=x9-8: name its --runtime-version too"),
        ([*FLAGS, "--timeout", "soon"], "--timeout=soon: must be a whole number"),
        ([*FLAGS, "--spot=yes"], "--spot takes no value"),
        ([*FLAGS, "--spott", *COMMAND], "--spott: no flag of --target tpu-vm"),
        ([*FLAGS, "--config", "x"], "--config: no flag of --target tpu-vm"),
        ([*FLAGS, "--target", "gke"], "--target: must come first"),
        ([*FLAGS, "train", "--config", "untracked"], "only files that git tracks are copied"),
        ([*FLAGS, "train", "--config=no/where"], "--config no/where: no such file"),
    ],
)
def test_mistakes_run_nothing(tpus, arguments, message):
    done = tpus.start("--target", "tpu-vm", *arguments)
    assert done.returncode == 2 and message in done.stderr
    assert tpus.calls() == []


def test_a_command_that_cannot_succeed_makes_no_machine(tpus):
    tpus.install()
    done = tpus.start("--target", "tpu-vm", *FLAGS, *COMMAND, "trian.alpha=1")
    assert done.returncode == 2 and "error: trian.alpha=1: unknown key" in done.stderr
    assert tpus.calls() == []


def test_paths_of_the_project_hold_there_too(tpus, words_of):
    given = ["--target", "tpu-vm", *FLAGS, "--dry-run"]
    planned = tpus.start(*given, "train", "--config", "tiny.yaml", cwd=tpus.root / "configs")
    assert "start a-run train --config configs/tiny.yaml'" in planned.stdout, planned.stderr
    planned = tpus.start(*given, cwd=tpus.bin)
    expected = "run --config configs/quickstart.yaml --workdir runs/quickstart'"
    assert expected in planned.stdout, planned.stderr
    assert "is on the disk of pod, which is deleted" in planned.stderr
