"""From a YAML file and dotted overrides to a validated `Config`, or to all its mistakes.

The file is merged into the schema's defaults key by key. Every mistake is one line,
`key=value: what is allowed`, and independent mistakes are reported together.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlpmem_jax.config.draft import Draft
from mlpmem_jax.config.keys import key_path
from mlpmem_jax.config.pretrained import pretrained_keys
from mlpmem_jax.config.pretrained_memory import SITE_KEYS, memory_keys
from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.types import checked_path
from mlpmem_jax.config.weight_files import is_gone
from mlpmem_jax.config.yaml_text import YamlError, parse_yaml, short, write_yaml
from mlpmem_jax.errors import ConfigError

_MOST_BYTES = 1 << 22  # of a file, so that /dev/zero ends


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    assigned: Mapping[str, Any] | None = None,
) -> Config:
    """Reads a configuration.

    Args:
        path: YAML file; what it leaves out keeps its default.
        overrides: `section.key=value` each; later ones win.
        assigned: Values by dotted path that win over everything, already parsed.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: With one line for each mistake.
    """
    values, mistakes = _read_file(str(path))

    def draft(known: Mapping[str, Any]) -> Draft:
        draft = Draft()
        for dotted, value in known.items():
            draft.put(key_path(dotted), value)
        for mistake in mistakes:
            draft.note(mistake)
        draft.merge(values)
        return _changed(draft, overrides, assigned or {})

    # What pretrained networks decide stands below what the file and the command line set.
    known: dict[str, Any] = {}
    given = draft({})
    if folder := _imported(given, values, "decoder"):
        known |= pretrained_keys(folder)
    if folder := _imported(given, values, "memory"):
        known |= memory_keys(folder) | SITE_KEYS
    return draft(known).finish()


def _imported(given: Draft, values: Any, network: str) -> str | None:
    """Returns where the keys of a pretrained network are read; None: nowhere.

    A finished run needs no file of it any more: `config.yaml` of the work directory has all keys.
    """
    folder = _path_of(given.value(network, "pretrained"))
    section = values.get(network) if isinstance(values, Mapping) else None
    known = set(section) if isinstance(section, Mapping) else set()
    has_all = known >= set(type(Config.model_fields[network].default).model_fields)
    return None if folder and is_gone(folder) and has_all else folder


def _path_of(value: Any) -> str | None:
    """Returns a path; None where it is not set, or will be refused."""
    try:
        return checked_path(value) if isinstance(value, str) else None
    except ValueError:
        return None


def changed_config(
    config: Config, assigned: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Config:
    """Returns a configuration with some keys changed.

    Args:
        assigned: Values by dotted path, already parsed.
        overrides: `section.key=value` each, taken before them.

    Raises:
        ConfigError: With one line for each mistake.
    """
    return _changed(Draft(config), overrides, assigned).finish()


def _changed(draft: Draft, overrides: Sequence[str], assigned: Mapping[str, Any]) -> Draft:
    for override in overrides:
        draft.override(override)
    for dotted, value in assigned.items():
        draft.put(key_path(dotted), value)
    return draft


def dump_config(config: Config) -> str:
    """Returns the resolved configuration as YAML; reading it gives an equal one."""
    return write_yaml(config.model_dump(mode="json"))


def _read_file(path: str) -> tuple[dict[Any, Any], list[str]]:
    """Returns what a file sets, and a line for each key that it gives twice."""
    try:
        path = checked_path(path)
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"larger than {_MOST_BYTES >> 20} MiB, so not a configuration")
        value, repeated = parse_yaml(content.decode("utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"{path}: {reason} (--config requires a YAML file)") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except YamlError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    except ValueError as error:
        raise ConfigError(f"--config {short(path)}: {error}") from None
    sections = value.values() if isinstance(value, dict) else [value]
    if all(section is None or section == {} for section in sections):
        # Its defaults would start a run that nobody asked for: such a file was cut off.
        raise ConfigError(f"{path}: sets no key; configs/quickstart.yaml is an example")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold sections (`decoder:` and so on), not {short(value)}")
    return value, [f"{path}: line {line}: key {key} is given twice" for key, line in repeated]
