"""A copy of the project's launch scripts, and stand-ins for programs that are not here."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Records its name and arguments, one line a call as a shell would read them.
RECORD = """#!/usr/bin/env bash
{ printf '%q' "${0##*/}"; printf ' %q' "$@"; echo; } >>"$RECORDED"
"""


class Checkout:
    """A git checkout with the launch scripts, elsewhere than the project."""

    def __init__(self, directory: Path):
        self.root = directory / "pro ject"  # a space in the path must do no harm
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.recorded = directory / "recorded"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        (self.root / "configs").mkdir()
        for name in ("tiny.yaml", "quickstart.yaml"):
            shutil.copy(ROOT / "configs" / name, self.root / "configs" / name)
        for name in (
            "requirements.txt", "requirements-gpu.txt", "requirements-tpu.txt",
            "requirements-remote.txt",
        ):  # fmt: skip
            (self.root / name).write_text(f"# {name}\n")
        (self.root / "own").write_text("x")
        self.git("init", "--quiet")
        self.git("add", ".")
        (self.root / "untracked").write_text("x")
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(directory),
            "RECORDED": str(self.recorded),
            "MLPMEM_BACKOFF_SECS": "0",
            "MLPMEM_POLL_SECS": "1",
            "MLPMEM_RUN_ID": "a-run",
        }

    def git(self, *arguments):
        subprocess.run(["git", "-C", str(self.root), *arguments], check=True)

    def program(self, name, text=""):
        """Puts a stand-in on PATH."""
        path = self.bin / name
        path.write_text(RECORD + text)
        path.chmod(0o755)

    def install(self):
        """Gives it an environment, and the package, so that commands are checked here."""
        (self.root / ".venv" / "bin").mkdir(parents=True)
        (self.root / ".venv" / "installed").mkdir()
        (self.root / ".venv" / "installed" / "requirements.txt").touch()
        python = self.root / ".venv" / "bin" / "python"
        python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        (self.root / "mlpmem_jax").symlink_to(ROOT / "mlpmem_jax")

    def start(self, *arguments, cwd=None, **environment):
        return subprocess.run(
            ["bash", str(self.root / "launch" / "run.sh"), *arguments],
            capture_output=True,
            text=True,
            cwd=cwd or self.root,
            env={**self.environment, **environment},
            timeout=120,
        )

    def calls(self):
        """Returns the arguments of each call of a stand-in since it was last asked."""
        text = self.recorded.read_text() if self.recorded.exists() else ""
        self.recorded.write_text("")
        return [_words(line) for line in text.splitlines()]

    def dry_run(self, *arguments):
        """Returns what `--dry-run` prints, this checkout's directory written as PROJECT."""
        done = self.start(*arguments)
        assert done.returncode == 0, done.stderr
        assert not self.recorded.exists() or not self.recorded.read_text()
        return done.stdout.replace(str(self.root), "PROJECT")


def _words(line):
    """Reads a line of `printf %q`, $'…' included, as bash does."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


# What a shell, ssh, YAML and Kubernetes could each spoil.
HARD_WORDS = [
    'corpus.paths=["a b/*.txt", "c\'d"]',
    "--prompt",
    "def f(*x):\n\treturn $HOME `id` $(id) $$ \"'\\ !{}",
    "",
    "ümlaut",
]


@pytest.fixture
def hard_words():
    return list(HARD_WORDS)


@pytest.fixture
def words_of():
    """Returns the words of a command line as bash reads it."""
    return _words


@pytest.fixture
def shell_words():
    return shlex.split
