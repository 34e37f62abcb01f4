"""Model folders: what is found, what is read, and what is said when it cannot be."""

import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxlora.errors import CheckpointError, MissingDependencyError
from jaxlora.models import hub

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.bias": np.arange(4).astype(jnp.bfloat16),
}
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film", "##s"]


def write_shards(folder: Path) -> Path:
    shards = {"a.weight": "model-00001-of-00002.safetensors"}
    shards["b.bias"] = "model-00002-of-00002.safetensors"
    for name, file in shards.items():
        save_file({name: ARRAYS[name]}, folder / file)
    (folder / hub.WEIGHTS_INDEX).write_text(json.dumps({"weight_map": shards}))
    return folder


# Folders and the hub.


def test_resolve_takes_a_folder(tmp_path):
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_resolve_downloads_only_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls: list[Any] = []

    def snapshot_download(*args: Any, **options: Any) -> str:
        calls.append((args, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve("org/model", revision="v1") == tmp_path
    [(args, options)] = calls
    patterns = options.pop("allow_patterns")
    assert (args, options) == (("org/model",), {"revision": "v1"})
    assert {"config.json", "model*.safetensors", "tokenizer.json", "vocab.txt"} < set(patterns)
    assert not any("bin" in pattern for pattern in patterns)


def test_resolve_reports_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def snapshot_download(*_: Any, **__: Any) -> str:
        raise OSError("no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = "'org/model' is no local folder, .* from the hub: no such repository"
    with pytest.raises(CheckpointError, match=message):
        hub.resolve("org/model")


def test_resolve_errors(tmp_path):
    for name in (tmp_path / "none", str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(CheckpointError, match=r"There is no folder .* or a hub id such as"):
            hub.resolve(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file is a file, expected the folder that holds"):
        hub.resolve(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"Revision of .*: got 'main', expected None"):
        hub.resolve(tmp_path, revision="main")


# config.json.


def test_read_config(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    assert hub.read_config(tmp_path) == {"hidden_size": 8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"hidden_size": 8', "config.json is not JSON: "),
        ("[1]", "config.json is a JSON list, expected an object"),
    ],
)
def test_read_config_that_is_damaged(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        hub.read_config(tmp_path)


def test_read_config_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config.json. It is empty."):
        hub.read_config(tmp_path)
    (tmp_path / "model.ckpt").write_text("")
    with pytest.raises(CheckpointError, match=r"has no config.json. It holds model.ckpt."):
        hub.read_config(tmp_path)


# Weights.


@pytest.mark.parametrize("shards", [False, True])
def test_read_safetensors(shards, tmp_path):
    if shards:
        write_shards(tmp_path)
    else:
        save_file(ARRAYS, tmp_path / hub.WEIGHTS)
    tensors = hub.read_safetensors(tmp_path)
    assert set(tensors) == set(ARRAYS)
    assert len(tensors) == 2
    for name, array in ARRAYS.items():
        assert tensors.shape(name) == array.shape
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_truncated_weights(cut, tmp_path):
    save_file(ARRAYS, tmp_path / hub.WEIGHTS)
    whole = (tmp_path / hub.WEIGHTS).read_bytes()
    (tmp_path / hub.WEIGHTS).write_bytes(whole[:cut])
    size = len(whole[:cut])
    with pytest.raises(CheckpointError, match=rf"damaged or cut short \({size} bytes\)"):
        hub.read_safetensors(tmp_path)


def test_corrupt_header(tmp_path):
    save_file(ARRAYS, tmp_path / hub.WEIGHTS)
    whole = bytearray((tmp_path / hub.WEIGHTS).read_bytes())
    whole[10:14] = b"\xff\xff\xff\xff"
    (tmp_path / hub.WEIGHTS).write_bytes(bytes(whole))
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or cut short"):
        hub.read_safetensors(tmp_path)


def test_no_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(CheckpointError, match=r"has neither .* It holds pytorch_model.bin."):
        hub.read_safetensors(tmp_path)


def test_damaged_indexes(tmp_path):
    write_shards(tmp_path)
    index = tmp_path / hub.WEIGHTS_INDEX
    shard = "model-00001-of-00002.safetensors"
    for text, message in (
        ("{", "index.json is not JSON"),
        ("{}", "index.json has no 'weight_map' from tensor to file"),
        ('{"weight_map": {"a": 1}}', "index.json has no 'weight_map' from tensor to file"),
        ('{"weight_map": {"a": "gone"}}', "lacks 'gone', which model.safetensors.index.json lists"),
        ('{"weight_map": {"a": "../x"}}', "lacks '../x', which"),
        (f'{{"weight_map": {{"c": "{shard}"}}}}', f"{shard} lacks 'c', which .* says it has"),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            hub.read_safetensors(tmp_path)


# The tokenizer.


def test_read_tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = hub.read_tokenizer(tmp_path)
    batch = tokenizer(["good films", "good"], padding=True, return_tensors="np")
    np.testing.assert_array_equal(batch["input_ids"], [[2, 5, 6, 7, 3], [2, 5, 3, 0, 0]])


def test_read_tokenizer_of_a_folder_without(tmp_path):
    assert hub.read_tokenizer(tmp_path) is None


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(CheckpointError, match=r"The tokenizer files of .* cannot be read"):
        hub.read_tokenizer(tmp_path)


# Optional dependencies.


@pytest.mark.parametrize("package", ["huggingface_hub", "safetensors", "transformers"])
def test_missing_dependency(package, tmp_path, monkeypatch):
    save_file(ARRAYS, tmp_path / hub.WEIGHTS)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    use = {
        "huggingface_hub": lambda: hub.resolve("org/model"),
        "safetensors": lambda: hub.read_safetensors(tmp_path),
        "transformers": lambda: hub.read_tokenizer(tmp_path),
    }
    message = rf"needs the package '{package}', .* pip install 'jaxlora\[hf\]'"
    with pytest.raises(MissingDependencyError, match=message):
        use[package]()
