"""The artifacts of a configuration: what each is made from, and so its id.

The one place that knows the graph of artifacts. Nothing is read but what `Sources` reads.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from etils import epath

from mlpmem_jax.config.schema import Config
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline import changed, exact_sample, recipes
from mlpmem_jax.pipeline.corpus_record import CorpusRecord
from mlpmem_jax.pipeline.recipes import Recipe
from mlpmem_jax.pipeline.sources import Sources
from mlpmem_jax.store.array_specs import SPLITS, Split
from mlpmem_jax.store.files import absolute
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.run_record import RunRecord, store_of

Report = Literal[
    "evaluate", "analyze", "cost", "search-quality", "evaluate-tasks", "compare", "overfitting",
    "ablate",
]  # fmt: skip
_KINDS: dict[Report, str] = {"evaluate": "results", "analyze": "analysis"}


class Artifacts:
    """The artifacts of a configuration, those that are not made yet included.

    Attributes:
        config: The configuration, with the compute dtypes of the devices.
        sources: What is read besides artifacts.
        given: Artifacts by role that take the place of the configuration's own.
        corpus: How the training text has changed.
        title: Which of several configurations it is, for people.
        store: Where artifacts lie; reports lie in the run directory.
    """

    def __init__(
        self,
        config: Config,
        sources: Sources | None = None,
        given: Mapping[str, Artifact] | None = None,
        title: str = "",
        corpus: CorpusRecord | None = None,
    ):
        """Prepares.

        Args:
            config: The configuration, with the compute dtypes of the devices.
            sources: What is read besides artifacts; None: as the run directory remembers it.
            given: Artifacts by role in place of the configuration's own: a teacher's targets.
            title: Which of several configurations it is, for people; shown beside each role.
            corpus: How the training text has changed; None: as the run directory records it.
        """
        self.config = config
        self.sources = sources or Sources(config.workdir, reads=False)
        self.title = title
        self.workdir: epath.Path = absolute(config.workdir)
        self.store = store_of(config.workdir, config.store)
        self.corpus = CorpusRecord.read(config.workdir) if corpus is None else corpus
        compacted = {
            role: Artifact(self.store, relative, relative.split("/")[0], label=self._label(role))
            for role, relative in self.corpus.start.items()
            if not self.corpus.changes
        }
        self.given = {**compacted, **(given or {})}
        self._known: dict[str, Artifact] = {}

    def of(
        self, config: Config, *, given: Mapping[str, Artifact] | None = None, title: str = ""
    ) -> "Artifacts":
        """Returns those of another configuration, with the same sources and given artifacts."""
        kept = self.given if given is None else given
        corpus = self.corpus if config.workdir == self.config.workdir else None
        return Artifacts(config, self.sources, kept, title or self.title, corpus)

    def with_corpus(self, corpus: CorpusRecord, title: str = "") -> "Artifacts":
        """Returns the artifacts of the same configuration where the text changed in another way."""
        return Artifacts(self.config, self.sources, None, title or self.title, corpus)

    @functools.cached_property
    def before(self) -> "Artifacts":
        """The artifacts before the last change of the training text."""
        return self.with_corpus(self.corpus.before, f"{changed.BEFORE}{len(self.corpus.changes)}")

    def with_given(self, given: Mapping[str, Artifact]) -> "Artifacts":
        """Returns the same artifacts but for some that are given, and what is made from them."""
        return self.of(self.config, given={**self.given, **given})

    def titled(self, title: str) -> "Artifacts":
        """Returns the same with another title."""
        return self.of(self.config, title=title)

    def _of_run(self, role: str, workdir: str, asked: str) -> Artifact:
        """Returns an artifact that a work directory uses now, or used when `train` began with it.

        Where it has none, one that is refused when it is read.
        """
        record = RunRecord.read(workdir)
        about = [role, str(absolute(workdir)), recipes.trained(self.config)]
        relative = self.sources.used(about, record.roles.get(role))
        label = role if relative is not None else f"{role} ({asked})"
        root = store_of(record.workdir, record.store)
        return Artifact(root, relative or role, role.split("/")[0], label=label)

    def _role(
        self,
        role: str,
        kind: str,
        recipe: Callable[[], Recipe],
        inputs: Callable[[], Sequence[Artifact]] = tuple,
    ) -> Artifact:
        """Returns the artifact of a role: a given one, or by its recipe and its inputs."""
        if role in self.given:
            return self.given[role]
        if role not in self._known:
            label = self._label(role)
            self._known[role] = Artifact.of(self.store, kind, recipe(), inputs(), label)
        return self._known[role]

    def _label(self, role: str) -> str:
        return f"{role} [{self.title}]" if self.title else role

    @property
    def tokenizer(self) -> Artifact:
        """tokenizer.json."""
        config = self.config

        def recipe() -> Recipe:
            if config.tokenizer.path is None:
                return recipes.tokenizer(config, self.sources.text(config.corpus), None)
            return recipes.tokenizer(config, None, self.sources.tokenizer(config.tokenizer))

        return self._role("tokenizer", "tokenizer", recipe)

    @property
    def tokens(self) -> Artifact:
        """The three splits: token ids, document offsets, byte and word counts."""
        text = self.config.corpus
        return self._role(
            "tokens", "tokens", lambda: self.sources.text(text), lambda: (self.tokenizer,)
        )

    @property
    def decoder(self) -> Artifact:
        """Checkpoints of the decoder."""
        path = self.config.decoder.pretrained

        def recipe() -> Recipe:
            weights = None if path is None else self.sources.weights(path)
            return recipes.decoder(self.config, weights)

        return self._role("decoder", "decoder", recipe, self._decoder_inputs)

    def _decoder_inputs(self) -> Sequence[Artifact]:
        alpha = self.config.pretrain.alpha
        if not alpha:
            return (self.tokens,)
        if self.makes_targets and "targets/train" not in self.given:
            raise ConfigError(
                f"pretrain.alpha={alpha}: a decoder cannot learn from targets that are made with "
                "it; set targets.workdir to the run of another decoder (in compare: a row with "
                "parts=decoder or beside learns from the configuration's targets)"
            )
        return (self.tokens, self.targets("train"), self.targets("valid"))

    def datastore(self, split: Split) -> Artifact:
        """Keys, inputs, labels and decoder log-probabilities of a split."""
        if split == "train" and self.corpus.made_with:
            changed.check_made_with(self)
        if split == "train" and self.corpus.changes:
            recipe = functools.partial(changed.rows_recipe, self)
            return self._role("datastore/train", "datastore", recipe, self._changed_inputs)
        return self._role(
            f"datastore/{split}",
            "datastore",
            lambda: {"split": split, **recipes.datastore(self.config)},
            lambda: (self.tokens, self.decoder),
        )

    def _changed_inputs(self) -> Sequence[Artifact]:
        rows = self.before.datastore("train")
        return (rows, self.segment) if self.corpus.changes[-1].kind == "append" else (rows,)

    @property
    def segment_tokens(self) -> Artifact:
        """The tokens of the text that the last change appended."""
        return self._role(
            f"tokens/{self.segment_name}",
            "tokens",
            lambda: {**self.corpus.changes[-1].text, "segment": True},
            lambda: changed.segment_inputs(self),
        )

    @property
    def segment(self) -> Artifact:
        """Their rows: keys, inputs, labels and decoder log-probabilities."""
        return self._role(
            f"datastore/{self.segment_name}",
            "datastore",
            lambda: {"split": "train", **recipes.datastore(self.config)},
            lambda: (self.segment_tokens, self.decoder),
        )

    @property
    def segment_name(self) -> str:
        """How people know what the last change appended."""
        return f"segment-{len(self.corpus.changes)}"

    @property
    def index(self) -> Artifact:
        """The neighbour index over the training split's keys."""
        return self._role(
            "index",
            "index",
            lambda: recipes.index(self.config),
            lambda: (self.datastore("train"),),
        )

    def neighbors(self, split: Split) -> Artifact:
        """The K nearest training rows of each row, as `retrieval.exact_rows` says."""
        if self.corpus.changes:
            return self._updated(split)
        if self.config.retrieval.searches_by_index(split):
            return self._found(f"neighbors/{split}", split)
        return self._role(
            f"neighbors/{split}",
            "neighbors",
            lambda: {"split": split, **recipes.exact_neighbors(self.config)},
            lambda: (self.datastore("train"), self.datastore(split)),
        )

    def _updated(self, split: Split) -> Artifact:
        """Neighbours that follow from those before the last change of the training text.

        These are named by the recipe and are no input, so that they can be removed once the new
        ones are there: lists are as large as the keys.
        """
        before = self.before
        queries = () if split == "train" else (self.datastore(split),)
        return self._role(
            f"neighbors/{split}",
            "neighbors",
            lambda: changed.neighbors_recipe(self, split),
            lambda: (before.datastore("train"), self.datastore("train"), *queries),
        )

    def neighbors_by_index(self, split: Split) -> Artifact:
        """The same for valid and test, as the engine of the index finds them."""
        return self._found(f"neighbors/{split}-by-index", split)

    def _found(self, role: str, split: Split) -> Artifact:
        return self._role(
            role,
            "neighbors",
            lambda: {
                "split": split,
                "by_index": True,
                **recipes.found_neighbors(self.config, split),
            },
            lambda: self._found_inputs(split),
        )

    def _found_inputs(self, split: Split) -> list[Artifact]:
        inputs = [self.datastore("train"), self.index, self.datastore(split)]
        excludes = split == "train" and self.config.retrieval.excludes_more
        return [*inputs, self.tokens] if excludes else inputs

    @property
    def makes_targets(self) -> bool:
        """Whether targets are made here, not by a teacher in another run directory."""
        return self.config.targets.workdir is None

    def targets(self, split: Split) -> Artifact:
        """Sparse next-token distributions, of this run or of its teacher's."""
        role = f"targets/{split}"
        teacher = self.config.targets.workdir
        if teacher is not None and role not in self.given:
            self.given[role] = self._of_run(role, teacher, f"targets.workdir={teacher}")
        return self._role(
            role,
            "targets",
            lambda: recipes.targets(self.config, split, self.sources.arrow(self.config, split)),
            lambda: self._targets_inputs(split),
        )

    def _targets_inputs(self, split: Split) -> list[Artifact]:
        if self.config.targets.teacher != "knn":
            return [self.tokens]
        kept = self.config.retrieval.keep_train == "all"
        train, valid = self.datastore("train"), self.datastore("valid")
        if split == "train":
            searched = self.neighbors("train") if kept else self.index
            return [self.tokens, train, searched, valid, self.neighbors("valid")]
        return [self.tokens, train, valid, self.neighbors("valid"), self.targets("train")]

    @property
    def memory(self) -> Artifact:
        """Checkpoints of the memory; in joint training, of the one that it begins with."""
        path = self.config.memory.pretrained
        is_joint = self.config.train.mode == "joint"
        if is_joint and path is None and "memory" not in self.given:
            asked = "train.memory_start=checkpoint"
            self.given["memory"] = self._of_run("memory", self.config.workdir, asked)

        def recipe() -> Recipe:
            if path is None:
                return recipes.trained(self.config)
            return recipes.imported_memory(self.config, self.sources.weights(path))

        return self._role("memory", "memory", recipe, self._memory_inputs)

    def _memory_inputs(self) -> list[Artifact]:
        if self.config.memory.pretrained is not None:
            return [self.tokens, self.decoder]
        inputs = [self.tokens, self.targets("train"), self.targets("valid"), self.decoder]
        if not self.config.decoder_runs:
            inputs += [self.datastore("train"), self.datastore("valid")]
        return inputs + ([changed.memory_before(self)] if self.config.continues_memory else [])

    @property
    def joint(self) -> Artifact:
        """Checkpoints of decoder and memory, trained together."""
        return self.joint_phases[-1]

    @property
    def phase_stops(self) -> tuple[int, ...]:
        """Steps at which the phases of joint training end: between two, targets are refreshed."""
        last, interval = self.config.train.num_steps, self.config.train.refresh_interval_steps
        return (*(range(interval, last, interval) if interval else ()), last)

    @property
    def joint_phases(self) -> list[Artifact]:
        """Checkpoints at the end of each phase of joint training, each made from the one before.

        The refreshed targets that a phase learns from follow from the phases before it.
        """
        phases: list[Artifact] = []
        for stop in self.phase_stops:
            is_last = stop == self.phase_stops[-1]
            recipe = recipes.trained(self.config) | ({} if is_last else {"stop": stop})
            inputs = [self.tokens, phases[-1]] if phases else self._joint_inputs()
            role = "joint" if is_last else f"joint/step-{stop}"
            made_of: Callable[[], list[Artifact]] = functools.partial(list, inputs)
            phases.append(self._role(role, "joint", functools.partial(dict, recipe), made_of))
        return phases

    def _joint_inputs(self) -> list[Artifact]:
        train = self.config.train
        found = [self.tokens, self.targets("train"), self.targets("valid")]
        found += [self.decoder] if train.decoder_start == "checkpoint" else []
        return found + ([self.memory] if train.memory_start == "checkpoint" else [])

    @property
    def trained(self) -> Artifact:
        """What `train` makes."""
        return self.joint if self.config.train.mode == "joint" else self.memory

    @property
    def results(self) -> Artifact:
        """The table of `evaluate` as JSON, CSV and picture."""
        inputs = (
            self.tokens,
            self.decoder,
            *(self.datastore(split) for split in SPLITS),
            self.index,
            self.neighbors("valid"),
            self.neighbors("test"),
            *exact_sample.artifacts(self),
            self.targets("valid"),
            self.trained,
            *changed.held_out_inputs(self),
        )
        return self.report("evaluate", recipes.results(self.config), inputs)

    def scores(self, recipe: Recipe, inputs: Sequence[Artifact], role: str) -> Artifact:
        """Returns log-probabilities that a model gives the labels of a split."""
        return Artifact.of(self.store, "scores", recipe, inputs, self._label(role))

    @property
    def machine(self) -> Artifact:
        """What the machine can do in a second, measured once for a run directory."""
        return Artifact(self.workdir, "machine", "machine", recipe={}, label="machine")

    def report(self, command: Report, recipe: Recipe, inputs: Sequence[Artifact]) -> Artifact:
        """Returns the tables and pictures of a command, in the run directory."""
        kind = _KINDS.get(command, str(command))
        name = Artifact.of(self.store, kind, recipe, inputs).path.name
        return Artifact(
            self.workdir,
            f"results/{command}-{name}",
            kind,
            recipe=recipe,
            inputs=inputs,
            label=f"results/{command}",
        )
