"""YAML as this project reads and writes it.

The reader is PyYAML's safe one with the rules of YAML 1.2's core schema: `1e-3` is a
number, `no` and `2026-01-01` are text, and a key given twice is a mistake instead of
the last one winning.
"""

import re
from typing import Any

import yaml

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_DEEPEST = 30
_MOST_DIGITS = 1000  # Python itself refuses 4,300
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")


class YamlError(ValueError):
    """Text that is not YAML; the message says where."""


class _Reader(yaml.SafeLoader):
    """Safe loader that collects repeated keys and refuses deep nesting."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def __init__(self, text: str):
        super().__init__(text)
        self.repeated: list[tuple[str, int]] = []
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST:  # PyYAML's time grows with the square of the depth.
            raise YamlError(f"it is nested deeper than {_DEEPEST} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key_node, _ in node.value:
                if not isinstance(key_node, yaml.ScalarNode):
                    continue  # refused by the reader itself
                if key_node.value in seen:
                    self.repeated.append((key_node.value, key_node.start_mark.line + 1))
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def _read_int(reader: _Reader, node: yaml.ScalarNode) -> int:
    digits = reader.construct_scalar(node).replace("_", "")
    if len(digits) > _MOST_DIGITS:
        raise YamlError(f"line {node.start_mark.line + 1}: a number of {len(digits)} digits")
    return int(digits)


# Tags of the core schema alone: no timestamps, binary data or sets.
_CORE = ("null", "bool", "float", "seq", "map", "str")
_TAG = "tag:yaml.org,2002:"
_Reader.yaml_constructors = {
    None: yaml.SafeLoader.yaml_constructors[None],
    **{f"{_TAG}{name}": yaml.SafeLoader.yaml_constructors[f"{_TAG}{name}"] for name in _CORE},
    f"{_TAG}int": _read_int,
}


class _Writer(yaml.SafeDumper):
    """Safe dumper that quotes what any YAML reader might take for something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)


_PLAIN = (
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("merge", re.compile("^<<$"), ["<"]),
)
for _name, _pattern, _first in _PLAIN:
    _Reader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
    # The writer keeps PyYAML's own rules too, and so quotes what either would misread.
    _Writer.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)


def parse_yaml(text: str) -> tuple[Any, list[tuple[str, int]]]:
    """Reads one YAML document.

    Args:
        text: The document.

    Returns:
        Its value, and each key that is given twice with the line of the second.

    Raises:
        YamlError: The text is not YAML; "line L, column C: reason".
    """
    try:
        reader = _Reader(text)
        try:
            value = reader.get_single_data()
        finally:
            reader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YamlError(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from None
    except YamlError:
        raise
    except (ValueError, TypeError, KeyError) as error:  # `!!int x`, `!!bool x`
        raise YamlError(f"a value does not fit its tag: {error}") from None
    except RecursionError:  # `a: &a {<<: *a}`
        raise YamlError("it is nested in itself") from None
    return value, reader.repeated


def write_yaml(value: Any) -> str:
    """Returns a JSON-like value as a YAML document, keys in the order given."""
    return yaml.dump(
        value, Dumper=_Writer, sort_keys=False, allow_unicode=True, default_flow_style=False
    )


def short(value: Any, longest: int = 80) -> str:
    """Returns a value as one line of a message, cut where it is long."""
    if value is None or value == "":
        return "null" if value is None else '""'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        value = value[:longest]  # each entry takes a character or more
    text = value if isinstance(value, str) else flow(value)
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= longest else text[: longest - 3] + "..."


def flow(value: Any) -> str:
    """Returns a value as one line of YAML."""
    if isinstance(value, dict | list | tuple):
        plain = list(value) if isinstance(value, tuple) else value
        return yaml.dump(
            plain,
            Dumper=_Writer,
            default_flow_style=True,
            sort_keys=False,
            allow_unicode=True,
            width=10**6,
        ).strip()
    return str(value)
