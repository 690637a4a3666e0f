"""Throws random command lines and configurations at the program.

    .venv/bin/python -m benchmarks.fuzz [--cases 400] [--seed 0] [--first 0]

Each case is a process of its own in a folder of its own, with a small text. Half of the cases are
a command line of odd pieces, the others a shipped configuration that was damaged. A case is right
if it ends within a minute with one of the documented exit codes, without a traceback, without a
line of more than 1,000 characters, and leaves the user's own files as they were. Exit code 1 if
any is wrong; the wrong ones are printed, and `--first N --cases 1` repeats one.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlpmem_jax.commands import COMMANDS
from mlpmem_jax.config.keys import all_keys

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECS = 60.0
LONGEST_LINE = 1000
EXIT_CODES = {0, 1, 2, 3, 75, 130}
TEXT = "".join(
    f"Title {n}\nThe {n} quick brown foxes jump over {n * 7} lazy dogs.\n" for n in range(400)
)

VALUES = [
    "", " ", "0", "-1", "1", "2", "3.5", "-0.0", "1e-40", "1e40", "1e400", "inf", "-inf", "nan",
    ".nan", "null", "~", "true", "no", "auto", "none", "yes", "[]", "{}", "[1, 2]", "[", "{a: 1}",
    "- a", "a: b: c", "9223372036854775808", "-9223372036854775809", "99999999999999999999",
    "9" * 400, "9" * 5000, "x" * 20000, "é" * 300, "日本", "\U0001f600", "#", "# x", "a #b", "---",
    "...", "> ", "| ", "'", '"', '"x', "'x'", "&a", "*a", "!!python/object:os.system x", "!x",
    "%", "@", "`", "\t", "\n", "a\nb", "\\", "^---$", "(", "(?P<a>", "a{99999999}",
    "/dev/null", "/proc/self/mem", "~", "~nobody-there/x", "*.txt", "**", "[[]", "exp[1]",
    "a" * 300, "gs://", "s3://x", "http://x/y", "file:///etc", "0x10", "1_000", "1,000", "1e3",
    "01", "0o7", "2026-01-01", "12:30:00", "1.0", "0.5", "1e-3", "train", "test", "text", "jsonl",
    "stdlib", "huggingface", "float16", "bfloat16", "flash", "cudnn", "exact", "scann", "joint",
    "greedy", "own.txt",
]  # fmt: skip
PIECES = [
    "--config", "--workdir", "--rebuild", "--dry-run", "--remove-unused", "--help", "--version",
    "-h", "--", "-", "--prompt", "--without-memory", "--topology", "--step", "--output", "=",
    "a=b", "corpus", "corpus.=1", ".x=1", "corpus..x=1", "--config=", "--workdir=", "--nonsense",
    "--decoder.width=3", "corpus.more.0.paths=[own.txt]", "corpus.more.9.weight=2",
    "ablate.sweeps.0.key=train.alpha", "compare.recipes.0.name=x", "@file", "-1", "\udcff",
]  # fmt: skip
# Text that is small and there, so that what is not refused ends soon.
SMALL = ["corpus.source=text", "corpus.paths=[own.txt]", "corpus.document_regex=^Title"]
QUICK = [
    "tokenize",
    "tokenize",
    "compile",
    "generate",
    "evaluate",
    "train",
    "embed",
    "index",
    "retrieve",
]


def odd_command(draw: random.Random, folder: Path) -> list[str]:
    """Returns arguments of odd pieces; long stages only get a plan."""
    keys = list(all_keys())
    command = draw.choice([*COMMANDS, *QUICK])
    arguments = [command, "--config", str(ROOT / "configs" / "tiny.yaml"), *SMALL]
    arguments += ["--workdir", str(folder / "run")]
    for _ in range(draw.randint(1, 4)):
        key = draw.choice(keys).replace(
            ".N", f".{draw.choice(['0', '1', '7', '-1', '99999999999'])}"
        )
        if draw.random() < 0.1:
            key = key[: draw.randint(0, len(key))] + draw.choice(["", "x", ".", "é"])
        arguments.append(f"{key}={draw.choice(VALUES)}")
    for _ in range(draw.choice([0, 0, 0, 1, 2])):
        place = draw.randint(0, len(arguments))
        arguments.insert(place, draw.choice([*PIECES, *VALUES]))
    if command not in QUICK:
        arguments.append("--dry-run")
    return [argument.replace("\0", "") for argument in arguments]


def damaged_config(draw: random.Random, folder: Path) -> list[str]:
    """Returns arguments that name a damaged copy of a shipped configuration."""
    source = draw.choice(sorted((ROOT / "configs").glob("*.yaml")))
    data = bytearray(source.read_bytes())
    for _ in range(draw.randint(1, 5)):
        place = draw.randrange(len(data))
        kind = draw.choice(["flip", "cut", "insert", "repeat", "value", "indent", "truncate"])
        if kind == "flip":
            data[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del data[place : place + draw.randint(1, 200)]
        elif kind == "insert":
            data[place:place] = draw.choice(VALUES).encode("utf-8", "surrogateescape")
        elif kind == "repeat":
            data[place:place] = data[place : place + 300]
        elif kind == "value":
            found = list(re.finditer(rb": [^\n]+", bytes(data)))
            if found:
                spot = draw.choice(found)
                data[spot.start() + 2 : spot.end()] = draw.choice(VALUES).encode()
        elif kind == "indent":
            lines = bytes(data).split(b"\n")
            line = draw.randrange(len(lines))
            lines[line] = draw.choice([b" ", b"   ", b"\t", b"-"]) + lines[line]
            data = bytearray(b"\n".join(lines))
        else:
            del data[place:]
        data = data or bytearray(b"#")
    (folder / "odd.yaml").write_bytes(data)
    command = draw.choice([*COMMANDS])
    return [command, "--config", "odd.yaml", "--workdir", str(folder / "run"), "--dry-run"]


def run_case(number: int, seed: int) -> str | None:
    """Runs one case; returns what is wrong with it, or None."""
    draw = random.Random(f"{seed}/{number}")
    with tempfile.TemporaryDirectory(prefix="mlpmem-fuzz-") as name:
        folder = Path(name)
        (folder / "own.txt").write_text(TEXT)
        arguments = (odd_command if draw.random() < 0.5 else damaged_config)(draw, folder)
        # A pair of quotes is no place for what the system cannot pass on.
        arguments = [
            a.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
            for a in arguments
        ]
        own = {file: file.read_bytes() for file in folder.iterdir()}
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MLPMEM_PROGRESS": "off", "HOME": name}
        command = [sys.executable, "-m", "mlpmem_jax", *arguments]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                capture_output=True,
                timeout=LIMIT_SECS,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            return f"case {number}: does not end\n  {shown(arguments)}"
        stderr = done.stderr.decode(errors="replace")
        problems = []
        if done.returncode not in EXIT_CODES:
            problems.append(f"exit code {done.returncode}")
        if "Traceback" in stderr or "Exception ignored" in stderr:
            problems.append("traceback")
        longest = max((len(line) for line in stderr.splitlines()), default=0)
        if longest > LONGEST_LINE:
            problems.append(f"a message of {longest} characters")
        if done.returncode == 2 and not stderr.strip():
            problems.append("refused without a word")
        if any(not file.exists() or file.read_bytes() != data for file, data in own.items()):
            problems.append("a file of the user's changed")
        if not problems:
            return None
        return f"case {number}: {', '.join(problems)}\n  {shown(arguments)}\n{stderr[-1500:]}"


def shown(arguments: list[str]) -> str:
    return " ".join(repr(a if len(a) <= 60 else f"{a[:57]}…") for a in arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    numbers = range(flags.first, flags.first + flags.cases)
    with ThreadPoolExecutor(2) as pool:
        wrong = [one for one in pool.map(lambda n: run_case(n, flags.seed), numbers) if one]
    for one in wrong:
        print(one, "\n", flush=True)
    print(f"{flags.cases} cases, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
