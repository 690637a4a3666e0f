"""The keys of the configuration as data: dotted paths, types, limits, defaults, meanings.

All of it is read from the JSON schema that pydantic makes of the sections. The messages of
`load` and the tables of `describe` both use it, so a key is described once, where it is declared.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from mlpmem_jax.config.base import RUNTIME
from mlpmem_jax.config.schema import Config

INDEX = "N"  # stands for a number in the path of a list's entry
_LONGEST_PATH = 100  # a longer one is not compared with the keys
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

KeyPath = tuple[str | int, ...]
Schema = Mapping[str, Any]  # a node of the JSON schema


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        path: Dotted, with :data:`INDEX` for the numbers of list entries.
        schema: Its node of the JSON schema.
        default: As JSON.
        description: Its meaning.
        runtime: Whether it changes how a stage runs, never its result.
    """

    path: str
    schema: Schema
    default: Any
    description: str
    runtime: bool


def key_path(dotted: str) -> KeyPath:
    """Returns the parts of a dotted key; numbers count entries of lists."""
    parts = dotted.strip().split(".")
    return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in parts)


def dotted_path(keys: KeyPath) -> str:
    """Returns the parts of a key as one dotted text."""
    return ".".join(map(str, keys))


@cache
def all_keys() -> dict[str, Key]:
    """Returns every key of the configuration by its dotted path."""
    defaults = Config().model_dump(mode="json")
    return {key.path: key for key in _walk(_root(), defaults, "", False)}


def schema_at(keys: KeyPath) -> Schema | None:
    """Returns the schema of a key, a section or a list's entry; None where there is no such key."""
    node = _root()
    for key in keys:
        below = node.get("items") if isinstance(key, int) else node.get("properties", {}).get(key)
        if below is None:
            return None
        node = _resolved(below)
    return node


def alternatives(schema: Schema) -> list[Schema]:
    """Returns the members of a union; any other schema as the only member."""
    return schema.get("anyOf", [schema])


def is_section(schema: Schema) -> bool:
    """Returns whether a schema is a section's."""
    return "properties" in _resolved(schema)


def is_free_text(schema: Schema) -> bool:
    """Returns whether a schema takes text, and not only some words."""
    return schema.get("type") == "string" and not _choices(schema)


def holds_path(dotted: str) -> bool:
    """Returns whether a key, or each entry of its list, is a path."""
    key = all_keys().get(_NUMBER.sub(INDEX, dotted))
    parts = [] if key is None else [*alternatives(key.schema), key.schema.get("items", {})]
    return any(part.get("format") == "path" for part in parts)


def nearest(dotted: str, sections: bool) -> list[str]:
    """Returns the keys (or sections) that a misspelt path most likely meant."""
    if len(dotted) > _LONGEST_PATH:
        return []
    wanted = _NUMBER.sub(INDEX, dotted)
    paths = list(all_keys())
    if sections:
        paths = sorted({p.rsplit(".", i)[0] for p in paths for i in range(1, p.count(".") + 1)})
    name = wanted.rsplit(".", 1)[-1]
    alike = [
        p for p in paths
        if difflib.SequenceMatcher(None, name, p.rsplit(".", 1)[-1]).ratio() >= 0.6
    ]  # fmt: skip
    found = difflib.get_close_matches(wanted, alike, n=1, cutoff=0.7)
    if not found:
        found = [path for path in alike if path.rsplit(".", 1)[-1] == name][:3]
    for number in _NUMBER.findall(dotted):
        found = [path.replace(f".{INDEX}", f".{number}", 1) for path in found]
    return found


def type_text(schema: Schema) -> str:
    """Returns a type in the short form of tables: `int 1 to 1e9 | auto`."""
    return " | ".join(map(_short, alternatives(schema)))


def allowed_text(schema: Schema) -> str:
    """Returns a type in the words of messages: "a whole number from 1 to 1e9, or auto"."""
    words = ", or ".join(map(_words, alternatives(schema)))
    return f"{words}; {schema['hint']}" if "hint" in schema else words


@cache
def _root() -> Schema:
    return Config.model_json_schema()


def _resolved(schema: Schema) -> Schema:
    """Returns a schema, or the section that it refers to."""
    reference = schema.get("$ref")
    return _root()["$defs"][reference.rsplit("/", 1)[-1]] if reference else schema


def _walk(section: Schema, defaults: Any, prefix: str, inside_runtime: bool) -> Iterator[Key]:
    """Yields every key of a section, nested ones too, in the order of declaration."""
    for name, schema in section["properties"].items():
        path, default = f"{prefix}{name}", defaults[name]
        runtime = inside_runtime or bool(schema.get(RUNTIME))
        if is_section(schema):
            yield from _walk(_resolved(schema), default, f"{path}.", runtime)
            continue
        yield Key(path, schema, default, schema["description"], runtime)
        if "items" in schema and is_section(schema["items"]):
            entry = _resolved(schema["items"])
            values = {name: part["default"] for name, part in entry["properties"].items()}
            yield from _walk(entry, values, f"{path}.{INDEX}.", runtime)


def _choices(schema: Schema) -> list[str]:
    return [schema["const"]] if "const" in schema else schema.get("enum", [])


def _short(schema: Schema) -> str:
    if is_section(schema):
        return "sections"
    if _choices(schema):
        return " | ".join(_choices(schema))
    match schema["type"]:
        case "array":
            items = type_text(schema["items"])
            return f"list of ({items})" if "anyOf" in schema["items"] else f"list of {items}"
        case "string":
            return schema.get("format", "text")
        case "null":
            return "null"
        case kind:
            return f"{'int' if kind == 'integer' else 'float'} {_limits(schema)}"


def _words(schema: Schema) -> str:
    if is_section(schema):
        return "a section (keys and values)"
    if _choices(schema):
        *first, last = _choices(schema)
        return f"{', '.join(first)} or {last}" if first else last
    match schema["type"]:
        case "array":
            least = ", at least one" if schema.get("minItems") else ""
            return f"a list of {_plural(schema['items'])}{least}"
        case "string" if "pattern" in schema:
            most = f"at most {schema['maxLength']} characters"
            return f"text that matches {schema['pattern']} and has {most}"
        case "string":
            text = "text that is not empty" if schema.get("minLength") else "text"
            return "a path" if "format" in schema else text
        case "null":
            return "null"
        case kind:
            number = "a whole number" if kind == "integer" else "a number"
            return f"{number} {'from ' if 'minimum' in schema else ''}{_limits(schema)}"


def _plural(items: Schema) -> str:
    if is_section(items):
        return "sections"
    if is_free_text(items):
        return "texts"
    return re.sub("^a (whole )?number", r"\1numbers", _words(alternatives(items)[0]))


def _limits(schema: Schema) -> str:
    """Returns the bounds of a number; every number has two."""
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if "minimum" in schema:
        return f"{_number(low)} to {_number(high)}"
    return f"above {_number(low)}, {'at most' if 'maximum' in schema else 'below'} {_number(high)}"


def _number(value: float) -> str:
    """Returns a bound as people write it: 256, 1e9, 1e-6, 4294967295."""
    if isinstance(value, int) and (abs(value) < 10**4 or value % 10**3):
        return str(value)
    return re.sub(r"e([+-])0*(\d+)", lambda e: f"e{e[1].strip('+')}{e[2]}", f"{value:g}")
