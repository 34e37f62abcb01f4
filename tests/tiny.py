"""Model folders of a few kilobytes, with tokenizers of whole words, for tests of tasks and CLI."""

from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers
import transformers

from jaxlora import models
from jaxlora.models.bert import BertConfig, BertForSequenceClassification
from jaxlora.models.gpt2 import GPT2Config, GPT2LMHeadModel
from jaxlora.models.llama import LlamaConfig, LlamaForCausalLM

SPECIAL = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
WORDS = [
    *["good", "fine", "great", "bad", "dull", "poor", "film", "a", "the", "is", "it", "was"],
    *["not", "very", "name", "type", "food", "price", "Mill", "Inn", "Italian", "French"],
    *["cheap", "dear", "serves", "and", "near", "User", "Assistant", "System", "user"],
    *["assistant", "system", "|", "[", "]", ",", ".", ":"],
]
TEMPLATE = (
    "{% for m in messages %}[BOS] {{ m['role'] }} {{ m['content'] }} [EOS]\n{% endfor %}"
    "{% if add_generation_prompt %}[BOS] assistant {% endif %}"
)
DIALOGUES = [
    [("user", "is it good"), ("assistant", "it is fine")],
    [("user", "is it dull"), ("assistant", "it is not dull")],
    [("system", "a film"), ("user", "is it bad"), ("assistant", "very bad"),
     ("user", "the food"), ("assistant", "the food was great")],
    [("user", "is the Inn cheap"), ("assistant", "the Inn is dear")],
    [("user", "is the Mill near"), ("assistant", "the Mill is near")],
]  # fmt: skip


def tokenizer(template: str | None = None):
    words = [*SPECIAL, *WORDS]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.decoder = tokenizers.decoders.Metaspace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
    )
    made.chat_template = template
    return made


def encoder(folder: Path) -> Path:
    """A BERT with a classification head of two classes."""
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
    )
    model = BertForSequenceClassification(config)
    params = model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    return models.save_pretrained(folder, model, params, tokenizer=tokenizer())


def causal(folder: Path, template: str | None = TEMPLATE, layers: int = 2) -> Path:
    """A Llama-type model."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=96,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    params = model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    return models.save_pretrained(folder, model, params, tokenizer=tokenizer(template))


def gpt2(folder: Path) -> Path:
    """A GPT-2, which has no chat template."""
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)
    params = model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    return models.save_pretrained(folder, model, params, tokenizer=tokenizer())
