"""The table of architectures: a further model is a file beside these and an entry here."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.errors import ConfigError, nearest
from jaxlora.models import bert, deberta, gpt2, llama, roberta, vit
from jaxlora.models.config import ModelConfig
from jaxlora.models.names import Names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What there is to know of a model to read and write its folders.

    Attributes:
      config: the class of its config.
      names: how its params are called in torch.
      heads: {head: module}; a module takes `config`, `num_labels` where it has that field, and
        options that are its further fields.
      torch_classes: {model_type: how torch's class names begin}: "Bert" of "BertModel". They end
        as the class names here do.
      fresh: scopes of heads that a checkpoint may lack, to be drawn anew.
      other: pattern of tensors that are no params of ours: buffers, and heads that we do not have.
      optional: pattern of tensors, without the base's prefix, that are left where the config has no
        use for them.
      row_parallel: pattern of modules whose kernel is sharded along its input under tensor
        parallelism, so that its layer sums over devices.
      example: the shapes of the inputs that a model is initialized with.
    """

    config: type[ModelConfig]
    names: Names
    heads: Mapping[str, Callable[..., nn.Module]]
    torch_classes: Mapping[str, str]
    fresh: tuple[str, ...] = ()
    other: str = r"(?!)"
    optional: str = r"(?!)"
    row_parallel: str = r"(?!)"
    example: Callable[[Any], jax.ShapeDtypeStruct] = lambda _: jax.ShapeDtypeStruct(
        (1, 1), jnp.int32
    )


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        config=bert.BertConfig,
        names=bert.NAMES,
        heads={
            "classification": bert.BertForSequenceClassification,
            "token": bert.BertForTokenClassification,
            "embedding": bert.BertEmbedder,
            "none": bert.Bert,
        },
        torch_classes={"bert": "Bert"},
        fresh=("pooler", "classifier"),
        other=r"cls\.|qa_outputs\.|(bert\.)?embeddings\.position_ids$",
        row_parallel=r"attention/out|mlp/down",
    ),
    "llama": Architecture(
        config=llama.LlamaConfig,
        names=llama.NAMES,
        heads={
            "lm": llama.LlamaForCausalLM,
            "classification": llama.LlamaForSequenceClassification,
            "none": llama.Llama,
        },
        torch_classes={
            "llama": "Llama",
            "mistral": "Mistral",
            "qwen2": "Qwen2",
            "qwen3": "Qwen3",
        },
        fresh=("score",),
        other=r".*rotary_emb\.inv_freq$",
        row_parallel=r"self_attn/o_proj|mlp/down_proj",
    ),
    "gpt2": Architecture(
        config=gpt2.GPT2Config,
        names=gpt2.NAMES,
        heads={
            "lm": gpt2.GPT2LMHeadModel,
            "classification": gpt2.GPT2ForSequenceClassification,
            "none": gpt2.GPT2,
        },
        torch_classes={"gpt2": "GPT2"},
        fresh=("score",),
        other=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias$",
        row_parallel=r"(attn|mlp)/c_proj",
    ),
    "roberta": Architecture(
        config=roberta.RobertaConfig,
        names=roberta.NAMES,
        heads={
            "classification": roberta.RobertaForSequenceClassification,
            "token": roberta.RobertaForTokenClassification,
            "none": roberta.Roberta,
        },
        torch_classes={
            "roberta": "Roberta",
            "xlm-roberta": "XLMRoberta",
            "camembert": "Camembert",
        },
        fresh=("pooler", "classifier"),
        other=r"qa_outputs\.|(roberta\.)?embeddings\.position_ids$",
        row_parallel=r"attention/out|mlp/down",
    ),
    "deberta-v2": Architecture(
        config=deberta.DebertaConfig,
        names=deberta.NAMES,
        heads={
            "classification": deberta.DebertaForSequenceClassification,
            "token": deberta.DebertaForTokenClassification,
            "none": deberta.Deberta,
        },
        torch_classes={"deberta-v2": "DebertaV2"},
        fresh=("pooler", "classifier"),
        other=r"(lm|mask)_predictions\.|cls\.|qa_outputs\.|(deberta\.)?embeddings\.position_ids$",
        optional=r"embeddings\.position_embeddings\.",
        row_parallel=r"attention/out|mlp/down",
    ),
    "vit": Architecture(
        config=vit.ViTConfig,
        names=vit.NAMES,
        heads={"classification": vit.ViTForImageClassification, "none": vit.ViT},
        torch_classes={"vit": "ViT"},
        fresh=("pooler", "classifier"),
        other=r"(vit\.)?embeddings\.mask_token$|decoder\.",
        row_parallel=r"attention/out|mlp/down",
        example=lambda c: jax.ShapeDtypeStruct((1, *c.image_shape), jnp.float32),
    ),
}
"""The models that there are. A further one is a file beside these and an entry here."""


def architecture(model_type: Any) -> Architecture:
    """The architecture of a `model_type` of config.json.

    Raises:
      ConfigError: there is none; it names those there are.
    """
    types = {t: arch for arch in ARCHITECTURES.values() for t in arch.config.model_types}
    if not isinstance(model_type, str) or model_type not in types:
        near = f" Nearest: {nearest(str(model_type), types, 1)[0]}." if model_type else ""
        raise ConfigError(
            f"model_type is {model_type!r} in config.json, expected one of {', '.join(types)}."
            f"{near}"
        )
    return types[model_type]


def architecture_of(model: Any) -> Architecture:
    """The architecture of a model.

    Raises:
      ConfigError: it is none of `jaxlora.models`.
    """
    for arch in ARCHITECTURES.values():
        if type(model) in arch.heads.values():
            return arch
    raise ConfigError(
        f"The model is a {type(model).__name__}, expected one of jaxlora.models: "
        f"{', '.join(ARCHITECTURES)}."
    )
