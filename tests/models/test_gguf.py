"""GGUF files against torch's reading of the same (tests/references/make_smollm2.py), and damage."""

import dataclasses
import doctest
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from jaxlora.errors import CheckpointError, MissingDependencyError
from jaxlora.fetch import fetch
from jaxlora.models.gguf import ARCHITECTURES, GgufModel, read_gguf
from jaxlora.models.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer

REFERENCES = Path(__file__).parent.parent / "references"
LAYERS, HEADS, KV_HEADS, WIDTH, HIDDEN, INTERMEDIATE, VOCAB = 2, 4, 2, 16, 32, 64, 11
SIZES = {
    "block_count": LAYERS,
    "embedding_length": HIDDEN,
    "feed_forward_length": INTERMEDIATE,
    "context_length": 128,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": WIDTH,
    "attention.value_length": WIDTH,
    "rope.dimension_count": WIDTH,
    "rope.freq_base": 5e5,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
GPT2_SIZES = {
    "block_count": LAYERS,
    "embedding_length": HIDDEN,
    "feed_forward_length": INTERMEDIATE,
    "context_length": 128,
    "attention.head_count": HEADS,
    "attention.layer_norm_epsilon": 1e-5,
}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return json.loads((REFERENCES / "smollm2.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smollm2() -> GgufModel:
    [file] = fetch("smollm2").glob("*.gguf")
    return read_gguf(file)


@pytest.fixture(scope="module")
def tokenizer(smollm2) -> Any:
    return read_tokenizer(smollm2)


def llama_state(seed: int = 0, norms: bool = False) -> dict[str, np.ndarray]:
    """The tensors of a tiny model, by Hugging Face's names."""
    rng = np.random.default_rng(seed)
    q, kv = HEADS * WIDTH, KV_HEADS * WIDTH
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for n in range(LAYERS):
        shapes |= {
            f"model.layers.{n}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (HIDDEN,),
                "self_attn.q_proj": (q, HIDDEN),
                "self_attn.k_proj": (kv, HIDDEN),
                "self_attn.v_proj": (kv, HIDDEN),
                "self_attn.o_proj": (HIDDEN, q),
                "post_attention_layernorm": (HIDDEN,),
                "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
                "mlp.up_proj": (INTERMEDIATE, HIDDEN),
                "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            }.items()
        }
        if norms:
            shapes |= {f"model.layers.{n}.self_attn.{x}_norm.weight": (WIDTH,) for x in "qk"}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def gpt2_state() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"wte.weight": (VOCAB, HIDDEN), "wpe.weight": (128, HIDDEN)}
    shapes |= {"ln_f.weight": (HIDDEN,), "ln_f.bias": (HIDDEN,)}
    kernels = {
        "attn.c_attn": (HIDDEN, 3 * HIDDEN),
        "attn.c_proj": (HIDDEN, HIDDEN),
        "mlp.c_fc": (HIDDEN, INTERMEDIATE),
        "mlp.c_proj": (INTERMEDIATE, HIDDEN),
        "ln_1": (HIDDEN,),
        "ln_2": (HIDDEN,),
    }
    for n in range(LAYERS):
        for name, shape in kernels.items():
            shapes |= {f"h.{n}.{name}.weight": shape, f"h.{n}.{name}.bias": shape[-1:]}
    return {
        f"transformer.{name}": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def stored_name(name: str) -> str:
    """The name that llama.cpp's converter gives a tensor."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for arch in (gguf.MODEL_ARCH.QWEN3, gguf.MODEL_ARCH.GPT2):
        names.mapping |= gguf.get_tensor_name_map(arch, LAYERS).mapping
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None
    return found


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the file's order: the two halves of each head take turns."""
    rows = []
    for head in np.split(array, heads):
        for first, second in zip(*np.split(head, 2), strict=True):
            rows += [first, second]
    return np.stack(rows)


def write(
    path: Path,
    arch: str = "llama",
    state: dict[str, np.ndarray] | None = None,
    sizes: dict[str, Any] | None = None,
    kind: Any = None,
    more: dict[str, np.ndarray] | None = None,
    less: tuple[str, ...] = (),
    keys: dict[str, Any] | None = None,
) -> Path:
    """Write a file as llama.cpp's converter does. `sizes`, `keys`: changed keys; None drops one."""
    writer = gguf.GGUFWriter(path, arch)
    base = GPT2_SIZES if arch == "gpt2" else SIZES
    fields = {f"{arch}.{name}": value for name, value in {**base, **(sizes or {})}.items()}
    for key, value in {**fields, **(keys or {})}.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    for name, array in (llama_state() if state is None else state).items():
        there = stored_name(name)
        if arch == "llama" and ".attn_q." in there:
            array = interleaved(array, HEADS)
        if arch == "llama" and ".attn_k." in there:
            array = interleaved(array, KV_HEADS)
        if arch == "gpt2" and ".c_" in name and array.ndim == 2:
            array = np.ascontiguousarray(array.T)
        if there in less:
            continue
        if kind is not None and array.ndim == 2:
            writer.add_tensor(there, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(there, array)
    for name, array in (more or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def header_size(path: Path) -> int:
    return int(gguf.GGUFReader(path).data_offset)


# SmolLM2, against torch.


def test_config_of_smollm2(smollm2, reference):
    expected = dict(reference["config"])
    eps = expected.pop("rms_norm_eps")
    assert expected.items() <= smollm2.config.items()
    # The file has the float32 nearest to 1e-5, and torch takes that.
    assert smollm2.config["rms_norm_eps"] == 1e-5
    assert np.float32(1e-5) == np.float32(eps)
    assert smollm2.config["rope_scaling"] is None


def test_every_tensor_of_smollm2_is_torchs(smollm2, reference):
    assert len(smollm2.tensors) == 272
    assert set(smollm2.tensors) == set(reference["tensors"])
    for name, expected in reference["tensors"].items():
        array = smollm2.tensors[name]
        assert array.dtype == np.float32
        assert array.shape == smollm2.tensors.shape(name)
        assert hashlib.sha256(array.tobytes()).hexdigest()[:16] == expected, name


def with_metadata(model: GgufModel, changed: dict[str, Any]) -> GgufModel:
    metadata = {**model.file.metadata, **changed}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return dataclasses.replace(model, file=dataclasses.replace(model.file, metadata=metadata))


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_ids_of_texts(pre, smollm2, reference):
    tokenizer = read_tokenizer(with_metadata(smollm2, {"tokenizer.ggml.pre": pre}))
    expected = [row.get(pre, row["smollm"]) for row in reference["texts"]]
    assert [tokenizer(row["text"])["input_ids"] for row in reference["texts"]] == expected
    if pre == "smollm":
        assert [tokenizer.decode(ids) for ids in expected] == [
            row["decoded"] for row in reference["texts"]
        ]


def test_ids_of_a_corpus(tokenizer, reference):
    file = fetch("reviews") / "movieReviewSnippets_GroundTruth.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    ids = [i for line in tokenizer(lines)["input_ids"] for i in (*line, -1)]
    expected = reference["corpus"]
    assert (len(lines), len(ids) - len(lines)) == (expected["lines"], expected["tokens"])
    assert hashlib.sha256(np.array(ids, np.int32).tobytes()).hexdigest() == expected["sha256"]


def test_chats(tokenizer, reference):
    for chat in reference["chats"]:
        options = {"add_generation_prompt": chat["prompt"]}
        text = tokenizer.apply_chat_template(chat["messages"], tokenize=False, **options)
        assert text == chat["text"]
        assert (
            tokenizer.apply_chat_template(chat["messages"], **options)["input_ids"] == chat["ids"]
        )


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token == "<|endoftext|>"
    assert len(tokenizer) == tokenizer.vocab_size == 49152
    assert tokenizer.model_max_length == 8192
    assert tokenizer.decode([1, 6004, 2], skip_special_tokens=True) == "hi"
    batch = tokenizer(["a b", "a"], padding=True, return_tensors="np")
    assert set(batch) == {"input_ids", "attention_mask"}
    np.testing.assert_array_equal(batch["attention_mask"], [[1, 1], [1, 0]])


def test_tokenizer_can_be_saved(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    text = "x 123 <|im_end|> ²"
    assert AutoTokenizer.from_pretrained(tmp_path)(text) == tokenizer(text)


@pytest.mark.parametrize("module", ["gguf", "gguf_tokenizer"])
def test_examples_of_the_docstrings(module):
    result = doctest.testmod(sys.modules[f"jaxlora.models.{module}"])
    assert result.attempted
    assert result.failed == 0


# Names, order of rows, types.


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_round_trip(arch, tmp_path):
    state = gpt2_state() if arch == "gpt2" else llama_state(norms=arch == "qwen3")
    rng = np.random.default_rng(1)
    if arch in ("llama", "qwen2"):  # the biases of q and k are interleaved as well
        for n in range(LAYERS):
            for x, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
                name = f"model.layers.{n}.self_attn.{x}_proj.bias"
                state[name] = rng.normal(size=heads * WIDTH).astype(np.float32)
    model = read_gguf(write(tmp_path / "m.gguf", arch, state))
    assert set(model.tensors) == set(state)
    for name, array in state.items():
        assert model.tensors.shape(name) == array.shape
        np.testing.assert_array_equal(model.tensors[name], array, err_msg=name)
        part = (slice(1, 3),) * array.ndim
        np.testing.assert_array_equal(model.tensors.read(name, part), array[part])
    assert model.config["model_type"] == arch
    assert model.config["tie_word_embeddings"] is True
    assert model.config["vocab_size"] == VOCAB
    if arch != "gpt2":
        assert model.config["attention_bias"] == (arch in ("llama", "qwen2"))


def test_a_head_of_its_own(tmp_path):
    head = np.ones((VOCAB, HIDDEN), np.float32)
    state = {**llama_state(), "lm_head.weight": head}
    model = read_gguf(write(tmp_path / "m.gguf", state=state))
    assert model.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(model.tensors["lm_head.weight"], head)


def test_config_of_a_tiny_llama(tmp_path):
    keys = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    assert read_gguf(write(tmp_path / "m.gguf", keys=keys)).config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def test_keys_that_may_be_missing(tmp_path):
    optional = ("attention.head_count_kv", "attention.key_length", "attention.value_length")
    optional += ("rope.dimension_count", "rope.freq_base")
    path = write(tmp_path / "m.gguf", sizes=dict.fromkeys(optional))
    config = read_gguf(path).config
    assert config["num_key_value_heads"] == HEADS
    assert config["head_dim"] == HIDDEN // HEADS
    assert config["rope_theta"] == 10000.0


def test_config_of_a_tiny_gpt2(tmp_path):
    config = read_gguf(write(tmp_path / "m.gguf", "gpt2", gpt2_state())).config
    assert config["n_embd"] == HIDDEN
    assert config["n_layer"] == LAYERS
    assert config["n_head"] == HEADS
    assert config["n_inner"] == INTERMEDIATE
    assert config["n_positions"] == 128
    assert config["layer_norm_epsilon"] == 1e-5


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_types(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    state = llama_state()
    model = read_gguf(write(tmp_path / "m.gguf", state=state, kind=kind))
    for name, array in state.items():
        found = model.tensors[name]
        expected = gguf.dequantize(gguf.quantize(array, kind), kind) if array.ndim == 2 else array
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        assert array.ndim == 1 or not np.array_equal(found, array)


def test_arrays_are_no_views_of_the_file(tmp_path):
    model = read_gguf(write(tmp_path / "m.gguf"))
    first = model.tensors["model.norm.weight"]
    first[:] = 0
    np.testing.assert_array_equal(
        model.tensors["model.norm.weight"], llama_state()["model.norm.weight"]
    )


def test_a_name_that_is_not_there(tmp_path):
    tensors = read_gguf(write(tmp_path / "m.gguf")).tensors
    assert "lm_head.weight" not in tensors
    with pytest.raises(KeyError, match=r"lm_head.weight"):
        tensors["lm_head.weight"]


# Rotary scaling.


def llama3_factors(factor: float) -> np.ndarray:
    """As transformers' rotary scaling "llama3", band by band."""
    factors = []
    for i in range(WIDTH // 2):
        wavelength = 2 * np.pi * 5e5 ** (2 * i / WIDTH)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_scaling(tmp_path):
    factors = llama3_factors(32.0)
    assert len({*factors.tolist()}) == 3  # a band of each kind
    model = read_gguf(write(tmp_path / "m.gguf", more={"rope_freqs.weight": factors}))
    assert model.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert set(model.tensors) == set(llama_state())
    path = write(tmp_path / "n.gguf", more={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(CheckpointError, match=r"'rope_freqs.weight' .* is not the frequency"):
        read_gguf(path)


def test_linear_scaling(tmp_path):
    sizes = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    sizes["rope.scaling.original_context_length"] = 32
    expected = {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 32}
    assert read_gguf(write(tmp_path / "m.gguf", sizes=sizes)).config["rope_scaling"] == expected
    path = write(tmp_path / "n.gguf", sizes={"rope.scaling.type": "none"})
    assert read_gguf(path).config["rope_scaling"] is None


# What cannot be read, and what is said.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "mamba"}, r"got 'mamba', expected one of llama, qwen2, qwen3, gpt2"),
        ({"sizes": {"block_count": None}}, r"lacks the key 'llama.block_count'. Keys in 'llama.'"),
        ({"sizes": {"block_count": 0}}, r"'llama.block_count' in .* is 0, expected more than 0"),
        ({"sizes": {"block_count": 2**31}}, r"with 2147483648 layers. Missing .*: blk.2.attn_norm"),
        ({"sizes": {"block_count": 1}}, r"Unexpected \(9\): blk.1.attn_norm.weight"),
        ({"sizes": {"attention.head_count_kv": [2, 4]}}, r"head_count_kv' in .* is array"),
        ({"sizes": {"attention.head_count": 2**31}}, r"has shape \(64, 32\), expected rows for"),
        (
            {"sizes": {"rope.freq_base": "x"}},
            r"freq_base' in .* is 'x', expected .* float",
        ),
        ({"sizes": {"rope.freq_base": float("nan")}}, r"freq_base' in .* is nan, expected more"),
        ({"sizes": {"rope.dimension_count": 8}}, r"of widths \[8, 16\], expected one width"),
        ({"less": ("token_embd.weight",)}, r"lacks the tensor 'token_embd.weight'"),
        ({"less": ("blk.1.attn_v.weight",)}, r"Missing \(1\): blk.1.attn_v.weight"),
        (
            {"more": {"blk.0.ffn_gate_exps.weight": np.ones((2, 2), np.float32)}},
            r"not those of architecture llama .* Unexpected \(1\): blk.0.ffn_gate_exps.weight",
        ),
        ({"keys": {"split.count": 3}}, r"is one of 3 parts. Next: merge"),
        ({"keys": {"general.alignment": 2**31}}, r"damaged or cut short: 'token_embd.weight'"),
        (
            {"keys": {"tokenizer.ggml.bos_token_id": "x"}},
            r"bos_token_id' in .* is 'x', expected",
        ),
    ],
)
def test_what_cannot_be_read(change, message, tmp_path):
    if change.get("arch") == "mamba":
        change = {"arch": "mamba", "state": {}}
    with pytest.raises(CheckpointError, match=message):
        read_gguf(write(tmp_path / "m.gguf", **change))


def test_a_type_that_cannot_be_dequantized(tmp_path):
    integers = np.ones((HIDDEN, INTERMEDIATE), np.int32)
    path = write(
        tmp_path / "m.gguf",
        less=("blk.0.ffn_down.weight",),
        more={"blk.0.ffn_down.weight": integers},
    )
    tensors = read_gguf(path).tensors
    message = r"'blk.0.ffn_down.weight' in .* has quantization type I32, which .* cannot dequantize"
    with pytest.raises(CheckpointError, match=message):
        tensors["model.layers.0.mlp.down_proj.weight"]


def test_what_is_no_gguf_file(tmp_path):
    path = tmp_path / "m.gguf"
    with pytest.raises(CheckpointError, match=r"There is no file .*m.gguf"):
        read_gguf(path)
    for content, message in (
        (b"", "is not a GGUF file: it is empty"),
        (b"GG", "it starts with b'GG', not b'GGUF'"),
        (b"PK\3\4" + bytes(60), r"it starts with b'PK\\x03\\x04'"),
        (b"GGUF\1\0\0\0" + bytes(60), "has GGUF version 1, expected 2 or 3"),
        (b"GGUF\0\0\0\3" + bytes(60), "has GGUF version 50331648, .* little-endian"),
        (b"GGUF\3\0\0\0" + bytes(60), "Architecture of .*: got None"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_gguf(path)


def patched(path: Path, at: bytes, skip: int, new: bytes) -> Path:
    """The same file with other bytes `skip` bytes after the end of the first `at`."""
    whole = bytearray(path.read_bytes())
    start = whole.index(at) + len(at) + skip
    whole[start : start + len(new)] = new
    path.write_bytes(bytes(whole))
    return path


HUGE = (2**63 + 1).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("at", "skip", "new", "message"),
    [
        (b"GGUF", 4, HUGE, r"it has 9223372036854775809 tensors, more than"),
        (b"GGUF", 12, HUGE, r"it has 9223372036854775809 keys, more than"),
        (b"GGUF", 20, HUGE, r"a key at byte 32 takes 9223372036854775809 bytes"),
        (b"tokenizer.ggml.tokens", 8, HUGE, r"strings in key 'tokenizer.ggml.tokens', more than"),
        (b"tokenizer.ggml.scores", 8, HUGE, r"elements in key 'tokenizer.ggml.scores', more than"),
        (b"tokenizer.ggml.scores", 4, b"\x09", r"scores' has value type 9, .* array in an array"),
        (b"tokenizer.ggml.scores", 0, b"\x63", r"scores' has value type 99"),
        (b"llama.block_count", -1, b"\xff", r"a key is not UTF-8"),
        (b"output_norm.weight", 0, b"\x63", r"'output_norm.weight' has 99 dimensions"),
        (b"output_norm.weight", 4, bytes(8), r"'output_norm.weight' has shape \(0,\)"),
        (b"output_norm.weight", 4, HUGE, r"'output_norm.weight' of shape .* ends at byte"),
        (b"output_norm.weight", 12, b"\x63", r"'output_norm.weight' in .* quantization type 99"),
        (b"output_norm.weight", 12, b"\x0c", r"shape \(32,\), expected rows of a multiple of 256"),
        (b"output_norm.weight", 16, HUGE, r"'output_norm.weight' of shape \(32,\) ends at byte"),
        (b"blk.0.attn_q", -1, b"k", r"it has the tensor 'blk.0.attn_k.weight' twice"),
    ],
)
def test_headers_that_lie(at, skip, new, message, tmp_path):
    keys = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [0.5, 1.5]}
    path = patched(write(tmp_path / "m.gguf", keys=keys), at, skip, new)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(path)


def test_truncated_files(tmp_path):
    path = write(tmp_path / "m.gguf", keys={"tokenizer.ggml.tokens": ["a", "b"]})
    whole = path.read_bytes()
    for cut in [*range(0, header_size(path), 7), header_size(path), len(whole) // 2]:
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"damaged or cut short|not a GGUF file"):
            read_gguf(path)


@pytest.mark.parametrize("noise", [b"\xff" * 8, bytes(8), b"\x01\x00\x00\x00\x01"])
def test_a_damaged_header_is_an_error_of_ours_or_none(noise, tmp_path):
    path = with_tokenizer(tmp_path, BYTE_LEVEL).file.path
    whole = path.read_bytes()
    offsets = range(0, header_size(path), 5)
    refused = 0
    for at in offsets:
        path.write_bytes(whole[:at] + noise + whole[at + len(noise) :])
        try:
            read_tokenizer(read_gguf(path))
        except CheckpointError:
            refused += 1
    assert refused > len(offsets) / 2


@pytest.mark.parametrize("package", ["gguf", "tokenizers", "transformers"])
def test_missing_dependency(package, smollm2, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"needs the package '{package}', .* pip install 'jaxlora\[hf\]'"
    with pytest.raises(MissingDependencyError, match=message):
        read_gguf(smollm2.file.path) if package == "gguf" else read_tokenizer(smollm2)


# Tokenizers.


def with_tokenizer(path: Path, keys: dict[str, Any]) -> GgufModel:
    """A tiny model with the tokenizer of the sentencepiece reference, or of `keys`."""
    stored = json.loads((REFERENCES / "sentencepiece.json").read_text(encoding="utf-8"))
    ours = {
        "model": "llama",
        "tokens": stored["tokens"],
        "scores": stored["scores"],
        "token_type": stored["types"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    fields = {f"tokenizer.ggml.{name}": value for name, value in {**ours, **keys}.items()}
    return read_gguf(write(path / "m.gguf", keys=fields))


def test_sentencepiece(tmp_path):
    stored = json.loads((REFERENCES / "sentencepiece.json").read_text(encoding="utf-8"))
    tokenizer = read_tokenizer(with_tokenizer(tmp_path, {}))
    for row in stored["texts"]:
        assert tokenizer(row["text"])["input_ids"] == [1, *row["ids"]], row["text"]
        assert tokenizer(row["text"], add_special_tokens=False)["input_ids"] == row["ids"]
        assert tokenizer.decode(row["ids"]) == row["decoded"]
    file = fetch("reviews") / "movieReviewSnippets_GroundTruth.txt"
    lines = [line.split("\t")[2] for line in file.read_text(encoding="utf-8").splitlines()]
    batch = tokenizer(lines, add_special_tokens=False)["input_ids"]
    ids = np.array([i for line in batch for i in (*line, -1)], np.int32)
    assert len(ids) == stored["corpus"]["ids"]
    assert hashlib.sha256(ids.tobytes()).hexdigest() == stored["corpus"]["sha256"]
    assert tokenizer.pad_token is None
    assert tokenizer.chat_template is None


def test_ends_that_the_file_asks_for(tmp_path):
    keys = {"add_bos_token": False, "add_eos_token": True, "add_space_prefix": False}
    tokenizer = read_tokenizer(with_tokenizer(tmp_path, keys))
    ids = tokenizer("the movie")["input_ids"]
    assert ids[-1] == 2
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "the\u2581movie</s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the movie"
    assert tokenizer("a", "b")["input_ids"] == [
        *tokenizer("a").input_ids,
        *tokenizer("b").input_ids,
    ]


BYTES = ["<s>", "a", "b", "ab", "Ġ", "<x y>", "1", "11", "Ċ"]
BYTE_LEVEL = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": BYTES,
    "token_type": [3, 1, 1, 1, 1, 4, 1, 1, 1],
    "merges": ["a b", "1 1"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "unknown_token_id": None,
    "scores": None,
}


def test_user_defined_tokens(tmp_path):
    tokenizer = read_tokenizer(with_tokenizer(tmp_path, BYTE_LEVEL))
    ids = tokenizer("ab <x y>\n<s>")["input_ids"]
    assert ids == [3, 4, 5, 8, 0]
    assert tokenizer.decode(ids) == "ab <x y>\n<s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab <x y>\n"


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_llama3_starts_with_bos(pre, tmp_path):
    keys = {**BYTE_LEVEL, "pre": pre}
    tokenizer = read_tokenizer(with_tokenizer(tmp_path, keys))
    bos = [0] if pre.startswith("llama") else []
    assert tokenizer("ab")["input_ids"] == [*bos, 3]
    (tmp_path / "m.gguf").unlink()
    without = read_tokenizer(with_tokenizer(tmp_path, {**keys, "add_bos_token": False}))
    assert without("ab")["input_ids"] == [3]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", "Ġ12345", "Ġ", "ĠX", "'", "S", "Ċ"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "ĠX", "'", "S", "Ċ"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "ĠX", "'S", "Ċ"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "45", "Ġ", "ĠX", "'S", "Ċ"]),
    ],
)
def test_pieces(pre, pieces, tmp_path):
    tokenizer = read_tokenizer(with_tokenizer(tmp_path, {**BYTE_LEVEL, "pre": pre}))
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345  X'S\n")
    assert [piece for piece, _ in cut] == pieces


def test_llama3_takes_a_whole_token_whatever_the_merges(tmp_path):
    keys = {**BYTE_LEVEL, "merges": ["1 1"], "pre": "llama-bpe", "add_bos_token": False}
    assert read_tokenizer(with_tokenizer(tmp_path, keys))("ab")["input_ids"] == [3]
    (tmp_path / "m.gguf").unlink()
    tokenizer = read_tokenizer(with_tokenizer(tmp_path, {**keys, "pre": "gpt-2"}))
    assert tokenizer("ab")["input_ids"] == [1, 2]


def test_a_file_without_a_tokenizer(tmp_path):
    model = read_gguf(write(tmp_path / "m.gguf"))
    with pytest.raises(CheckpointError, match=r"Tokenizer of .*: got None, expected one of gpt2"):
        read_tokenizer(model)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "t5"}, r"Tokenizer of .*: got 't5', expected one of gpt2, llama"),
        ({"pre": "tekken"}, r"got 'tekken', expected one of gpt-2, smollm"),
        ({"pre": None}, r"Pre-tokenizer of .*: got None"),
        ({"tokens": None}, r"'tokenizer.ggml.tokens' is NoneType, expected an array of strings"),
        ({"tokens": [1, 2]}, r"'tokenizer.ggml.tokens' is ndarray, expected an array of strings"),
        ({"token_type": [1]}, r"'tokenizer.ggml.token_type' is 1, expected .* numbers, 9 of them"),
        ({"token_type": ["a"]}, r"'tokenizer.ggml.token_type' is list, expected .* numbers"),
        ({"merges": None}, r"'tokenizer.ggml.merges' is NoneType"),
        ({"merges": ["a b", "a z"]}, r"The tokenizer in .* is damaged: .*`z` out of vocabulary"),
        ({"merges": ["ab"]}, r"The tokenizer in .* is damaged: merge 'ab' is not two tokens"),
        ({"bos_token_id": 9}, r"its bos token is 9, expected less than 9"),
    ],
)
def test_damaged_tokenizers(changed, message, tmp_path):
    model = with_tokenizer(tmp_path, {**BYTE_LEVEL, **changed})
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(model)
