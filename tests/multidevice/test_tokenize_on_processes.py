"""Several processes encode a corpus together: the same tokens as one makes, also after a kill."""

import os
import sys
from pathlib import Path

import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.store.files import read_json
from tests.pipeline.roles import place_of

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"
# Files of the library before all of it: duplicates of documents from before a kill, behind it.
LIBRARY = os.path.dirname(os.__file__)
TEXT = (
    "corpus.max_bytes=400_000",
    "corpus.near_duplicates=0.15",  # Source code has few that are more alike.
    "corpus.document_regex='(?:class|def) '",
    "corpus.source=text",
    f"corpus.paths=['{LIBRARY}/_pyio.py', '{LIBRARY}/_collections_abc.py']",
    "corpus.more=[{source: stdlib}]",
)
# Batches of 4 kB in place of megabytes, so that there are many rounds; progress is saved often.
START = """
import os, sys
from mlpmem_jax.corpus import encoding, writer
from mlpmem_jax.__main__ import main
writer._MAX_BATCH_BYTES, writer._SAVE_SECS = 4000, 0.0
rounds, die_in = encoding._exchanged, int(sys.argv[1])
def counted(*arguments):
    global die_in
    die_in -= 1
    if die_in == 0 and os.environ.get("MLPMEM_PROCESS_INDEX") == "1":
        os._exit(9)
    return rounds(*arguments)
encoding._exchanged = counted
sys.exit(main(sys.argv[2:]))
"""

# With other text that is only met while it is encoded: what files hold is not compared before.
OWN_DISK = """
import os, sys
from mlpmem_jax.__main__ import main
from mlpmem_jax.corpus import digests
if sys.argv.pop(1) == "met later":
    digests._digest = lambda wanted: "the same"
os.chdir(sys.argv[1] + os.environ["MLPMEM_PROCESS_INDEX"])
sys.exit(main(sys.argv[2:]))
"""


def _manifest(workdir: Path) -> dict:
    found = read_json(place_of(workdir, "tokens") / "manifest.json")
    return {name: found[name] for name in ("fingerprint", "counts", "arrays")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert main(["tokenize", "--config", str(TINY), "--workdir", str(workdir), *TEXT]) == 0
    return _manifest(workdir)


@pytest.mark.multidevice
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_tokens_do_not_depend_on_the_number_of_processes(alone, on_processes, tmp_path, processes):
    assert alone["counts"]["train_bytes"] > 20 * 4000  # many rounds
    assert alone["counts"]["duplicate_documents"] > 20
    assert alone["counts"]["train_near_duplicate_documents"] > 1
    workdir = tmp_path / "run"
    command = ["tokenize", "--config", str(TINY), "--workdir", str(workdir), *TEXT]
    killed = on_processes(processes, 1, "-c", START, "6", *command)
    assert killed.returncode == 9, killed.stderr[-3000:]
    tokens = Artifacts(load_config(TINY, TEXT, {"workdir": str(workdir)})).tokens
    assert (tokens.path / "progress.npz").exists()
    assert not tokens.is_complete()
    done = on_processes(processes, 1, "-c", START, "0", *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{tokens.title}: continuing" in done.stdout
    # The fingerprint holds recipe, counts and the checksum of the token stream.
    assert _manifest(workdir) == alone
    if sys.platform == "linux":
        assert done.stdout.count(f"{tokens.title}: made in") == 1


@pytest.mark.multidevice
@pytest.mark.parametrize("difference", ["size", "content", "met later"])
def test_processes_that_read_other_text_are_refused(on_processes, tmp_path, difference):
    """Each process has its own disk, and a file is another one on the second."""
    for number in range(2):
        folder = tmp_path / f"disk-{number}"
        folder.mkdir()
        for name in ("a", "b", "c"):
            words = [f"{name} is the word of line {line}\n" for line in range(20_000)]
            if number == 1 and name == "b":
                if difference == "size":
                    words.append("and one more\n")
                else:  # Of the same size, and the same at both ends.
                    words[10_000] = words[10_000].replace("word", "mood")
            (folder / f"{name}.txt").write_text("".join(words))
    command = ["tokenize", "--config", str(TINY), "--workdir", str(tmp_path / "run")]
    command += ["corpus.source=text", "corpus.paths=['*.txt']", "corpus.max_bytes=null"]
    command += ["corpus.document_regex='. is'"]
    done = on_processes(2, 1, "-c", OWN_DISK, difference, str(tmp_path / "disk-"), *command)
    assert "Traceback" not in done.stderr, done.stderr
    if difference != "met later":
        assert done.returncode == 2
        assert "process 1 would make another artifact: " in done.stderr and "listing" in done.stderr
    else:
        assert done.returncode == 1
        assert "process 1 reads other text than process 0" in done.stderr
    assert not list((tmp_path / "run" / "artifacts").glob("tokens/*/manifest.json"))
