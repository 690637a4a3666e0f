"""The models that `tasks.model` names, of a finished run."""

from typing import Any

from mlpmem_jax.evaluation.timed_decoding import make_search
from mlpmem_jax.generation.language_model import LanguageModel
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.pipeline.evaluate import RESULTS
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.interpolation import interpolation
from mlpmem_jax.pipeline.opened_run import Run
from mlpmem_jax.retrieval.index_builder import ExactCache, open_index
from mlpmem_jax.retrieval.knn_lm import read_labels
from mlpmem_jax.store.files import read_json
from mlpmem_jax.studies.tasks.passages import Passages
from mlpmem_jax.studies.tasks.scoring import KnnMixture, RowScorer
from mlpmem_jax.studies.tasks.text_model import TextModel
from mlpmem_jax.studies.tasks.writing import KnnWriter, SlotWriter


def text_model(
    model: LanguageModel,
    batch_size: int,
    seed: int,
    *,
    knn: KnnMixture | None = None,
    passages: Passages | None = None,
) -> TextModel:
    """Returns a language model as tasks need it, with a kNN-LM or passages if they are given."""
    networks, tokenizer = model.interpolated, model.tokenizer
    writer: SlotWriter | KnnWriter
    if knn is None:
        writer = SlotWriter(model, batch_size)
    else:
        writer = KnnWriter(networks, tokenizer, knn, batch_size)
    scorer = RowScorer(networks, batch_size, knn)
    return TextModel(tokenizer, networks.context_tokens, scorer, writer, seed, passages)


def model_of(artifacts: Artifacts) -> tuple[TextModel, dict[str, Any]]:
    """Opens the model that is configured; returns it with its λ and τ, where it has them."""
    config, run = artifacts.config, Run(artifacts)
    tasks = config.tasks
    about: dict[str, Any] = {"model": tasks.model}
    knn = passages = None
    if tasks.model == "memory":
        about["interpolation"] = weight = interpolation(artifacts)
        model = run.model(weight=weight)
    else:
        model = run.model(with_memory=False)
    if tasks.model == "knn":
        knn, temperature = knn_mixture(artifacts)
        about |= {"interpolation": knn.weight, "temperature": temperature}
    if tasks.model == "rag":
        passages = Passages.of(
            run.tokens("train"), model.tokenizer, tasks.passage_tokens, tasks.passages
        )
        about["passages"] = len(passages.texts)
    return text_model(model, tasks.batch_size, config.seed, knn=knn, passages=passages), about


def knn_mixture(artifacts: Artifacts) -> tuple[KnnMixture, float]:
    """Returns the kNN-LM of a run over its datastore, and τ.

    λ is `generate.interpolation`, or as `evaluate` chose it; τ is as it chose it. Neighbours are
    searched as the index of the run finds them.
    """
    config, train = artifacts.config, artifacts.datastore("train")
    chosen = read_json(artifacts.results.path / RESULTS)["systems"]["knn"]
    given = config.generate.interpolation
    weight = float(chosen["interpolation"] if given == "auto" else given)
    temperature = float(chosen["temperature"])
    exact = ExactCache(train, config.retrieval, config.mesh)
    engine = open_index(artifacts.index, config.retrieval, config.decoder.width, exact)[0]
    num_neighbors = config.retrieval.num_neighbors
    search = make_search(engine, read_labels(train), num_neighbors, temperature, weight)
    site = Site.of(config.datastore.key, config.decoder.num_layers)
    return KnnMixture(search, site, weight), temperature
