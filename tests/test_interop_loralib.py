"""loralib's checkpoints: its own give its outputs, ours come back exactly, wrong ones say why."""

import doctest
import functools
import inspect
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxlora as jl
from jaxlora import algebra, models, tree, whole
from jaxlora.errors import AdapterError, CheckpointError, ConfigError
from jaxlora.interop import loralib, loralib_conv, safetensors, torch_zip, unpickle
from jaxlora.interop.loralib_state import read

REFERENCES = Path(__file__).parent / "references"
# `make test-interop` points this at a folder of files that torch has made just now.
FILES = Path(os.environ.get("JAXLORA_REFERENCES", REFERENCES))
QV = {"c_attn": (True, False, True)}
IDS = np.arange(3, 17).reshape(2, 7)
ALPHA = 3


class Net(nn.Module):
    """The small net of make_loralib_files.py."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 5, name="embed")(ids)
        x = nn.tanh(nn.Conv(6, (3, 3), name="wide")(x))
        x = nn.tanh(nn.Conv(4, (3, 3), feature_group_count=2, name="grouped")(x))
        return nn.Dense(3, name="out")(nn.tanh(nn.Conv(6, (1, 1), name="point")(x)))


NET = {name: name for name in ("embed", "wide", "grouped", "point", "out")}
GRID = np.arange(24).reshape(2, 3, 4) % 7


def read_model(folder, family, scan=False):
    """The model of gpt2.npz or roberta.npz and its variables, through a folder."""
    with np.load(REFERENCES / f"{family}.npz") as file:
        parts = {k.removeprefix(f"{family}/"): file[k] for k in file.files}
    own = {k.removeprefix("weights/"): v for k, v in parts.items() if k.startswith("weights/")}
    folder = folder / f"{family}-{scan}"
    folder.mkdir()
    save_file({k: v.astype(np.float32) for k, v in own.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(str(parts["config"]))
    head, more = ("lm", {}) if family == "gpt2" else ("classification", {"num_labels": 3})
    options: Any = {"head": head, "scan_layers": scan, **more}
    model, params, _ = models.from_pretrained(folder, **options)
    return model, {"params": params}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(family, scan) -> model and variables."""
    folder = tmp_path_factory.mktemp("models")
    read_once = functools.cache(functools.partial(read_model, folder))
    return lambda family, scan=False: read_once(family, scan)


def file_of(family):
    return FILES / f"loralib_{family}.pt"


def outputs(family):
    with np.load(FILES / "loralib_files.npz") as file:
        return file[f"{family}/outputs"]


def net():
    """The net with the weights of the file."""
    with np.load(FILES / "loralib_files.npz") as file:
        base = {k.removeprefix("net/base/"): x for k, x in file.items() if "net/base/" in k}
    leaves: dict[str, Any] = {"embed/embedding": base["embed.weight"], "out/bias": base["out.bias"]}
    leaves["out/kernel"] = base["out.weight"].T
    for name in ("wide", "grouped", "point"):
        leaves[f"{name}/kernel"] = np.transpose(base[f"{name}.conv.weight"], (2, 3, 1, 0))
        leaves[f"{name}/bias"] = base[f"{name}.conv.bias"]
    return Net(), {"params": tree.nested(jax.tree.map(jnp.asarray, leaves))}


def applied(model, variables, adapter, ids):
    return jl.lora_apply(model, variables, adapter, ids)


def assert_close(left, right, tolerance=1e-5):
    np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("scan", [False, True], ids=["layers", "scan"])
def test_a_gpt2_of_the_published_form_gives_loralibs_logits(loaded, scan):
    model, variables = loaded("gpt2", scan)
    adapter = loralib.load(file_of("gpt2"), model, variables, alpha=ALPHA, rank=2, fused=QV)
    logits = applied(model, variables, adapter, IDS)
    assert_close(logits[0] if isinstance(logits, tuple) else logits, outputs("gpt2"), 1e-4)
    assert {site.layout.blocks for site in adapter.spec.sites} == {(True, False, True)}
    assert {(site.rank, site.scaling) for site in adapter.spec.sites} == {(2, 1.5)}
    merged = {"params": jl.merge(variables["params"], adapter)}
    assert_close(model.apply(merged, IDS), outputs("gpt2"), 1e-4)


def test_a_roberta_brings_its_head(loaded):
    model, variables = loaded("roberta")
    adapter = loralib.load(file_of("roberta"), model, variables, alpha=ALPHA)
    assert_close(applied(model, variables, adapter, IDS), outputs("roberta"), 1e-4)
    assert len(adapter.spec.sites) == 4
    assert {leaf.path for leaf in adapter.spec.saved} == {
        f"classifier/{layer}/{leaf}"
        for layer in ("dense", "out_proj")
        for leaf in ("kernel", "bias")
    }


def test_embeddings_convolutions_and_biases():
    model, variables = net()
    adapter = loralib.load(file_of("net"), model, variables, GRID, alpha=ALPHA, names=NET)
    assert_close(applied(model, variables, adapter, GRID), outputs("net"), 1e-4)
    assert adapter.spec.config.bias == "none"
    assert [leaf.path for leaf in adapter.spec.saved] == ["out/bias"]
    ranks = {site.path.partition("/")[0]: site.rank for site in adapter.spec.sites}
    assert ranks == {"embed": 2, "wide": 6, "grouped": 4, "point": 2, "out": 2}


@pytest.mark.parametrize(("k", "outputs", "groups", "rank"), [
    (1, 3, 1, 2), (2, 9, 1, 8), (3, 20, 1, 18), (3, 7, 1, 7), (2, 6, 2, 6), (1, 4, 2, 4),
])  # fmt: skip
def test_a_convolutions_update_is_loralibs(k, outputs, groups, rank):
    """The product of loralib's factors in the order of memory of torch's kernel."""
    r, inputs = 2, 4
    draw = np.random.default_rng(0)
    a = draw.normal(size=(r * k, inputs * k)).astype(np.float32)
    b = draw.normal(size=(outputs // groups * k, r * k)).astype(np.float32)
    expected = (b @ a).reshape(outputs, inputs // groups, k, k)
    conv = nn.Conv(outputs, (k, k), feature_group_count=groups)
    x = jnp.ones((1, 5, 5, inputs))
    config = jl.LoraConfig(rank=rank)
    site = jl.plan(conv, jax.eval_shape(conv.init, jax.random.key(0), x), config, x).sites[0]
    parts, found, own = loralib_conv.from_loralib("conv", site, a, b)
    assert (found, own) == (rank, r)
    delta = np.einsum("rihw,or->oihw", parts["a"], parts["b"][..., 0, 0])
    assert_close(delta, expected)


METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "narrow": {"param_dtype": jnp.bfloat16},
    "patterns": {"rank_pattern": {"layer.*/query": 3}},
    "all biases": {"bias": "all"},
    "biases": {"bias": "lora_only"},
    "head": {"modules_to_save": "classifier"},
    "whole leaves": {"modules_to_save": ("classifier/dense", "encoder/layer_?0?/.*/key/bias")},
    "embedding": {"targets": ("query", "embeddings/word")},
}


def made(model, variables, *inputs, **options):
    """An adapter with leaves of all different numbers, the frozen ones too."""
    fields: dict[str, Any] = {"rank": 2, "alpha": 3} | options
    config = jl.LoraConfig(**fields)
    spec = jl.plan(model, jax.eval_shape(lambda: variables), config, *inputs).spec
    draw = np.random.default_rng(0)
    shapes = spec.leaf_shapes | spec.frozen_shapes
    return spec.adapter({p: jnp.asarray(draw.normal(size=s), config.param_dtype)
                         for p, s in shapes.items()})  # fmt: skip


@pytest.mark.parametrize("scan", [False, True], ids=["layers", "scan"])
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_comes_back_exactly(loaded, method, scan, tmp_path):
    if scan and method == "whole leaves":
        method = "head"
    model, variables = loaded("roberta", scan)
    options = {"targets": ("query", "value")} | METHODS[method]
    adapter = made(model, variables, IDS, **options)
    file = loralib.save(tmp_path / "lora.pt", adapter, model)
    found = loralib.load(file, model, variables, alpha=3)
    assert found.spec.sites == adapter.spec.sites
    assert found.spec.saved == adapter.spec.saved
    assert_equal(found.params, adapter.params)
    assert {x.dtype for x in jax.tree.leaves(found)} == {adapter.spec.config.param_dtype}


@pytest.mark.parametrize("scan", [False, True], ids=["layers", "scan"])
@pytest.mark.parametrize("mask", [(True, False, True), (False, False, True), (True, True, True)])
def test_masks_come_back_exactly(loaded, mask, scan, tmp_path):
    model, variables = loaded("gpt2", scan)
    fused = {"c_attn": mask}
    adapter = made(model, variables, IDS, targets="c_attn", fused=fused)
    file = loralib.save(tmp_path / "lora.pt", adapter, model)
    found = loralib.load(file, model, variables, alpha=3, fused=() if all(mask) else fused)
    assert found.spec.sites == adapter.spec.sites
    assert_equal(found.params, adapter.params)


def test_convolutions_come_back_exactly(tmp_path):
    model, variables = net()
    adapter = made(model, variables, GRID, targets=tuple(NET), bias="lora_only")
    file = loralib.save(tmp_path / "lora.pt", adapter, model, NET)
    shapes = {name: x.shape for name, x in torch_zip.read(file).items()}
    assert shapes["wide.lora_A"] == (6, 15)
    assert shapes["wide.lora_B"] == (18, 6)
    assert {n for n in shapes if "bias" in n} == {
        "out.bias", "wide.conv.bias", "grouped.conv.bias", "point.conv.bias"
    }  # fmt: skip
    found = loralib.load(file, model, variables, GRID, alpha=3, names=NET)
    assert found.spec.sites == adapter.spec.sites
    assert_equal(found.params, adapter.params)


@pytest.mark.parametrize("options", [
    {"rslora": True}, {"alpha_pattern": {"layer_0/.*": 5}}, {"init": "pissa"}, {"init": "olora"},
    {"freeze_a": True}, {"init": "pissa", "freeze_a": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_other_methods_come_back_as_equal_updates(loaded, family, options, tmp_path):
    model, variables = loaded(family)
    targets = {"targets": "c_attn", "fused": QV} if family == "gpt2" else {"targets": "query"}
    options = {k: {"h_0/.*": 5} if family == "gpt2" and k == "alpha_pattern" else x
               for k, x in options.items()}  # fmt: skip
    adapter = made(model, variables, IDS, **targets, **options)
    file = loralib.save(tmp_path / "lora.pt", adapter, model)
    fused = QV if family == "gpt2" else ()
    found = loralib.load(file, model, variables, alpha=3, fused=fused)
    assert {site.scaling * site.rank for site in found.spec.sites} == {3}
    expected, deltas = algebra.delta(adapter), algebra.delta(found)
    for path, delta in expected.items():
        assert_close(deltas[path], delta)
        assert np.abs(delta).max() > 0.1


def test_partitioned_params_give_boxed_leaves(tmp_path):
    class Parted(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            return nn.Dense(3, kernel_init=init, name="fc")(x)

    model, x = Parted(), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    adapter = made(model, variables, x)
    file = loralib.save(tmp_path / "lora.pt", adapter, model, {"fc": "fc"})
    found = loralib.load(file, model, variables, x, alpha=3, names={"fc": "fc"}).params["fc"]
    for part, names in (("a", (None, "embed")), ("b", (None, "mlp"))):
        leaf = f"kernel_lora_{part}"
        assert found[leaf].names == names
        np.testing.assert_array_equal(found[leaf].value, adapter.params["fc"][leaf])


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        for n in range(2):
            x = nn.tanh(nn.Dense(4, name=f"layers_{n}")(x))
        return x


def test_a_table_of_names_for_a_model_of_ones_own(tmp_path):
    model, x = Layers(), jnp.ones((1, 4))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    adapter, names = made(model, variables, x), {"layers_{}": "blocks.{}.fc"}
    file = loralib.save(tmp_path / "lora.pt", adapter, model, names)
    assert set(read(file).factors) == {"blocks.0.fc", "blocks.1.fc"}
    assert_equal(
        loralib.load(file, model, variables, x, alpha=3, names=names).params, adapter.params
    )
    with pytest.raises(
        ConfigError, match=r"a Layers, which is none of jaxlora.models, so example i"
    ):
        loralib.load(file, model, variables, alpha=3, names=names)


def test_a_dtype_that_is_asked_for(loaded):
    model, variables = loaded("roberta")
    abstract = jax.eval_shape(lambda: variables)
    found = loralib.load(file_of("roberta"), model, abstract, alpha=ALPHA, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}


def test_doubles_become_floats_unless_jax_has_doubles(loaded, tmp_path):
    model, variables = loaded("roberta")
    doubles = {name: x.astype(np.float64) for name, x in pair(Q).items()}
    file = torch_zip.write(tmp_path / "lora.pt", doubles)
    for wide in (False, True):
        with jax.enable_x64(wide):
            found = loralib.load(file, model, variables, alpha=3)
        assert {str(x.dtype) for x in jax.tree.leaves(found)} == {"float64" if wide else "float32"}


ONES = np.ones((2, 16), np.float32)
Q, V = (f"roberta.encoder.layer.0.attention.self.{name}" for name in ("query", "value"))


def pair(module, r=2, inputs=16, outputs=16):
    return {
        f"{module}.lora_A": np.ones((r, inputs), np.float32),
        f"{module}.lora_B": np.ones((outputs, r), np.float32),
    }


BAD = {
    "one of a pair": ({f"{Q}.lora_A": ONES}, CheckpointError, rf"lacks {Q}.lora_B, the other of"),
    "no factors": ({"w": ONES}, CheckpointError, r"holds no factors, expected '<module>.lora_A'"),
    "nothing": ({}, CheckpointError, r"holds no factors, .*It has nothing"),
    "strays": (
        {**pair(Q), **pair("bert.quary"), "head.weight": ONES},
        CheckpointError,
        r"holds bert.quary, head.weight, which the model has no place for. Nearest to the first: ",
    ),
    "the base as well": (
        {**pair(Q), f"{Q}.weight": ONES},
        CheckpointError,
        r"holds the base's weights as well: encoder.layer.0.attention.self.query.weight",
    ),
    "twice": ({**pair(Q), **pair(Q.removeprefix("roberta."))}, CheckpointError, r"tensors twice"),
    "another width": (
        {**pair(Q, inputs=8), **pair(V, outputs=9)},
        CheckpointError,
        r"query.lora_A' has shape \(2, 8\), expected \(2, 16\). .*value.lora_B' has shape \(9, 2\)",
    ),
    "transposed": (
        {f"{Q}.lora_A": ONES.T, f"{Q}.lora_B": ONES.T},
        CheckpointError,
        r"query.lora_A' has shape \(16, 2\), expected \(2, 16\). It looks transposed",
    ),
    "one axis": (
        {f"{Q}.lora_A": ONES[0], f"{Q}.lora_B": ONES.T},
        CheckpointError,
        r"query.lora_A' has shape \(16,\), expected two axes",
    ),
    "integers": (
        {f"{Q}.lora_A": ONES.astype(int), f"{Q}.lora_B": ONES.T},
        CheckpointError,
        r"has factors of dtype int64, expected floats",
    ),
    "a head of another size": (
        {**pair(Q), "classifier.out_proj.bias": np.ones(5, np.float32)},
        CheckpointError,
        r"'classifier.out_proj.bias' has shape \(5,\), expected \(3,\)",
    ),
    "another rank": (pair(Q, r=3), ConfigError, r"rank is 2, and in .*query has 3"),
}


@pytest.mark.parametrize(("tensors", "error", "message"), BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_is_named(loaded, tensors, error, message, tmp_path):
    model, variables = loaded("roberta")
    file = torch_zip.write(tmp_path / "bad.pt", tensors)
    with pytest.raises(error, match=message):
        loralib.load(file, model, variables, alpha=3, rank=2)


def test_a_stack_needs_the_factors_of_all_its_layers(loaded, tmp_path):
    model, variables = loaded("roberta", scan=True)
    file = torch_zip.write(tmp_path / "one.pt", pair(Q))
    with pytest.raises(CheckpointError, match=r"lacks the factors of roberta.*layer.1.*query, wh"):
        loralib.load(file, model, variables, alpha=3)
    both = {**pair(Q), **pair(Q.replace("0", "1"), r=3)}
    file = torch_zip.write(tmp_path / "ranks.pt", both)
    with pytest.raises(
        CheckpointError, match=r"layer.1.* has rank 3 in .*, and an earlier .* 2. Exp"
    ):
        loralib.load(file, model, variables, alpha=3)
    model, variables = loaded("roberta")
    ranks = {site.rank for site in loralib.load(file, model, variables, alpha=3).spec.sites}
    assert ranks == {2, 3}
    model, variables = loaded("roberta", scan=True)
    bias = {"encoder.layer.0.attention.self.key.bias": ONES[0]}
    file = torch_zip.write(tmp_path / "two.pt", {**pair(Q), **pair(Q.replace("0", "1")), **bias})
    with pytest.raises(CheckpointError, match=r"layer.1.attention.self.key.bias' is not there"):
        loralib.load(file, model, variables, alpha=3)


def test_masks_that_are_not_in_the_file(loaded):
    model, variables = loaded("gpt2")
    said = r"c_attn' adapts 2 of 3 blocks, .* Pass fused=\{'c_attn': mask\}.*\(True, False, True\)"
    with pytest.raises(ConfigError, match=said):
        loralib.load(file_of("gpt2"), model, variables, alpha=3)
    for mask, said in (((True, False, False), "lora_A"), ((True, True), "lora_B")):
        with pytest.raises(CheckpointError, match=rf"c_attn.{said}' has shape"):
            loralib.load(file_of("gpt2"), model, variables, alpha=3, fused={"c_attn": mask})


def test_buffers_that_are_saved_with_the_biases_are_passed_over(loaded, tmp_path):
    model, variables = loaded("gpt2")
    tensors = torch_zip.read(file_of("gpt2"))["model_state_dict"]
    mask = {"module.transformer.h.0.attn.bias": np.ones((1, 1, 12, 12), np.float32)}
    file = torch_zip.write(tmp_path / "lora.pt", tensors | mask)
    found = loralib.load(file, model, variables, alpha=ALPHA, fused=QV)
    assert_equal(found, loralib.load(file_of("gpt2"), model, variables, alpha=ALPHA, fused=QV))


def test_what_the_file_may_hold_beside_tensors(tmp_path):
    parallel = pair("module.fc") | {"module.fc.bias": ONES}
    state = read(torch_zip.write(tmp_path / "parallel.pt", parallel))
    assert set(state.factors) == {"fc"}
    assert set(state.whole) == {"fc.bias"}
    state = read(torch_zip.write(tmp_path / "plain.pt", pair("module.fc") | {"top.bias": ONES}))
    assert set(state.factors) == {"module.fc"}
    endless: dict[str, Any] = {}
    endless["model_state_dict"] = endless
    with zipfile.ZipFile(tmp_path / "endless.pt", "w") as archive:
        archive.writestr("endless/data.pkl", pickle.dumps(endless, 2))
    with pytest.raises(CheckpointError, match=r"holds model_state_dict, which are no tensors"):
        read(tmp_path / "endless.pt")
    with pytest.raises(
        CheckpointError, match=r"holds dtypes, state, rest, size, which are no tensors"
    ):
        read(REFERENCES / "torch_kinds.pt")


REFUSED = {
    "dora": ({"dora": True}, r"query/kernel trains magnitudes \(DoRA\)"),
    "rows": (
        {"token_rows": {"embeddings/word": (1, 2)}},
        r"of roberta/embeddings/word/embedding some rows",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_loralib_has_no_layer_for_is_refused(loaded, options, message, tmp_path):
    model, variables = loaded("roberta")
    adapter = made(model, variables, IDS, targets="query", **options)
    with pytest.raises(AdapterError, match=message):
        loralib.save(tmp_path / "lora.pt", adapter, model)
    assert not list(tmp_path.iterdir())


class Windows(nn.Module):
    @nn.compact
    def __call__(self, x):  # (batch, 4, 4, 2)
        x = nn.Conv(2, (2, 2), name="square")(nn.Conv(2, (1, 2), name="oblong")(x))
        x = nn.Conv(2, 3, name="line")(x.reshape(x.shape[0], -1, 2))
        return nn.Conv(2, (2, 2, 2), name="cube")(x.reshape(-1, 4, 2, 2, 2))


def test_windows_that_loralib_cannot_do_are_refused(tmp_path):
    model, x = Windows(), jnp.ones((1, 4, 4, 2))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    names = {name: name for name in variables["params"]}
    said = r"cube/kernel: loralib's factors of a window of \(2, 2, 2\) .*line/kernel: .* oblong/ker"
    with pytest.raises(AdapterError, match=said):
        loralib.save(tmp_path / "lora.pt", made(model, variables, x), model, names)
    square = made(model, variables, x, targets="square")
    assert loralib.save(tmp_path / "lora.pt", square, model, names).is_file()
    bad = torch_zip.write(tmp_path / "line.pt", pair("line"))
    with pytest.raises(CheckpointError, match=r"line: loralib's factors of a window of \(3,\)"):
        loralib.load(bad, model, variables, x, alpha=3, names=names)


def test_no_file_no_alpha_no_names(loaded, tmp_path):
    model, variables = loaded("roberta")
    with pytest.raises(CheckpointError, match=r"There is no file"):
        loralib.load(tmp_path / "nowhere.pt", model, variables, alpha=3)
    with pytest.raises(ConfigError, match=r"alpha is 0, expected a number greater than 0"):
        loralib.load(file_of("roberta"), model, variables, alpha=0)
    with pytest.raises(ConfigError, match=r"The model is a Net, which has no table of names"):
        loralib.load(file_of("net"), *net(), GRID, alpha=3)


@pytest.mark.parametrize("module", [loralib, loralib_conv, safetensors, torch_zip, unpickle, whole])
def test_the_examples_run(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted or ">>>" not in inspect.getsource(module)
