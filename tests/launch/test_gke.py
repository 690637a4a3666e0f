"""run.sh --target gke, with stand-ins for xpk and docker."""

import subprocess

import pytest
import yaml

from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "launch" / "golden"
FLAGS = ["--name", "job", "--cluster", "c1", "--image", "eu-docker.pkg.dev/p/r/mlpmem:1"]
COMMAND = ["pretrain", "--config", "configs/tiny.yaml", "--workdir", "gs://bucket/run"]
# What `xpk workload create` and `list` know (those that could matter here).
KNOWN = {
    "create": {
        "--workload", "--cluster", "--zone", "--project", "--tpu-type", "--device-type",
        "--num-slices", "--num-nodes", "--docker-image", "--priority", "--max-restarts",
        "--restart-on-exit-codes", "--termination-grace-period-seconds", "--command", "--spot",
    },
    "list": {"--cluster", "--zone", "--project", "--wait-for-job-completion"},
}  # fmt: skip
# As xpk puts a command into a pod.
POD = """
containers:
- name: jax-tpu
  command:
  - bash
  - -c
  - |
    ({command}) & PID=$!;
    wait $PID;
    exit $?
"""


@pytest.fixture
def cluster(checkout):
    checkout.program("docker")
    checkout.program("xpk", '[ "$2" = create ] || exit "${WORKLOAD:-0}"\n')
    return checkout


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("gke-tpu.txt", ["--tpu-type", "v5p-128", "--num-slices=2", "--restarts", "7"]),
        (
            "gke-gpu.txt",
            ["--device-type", "h200-141gb-8", "--num-nodes=4", "--zone", "z", "--project", "p"],
        ),
        ("gke-no-build.txt", ["--tpu-type", "v6e-8", "--no-build", "--no-wait", "--spot"]),
    ],
)
def test_dry_run(cluster, hard_words, check_golden, name, flags):
    text = cluster.dry_run("--target", "gke", *FLAGS, *flags, "--dry-run", *COMMAND, *hard_words)
    check_golden(GOLDEN / name, text)


def test_dry_run_prints_what_would_run(cluster, hard_words, words_of):
    given = ["--target", "gke", *FLAGS, "--tpu-type", "v5p-128"]
    planned = cluster.start(*given, "--dry-run", *COMMAND, *hard_words)
    done = cluster.start(*given, *COMMAND, *hard_words)
    assert done.returncode == 0, done.stderr
    calls = cluster.calls()
    assert calls == [words_of(line) for line in planned.stdout.splitlines()]
    assert [call[:3] for call in calls[:2]] == [
        ["docker", "build", "--file"], ["docker", "push", FLAGS[-1]],
    ]  # fmt: skip
    for call in calls[2:]:
        assert call[:2] == ["xpk", "workload"]
        assert {word for word in call[3:] if word.startswith("--")} <= KNOWN[call[2]]
    # Through YAML, Kubernetes and the shell of the container.
    command = calls[2][calls[2].index("--command") + 1]
    pod = yaml.safe_load(POD.format(command=command))
    script = pod["containers"][0]["command"][2].replace("$$", "$")
    (cluster.bin / "python").write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n")
    (cluster.bin / "python").chmod(0o755)
    out = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=cluster.environment, check=True
    ).stdout
    assert out.split("\0")[:-1] == ["-P", "-m", "mlpmem_jax", *COMMAND, *hard_words]


def test_exit_code_is_that_of_the_workload(cluster):
    done = cluster.start(
        "--target", "gke", *FLAGS, "--tpu-type", "v6e-8", "--no-build", *COMMAND, WORKLOAD="125"
    )
    assert done.returncode == 125


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--target gke needs one of --tpu-type and --device-type"),
        (["--tpu-type", "a", "--device-type", "b"], "needs one of --tpu-type"),
        (["--tpu-type", "a", "--num-slices", "two"], "--num-slices=two: must be a whole number"),
        (["--tpu-type", "a", "--num-slices=0"], "--num-slices=0: must be a whole number of at"),
        (["--device-type", "a", "--num-nodes=0"], "--num-nodes=0: must be a whole number of at"),
        (["--tpu-type", "a", "--restarts=x"], "--restarts=x: must be a whole number"),
    ],
)
def test_mistakes_run_nothing(cluster, flags, message):
    done = cluster.start("--target", "gke", *FLAGS, *flags, *COMMAND)
    assert done.returncode == 2 and message in done.stderr
    assert cluster.calls() == []


def test_a_command_that_cannot_succeed_builds_and_submits_nothing(cluster):
    given = ["--target", "gke", *FLAGS, "--tpu-type", "v6e-8", "--no-wait"]
    local = [*COMMAND[:3], "--workdir", "runs/one"]
    done = cluster.start(*given, *local, "trian.alpha=1")
    assert "is not checked before it is sent" in done.stderr  # There is no environment.
    assert [call[0] for call in cluster.calls()] == ["docker", "docker", "xpk"]
    cluster.install()
    done = cluster.start(*given, *local, "trian.alpha=1")
    assert done.returncode == 2 and "error: trian.alpha=1: unknown key" in done.stderr
    assert cluster.calls() == []
    done = cluster.start(*given, *local)
    assert done.returncode == 0 and "not checked" not in done.stderr, done.stderr
    assert [call[0] for call in cluster.calls()] == ["docker", "docker", "xpk"]


def test_a_missing_program_is_named(cluster):
    (cluster.bin / "xpk").unlink()
    done = cluster.start("--target", "gke", *FLAGS, "--tpu-type", "v6e-8", *COMMAND)
    assert done.returncode == 2 and "xpk: not found; pip install xpk" in done.stderr
    assert cluster.calls() == []
