"""The keys of the schema as data: dotted paths, types, limits, defaults, meanings.

What `load` says about mistakes and what `describe` prints both come from here, so a key
is described once, where it is declared.
"""

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from mlpmem_jax.config.base import RUNTIME, Section

INDEX = "N"  # stands for a number in the path of a list's entry
_LONGEST_PATH = 100  # what is longer is no misspelt key
_LIMITS = ("ge", "gt", "le", "lt", "pattern", "min_length", "max_length", "is_path", "hint")


@dataclass(frozen=True)
class Alternative:
    """One kind of value that a key takes."""

    kind: Literal["int", "float", "str", "null", "choice", "list", "section"]
    choices: tuple[str, ...] = ()
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    pattern: str | None = None
    min_length: int | None = None
    max_length: int | None = None
    is_path: bool = False
    hint: str | None = None
    items: tuple["Alternative", ...] = ()
    section: type[Section] | None = None

    def has_type_of(self, value: Any) -> bool:
        """Returns whether a value read from YAML is of this kind, limits aside."""
        if self.kind == "null":
            return value is None
        if self.kind in ("str", "choice"):
            return isinstance(value, str)
        if self.kind == "section":
            return isinstance(value, dict)
        if self.kind == "list":
            return isinstance(value, list)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        # Not asked of whole numbers: one of 400 digits is no float.
        if isinstance(value, int):
            return True
        return math.isfinite(value) and (self.kind == "float" or value.is_integer())

    def allows(self, value: Any) -> bool:
        """Returns whether a value read from YAML is of this kind and within its bounds."""
        if not self.has_type_of(value):
            return False
        if self.kind == "choice":
            return value in self.choices
        if self.kind == "list":
            return all(any(item.allows(part) for item in self.items) for part in value)
        if self.kind not in ("int", "float"):
            return True
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )


@dataclass(frozen=True)
class Key:
    """One thing that can be set."""

    path: str
    alternatives: tuple[Alternative, ...]
    default: Any
    description: str
    runtime: bool


def alternatives_of(field: FieldInfo) -> tuple[Alternative, ...]:
    """Returns what a field of a section takes."""
    return _alternatives(field.annotation, tuple(field.metadata))


def section_of(alternatives: tuple[Alternative, ...]) -> type[Section] | None:
    """Returns the section class, where a field is a section."""
    return alternatives[0].section if alternatives[0].kind == "section" else None


def item_section_of(alternatives: tuple[Alternative, ...]) -> type[Section] | None:
    """Returns the class of the entries, where a field is a list of sections."""
    first = alternatives[0]
    return section_of(first.items) if first.kind == "list" else None


def keys_of(section: Section, prefix: str = "", inside_runtime: bool = False) -> Iterator[Key]:
    """Yields every key of a section, nested ones too, in the order of declaration.

    Args:
        section: An instance that holds the defaults.
        prefix: Dotted path of the section, empty for the whole configuration.
        inside_runtime: Whether an enclosing section is marked as runtime.
    """
    for name, field in type(section).model_fields.items():
        path = f"{prefix}.{name}" if prefix else name
        alternatives = alternatives_of(field)
        extra = field.json_schema_extra
        runtime = inside_runtime or bool(isinstance(extra, dict) and extra.get(RUNTIME))
        value = getattr(section, name)
        if section_of(alternatives):
            yield from keys_of(value, path, runtime)
            continue
        yield Key(path, alternatives, value, field.description or "", runtime)
        entry = item_section_of(alternatives)
        if entry:
            yield from keys_of(entry(), f"{path}.{INDEX}", runtime)


@cache
def all_keys() -> dict[str, Key]:
    """Returns every key of the configuration by its dotted path."""
    from mlpmem_jax.config.schema import Config

    return {key.path: key for key in keys_of(Config())}


def holds_path(dotted: str) -> bool:
    """Returns whether a key, or each entry of its list, is a path."""
    key = all_keys().get(re.sub(r"(?<=\.)\d+(?=\.|$)", INDEX, dotted))
    kinds = [] if key is None else [*key.alternatives, *key.alternatives[0].items]
    return any(alternative.is_path for alternative in kinds)


def type_text(alternatives: tuple[Alternative, ...]) -> str:
    """Returns a type in the short form of tables: `int ≥ 1 | auto`."""
    return " | ".join(_short(alternative) for alternative in alternatives)


def allowed_text(alternatives: tuple[Alternative, ...]) -> str:
    """Returns a type in the words of messages: "a whole number from 1 to 1e9, or auto"."""
    hints = [alternative.hint for alternative in alternatives if alternative.hint]
    words = ", or ".join(_words(alternative) for alternative in alternatives)
    return "; ".join([words, *hints])


def nearest(dotted: str, sections: bool) -> list[str]:
    """Returns the keys (or sections) that a misspelt path most likely meant."""
    if len(dotted) > _LONGEST_PATH:
        return []
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", dotted)
    wanted = re.sub(r"(?<=\.)\d+(?=\.|$)", INDEX, dotted)
    paths = list(all_keys())
    if sections:
        paths = sorted({p.rsplit(".", i)[0] for p in paths for i in range(1, p.count(".") + 1)})
    name = wanted.rsplit(".", 1)[-1]
    alike = [p for p in paths if _likeness(name, p.rsplit(".", 1)[-1]) >= 0.6]
    found = difflib.get_close_matches(wanted, alike, n=1, cutoff=0.7)
    if not found:
        found = [path for path in alike if path.rsplit(".", 1)[-1] == name][:3]
    for number in numbers:
        found = [path.replace(f".{INDEX}", f".{number}", 1) for path in found]
    return found


def _likeness(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


def _alternatives(annotation: Any, metadata: tuple[Any, ...]) -> tuple[Alternative, ...]:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        return _alternatives(inner, metadata + tuple(extra))
    if origin in (Union, UnionType):
        found: list[Alternative] = []
        for argument in get_args(annotation):
            found += _alternatives(argument, metadata)
        return tuple(found)
    if origin is Literal:
        return (Alternative("choice", choices=tuple(str(a) for a in get_args(annotation))),)
    limits = _limits(metadata)
    if origin is tuple:
        return (Alternative("list", items=_alternatives(get_args(annotation)[0], ()), **limits),)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return (Alternative("section", section=annotation),)
    if annotation is NoneType:
        return (Alternative("null"),)
    kinds: dict[Any, Literal["int", "float", "str"]] = {int: "int", float: "float", str: "str"}
    return (Alternative(kinds[annotation], **limits),)


def _limits(metadata: tuple[Any, ...]) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    for item in metadata:
        for constraint in (*getattr(item, "metadata", ()), item):
            for name in _LIMITS:
                if getattr(constraint, name, None) is not None:
                    limits[name] = getattr(constraint, name)
    return limits


def _short(alternative: Alternative) -> str:
    if alternative.kind == "choice":
        return " | ".join(alternative.choices)
    if alternative.kind == "null":
        return "null"
    if alternative.kind == "list":
        items = type_text(alternative.items)
        return f"list of {items}" if len(alternative.items) == 1 else f"list of ({items})"
    if alternative.kind == "section":
        return "sections"
    if alternative.kind == "str":
        return "path" if alternative.is_path else "text"
    if alternative.ge is not None and alternative.le is not None:
        return f"{alternative.kind} {_number(alternative.ge)} to {_number(alternative.le)}"
    symbols = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [
        f"{symbol} {_number(getattr(alternative, limit))}"
        for limit, symbol in symbols.items()
        if getattr(alternative, limit) is not None
    ]
    return " ".join([alternative.kind, ", ".join(limits)]).strip()


def _number(value: float) -> str:
    """Returns a bound as people write it: 256, 1e9, 1e-6, 4294967295."""
    if isinstance(value, int) and (abs(value) < 10**4 or value % 10**3):
        return str(value)
    return re.sub(r"e([+-])0*(\d+)", lambda e: f"e{e[1].strip('+')}{e[2]}", f"{value:g}")


def _words(alternative: Alternative) -> str:
    if alternative.kind == "choice":
        *first, last = alternative.choices
        return f"{', '.join(first)} or {last}" if first else last
    if alternative.kind == "null":
        return "null"
    if alternative.kind == "list":
        nested = alternative.items[0].kind
        words = re.sub("^a (whole )?number", r"\1numbers", _words(alternative.items[0]))
        items = {"str": "texts", "section": "sections"}.get(nested, words)
        return f"a list of {items}" + ", at least one" * bool(alternative.min_length)
    if alternative.kind == "section":
        return "a section (keys and values)"
    if alternative.kind == "str":
        if alternative.pattern:
            longest = f" and has at most {alternative.max_length} characters"
            return f"text that matches {alternative.pattern}" + longest * bool(
                alternative.max_length
            )
        if alternative.is_path:
            return "a path"
        return "text that is not empty" if alternative.min_length else "text"
    name = "a whole number" if alternative.kind == "int" else "a number"
    return name + _range_words(alternative)


def _range_words(alternative: Alternative) -> str:
    low = high = ""
    if alternative.ge is not None:
        low = f" of at least {_number(alternative.ge)}"
    elif alternative.gt is not None:
        low = f" above {_number(alternative.gt)}"
    if alternative.le is not None:
        high = f" at most {_number(alternative.le)}"
    elif alternative.lt is not None:
        high = f" below {_number(alternative.lt)}"
    if alternative.ge is not None and alternative.le is not None:
        return f" from {_number(alternative.ge)} to {_number(alternative.le)}"
    return f"{low},{high}" if low and high else low + high
