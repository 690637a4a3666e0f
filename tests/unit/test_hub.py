"""Decoders by their id of the Hugging Face Hub, which is not reached here."""

import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from mlpmem_jax.config import hub
from mlpmem_jax.config.hub import local_path
from mlpmem_jax.config.load import load_config
from mlpmem_jax.config.pretrained import pretrained_keys
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.interop.gguf import tensor_files
from mlpmem_jax.interop.tensors import TensorFiles

LLAMA = Path(__file__).with_name("golden") / "pretrained" / "llama"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What the Hub is asked for; it has one model."""
    calls: list[dict[str, Any]] = []
    snapshot = shutil.copytree(LLAMA, tmp_path / "snapshots" / "1234")

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        if name != "org/tiny-llama":
            raise FileNotFoundError("Cannot find an appropriate cached snapshot folder\nand so on")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    hub._downloaded.cache_clear()
    return calls


def test_an_id_is_downloaded_once(asked, tmp_path: Path):
    keys = pretrained_keys("org/tiny-llama@v1.0")
    assert keys == pretrained_keys(str(LLAMA))
    # By content: the artifact is that of the same directory elsewhere.
    assert tensor_files("org/tiny-llama@v1.0").digest() == TensorFiles(str(LLAMA)).digest()
    [call] = asked
    assert call["name"] == "org/tiny-llama" and call["revision"] == "v1.0"
    assert set(call["allow_patterns"]) >= {"config.json", "*.safetensors", "tokenizer.json"}
    assert not any("bin" in pattern or "*.py" in pattern for pattern in call["allow_patterns"])
    assert pretrained_keys("org/tiny-llama") == keys
    assert asked[1]["revision"] is None


def test_paths_are_no_ids(asked, tmp_path: Path):
    (tmp_path / "org" / "tiny-llama").mkdir(parents=True)
    others = ("org/tiny-llama", "/org/tiny-llama", "./org/tiny", "org", "a/b/c", "~/a", "../a")
    for path in (*others, "models/tiny.gguf/x/y"):
        assert local_path(path) == path
    assert not asked


def test_what_cannot_be_downloaded(asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "run.yaml"
    file.write_text("decoder: {pretrained: org/other}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    [line] = caught.value.messages
    assert line == (
        "decoder.pretrained=org/other: no such path, and no download from the Hugging Face Hub "
        "(offline, or no such model): Cannot find an appropriate cached snapshot folder"
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="require the package huggingface_hub"):
        local_path("org/another")


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the package itself says where nothing may be downloaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"org/offline: no such path, .*\(offline, or no such"):
        local_path("org/offline")
