"""Quality of a memory of fixed size while the datastore grows.

For each size the first rows become a datastore of their own; neighbours are searched and a
memory is trained among these rows alone, with the settings and the steps of the run. The
run itself is the largest size.
"""

from collections.abc import Sequence
from typing import Any

import jax

from mlpmem_jax.config.schema import Config
from mlpmem_jax.evaluation.evaluate_table import SYSTEMS
from mlpmem_jax.pipeline.scoring import run_scores
from mlpmem_jax.training.networks import finished_networks


def with_rows(config: Config, num_rows: int) -> Config:
    """Returns the configuration of the part with so many rows, with names of its own."""
    ending = f"-rows-{num_rows}"

    def renamed(name: str) -> Any:
        section = getattr(config, name)
        return section.model_copy(update={"name": section.name + ending})

    retrieval = config.retrieval.model_copy(
        update={"name": config.retrieval_name + ending, "exact_name": config.exact_name + ending}
    )
    names = {name: renamed(name) for name in ("datastore", "targets", "memory")}
    return config.model_copy(update={"retrieval": retrieval, **names})


def measure_quality(
    config: Config, parts: Sequence[tuple[int, Config]], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Scores the memories of all sizes on test.

    Args:
        config: The whole configuration.
        parts: Rows and configuration of each finished part, the run itself last.
        mesh: Devices.
    """
    sizes = []
    noted: dict[str, list[str]] = {}
    for rows, part in parts:
        scores = run_scores(part, *finished_networks(part, mesh), mesh)
        scored = scores.table(part.evaluate, part.seed)
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
        "steps": config.train.num_steps,
        "sizes": sizes,
        "notes": notes,
    }
