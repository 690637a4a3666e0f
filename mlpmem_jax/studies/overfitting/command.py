"""Does it overfit? Test nats by epoch, for a decoder and a memory trained for long.

Each is one training run whose checkpoints are kept at the end of every epoch; the learning
rate follows the schedule of the whole run.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline.checks import check_trained_apart, check_trains_memory
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.reports import print_files, write_files
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.studies.overfitting import epochs
from mlpmem_jax.studies.overfitting.epochs import LABELS, row_key
from mlpmem_jax.studies.tables.part_scores import Part
from mlpmem_jax.studies.tables.rows import Row
from mlpmem_jax.studies.tables.runner import (
    RowsBySeed,
    Work,
    interval_settings,
    rows_stage,
    run_suite,
)
from mlpmem_jax.studies.tables.seed_plan import SeedPlan, model_parts
from mlpmem_jax.studies.tables.variants import changed_variant

RESULTS = "overfitting.json"
MEASURED = "measured.json"
TABLE = "overfitting.csv"
DOCUMENTS = "documents.csv"
PICTURE = "overfitting.png"

Network = Literal["decoder", "memory"]
_SECTIONS: dict[Network, Literal["pretrain", "train"]] = {"decoder": "pretrain", "memory": "train"}
_REFERENCE = "decoder"


def epoch_ends(run: Artifacts, network: Network) -> list[int]:
    """Returns the step at the end of each epoch.

    Before there are tokens the length of an epoch is not known; that of the configured
    training then stands for it, so that a plan can be shown.
    """
    config, tokens = run.config, run.tokens
    section = getattr(config, _SECTIONS[network])
    window = {"decoder": config.pretrain_window_tokens, "memory": config.train_window_tokens}
    per_epoch = int(section.num_steps)
    if tokens.is_complete():
        num_rows = int(tokens.load().counts["train_tokens"]) - 1
        per_epoch = max(1, round(num_rows / (window[network] * section.batch_size)))
    num_epochs = {
        "decoder": config.overfitting.decoder_epochs,
        "memory": config.overfitting.memory_epochs,
    }[network]
    return [per_epoch * epoch for epoch in range(1, num_epochs + 1)]


def _trained_long(plan: SeedPlan, network: Network) -> list[Part]:
    """Returns the network after each epoch of one long run."""
    config, section = plan.base.config, _SECTIONS[network]
    ends = epoch_ends(plan.base.run, network)
    overrides: dict[str, Any] = {
        f"{section}.num_steps": ends[-1],
        f"{section}.checkpoint_interval_steps": ends[0],
        f"{section}.keep_checkpoints": len(ends),
    }
    if getattr(config, section).optimizer.warmup_of(ends[-1]) > ends[-1]:
        overrides[f"{section}.optimizer.warmup_steps"] = ends[-1] // 2
    variant = changed_variant(plan.base, overrides, f"{network} by epoch")
    variant = variant.keeping(network, ends)
    return [Part(network, variant, step=step) for step in ends]


def seed_rows(plan: SeedPlan) -> list[Row]:
    """Returns the rows of one seed: the configured decoder, and every epoch."""
    rows = [Row(_REFERENCE, "decoder", (plan.decoder,))]
    for epoch, part in enumerate(_trained_long(plan, "decoder"), 1):
        rows.append(Row(row_key("decoder", epoch), f"decoder, epoch {epoch}", (part,)))
    for epoch, part in enumerate(_trained_long(plan, "memory"), 1):
        with_decoder, alone = model_parts(part.variant, part.step), (part,)
        rows.append(Row(row_key("memory", epoch), f"+ memory, epoch {epoch}", with_decoder))
        rows.append(Row(row_key("memory_alone", epoch), f"memory alone, epoch {epoch}", alone))
    return rows


def works(run: Artifacts) -> list[Work]:
    """Returns the two long runs of every seed, and their scores."""
    found = []
    for seed in run.config.overfitting.seeds:
        plan = SeedPlan(run.config, seed, run.sources)
        for network in ("decoder", "memory"):
            title = f"seed {seed}, {network} by epoch"
            found.append(Work(title, functools.partial(_stages, plan, network)))
    return found


def _stages(plan: SeedPlan, network: str) -> list[Stage]:
    rows = [row for row in seed_rows(plan) if row.key.startswith(network)]
    return [stage for row in rows for stage in row.stages()]


def table_stage(run: Artifacts) -> Stage:
    """Returns the stage that makes the table."""
    config = run.config
    plans = {seed: SeedPlan(config, seed, run.sources) for seed in config.overfitting.seeds}
    rows = {seed: seed_rows(plan) for seed, plan in plans.items()}
    return rows_stage(run, "overfitting", {"overfitting": rows}, {}, _build)


def _build(run: Artifacts, artifact: Artifact, tables: Mapping[str, RowsBySeed]) -> Completion:
    from mlpmem_jax.studies.tables.assemble import table_costs, table_results
    from mlpmem_jax.studies.tables.report import documents_csv

    rows = tables["overfitting"]
    ends = {network: epoch_ends(run, network) for network in _SECTIONS}
    steps = {
        "decoder": ends["decoder"],
        "memory": ends["memory"],
        "memory_alone": ends["memory"],
    }
    assert list(steps) == list(LABELS)
    settings = interval_settings(run, _REFERENCE, family=epochs.last_against_best(steps))
    found = table_results(run, rows, settings)
    reference = next(row for row in found["rows"] if row["key"] == _REFERENCE)
    names = ("seeds", "confidence", "bootstrap_samples", "valid", "test", "notes")
    results = {name: found[name] for name in names} | {
        "reference_nats": reference["test_nats"]["value"],
        "networks": epochs.by_epoch(found, steps),
    }
    files = {
        RESULTS: results,
        MEASURED: table_costs(run, rows, with_costs=False),
        TABLE: epochs.as_csv(results),
        DOCUMENTS: documents_csv(found["documents"]),
        PICTURE: epochs.draw(results),
    }
    write_files(artifact.path, files)
    counts = {"test_tokens": results["test"]["tokens"]}
    return Completion(counts=counts, files=[RESULTS, TABLE, DOCUMENTS])


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    config = run.config
    check_trained_apart(run, "overfitting", "nats by epoch of joint training are not made")
    if config.decoder.pretrained is not None:
        raise ConfigError(
            f"decoder.pretrained={config.decoder.pretrained}: overfitting trains a decoder, and an "
            "imported one is not trained further"
        )
    if config.memory.gate == "fitted":
        raise ConfigError(
            "memory.gate=fitted is fitted after the last step, and overfitting scores the end of "
            "every epoch: use memory.gate=none"
        )
    check_trains_memory(run, "overfitting")
    table = functools.partial(table_stage, run)
    return run_suite("overfitting", run, options, works(run), table, _print)


def _print(artifact: Artifact) -> None:
    print_files(artifact, (RESULTS, TABLE, DOCUMENTS, PICTURE), epochs.as_text)
