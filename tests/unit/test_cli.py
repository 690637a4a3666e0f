"""The command line: parsing, dispatch, and what a user sees of a failure."""

import errno
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mlpmem_jax import __main__ as cli
from mlpmem_jax.commands import COMMANDS
from mlpmem_jax.config.load import load_config
from mlpmem_jax.errors import ArtifactError, RunFailed, UserError
from mlpmem_jax.failures import explain, of_stage
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.store.arrays import storage_error
from mlpmem_jax.store.files import write_bytes
from tests.conftest import ROOT

CONFIG = str(ROOT / "configs" / "tiny.yaml")


@pytest.fixture
def calls(monkeypatch):
    """Takes the place of the commands; holds what they were called with."""
    found = []

    def record(name, config, options):
        found.append((name, config, options))
        return 0

    monkeypatch.setattr(cli, "run_command", record)
    return found


def fail_with(monkeypatch, error):
    def raise_it(*_):
        raise error

    monkeypatch.setattr(cli, "run_command", raise_it)
    monkeypatch.delenv("MLPMEM_TRACEBACK", raising=False)


def test_overrides_and_flags_may_be_mixed(calls, tmp_path):
    code = cli.main(
        ["train", "seed=4", "--config", CONFIG, "decoder.norm=layer", "--rebuild",
         "--workdir", str(tmp_path), "--dry-run", "train.alpha=0.5"]
    )  # fmt: skip
    ((name, config, options),) = calls
    assert (code, name) == (0, "train")
    assert (config.seed, config.decoder.norm, config.train.alpha) == (4, "layer", 0.5)
    assert config.workdir == str(tmp_path)
    assert options == Options(workdir=str(tmp_path), dry_run=True, rebuild=True)


def test_the_resolved_configuration_is_printed_on_request(capsys, tmp_path):
    """As YAML that gives the same configuration, and nothing else."""
    arguments = ["run", "--config", CONFIG, "--workdir", str(tmp_path / "run"), "seed=4"]
    assert cli.main([*arguments, "--print-config"]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(shown)
    expected = resolved(load_config(CONFIG, ["seed=4"], {"workdir": str(tmp_path / "run")}))
    assert load_config(tmp_path / "printed.yaml") == expected
    assert not (tmp_path / "run").exists()


def test_generate_takes_prompts(calls):
    code = cli.main(
        ["generate", "--config", CONFIG, "--prompt", "def f(x): [", "--prompt", "",
         "--without-memory"]
    )  # fmt: skip
    ((_, config, options),) = calls
    assert code == 0
    assert config.generate.prompts == ("def f(x): [", "")
    assert options.without_memory


@pytest.mark.parametrize(
    "text", ["---", "--", "-x", "--x y", "-1", "", " # ", "null", '"quoted"', "a=b", "--dry-runs"]
)
def test_values_of_flags_are_taken_as_typed(calls, text):
    assert cli.main(["generate", "--config", CONFIG, "--prompt", text, f"--prompt={text}"]) == 0
    assert calls[0][1].generate.prompts == (text, text)
    if text.strip():
        assert cli.main(["compile", "--workdir", text, "--output", text, "--config", CONFIG]) == 0
        assert (calls[1][1].workdir, calls[1][2].output) == (text, text)


@pytest.mark.parametrize("words", [["--rebuild"], ["--config", CONFIG], ["-h"], ["--workdir=x"]])
def test_a_forgotten_value_is_no_flag(calls, capsys, words):
    assert cli.main(["train", "--config", CONFIG, "--workdir", *words]) == 2
    err = capsys.readouterr().err
    assert f"argument --workdir: expected one argument before {words[0]}" in err
    assert not calls


def test_what_follows_two_dashes_are_overrides(calls):
    assert cli.main(["train", "--config", CONFIG, "--", "seed=3"]) == 0
    assert calls[0][1].seed == 3


def test_flags_find_the_home_directory(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(CONFIG, tmp_path / "tiny.yaml")
    flags = ["--config", "~/tiny.yaml", "--workdir=~/run", "--output", "~/a.json"]
    assert cli.main(["compile", *flags]) == 0
    ((_, config, options),) = calls
    assert config.workdir == options.workdir == str(tmp_path / "run")
    assert options.output == str(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--workdir", ""], 'workdir="": must be a path, and this one is empty'),
        (["--workdir", " \t"], "workdir= \\t: must be a path, and this one is empty"),
        (["--workdir", "runs/x\n"], "workdir=runs/x: holds a line break"),
        (["--output", ""], '--output "": must be a path, and this one is empty'),
        (["--output", "~nobody-here/x"], "--output ~nobody-here/x: ~nobody-here: no such user"),
        (["--config", ""], '--config "": must be a path, and this one is empty'),
        (["--config", "~nobody-here/x"], "--config ~nobody-here/x: ~nobody-here: no such user"),
        (["--topology", ""], 'compile.topology="": must be local or'),
        (["--step", ""], 'compile.step="": must be pretrain, train, embed or decode'),
        (["--workdir", "\udcff"], "workdir=\\udcff: is not valid UTF-8 text"),
        (["compile.nowhere=1", "x" * 20_000], "x: not an override; write section.key=value"),
        (["--" + "x" * 20_000], "unrecognized arguments: --xxx"),
    ],
)
def test_values_that_cannot_be(calls, capsys, flags, expected):
    assert cli.main(["compile", "--config", CONFIG, *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(expected in line for line in lines)
    assert all(line.startswith("error: ") and len(line) < 620 for line in lines)
    assert not calls


def test_prompt_belongs_to_generate_alone(calls, capsys):
    assert cli.main(["train", "--config", CONFIG, "--prompt", "x"]) == 2
    assert "error: unrecognized arguments: --prompt" in capsys.readouterr().err
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrian", "--config", CONFIG], "pretrian: unknown command; did you mean pretrain?"),
        (["xyz"], "xyz: unknown command; commands: run, tokenize, pretrain"),
        (["train"], "the following arguments are required: --config"),
        (["train", "--config"], "argument --config: expected one argument"),
        (["train", "--config", CONFIG, "--train.alpha=1"], "write train.alpha=1"),
        (["train", "--config", CONFIG, "--conf", "x"], "unrecognized arguments: --conf"),
        (["train", "--config", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_mistakes_on_the_command_line(calls, capsys, arguments, expected):
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and expected in err
    assert len(err.splitlines()) == 1
    assert not calls


def test_issue_example_exits_2_with_both_mistakes_and_writes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mlpmem_jax", "pretrain", "--config",
         str(ROOT / "configs" / "quickstart.yaml"), "decodr.num_layers=2", "train.batch_size=-1"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: decodr.num_layers=2: unknown key; did you mean decoder.num_layers?",
        "error: train.batch_size=-1: must be a whole number from 1 to 1e6",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(capsys, name):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert COMMANDS[name].summary in text
    assert "workdir" in text and "--dry-run" in text
    own = COMMANDS[name].sections[0]
    assert re.search(rf"\(null: not set\):\n\n{'run' if own == 'workdir' else own}: ", text)
    assert ("--prompt" in text) == (name == "generate")


def test_help_does_not_import_jax():
    program = (
        "import sys\nfrom mlpmem_jax.__main__ import main\n"
        "try:\n    main(['run', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('jax imported' if 'jax' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "evaluate.bootstrap_samples" in done.stdout


def test_overview_and_version(capsys):
    for arguments, code in ((["--help"], 0), ([], 2)):
        assert cli.main(arguments) == code
        text = capsys.readouterr().out
        assert all(f"  {name} " in text for name in COMMANDS)
        assert "commands:\n  run " in text and "--version" in text
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mlpmem_jax ")


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UserError(["a", "b"]), 2, ["error: a", "error: b"]),
        (ArtifactError("tokens: damaged"), 2, ["error: tokens: damaged"]),
        (RunFailed("loss is nan"), 1, ["error: loss is nan"]),
        (ExceptionGroup("reads", [UserError("a file")]), 2, ["error: a file"]),
        (KeyboardInterrupt(), 130, ["error: interrupted; the same command continues where"]),
        (OSError(errno.ENOSPC, "x", "/w/a"), 2, ["error: /w/a: no space left on the disk"]),
        (PermissionError(errno.EACCES, "x", "/w/a"), 2, ["error: /w/a: permission denied"]),
        (FileNotFoundError(errno.ENOENT, "x", "/w/a"), 2, ["error: /w/a: no such file"]),
    ],
)
def test_failures_are_lines_and_codes(monkeypatch, capsys, error, code, lines):
    fail_with(monkeypatch, error)
    assert cli.main(["train", "--config", CONFIG]) == code
    found = capsys.readouterr().err.splitlines()
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True))


def test_errors_of_the_program_keep_their_traceback(monkeypatch):
    fail_with(monkeypatch, ValueError("shapes (2, 3) and (4,) do not fit"))
    with pytest.raises(ValueError, match="shapes"):
        cli.main(["train", "--config", CONFIG])


def test_traceback_on_request(monkeypatch):
    fail_with(monkeypatch, UserError("a"))
    monkeypatch.setenv("MLPMEM_TRACEBACK", "1")
    with pytest.raises(UserError):
        cli.main(["train", "--config", CONFIG])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ValueError(
                'RESOURCE_EXHAUSTED: Error writing "c/0": Failed to write file: "/w/c/0" '
                "[OS error 28: ENOSPC No space left on device]"
            ),
            "/w/c/0: no space left on the disk",
        ),
        (
            ValueError('PERMISSION_DENIED: Failed to open: "/w/zarr.json" [OS error 13: EACCES]'),
            "/w/zarr.json: permission denied",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
            "out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes); lower",
        ),
        (MemoryError(), "out of memory; lower"),
        (
            MemoryError("Unable to allocate 7.28 TiB for an array with shape (10,)"),
            "out of memory (Unable to allocate 7.28 TiB for an array with shape (10,)); lower",
        ),
        (
            ValueError(
                'OUT_OF_RANGE: Error writing local file "/w/c/0": Failed writing: "/w/c/0.__lock": '
                "Failed to write 399000 bytes to file 3: File too large [os_error_code='27']"
            ),
            "/w/c/0: the file would be larger than the file system or `ulimit -f` allows",
        ),
        (
            ValueError(
                'RESOURCE_EXHAUSTED: Error opening "zarr3" driver: Error writing local file '
                '"/w/zarr.json": Failed to open directory: "/w\\x00zarr.json": Too many open files '
                "[os_error_code='24']"
            ),
            "/w/zarr.json: too many open files in this process (raise `ulimit -n`)",
        ),
        (
            ImportError("libx.so: cannot open shared object file: Too many open files"),
            "too many open files",
        ),
        (RuntimeError("can't start new thread"), "no further thread can be started"),
        (OSError(errno.ENOSPC, "x"), "no space left on the disk"),
        (OSError("Disk quota exceeded"), "the disk quota is used up"),
    ],
)
def test_words_of_libraries_are_translated(error, expected):
    assert (explain(error) or "").startswith(expected)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EMFILE, "too many open files in this process (raise `ulimit -n`)"),
        (errno.ENFILE, "too many open files on this machine"),
        (errno.ENOMEM, "the machine has no memory left"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.ENOSPC, "no space left on the disk"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "input/output error"),
        (errno.EFBIG, "the file would be larger than"),
        (errno.ESTALE, "stale NFS handle"),
        (errno.ETIMEDOUT, "timed out"),
        (errno.ELOOP, "symbolic links"),
        (errno.ENOLCK, "the file system gives no locks"),
    ],
)
def test_each_failure_of_the_machine_has_its_own_name(number, expected):
    assert (explain(OSError(number, "x", "/w/a")) or "").startswith(f"/w/a: {expected}")
    # What TensorStore makes of it: neither damage nor a full disk.
    words = os.strerror(number)
    for code in ("FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNKNOWN"):
        library = ValueError(
            f'{code}: Error reading local file "/w/c/0": Failed to open: "/w/c/0": {words} '
            f"[os_error_code='{number}'] [source locations='x']"
        )
        assert (explain(library) or "").startswith(f"/w/c/0: {expected}")
        raised = storage_error("/w", library)
        assert isinstance(raised, OSError) and (raised.errno, raised.filename) == (number, "/w/c/0")


def test_what_a_bucket_does_not_do_now_is_no_damage():
    found = storage_error("gs://b/x", ValueError("UNAVAILABLE: 503 [source locations='x']"))
    assert type(found) is UserError and "gs://b/x: cannot be reached (UNAVAILABLE: 503)" in str(
        found
    )
    damage = storage_error("/w", ValueError("FAILED_PRECONDITION: Not enough data"))
    assert isinstance(damage, ArtifactError)


def test_out_of_memory_names_the_stage_and_its_keys():
    with pytest.raises(MemoryError) as caught, of_stage("results/base"):
        np.empty(10**15)
    line = explain(caught.value) or ""
    assert line.startswith("out of memory while making results/base (Unable to allocate 7.11 PiB")
    assert line.endswith("lower evaluate.batch_size or evaluate.bootstrap_samples")


def test_a_file_without_a_name_in_the_error_is_named(monkeypatch, tmp_path):
    def refuse(_):
        raise OSError(errno.EIO, "x")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError) as caught:
        write_bytes(tmp_path / "a.json", b"x")
    assert (explain(caught.value) or "").startswith(f"{tmp_path}/a.json: input/output error")
    assert list(tmp_path.iterdir()) == []


def test_causes_are_looked_at():
    try:
        try:
            raise OSError(errno.ENOSPC, "x", "/w/checkpoint")
        except OSError as error:
            raise RuntimeError("saving failed") from error
    except RuntimeError as error:
        assert (explain(error) or "").startswith("/w/checkpoint: no space left")


def test_a_file_that_was_rightly_missing_explains_nothing():
    try:
        try:
            raise FileNotFoundError(errno.ENOENT, "x", "/w/optional")
        except FileNotFoundError:
            raise KeyError("bug")  # noqa: B904
    except KeyError as error:
        assert explain(error) is None


@pytest.mark.parametrize(
    "error", [ValueError("bad"), RuntimeError("x"), KeyError("a"), OSError(errno.EINTR, "x")]
)
def test_other_errors_are_not_explained(error):
    assert explain(error) is None


def test_output_that_nobody_reads_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m mlpmem_jax run --help | head -1", shell=True, cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith("usage") and done.stderr == ""
