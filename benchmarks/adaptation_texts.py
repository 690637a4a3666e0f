"""The texts of configs/adapt.yaml and configs/smollm2.yaml: three kinds of text, in splits by file.

    .venv/bin/python -m benchmarks.adaptation_texts DOCUMENTATION OUT

DOCUMENTATION is a directory of reStructuredText and YAML (`.rst`, `.yaml`, or the same with `.gz`;
measured were those of Debian's package linux-doc-6.1, in
/usr/share/doc/linux-doc-6.1/Documentation, whose YAML describes the bindings of devices); the
third text is the standard library of this Python. Writes OUT/rst, OUT/yaml and OUT/python with
folders train, valid and test; a file's split follows from its name, and large files are in train.
"""

import argparse
import gzip
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from mlpmem_jax.corpus.sources import stdlib_files

# Shares of files: validation, test.
HELD_OUT = {"rst": (0.005, 0.008), "yaml": (0.008, 0.012), "python": (0.015, 0.03)}
LARGEST_HELD_OUT = 100_000  # Bytes: larger files would be most of a split; they are in train.
LEFT_OUT = ("translations",)  # Of the documentation: not English.


def split_of(kind: str, name: str, data: bytes) -> str:
    """Returns the split of a file."""
    valid, test = HELD_OUT[kind]
    if len(data) > LARGEST_HELD_OUT:
        return "train"
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    return "valid" if place < valid else "test" if place < valid + test else "train"


def documentation(root: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yields names and contents of the documentation's files with a suffix."""
    for path in sorted(root.rglob(f"*{suffix}*")):
        name = str(path.relative_to(root))
        if path.parts[len(root.parts)] not in LEFT_OUT and name.endswith((suffix, f"{suffix}.gz")):
            data = path.read_bytes()
            yield name.removesuffix(".gz"), gzip.decompress(data) if name.endswith(".gz") else data


def standard_library() -> Iterator[tuple[str, bytes]]:
    """Yields names and contents of the standard library's files."""
    root, names = stdlib_files()
    for name in names:
        yield name, (Path(root) / name).read_bytes()


def main() -> int:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documentation", type=Path)
    parser.add_argument("out", type=Path)
    flags = parser.parse_args()
    if not any(flags.documentation.rglob("*.rst*")):
        print(f"error: {flags.documentation}: no .rst or .rst.gz files", file=sys.stderr)
        return 2
    if flags.out.exists():
        print(f"error: {flags.out} exists; name a new directory", file=sys.stderr)
        return 2
    for kind, files in {
        "rst": documentation(flags.documentation, ".rst"),
        "yaml": documentation(flags.documentation, ".yaml"),
        "python": standard_library(),
    }.items():
        for name, data in files:
            path = flags.out / kind / split_of(kind, name, data) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
