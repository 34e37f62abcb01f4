"""Params from torch's tensors and back: stacks, shardings, shards, folders that appear whole."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import save_file

from jaxlora import models
from jaxlora.errors import CheckpointError, ConfigError
from jaxlora.models import bert, hub, weights
from jaxlora.models.architectures import ARCHITECTURES
from jaxlora.models.llama import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from jaxlora.models.sharding import default_specs

CONFIG = LlamaConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.5,
)
IDS = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])


def fresh(model: Any) -> dict[str, Any]:
    return model.init(jax.random.key(0), IDS)["params"]


@pytest.fixture(name="saved")
def _saved(tmp_path) -> tuple[Path, Any, dict[str, Any]]:
    model = LlamaForCausalLM(CONFIG)
    params = fresh(model)
    return models.save_pretrained(tmp_path / "saved", model, params), model, params


def assert_equal_trees(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_folder_comes_back(saved):
    folder, model, params = saved
    loaded = models.from_pretrained(folder)
    assert loaded.model == model
    assert_equal_trees(loaded.params, params)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"


def test_scanned_params_are_the_same_tensors(saved, tmp_path):
    folder, _, params = saved
    loaded = models.from_pretrained(folder, scan_layers=True, remat=True)
    assert loaded.model.config.scan_layers
    assert loaded.model.config.remat
    for n in range(3):
        layer = jax.tree.map(lambda x, n=n: x[n], loaded.params["model"]["layers"])
        assert_equal_trees(layer, params["model"][f"layers_{n}"])
    again = models.save_pretrained(tmp_path / "again", loaded.model, loaded.params)
    assert (again / hub.WEIGHTS).read_bytes() == (folder / hub.WEIGHTS).read_bytes()


def test_leaves_go_to_a_mesh_as_its_specs_say(saved):
    folder, _, params = saved
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), devices=jax.devices()[:1])
    loaded = models.from_pretrained(folder, mesh=mesh, scan_layers=True)
    q = loaded.params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert q.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    np.testing.assert_array_equal(
        q[1], params["model"]["layers_1"]["self_attn"]["q_proj"]["kernel"]
    )
    other = models.from_pretrained(folder, mesh=mesh, specs=lambda path, shape: PartitionSpec())
    assert all(x.sharding.spec == PartitionSpec() for x in jax.tree.leaves(other.params))


class _Mesh:
    shape = {"fsdp": 2, "tensor": 4}  # noqa: RUF012


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("model/layers_0/self_attn/q_proj/kernel", (8, 8), ("fsdp", "tensor")),
        ("model/layers_0/self_attn/o_proj/kernel", (8, 8), ("tensor", "fsdp")),
        ("model/layers/mlp/down_proj/kernel", (3, 12, 8), (None, "tensor", "fsdp")),
        ("model/layers/mlp/up_proj/kernel", (3, 8, 14), (None, "fsdp", None)),
        ("model/embed_tokens/embedding", (16, 7), ("tensor", None)),
        ("model/norm/scale", (8,), ()),
    ],
)
def test_default_specs(path, shape, spec):
    mesh: Any = _Mesh()
    assert default_specs(mesh, ARCHITECTURES["llama"].row_parallel)(path, shape) == PartitionSpec(
        *spec
    )


def test_a_sharded_leaf_is_read_in_slices(saved):
    folder, _, _ = saved
    reads = []

    class Counting(hub.Tensors):
        def read(self, name: str, index: Any) -> np.ndarray:
            reads.append((name, index))
            return super().read(name, index)

    tensors = hub.read_safetensors(folder)
    counting = Counting(tensors._files, tensors.source)
    part = weights._Slices(
        counting, "model.layers.0.mlp.up_proj.weight", ARCHITECTURES["llama"].names, "x/kernel"
    )
    got = part[slice(0, 2), slice(4, 12)]
    assert reads == [("model.layers.0.mlp.up_proj.weight", (slice(4, 12), slice(0, 2)))]
    whole = tensors["model.layers.0.mlp.up_proj.weight"].T
    np.testing.assert_array_equal(got, whole[0:2, 4:12])


def test_large_weights_are_written_in_shards(saved, tmp_path):
    folder, _, params = saved
    state = weights.to_torch(params, ARCHITECTURES["llama"].names, "Llama")
    weights.write(tmp_path, state, shard_bytes=1000)
    index = json.loads((tmp_path / hub.WEIGHTS_INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == files
    shards, whole = hub.read_safetensors(tmp_path), hub.read_safetensors(folder)
    assert set(shards) == set(whole)
    for name in whole:
        np.testing.assert_array_equal(shards[name], whole[name])


def test_tied_head_and_bfloat16(tmp_path):
    config = dataclasses.replace(
        CONFIG, tie_word_embeddings=True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
    )
    model = LlamaForCausalLM(config)
    params = fresh(model)
    assert "lm_head" not in params
    folder = models.save_pretrained(tmp_path / "tied", model, params)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = models.from_pretrained(folder, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert_equal_trees(loaded.params, params)


def test_a_classification_head_on_a_language_model(saved):
    folder, _, params = saved
    with pytest.raises(ConfigError, match=r"key is None, .* has no score/kernel, to be drawn"):
        models.from_pretrained(folder, head="classification", num_labels=3)
    loaded = models.from_pretrained(
        folder, head="classification", num_labels=3, key=jax.random.key(1)
    )
    assert loaded.model == LlamaForSequenceClassification(CONFIG, num_labels=3)
    assert_equal_trees(loaded.params["model"], params["model"])
    assert loaded.params["score"]["kernel"].shape == (8, 3)


def test_labels_are_written_and_read(tmp_path):
    config = bert.BertConfig(
        vocab_size=9,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
    )
    model = bert.BertForSequenceClassification(config, num_labels=3)
    params = fresh(model)
    folder = models.save_pretrained(tmp_path / "b", model, params, labels=["bad", "so-so", "good"])
    config_json = json.loads((folder / "config.json").read_text())
    assert config_json["id2label"] == {"0": "bad", "1": "so-so", "2": "good"}
    assert models.from_pretrained(folder).model == model  # num_labels from the labels
    with pytest.raises(ConfigError, match="labels are 1 names, expected 3"):
        models.save_pretrained(tmp_path / "c", model, params, labels=["bad"])
    mean = bert.BertForSequenceClassification(config, pooling="mean")
    with pytest.raises(ConfigError, match="pooling is 'mean', expected 'cls'"):
        models.save_pretrained(tmp_path / "c", mean, fresh(mean))
    assert not (tmp_path / "c").exists()


def test_nothing_is_half_written(saved, tmp_path, monkeypatch):
    folder, model, params = saved
    with pytest.raises(CheckpointError, match="saved exists, expected a new folder"):
        models.save_pretrained(folder, model, params)
    before = (folder / hub.WEIGHTS).read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space"):
        models.save_pretrained(folder, model, params, overwrite=True)
    with pytest.raises(OSError, match="No space"):
        models.save_pretrained(tmp_path / "new", model, params)
    assert (folder / hub.WEIGHTS).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]


def test_overwriting_replaces_the_folder(saved):
    folder, model, params = saved
    (folder / "old.txt").write_text("")
    doubled = jax.tree.map(lambda x: 2 * x, params)
    models.save_pretrained(folder, model, doubled, overwrite=True)
    assert_equal_trees(models.from_pretrained(folder).params, doubled)
    assert not (folder / "old.txt").exists()


def test_leaves_of_an_adapter_are_refused(saved, tmp_path):
    _, model, params = saved
    joint = {**params, "lm_head": {**params["lm_head"], "kernel_lora_a": jnp.ones((2, 8))}}
    with pytest.raises(CheckpointError, match=r"Leaf lm_head/kernel_lora_a has no name .* merge"):
        models.save_pretrained(tmp_path / "joint", model, joint)


def test_foreign_models_and_unknown_types(saved, tmp_path):
    folder, _, params = saved
    with pytest.raises(ConfigError, match=r"The model is a Dense, expected one of jaxlora.models"):
        models.save_pretrained(tmp_path / "x", nn.Dense(2), params)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    with pytest.raises(ConfigError, match=r"model_type is 'lama' .* Nearest: llama"):
        models.from_pretrained(folder)


def test_misfits_of_a_stack_are_named_by_tensor(saved):
    folder, _, params = saved
    state = {
        n: make() for n, make in weights.to_torch(params, ARCHITECTURES["llama"].names, "L").items()
    }
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / hub.WEIGHTS)
    for scan in (False, True):
        with pytest.raises(CheckpointError, match=r"Missing \(1\): .*layers.1.*up_proj"):
            models.from_pretrained(folder, scan_layers=scan)


def test_special_tokens_are_kept(tmp_path):
    config = dataclasses.replace(CONFIG, eos_token_id=[2, 3], pad_token_id=0)
    assert hash(config) == hash(dataclasses.replace(CONFIG, eos_token_id=(2, 3), pad_token_id=0))
    model = LlamaForCausalLM(config)
    folder = models.save_pretrained(tmp_path / "m", model, fresh(model))
    written = json.loads((folder / "config.json").read_text())
    assert (written["eos_token_id"], written["pad_token_id"]) == ([2, 3], 0)
    assert "bos_token_id" not in written
    assert models.from_pretrained(folder).model == model
