"""Recent tokens: those of the document, the row's own first, at every place of a stream."""

import numpy as np
import pytest

from mlpmem_jax.corpus.recent import read_recent, within_document
from mlpmem_jax.input.rows import RecentReader
from mlpmem_jax.store.array_specs import ArraySpec
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.shards import ShardWriter

SEPARATOR = 9
STREAM = np.array([9, 1, 2, 3, 9, 4, 9, 9, 5, 6, 7, 8, 1, 2, 9, 3], np.int32)


class Stream:
    num_tokens = len(STREAM)
    separator_id = SEPARATOR

    def read_windows(self, starts, length):
        place = np.asarray(starts)[:, None] + np.arange(length)
        behind = place >= len(STREAM)
        return np.where(behind, SEPARATOR, STREAM[np.where(behind, 0, place)]).astype(np.int32)


def _plain(row: int, num_recent: int) -> list[int]:
    """Walks back from a row until its document begins."""
    found = []
    while len(found) < num_recent and row >= 0:
        found.append(int(STREAM[row]))
        if STREAM[row] == SEPARATOR:
            break
        row -= 1
    return found + [SEPARATOR] * (num_recent - len(found))


@pytest.mark.parametrize("num_recent", [1, 2, 3, 7, 20])
def test_every_row_of_overlapping_windows(num_recent):
    starts = np.array([0, 1, 3, 5, 8], np.int64)
    found = read_recent(Stream(), starts, 8, num_recent)
    assert found.shape == (5, 8, num_recent) and found.dtype == np.int32
    for window, start in enumerate(starts.tolist()):
        for place in range(8):
            row = start + place
            if row < len(STREAM):
                assert found[window, place].tolist() == _plain(row, num_recent)


def test_what_stood_before_the_document_is_cut_off():
    newest_first = np.array([[3, 9, 2, 1], [9, 4, 9, 3], [5, 6, 7, 8]])
    cut = [[3, 9, 9, 9], [9, 9, 9, 9], [5, 6, 7, 8]]
    assert within_document(newest_first, SEPARATOR).tolist() == cut


@pytest.mark.parametrize("num_recent", [1, 2, 5, 20])
def test_stored_labels_give_what_the_tokens_give(tmp_path, num_recent):
    """Token n is the label of row n − 1, also in shifted windows and behind the last row."""
    label_N = STREAM[1:]
    artifact = Artifact(tmp_path, "datastore/base/train", "datastore")
    artifact.begin({})
    writer = ShardWriter(artifact.path, {"label": ArraySpec((), np.int32, 8, 4)}, len(label_N))
    for rows in writer.own_rows():
        writer.put(rows.start, {"label": label_N[rows]})
    artifact.finish(arrays=writer.close())
    starts = np.array([0, 1, 3, 7, 12, 15], np.int64)
    found = RecentReader(artifact, num_recent, SEPARATOR).start(starts, 8).result()["recent"]
    expected = read_recent(Stream(), starts, 8, num_recent)
    exists = starts[:, None] + np.arange(8) < len(label_N)
    np.testing.assert_array_equal(found[exists], expected[exists])


def test_a_memory_of_the_paper_reads_no_tokens(tmp_path):
    artifact = Artifact(tmp_path, "datastore/none/train", "datastore")
    assert RecentReader(artifact, 0, SEPARATOR).start(np.array([0]), 4).result() == {}
