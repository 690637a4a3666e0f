"""What stages refuse before they make anything."""

from mlpmem_jax.config.checks import without_keys
from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.errors import ArtifactError, ConfigError, Mistakes
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.store.array_specs import Split

_WITH_TARGETS: tuple[Split, ...] = ("train", "valid")


def check_devices(run: Artifacts, *keys: str) -> None:
    """Refuses what the devices cannot do: the mesh, batches cut over it, the attention kernel.

    Args:
        keys: Sections whose `batch_size` is cut over the mesh.

    Raises:
        ConfigError: Names the keys and the numbers.
    """
    from mlpmem_jax.parallel.mesh import check_batch, make_mesh

    mesh, mistakes = make_mesh(run.config.mesh), Mistakes()
    for name in keys:
        section = getattr(run.config, name)
        accumulation = getattr(section, "accumulation_steps", 1)
        with mistakes.gather():
            check_batch(mesh, f"{name}.batch_size", section.batch_size, accumulation)
    with mistakes.gather():
        check_attention(run.config.decoder, mesh.devices.flat[0].platform)
    mistakes.refuse()


def check_attention(decoder: DecoderConfig, platform: str) -> None:
    """Refuses an attention kernel that the devices do not have, or that the heads do not fit.

    Raises:
        ConfigError: Names the key, its value and why.
    """
    from mlpmem_jax.models.attention import unusable

    half = decoder.compute_dtype == "bfloat16" or (
        decoder.compute_dtype == "auto" and platform != "cpu"
    )
    reason = unusable(decoder.attention, platform, decoder.resolved_head_width, half=half)
    if reason is not None:
        raise ConfigError(f"decoder.attention={decoder.attention} {reason}; use auto")


def check_trained_apart(run: Artifacts, command: str, instead: str) -> None:
    """Refuses joint training where a command is about a memory beside a frozen decoder.

    Raises:
        ConfigError: It is `train.mode=joint`.
    """
    if run.config.train.mode == "joint":
        raise ConfigError(
            f"train.mode=joint: {command} is about a memory beside a frozen decoder "
            f"(train.mode=memory); {instead}"
        )


def check_trains_memory(run: Artifacts, command: str) -> None:
    """Refuses an imported memory where a command trains memories of its own.

    Raises:
        ConfigError: It is set.
    """
    path = run.config.memory.pretrained
    if path is not None:
        raise ConfigError(
            f"memory.pretrained={path}: {command} trains memories, and an "
            "imported one is not trained; `evaluate` compares it with decoder and kNN-LM"
        )


def check_stored_rows(run: Artifacts) -> None:
    """Refuses to train by windows of tokens where the training text has changed.

    Raises:
        ConfigError: Names the key and what is allowed.
    """
    if not (run.corpus.made_with and run.config.decoder_runs):
        return
    joint = run.config.train.mode == "joint"
    asked = "train.mode=joint" if joint else f"train.inputs={run.config.train.inputs}"
    raise ConfigError(
        f"{asked}: the training text was changed (append, remove), and its rows are read as they "
        "are stored: use train.mode=memory with train.inputs=stored"
    )


def check_unchanged_text(run: Artifacts, command: str, why: str) -> None:
    """Refuses a training text that has changed where a command reads it as it was first read.

    Raises:
        ConfigError: It has changed.
    """
    if run.corpus.made_with:
        raise ConfigError(f"{command}: the training text was changed (append, remove), and {why}")


def check_keys(run: Artifacts) -> None:
    """Refuses to search, or to evaluate the kNN-LM, where no keys are stored.

    Raises:
        ConfigError: Names the key and what does without.
    """
    mistakes = list(without_keys(run.config))
    if mistakes:
        raise ConfigError(mistakes)


def check_retrieval(run: Artifacts) -> None:
    """Refuses to search what is not stored, an engine that is not installed, too large a K.

    And memory for search that holds no key shard. How large K may be, and how large key shards are
    at most, is known once there are tokens.

    Raises:
        ConfigError: Names the key, its value and what is allowed.
    """
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.parallel.sharing import process_count
    from mlpmem_jax.retrieval.engine import choose_engine
    from mlpmem_jax.retrieval.estimates import exact_plan, index_plan, routed_plan
    from mlpmem_jax.retrieval.neighbors import check_enough_rows

    config, mistakes, known_rows = run.config, Mistakes(), _training_rows(run)
    num_rows = 0 if known_rows is None else known_rows
    with mistakes.gather():
        check_keys(run)
    if known_rows is not None:
        name = str(run.datastore("train").path)
        with mistakes.gather():
            check_enough_rows(config.retrieval.num_neighbors, num_rows, name)
        with mistakes.gather():
            check_documents(run)
    with mistakes.gather():
        mesh = make_mesh(config.mesh)
        engine = choose_engine(config.retrieval, num_rows, mesh.devices.flat[0].platform).engine
        width, keys_of = config.decoder.width, max(1, num_rows)
        shard_rows = config.datastore.shard_rows
        exact_plan(keys_of, width, shard_rows, config.retrieval, mesh.size, None).check()
        if engine == "scann":
            index_plan(keys_of, width, config.retrieval, process_count(), None).check()
        if engine == "routed":
            routed_plan(keys_of, width, config.retrieval, None).check()
    mistakes.refuse()


def _training_rows(run: Artifacts) -> int | None:
    """Returns the number of training rows; None: it is not known yet."""
    rows = run.datastore("train")
    if run.corpus.made_with:  # Not those of the first text, once some were appended or removed.
        return int(rows.load().counts["rows"]) if rows.is_complete() else None
    if not run.tokens.is_complete():
        return None
    return int(run.tokens.load().counts["train_tokens"]) - 1


def check_documents(run: Artifacts) -> None:
    """Refuses to exclude a row's document where there is no other.

    Raises:
        ConfigError: Names the key and what to change.
    """
    if run.config.retrieval.exclude != "document":
        return
    if int(run.tokens.load().counts["train_documents"]) < 2:
        raise ConfigError(
            "retrieval.exclude=document leaves no row a neighbour: the training split is a single "
            "document; use retrieval.exclude=row, or cut it by corpus.document_regex"
        )


def check_teacher(run: Artifacts) -> None:
    """Refuses a teacher's targets that are not there, or made from other tokens than the run's.

    Raises:
        ArtifactError: Names the artifacts, and their fingerprints.
    """
    config = run.config
    if config.targets.workdir is None:
        return
    manifests = {split: run.targets(split).load() for split in _WITH_TARGETS}
    if not run.tokens.is_complete():
        return
    own = run.tokens.load()
    for split, manifest in manifests.items():
        made_from = manifest.made_from.items()
        theirs = [digest for name, digest in made_from if name.split("/")[0] == "tokens"]
        if theirs != [own.fingerprint]:
            raise ArtifactError(
                f"{run.targets(split).path}: targets.workdir={config.targets.workdir} has targets "
                f"of tokens {theirs[0]}, and {run.tokens.path} is {own.fingerprint}: a teacher "
                "needs the same corpus, splits and tokenizer"
            )
