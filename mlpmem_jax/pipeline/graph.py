"""The artifacts of a configuration: what each is made from, and so its id.

The one place that knows the graph of artifacts. Nothing is read but what `Sources` reads.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

from etils import epath

from mlpmem_jax.config.schema import Config
from mlpmem_jax.pipeline import recipes
from mlpmem_jax.pipeline.recipes import Recipe
from mlpmem_jax.pipeline.sources import Sources
from mlpmem_jax.store.array_specs import SPLITS, Split
from mlpmem_jax.store.files import absolute
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.run_record import RunRecord, store_of

Report = Literal[
    "evaluate",
    "analyze",
    "cost",
    "search-quality",
    "evaluate-tasks",
    "compare",
    "overfitting",
    "ablate",
]
_Value = TypeVar("_Value")
_KINDS: dict[Report, str] = {"evaluate": "results", "analyze": "analysis"}


class Artifacts:
    """The artifacts of a configuration, those that are not made yet included.

    Attributes:
        config: The configuration, with the compute dtypes of the devices.
        sources: What is read besides artifacts.
        given: Artifacts by role that take the place of the configuration's own.
        title: Which of several configurations it is, for people.
        workdir: The run directory.
        store: Where artifacts lie; reports lie in the run directory.
    """

    def __init__(
        self,
        config: Config,
        sources: Sources | None = None,
        given: Mapping[str, Artifact] | None = None,
        title: str = "",
    ):
        """Prepares.

        Args:
            config: The configuration, with the compute dtypes of the devices.
            sources: What is read besides artifacts; None: as the run directory remembers it.
            given: Artifacts by role that take the place of the configuration's own: another
                teacher's targets, the memory that joint training begins with.
            title: Which of several configurations it is, for people; shown beside each role.
        """
        self.config = config
        self.sources = sources or Sources(config.workdir, reads=False)
        self.title = title
        self.workdir: epath.Path = absolute(config.workdir)
        self.store = store_of(config.workdir, config.store)
        self.given = dict(given or {})
        self._known: dict[str, Artifact] = {}

    def of(
        self, config: Config, *, given: Mapping[str, Artifact] | None = None, title: str = ""
    ) -> "Artifacts":
        """Returns those of another configuration, with the same sources and given artifacts."""
        kept = self.given if given is None else given
        return Artifacts(config, self.sources, kept, title or self.title)

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

        return self._role("decoder", "decoder", recipe, lambda: (self.tokens,))

    def datastore(self, split: Split) -> Artifact:
        """Keys, inputs, labels and decoder log-probabilities of a split."""
        return self._role(
            f"datastore/{split}",
            "datastore",
            lambda: {"split": split, **recipes.datastore(self.config)},
            lambda: (self.tokens, self.decoder),
        )

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
        """The K nearest training rows of each row; those of valid and test are exact."""
        if split == "train":
            return self._found("neighbors/train", "train")
        return self._role(
            f"neighbors/{split}",
            "neighbors",
            lambda: {"split": split, **recipes.exact_neighbors(self.config)},
            lambda: (self.datastore("train"), self.datastore(split)),
        )

    def neighbors_by_index(self, split: Split) -> Artifact:
        """The same for valid and test, as the engine of the index finds them."""
        return self._found(f"neighbors/{split}-by-index", split)

    def _found(self, role: str, split: Split) -> Artifact:
        return self._role(
            role,
            "neighbors",
            lambda: {"split": split, "by_index": True, **recipes.found_neighbors(self.config)},
            lambda: (self.datastore("train"), self.index, self.datastore(split)),
        )

    @property
    def makes_targets(self) -> bool:
        """Whether targets are made here, not by a teacher in another run directory."""
        return self.config.targets.workdir is None

    def targets(self, split: Split) -> Artifact:
        """Sparse kNN distributions, of this run or of its teacher's."""
        role = f"targets/{split}"
        teacher = self.config.targets.workdir
        if teacher is not None and role not in self.given:
            self.given[role] = self._of_run(role, teacher, f"targets.workdir={teacher}")
        return self._role(
            role,
            "targets",
            lambda: {"split": split, **recipes.targets(self.config)},
            lambda: self._targets_inputs(split),
        )

    def _targets_inputs(self, split: Split) -> list[Artifact]:
        kept = self.config.retrieval.keep_train == "all"
        train, valid = self.datastore("train"), self.datastore("valid")
        if split == "train":
            searched = self.neighbors("train") if kept else self.index
            return [self.tokens, train, searched, valid, self.neighbors("valid")]
        return [self.tokens, train, valid, self.neighbors("valid"), self.targets("train")]

    @property
    def memory(self) -> Artifact:
        """Checkpoints of the memory; in joint training, of the one that it begins with."""
        if self.config.train.mode == "joint" and "memory" not in self.given:
            asked = "train.memory_start=checkpoint"
            self.given["memory"] = self._of_run("memory", self.config.workdir, asked)
        return self._role(
            "memory", "memory", lambda: recipes.trained(self.config), self._memory_inputs
        )

    def _memory_inputs(self) -> list[Artifact]:
        inputs = [self.tokens, self.targets("train"), self.targets("valid"), self.decoder]
        if not self.config.decoder_runs:
            inputs += [self.datastore("train"), self.datastore("valid")]
        return inputs

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
            phases.append(self._role(role, "joint", _always(recipe), _always(inputs)))
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
            self.targets("valid"),
            self.trained,
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


def _always(value: _Value) -> Callable[[], _Value]:
    return lambda: value
