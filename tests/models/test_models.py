"""All models against torch (make_models.py, make_bert.py), and what all of them can do."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxlora as jl
from jaxlora import models, tree
from jaxlora.errors import ConfigError, ModelError
from jaxlora.models import deberta, gpt2, roberta, vit, weights
from jaxlora.models.architectures import architecture

REFERENCES = Path(__file__).parent.parent / "references"
FAMILIES = ("llama", "gpt2", "roberta", "deberta", "vit")
KEY = jax.random.key(7)


def _names() -> dict[str, tuple[str, str]]:
    """{a reference's name: (its file, what stands before its parts there)}."""
    names = {f: (f, "") for f in ("bert_gelu", "bert_gelu_new", "bert_gelu_tanh", "bert_relu")}
    for family in FAMILIES:
        with np.load(REFERENCES / f"{family}.npz") as file:
            found = [key.removesuffix("config") for key in file.files if key.endswith("/config")]
        names |= {prefix.removesuffix("/"): (family, prefix) for prefix in found}
    return names


NAMES = _names()
ONE_OF_EACH = (
    "bert_gelu",
    "llama_linear",
    "gpt2",
    "roberta",
    "deberta_xxl",
    "deberta_unshared",
    "vit_none",
)
"""For what takes long to compile: those whose layers differ."""
DECODERS = ("llama_linear", "llama_llama3", "mistral", "qwen2", "qwen3", "gpt2", "gpt2_untied")


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What torch said of one model, and its folder."""

    folder: Path
    kind: str  # torch's class
    state: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    @property
    def head(self) -> str:
        ends = {
            "ForCausalLM": "lm",
            "LMHeadModel": "lm",
            "ForSequenceClassification": "classification",
            "ForImageClassification": "classification",
            "ForTokenClassification": "token",
            "Model": "none",
        }
        return next(head for end, head in ends.items() if self.kind.endswith(end))

    def load(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        if self.head in ("classification", "token"):
            options["num_labels"] = self.outputs["logits"].shape[-1]
        model, params, _ = models.from_pretrained(self.folder, head=self.head, **options)
        return model, params


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    return functools.cache(lambda name: _write(folder / name, *NAMES[name]))


def _write(folder: Path, family: str, prefix: str) -> Reference:
    with np.load(REFERENCES / f"{family}.npz") as file:
        parts = {k.removeprefix(prefix): file[k] for k in file.files if k.startswith(prefix)}

    def part(name: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(name): v for k, v in parts.items() if k.startswith(name)}

    state = {name: array.astype(np.float32) for name, array in part("weights/").items()}
    inputs = {
        name: array.astype(np.int32) if array.dtype.kind == "i" else array.astype(np.float32)
        for name, array in part("inputs/").items()
    }
    outputs = part("outputs/")
    outputs.pop("embedded", None)  # another head's
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(str(parts["config"]))
    kind = str(parts["class" if "class" in parts else "head"])
    return Reference(folder, kind, state, inputs, outputs)


@pytest.fixture(params=NAMES)
def ref(request, references) -> Reference:
    return references(request.param)


@pytest.fixture(params=ONE_OF_EACH)
def one(request, references) -> Reference:
    return references(request.param)


@pytest.fixture(params=DECODERS)
def decoder(request, references) -> Reference:
    return references(request.param)


def outputs(model: Any, params: Any, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a model gives, without the place of what it does not give."""
    out = model.apply({"params": params}, **inputs)
    return tuple(x for x in out if x is not None) if isinstance(out, tuple) else (out,)


def tokens(array: Any, inputs: Mapping[str, Any]) -> Any:
    """Zero at padding, where states mean nothing."""
    if array.ndim < 3 or "attention_mask" not in inputs:
        return array
    return array * (inputs["attention_mask"] != 0)[..., None]


jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Twice as fast to compile, and these models are run once or twice."""


def run(model: Any, params: Any, inputs: Mapping[str, Any]) -> list[Any]:
    return jit(lambda params: [tokens(x, inputs) for x in outputs(model, params, inputs)])(params)


def init(model: Any, *args: Any) -> dict[str, Any]:
    """Params that are drawn without compiling anything."""
    shapes = jax.eval_shape(model.init, KEY, *args)["params"]
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda x: jnp.asarray(0.5 * draw(size=x.shape), x.dtype), shapes)


def check_dropout(make: Any, config: Any, only: str, *args: Any) -> None:
    """It acts in training only, alone."""
    none, some = (make(dataclasses.replace(config.with_dropout(0), **{only: p})) for p in (0, 0.5))
    params = init(none, *args)

    @jit
    def outputs(params: Any) -> Any:
        given = {"params": params}
        trained = some.apply(given, *args, deterministic=False, rngs={"dropout": KEY})
        return none.apply(given, *args), some.apply(given, *args), trained

    expected, still, trained = outputs(params)
    np.testing.assert_array_equal(still, expected)
    assert not np.allclose(trained, still, atol=1e-4)


def apply(model: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    return jit(lambda params: model.apply({"params": params}, *args, **kwargs))(params)


def outputs_and_gradient(ref: Reference, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    """The outputs, and the gradient of a function of them under torch's names."""
    model, params = ref.load(**options)

    def loss(params):
        out = [tokens(x, ref.inputs) for x in outputs(model, params, ref.inputs)]
        return sum(jnp.sum(jnp.sin(x)) for x in out), out

    gradient, out = jit(jax.grad(loss, has_aux=True))(params)
    return out, to_torch(model, gradient)


plain = functools.cache(outputs_and_gradient)


def to_torch(model: Any, tree: Any) -> dict[str, np.ndarray]:
    names = architecture(model.config.to_dict()["model_type"]).names
    return {name: make() for name, make in weights.to_torch(tree, names, "model").items()}


def assert_close(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    def close(got: Any, expected: Any) -> None:
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)

    jax.tree.map(close, got, expected)


def assert_equal_trees(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def write(folder: Path, state: Mapping[str, np.ndarray], ref: Reference) -> None:
    """Other tensors with a reference's config."""
    save_file(dict(state), folder / "model.safetensors")
    (folder / "config.json").write_text((ref.folder / "config.json").read_text())


# What all of them do.


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_matches_torch(ref, scan_layers):
    model, params = ref.load(scan_layers=scan_layers)
    out = run(model, params, ref.inputs)
    # Logits of up to 15 in float32, from sums that torch takes in another order.
    assert_close(out, [tokens(x, ref.inputs) for x in ref.outputs.values()], 3e-5)


@pytest.mark.parametrize(
    "options",
    [{"remat": True}, {"remat": "lora"}, {"scan_layers": True, "remat": "dots"}],
    ids=["remat", "remat_lora", "scan_remat_dots"],
)
def test_remat_and_scan_keep_the_gradients(one, options):
    out, gradient = outputs_and_gradient(one, **options)
    expected, expected_gradient = plain(one)
    assert_close(out, expected, 3e-5)  # another program sums in another order
    # Gradients of these steep models reach 1e3.
    scale = max(np.abs(g).max() for g in expected_gradient.values())
    assert gradient.keys() == expected_gradient.keys()
    for name, g in expected_gradient.items():
        np.testing.assert_allclose(gradient[name], g, rtol=1e-4, atol=1e-6 * scale, err_msg=name)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_folders(ref, scan_layers, tmp_path):
    model, params = ref.load(scan_layers=scan_layers)
    assert_equal_trees(to_torch(model, params), ref.state)
    folder = models.save_pretrained(tmp_path / "saved", model, params)
    fields = json.loads((folder / "config.json").read_text())
    assert fields["architectures"] == [ref.kind]
    again = models.from_pretrained(folder, head=ref.head, scan_layers=scan_layers)
    assert again.model == model
    assert_equal_trees(again.params, params)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_lora_on_all_linear_layers(one, scan_layers):
    model, params = one.load(scan_layers=scan_layers)
    config, variables = jl.LoraConfig(rank=2, targets="all-linear"), {"params": params}
    adapter = jl.lora_init(KEY, model, variables, config, **one.inputs)
    kernels = {path for path in tree.flat(params) if path.endswith("/kernel")}
    assert {site.path for site in adapter.spec.sites} == kernels

    @jit
    def both(adapter: Any, merged: Any) -> Any:
        adapted = jl.lora_apply(model, variables, adapter, **one.inputs)
        return adapted, model.apply({"params": merged}, **one.inputs)

    # Bit for bit it is where nothing is compiled together, which test_properties holds.
    adapted, base = both(adapter, params)
    assert_close(adapted, base)
    moved = jax.tree.map(lambda x: x + 0.1, adapter)
    adapted, merged = both(moved, jl.merge(params, moved))
    assert_close(adapted, merged, 1e-4)
    assert not np.allclose(jax.tree.leaves(merged)[0], jax.tree.leaves(base)[0], atol=0.1)


def test_bfloat16(one):
    model, params = one.load(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    out = run(model, params, one.inputs)
    assert {x.dtype for x in out} == {jnp.dtype(jnp.bfloat16)}
    for low, high in zip(out, one.outputs.values(), strict=True):
        high = tokens(high, one.inputs)
        # 8 bits of mantissa, and weights that make every error grow from layer to layer.
        off = np.linalg.norm(low.astype(np.float32) - high) / np.linalg.norm(high)
        assert off < 0.15


# What the causal ones do.


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_decoding_step_by_step_is_the_whole(decoder, scan_layers):
    model, params = decoder.load(scan_layers=scan_layers)
    ids = decoder.inputs["input_ids"]
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    whole = apply(model, params, ids, mask)

    @jit
    def step(cache: Any, ids: Any, mask: Any) -> Any:
        return model.apply({"params": params}, ids, mask, cache=cache)

    cache = model.empty_cache(len(ids), ids.shape[1] + 2)
    first, cache = step(cache, ids[:, :4], mask[:, :4])
    parts = [first]
    for n in range(4, ids.shape[1]):
        logits, cache = step(cache, ids[:, n : n + 1], mask[:, n : n + 1])
        parts.append(logits)
    inputs = {"attention_mask": mask}
    assert_close(tokens(jnp.concatenate(parts, 1), inputs), tokens(whole, inputs))


def test_packed_sequences_do_not_see_each_other(decoder):
    model, params = decoder.load()
    ids = decoder.inputs["input_ids"][:1]

    @jit
    def logits(params: Any) -> Any:
        variables = {"params": params}
        packed = model.apply(variables, ids, np.array([[1, 1, 1, 2, 2, 2, 2]]))
        apart = [model.apply(variables, part) for part in (ids[:, :3], ids[:, 3:])]
        return packed, jnp.concatenate(apart, 1), model.apply(variables, ids[:, 3:], last=2)

    packed, apart, last = logits(params)
    assert_close(packed, apart)
    assert_close(last, apart[:, -2:])


# What is GPT-2's own.

GPT2 = gpt2.GPT2Config(vocab_size=11, n_positions=4, n_embd=8, n_layer=1, n_head=2)
IDS = np.array([[1, 2, 3, 4], [5, 6, 7, 0]])


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_gpt2s_fused_kernel(references, scan_layers):
    ref = references("gpt2")
    model, params = ref.load(scan_layers=scan_layers)
    config = jl.LoraConfig(rank=2, targets="c_attn", fused={"c_attn": (True, False, True)})
    adapter = jl.lora_init(KEY, model, {"params": params}, config, **ref.inputs)
    paths = {site.path for site in adapter.spec.sites}
    numbers = [""] if scan_layers else ["_0", "_1"]
    assert paths == {f"transformer/h{n}/attn/c_attn/kernel" for n in numbers}
    moved = jax.tree.map(lambda x: x + 0.1, adapter)
    merged = jl.merge(params, moved)
    q, k, v = np.split(
        np.asarray(tree.flat(merged)[sorted(paths)[0]] - tree.flat(params)[sorted(paths)[0]]),
        3,
        axis=-1,
    )
    assert q.any()
    assert not k.any()
    assert v.any()
    adapted = jit(lambda adapter: jl.lora_apply(model, {"params": params}, adapter, **ref.inputs))
    out = adapted(moved)
    assert_close(out, apply(model, merged, **ref.inputs), 1e-4)


def test_gpt2s_files_without_prefix_and_with_buffers(references, tmp_path):
    ref = references("gpt2")
    state = {name.removeprefix("transformer."): array for name, array in ref.state.items()}
    state |= {"h.0.attn.bias": np.ones((1, 1, 12, 12), np.float32)}
    state |= {"h.1.attn.masked_bias": np.array(-1e4, np.float32)}
    write(tmp_path, state, ref)
    assert_equal_trees(models.from_pretrained(tmp_path).params, ref.load()[1])


def test_gpt2s_positions_end():
    model = gpt2.GPT2LMHeadModel(GPT2)
    params = init(model, IDS)
    long = np.tile(IDS, 2)
    with pytest.raises(ModelError, match="8 tokens long, expected at most n_positions, 4"):
        apply(model, params, long)
    packed = apply(model, params, long, position_ids=np.arange(8)[None] % 4)
    assert np.isfinite(packed).all()
    with pytest.raises(ModelError, match="cache is 5 tokens long, expected at most n_positions, 4"):
        model.empty_cache(1, 5)
    beyond = apply(model, params, IDS, position_ids=np.array([[0, 1, 2, 4]]))
    assert np.isnan(beyond[:, 3]).all()  # not the last position's


@pytest.mark.parametrize("only", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_gpt2s_dropouts(only):
    check_dropout(gpt2.GPT2LMHeadModel, GPT2, only, IDS)


# What is RoBERTa's own.

ROBERTA = roberta.RobertaConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=6,
    type_vocab_size=1,
    initializer_range=0.5,
)


def test_robertas_positions_follow_the_padding_token():
    model = roberta.RobertaForTokenClassification(ROBERTA)
    ids = np.array([[1, 1, 5, 6], [5, 6, 1, 7]])
    params = init(model, ids)
    counted = apply(model, params, ids)
    positions = np.array([[1, 1, 2, 3], [2, 3, 1, 4]])
    given = apply(model, params, ids, position_ids=positions)
    np.testing.assert_array_equal(counted, given)
    with pytest.raises(ModelError, match=r"5 tokens long, expected at most .* - 1, 4"):
        apply(model, params, np.ones((1, 5), int))


def test_robertas_head_is_drawn_for_a_masked_language_model(references, tmp_path):
    ref = references("roberta")
    state = {name: array for name, array in ref.state.items() if "classifier" not in name}
    state |= {"lm_head.bias": np.ones(29, np.float32), "roberta.embeddings.position_ids": IDS}
    write(tmp_path, state, ref)
    _, params, _ = models.from_pretrained(tmp_path, key=KEY, num_labels=5)
    assert_equal_trees(params["roberta"], ref.load()[1]["roberta"])
    assert params["classifier"]["dense"]["kernel"].any()
    assert params["classifier"]["out_proj"]["kernel"].shape == (16, 5)


def test_robertas_head_has_two_dropouts():
    make = roberta.RobertaForSequenceClassification
    check_dropout(make, ROBERTA, "classifier_dropout", IDS)
    model = make(dataclasses.replace(ROBERTA.with_dropout(0), classifier_dropout=0.5))
    params = init(model, IDS)
    # Without the head's first layer, only the second dropout is left to differ.
    params["classifier"]["dense"]["kernel"] *= 0
    trained = apply(model, params, IDS, deterministic=False, rngs={"dropout": KEY})
    assert not np.allclose(trained, apply(model, params, IDS), atol=1e-4)


# What is DeBERTa's own.

DEBERTA = deberta.DebertaConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=4,
    position_biased_input=False,
    relative_attention=True,
    pos_att_type=("c2p", "p2c"),
    conv_kernel_size=3,
    initializer_range=0.5,
)


def test_debertas_length_is_limited_by_absolute_positions_only():
    long = np.tile(IDS, 2)
    model = deberta.Deberta(DEBERTA)
    assert np.isfinite(apply(model, init(model, IDS), long)).all()
    biased = deberta.Deberta(dataclasses.replace(DEBERTA, position_biased_input=True))
    with pytest.raises(ModelError, match=r"8 tokens long, .* max_position_embeddings, 4"):
        apply(biased, init(biased, IDS), long)


def test_debertas_padding_does_not_matter():
    model = deberta.DebertaForTokenClassification(DEBERTA)
    params = init(model, IDS)
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 0]])
    padded = apply(model, params, IDS, mask)[:, :3]
    assert_close(padded, apply(model, params, IDS[:, :3]))
    assert not np.allclose(padded, apply(model, params, IDS)[:, :3], atol=1e-3)


def test_debertas_unused_position_table_is_left(references, tmp_path):
    ref = references("deberta_v3")
    table = {"deberta.embeddings.position_embeddings.weight": np.ones((12, 16), np.float32)}
    write(tmp_path, ref.state | table, ref)
    assert_equal_trees(models.from_pretrained(tmp_path).params, ref.load()[1])


@pytest.mark.parametrize(
    "only", ["hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout", "cls_dropout"]
)
def test_debertas_dropouts(only):
    check_dropout(deberta.DebertaForSequenceClassification, DEBERTA, only, IDS)


# What is ViT's own.

VIT = vit.ViTConfig(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    image_size=(6, 4),
    patch_size=2,
    num_channels=1,
    initializer_range=0.5,
)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.ones((2, 1, 6, 4), np.float32), r"of shape \(2, 1, 6, 4\), .*\(batch, 6, 4, 1\)"),
        (np.ones((6, 4, 1), np.float32), r"of shape \(6, 4, 1\), .*: channels last"),
        (np.ones((2, 6, 4, 1), np.uint8), r"pixel_values is uint8 of shape .*, expected floats"),
    ],
)
def test_vits_wrong_inputs(image, message):
    with pytest.raises(ModelError, match=message):
        vit.ViTForImageClassification(VIT).init(KEY, image)


@pytest.mark.parametrize("only", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_vits_dropouts(only):
    image = np.asarray(jax.random.normal(KEY, (2, 6, 4, 1)))
    check_dropout(vit.ViTForImageClassification, VIT, only, image)


# Errors of the configs, and what else is saved.


def test_the_tokenizers_special_tokens_are_saved(tmp_path):
    tokenizer = SimpleNamespace(
        bos_token_id=None, eos_token_id=3, pad_token_id=0, save_pretrained=lambda _: None
    )
    for name, model, pad in (
        ("gpt2", gpt2.GPT2ForSequenceClassification(GPT2), 0),
        ("roberta", roberta.RobertaForSequenceClassification(ROBERTA), 1),
    ):
        params = init(model, IDS)
        folder = models.save_pretrained(tmp_path / name, model, params, tokenizer=tokenizer)
        fields = json.loads((folder / "config.json").read_text())
        assert (fields["eos_token_id"], fields["pad_token_id"]) == (3, pad)
        assert "bos_token_id" not in fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is True in config.json, expected False",
        ),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention is True"),
        ({"model_type": "gpt2", "n_embd": 10}, "n_embd is 10, expected a multiple of n_head, 12"),
        ({"model_type": "gpt2", "n_inner": 0}, "n_inner is 0, expected an integer of at least 1"),
        ({"model_type": "gpt2", "attn_pdrop": 1}, r"attn_pdrop is 1, expected .* in \[0, 1\)"),
        (
            {"model_type": "gpt2", "activation_function": "mish"},
            "activation_function is 'mish', expected one of gelu",
        ),
        (
            {"model_type": "roberta", "position_embedding_type": "relative_key"},
            "position_embedding_type is 'relative_key' in config.json, expected 'absolute'",
        ),
        ({"model_type": "camembert", "is_decoder": True}, "is_decoder is True in config.json"),
        (
            {"model_type": "xlm-roberta", "pad_token_id": -1},
            "pad_token_id is -1, expected an integer of at least 0",
        ),
        ({"model_type": "deberta-v2", "conv_groups": 2}, "conv_groups is 2 in config.json"),
        (
            {"model_type": "deberta-v2", "pos_att_type": "c2p|p2p"},
            r"pos_att_type is 'c2p\|p2p', expected 'c2p', 'p2c' or both",
        ),
        (
            {"model_type": "deberta-v2", "norm_rel_ebd": "rms"},
            "norm_rel_ebd is 'rms', expected 'none' or 'layer_norm'",
        ),
        (
            {"model_type": "deberta-v2", "conv_kernel_size": 4},
            "conv_kernel_size is 4, expected an odd size",
        ),
        (
            {"model_type": "deberta-v2", "position_buckets": 8, "max_relative_positions": 5},
            "max_relative_positions is 5, expected more than half of position_buckets, 8, and one",
        ),
        (
            {"model_type": "deberta-v2", "attention_head_size": 32},
            "attention_head_size is 32 in config.json, expected 64",
        ),
        (
            {"model_type": "deberta-v2", "conv_act": "mish"},
            "conv_act is 'mish', expected one of gelu",
        ),
        (
            {"model_type": "vit", "image_size": [8, 8, 3]},
            r"image_size is \[8, 8, 3\], expected pixels, or \(height, width\)",
        ),
        ({"model_type": "vit", "patch_size": 0}, "patch_size is 0, expected pixels"),
        (
            {"model_type": "vit", "image_size": 8, "patch_size": [4, 9]},
            r"image_size is \(8, 8\), expected at least patch_size, \(4, 9\)",
        ),
        ({"model_type": "vit", "head_dim": 32}, "head_dim is 32 in config.json, expected 64"),
        ({"model_type": "vit", "pooler_act": "mish"}, "pooler_act is 'mish', expected one of gelu"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        architecture(fields["model_type"]).config.from_dict(fields)


@pytest.mark.parametrize("model_type", models.ARCHITECTURES)
def test_configs_survive_config_json(model_type):
    cls = architecture(model_type).config
    config = cls.from_dict(cls().to_dict())
    assert cls.from_dict(json.loads(json.dumps(config.to_dict()))) == config
