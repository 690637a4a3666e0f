"""YAML as this project reads and writes it.

The reader is PyYAML's safe one with the rules of YAML 1.2's core schema: `1e-3` is a number, `no`
and `2026-01-01` are text. It reports keys that are given twice.
"""

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
# What plain scalars mean, and the characters that they begin with.
_PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
# No timestamps, binary data or sets.
_CONSTRUCTED = ("null", "bool", "float", "seq", "map", "str")
_DEEPEST = 30
_MOST_DIGITS = 1000  # Python itself refuses 4,300


class YamlError(ValueError):
    """Text that is not YAML; the message says where."""


class _Reader(yaml.SafeLoader):
    """Safe loader that collects repeated keys and refuses deep nesting."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    yaml_constructors = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *(_TAG + name for name in _CONSTRUCTED))
    }

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
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):  # the reader itself refuses any other
                if key.value in seen:
                    self.repeated.append((key.value, key.start_mark.line + 1))
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def read_int(self, node: yaml.ScalarNode) -> int:
        digits = self.construct_scalar(node).replace("_", "")
        if len(digits) > _MOST_DIGITS:
            raise YamlError(f"line {node.start_mark.line + 1}: a number of {len(digits)} digits")
        return int(digits)


class _Writer(yaml.SafeDumper):
    """Safe dumper that quotes what any YAML reader might take for something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)


_Reader.add_constructor(f"{_TAG}int", _Reader.read_int)
for _name, (_pattern, _first) in _PLAIN.items():
    for _class in (_Reader, _Writer):  # The writer keeps PyYAML's own rules too.
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str) -> tuple[Any, list[tuple[str, int]]]:
    """Reads one YAML document.

    Returns:
        Its value, and each key that is given twice with the line of the second.

    Raises:
        YamlError: The text is not YAML; "line L, column C: reason".
    """
    try:
        reader = _Reader(text)
        return reader.get_single_data(), reader.repeated
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


def write_yaml(value: Any, **style: Any) -> str:
    """Returns a JSON-like value as a YAML document, keys in the order given."""
    style = {"default_flow_style": False, **style}
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True, **style)


def flow(value: Any) -> str:
    """Returns a list or mapping as one line of YAML."""
    return write_yaml(value, default_flow_style=True, width=10**6).strip()


def short(value: Any, longest: int = 80) -> str:
    """Returns a value as one line of a message, cut where it is long."""
    if isinstance(value, list | tuple):
        value = value[:longest]  # each entry takes a character or more
    if value is None or value == "":
        return "null" if value is None else '""'
    if isinstance(value, bool):
        return "true" if value else "false"
    text = flow(value) if isinstance(value, dict | list | tuple) else str(value)
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= longest else text[: longest - 3] + "..."
