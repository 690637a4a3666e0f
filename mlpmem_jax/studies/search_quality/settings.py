"""The artifacts of each way to search: index, targets and memory are its own, the rest shared."""

from mlpmem_jax.config.studies import SearchQualityConfig, SearchSetting
from mlpmem_jax.pipeline.graph import Artifacts


def with_setting(run: Artifacts, setting: SearchSetting) -> Artifacts:
    """Returns the artifacts of one setting."""
    names = (
        *("engine", "num_leaves_to_search", "num_reorder", "dims_per_block", "cells_to_search"),
        "min_recall",
    )
    changed = {name: getattr(setting, name) for name in names}
    retrieval = run.config.retrieval.model_copy(update={**changed, "exact_rows": "all"})
    targets = run.config.targets.model_copy(update={"min_recall": None})  # As it is measured.
    config = run.config.model_copy(update={"retrieval": retrieval, "targets": targets})
    return run.of(config, title=setting.name)


def reference_of(config: SearchQualityConfig) -> str | None:
    """Returns the name of the setting that the others are held against: the last exact one."""
    exact = [one.name for one in config.settings if one.engine == "exact"]
    return exact[-1] if exact else None
