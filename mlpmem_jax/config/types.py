"""Types of keys: the bounds of numbers, names and paths. Every section takes them from here.

Bounds are those of the arithmetic behind a key (int32 on devices, float32), rounded to numbers
that people write. A value within them may still be too much for a machine.
"""

import functools
import glob
import os
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, Strict, WithJsonSchema

_LONGEST_PATH, _LONGEST_NAME = 4096, 255  # bytes, of Linux
T = TypeVar("T")


def _whole(value: Any) -> Any:
    """Returns 2000 for 2e3; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _writable(text: str) -> str:
    """Returns a text that can be written as UTF-8; bytes that are not come as surrogates.

    Raises:
        ValueError: It cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid UTF-8 text") from None
    return text


# Lists of YAML become tuples.
ListOf = Annotated[tuple[T, ...], Strict(False)]
# For every whole number, after its bounds: before them, it would hide them from the JSON schema.
WHOLE = BeforeValidator(_whole)
Auto = Literal["auto"]
AnyText = Annotated[str, AfterValidator(_writable)]
Text = Annotated[str, Field(min_length=1)]
# Names become directories, and parts of other names.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=100)]

PositiveInt = Annotated[int, Field(ge=1, le=10**9), WHOLE]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**9), WHOLE]
# JAX keeps 32 bits of a seed: beyond them, different seeds would give the same numbers.
Seed = Annotated[int, Field(ge=0, le=2**32 - 1), WHOLE]
# What is held in memory at the same time, or repeated.
Count = Annotated[int, Field(ge=1, le=10**6), WHOLE]
# Each is a checkpoint, and a row of a table.
Epochs = Annotated[int, Field(ge=1, le=1000), WHOLE]
Blocks = Annotated[int, Field(ge=1, le=10**4), WHOLE]
Width = Annotated[int, Field(ge=1, le=10**6), WHOLE]
Tokens = Annotated[int, Field(ge=1, le=10**7), WHOLE]
RecentTokens = Annotated[int, Field(ge=0, le=64), WHOLE]
NgramOrder = Annotated[int, Field(ge=1, le=64), WHOLE]
TableRows = Annotated[int, Field(ge=128, le=2**30), WHOLE]
Rows = Annotated[int, Field(ge=1, le=10**12), WHOLE]
Bytes = Annotated[int, Field(ge=1, le=10**15), WHOLE]

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(ge=1e-6, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
# Below 1 in float32 too.
Decay = Annotated[float, Field(ge=0, le=0.999999)]
# Above the rounding of squares in float32, so that 0 / 0 stays impossible.
Epsilon = Annotated[float, Field(ge=1e-15, le=1)]
Scale = Annotated[float, Field(ge=1e-9, le=1e9)]
# What any other key may take.
SweptInt = Annotated[int, Field(ge=-(10**15), le=10**15)]
SweptFloat = Annotated[float, Field(ge=-1e15, le=1e15)]
# A whole number counts blocks from 1; a number with a point is a share of the depth.
Layer = Annotated[int, Field(ge=1, le=10**4)] | Annotated[float, Field(gt=0, le=1)]


def checked_path(path: str, *, is_glob: bool = False) -> str:
    """Returns a path with the home directory (`~`, `~user`) in its place.

    Args:
        path: As typed.
        is_glob: Whether it may hold wildcards; brackets in the name of the home are none.

    Raises:
        ValueError: It cannot be the path of a file; says why.
    """
    head, slash, rest = _writable(path).partition("/")
    if not path.strip():
        raise ValueError("must be a path, and this one is empty")
    if any(ord(character) < 32 or ord(character) == 127 for character in path):
        raise ValueError("holds a line break or another control character")
    home = os.path.expanduser(head) if path.startswith("~") else head
    if home == head and path.startswith("~"):
        raise ValueError(
            f"{head}: no such user has a home directory (./{head} is a file of that name)"
        )
    if is_glob and home != head:
        home = glob.escape(home)
    expanded = home + slash + rest
    if len(os.fsencode(expanded)) > _LONGEST_PATH:
        raise ValueError(f"is longer than the {_LONGEST_PATH} bytes of a path")
    if any(len(os.fsencode(name)) > _LONGEST_NAME for name in expanded.split("/")):
        raise ValueError(f"holds a name of more than {_LONGEST_NAME} bytes")
    return expanded


_PATH_SCHEMA = WithJsonSchema({"type": "string", "format": "path"})
PathText = Annotated[str, AfterValidator(checked_path), _PATH_SCHEMA]
GlobText = Annotated[
    str, AfterValidator(functools.partial(checked_path, is_glob=True)), _PATH_SCHEMA
]
