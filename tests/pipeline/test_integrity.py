"""Every file of a finished run, damaged: its reader names it, or gets what it got before."""

import random
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.corpus.tokenizer import load_tokenizer
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.input.rows import RowReader, TargetReader
from mlpmem_jax.parallel.mesh import make_mesh
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.interpolation import interpolation
from mlpmem_jax.pipeline.networks import finished_decoder, finished_memory
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.pipeline.scoring import stored_split
from mlpmem_jax.retrieval.engine import StoredKeys, read_all
from mlpmem_jax.retrieval.index_builder import exact_engine, open_index
from mlpmem_jax.retrieval.neighbors import StoredNeighbors
from mlpmem_jax.store.array_specs import SPLITS, input_array
from mlpmem_jax.store.run_record import FILE as RECORD
from mlpmem_jax.store.run_record import RunRecord

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"
# What is there for people, for other commands, or only for a start after a kill: no finished run
# reads it. Artifacts are named by their roles.
UNREAD = re.compile(
    r"config\.yaml|text-digests\.json|tokens/\w+/document_digest/.*|results/metrics/.*|"
    r"artifacts/\.runs/.*|results/(evaluate\.csv|evaluate\.png|measured\.json)|"
    r"(decoder|memory)/(checksums/.*|checkpoints/4/.*)|targets/train/temperature\.json"
)


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """The artifacts of a copy of a finished run."""
    workdir = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(tiny_run.workdir, workdir)
    return _opened(workdir)


def _opened(workdir):
    return Artifacts(resolved(load_config(TINY, (), {"workdir": str(workdir)})))


def _names(run):
    """Returns the files of a run by role and path in the artifact, or by path in the run."""
    roles = {run.results.relative: "results"}
    record = RunRecord.read(run.workdir)
    roles |= {f"artifacts/{relative}": role for role, relative in record.roles.items()}
    names = {}
    for file in sorted(Path(run.workdir).rglob("*")):
        if file.is_file():
            name = str(file.relative_to(run.workdir))
            place = "/".join(name.split("/")[: 3 if name.startswith("artifacts/") else 2])
            names[roles.get(place, place) + name.removeprefix(place)] = file
    return names


def _readers(run):
    """Returns, by role or path in the run, functions that return all that is read there."""
    config, mesh = run.config, make_mesh(run.config.mesh)

    def tokens(split):
        stream = TokenSplit.open(run.tokens, split)
        return [
            stream.read(0, stream.num_tokens),
            stream.document_offset,
            stream.document_bytes,
            stream.document_words,
            stream.document_file,
        ]

    def rows(split):
        stored, store = stored_split(run, split), run.datastore(split)
        keys = read_all(StoredKeys(store))
        reader = RowReader(store, {"input": input_array(store.load().arrays)})
        inputs = reader.start(np.array([0]), reader.num_rows).result()["input"]
        return [stored.label_N, stored.logprob_N, keys, inputs.astype(np.float32)]

    def neighbors(split):
        stored = StoredNeighbors(run.neighbors(split))
        found = stored.read(0, stored.num_rows)
        return [found.row_QK, found.distance_QK]

    def targets(split):
        reader = TargetReader(run.targets(split))
        return list(reader.start(np.array([0]), reader.num_rows).result().values())

    def weights(finish):
        return jax.tree.leaves(nnx.to_pure_dict(nnx.state(finish(run, mesh))))

    def index():
        def exact():
            return exact_engine(run.datastore("train"), mesh, config.retrieval)

        width = config.decoder.width
        return [np.array(open_index(run.index, config.retrieval, width, exact)[0].num_rows)]

    readers = {
        "tokenizer": lambda: [np.frombuffer(load_tokenizer(run.tokenizer).to_json(), np.uint8)],
        "decoder": lambda: weights(finished_decoder),
        "memory": lambda: weights(finished_memory),
        "index": index,
        "results": lambda: [np.array(interpolation(run))],
        "tokens/manifest.json": lambda: tokens("train"),
    }
    for split in SPLITS:
        readers[f"tokens/{split}"] = lambda split=split: tokens(split)
        readers[f"datastore/{split}"] = lambda split=split: rows(split)
        if split != "train":
            readers[f"neighbors/{split}"] = lambda split=split: neighbors(split)
        if split != "test":
            readers[f"targets/{split}"] = lambda split=split: targets(split)
    return readers


def _same(found, expected):
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def _sibling(file, files):
    """Returns another file of this name or this folder, of other content."""
    alike = [
        other
        for other in files
        if other != file
        and (other.name == file.name or other.parent == file.parent)
        and len(other.parts) == len(file.parts)
        and other.read_bytes() != file.read_bytes()
    ]
    return alike[0] if alike else None


def _damages(file, files):
    """Yields what can happen to a file: a name, its content then, and the sibling's or None."""
    content = file.read_bytes()
    for place in {len(content) // 3, len(content) - 1}:
        yield f"flip {place}", content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    yield "cut", content[: len(content) // 2]
    yield "emptied", b""
    yield "missing", None
    other = _sibling(file, files)
    if other is not None:
        yield f"exchanged with {other}", other.read_bytes()


def _is_named(file, error):
    """Returns whether an error names a file, or the array that it is part of."""
    named = [str(file)]
    if file.name == "manifest.json":
        named.append(str(file.parent))
    if file.name == "zarr.json" or "/c/" in str(file):
        named.append(str(file.parent).split("/c/")[0].removesuffix("/c"))
    return any(name in str(error) for name in named)


def _read_names(run):
    """Returns the files that a finished run reads, but for its record, which has its own test."""
    names = _names(run)
    return {
        name: file for name, file in names.items() if name != RECORD and not UNREAD.fullmatch(name)
    }


def _sweep(run, wanted):
    readers, before = _readers(run), {}
    names = _read_names(run)
    for name, file in names.items():
        if not wanted(name):
            continue
        (owner,) = [one for one in readers if name == one or name.startswith(f"{one}/")]
        expected = before.setdefault(owner, readers[owner]())
        content = file.read_bytes()
        for damage, damaged in _damages(file, list(names.values())):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            try:
                found = readers[owner]()
            except ArtifactError as error:
                assert _is_named(file, error), (name, damage, str(error))
            else:
                # A byte of JSON that means the same, for example another fill value.
                assert damage.startswith("flip") and file.suffix == ".json", (name, damage)
                assert _same(found, expected), (name, damage)
            file.write_bytes(content)
    for owner, expected in before.items():
        assert _same(readers[owner](), expected), owner


def _is_quick(name):
    """Leaves out what takes long to read again and again: networks, training rows, most shards."""
    shard = re.search(r"/c/([0-9]+)", name)
    slow = re.match(r"(decoder|memory)/checkpoints/|(datastore|targets)/train/", name)
    return not slow and (shard is None or shard[1] == "0")


def test_what_is_damaged_is_named(run):
    _sweep(run, _is_quick)


def test_damaged_networks_are_named(run):
    some = re.compile(r"decoder/checkpoints/8/params/.*|memory/checkpoints/8/_.*")
    _sweep(run, some.fullmatch)


@pytest.mark.slow
def test_any_file_that_is_damaged_is_named(run):
    """A seeded sample of what the quick ones leave out: hundreds of files, each read many times."""
    names = sorted(name for name in _read_names(run) if not _is_quick(name))
    _sweep(run, set(random.Random(0).sample(names, 40)).__contains__)


def test_what_nothing_reads_may_be_damaged(run):
    readers = _readers(run)
    expected = {owner: reader() for owner, reader in readers.items()}
    files = [file for name, file in _names(run).items() if UNREAD.fullmatch(name)]
    unread = {file: file.read_bytes() for file in files}
    assert len(unread) > 20
    for file in unread:
        file.write_bytes(b"{")
    for owner, reader in readers.items():
        assert _same(reader(), expected[owner]), owner
    for file, content in unread.items():
        file.write_bytes(content)


def test_a_damaged_record_of_the_run_is_named(run):
    """It is only a memory of what was read: without it the text is read again."""
    file = run.workdir / RECORD
    content, expected = Path(file).read_bytes(), run.memory.relative
    for damage, damaged in _damages(Path(file), []):
        if damaged is None:
            Path(file).unlink()
            assert _opened(run.workdir).memory.relative == expected
        else:
            Path(file).write_bytes(damaged)
            with pytest.raises(ArtifactError, match=f"^{re.escape(str(file))}: .*delete it"):
                assert _opened(run.workdir).memory.relative == expected, damage
    Path(file).write_bytes(content)


def _command(*arguments, run):
    return main([*arguments, "--config", str(TINY), "--workdir", str(run.workdir)])


def test_a_changed_weight_of_the_results_is_not_believed(run, capsys):
    file = run.results.path / "evaluate.json"
    text = file.read_text()
    file.write_text(re.sub(r'("interpolation": )[0-9.e-]+', r"\g<1>0.5", text))
    assert file.read_text() != text
    assert _command("generate", run=run) == 2
    assert f"error: {file}: " in capsys.readouterr().err
    file.write_text(text)


@pytest.mark.parametrize(("kind", "array"), [("datastore", "logprob"), ("neighbors", "distance")])
def test_exchanged_shards_end_the_command(run, capsys, kind, array):
    workdir, place = Path(run.workdir), Path(getattr(run, kind)("test").path) / array
    one, other = (place / "c" / number for number in "12")
    one.rename(workdir / "aside")
    other.rename(one)
    (workdir / "aside").rename(other)
    results = workdir / "results"
    results.rename(workdir / "before")
    assert _command("evaluate", run=run) == 2
    assert re.search(f"error: {place}/c/[12].*: not the shard", capsys.readouterr().err)
    shutil.rmtree(results)
    (workdir / "before").rename(results)
    one.rename(workdir / "aside")
    other.rename(one)
    (workdir / "aside").rename(other)
