"""Quality of a memory of fixed size while the datastore grows.

For each size the first rows become a datastore of their own; neighbours are searched and a
memory is trained among these rows alone, with the settings and the steps of the run. The
run itself is the largest size.
"""

from collections.abc import Sequence
from typing import Any

import jax

from mlpmem_jax.evaluation.evaluate_table import SYSTEMS
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_networks
from mlpmem_jax.pipeline.scoring import run_scores
from mlpmem_jax.store.array_specs import SPLITS
from mlpmem_jax.store.manifest import Artifact


def with_rows(run: Artifacts, num_rows: int) -> Artifacts:
    """Returns the artifacts of the part with so many rows of the datastore."""
    # The same inputs for all splits: retrieval compares them.
    inputs = (run.tokens, run.decoder, *(run.datastore(split) for split in SPLITS))
    title = f"{num_rows:,} rows"
    given: dict[str, Artifact] = {}
    for split in SPLITS:
        recipe = {**(run.datastore(split).recipe or {}), "first_rows": num_rows}
        label = f"datastore/{split} [{title}]"
        given[f"datastore/{split}"] = Artifact.of(run.store, "datastore", recipe, inputs, label)
    return run.of(run.config, given=given, title=title)


def measure_quality(
    run: Artifacts, parts: Sequence[tuple[int, Artifacts]], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Scores the memories of all sizes on test.

    Args:
        parts: Rows and artifacts of each finished part, the run itself last.
    """
    sizes = []
    noted: dict[str, list[str]] = {}
    for rows, part in parts:
        scores = run_scores(part, *finished_networks(part, mesh, frozen=True), mesh)
        scored = scores.table(part.config.evaluate, part.config.seed)
        systems = scored["systems"]
        for note in scored["notes"]:
            noted.setdefault(note, []).append(f"{rows:,}")
        sizes.append(
            {
                "rows": rows,
                "test_nats": {name: systems[name]["test_nats"] for name in SYSTEMS},
                "interval": {
                    name: [systems[name]["difference_low"], systems[name]["difference_high"]]
                    for name in SYSTEMS
                },
                "interpolation": {name: systems[name]["interpolation"] for name in SYSTEMS},
                "temperature": systems["knn"]["temperature"],
            }
        )
    notes = [
        note if len(of) == len(sizes) else f"{note} ({', '.join(of)} rows)"
        for note, of in noted.items()
    ]
    return {
        "labels": dict(SYSTEMS),
        "steps": run.config.train.num_steps,
        "sizes": sizes,
        "notes": notes,
    }
