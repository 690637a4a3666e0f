"""What a run starts from: text, a given tokenizer, pretrained weights, each by its content."""

import functools
from collections.abc import Callable
from typing import Any

from mlpmem_jax.config.data import CorpusConfig, TokenizerConfig
from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus.digests import Digests
from mlpmem_jax.corpus.stream import Corpus
from mlpmem_jax.corpus.tokenizer import TextTokenizer, read_tokenizer
from mlpmem_jax.store.checked_json import fingerprint_of
from mlpmem_jax.store.run_record import RunRecord


class Sources:
    """Digests of what a run reads that is no artifact, each taken once.

    Commands that do not read text take what the work directory remembers (`run.json`): its
    artifacts can be used where the text, or the files of a pretrained decoder, are gone.

    Attributes:
        found: What was found, by the settings that name it; for `run.json`.
        trains: Whether training begins, with what work directories use now.
        is_blind: Whether it stands for what cannot be read, so that ids mean nothing.
    """

    is_blind = False

    def __init__(self, workdir: str, *, reads: bool):
        """Prepares.

        Args:
            reads: Whether files are read again, rather than remembered.
        """
        self._workdir = workdir
        self._reads = reads
        self._given: dict[str, TextTokenizer] = {}
        self.found: dict[str, Any] = {}
        self.trains = False

    @functools.cached_property
    def digests(self) -> Digests:
        """Digests of the files of the corpus."""
        return Digests(self._workdir)

    @functools.cached_property
    def _known(self) -> dict[str, Any]:
        return dict(RunRecord.read(self._workdir).sources)

    def text(self, corpus: CorpusConfig) -> dict[str, Any]:
        """Returns the settings that decide documents and splits, and a digest of the text.

        Raises:
            UserError: Files are missing or cannot be read.
        """
        read = corpus.model_dump(mode="json", exclude={"attention", *_not_set(corpus)})
        return self._content(
            ["text", read],
            lambda: {
                "corpus": _settings(corpus),
                "listing": self.digests.listing_of(Corpus(corpus).parts, corpus.max_bytes),
            },
        )

    def tokenizer(self, config: TokenizerConfig) -> str:
        """Returns a digest of the tokenizer that `tokenizer.path` names.

        Raises:
            UserError: It is missing, or not one that can be used.
        """
        key = ["tokenizer", config.path, config.separator]
        return self._content(key, lambda: self.given_tokenizer(config).content_digest())

    def given_tokenizer(self, config: TokenizerConfig) -> TextTokenizer:
        """Reads the tokenizer that `tokenizer.path` names.

        Raises:
            UserError: It is missing, or not one that can be used.
        """
        assert config.path is not None
        key = f"{config.path} {config.separator}"
        if key not in self._given:
            self._given[key] = read_tokenizer(config.path, config.separator)
        return self._given[key]

    def weights(self, path: str, *, again: bool = False) -> str:
        """Returns a digest of the tensors of a pretrained decoder or memory.

        Args:
            path: Their directory, GGUF file or Hub id.
            again: Whether they are read even where a digest of them is remembered.

        Raises:
            UserError: They are missing or damaged.
        """
        from mlpmem_jax.interop.gguf import tensor_files

        return self._content(["weights", path], lambda: tensor_files(path).digest(), again=again)

    def arrow(self, config: Config, split: str, *, again: bool = False) -> str | None:
        """Returns a digest of the files with a split's targets; None: targets are not read.

        Args:
            config: The configuration.
            split: The split.
            again: Whether they are read even where a digest of them is remembered.

        Raises:
            UserError: There are none.
        """
        path = config.targets.arrow_of(split)
        if path is None:
            return None
        from mlpmem_jax.interop.tensors import digest_of
        from mlpmem_jax.retrieval.arrow_files import arrow_files

        files = str(path)
        read = self._content(["arrow", files], lambda: digest_of(arrow_files(files)), again=again)
        return str(read)

    def used(self, about: list[Any], now: str | None) -> str | None:
        """Returns which artifact of a work directory training began with.

        `train` takes the one of now; commands that come after it take the same one, whatever has
        been made there since.

        Args:
            about: Role, work directory and what is trained.
            now: The one that the work directory uses now; None: it has none.
        """
        name = fingerprint_of(["used", *about])
        if name not in self.found:
            known = None if self._reads or self.trains else self._known.get(name)
            if (now if known is None else known) is None:
                return None
            self.found[name] = now if known is None else known
        return str(self.found[name])

    def _content(self, key: list[Any], read: Callable[[], Any], *, again: bool = False) -> Any:
        name = fingerprint_of(key)
        if name not in self.found:
            known = None if self._reads or again else self._known.get(name)
            self.found[name] = read() if known is None else known
        return self.found[name]


class Unread(Sources):
    """Stands for text and files that cannot be read: with it, roles can be asked for, not ids."""

    is_blind = True

    def __init__(self, workdir: str):
        super().__init__(workdir, reads=False)

    def _content(self, key: list[Any], read: Callable[[], Any], **_: Any) -> Any:
        return {}


def _settings(corpus: CorpusConfig) -> dict[str, Any]:
    """Returns what decides the tokens beside the content of the files, wherever these lie.

    Attention decides what the decoder sees, not what the tokens are.
    """
    ours = {"attention", "paths", "train", "valid", "test", *_not_set(corpus)}
    settings = {key: value for key, value in corpus.recipe().items() if key not in ours}
    more = [{k: v for k, v in source.items() if k != "paths"} for source in settings["more"]]
    return {**settings, "more": more}


def _not_set(corpus: CorpusConfig) -> set[str]:
    """Returns keys without effect: with them, text had another id than before they were there."""
    return {"near_duplicates"} if corpus.near_duplicates is None else set()
