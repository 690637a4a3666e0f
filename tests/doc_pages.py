"""Commands in README.md and docs/, as words."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from mlpmem_jax.commands import COMMANDS
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LAUNCH = ["bash", "launch/run.sh"]
MODULE = [".venv/bin/python", "-m", "mlpmem_jax"]
# What stands for something else on a page.
PLACEHOLDERS = {"FILE": "configs/tiny.yaml", "COMMAND": "run"}
# Programs of others, which the pages name and tests do not run.
OTHERS = ("xpk", "python3", ".venv-docs/bin/python", ".venv-docs/bin/mkdocs", "curl", "lm_eval")


def fenced(page: Path, *languages: str) -> Iterator[str]:
    """Yields the text of fenced blocks."""
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S):
        if language in languages:
            yield block


def command_lines(page: Path) -> list[list[str]]:
    """Returns the words of every command on a page, `&&` and comments taken away."""
    lines = []
    for language in ("bash", "console"):
        for block in fenced(page, language):
            text = block.replace("\\\n", " ")
            if language == "console":
                text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                while "&&" in words:
                    lines.append(words[: words.index("&&")])
                    words = words[words.index("&&") + 1 :]
                lines += [words] if words else []
    return lines


def without_variables(words: list[str]) -> list[str]:
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return [PLACEHOLDERS.get(word, word) for word in words]


def arguments_of(words: list[str]) -> list[str] | None:
    """Returns what a command line gives to `mlpmem_jax`; None: it starts something else."""
    if words[:3] == MODULE:
        return words[3:]
    if words[:2] != LAUNCH:
        return None
    words = words[2:]
    place = next((k for k, word in enumerate(words) if word in COMMANDS), None)
    if place is not None:
        return words[place:]
    # The launcher's own flags, and then the quickstart.
    words = words[2:] if words[:1] == ["--with"] else words
    config = [] if "--config" in words else ["--config", "configs/quickstart.yaml"]
    return ["run", *config, *words]
