"""How many rows a corpus will have, before there are tokens: for plans and what they refuse."""

import functools
from collections.abc import Mapping

from mlpmem_jax.config.data import CorpusConfig
from mlpmem_jax.corpus.digests import stamp_of
from mlpmem_jax.corpus.sources import find_parts
from mlpmem_jax.store.array_specs import SPLITS, Split
from mlpmem_jax.store.manifest import Artifact

# Of text; vocabularies of 4 k entries on source code have 3.4, of 50 k on English 4.4.
BYTES_PER_TOKEN = 3
# More than any vocabulary makes of text; records hold other fields beside it.
_MOST_BYTES_PER_TOKEN = {"jsonl": 32}
UNKNOWN_ROWS = "known once there are tokens"
Rows = Mapping[Split, int]


def count_rows(corpus: CorpusConfig, tokens: Artifact, split: Split) -> tuple[int, bool] | None:
    """Returns the rows of a split, and whether they are known rather than guessed.

    Before there are tokens they are guessed from the bytes of the files.

    Args:
        tokens: Their tokens, finished or not.

    Returns:
        None where nothing can be said beforehand, as of a remote dataset.

    Raises:
        UserError: The sources of the corpus match nothing.
    """
    if tokens.is_complete():
        return max(0, int(tokens.load().counts[f"{split}_tokens"]) - 1), True
    num_bytes = _split_bytes(corpus)[split]
    return (num_bytes // BYTES_PER_TOKEN, False) if num_bytes else None


def likely_rows(corpus: CorpusConfig, tokens: Artifact) -> Rows:
    """Returns the rows of each split: known, or guessed; 0 where nothing can be said."""
    counted = {split: count_rows(corpus, tokens, split) for split in SPLITS}
    return {split: one[0] if one else 0 for split, one in counted.items()}


def least_rows(corpus: CorpusConfig, tokens: Artifact) -> Rows:
    """Returns how many rows each split has at least, by which needs are refused."""
    if tokens.is_complete():
        return likely_rows(corpus, tokens)
    sources = (corpus, *corpus.more)
    most = max(_MOST_BYTES_PER_TOKEN.get(source.source, 8) for source in sources)
    weight = min(source.weight for source in sources)
    guessed = likely_rows(corpus, tokens).items()
    return {split: int(rows * BYTES_PER_TOKEN * weight / most) for split, rows in guessed}


def rows_entry(rows: int, known: bool) -> dict[str, int]:
    """Returns rows as an entry of a plan."""
    return {"rows" if known else "rows, about (by size of text)": rows}


@functools.lru_cache(maxsize=8)
def _split_bytes(corpus: CorpusConfig) -> dict[Split, int]:
    """Returns the bytes of text of each split, by the sizes of files and the fractions."""
    fractions: dict[Split, float] = {
        "valid": corpus.valid_fraction,
        "test": corpus.test_fraction,
    }
    fractions["train"] = 1 - sum(fractions.values())
    limit = corpus.max_bytes
    found: dict[Split, int] = dict.fromkeys(fractions, 0)
    drawn = 0
    for part in find_parts(corpus):
        num_bytes = sum(stamp_of(path)[0] for path in part.files if not part.is_dataset)
        if part.split is None:
            drawn += num_bytes
        else:
            found[part.split] += num_bytes if limit is None else min(num_bytes, limit)
    if limit is not None:
        drawn = min(drawn, limit)
    for split, fraction in fractions.items():
        found[split] += int(drawn * fraction)
    return found
