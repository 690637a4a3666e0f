"""launch/run.sh and launch/test.sh, with a stand-in for Python that logs what it is asked."""

import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Answers to `-c` as a good interpreter, makes environments that hold itself, installs
# nothing, and prints the arguments of anything else.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$STAND_IN_LOG"
case "$1 ${2:-}" in
  "-c "*ensurepip*) exit "${STAND_IN_ENSUREPIP:-0}" ;;
  "-c "*"print("*) echo "${STAND_IN_VERSION:-3.11}" ;;
  "-c "*) exit "${STAND_IN_OLD:-0}" ;;
  "-m venv")
    for directory in "$@"; do :; done
    mkdir -p "$directory/bin"
    cp "$0" "$directory/bin/python"
    echo "version = ${STAND_IN_VERSION:-3.11}.7" >"$directory/pyvenv.cfg"
    ;;
  "-m pip") [ "$3" = --version ] || exit "${STAND_IN_PIP:-0}" ;;
  "-m ensurepip") ;;
  *)
    printf 'cwd=%s\\npath=%s\\n' "$PWD" "${PYTHONPATH:-}"
    printf 'argument=%s\\n' "$@"
    ;;
esac
"""


class Project:
    """A copy of the launch scripts with requirements of its own."""

    def __init__(self, directory: Path):
        self.root = directory / "pro ject"  # a space in the path must do no harm
        self.log = directory / "log"
        self.elsewhere = directory / "elsewhere"
        self.elsewhere.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        (self.root / "requirements.txt").write_text("# one\n")
        (self.root / "requirements-test.txt").write_text("# two\n")
        stand_in = directory / "bin" / "python3.12"
        stand_in.parent.mkdir()
        stand_in.write_text(STAND_IN)
        stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
        self.environment = {
            "PATH": f"{stand_in.parent}:/usr/bin:/bin",
            "HOME": str(directory),
            "STAND_IN_LOG": str(self.log),
        }

    def start(self, script, *arguments, cwd=None, **environment):
        return subprocess.run(
            ["bash", str(self.root / "launch" / script), *arguments],
            capture_output=True,
            text=True,
            cwd=cwd or self.elsewhere,
            env={**self.environment, **environment},
        )

    def arguments(self, *given):
        done = self.start("run.sh", *given)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        found = [line.removeprefix("argument=") for line in lines if line.startswith("argument=")]
        assert found[:3] == ["-P", "-m", "mlpmem_jax"]
        return found[3:]

    def asked(self, words):
        """Returns how often Python was asked for something since the log was last cleared."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return sum(words in line for line in lines)

    def clear(self):
        self.log.write_text("")


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_first_start_installs_and_second_does_not(project):
    done = project.start("run.sh")
    assert done.returncode == 0
    assert "making" in done.stderr and "installing requirements.txt" in done.stderr
    assert (project.asked("-m venv"), project.asked("pip install")) == (1, 1)
    project.clear()
    done = project.start("run.sh")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(project.log.read_text().splitlines()) == 1  # the command, nothing else


def test_second_start_is_instant(project):
    project.start("run.sh")
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        project.start("run.sh")
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.25  # 0.02 on an idle machine


def test_changed_requirements_are_installed(project):
    project.start("run.sh")
    project.clear()
    (project.root / "requirements.txt").write_text("# changed\n")
    assert "installing requirements.txt" in project.start("run.sh").stderr
    assert (project.asked("-m venv"), project.asked("pip install")) == (0, 1)
    project.clear()
    project.start("run.sh")
    assert project.asked("pip install") == 0


def test_interrupted_installation_is_done_again(project):
    done = project.start("run.sh", STAND_IN_PIP="1")
    assert done.returncode == 2
    assert "error: pip could not install requirements.txt; the next start" in done.stderr
    assert "argument=" not in done.stdout
    project.clear()
    assert project.start("run.sh").returncode == 0
    assert project.asked("pip install") == 1


def test_broken_environment_is_made_again(project):
    project.start("run.sh")
    (project.root / ".venv" / "bin" / "python").unlink()
    project.clear()
    assert project.start("run.sh").returncode == 0
    assert (project.asked("-m venv"), project.asked("pip install")) == (1, 1)


def test_what_is_no_environment_is_left_alone(project, tmp_path):
    precious = tmp_path / "home" / "file"
    precious.parent.mkdir()
    precious.write_text("mine")
    done = project.start("run.sh", MLPMEM_VENV=str(precious.parent))
    assert done.returncode == 2 and "is no virtual environment" in done.stderr
    assert precious.read_text() == "mine"


def test_an_environment_that_the_launcher_did_not_make_is_left_alone(project, tmp_path):
    """One of another Python was cleared, one that fits was installed into."""
    theirs = tmp_path / "theirs"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(theirs)], check=True)
    (theirs / "mine.txt").write_text("mine")
    before = sorted(str(path) for path in theirs.rglob("*"))
    for version in ("3.11", "3.12"):  # one of them is not the environment's
        done = project.start(
            "run.sh", MLPMEM_VENV=str(theirs), MLPMEM_PYTHON="python3.12", STAND_IN_VERSION=version
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "was not made by the launcher" in done.stderr and "MLPMEM_VENV" in done.stderr
    assert (theirs / "mine.txt").read_text() == "mine"
    assert sorted(str(path) for path in theirs.rglob("*")) == before
    assert project.asked("pip install") == 0


def test_an_environment_that_was_interrupted_is_made_again(project):
    project.start("run.sh", STAND_IN_PIP="1")
    own = project.root / ".venv"
    assert (own / "installed").is_dir()
    (own / "pyvenv.cfg").unlink()
    (own / "bin" / "python").unlink()
    (own / "left-over").write_text("")
    assert project.start("run.sh").returncode == 0
    assert not (own / "left-over").exists()


def test_environment_of_another_place_and_version(project, tmp_path):
    project.start("run.sh", MLPMEM_VENV="own")
    assert (project.elsewhere / "own" / "installed" / "requirements.txt").exists()
    assert not (project.root / ".venv").exists()
    asked_for = {"MLPMEM_VENV": "own", "MLPMEM_PYTHON": "python3.12"}
    project.clear()
    project.start("run.sh", **asked_for)
    assert project.asked("-m venv") == 0
    project.start("run.sh", STAND_IN_VERSION="3.12", **asked_for)
    assert project.asked("-m venv") == 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"STAND_IN_ENSUREPIP": "1"}, "apt install python3-venv"),
        ({"STAND_IN_ENSUREPIP": "1", "STAND_IN_OLD": "1"}, "does not run, or is older than"),
        ({"MLPMEM_PYTHON": "no-such-python"}, "MLPMEM_PYTHON=no-such-python does not run"),
    ],
)
def test_unsuitable_interpreters(project, environment, expected):
    done = project.start("run.sh", **{"MLPMEM_PYTHON": "python3.12", **environment})
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and expected in done.stderr
    assert not (project.root / ".venv").exists()


def test_without_arguments_it_is_the_quickstart(project):
    quickstart = [
        "run",
        "--config",
        f"{project.root}/configs/quickstart.yaml",
        "--workdir",
        f"{project.root}/runs/quickstart",
    ]
    assert project.arguments() == quickstart
    assert project.arguments("--target", "local") == quickstart
    given = ["seed=1", "--dry-run"]
    assert project.arguments("--target=local", *given) == [*quickstart, *given]
    assert project.arguments("seed=1") == [*quickstart, "seed=1"]
    assert project.arguments("--workdir", "x") == [*quickstart[:3], "--workdir", "x"]
    assert project.arguments("--config", "a.yaml", "--rebuild") == [
        "run", "--config", "a.yaml", "--rebuild",
    ]  # fmt: skip


def test_arguments_are_passed_on_as_they_are(project):
    given = [
        "generate",
        "--config",
        "a b.yaml",
        "--prompt",
        "def f(*x):\t  $y '\"",
        "--target",
        "t",
    ]
    assert project.arguments(*given) == given
    assert project.arguments("train", "--help") == ["train", "--help"]


@pytest.mark.parametrize("name", ["llama2_7b", "llama2_70b", "llama_1b", "gpt2_small"])
def test_the_command_of_a_configuration_can_be_copied(project, name):
    (head,) = re.findall(
        "^# command: +(.*)\n# hardware:",
        (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    done = subprocess.run(
        ["bash", "-c", head],
        capture_output=True,
        text=True,
        cwd=project.root,
        env=project.environment,
    )
    assert done.returncode == 0, done.stderr
    arguments = [line for line in done.stdout.splitlines() if line.startswith("argument=")]
    assert arguments[3:6] == [
        "argument=run", "argument=--config", f"argument=configs/{name}.yaml",
    ]  # fmt: skip
    assert len(arguments) == 7 and arguments[6].startswith('argument=corpus.paths=["text/')


def test_the_page_names_every_variable_that_is_read():
    files = [*(ROOT / "launch").rglob("*.sh"), *(ROOT / "mlpmem_jax" / "parallel").glob("*.py")]
    read = {name for file in files for name in re.findall(r"MLPMEM_[A-Z_]*[A-Z]", file.read_text())}
    page = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
    assert sorted(name for name in read if f"`{name}`" not in page) == []
    forwarded = page.split("## Environment variables")[1].split("\n## ")[0]
    for target in ("local", "tpu-vm", "gke", "slurm"):
        assert f"| `{target}` |" in forwarded


def test_paths_are_relative_to_the_caller(project):
    out = project.start("run.sh", "run", "--config", "x").stdout.splitlines()
    assert f"cwd={project.elsewhere}" in out
    assert f"path={project.root}" in out


@pytest.mark.parametrize("arguments", [["--target", "moon"], ["--target=moon"], ["--target"]])
def test_unknown_target_lists_the_valid_ones(project, arguments):
    done = project.start("run.sh", *arguments)
    assert done.returncode == 2 and "targets: local" in done.stderr
    assert not (project.root / ".venv").exists()


def test_help_installs_nothing(project):
    done = project.start("run.sh", "--help")
    assert done.returncode == 0 and "usage: bash launch/run.sh" in done.stdout
    assert not project.log.exists()


def test_tests_have_requirements_of_their_own(project):
    project.start("run.sh")
    project.clear()
    done = project.start("test.sh", "tests/unit", "-k", "a or b", "-m", "slow")
    assert "installing requirements-test.txt" in done.stderr
    assert project.asked("pip install") == 1
    lines = done.stdout.splitlines()
    assert f"cwd={project.root}" in lines
    assert [line.removeprefix("argument=") for line in lines if line.startswith("argument=")] == [
        "-m", "pytest", "-m", "not slow and not tpu and not gpu", "-n", "2", "--dist", "loadfile",
        "--no-loadscope-reorder",
        "tests/unit", "-k", "a or b", "-m", "slow",
    ]  # fmt: skip
    project.clear()
    project.start("run.sh")
    project.start("test.sh")
    assert project.asked("pip install") == 0


def test_with_a_real_interpreter(project):
    package = project.root / "mlpmem_jax"
    package.mkdir()
    (package / "__main__.py").write_text("import sys; print(sys.prefix, sys.argv[1:])")
    (project.elsewhere / "mlpmem_jax").mkdir()  # must not be taken for the package
    (project.elsewhere / "mlpmem_jax" / "__main__.py").write_text("raise SystemExit('wrong one')")
    done = project.start("run.sh", "run", "a=1", MLPMEM_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{project.root}/.venv ['run', 'a=1']\n"


def test_scripts_are_clean():
    scripts = [*sorted((ROOT / "launch").rglob("*.sh")), ROOT / ".ci" / "run"]
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [str(shellcheck), "-x", *map(str, scripts)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout


def test_selection_for_the_newest_versions_exists():
    text = (ROOT / ".ci" / "run").read_text()
    selection = text.split("smoke_tests=(", 1)[1].split(")", 1)[0].split()
    assert selection
    assert [name for name in selection if not (ROOT / name.split("::")[0]).exists()] == []


def test_scripts_can_be_started():
    for script in ("launch/run.sh", "launch/test.sh", "launch/worker.sh", ".ci/run"):
        assert os.access(ROOT / script, os.X_OK), script
