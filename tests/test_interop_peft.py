"""PEFT's folders in, with torch's logits; ours out and back; and everything that can be wrong.

tests/references/make_peft_folders.py says what is stored. That torch loads what we write is checked
by check_peft.py there, in `make test-interop`.
"""

import doctest
import functools
import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxlora as jl
from jaxlora import fold, models
from jaxlora.errors import AdapterError, CheckpointError, ConfigError, LoraError
from jaxlora.interop import peft, tensors, vllm
from jaxlora.interop.derive import derive
from jaxlora.interop.peft_config import FILE, HARMLESS, NEUTRAL, USED, read_config
from jaxlora.models.architectures import architecture_of
from jaxlora.models.gpt2 import GPT2Config, GPT2LMHeadModel
from jaxlora.models.llama import LlamaConfig, LlamaForCausalLM

STORED = Path(__file__).parent / "references" / "peft_folders.npz"


@functools.cache
def stored():
    with np.load(STORED) as file:
        return {name: file[name] for name in file.files}


CASES = sorted(
    {tuple(name.split("/")[:2]) for name in stored() if name.count("/") == 2}
    - {(name.split("/")[0], "base") for name in stored()}
)


def unpack(name, folder):
    """Writes the stored files of "<model>/<adapter>" and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, x in stored().items():
        if key.startswith(f"{name}/") and x.dtype == np.uint8:
            (folder / key.rpartition("/")[2]).write_bytes(x.tobytes())
    return folder


@functools.cache
def base(name, scan, root):
    folder = unpack(f"{name}/base", Path(root) / f"{name}-base")
    model, params, _ = models.from_pretrained(folder, scan_layers=scan)
    return model, {"params": params}


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("peft")


SCANNED = {
    *("bert/layers", "bert/bias_all", "bert/dora_embedding", "roberta/rslora", "deberta/conv"),
    *("gpt2/c_attn", "gpt2/tied", "llama/regex", "llama/olora", "llama/tokens", "vit/conv"),
}
"""The adapters that are loaded into scanned models as well: each is unlike the others there."""


@pytest.mark.parametrize(
    ("name", "method", "scan"),
    [
        pytest.param(*case, scan, id=f"{'/'.join(case)}{'-scanned' if scan else ''}")
        for case in CASES
        for scan in (False, True)
        if not scan or "/".join(case) in SCANNED
    ],
)
def test_logits_after_loading_are_torchs(name, method, scan, root):
    model, variables = base(name, scan, str(root))
    folder = unpack(f"{name}/{method}", root / name / method)
    adapter = peft.load(folder, model, variables)
    inputs = jnp.asarray(stored()[f"{name}/inputs"])
    if name == "vit":
        inputs = jnp.moveaxis(inputs, 1, -1)
    got = jl.lora_apply(model, variables, adapter, inputs)
    expected = stored()[f"{name}/{method}/logits"]
    assert np.abs(expected - stored()[f"{name}/logits"]).max() > 1e-2
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_base_may_be_abstract_unless_the_adapter_begins_from_its_values(root):
    model, variables = base("llama", False, str(root))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    loaded = peft.load(unpack("llama/regex", root / "regex"), model, abstract)
    assert loaded.spec == peft.load(root / "regex", model, variables).spec
    with pytest.raises(AdapterError, match="starts from the value of"):
        peft.load(unpack("llama/pissa", root / "pissa"), model, abstract)


# Ours out and back. Leaves are random and nothing is run: seconds for all.

IDS = jax.ShapeDtypeStruct((1, 3), jnp.int32)


def random_adapter(model, config, dtype: Any = np.float32, inputs=IDS):
    key = jax.random.key(0)
    variables = {"params": jax.eval_shape(model.init, key, inputs)["params"]}
    spec = jl.plan(model, variables, config, inputs).spec
    rng, shapes = np.random.default_rng(0), spec.leaf_shapes | spec.frozen_shapes
    adapter = spec.adapter({p: jnp.asarray(rng.normal(size=s), dtype) for p, s in shapes.items()})
    return variables, adapter


def llama(scan=False, **given):
    fields: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "scan_layers": scan}
    fields |= {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 10}
    return LlamaForCausalLM(LlamaConfig(**(fields | given)))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=12, n_positions=8, n_embd=8, n_layer=2, n_head=2))


ROUND = {
    "lora": {"targets": "all-linear"},
    "some_layers": {"targets": "q_proj|up_proj", "layers": [1]},
    "dora": {"targets": "down_proj|lm_head", "dora": True},
    "rslora": {"targets": "v_proj", "rslora": True, "rank": 3, "alpha": 7.3},
    "patterns": {
        "targets": "q_proj|v_proj|o_proj",
        "rank_pattern": {"q_proj": 3, "layers_1/.*/o_proj": 1},
        "alpha_pattern": {"v_proj": 0.1},
    },
    "tables": {"targets": "embed_tokens|k_proj"},
    "saved": {"targets": "o_proj", "modules_to_save": "lm_head|norm"},
    "rows": {"targets": "o_proj", "token_rows": {"embed_tokens": [3, 11]}},
    "biases": {"targets": "q_proj|o_proj", "bias": "lora_only"},
    "all_biases": {"targets": "q_proj", "bias": "all"},
}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("method", ROUND)
def test_what_goes_out_comes_back_as_it_was(method, scan, tmp_path):
    options = dict(ROUND[method])
    if scan and method in ("some_layers", "patterns"):
        options = {**options, "layers": None}
        options.pop("rank_pattern", None)
    model = llama(scan, attention_bias="bias" in method)
    variables, adapter = random_adapter(model, jl.LoraConfig(**{"rank": 2, "alpha": 5, **options}))
    peft.save(tmp_path / "out", adapter, model)
    back = peft.load(tmp_path / "out", model, variables)
    assert back.spec.saved == adapter.spec.saved
    assert back.spec.sites == adapter.spec.sites
    expected, got = adapter.values(), back.values()
    assert expected.keys() == got.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(got[path], x)


def test_a_scanned_models_adapter_is_that_of_the_unrolled_one(tmp_path):
    config = jl.LoraConfig(rank=2, targets="q_proj|down_proj|lm_head")
    _, adapter = random_adapter(llama(scan=True), config)
    peft.save(tmp_path / "out", adapter, llama(scan=True))
    variables, _ = random_adapter(llama(), config)
    values = peft.load(tmp_path / "out", llama(), variables).values()
    for path, x in adapter.values().items():
        if path.startswith("lm_head"):
            np.testing.assert_array_equal(values[path], x)
        else:
            own = [values[path.replace("/layers/", f"/layers_{n}/")] for n in range(2)]
            np.testing.assert_array_equal(np.stack(own), x)


def test_layers_of_a_stack_may_differ_in_rank_and_alpha_or_be_left_out(tmp_path):
    config = jl.LoraConfig(
        rank=2,
        alpha=3,
        targets="q_proj|layers_1/.*/v_proj",
        rank_pattern={"layers_0/.*/q_proj": 3},
        alpha_pattern={"layers_1/.*/q_proj": 7},
    )
    _, adapter = random_adapter(llama(), config)
    peft.save(tmp_path / "out", adapter, llama())
    variables, _ = random_adapter(llama(scan=True), jl.LoraConfig(targets="q_proj"))
    back = peft.load(tmp_path / "out", llama(scan=True), variables)
    values, leaves = adapter.values(), back.values()
    for site in back.spec.sites:
        parts = site.leaves(leaves)
        update = site.scaling * site.layout.delta(parts["a"], parts["b"], site.rank)
        for n in range(2):
            path = site.path.replace("/layers/", f"/layers_{n}/")
            [own] = [s for s in adapter.spec.sites if s.path == path] or [None]
            expected = np.zeros(update[n].shape)
            if own is not None:
                two = own.leaves(values)
                expected = own.scaling * own.layout.delta(two["a"], two["b"], own.rank)
            np.testing.assert_allclose(update[n], expected, rtol=1e-5, atol=1e-5)


def test_biases_of_layers_that_a_stack_leaves_out_are_the_bases(tmp_path):
    config = jl.LoraConfig(rank=2, targets="q_proj", layers=[1], bias="lora_only")
    _, adapter = random_adapter(llama(attention_bias=True), config)
    folder = peft.save(tmp_path / "out", adapter, llama(attention_bias=True))
    model = llama(scan=True, attention_bias=True)
    abstract, _ = random_adapter(model, jl.LoraConfig(targets="q_proj"))
    with pytest.raises(AdapterError, match="keep the base's values, but that is abstract"):
        peft.load(folder, model, abstract)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract)
    bias = peft.load(folder, model, variables).values()["model/layers/self_attn/q_proj/bias_lora_w"]
    np.testing.assert_array_equal(
        bias[0], variables["params"]["model"]["layers"]["self_attn"]["q_proj"]["bias"][0]
    )
    np.testing.assert_array_equal(
        bias[1], adapter.values()["model/layers_1/self_attn/q_proj/bias_lora_w"]
    )


def test_a_stack_cannot_hold_layers_that_differ_under_dora(tmp_path):
    config = jl.LoraConfig(rank=2, targets="layers_1/.*/q_proj", dora=True)
    _, adapter = random_adapter(llama(), config)
    folder = peft.save(tmp_path / "out", adapter, llama())
    variables, _ = random_adapter(llama(scan=True), jl.LoraConfig(targets="q_proj"))
    with pytest.raises(CheckpointError, match="one stack cannot hold with DoRA"):
        peft.load(folder, llama(scan=True), variables)


def test_what_torch_has_no_form_for_becomes_an_equal_one(tmp_path):
    model = gpt2()
    mask = {"c_attn": (True, False, True)}
    for name, options in {
        "fused": {"targets": "c_attn", "fused": mask},
        "pissa": {"targets": "c_fc", "init": "pissa"},
        "frozen": {"targets": "c_fc", "init": "olora", "freeze_a": True, "rslora": True},
    }.items():
        variables, adapter = random_adapter(model, jl.LoraConfig(rank=2, alpha=3, **options))
        back = peft.load(peft.save(tmp_path / name, adapter, model), model, variables)
        for site, other in zip(adapter.spec.sites, back.spec.sites, strict=True):
            ours, theirs = site.leaves(adapter.values()), other.leaves(back.values())
            update = fold.delta(site.layout, site.rank, ours, jnp.float32) * site.scaling
            got = fold.delta(other.layout, other.rank, theirs, jnp.float32) * other.scaling
            np.testing.assert_allclose(got, update, rtol=1e-5, atol=1e-5)
        assert json.loads((tmp_path / name / FILE).read_text())["fan_in_fan_out"] is True


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_dtypes_are_kept_or_cast_as_asked(dtype, tmp_path):
    model = llama()
    dtype = jnp.dtype(getattr(ml_dtypes, dtype, dtype))
    config = jl.LoraConfig(rank=2, targets="v_proj", param_dtype=dtype)
    variables, adapter = random_adapter(model, config, dtype)
    peft.save(tmp_path / "out", adapter, model)
    kept = peft.load(tmp_path / "out", model, variables)
    cast = peft.load(tmp_path / "out", model, variables, dtype=jnp.float32)
    assert kept.spec.config.param_dtype == dtype
    for path, x in adapter.values().items():
        assert (kept.values()[path].dtype, cast.values()[path].dtype) == (dtype, jnp.float32)
        np.testing.assert_array_equal(kept.values()[path], x)
        np.testing.assert_array_equal(cast.values()[path], x.astype(jnp.float32))


def test_models_of_ones_own_go_by_a_short_table(tmp_path):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for n in range(2):
                x = nn.Dense(4, name=f"block_{n}")(x)
            x = nn.DenseGeneral((2, 3), name="heads")(x)
            return nn.DenseGeneral(5, axis=(-2, -1), name="out")(x)

    model, x = Net(), jax.ShapeDtypeStruct((2, 4), jnp.float32)
    table = {"block_{}": "body.{}.fc", "heads": "heads", "out": "out"}
    variables, adapter = random_adapter(model, jl.LoraConfig(rank=2), inputs=x)
    peft.save(tmp_path / "out", adapter, model, table)
    there = tensors.read_tensors(tmp_path / "out")
    assert there["base_model.model.heads.lora_B.weight"].shape == (6, 2)
    assert there["base_model.model.out.lora_A.weight"].shape == (2, 6)
    back = peft.load(tmp_path / "out", model, variables, x, names=table)
    for path, leaf in adapter.values().items():
        np.testing.assert_array_equal(back.values()[path], leaf)
    with pytest.raises(ConfigError, match="example inputs are needed"):
        peft.load(tmp_path / "out", model, variables, names=table)


def test_a_head_tied_to_a_table_is_a_module_of_its_own_in_torch(tmp_path):
    model = llama(tie_word_embeddings=True)
    variables, adapter = random_adapter(model, jl.LoraConfig(rank=2, targets="embed_tokens"))
    folder = peft.save(tmp_path / "out", adapter, model)
    there = tensors.read_tensors(folder)
    prefix = "base_model.model"
    a, b = (there[f"{prefix}.model.embed_tokens.lora_embedding_{p}"] for p in "AB")
    np.testing.assert_array_equal(there[f"{prefix}.lm_head.lora_A.weight"], b.T)
    np.testing.assert_array_equal(there[f"{prefix}.lm_head.lora_B.weight"], a.T)
    back = peft.load(folder, model, variables)
    np.testing.assert_array_equal(*[next(iter(x.values().values())) for x in (back, adapter)])

    change(folder, {f"{prefix}.lm_head.lora_A.weight": b.T + 1})
    with pytest.raises(CheckpointError, match="adapts a head that is the table"):
        peft.load(folder, model, variables)
    change(folder, {f"{prefix}.lm_head.lora_{p}.weight": None for p in "AB"})
    assert peft.load(folder, model, variables).spec == back.spec  # the config ties them
    change(folder, ensure_weight_tying=False)
    with pytest.raises(CheckpointError, match="'lm_head' of this model reads too"):
        peft.load(folder, model, variables)


def test_a_heads_other_tensors_and_tables_of_another_base_are_refused(root):
    model, variables = base("llama", False, str(root))
    folder = unpack("llama/head", root / "llama-copies")
    table = "model.embed_tokens.base_layer.weight"
    there = tensors.read_tensors(folder)[f"base_model.model.{table}"]
    peft.load(folder, model, variables)  # the copies of the base's tables are its own
    change(folder, {f"base_model.model.{table}": there + 1})
    with pytest.raises(
        CheckpointError, match=r"embed_tokens.* with other values than this model's"
    ):
        peft.load(folder, model, variables)
    change(folder, {f"base_model.model.{table}": np.concatenate([there, there[:1]])})
    with pytest.raises(CheckpointError, match=r"of shape \(25, 16\) with other values"):
        peft.load(folder, model, variables)
    model, variables = base("llama_tied", False, str(root))
    folder = unpack("llama_tied/tied", root / "llama-tied-head")
    change(folder, {"base_model.model.lm_head.lora_magnitude_vector": there[:, 0]})
    with pytest.raises(CheckpointError, match=r"Unexpected \(1\): lm_head.lora_magnitude_vector"):
        peft.load(folder, model, variables)
    change(
        folder,
        {
            "base_model.model.lm_head.lora_magnitude_vector": None,
            "base_model.model.lm_head.weight": there,
        },
    )
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from the table"):
        peft.load(folder, model, variables)


def test_a_head_of_several_layers_is_one_module_to_save(root, tmp_path):
    model, _ = base("roberta", False, str(root))
    for saved, modules, task in (
        ("classifier", ["classifier"], "SEQ_CLS"),
        ("classifier/dense", ["classifier.dense"], None),
        ("layer_0/mlp/norm", ["roberta.encoder.layer.0.output.LayerNorm"], None),
    ):
        config = jl.LoraConfig(rank=2, targets="query", modules_to_save=saved)
        _, adapter = random_adapter(model, config)
        folder = peft.save(tmp_path / "out", adapter, model, overwrite=True)
        fields = json.loads((folder / FILE).read_text())
        assert (fields["modules_to_save"], fields["task_type"]) == (modules, task)
        assert fields["target_modules"] == ["query"]


def test_a_table_that_another_model_attends_to_is_refused(tmp_path):
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            table = nn.Embed(6, 4, name="table")
            return table.attend(nn.Dense(4, name="up")(table(ids)))

    names = {"table": "table", "up": "up"}
    for targets in ("table", "up"):
        config = jl.LoraConfig(rank=2, targets=targets)
        variables, adapter = random_adapter(Tied(), config)
        folder = peft.save(tmp_path / targets, adapter, Tied(), names)
        if targets == "up":
            peft.load(folder, Tied(), variables, IDS, names=names)
            continue
        with pytest.raises(CheckpointError, match="looks up and multiplies with"):
            peft.load(folder, Tied(), variables, IDS, names=names)


def test_save_is_whole_or_not_at_all_and_asks_before_it_replaces(tmp_path, monkeypatch):
    model = llama()
    variables, adapter = random_adapter(model, jl.LoraConfig(rank=2, targets="v_proj"))
    folder = peft.save(tmp_path / "out", adapter, model, base_model_name_or_path="some/base")
    assert json.loads((folder / FILE).read_text())["base_model_name_or_path"] == "some/base"
    with pytest.raises(CheckpointError, match="exists, expected a new folder"):
        peft.save(folder, adapter, model)

    def fails(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("jaxlora.interop.peft.write_safetensors", fails)
    with pytest.raises(OSError, match="full"):
        peft.save(folder, adapter, model, overwrite=True)
    with pytest.raises(OSError, match="full"):
        peft.save(tmp_path / "new", adapter, model)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    peft.load(folder, model, variables)


def test_part_of_a_module_trained_in_full_is_refused():
    model = llama(attention_bias=True)
    config = jl.LoraConfig(rank=2, targets="v_proj", modules_to_save="o_proj/kernel")
    _, adapter = random_adapter(model, config)
    with pytest.raises(AdapterError, match=r"lacks model\.layers\.0\.self_attn\.o_proj\.bias"):
        peft.save("unused", adapter, model)


def test_a_table_that_torch_reads_without_its_module_is_refused(root):
    model, _ = base("deberta", False, str(root))
    _, adapter = random_adapter(model, jl.LoraConfig(rank=2, targets="relative"))
    with pytest.raises(AdapterError, match="encoder/relative/embedding: torch's model reads its"):
        peft.save("unused", adapter, model)


# Everything that can be wrong with a folder.


def change(folder, new=None, **fields):
    """Changes tensors (None takes one out) and fields of a folder."""
    there = tensors.read_tensors(folder) | (new or {})
    there = {name: x for name, x in there.items() if x is not None}
    tensors.write_safetensors(folder / tensors.SAFETENSORS, there)
    config = json.loads((folder / FILE).read_text()) | fields
    (folder / FILE).write_text(json.dumps(config))


@functools.cache
def wrong_case():
    model = llama()
    config = jl.LoraConfig(rank=2, targets="q_proj|v_proj")
    return model, *random_adapter(model, config)


@pytest.fixture
def folder(tmp_path):
    model, _, adapter = wrong_case()
    return peft.save(tmp_path / "adapter", adapter, model)


def refused(folder, match, **options):
    model, variables, _ = wrong_case()
    with pytest.raises(CheckpointError, match=match):
        peft.load(folder, model, variables, **options)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
FIELDS = {
    "peft_type is 'IA3', expected 'LORA'": {"peft_type": "IA3"},
    "peft_type is None, expected 'LORA'": {"peft_type": None},
    "r is 'two', expected int": {"r": "two"},
    "r is True, expected int": {"r": True},
    "r is 0, expected at least 1": {"r": 0},
    "lora_alpha is 0, expected a number": {"lora_alpha": 0},
    "lora_dropout is 1.5, expected": {"lora_dropout": 1.5},
    "bias is 'some', expected": {"bias": "some"},
    "target_modules is 3, expected str or list": {"target_modules": 3},
    r"target_modules is \['a', 1\], expected a list of str": {"target_modules": ["a", 1]},
    "target_modules has '\\(', which is no regular": {"target_modules": "("},
    "rank_pattern is 'q', expected dict": {"rank_pattern": "q"},
    r"rank_pattern\['q_proj'\] is 1.5, expected a number": {"rank_pattern": {"q_proj": 1.5}},
    r"rank_pattern\['q_proj'\] is 0, expected at": {"rank_pattern": {"q_proj": 0}},
    "init_lora_weights is 'corda', which changed": {"init_lora_weights": "corda"},
    "init_lora_weights is 'pissa_niter_4', which": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights is 'magic', expected": {"init_lora_weights": "magic"},
    "use_qalora is True, which pools": {"use_qalora": True},
    "lora_bias is True, which adds a bias": {"lora_bias": True},
    "layer_replication is .*, which builds": {"layer_replication": [[0, 1]]},
    "a field that we do not know, use_dorra, .* Nearest that we know: use_dora": {
        "use_dorra": True
    },
    "target_modules, .'c_attn'., match none of the 16 modules": {"target_modules": ["c_attn"]},
    "trainable_token_indices is 'x', expected list": {"trainable_token_indices": "x"},
}


@pytest.mark.parametrize("match", FIELDS)
def test_fields_that_cannot_be_followed_are_named(match, folder):
    change(folder, **FIELDS[match])
    refused(folder, match)


def test_a_field_that_we_do_not_know_and_is_off_is_a_warning(folder):
    change(folder, use_future=False, lora_bias=False, eva_config={"rho": 2})
    with pytest.warns(UserWarning, match="a field that we do not know, use_future"):
        read_config(folder)


def test_the_table_of_fields_names_each_once():
    assert len({*USED, *HARMLESS, *NEUTRAL}) == len(USED) + len(HARMLESS) + len(NEUTRAL)


def test_a_config_that_is_no_object_is_refused(folder):
    for text, match in {
        "{": "is not JSON",
        "[" * 5000: "is not JSON",
        "[]": "is a JSON list, expected an object",
    }.items():
        (folder / FILE).write_text(text)
        refused(folder, match)
    (folder / FILE).unlink()
    refused(folder, f"has no {FILE}, .* It holds adapter_model.safetensors")


def test_missing_stray_and_misshapen_tensors_are_all_listed(folder):
    there = tensors.read_tensors(folder)
    a, b = there[f"{Q}.lora_A.weight"], there[f"{Q}.lora_B.weight"]
    one, v = Q.replace("layers.0", "layers.1"), Q.replace("q_proj", "v_proj")
    change(
        folder,
        {
            f"{Q}.lora_A.weight": np.ascontiguousarray(a.T),
            f"{one}.lora_B.weight": b[:5],
            f"{one}.lora_A.weight": None,
            f"{v}.lora_B.weight": None,
            f"{Q}.lora_B.bias": b[:, 0],
            "../../etc/passwd": b,
        },
    )
    refused(folder, r"Missing \(2\): model.layers.0.self_attn.v_proj.lora_B.weight, model.layers.1")
    refused(folder, r"Unexpected \(2\): \.\./\.\./etc/passwd, .*q_proj.lora_B.bias")
    refused(folder, r"lora_A.weight' has shape \(8, 2\), expected \(2, 8\). It looks transposed")
    refused(folder, r"layers.1.*lora_B.weight' has shape \(5, 2\), expected \(8, 2\)\. ?")


def test_an_adapter_for_a_model_of_another_size_or_architecture_is_refused(folder):
    config = jl.LoraConfig(rank=2, targets="q_proj")
    wide = llama(hidden_size=16, num_hidden_layers=1)
    variables, _ = random_adapter(wide, config)
    with pytest.raises(CheckpointError, match=r"Unexpected \(4\).*expected \(2, 16\)"):
        peft.load(folder, wide, variables)
    variables, _ = random_adapter(gpt2(), jl.LoraConfig(rank=2, targets="c_fc"))
    with pytest.raises(CheckpointError, match="belongs to another architecture"):
        peft.load(folder, gpt2(), variables)


def test_damaged_weights_are_refused(folder):
    file = folder / tensors.SAFETENSORS
    whole = file.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    header[f"{Q}.lora_A.weight"]["data_offsets"] = [0, 10**9]
    lie = json.dumps(header).encode()
    for data in (
        whole[:-7],
        whole[:20],
        b"",
        b"\xff" * 64,
        (2**60).to_bytes(8, "little") + whole[8:],
        len(lie).to_bytes(8, "little") + lie + whole[8 + int.from_bytes(whole[:8], "little") :],
    ):
        file.write_bytes(data)
        refused(folder, "is damaged or cut short")
    file.unlink()
    refused(folder, "has no adapter_model.safetensors")


def test_integers_are_refused(folder):
    change(folder, {f"{Q}.lora_A.weight": np.zeros((2, 8), np.int8)})
    refused(folder, "dtype int8, expected floating")


def test_a_pickle_is_never_run(folder):
    marker = folder / "marker"
    (folder / tensors.SAFETENSORS).unlink()
    code = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    (folder / tensors.PICKLE).write_bytes(code)
    model, variables, _ = wrong_case()
    with pytest.raises(LoraError, match=r"adapter_model\.bin"):
        peft.load(folder, model, variables)
    assert not marker.exists()


def test_a_source_that_is_not_there_is_named(folder, monkeypatch):
    model, variables, _ = wrong_case()
    for source, match in {
        folder / "nowhere": "There is no folder .* with adapter_config.json and adapter_model",
        folder / FILE: "is a file, expected the folder that holds adapter_config.json",
        "/no/such/folder": "There is no folder",
        "../../secret": "There is no folder",
    }.items():
        with pytest.raises(CheckpointError, match=match):
            peft.load(source, model, variables)
    hub = importlib.import_module("huggingface_hub")

    def offline(name, **options):
        assert "adapter_config.json" in options["allow_patterns"]
        raise OSError("offline")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="could not be had from the hub: offline"):
        peft.load("some/adapter", model, variables)


# What serves adapters.


def test_a_profile_has_one_rank_and_a_scaling_of_one(tmp_path):
    model = llama()
    config = jl.LoraConfig(
        rank=2,
        alpha=3,
        targets="q_proj|up_proj",
        rslora=True,
        rank_pattern={"q_proj": 3},
        alpha_pattern={"layers_1/.*/up_proj": 9},
    )
    variables, adapter = random_adapter(model, config)
    folder = peft.save(tmp_path / "out", adapter, model, profile="vllm")
    assert vllm.check(folder) == vllm.check(folder, "sglang") == []
    fields = json.loads((folder / FILE).read_text())
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"]) == (3, 3, False)
    assert fields["rank_pattern"] == fields["alpha_pattern"] == {}
    back = peft.load(folder, model, variables)
    for site, other in zip(adapter.spec.sites, back.spec.sites, strict=True):
        update = fold.delta(site.layout, site.rank, site.leaves(adapter.values()), jnp.float32)
        got = fold.delta(other.layout, 3, other.leaves(back.values()), jnp.float32)
        np.testing.assert_allclose(got * other.scaling, update * site.scaling, rtol=1e-5, atol=1e-5)


REFUSED = {
    "q_proj/kernel: DoRA is not supported": {"targets": "q_proj", "dora": True},
    r"lm_head.weight: it is trained in full": {"targets": "q_proj", "modules_to_save": "lm_head"},
    "q_proj.bias: it is a trained bias": {"targets": "q_proj", "bias": "lora_only"},
    "embed_tokens: rows of it": {"targets": "q_proj", "token_rows": {"embed_tokens": [1]}},
}


@pytest.mark.parametrize("match", REFUSED)
def test_a_profile_refuses_what_servers_refuse(match):
    model = llama(attention_bias=True)
    _, adapter = random_adapter(model, jl.LoraConfig(rank=2, **REFUSED[match]))
    with pytest.raises(AdapterError, match=match):
        peft.save("unused", adapter, model, profile="vllm")


def test_a_profile_refuses_tables_of_other_names_and_heads_that_share_one():
    _, adapter = random_adapter(gpt2(), jl.LoraConfig(rank=2, targets="wte|wpe|c_attn"))
    with pytest.raises(AdapterError, match=r"wpe/embedding: of all tables .* lm_head: it reads"):
        peft.save("unused", adapter, gpt2(), profile="vllm")
    _, adapter = random_adapter(gpt2(), jl.LoraConfig(rank=2, targets="c_attn"))
    with pytest.raises(AdapterError, match="'c_attn' is none of the modules that can be adapted"):
        peft.save("unused", adapter, gpt2(), profile="sglang")
    with pytest.raises(ConfigError, match="profile is 'tgi', expected one of vllm, sglang"):
        peft.save("unused", adapter, gpt2(), profile="tgi")


def test_the_check_names_each_problem(folder):
    assert vllm.check(folder) == []
    there = tensors.read_tensors(folder)
    b = there[f"{Q}.lora_B.weight"]
    change(
        folder,
        {
            f"{Q}.lora_B.weight": np.pad(b, ((0, 0), (0, 1))),
            f"{Q.replace('q_proj', 'v_proj')}.lora_A.weight": None,
            f"{Q}.lora_magnitude_vector": b[:, 0],
            "base_model.model.wte.lora_embedding_A": b.T,
            "base_model.model.lm_head.base_layer.weight": b,
        },
        rank_pattern={"q_proj": 3},
        alpha_pattern={"q_proj": 3},
        use_dora=True,
        bias="all",
        modules_to_save=["lm_head"],
        trainable_token_indices=[1],
        init_lora_weights="pissa",
        target_modules=".*q_proj",
        lora_bias=True,
    )
    text = "\n".join(vllm.check(folder, "sglang"))
    for part in (
        "modules_to_save is ['lm_head'], which is refused",
        "use_dora is true",
        "bias is 'all'",
        "trainable_token_indices is set",
        "rank_pattern is ignored: every module would get 2",
        "alpha_pattern is ignored",
        "init_lora_weights is 'pissa'",
        "target_modules is a pattern",
        "lora_bias is set, which adds a bias to B",
        f"'{Q}.lora_magnitude_vector' is no factor of LoRA",
        "'base_model.model.wte.lora_embedding_A': of all tables only embed_tokens",
        "'wte' is none of the modules",
        "v_proj has no lora_A",
        f"{Q}: lora_B has shape (8, 3), expected 2 on axis 1",
    ):
        assert part in text, part
    assert "base_layer" not in text
    (folder / tensors.SAFETENSORS).write_bytes(b"")
    assert "damaged" in vllm.check(folder)[-1]
    (folder / FILE).write_text("{}")
    assert vllm.check(folder)[0] == "r is missing, which vLLM requires."


# Names by their words and shapes.


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", ["bert", "deberta", "gpt2", "llama"])
def test_derived_names_are_those_of_the_tables(name, scan, root):
    model, variables = base(name, scan, str(root))
    there = tensors.read_safetensors(root / f"{name}-base" / "model.safetensors")
    found = derive(variables["params"], there)
    table = architecture_of(model).names
    assert (found.open, found.left) == ({}, ())
    assert found.modules == {path: table.torch_name(path) for path in found.modules}
    assert len(found.modules) > 8


def test_what_is_ambiguous_is_left_open_and_shown():
    kernel = {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    params = {"fc_a": kernel, "fc_b": kernel, "out": {"kernel": jnp.ones((4, 2))}}
    found = derive(params, {"fc_1.weight": (4, 4), "x.fc.weight": (4, 4), "out.weight": (2, 4)})
    assert found.modules == {"out": "out"}
    assert set(found.open) == {"fc_a", "fc_b"}
    assert "fc_a: it could be x.fc" in str(found)
    assert "in torch only: fc_1, x.fc" in str(found)
    with pytest.raises(ConfigError, match="There are 3 layers here and 0 in torch"):
        derive(params, {})


MODULES = ["derive", "factors", "peft", "peft_config", "peft_load", "tensors", "vllm"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(f"jaxlora.interop.{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert doctest.testmod(module).failed == 0
