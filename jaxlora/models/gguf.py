"""GGUF files of Llama-type models and GPT-2, given as a Hugging Face folder would be."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora.errors import CheckpointError, listing
from jaxlora.models.gguf_file import GgufFile, open_gguf

_LLAMA_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
}
_QKV_BIASES = {f"attn_{x}.bias": f"model.layers.{{}}.self_attn.{x}_proj.bias" for x in "qkv"}
_QK_NORMS = {f"attn_{x}_norm.weight": f"model.layers.{{}}.self_attn.{x}_norm.weight" for x in "qk"}
_BIASES = {
    **_QKV_BIASES,
    "attn_output.bias": "model.layers.{}.self_attn.o_proj.bias",
    **{f"ffn_{x}.bias": f"model.layers.{{}}.mlp.{x}_proj.bias" for x in ("gate", "up", "down")},
}
_HEAD = {"output.weight": "lm_head.weight"}
_GPT2_NAMES = {
    "token_embd.weight": "transformer.wte.weight",
    "position_embd.weight": "transformer.wpe.weight",
    **{
        f"{here}.{kind}": f"transformer.{there}.{kind}"
        for kind in ("weight", "bias")
        for here, there in {
            "output_norm": "ln_f",
            "attn_norm": "h.{}.ln_1",
            "attn_qkv": "h.{}.attn.c_attn",
            "attn_output": "h.{}.attn.c_proj",
            "ffn_norm": "h.{}.ln_2",
            "ffn_up": "h.{}.mlp.c_fc",
            "ffn_down": "h.{}.mlp.c_proj",
        }.items()
    },
}
_CONV1D = {"attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"}
# In files of architecture llama the rows of each head of these are interleaved: row 2i is Hugging
# Face's row i, and row 2i + 1 its row i + head_dim / 2.
_INTERLEAVED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
_ROPE_FACTORS = "rope_freqs.weight"  # no weight in Hugging Face's form: a field of the config


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """What Hugging Face calls the model and its tensors; `{}` is the number of the layer."""

    model_class: str
    required: Mapping[str, str]
    optional: Mapping[str, str]


ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", _LLAMA_NAMES, _HEAD | _BIASES),
    "qwen2": _Architecture("Qwen2ForCausalLM", _LLAMA_NAMES | _QKV_BIASES, _HEAD),
    "qwen3": _Architecture("Qwen3ForCausalLM", _LLAMA_NAMES | _QK_NORMS, _HEAD | _BIASES),
    "gpt2": _Architecture("GPT2LMHeadModel", _GPT2_NAMES, _HEAD),
}
"""The values of `general.architecture` that can be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """Where a tensor comes from: `heads` to undo the interleaving in (0: none), and a transpose."""

    name: str
    heads: int = 0
    transposed: bool = False


class GgufTensors(Mapping[str, np.ndarray]):
    """The tensors of a GGUF file by their Hugging Face names, each read when it is asked for.

    All come as float32 arrays of their own, rows and columns in Hugging Face's order.
    """

    def __init__(self, file: GgufFile, sources: Mapping[str, _Source]) -> None:
        self._file = file
        self._sources = dict(sources)
        self.source = file.path

    def __getitem__(self, name: str) -> np.ndarray:
        source = self._sources[name]
        array = self._file.read(source.name)
        if source.heads:
            pairs = array.reshape(source.heads, -1, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        return np.ascontiguousarray(array.T) if source.transposed else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor; the whole of it is dequantized."""
        return self[name][index]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        source = self._sources[name]
        shape = self._file.entries[source.name].shape
        return shape[::-1] if source.transposed else shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufModel:
    """What a GGUF file holds.

    Attributes:
      config: the fields of Hugging Face's config.json. For Qwen2 `attention_bias` is true and means
        the query, key and value only.
      tensors: the weights by Hugging Face's names.
      file: the file, with its own metadata and names.
    """

    config: dict[str, Any]
    tensors: GgufTensors
    file: GgufFile


def read_gguf(path: str | Path) -> GgufModel:
    """Open a GGUF file of one of the `ARCHITECTURES`. Only its header is read.

    Its tokenizer: `jaxlora.models.gguf_tokenizer.read_tokenizer`.

    Args:
      path: the file, of version 2 or 3, little-endian.

    Returns:
      The model's config and tensors, and the file that they come from.

    Raises:
      CheckpointError: the file is damaged or cut short, of another architecture, lacks a key or a
        tensor, has tensors that its architecture does not know, or one of an unknown type.
      MissingDependencyError: gguf is not installed.

    Example:
      >>> from jaxlora.fetch import fetch
      >>> [path] = fetch("smollm2").glob("*.gguf")
      >>> model = read_gguf(path)
      >>> model.config["model_type"], model.config["num_hidden_layers"], len(model.tensors)
      ('llama', 30, 272)
      >>> model.tensors["model.layers.0.self_attn.k_proj.weight"].shape
      (192, 576)
    """
    file = open_gguf(Path(path).expanduser())
    name = file.get("general.architecture", str)
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"Architecture of {file.path}: got {name!r}, expected one of "
            f"{', '.join(ARCHITECTURES)}."
        )
    parts = file.number("split.count", 1)
    if parts > 1:
        raise CheckpointError(
            f"{file.path} is one of {parts} parts. Next: merge them into one file with "
            "llama-gguf-split --merge."
        )
    config = _gpt2_config(file) if name == "gpt2" else _llama_config(file, name)
    return GgufModel(config=config, tensors=GgufTensors(file, _rename(file, config)), file=file)


def token_id(file: GgufFile, kind: str) -> int | None:
    """The id of the special token `kind` ("bos", "eos", "unknown", "padding"), if there is one.

    Raises:
      CheckpointError: it is no id.
    """
    key = f"tokenizer.ggml.{kind}_token_id"
    found = file.get(key, int)
    if found is not None and found < 0:
        raise CheckpointError(f"'{key}' in {file.path} is {found}, expected an id of at least 0.")
    return found


def _common_config(file: GgufFile, name: str) -> dict[str, Any]:
    if "token_embd.weight" not in file.entries:
        raise CheckpointError(f"{file.path} lacks the tensor 'token_embd.weight'.")
    rows = file.entries["token_embd.weight"].shape[0]
    return {
        "model_type": name,
        "architectures": [ARCHITECTURES[name].model_class],
        "vocab_size": file.number(f"{name}.vocab_size", rows),
        "tie_word_embeddings": "output.weight" not in file.entries,
        "bos_token_id": token_id(file, "bos"),
        "eos_token_id": token_id(file, "eos"),
        "pad_token_id": token_id(file, "padding"),
    }


def _llama_config(file: GgufFile, name: str) -> dict[str, Any]:
    def size(key: str, default: int | None = None) -> int:
        return file.number(f"{name}.{key}", default)

    hidden, heads = size("embedding_length"), size("attention.head_count")
    width = size("attention.key_length", size("rope.dimension_count", max(hidden // heads, 1)))
    widths = {width, size("rope.dimension_count", width), size("attention.value_length", width)}
    if len(widths) > 1:
        raise CheckpointError(
            f"The keys of {file.path}, the part of them that rotates and the values are of widths "
            f"{sorted(widths)}, expected one width for all."
        )
    return {
        **_common_config(file, name),
        "hidden_size": hidden,
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": width,
        "intermediate_size": size("feed_forward_length"),
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": _decimal(file, f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_theta": _decimal(file, f"{name}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, name, width),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.entries,
        "mlp_bias": "blk.0.ffn_up.bias" in file.entries,
    }


def _gpt2_config(file: GgufFile) -> dict[str, Any]:
    return {
        **_common_config(file, "gpt2"),
        "n_embd": file.number("gpt2.embedding_length"),
        "n_layer": file.number("gpt2.block_count"),
        "n_head": file.number("gpt2.attention.head_count"),
        "n_inner": file.number("gpt2.feed_forward_length"),
        "n_positions": file.number("gpt2.context_length"),
        "layer_norm_epsilon": _decimal(file, "gpt2.attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _decimal(file: GgufFile, key: str, default: float | None = None) -> float:
    """The number that was meant: 1e-5, not the float32 nearest to it."""
    return float(str(np.float32(file.number(key, default, float))))


def _rope_scaling(file: GgufFile, name: str, head_dim: int) -> dict[str, Any] | None:
    if _ROPE_FACTORS in file.entries:
        return _llama3_scaling(file, name, head_dim)
    kind = file.get(f"{name}.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": _decimal(file, f"{name}.rope.scaling.factor")}
    original = f"{name}.rope.scaling.original_context_length"
    if original in file.metadata:
        scaling["original_max_position_embeddings"] = file.number(original)
    return scaling


def _llama3_scaling(file: GgufFile, name: str, head_dim: int) -> dict[str, Any]:
    """The frequency scaling of Llama 3.1 and 3.2, of which a file has only the resulting factors.

    Both have the same bands and original length: the factors are made again, and compared.
    """
    original, low, high = 8192, 1.0, 4.0
    factors = file.read(_ROPE_FACTORS)
    factor = float(factors.max())
    theta = _decimal(file, f"{name}.rope.freq_base", 10000.0)
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(
            f"'{_ROPE_FACTORS}' in {file.path} is not the frequency scaling of Llama 3.1 and 3.2, "
            "the only one that can be read."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _rename(file: GgufFile, config: Mapping[str, Any]) -> dict[str, _Source]:
    """Where each tensor comes from, by its Hugging Face name."""
    name = config["model_type"]
    known = ARCHITECTURES[name]
    names = {**known.required, **known.optional}
    n_layers = config["n_layer"] if name == "gpt2" else config["num_hidden_layers"]
    sources, unknown = {}, []
    for stored, entry in file.entries.items():
        match = re.fullmatch(r"blk\.(0|[1-9]\d{0,8})\.(.+)", stored)
        layer, part = (int(match[1]), match[2]) if match else (0, stored)
        template = names.get(part)
        if template is None or ("{}" in template) != bool(match) or layer >= n_layers:
            if stored != _ROPE_FACTORS or name == "gpt2":
                unknown.append(stored)
            continue
        field = _INTERLEAVED.get(part.partition(".")[0]) if name == "llama" else None
        heads = config[field] if field else 0
        if heads and entry.shape[0] % (2 * heads):
            raise CheckpointError(
                f"'{stored}' in {file.path} has shape {entry.shape}, expected rows for "
                f"{heads} heads."
            )
        transposed = name == "gpt2" and part in _CONV1D
        sources[template.format(layer)] = _Source(name=stored, heads=heads, transposed=transposed)
    # A count of layers that lies is found out by the first layer that there is not.
    layers = range(min(n_layers, len(file.entries) + 1))
    wanted = [
        part if "{}" not in template else f"blk.{layer}.{part}"
        for layer in layers
        for part, template in known.required.items()
        if layer == 0 or "{}" in template
    ]
    missing = [stored for stored in wanted if stored not in file.entries]
    if missing or unknown:
        said = [f"Missing ({len(missing)}): {listing(missing)}."] if missing else []
        said += [f"Unexpected ({len(unknown)}): {listing(unknown)}."] if unknown else []
        raise CheckpointError(
            f"The tensors in {file.path} are not those of architecture {name} with {n_layers} "
            f"layers. {' '.join(said)}"
        )
    return sources
