"""The settings that decide each artifact, as they enter its id.

Every `auto` that follows from other keys is written out first, so that a default and the same
value spelled out are one recipe.
"""

from typing import Any

from mlpmem_jax.config.base import Section
from mlpmem_jax.config.data import RetrievalConfig, TargetsConfig
from mlpmem_jax.config.schema import Config
from mlpmem_jax.stats.bootstrap import INTERVALS
from mlpmem_jax.store.array_specs import Split

Recipe = dict[str, Any]

# Keys of `retrieval` that decide the index; the others decide what is kept of a search.
_INDEX = (
    "engine",
    "num_neighbors",
    "min_recall",
    "recall_queries",
    "shard_rows",
    "num_leaves",
    "num_leaves_to_search",
    "num_reorder",
    "dims_per_block",
    "training_rows",
)
# Of these, what is about training rows alone.
_EXCLUSION = ("exclude", "exclude_repeats_tokens")
# Keys that the routed engine alone reads; `auto` may choose it.
_CELLS = ("cells", "cells_to_search")
_SEARCH = ("num_neighbors", "min_recall", "recall_queries")


def tokenizer(config: Config, text: Recipe | None, given: str | None) -> Recipe:
    """Returns the recipe of the tokenizer: trained on text, or a given one by its digest."""
    separator = {"separator": config.tokenizer.separator}
    if given is not None:
        return {"tokenizer": {**separator, "given": given}}
    keys = ("vocab_size", "train_bytes")
    trained = {key: getattr(config.tokenizer, key) for key in keys}
    return {"tokenizer": {**separator, **trained}, **(text or {})}


def decoder(config: Config, weights: str | None) -> Recipe:
    """Returns the recipe of the decoder: a digest of pretrained weights, its training, or both."""
    given = {} if weights is None else {"weights": weights}
    if given and config.pretrain.fine_tune == "none":
        return {"decoder": network(config, "decoder"), **given}
    pretrain = config.pretrain.recipe() | {"window_tokens": config.pretrain_window_tokens}
    return {
        "seed": config.seed,
        "corpus": {"attention": config.corpus.attention},
        "decoder": network(config, "decoder"),
        "pretrain": pretrain,
        **given,
    }


def network(config: Config, name: str) -> Recipe:
    """Returns the keys of a network's section."""
    recipe: Recipe = getattr(config, name).recipe()
    if name == "decoder":
        recipe |= {
            "num_kv_heads": config.decoder.resolved_kv_heads,
            "head_width": config.decoder.resolved_head_width,
        }
    else:  # What was no key before leaves the ids as they were.
        recipe["biases"] = config.memory.resolved_biases
        usual = {"gelu": "all", "swiglu": "none"}[config.memory.block]
        for key, value in {"biases": usual, "projection_bias": "none", "temperature": 1.0}.items():
            if recipe[key] == value:
                del recipe[key]
    return recipe


def compute_dtypes(config: Config, *networks: str) -> Recipe:
    """Returns the part of a recipe that says in which dtype networks are run."""
    return {name: {"compute_dtype": getattr(config, name).compute_dtype} for name in networks}


def datastore(config: Config) -> Recipe:
    """Returns the recipe of the stored states, of any split."""
    windows = {
        "window_tokens": config.embedding_window_tokens,
        "stride_tokens": config.embedding_stride_tokens,
    }
    return {
        "datastore": config.datastore.recipe() | windows,
        "corpus": {"attention": config.corpus.attention},
        **compute_dtypes(config, "decoder"),
    }


def chunking(config: Config) -> dict[str, int]:
    """Returns how the rows of an artifact are cut into files."""
    return {name: getattr(config.datastore, name) for name in ("shard_rows", "chunk_rows")}


def index(config: Config) -> Recipe:
    """Returns the recipe of the search index."""
    retrieval = config.retrieval.recipe()
    names = _INDEX + (_CELLS if config.retrieval.engine in ("routed", "auto") else ())
    recipe = {name: retrieval[name] for name in names}
    if config.retrieval.engine == "routed":
        del recipe["training_rows"]  # Read by ScaNN.
    if config.retrieval.engine == "auto":  # Artifacts from before it could route are the same.
        recipe = _less_defaults(recipe, RetrievalConfig(), _CELLS)
    return {"seed": config.seed, "retrieval": recipe}


def exact_neighbors(config: Config) -> Recipe:
    """Returns the recipe of exact neighbours."""
    neighbors = {"num_neighbors": config.retrieval.num_neighbors}
    return {"retrieval": neighbors, "datastore": chunking(config)}


def exact_sample(config: Config) -> Recipe:
    """Returns the recipe of exact neighbours of some rows of test."""
    drawn = {"split": "test", "seed": config.seed, "exact_rows": config.retrieval.exact_rows}
    return drawn | exact_neighbors(config)


def found_neighbors(config: Config, split: Split) -> Recipe:
    """Returns the recipe of the neighbours that the engine of the index finds."""
    retrieval = config.retrieval.recipe()
    names = (*_SEARCH, *(_EXCLUSION if split == "train" else ()))
    return {
        "seed": config.seed,
        "retrieval": _less_defaults({name: retrieval[name] for name in names}, RetrievalConfig()),
        "datastore": chunking(config),
    }


def targets(config: Config, split: Split, files: str | None = None) -> Recipe:
    """Returns the recipe of next-token distributions.

    Keys that have no effect are left out, and later ones where they are as before.

    Args:
        config: The configuration.
        split: Whose rows.
        files: With targets.teacher=arrow, a digest of the files.
    """
    own = config.targets.recipe()
    del own["workdir"]
    searches = config.targets.teacher == "knn" and config.retrieval.keep_train == "none"
    if config.targets.min_recall is None or not searches:
        del own["min_recall"]
    if config.targets.share == 1 or split != "train":
        del own["share"], own["share_by"]
    if config.targets.teacher != "knn":
        del own["temperature"]
        seed = {"seed": config.seed} if "share" in own else {}  # Nothing else is drawn.
        if files is not None:
            del own["ngram_min_count"]
            own["files"] = files
        return {"split": split, **seed, "targets": own, "datastore": chunking(config)}
    del own["teacher"], own["ngram_min_count"]
    found = {"split": split, **found_neighbors(config, split)}
    return {**found, "targets": _less_defaults(own, TargetsConfig())}


def _less_defaults(
    recipe: Recipe, defaults: Section, later: tuple[str, ...] = (*_EXCLUSION, "min_mass")
) -> Recipe:
    """Leaves out later keys that have their default: artifacts from before are the same."""
    return {
        name: value
        for name, value in recipe.items()
        if name not in later or value != getattr(defaults, name)
    }


def results(config: Config) -> Recipe:
    """Returns the recipe of the table of `evaluate`."""
    return {
        "seed": config.seed,
        "evaluate": config.evaluate.recipe() | {"intervals": INTERVALS},
        **compute_dtypes(config, "memory"),
    }


def imported_memory(config: Config, weights: str) -> Recipe:
    """Returns the recipe of a memory that is not trained here, by a digest of its weights."""
    return {
        "memory": network(config, "memory"),
        "weights": weights,
        "datastore": {"input": config.datastore.input.recipe()},
    }


def trained(config: Config) -> Recipe:
    """Returns the recipe of the memory, or of both networks if they are trained jointly."""
    joint, lm, memory = config.loss_weights
    train = config.train.recipe() | {
        "window_tokens": config.train_window_tokens,
        "mix_windows": config.train_mix_windows,
        "joint_weight": joint,
        "lm_weight": lm,
        "memory_weight": memory,
    }
    if not config.continues_memory:
        del train["replay_share"]
    decided: Recipe = {
        "seed": config.seed,
        "memory": network(config, "memory"),
        "train": train,
    }
    if config.train.mode == "joint":
        decided["decoder"] = network(config, "decoder")
    elif config.decoder_runs:
        decided |= compute_dtypes(config, "decoder")
    if config.decoder_runs:
        decided["corpus"] = {"attention": config.corpus.attention}
        decided["datastore"] = {"input": config.datastore.input.recipe()}
    return decided
