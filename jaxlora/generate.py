"""`generate`: text from a causal model, with or without an adapter."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import beam, decode
from jaxlora.adapter import Adapter
from jaxlora.apply import base_params
from jaxlora.errors import ConfigError, ModelError
from jaxlora.sampling import Sampling
from jaxlora.text import Writer, default_eos, to_ids, to_stops

Array = jax.Array
Ended = Literal["eos", "stop", "length"]
_LEAST = 16  # the smallest bucket
_CHUNK = 16  # tokens between two looks for a stop string


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """What `generate` gives, one item a row in each list.

    Attributes:
      ids: the new tokens, without the prompt; the one that ended the row is the last.
      ended: why the row ended: "eos", "stop" (a stop string) or "length".
      text: the ids as text, without special tokens and up to a stop string; None without a
        tokenizer.
      beams: of beam search, all hypotheses with their scores, best first; the first one's ids are
        `ids`. None without beams.
    """

    ids: list[list[int]]
    ended: list[Ended]
    text: list[str] | None = None
    beams: list[list[tuple[list[int], float]]] | None = None


def generate(
    model: nn.Module,
    variables: Mapping[str, Any],
    prompts: Sequence[Any],
    *,
    adapter: Adapter | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    key: Array | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    eos_id: int | Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    tokenizer: Any = None,
    stream: Callable[[int, list[int], str], None] | None = None,
) -> Generated:
    """Continues each prompt, greedily unless `sampling` or `num_beams` say otherwise.

    The prompts run in one pass that fills a cache, then one token of each row a step, in a loop on
    the device. Shapes are padded to powers of two: a batch size, a bucket of prompt lengths and one
    of `max_new_tokens` are compiled once, and no other argument but `adapter`'s spec compiles
    anything (`num_beams` and the number of eos ids do, as shapes).

    Args:
      model: a causal model: `model.apply(variables, ids, attention_mask, cache=, last=)` gives
        (logits, cache), `model.empty_cache(batch, length)` a cache, and `model.config` says its
        `vocab_size` and its `context`, the longest sequence, or None.
      variables: `{"params": base}` as for `model.apply`.
      prompts: one item a row: a string, a chat (a list of `{"role": …, "content": …}`, through the
        tokenizer's chat template), or token ids without padding.
      adapter: its update is added as by `lora_apply`; None for the base.
      max_new_tokens: how many tokens at most, at least 1.
      sampling: temperature, top_k, top_p, min_p and repetition_penalty; None is `Sampling()`.
      key: where the temperature is above 0. Row i draws from `fold_in(key, i)`: the same key gives
        the same tokens, whichever the other rows are.
      num_beams: beams a row; more than 1 is beam search, as Hugging Face's: 2 candidates a beam
        and step, finished ones scored by log-probability / length ** length_penalty.
      length_penalty: above 0 favours longer ones.
      eos_id: the token or tokens that end a row; None: the tokenizer's `eos_token_id`, if there is
        a tokenizer and it has one; `()` for none.
      stop: strings that end a row. They are not in the text.
      tokenizer: one of transformers or tokenizers.
      stream: `stream(row, ids, text)` is called as tokens come, with the new ones and the text that
        they complete (`jaxlora.text.to_stdout` prints it). Together they are the whole.

    Returns:
      Ids, text and why each row ended.

    Raises:
      ConfigError: an option that cannot mean anything, or a tokenizer is missing.
      ModelError: the model is no causal model; an empty prompt, a token id past the vocabulary, or
        a prompt that, with the new tokens, is longer than the config's positions.
      AdapterError: the adapter does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, jaxlora as jl
      >>> from jaxlora.models.llama import LlamaConfig, LlamaForCausalLM
      >>> model = LlamaForCausalLM(LlamaConfig(
      ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
      ...     num_attention_heads=2))
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
      >>> out = jl.generate(model, variables, [[5, 6, 7], [8]], max_new_tokens=4)
      >>> [len(ids) for ids in out.ids], out.ended
      ([4, 4], ['length', 'length'])
    """
    base_params(model, variables)
    sampling = Sampling() if sampling is None else sampling
    stops = to_stops(stop, tokenizer)
    _check_options(max_new_tokens, sampling, key, num_beams, length_penalty)
    if num_beams > 1 and (stops or stream):
        raise ConfigError(
            f"num_beams is {num_beams} with {'stop strings' if stops else 'stream'}, expected 1: "
            "which beam wins is known at the end only. Cut the text afterwards."
        )
    rows = _rows(model, prompts, tokenizer, max_new_tokens)
    eos = _eos(eos_id, tokenizer, _size(model, "vocab_size"))
    width, most = _buckets(max(map(len, rows)), max_new_tokens, _size(model, "context"))
    ids, mask = _padded(rows, width)
    seed = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        seed = jax.random.wrap_key_data(seed)
    rules = decode.Rules(
        filters=sampling.filters,
        eos=jnp.array(eos or [-1], jnp.int32),
        keys=jax.vmap(lambda row: jax.random.fold_in(seed, row))(jnp.arange(len(rows))),
    )
    until = jnp.int32(max_new_tokens)
    given = (model, variables, adapter)
    if num_beams > 1:
        penalty = jnp.float32(length_penalty)
        found = beam.start(*given, ids, mask, rules, penalty, until, most=most, beams=num_beams)
        found = beam.run(*given, found, rules, penalty, until)
        return _best(found, eos, tokenizer)
    state = decode.start(*given, ids, mask, rules, most=most)
    writers = [Writer(tokenizer, stops, live=bool(stops or stream)) for _ in rows]
    chunk = 1 if stream else _CHUNK if stops else max_new_tokens
    step = 1
    while True:
        state = _written(state, writers, stream)
        if step == max_new_tokens or bool(jnp.all(state.done)):
            break
        step = min(step + chunk, max_new_tokens)
        state = decode.run(*given, state, rules, jnp.int32(step))
    for row, writer in enumerate(writers):
        rest = writer.close()
        if stream and rest:
            stream(row, [], rest)
    ended: list[Ended] = [_ended(w.ids, eos, w.stopped) for w in writers]
    text = None if tokenizer is None else [w.text for w in writers]
    return Generated(ids=[w.ids for w in writers], ended=ended, text=text)


def _written(
    state: decode.State, writers: list[Writer], stream: Callable[..., None] | None
) -> decode.State:
    """Hands the new tokens to the writers, and ends the rows whose text has a stop string."""
    tokens, length = jax.device_get((state.tokens, state.length))
    for row, writer in enumerate(writers):
        new, text = [], ""
        for token in tokens[row, len(writer.ids) : length[row]]:
            if writer.stopped:
                break
            text += writer.add(int(token))
            new.append(int(token))
        if stream and new:
            stream(row, new, text)
    stopped = np.array([w.stopped for w in writers])
    return dataclasses.replace(state, done=state.done | stopped) if stopped.any() else state


def _best(found: beam.Beams, eos: Sequence[int], tokenizer: Any) -> Generated:
    """What beam search found."""
    tokens, scores, length = jax.device_get((found.best, found.best_scores, found.length))
    beams = [
        [
            (tokens[row, n, : length[row, n]].tolist(), float(scores[row, n]))
            for n in range(tokens.shape[1])
            if length[row, n]
        ]
        for row in range(tokens.shape[0])
    ]
    ids = [row[0][0] for row in beams]
    text = None
    if tokenizer is not None:
        text = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    ended: list[Ended] = [_ended(row, eos) for row in ids]
    return Generated(ids=ids, ended=ended, text=text, beams=beams)


def _ended(ids: list[int], eos: Sequence[int], stopped: bool = False) -> Ended:
    return "stop" if stopped else "eos" if ids[-1] in eos else "length"


def _buckets(prompt: int, new: int, context: int | None) -> tuple[int, int]:
    """The sizes that a prompt's length and a number of new tokens are padded to.

    Powers of two, or less where both together would be longer than the context.
    """
    width, most = (max(_LEAST, 1 << (n - 1).bit_length()) for n in (prompt, new))
    if context is not None:
        width = min(width, context - new)
        most = min(most, context - width)
    return width, most


def _padded(rows: list[list[int]], width: int) -> tuple[Array, Array]:
    """Ids and mask (batch, width) of the prompts, padded on the left."""
    ids, mask = np.zeros((2, len(rows), width), np.int32)
    for n, row in enumerate(rows):
        ids[n, width - len(row) :], mask[n, width - len(row) :] = row, 1
    return jnp.asarray(ids), jnp.asarray(mask)


def _rows(
    model: nn.Module, prompts: Sequence[Any], tokenizer: Any, max_new_tokens: int
) -> list[list[int]]:
    """The prompts as ids, checked against the model."""
    if not hasattr(model, "empty_cache"):
        raise ModelError(
            f"generate got a {type(model).__name__}, expected a causal model with `empty_cache`, "
            "such as jaxlora.models.llama.LlamaForCausalLM."
        )
    if not isinstance(prompts, (list, tuple, np.ndarray, jax.Array)) or not len(prompts):
        raise ConfigError(
            f"prompts is {prompts!r:.80}, expected a list with at least one prompt in it: "
            "[prompt] for one."
        )
    rows = [to_ids(prompt, row, tokenizer) for row, prompt in enumerate(prompts)]
    vocab, context = _size(model, "vocab_size"), _size(model, "context")
    for n, ids in enumerate(rows):
        if not ids:
            raise ModelError(f"Prompt {n} is empty, expected at least one token.")
        wrong = [i for i in ids if i < 0 or (vocab is not None and i >= vocab)]
        if wrong:
            raise ModelError(
                f"Prompt {n} has the token id {wrong[0]}, expected 0 to {(vocab or 0) - 1}: the "
                f"model's vocab_size is {vocab}. Is the tokenizer the model's?"
            )
        if context is not None and len(ids) + max_new_tokens > context:
            raise ModelError(
                f"Prompt {n} has {len(ids)} tokens and {max_new_tokens} are to follow, expected at "
                f"most {context} together, the positions of the config. Shorten the "
                "prompt, or lower max_new_tokens."
            )
    return rows


def _size(model: nn.Module, name: str) -> int | None:
    return getattr(getattr(model, "config", None), name, None)


def _eos(eos_id: Any, tokenizer: Any, vocab: int | None) -> tuple[int, ...]:
    if eos_id is None:
        return default_eos(tokenizer)
    found = (eos_id,) if isinstance(eos_id, (int, np.integer)) else tuple(eos_id)
    for each in found:
        whole = isinstance(each, (int, np.integer)) and not isinstance(each, bool)
        if not whole or each < 0 or (vocab is not None and each >= vocab):
            raise ConfigError(
                f"eos_id is {each!r}, expected a token id of the model's {vocab} tokens."
            )
    return tuple(int(each) for each in found)


def _check_options(
    max_new_tokens: Any, sampling: Any, key: Any, num_beams: Any, length_penalty: Any
) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} is {value!r}, expected an integer of at least 1.")
    if not isinstance(sampling, Sampling):
        raise ConfigError(
            f"sampling is a {type(sampling).__name__}, expected a Sampling: "
            "Sampling(temperature=0.7, top_p=0.9)."
        )
    if not isinstance(length_penalty, (int, float)) or not math.isfinite(length_penalty):
        raise ConfigError(f"length_penalty is {length_penalty!r}, expected a finite number.")
    if sampling.temperature > 0 and num_beams > 1:
        raise ConfigError(
            f"num_beams is {num_beams} with temperature {sampling.temperature}, expected 1 beam or "
            "temperature 0: beam search does not draw."
        )
    if (key is None and sampling.temperature > 0) or not isinstance(key, (jax.Array, type(None))):
        raise ConfigError(
            f"key is {key!r} with temperature {sampling.temperature}, expected a PRNG key: "
            "key=jax.random.key(0)."
        )
