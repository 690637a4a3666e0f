"""Targets in Arrow files: what is read, and what is refused in one line."""

import sys

import numpy as np
import pytest

from mlpmem_jax.errors import UserError
from mlpmem_jax.retrieval.arrow_files import ArrowFiles

VOCAB = 20
# Tokens, probabilities and label of each row.
ROWS = [([3, 7, 1], [0.5, 0.25, 0.25], 7), ([0], [1.0], 19), ([19, 4], [0.75, 0.25], 2)]


@pytest.fixture
def write(tmp_path):
    """Returns a writer of files, a batch for two rows."""
    arrow = pytest.importorskip("pyarrow", reason="Arrow files are written with pyarrow")

    def write(rows=ROWS, name="data.arrow", form="stream", prob=None, **changed):
        types = {
            "id_cnt": arrow.int32(),
            "token_id": arrow.list_(arrow.int32()),
            "prob": arrow.list_(prob or arrow.float16()),
            "label": arrow.int32(),
        }
        columns = {
            "id_cnt": [len(ids) for ids, _, _ in rows],
            "token_id": [ids for ids, _, _ in rows],
            "prob": [np.asarray(probs, np.float16) for _, probs, _ in rows],
            "label": [label for _, _, label in rows],
        } | changed
        if prob is not None:
            columns["prob"] = [np.asarray(probs, np.float32) for _, probs, _ in rows]
        arrays = [arrow.array(columns[key], types[key]) for key in types if columns[key]]
        table = arrow.table(arrays, names=[key for key in types if columns[key]])
        new = arrow.ipc.new_stream if form == "stream" else arrow.ipc.new_file
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return tmp_path / name

    return write


@pytest.mark.parametrize("form", ["stream", "file"])
def test_rows_of_several_files_are_read_in_order(write, tmp_path, form):
    write(ROWS[:2], "b-00000.arrow", form)
    write(ROWS[2:] + ROWS, "b-00001.arrow", form)
    files = ArrowFiles(str(tmp_path), "targets.train_arrow")
    files.check()
    assert files.num_rows() == 6
    batches = list(files.batches(VOCAB))
    rows = ROWS + ROWS
    ids, probs = (np.concatenate([row[i] for row in rows]) for i in (0, 1))
    for name, expected in (
        ("count_M", [len(row[0]) for row in rows]),
        ("id_E", ids),
        ("prob_E", probs),
        ("label_M", [row[2] for row in rows]),
    ):
        found = np.concatenate([getattr(batch, name) for batch in batches])
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("row", "changed", "message"),
    [
        (([3, 20], [0.5, 0.5], 1), {}, r"row 3 has token 20; the vocabulary has 20"),
        (([-1, 2], [0.5, 0.5], 1), {}, r"row 3 has token -1;"),
        (([3, 2], [0.25, 0.75], 1), {}, r"row 3 has probabilities that are not in descending"),
        (([3, 2], [0.5, 0.25], 1), {}, r"row 3 has probabilities that sum to 0\.75"),
        (([3, 2], [1.5, -0.5], 1), {}, r"row 3 has probabilities that sum to 1, or negative"),
        (([3], [np.nan], 1), {}, r"row 3 has probabilities that sum to nan"),
        (([], [], 1), {}, r"row 3 has probabilities that sum to 0"),
        (([2, 2], [0.5, 0.5], 1), {}, r"row 3 has token 2 twice"),
        (([3, 2], [1.0], 1), {}, r"row 3 has another number of tokens or probabilities"),
        (([3], [1.0], 1), {"id_cnt": [3, 1, 2, 2]}, r"row 3 has another number"),
        (([3], [1.0], 1), {"label": None}, r"data.arrow has the columns id_cnt int32, .*; needed"),
    ],
)
def test_a_row_that_is_no_distribution_is_refused(write, row, changed, message):
    path = write([*ROWS, row], **changed)
    with pytest.raises(UserError, match=message) as error:
        files = ArrowFiles(str(path), "targets.train_arrow")
        files.check()
        list(files.batches(VOCAB))
    assert str(error.value).startswith(f"targets.train_arrow={path}: ")


def test_files_that_are_damaged_or_of_another_kind_are_refused(write, tmp_path):
    def refused(path, message):
        with pytest.raises(UserError, match=message):
            ArrowFiles(str(path), "targets.train_arrow").num_rows()

    for form in ("stream", "file"):
        path = write(form=form)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) - 200])
        refused(path, r"data\.arrow cannot be read as Arrow, it may be cut off")
    path.write_bytes(b"no Arrow file, by far")
    refused(path, "cannot be read as Arrow")
    arrow = pytest.importorskip("pyarrow")
    refused(write(prob=arrow.float32()), r"prob list<item: float.*needed are .*list<float16>")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no .*arrow files")
    refused(tmp_path / "missing", "no such file")


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "data.arrow").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-arrow\.txt"):
        ArrowFiles(str(tmp_path), "targets.train_arrow")
