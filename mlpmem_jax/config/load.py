"""From a YAML file and dotted overrides to a validated `Config`, or to all its mistakes.

The file is merged into the schema's defaults key by key. Every mistake is one line,
`key=value: what is allowed`, and independent mistakes are reported together.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlpmem_jax.config.draft import Draft, KeyPath
from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.yaml_text import YamlError, parse_yaml, short, write_yaml
from mlpmem_jax.errors import ConfigError


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    assigned: Mapping[str, Any] | None = None,
) -> Config:
    """Reads a configuration.

    Args:
        path: YAML file; what it leaves out keeps its default.
        overrides: `section.key=value` each, the value in YAML; later ones win.
        assigned: Values by dotted path that win over everything, already parsed.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: With one line for each mistake.
    """
    draft = Draft()
    for keys, value in _read_file(Path(path), draft.mistakes):
        draft.put(keys, value)
    for override in overrides:
        draft.override(override)
    for dotted, value in (assigned or {}).items():
        draft.put(tuple(dotted.split(".")), value)
    return draft.finish()


def changed_config(
    config: Config, assigned: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Config:
    """Returns a configuration with some keys changed.

    Args:
        config: A validated configuration.
        assigned: Values by dotted path, already parsed.
        overrides: `section.key=value` each, taken before them.

    Raises:
        ConfigError: With one line for each mistake.
    """
    draft = Draft(config)
    for override in overrides:
        draft.override(override)
    for dotted, value in assigned.items():
        draft.put(tuple(dotted.split(".")), value)
    return draft.finish()


def dump_config(config: Config) -> str:
    """Returns the resolved configuration as YAML; reading it gives an equal one."""
    return write_yaml(config.model_dump(mode="json"))


def _read_file(path: Path, mistakes: list[str]) -> Iterator[tuple[KeyPath, Any]]:
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (--config wants a YAML file)") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a directory (--config wants a YAML file)") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    try:
        value, repeated = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    mistakes += [f"{path}: line {line}: key {key} is given twice" for key, line in repeated]
    if value is None:
        return
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: holds {short(value)!r} and must hold sections (`decoder:` and so on)"
        )
    for key, part in value.items():
        yield (str(key),), part
