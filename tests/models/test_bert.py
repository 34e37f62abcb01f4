"""BERT against torch's numbers (tests/references/make_bert.py), its names, and its errors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxlora import models
from jaxlora.errors import CheckpointError, ConfigError, ModelError
from jaxlora.fetch import fetch
from jaxlora.models import bert, weights

REFERENCES = Path(__file__).parent.parent / "references"
TINY = ["bert_gelu", "bert_gelu_new", "bert_gelu_tanh", "bert_relu"]
HEADS = {
    "BertForSequenceClassification": "classification",
    "BertForTokenClassification": "token",
    "BertModel": "none",
}
CONFIG = bert.BertConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=6,
    initializer_range=0.5,
)
IDS = np.array([[1, 2, 3, 4], [5, 6, 7, 0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
KEY = jax.random.key(7)


def reference(name: str, part: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCES / f"{name}.npz") as file:
        return {k.removeprefix(part): file[k] for k in file.files if k.startswith(part)}


def write(folder: Path, state: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_reference(folder: Path, name: str, state: dict[str, np.ndarray] | None = None) -> Path:
    config = json.loads(str(reference(name, "config")[""]))
    return write(folder, reference(name, "weights/") if state is None else state, config)


def load_reference(folder: Path, name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    kind = str(reference(name, "head")[""])
    outputs = reference(name, "outputs/")
    if "logits" in outputs:
        options["num_labels"] = outputs["logits"].shape[-1]
    model, params, _ = models.from_pretrained(folder, head=HEADS[kind], **options)
    return model, params


def to_torch(params: Any) -> dict[str, Any]:
    return {name: make() for name, make in weights.to_torch(params, bert.NAMES, "Bert").items()}


def init(model: Any) -> dict[str, Any]:
    return model.init(KEY, IDS)["params"]


def run(model: Any, params: Any, *inputs: Any, **options: Any) -> Any:
    return jax.jit(lambda params: model.apply({"params": params}, *inputs, **options))(params)


def assert_close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def assert_equal_trees(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# The numbers of torch.


@pytest.mark.parametrize("name", TINY)
def test_matches_torch(name, tmp_path):
    model, params = load_reference(write_reference(tmp_path, name), name)
    out = run(model, params, **reference(name, "inputs/"))
    expected = reference(name, "outputs/")
    if "logits" in expected:
        assert_close(out, expected["logits"])
    else:
        assert_close(out[0], expected["hidden"])
        assert_close(out[1], expected["pooled"])


def test_embedder_matches_torch(tmp_path):
    write_reference(tmp_path, "bert_relu")
    model, params, _ = models.from_pretrained(tmp_path, head="embedding")
    out = run(model, params, **reference("bert_relu", "inputs/"))
    assert_close(out, reference("bert_relu", "outputs/")["embedded"])


def test_minilm_matches_torch():
    ref = reference("minilm", "")
    folder = fetch("minilm")
    model, params, tokenizer = models.from_pretrained(folder, head="none")
    batch = tokenizer(list(ref["sentences"]), padding=True, return_tensors="np")
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    for name, array in batch.items():
        np.testing.assert_array_equal(array, ref[name])

    hidden, pooled = run(model, params, **batch)
    assert_close(hidden[:, ref["positions"]], ref["hidden"])
    assert_close(pooled, ref["pooled"])

    model, params, _ = models.from_pretrained(folder, head="embedding")
    embedded = np.asarray(run(model, params, **batch))
    assert_close(embedded, ref["embedded"])
    similar = embedded @ embedded[0]
    assert similar[1] > 0.5 > 0.2 > similar[2:].max()  # the paraphrase against the others


# What the model does.


def test_paths():
    params = init(bert.BertForSequenceClassification(CONFIG))
    paths = {"/".join(k.key for k in path) for path, _ in jax.tree.leaves_with_path(params)}
    layer = {
        f"attention/{name}" for name in ("query/{}", "key/{}", "value/{}", "out/{}", "norm/{}")
    } | {f"mlp/{name}" for name in ("up/{}", "down/{}", "norm/{}")}
    expected = {f"bert/encoder/layer_{n}/{path}" for n in range(2) for path in layer}
    expected |= {"bert/embeddings/norm/{}", "bert/pooler/{}", "classifier/{}"}
    expected = {
        path.format(leaf)
        for path in expected
        for leaf in ("scale" if "norm" in path else "kernel", "bias")
    } | {f"bert/embeddings/{name}/embedding" for name in ("word", "position", "token_type")}
    assert paths == expected


def test_padding_does_not_matter():
    for model in (
        bert.BertForSequenceClassification(CONFIG, pooling="mean"),
        bert.BertForSequenceClassification(CONFIG),
        bert.BertEmbedder(CONFIG),
    ):
        params = init(model)
        long = run(model, params, IDS[1:], MASK[1:])
        assert_close(long, run(model, params, IDS[1:, :3]))
        unmasked = run(model, params, IDS[1:])
        assert not np.allclose(long, unmasked, atol=1e-3)


def test_mean_pooling_is_the_mean_of_hidden_states():
    model = bert.BertForSequenceClassification(CONFIG, num_labels=3, pooling="mean")
    params = init(model)
    body = bert.Bert(CONFIG, add_pooler=False)
    hidden, pooled = run(body, params["bert"], IDS, MASK)
    assert pooled is None
    mean = np.stack([np.mean(hidden[0], axis=0), np.mean(hidden[1, :3], axis=0)])
    logits = mean @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    assert_close(run(model, params, IDS, MASK), logits)


@pytest.mark.parametrize(
    "model",
    [
        bert.BertForSequenceClassification(CONFIG),
        bert.BertForSequenceClassification(CONFIG, pooling="mean"),
        bert.BertForTokenClassification(CONFIG),
        bert.BertEmbedder(CONFIG),
    ],
    ids=["cls", "mean", "token", "embedder"],
)
def test_a_row_without_tokens_stays_finite(model):
    params = init(model)
    mask = np.array([[0, 0, 0, 0], [1, 1, 1, 0]])

    def loss(params):
        return jnp.sum(run(model, params, IDS, mask) ** 2)

    out = run(model, params, IDS, mask)
    grads = jax.grad(loss)(params)
    assert np.isfinite(out).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    alone = run(model, params, IDS[1:], mask[1:])
    assert_close(out[1:], alone)


def test_defaults_of_the_inputs():
    model = bert.BertForTokenClassification(CONFIG)
    params = init(model)
    expected = run(model, params, IDS, np.ones_like(IDS), np.zeros_like(IDS))
    np.testing.assert_array_equal(run(model, params, IDS), expected)
    positions = np.arange(4)[None]
    out = run(model, params, IDS, position_ids=positions)
    np.testing.assert_array_equal(out, expected)
    shifted = run(model, params, IDS, position_ids=positions + 1)
    typed = run(model, params, IDS, token_type_ids=np.ones_like(IDS))
    assert not np.allclose(shifted, expected, atol=1e-3)
    assert not np.allclose(typed, expected, atol=1e-3)


@pytest.mark.parametrize(
    "only", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]
)
def test_each_dropout_acts_in_training_only(only):
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    none = dataclasses.replace(CONFIG, **dict.fromkeys(names, 0.0))
    some = dataclasses.replace(none, **{only: 0.5})
    params = init(bert.BertForSequenceClassification(CONFIG))

    def classify(config, key, deterministic):
        model = bert.BertForSequenceClassification(config)
        rngs = {"dropout": key}
        return run(model, params, IDS, deterministic=deterministic, rngs=rngs)

    still = classify(none, KEY, False)
    np.testing.assert_array_equal(classify(some, KEY, True), still)
    trained = classify(some, KEY, False)
    assert not np.allclose(trained, still, atol=1e-3)
    assert not np.allclose(trained, classify(some, jax.random.key(8), False), atol=1e-3)


def test_compute_and_param_dtypes():
    config = dataclasses.replace(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model = bert.BertForSequenceClassification(config)
    params = init(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    low = run(model, params, IDS, MASK)
    assert low.dtype == jnp.bfloat16
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    high = run(bert.BertForSequenceClassification(CONFIG), exact, IDS, MASK)
    # bfloat16 has 8 bits of mantissa, and the error adds up over the layers.
    np.testing.assert_allclose(low.astype(jnp.float32), np.asarray(high), rtol=0.1, atol=0.1)
    embedder = bert.BertEmbedder(config)
    assert run(embedder, init(embedder), IDS).dtype == jnp.float32


def test_positions_may_be_given_for_a_longer_sequence():
    model = bert.Bert(CONFIG)
    ids = np.tile(IDS, 2)
    hidden, _ = run(model, init(model), ids, position_ids=np.arange(8)[None] % 4)
    assert np.isfinite(hidden).all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": np.ones((1, 7), int)}, r"7 tokens long, .* max_position_embeddings, 6"),
        ({"input_ids": IDS[0]}, r"input_ids is int.* of shape \(4,\), expected .*\(batch, seq\)"),
        ({"input_ids": IDS * 1.0}, r"input_ids is float.* of shape .*, expected integers"),
        ({"attention_mask": MASK[:1]}, r"attention_mask has shape \(1, 4\), expected \(2, 4\)"),
        ({"token_type_ids": MASK[0]}, r"token_type_ids has shape \(4,\), expected \(2, 4\)"),
        (
            {"position_ids": MASK[:, :3]},
            r"position_ids has shape \(2, 3\), expected \(2, 4\) or \(1, 4\)",
        ),
    ],
)
def test_wrong_inputs(inputs, message):
    with pytest.raises(ModelError, match=message):
        bert.BertForSequenceClassification(CONFIG).init(KEY, **({"input_ids": IDS} | inputs))


def test_wrong_head_settings():
    with pytest.raises(ConfigError, match="pooling is 'max', expected 'cls' or 'mean'"):
        init(bert.BertForSequenceClassification(CONFIG, pooling="max"))  # pyright: ignore
    with pytest.raises(ConfigError, match="num_labels is 0, expected at least 1"):
        init(bert.BertForTokenClassification(CONFIG, num_labels=0))


# The config.


def test_config_from_dict():
    config = bert.BertConfig.from_dict(
        {"model_type": "bert", "hidden_size": 24, "use_cache": True, "pruned_heads": {}}
        | {"classifier_dropout": None, "position_embedding_type": "absolute"}
    )
    assert config == bert.BertConfig(hidden_size=24)
    assert hash(config) == hash(bert.BertConfig(hidden_size=24))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta' in config.json, expected bert"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type is 'relative_key' in config.json, expected 'absolute'",
        ),
        ({"is_decoder": True}, "is_decoder is True in config.json, expected False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is .* expected {}"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish', expected one of gelu, gelu_new"),
        ({"hidden_size": 10}, "hidden_size is 10, expected a multiple of num_attention_heads, 12"),
        ({"hidden_size": "24"}, "hidden_size is '24', expected an integer of at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected an integer of at least 1"),
        ({"vocab_size": True}, "vocab_size is True, expected an integer"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob is 1.0, expected .* in \[0, 1\)"),
        ({"attention_probs_dropout_prob": None}, "attention_probs_dropout_prob is None, expected"),
        ({"classifier_dropout": "x"}, "classifier_dropout is 'x', expected a probability"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps is -1.0, expected a number of at least 0"),
        ({"initializer_range": None}, "initializer_range is None, expected a number"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        bert.BertConfig.from_dict(fields)


# The names.


@pytest.mark.parametrize("name", TINY)
def test_names_invert(name, tmp_path):
    _, params = load_reference(write_reference(tmp_path, name), name)
    assert_equal_trees(to_torch(params), reference(name, "weights/"))


def test_names_of_modules():
    path, name = "bert/encoder/layer_11/mlp/up", "bert.encoder.layer.11.intermediate.dense"
    assert bert.NAMES.torch_name(path) == name
    assert bert.NAMES.torch_name(path.removeprefix("bert/")) == name.removeprefix("bert.")


@pytest.mark.parametrize(
    "path",
    [
        "encoder/layer_0/attention/quary/kernel",
        "encoder/layer_{}/mlp/up/kernel",
        "encoder/layer_0/mlp/up/kernel_lora_a",
        "classifier/kernel_lora_a",
    ],
)
def test_paths_that_are_none(path):
    assert bert.NAMES.torch_name(path) is None


def test_to_torch_refuses_other_leaves():
    with pytest.raises(CheckpointError, match="Leaf classifier/kernel_lora_a has no name"):
        to_torch({"classifier": {"kernel_lora_a": np.ones((2, 3))}})


# Loading.

FIELDS = CONFIG.to_dict()


@pytest.fixture
def saved(tmp_path) -> tuple[Path, dict[str, Any]]:
    """A folder with a classifier of two labels, and its params."""
    params = init(bert.BertForSequenceClassification(CONFIG))
    return write(tmp_path / "saved", to_torch(params), FIELDS), params


def test_round_trip(saved):
    folder, params = saved
    model, loaded, tokenizer = models.from_pretrained(folder)
    assert model == bert.BertForSequenceClassification(CONFIG)
    assert tokenizer is None
    assert_equal_trees(loaded, params)


def test_prefixes_and_gammas_of_old_checkpoints(saved, tmp_path):
    folder, params = saved
    old = {
        name.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in to_torch(params).items()
    }
    old |= {
        "embeddings.position_ids": np.arange(6)[None],
        "cls.predictions.bias": np.ones(11, np.float32),
    }
    write(tmp_path / "old", old, FIELDS)
    assert_equal_trees(models.from_pretrained(tmp_path / "old")[1], params)
    # And the other way: a checkpoint with the prefix into Bert itself, which has none.
    assert_equal_trees(models.from_pretrained(folder, head="none")[1], params["bert"])


@pytest.mark.parametrize("head", ["token", "embedding"])
def test_a_pooler_without_use_is_left(head, saved):
    folder, params = saved
    _, loaded, _ = models.from_pretrained(folder, head=head)
    expected = {name: params["bert"][name] for name in ("embeddings", "encoder")}
    assert_equal_trees(loaded["bert"], expected)
    assert ("classifier" in loaded) == (head == "token")


def test_fresh_params_are_those_of_init(saved, tmp_path):
    folder, params = saved
    fresh = init(bert.BertForSequenceClassification(CONFIG, num_labels=3))
    _, loaded, _ = models.from_pretrained(folder, num_labels=3, key=KEY, fresh_head=True)
    assert_equal_trees(loaded, {"bert": params["bert"], "classifier": fresh["classifier"]})
    assert not np.any(loaded["classifier"]["bias"])

    bare = {
        name: array
        for name, array in to_torch(params).items()
        if "pooler" not in name and "classifier" not in name
    }
    write(tmp_path / "bare", bare, FIELDS)
    model, loaded, _ = models.from_pretrained(tmp_path / "bare", key=KEY)
    assert_equal_trees(loaded, params)  # `params` came from init with the same key
    model, loaded, _ = models.from_pretrained(tmp_path / "bare", head="none")
    assert model == bert.Bert(CONFIG, add_pooler=False)
    assert set(loaded) == {"embeddings", "encoder"}
    _, loaded, _ = models.from_pretrained(tmp_path / "bare", pooling="mean", key=KEY)
    assert set(loaded["bert"]) == {"embeddings", "encoder"}
    with pytest.raises(
        ConfigError, match=r"key is None, .* has no bert/pooler/bias, .*classifier/kernel, to be"
    ):
        models.from_pretrained(tmp_path / "bare")


def test_fresh_kernels_have_the_initializer_range(tmp_path):
    config = dataclasses.replace(CONFIG, hidden_size=64, initializer_range=0.02)
    model = bert.Bert(config, add_pooler=False)
    fields = FIELDS | {"hidden_size": 64, "initializer_range": 0.02}
    write(tmp_path, to_torch(init(model)), fields)
    _, loaded, _ = models.from_pretrained(tmp_path, key=KEY, num_labels=64)
    for leaf in (loaded["classifier"], loaded["bert"]["pooler"]):
        assert np.std(leaf["kernel"]) == pytest.approx(0.02, rel=0.1)
        assert not np.any(leaf["bias"])


def test_dtypes_and_dropout_of_from_pretrained(saved):
    folder, _ = saved
    model, loaded, _ = models.from_pretrained(
        folder, dropout=0.25, dtype=jnp.bfloat16, param_dtype=jnp.float16
    )
    assert model.config == dataclasses.replace(  # pyright: ignore
        CONFIG,
        hidden_dropout_prob=0.25,
        attention_probs_dropout_prob=0.25,
        classifier_dropout=0.25,
        dtype=jnp.bfloat16,
        param_dtype=jnp.float16,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.float16)}


def test_all_misfits_are_named_at_once(saved, tmp_path):
    _, params = saved
    state = to_torch(params)
    del state["bert.encoder.layer.1.output.dense.bias"]
    state["bert.encoder.layer.2.output.dense.bias"] = np.ones(8, np.float32)
    state["bert.encoder.layer.0.output.dense.weight"] = np.ones((12, 8), np.float32)
    state["something.else"] = np.ones(1, np.float32)
    write(tmp_path / "misfit", state, FIELDS)
    with pytest.raises(CheckpointError, match="BertForSequenceClassification") as e:
        models.from_pretrained(tmp_path / "misfit")
    for part in (
        "'bert.encoder.layer.0.output.dense.weight' has shape (12, 8), expected (8, 12).",
        "Missing (1): bert/encoder/layer_1/mlp/down/bias.",
        "Unexpected (2): bert.encoder.layer.2.output.dense.bias, something.else.",
    ):
        assert part in str(e.value)


def test_a_square_kernel_is_transposed(saved):
    folder, params = saved
    state = to_torch(params)
    kernel = params["bert"]["encoder"]["layer_0"]["attention"]["query"]["kernel"]
    stored = state["bert.encoder.layer.0.attention.self.query.weight"]
    np.testing.assert_array_equal(stored, np.asarray(kernel).T)
    _, loaded, _ = models.from_pretrained(folder)
    got = loaded["bert"]["encoder"]["layer_0"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(got, kernel)


def test_a_tensor_under_both_names(saved, tmp_path):
    state = to_torch(saved[1])
    state["pooler.dense.bias"] = np.ones(8, np.float32)
    write(tmp_path / "twice", state, FIELDS)
    message = "Both '.*pooler.dense.bias' and '.*pooler.dense.bias' are pooler.dense.bias"
    with pytest.raises(CheckpointError, match=message):
        models.from_pretrained(tmp_path / "twice")


def test_a_partial_head_is_not_filled_up(saved, tmp_path):
    state = to_torch(saved[1])
    del state["classifier.bias"]
    write(tmp_path / "partial", state, FIELDS)
    with pytest.raises(CheckpointError, match=r"Missing \(1\): classifier/bias"):
        models.from_pretrained(tmp_path / "partial", key=KEY)


def test_a_classifier_of_other_labels(saved):
    message = r"'classifier.bias' in .* has shape \(2,.*\), expected 3 labels. Pass num_labels=2"
    with pytest.raises(CheckpointError, match=message):
        models.from_pretrained(saved[0], num_labels=3, key=KEY)


def test_integer_weights(saved, tmp_path):
    state = to_torch(saved[1])
    state["classifier.bias"] = np.ones(2, np.int8)
    write(tmp_path / "int", state, FIELDS)
    with pytest.raises(CheckpointError, match=r"'classifier.bias' in .* has dtype int8, expected"):
        models.from_pretrained(tmp_path / "int")


def test_settings_of_from_pretrained(saved):
    with pytest.raises(ConfigError, match="head is 'mask', expected one of classification, token"):
        models.from_pretrained(saved[0], head="mask")  # pyright: ignore
    with pytest.raises(ConfigError, match="pooling is 'max', expected 'cls' or 'mean'"):
        models.from_pretrained(saved[0], pooling="max")  # pyright: ignore
    with pytest.raises(ConfigError, match=r"Options pooling mean nothing to head='token' of bert"):
        models.from_pretrained(saved[0], head="token", pooling="mean")
    with pytest.raises(ConfigError, match="dropout_prob is 2, expected a probability"):
        models.from_pretrained(saved[0], dropout=2)
    (saved[0] / "config.json").write_text(json.dumps(FIELDS | {"model_type": "bart"}))
    with pytest.raises(ConfigError, match=r"model_type is 'bart' .* of bert, .*Nearest: bert"):
        models.from_pretrained(saved[0])
