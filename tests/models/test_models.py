"""All models against torch (make_models.py, make_bert.py), and what all of them can do."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxlora as jl
from jaxlora import models
from jaxlora.errors import ConfigError, ModelError
from jaxlora.models import gpt2, weights
from jaxlora.models.pretrained import architecture

REFERENCES = Path(__file__).parent.parent / "references"
FAMILIES = ("llama", "gpt2")
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


@pytest.fixture(params=[name for name in NAMES if NAMES[name][0] in ("llama", "gpt2")])
def decoder(request, references) -> Reference:
    ref = references(request.param)
    if ref.head != "lm":
        pytest.skip("no language model")
    return ref


def outputs(model: Any, params: Any, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a model gives, without the place of what it does not give."""
    out = model.apply({"params": params}, **inputs)
    return tuple(x for x in out if x is not None) if isinstance(out, tuple) else (out,)


def tokens(array: Any, inputs: Mapping[str, Any]) -> Any:
    """Zero at padding, where states mean nothing."""
    if array.ndim < 3 or "attention_mask" not in inputs:
        return array
    return array * (inputs["attention_mask"] != 0)[..., None]


def run(model: Any, params: Any, inputs: Mapping[str, Any]) -> list[Any]:
    return jax.jit(lambda params: [tokens(x, inputs) for x in outputs(model, params, inputs)])(
        params
    )


def outputs_and_gradient(ref: Reference, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    """The outputs, and the gradient of a function of them under torch's names."""
    model, params = ref.load(**options)

    def loss(params):
        out = [tokens(x, ref.inputs) for x in outputs(model, params, ref.inputs)]
        return sum(jnp.sum(jnp.sin(x)) for x in out), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
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


# What all of them do.


def test_matches_torch(ref):
    model, params = ref.load()
    out = run(model, params, ref.inputs)
    # Logits of up to 15 in float32, from sums that torch takes in another order.
    assert_close(out, [tokens(x, ref.inputs) for x in ref.outputs.values()], 3e-5)


@pytest.mark.parametrize(
    "options",
    [{"scan_layers": True}, {"remat": True}, {"scan_layers": True, "remat": True}],
    ids=["scan", "remat", "scan_remat"],
)
def test_scan_and_remat_change_nothing(ref, options):
    out, gradient = outputs_and_gradient(ref, **options)
    expected, expected_gradient = plain(ref)
    assert_close(out, expected)
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
def test_lora_on_all_linear_layers(ref, scan_layers):
    model, params = ref.load(scan_layers=scan_layers)
    config, variables = jl.LoraConfig(rank=2, targets="all-linear"), {"params": params}
    plan = jl.plan(model, variables, config, **ref.inputs)
    kernels = {path for path in weights.flat(params) if path.endswith("/kernel")}
    assert {site.path for site in plan.sites} == kernels
    if scan_layers:
        return
    adapter = jl.lora_init(KEY, model, variables, config, **ref.inputs)
    out = jl.lora_apply(model, variables, adapter, **ref.inputs)
    assert_equal_trees(out, model.apply(variables, **ref.inputs))


def test_bfloat16(ref):
    model, params = ref.load(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    out = run(model, params, ref.inputs)
    assert {x.dtype for x in out} == {jnp.dtype(jnp.bfloat16)}
    for low, high in zip(out, ref.outputs.values(), strict=True):
        high = tokens(high, ref.inputs)
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
    whole = model.apply({"params": params}, ids, mask)

    @jax.jit
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
    last = model.apply({"params": params}, ids, mask, last=2)
    np.testing.assert_array_equal(last, whole[:, -2:])


def test_packed_sequences_do_not_see_each_other(decoder):
    model, params = decoder.load()
    ids = decoder.inputs["input_ids"][:1]
    packed = model.apply({"params": params}, ids, np.array([[1, 1, 1, 2, 2, 2, 2]]))
    apart = [model.apply({"params": params}, part) for part in (ids[:, :3], ids[:, 3:])]
    assert_close(packed, jnp.concatenate(apart, 1))


# What is GPT-2's own.

GPT2 = gpt2.GPT2Config(vocab_size=11, n_positions=4, n_embd=8, n_layer=2, n_head=2)
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
        np.asarray(weights.flat(merged)[sorted(paths)[0]] - weights.flat(params)[sorted(paths)[0]]),
        3,
        axis=-1,
    )
    assert q.any()
    assert not k.any()
    assert v.any()
    out = jl.lora_apply(model, {"params": params}, moved, **ref.inputs)
    assert_close(out, model.apply({"params": merged}, **ref.inputs), 1e-4)


def test_gpt2s_positions_end():
    model = gpt2.GPT2LMHeadModel(GPT2)
    params = model.init(KEY, IDS)["params"]
    long = np.tile(IDS, 2)
    with pytest.raises(ModelError, match="8 tokens long, expected at most n_positions, 4"):
        model.apply({"params": params}, long)
    packed = model.apply({"params": params}, long, position_ids=np.arange(8)[None] % 4)
    assert np.isfinite(packed).all()
    with pytest.raises(ModelError, match="cache is 5 tokens long, expected at most n_positions, 4"):
        model.empty_cache(1, 5)
    beyond = model.apply({"params": params}, IDS, position_ids=np.array([[0, 1, 2, 4]]))
    assert np.isfinite(beyond[:, :3]).all()
    assert np.isnan(beyond[:, 3]).all()  # not the last position's


@pytest.mark.parametrize("only", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_gpt2s_dropouts(only):
    model = gpt2.GPT2LMHeadModel(GPT2.with_dropout(0))
    params = model.init(KEY, IDS)["params"]
    some = gpt2.GPT2LMHeadModel(dataclasses.replace(model.config, **{only: 0.5}))
    still = model.apply({"params": params}, IDS)
    np.testing.assert_array_equal(some.apply({"params": params}, IDS), still)
    rngs = {"dropout": KEY}
    trained = some.apply({"params": params}, IDS, deterministic=False, rngs=rngs)
    assert not np.allclose(trained, still, atol=1e-4)


# Errors of the configs.


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
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        architecture(fields["model_type"]).config.from_dict(fields)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_configs_survive_config_json(model_type):
    config = architecture(model_type).config()
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
