"""Which files paths and globs name: each file once, whatever names it has."""

import collections
import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from etils import epath

from mlpmem_jax.errors import UserError
from mlpmem_jax.store.files import is_local, unreachable

# A local file is its device and inode, one in a bucket its URL.
Identity = tuple[int, int] | str


class Match(NamedTuple):
    """A file that a pattern names.

    Attributes:
        path: One of its names; a name without links where it has one.
        pattern: What names it, as it is written in the configuration.
        identity: The same for all names of a file.
        num_names: How many of its names the patterns match.
    """

    path: str
    pattern: str
    identity: Identity
    num_names: int


def match(patterns: Iterable[str], key: str, mistakes: list[str]) -> list[Match]:
    """Returns the files that paths and globs name, sorted by path.

    Args:
        patterns: Paths or globs, local or in buckets.
        key: What the messages call them.
        mistakes: Gets a line for each pattern that names nothing.
    """
    patterns_of: dict[str, str] = {}
    for pattern in dict.fromkeys(patterns):
        expanded = os.path.expanduser(pattern)
        try:
            paths = _matching(expanded)
        except UserError as error:
            mistakes.append(f"{key}: {pattern!r} {error}")
            continue
        if not paths:
            mistakes.append(f"{key}: {pattern!r} {_why_nothing(pattern, expanded)}")
        for path in paths:
            patterns_of.setdefault(path, pattern)
    names: dict[Identity, list[str]] = collections.defaultdict(list)
    for path in patterns_of:
        names[_identity(path)].append(path)
    found = []
    for identity, paths in names.items():
        # The first that is none of a link.
        best = paths[0] if len(paths) == 1 else min(paths, key=_is_link)
        found.append(Match(best, patterns_of[best], identity, len(paths)))
    return sorted(found)


def _identity(path: str) -> Identity:
    if not is_local(path):
        return path
    info = os.stat(path)
    return info.st_dev, info.st_ino


def _is_link(path: str) -> bool:
    return os.path.realpath(path) != os.path.abspath(path)


def _why_nothing(pattern: str, expanded: str) -> str:
    if is_local(expanded) and os.path.isdir(expanded):
        example = os.path.join(pattern, "**", "*.txt")
        return f"is a directory; name its files, for example {example!r}"
    if is_local(expanded) and os.path.exists(expanded):
        return "is no regular file"
    if not glob.has_magic(pattern):
        return "does not exist"
    if "[" in pattern:
        literal = pattern.replace("[", "[[]")
        return f"matches no file (a bracket that is part of a name is written [[]: {literal!r})"
    return "matches no file"


def _matching(pattern: str) -> list[str]:
    """Returns the files that a path or glob names.

    Raises:
        UserError: What cannot be matched about the pattern, or why its bucket cannot be read.
    """
    if not is_local(pattern):
        return _match_in_bucket(pattern)
    # What exists as it is written is no pattern: `notes[1].txt`.
    if not glob.has_magic(pattern) or os.path.lexists(pattern):
        paths: Iterable[str] = [pattern]
    else:
        paths = _glob(pattern)
    return sorted({os.path.normpath(path) for path in paths if _is_file(path)})


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _glob(pattern: str) -> list[str]:
    """Returns what a pattern names: as `glob.glob`, but links never lead round in circles.

    A folder that exists as it is written, brackets included, is no pattern either.
    """
    *folders, last = [part for part in pattern.split("/") if part]
    bases = ["/" if pattern.startswith("/") else ""]
    for part in [*folders, *(["**", "*"] if last == "**" else [last])]:
        bases = [found for base in bases for found in _step(base, part)]
    return bases


def _step(base: str, part: str) -> Iterator[str]:
    if part == "**":
        yield from _folders(base)
    elif not glob.has_magic(part) or _is_written_so(base, part):
        yield os.path.join(base, part)
    else:
        fits = re.compile(fnmatch.translate(part)).match
        for entry in _entries(base):
            if fits(entry.name) and (part.startswith(".") or not entry.name.startswith(".")):
                yield os.path.join(base, entry.name)


def _is_written_so(base: str, part: str) -> bool:
    return not {"*", "?"} & set(part) and os.path.lexists(os.path.join(base, part))


def _folders(base: str) -> Iterator[str]:
    """Yields a folder and all folders in it, links followed, each once; hidden ones left out."""
    seen: set[Identity] = set()
    waiting, links = [base], collections.deque[str]()
    while waiting or links:
        # Links come last: what is inside is better known by its own name.
        folder = waiting.pop() if waiting else links.popleft()
        try:
            identity = _identity(folder or ".")
        except OSError:
            continue
        if identity in seen:
            continue
        seen.add(identity)
        yield folder
        for entry in _entries(folder):
            if not entry.name.startswith(".") and entry.is_dir():
                path = os.path.join(folder, entry.name)
                (links if entry.is_symlink() else waiting).append(path)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder or ".") as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except PermissionError:
        raise UserError(f"leads to {folder}, which cannot be read (permission denied)") from None
    except OSError:
        return []  # No folder, or a link that leads nowhere.


def _match_in_bucket(pattern: str) -> list[str]:
    if "**" in pattern:
        raise UserError("uses ** on a remote path; write out its folders")
    scheme, _, rest = pattern.partition("://")
    bucket, _, inside = rest.partition("/")
    path = epath.Path(pattern)
    try:
        if glob.has_magic(pattern) and not ("[" in pattern and path.exists()):
            found = epath.Path(f"{scheme}://{bucket}").glob(inside)
            return [os.fspath(one) for one in found if not one.is_dir()]
        exists, is_folder = path.exists(), path.is_dir()
    # Each of the drivers has errors of its own: HTTP, credentials, sockets.
    except Exception as error:
        raise UserError(unreachable(error)) from None
    if is_folder:
        example = os.path.join(pattern, "*.txt")
        raise UserError(f"is a directory; name its files, for example {example!r}")
    return [pattern] if exists else []
