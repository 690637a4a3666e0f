"""A run whose decoder is read from a Hugging Face directory in place of pretraining."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from flax import nnx
from safetensors.numpy import load_file, save_file

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.corpus.tokenizer import train_tokenizer
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_decoder
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.stored_array import StoredArray
from mlpmem_jax.studies.tables.rows import planned_row
from mlpmem_jax.studies.tables.seed_plan import SeedPlan
from tests.gguf_files import byte_level_tables, write_gguf
from tests.pipeline.tokenizing import files_of

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"
VOCAB, WIDTH, HIDDEN, LAYERS = 300, 24, 40, 2


def _write_llama(folder: Path, vocab_size: int, seed: int) -> None:
    """Writes a random decoder with tied embeddings."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (vocab_size, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (WIDTH,),
                "post_attention_layernorm": (WIDTH,),
                "self_attn.q_proj": (WIDTH, WIDTH),
                "self_attn.k_proj": (WIDTH // 2, WIDTH),
                "self_attn.v_proj": (WIDTH // 2, WIDTH),
                "self_attn.o_proj": (WIDTH, WIDTH),
                "mlp.gate_proj": (HIDDEN, WIDTH),
                "mlp.up_proj": (HIDDEN, WIDTH),
                "mlp.down_proj": (WIDTH, HIDDEN),
            }.items()
        }
    tensors = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    settings = {
        "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": HIDDEN,
        "max_position_embeddings": 32, "tie_word_embeddings": True, "bos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A configuration like tiny, with a decoder of a directory."""
    folder = tmp_path / "llama"
    folder.mkdir()
    tokenizer = train_tokenizer([TINY.read_text()], VOCAB, "<|endoftext|>")
    (folder / "tokenizer.json").write_bytes(tokenizer.to_json())
    assert tokenizer.vocab_size == VOCAB
    _write_llama(folder, VOCAB, seed=0)
    settings = yaml.safe_load(TINY.read_text())
    settings |= {"decoder": {"pretrained": str(folder)}, "workdir": str(tmp_path / "run")}
    settings["memory"]["width"] = 24
    settings.pop("tokenizer")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def test_its_states_and_its_losses_are_stored(run: Path, capsys: pytest.CaptureFixture[str]):
    for command in ("tokenize", "pretrain", "embed"):
        assert main([command, "--config", str(run)]) == 0
    assert "parameters read from" in capsys.readouterr().out
    config = resolved(load_config(run))
    made = Artifacts(config)
    decoder = finished_decoder(made, single_device_mesh())
    table = load_file(run.parent / "llama" / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(np.asarray(decoder.embedding[...])[:VOCAB], table)
    label = StoredArray(made.datastore("test"), "label").read(0, 15)
    logprob = StoredArray(made.datastore("test"), "logprob").read(0, 15)
    token = [0, *label[:-1].tolist()]  # the first token of a split is the separator
    final, _ = decoder.hidden(np.array([token], np.int32))
    logits = jax.nn.log_softmax(decoder.logits(final))[0]
    np.testing.assert_allclose(logprob, np.asarray(logits)[range(15), label], atol=1e-4)

    out = run.parent / "out"
    assert main(["export", "--config", str(run), "--output", str(out)]) == 0
    written, read = load_file(out / "model.safetensors"), run.parent / "llama"
    for name, tensor in load_file(read / "model.safetensors").items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    assert (out / "tokenizer.json").read_bytes() == (read / "tokenizer.json").read_bytes()
    assert main(["export", "--config", str(run), "--output", str(out)]) == 2
    assert "exists; export writes a new directory" in capsys.readouterr().err

    # Nothing is read twice; other weights are noticed, and make another decoder beside it.
    assert main(["pretrain", "--config", str(run)]) == 0
    assert "parameters read from" not in capsys.readouterr().out
    before = files_of(made.decoder)
    _write_llama(run.parent / "llama", VOCAB, seed=1)
    assert main(["pretrain", "--config", str(run)]) == 0
    assert "parameters read from" in capsys.readouterr().out
    other = Artifacts(config).decoder
    assert other.load().recipe["weights"] != made.decoder.load().recipe["weights"]
    assert other.load().files != made.decoder.load().files
    assert files_of(made.decoder) == before
    # What was made of them is used where they are gone.
    shutil.rmtree(run.parent / "llama")
    assert finished_decoder(Artifacts(config), single_device_mesh())
    known = str(run.parent / "run" / "config.yaml")
    assert main(["export", "--config", known, "--output", str(run.parent / "again")]) == 0
    assert main(["pretrain", "--config", known, "--rebuild"]) == 2
    assert "llama" in capsys.readouterr().err


def test_a_missing_tensor_is_refused_before_all_work(run: Path, capsys: pytest.CaptureFixture[str]):
    file = run.parent / "llama" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    assert main(["run", "--config", str(run)]) == 2
    assert "missing: norm.weight" in capsys.readouterr().err
    assert not Artifacts(load_config(run)).workdir.exists()


def test_a_table_trains_it_further_and_teaches_another_decoder(
    run: Path, capsys: pytest.CaptureFixture[str]
):
    still = "pretrain.optimizer.learning_rate=1e-12"  # It stays what it was, to rounding.
    shape = "decoder.pretrained=null, decoder.width=16, decoder.ffn_width=auto"
    tuned = f"{{name: tuned, parts: decoder, overrides: [pretrain.fine_tune=full, {still}]}}"
    rows = [
        tuned,
        f"{{name: taught, parts: beside, overrides: [{shape}, pretrain.alpha=0.4]}}",
        f"{{name: alone, parts: beside, overrides: [{shape}]}}",
    ]
    small = (
        "compare.seeds=[0]", "compare.extra_flops=networks", "pretrain.num_steps=3",
        "train.num_steps=3", "pretrain.optimizer.learning_rate=1e-2",
    )  # fmt: skip
    table = (*small, "compare.rows=[memory,longer]", f"compare.recipes=[{', '.join(rows)}]")
    assert main(["compare", "--config", str(run), *table]) == 0
    config = load_config(run, table)
    plan = SeedPlan(config, 0)

    def decoder(key: str) -> Artifact:
        row = planned_row(plan, key)
        assert row is not None
        return row.parts[-1].run.decoder

    targets = {plan.base.run.targets(split).relative for split in ("train", "valid")}
    assert targets <= set(decoder("taught").load().made_from)
    assert not targets & set(decoder("alone").load().made_from)
    assert decoder("taught").load().recipe["pretrain"]["alpha"] == 0.4
    (report,) = (plan.base.run.workdir / "results").glob("compare-*/compare.json")
    nats = {
        row["key"]: row["by_seed"]["0"]["test_nats"]["value"]
        for row in json.loads(report.read_text())["rows"]
    }
    assert nats["tuned"] == pytest.approx(nats["decoder"], abs=1e-5)
    assert nats["longer"] < nats["decoder"]  # Random weights learn at once.
    assert nats["taught"] != nats["alone"]
    weights = decoder("decoder").load().recipe["weights"]
    assert decoder("longer").load().recipe["weights"] == weights
    capsys.readouterr()
    assert main(["pretrain", "--config", str(run), "pretrain.alpha=0.4"]) == 2
    assert "pretrain.alpha=0.4 has no effect with decoder.pretrained=" in capsys.readouterr().err
    further = ("pretrain.alpha=0.4", "pretrain.fine_tune=full")
    assert main(["pretrain", "--config", str(run), *further]) == 2
    assert "set targets.workdir to the run of another decoder" in capsys.readouterr().err


def test_a_decoder_learns_from_the_targets_of_another_run(run: Path, tmp_path: Path):
    """As it would from cross-entropy alone, but for the loss."""
    assert main(["retrieve", "--config", str(run)]) == 2
    for command in ("tokenize", "pretrain", "embed", "index", "retrieve"):
        assert main([command, "--config", str(run)]) == 0
    teacher = f"targets.workdir={tmp_path / 'run'}"
    student = ("--config", str(run), "--workdir", str(tmp_path / "student"))
    tokenizer = f"tokenizer.path={tmp_path / 'llama' / 'tokenizer.json'}"
    small = (
        teacher, tokenizer, "decoder.pretrained=null", "pretrain.alpha=0.4", "pretrain.num_steps=3",
    )  # fmt: skip
    for command in ("tokenize", "pretrain"):
        assert main([command, *student, *small]) == 0
    config = resolved(load_config(run, small, {"workdir": str(tmp_path / "student")}))
    made = Artifacts(config).decoder.load()
    assert made.measured["validation"].keys() >= {"loss", "ce", "kl"}


def test_a_gguf_file_is_the_same_decoder(run: Path, tmp_path: Path):
    """Tokenizer and parameters of the file; another file of that content is the same artifact."""
    folder = tmp_path / "llama"
    tables = byte_level_tables((folder / "tokenizer.json").read_bytes())
    file = write_gguf(tmp_path / "model.gguf", folder, **tables)
    configs = [load_config(run), load_config(run, [f"decoder.pretrained={file}"])]
    assert configs[1].tokenizer.path == str(file)
    assert configs[1].tokenizer.separator == configs[0].tokenizer.separator == "<|endoftext|>"
    for changed in ([], [f"decoder.pretrained={file}"]):
        for command in ("tokenize", "pretrain"):
            assert main([command, "--config", str(run), *changed]) == 0
    made = [Artifacts(resolved(config)) for config in configs]
    assert made[0].decoder.path != made[1].decoder.path
    expected, found = (
        nnx.state(finished_decoder(one, single_device_mesh()), nnx.Param) for one in made
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copy(file, tmp_path / "elsewhere")
    moved = load_config(run, [f"decoder.pretrained={copy}"])
    assert Artifacts(resolved(moved)).decoder.path == made[1].decoder.path
