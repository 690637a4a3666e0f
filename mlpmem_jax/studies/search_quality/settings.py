"""A configuration for each way to search, with names of its own for what it makes."""

from typing import Any

from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.studies import SearchSetting


def with_setting(config: Config, setting: SearchSetting) -> Config:
    """Returns the configuration of one setting.

    Datastore, decoder and the exact neighbours of validation and test are shared; index,
    targets and memory are the setting's own.
    """
    ending = f"-{setting.name}"
    retrieval = config.retrieval.model_copy(
        update={
            "name": config.retrieval_name + ending,
            "exact_name": config.exact_name,
            "engine": setting.engine,
            "num_leaves_to_search": setting.num_leaves_to_search,
            "num_reorder": setting.num_reorder,
            "dims_per_block": setting.dims_per_block,
            "min_recall": setting.min_recall,
        }
    )

    def renamed(name: str) -> Any:
        section = getattr(config, name)
        return section.model_copy(update={"name": section.name + ending})

    names = {name: renamed(name) for name in ("targets", "memory")}
    return config.model_copy(update={"retrieval": retrieval, **names})


def reference_of(config: Config) -> str | None:
    """Returns the name of the setting that the others are held against: the last exact one."""
    exact = [one.name for one in config.search_quality.settings if one.engine == "exact"]
    return exact[-1] if exact else None
