"""Generation against torch's tokens (tests/references/make_generate.py), its options and errors."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora as jl
from jaxlora import beam, decode, models, tree
from jaxlora.errors import AdapterError, ConfigError, ModelError
from jaxlora.fetch import fetch
from jaxlora.models.gpt2 import GPT2Config, GPT2LMHeadModel
from jaxlora.models.llama import NAMES, LlamaConfig, LlamaForCausalLM
from jaxlora.sampling import Sampling, choose, filtered, penalized
from jaxlora.text import Writer, to_stdout

REFERENCE = Path(__file__).parent / "references" / "generate_tiny.npz"
SMOLLM2 = Path(__file__).parent / "references" / "generate_smollm2.npz"
CONFIG = LlamaConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    initializer_range=0.5,
)
MODEL = LlamaForCausalLM(CONFIG)
PROMPTS = [[5, 9, 2, 20, 11], [7], [26, 1, 12, 12, 8, 20, 3, 25, 4]]
HOT = Sampling(temperature=1.5)
KEY = jax.random.key(3)


def init(model: Any, seed: int = 0) -> dict[str, Any]:
    return model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))


VARIABLES = init(MODEL)


def adapter_of(model: Any, variables: Any, seed: int = 1) -> jl.Adapter:
    """An adapter that changes the output."""
    config = jl.LoraConfig(rank=2, alpha=4, targets="self_attn/(q|v)_proj|down_proj")
    x = jnp.zeros((1, 3), jnp.int32)
    adapter = jl.lora_init(jax.random.key(seed), model, variables, config, x)
    leaves, rest = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(rest, noisy)


def by_hand(model: Any, variables: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens without a cache, a mask or a loop on the device."""
    apply = jax.jit(lambda ids: model.apply(variables, ids)[0])
    ids = np.zeros((1, len(prompt) + count), int)  # later tokens do not change earlier logits
    ids[0, : len(prompt)] = prompt
    for at in range(len(prompt), ids.size):
        ids[0, at] = int(jnp.argmax(apply(ids)[at - 1]))
    return ids[0, len(prompt) :].tolist()


class Pieces:
    """A tokenizer of a few bytes a token: some tokens are half a character, 28 is special."""

    parts = (b"a", b"b", b"<", b"/", b"s", b">", b"\xc3", b"\xa9", b" c", b"END", b"\xf0\x9f")
    eos_token_id = None
    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.parts.index(text[i : i + 1].encode()) for i in range(len(text))]

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        found = b"".join(self.parts[i % len(self.parts)] for i in ids if i != 28)
        return found.decode(errors="replace")


class Chatty(Pieces):
    chat_template = "…"
    eos_token_id = 28

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return super().encode(text)

    def apply_chat_template(self, chat: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "<s>" + "".join(message["content"] for message in chat)


# The tokens of torch.


def reference(part: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCE) as file:
        return {k.removeprefix(part): file[k] for k in file.files if k.startswith(part)}


def reference_model(**options: Any) -> tuple[Any, dict[str, Any]]:
    config = LlamaConfig.from_dict(json.loads(str(reference("config")[""])))
    model = LlamaForCausalLM(dataclasses.replace(config, **options))
    weights = reference("weights/")

    def load(path: str, leaf: Any) -> Any:
        def of(name: str) -> Any:
            weight = weights[name]
            return weight.transpose(NAMES.torch_axes(path, weight.ndim))

        name = NAMES.torch_name(path)
        assert name is not None
        if "{}" not in name:
            return of(name)
        return np.stack([of(name.format(n)) for n in range(leaf.shape[0])])

    params = jax.eval_shape(lambda: init(model))["params"]
    return model, {"params": tree.map_leaves(load, params)}


CASES = sorted({name.partition("/")[0] for name in reference("cases/")})
RUNS = [(name, False) for name in CASES] + [("greedy", True), ("beams4", True)]


@pytest.mark.parametrize(("name", "scan"), RUNS)
def test_tokens_and_scores_are_torchs(name, scan):
    model, variables = reference_model(scan_layers=scan)
    case = reference(f"cases/{name}/")
    options = json.loads(str(case["options"]))
    ids, mask = reference("prompts")[""], reference("mask")[""]
    eos = options.pop("eos_token_id")
    penalty = options.pop("repetition_penalty", 1.0)
    out = jl.generate(
        model,
        variables,
        [row[keep != 0] for row, keep in zip(ids, mask, strict=True)],
        max_new_tokens=case["tokens"].shape[-1],
        eos_id=() if eos is None else eos,
        sampling=Sampling(repetition_penalty=penalty),
        **options,
    )
    expected = [[[t for t in seq if t >= 0] for seq in row] for row in case["tokens"].tolist()]
    assert out.ids == [row[0] for row in expected]
    if options["num_beams"] == 1:
        assert out.beams is None
        return
    assert out.beams is not None
    assert [[ids for ids, _ in row] for row in out.beams] == expected
    scores = [[score for _, score in row] for row in out.beams]
    np.testing.assert_allclose(scores, case["scores"], rtol=1e-5, atol=1e-5)


def test_the_references_end_early_late_and_by_every_case():
    lengths = {name: (reference(f"cases/{name}/")["tokens"] >= 0).sum(-1) for name in CASES}
    assert lengths["greedy"].min() < lengths["greedy"].max()
    assert (lengths["beams3_eos"] < 12).all(axis=1).any()  # a row that is through before the end
    tokens = {name: reference(f"cases/{name}/")["tokens"].tobytes() for name in CASES}
    assert len(set(tokens.values())) >= len(CASES) - 1  # greedy ends by one eos or by three


def test_smollm2_says_what_torch_makes_it_say():
    # The nearest two logits of all steps are 0.004 apart: rounding decides no token.
    with np.load(SMOLLM2) as file:
        ref = {name: file[name] for name in file.files}
    assert ref["gaps"].min() > 1e-3
    prompts, expected = (
        [[t for t in row if t >= 0] for row in ref[name].tolist()] for name in ("prompts", "tokens")
    )
    model, params, tokenizer = models.from_pretrained(fetch("smollm2"), scan_layers=True)
    variables = {"params": params}
    texts = ref["texts"].tolist()
    assert [tokenizer.encode(text, add_special_tokens=False) for text in texts] == prompts
    out = jl.generate(model, variables, prompts, tokenizer=tokenizer, max_new_tokens=64)
    assert out.ids == expected
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    answer = jl.generate(model, variables, [chat] * 20, tokenizer=tokenizer, max_new_tokens=64)
    assert answer.text == ["The capital of France is Paris."] * 20
    assert answer.ids[0] == expected[0]


WARPERS = {
    "temperature": Sampling(temperature=0.7),
    "top_k": Sampling(temperature=1.0, top_k=5),
    "top_p": Sampling(temperature=1.0, top_p=0.8),
    "min_p": Sampling(temperature=1.0, min_p=0.1),
    "all": Sampling(temperature=1.5, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
}


@pytest.mark.parametrize("name", WARPERS)
def test_the_filters_are_torchs(name):
    logits, seen = reference("logits")[""], reference("seen")[""]
    was = np.zeros(logits.shape, bool)
    np.put_along_axis(was, seen, True, axis=1)
    filters = WARPERS[name].filters
    got = filtered(penalized(jnp.asarray(logits), jnp.asarray(was), filters), filters)
    expected = reference(f"warpers/{name}")[""]
    kept = np.isfinite(expected).sum(-1)
    assert (kept.min() > 1) & (name == "temperature" or kept.max() < logits.shape[-1])
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


# Greedy.


@pytest.mark.parametrize(
    "options",
    [{}, {"scan_layers": True}, {"dtype": "bfloat16"}],
    ids=["unrolled", "scanned", "bfloat16"],
)
def test_a_padded_batch_gives_what_each_row_gives_alone(options):
    model = LlamaForCausalLM(dataclasses.replace(CONFIG, **options))
    variables = init(model)
    out = jl.generate(model, variables, PROMPTS, max_new_tokens=9)
    alone = [jl.generate(model, variables, [row], max_new_tokens=9).ids[0] for row in PROMPTS]
    assert out.ids == alone
    if "dtype" not in options:
        assert alone[0] == by_hand(model, variables, PROMPTS[0], 9)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_an_adapter_gives_what_its_merged_params_give_and_not_the_base(scan):
    model = LlamaForCausalLM(dataclasses.replace(CONFIG, scan_layers=scan, num_hidden_layers=2))
    variables = init(model)
    adapter = adapter_of(model, variables)
    out = jl.generate(model, variables, PROMPTS, adapter=adapter, max_new_tokens=9)
    merged = {"params": jl.merge(variables["params"], adapter)}
    assert out.ids == jl.generate(model, merged, PROMPTS, max_new_tokens=9).ids
    assert out.ids != jl.generate(model, variables, PROMPTS, max_new_tokens=9).ids
    if scan:
        beams = jl.generate(
            model, variables, PROMPTS, adapter=adapter, max_new_tokens=9, num_beams=3
        )
        assert beams.ids == jl.generate(model, merged, PROMPTS, max_new_tokens=9, num_beams=3).ids


def test_a_quantized_base_gives_what_its_dequantized_params_give():
    pytest.importorskip("qwix")
    from jaxlora.quantize import dequantize

    x = jnp.zeros((1, 3), jnp.int32)
    planned = jl.plan(MODEL, VARIABLES, jl.LoraConfig(rank=2), x)
    params = jl.quantize(VARIABLES["params"], planned.spec, "int8")
    adapter = adapter_of(MODEL, VARIABLES)
    got, expected = (
        jl.generate(MODEL, {"params": p}, PROMPTS, adapter=adapter, max_new_tokens=6).ids
        for p in (params, dequantize(params))
    )
    assert got == expected


def test_a_row_ends_with_its_eos_and_the_others_go_on():
    free = jl.generate(MODEL, VARIABLES, PROMPTS, max_new_tokens=12)
    eos = next(token for token in free.ids[0] if token not in free.ids[1])
    out = jl.generate(MODEL, VARIABLES, PROMPTS, max_new_tokens=12, eos_id=eos)
    for got, whole, why in zip(out.ids, free.ids, out.ended, strict=True):
        end = whole.index(eos) + 1 if eos in whole else 12
        assert got == whole[:end]
        assert why == ("eos" if eos in whole else "length")
    assert len(set(out.ended)) == 2
    two = jl.generate(MODEL, VARIABLES, PROMPTS, max_new_tokens=12, eos_id=[eos, free.ids[1][0]])
    assert two.ids[1] == free.ids[1][:1]
    assert two.ended[1] == "eos"


def test_one_new_token():
    whole = jl.generate(MODEL, VARIABLES, PROMPTS, max_new_tokens=5)
    one = jl.generate(MODEL, VARIABLES, PROMPTS, max_new_tokens=1)
    assert one.ids == [row[:1] for row in whole.ids]
    best = jl.generate(MODEL, VARIABLES, PROMPTS, max_new_tokens=1, num_beams=2)
    assert best.ids == one.ids


def test_repetition_penalty_counts_prompt_and_output_but_no_padding():
    # With 0 as the padding's id, a penalty on it would show in row 1, padded by eight.
    penalty = Sampling(repetition_penalty=1e6)
    out = jl.generate(MODEL, VARIABLES, PROMPTS, max_new_tokens=10, sampling=penalty)
    alone = [
        jl.generate(MODEL, VARIABLES, [row], max_new_tokens=10, sampling=penalty).ids[0]
        for row in PROMPTS
    ]
    assert out.ids == alone
    for prompt, row in zip(PROMPTS, out.ids, strict=True):
        assert len(set(row)) == len(row)
        assert not set(prompt) & set(row)
    width = 16
    ids, mask = np.zeros((2, 1, width), np.int32)
    ids[0, -1], mask[0, -1] = 7, 1
    _, _, seen = decode.prefill(MODEL, VARIABLES, None, jnp.asarray(ids), jnp.asarray(mask), width)
    assert np.flatnonzero(seen[0]).tolist() == [7]


# Sampling.


def sample(prompts: Any, key: Any = KEY, sampling: Sampling = HOT, **options: Any) -> Any:
    options = {"max_new_tokens": 8, **options}
    return jl.generate(MODEL, VARIABLES, prompts, key=key, sampling=sampling, **options).ids


def test_a_key_gives_the_same_tokens_and_another_one_others():
    assert sample(PROMPTS) == sample(PROMPTS)
    assert sample(PROMPTS) != sample(PROMPTS, jax.random.key(4))
    assert sample(PROMPTS) == sample(PROMPTS, jax.random.key_data(KEY))


def test_a_rows_draws_do_not_depend_on_its_neighbours():
    whole = sample(PROMPTS)
    assert sample([PROMPTS[0], [1, 2]])[0] == whole[0]
    assert sample([PROMPTS[0], PROMPTS[1], [3] * 20])[1] == whole[1]  # another bucket
    twins = sample([[4, 4]] * 4)
    assert len({tuple(row) for row in twins}) == 4


def test_a_shorter_run_is_the_start_of_a_longer_one():
    long = sample(PROMPTS, max_new_tokens=20)
    assert sample(PROMPTS, max_new_tokens=5) == [row[:5] for row in long]


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2, 0.0]))
    keys = jax.random.split(KEY, 4000)
    filters = Sampling(temperature=0.5, top_k=2).filters
    rows = jnp.broadcast_to(logits, (4000, 4))
    drawn = choose(rows, jnp.zeros((4000, 4), bool), filters, keys)
    share = np.bincount(np.asarray(drawn), minlength=4) / 4000
    # 0.25 : 0.09; four standard deviations of 4,000 draws.
    np.testing.assert_allclose(share, [0.735, 0.265, 0, 0], atol=0.028)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.5, top_k=1),
        Sampling(temperature=1.5, top_p=1e-6),
        Sampling(temperature=1.5, min_p=1.0),
        Sampling(temperature=1e-4),
    ],
)
def test_what_leaves_one_token_is_greedy(sampling):
    assert sample(PROMPTS, sampling=sampling) == sample(PROMPTS, sampling=Sampling())


def test_filters_that_keep_all_change_nothing():
    all_kept = Sampling(temperature=1.5, top_k=10**12, top_p=1.0, min_p=0.0)
    assert sample(PROMPTS, sampling=all_kept) == sample(PROMPTS)


def test_equal_logits_are_kept_together():
    x = jnp.array([[1.0, 3.0, 1.0, 2.0, -jnp.inf, 1.0], [0.0, -0.5, -0.5, -2.0, -9.0, -1e30]])
    got = filtered(x, Sampling(temperature=1.0, top_k=3).filters)
    assert np.isfinite(got).tolist() == [[True] * 4 + [False, True], [True] * 3 + [False] * 3]


# One compile for a bucket.


@pytest.fixture
def traces(monkeypatch):
    """How often the model's forward pass has been traced."""
    count = []
    forward = decode.forward

    def counted(*args: Any) -> Any:
        count.append(1)
        return forward(*args)

    monkeypatch.setattr(decode, "forward", counted)
    monkeypatch.setattr(beam, "forward", counted)
    return count


def fresh(seed: int) -> tuple[Any, Any]:
    """A model that nothing has been compiled for."""
    model = LlamaForCausalLM(dataclasses.replace(CONFIG, intermediate_size=25 + seed))
    return model, init(model)


def test_no_option_compiles_anything_and_a_bucket_compiles_once(traces):
    model, variables = fresh(0)
    jl.generate(model, variables, [[1] * 5, [2]], max_new_tokens=7)
    assert len(traces) == 2  # the prompts and the loop
    for length, new in ((1, 16), (16, 2), (9, 12)):
        jl.generate(model, variables, [[1] * length, [2]], max_new_tokens=new)
    for sampling in (HOT, Sampling(temperature=0.3, top_k=3, top_p=0.5, min_p=0.1), *_PENALTIES):
        jl.generate(model, variables, [[1], [2]], sampling=sampling, key=KEY, max_new_tokens=3)
    jl.generate(model, variables, [[1], [2]], eos_id=3, max_new_tokens=3)
    jl.generate(model, variables, [[1], [2]], max_new_tokens=9, stream=lambda *_: None)
    jl.generate(model, variables, [[1], [2]], max_new_tokens=9, stop="END", tokenizer=Pieces())
    same = LlamaForCausalLM(dataclasses.replace(model.config))
    jl.generate(same, init(same, 5), [[1], [2]], max_new_tokens=3)
    assert len(traces) == 2
    jl.generate(model, variables, [[1] * 17, [2]], max_new_tokens=7)
    assert len(traces) == 4


_PENALTIES = (Sampling(repetition_penalty=1.2), Sampling(repetition_penalty=0.9))


def test_adapters_of_one_spec_share_what_is_compiled(traces):
    model, variables = fresh(1)
    first, second = (adapter_of(model, variables, seed) for seed in (1, 2))
    one = jl.generate(model, variables, PROMPTS, adapter=first, max_new_tokens=8)
    assert len(traces) == 2
    two = jl.generate(model, variables, PROMPTS, adapter=second, max_new_tokens=8)
    assert one.ids != two.ids
    assert len(traces) == 2


def test_beam_search_compiles_once_for_a_bucket_and_a_number_of_beams(traces):
    model, variables = fresh(2)
    jl.generate(model, variables, PROMPTS, num_beams=3, max_new_tokens=7)
    jl.generate(model, variables, [[1]] * 3, num_beams=3, max_new_tokens=4, length_penalty=0.5)
    assert len(traces) == 2
    jl.generate(model, variables, PROMPTS, num_beams=4, max_new_tokens=7)
    assert len(traces) == 4


# Text.


def test_strings_and_chats_are_encoded_and_the_output_decoded():
    tokenizer = Chatty()
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "b"}]
    out = jl.generate(MODEL, VARIABLES, [chat, [2, 4, 5]], tokenizer=tokenizer, max_new_tokens=6)
    ids = [[2, 4, 5, 0, 1, 1], [2, 4, 5]]
    plain = jl.generate(MODEL, VARIABLES, ids, max_new_tokens=6, eos_id=28)
    assert out.ids == plain.ids
    assert plain.text is None
    assert out.text == [tokenizer.decode(row, skip_special_tokens=True) for row in out.ids]
    tokenizer = Pieces()
    out = jl.generate(MODEL, VARIABLES, ["ab<"], tokenizer=tokenizer, max_new_tokens=6)
    assert out.ids == jl.generate(MODEL, VARIABLES, [[0, 1, 2]], max_new_tokens=6).ids
    best = jl.generate(MODEL, VARIABLES, ["ab"], tokenizer=tokenizer, num_beams=2, max_new_tokens=6)
    assert best.text == [tokenizer.decode(best.ids[0], skip_special_tokens=True)]


def test_tokenizers_of_the_two_libraries_will_do():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocab = {f"w{n}": n for n in range(28)} | {"</s>": 28}
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    bare.add_special_tokens(["</s>"])
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>")
    wrapped.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}w5"
    by_ids = jl.generate(MODEL, VARIABLES, [[3, 4, 5]], max_new_tokens=6, eos_id=28)
    for tokenizer, prompt in (
        (bare, "w3 w4 w5"),
        (wrapped, "w3 w4 w5"),
        (wrapped, [{"role": "user", "content": "w3 w4"}]),
    ):
        out = jl.generate(
            MODEL, VARIABLES, [prompt], tokenizer=tokenizer, max_new_tokens=6, eos_id=28
        )
        assert out.ids == by_ids.ids
        assert out.text == [" ".join(f"w{n}" for n in out.ids[0] if n != 28)]


def test_the_tokenizers_eos_ends_a_row_unless_another_is_given():
    tokenizer = Chatty()
    free = jl.generate(MODEL, VARIABLES, PROMPTS, max_new_tokens=12, tokenizer=tokenizer, eos_id=())
    tokenizer.eos_token_id = free.ids[0][3]
    out = jl.generate(MODEL, VARIABLES, PROMPTS, max_new_tokens=12, tokenizer=tokenizer)
    assert out.ids[0] == free.ids[0][: free.ids[0].index(tokenizer.eos_token_id) + 1]
    assert out.ended[0] == "eos"


def streamed(prompts: Any = PROMPTS, **options: Any) -> tuple[Any, Any, Any]:
    ids, text = [[] for _ in prompts], [""] * len(prompts)

    def stream(row: int, new: list[int], piece: str) -> None:
        ids[row] += new
        text[row] += piece

    out = jl.generate(MODEL, VARIABLES, prompts, stream=stream, **options)
    return out, ids, text


@pytest.mark.parametrize("sampling", [Sampling(), HOT], ids=["greedy", "hot"])
@pytest.mark.parametrize("stop", ["", "é", ("<", "END"), "a b", "never there"])
def test_what_is_streamed_is_the_whole(stop, sampling):
    options = {"sampling": sampling, "key": KEY, "max_new_tokens": 40, "tokenizer": Pieces()}
    options |= {"stop": stop or ()}
    out, ids, text = streamed(**options)
    assert ids == out.ids
    assert text == out.text
    whole = jl.generate(MODEL, VARIABLES, PROMPTS, **options)
    assert whole == out


def test_streaming_without_a_tokenizer_gives_ids():
    out, ids, text = streamed(max_new_tokens=6)
    assert ids == out.ids
    assert text == [""] * 3


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_a_stop_string_ends_its_row_where_it_is_complete(chunk, monkeypatch):
    monkeypatch.setattr(sys.modules["jaxlora.generate"], "_CHUNK", chunk)
    options = {"sampling": HOT, "key": KEY, "max_new_tokens": 40, "tokenizer": Pieces()}
    free = jl.generate(MODEL, VARIABLES, PROMPTS, **options)
    assert free.text is not None
    stop = free.text[0][7:10]  # three characters, so as a rule of three tokens
    out = jl.generate(MODEL, VARIABLES, PROMPTS, stop=stop, **options)
    assert out.text is not None
    for row in range(3):
        whole, text = free.text[row], out.text[row]
        assert out.ended[row] == ("stop" if stop in whole else "length")
        assert text == whole.partition(stop)[0]
        assert out.ids[row] == free.ids[row][: len(out.ids[row])]
        if stop in whole:
            assert stop in Pieces().decode(out.ids[row], skip_special_tokens=True)
            assert stop not in Pieces().decode(out.ids[row][:-1], skip_special_tokens=True)


def test_text_is_held_back_while_it_may_be_a_stop_string_or_half_a_character():
    writer = Writer(Pieces(), ("</s>", "<b"))
    # a <  /  a    é in halves  <  /  s  b  …
    got = [writer.add(token) for token in (0, 2, 3, 0, 6, 7, 2, 3, 4, 1, 10)]
    assert got == ["a", "", "", "</a", "", "é", "", "", "", "</sb", ""]
    assert writer.close() == "\N{REPLACEMENT CHARACTER}"
    assert not writer.stopped
    writer = Writer(Pieces(), ("</s>", "<b"))
    assert [writer.add(token) for token in (0, 2, 3, 4, 5)] == ["a", "", "", "", ""]
    assert writer.stopped
    assert writer.close() == ""
    assert writer.text == "a"


def test_the_first_row_is_written_to_the_terminal(capsys):
    options = {"max_new_tokens": 6, "tokenizer": Pieces()}
    out = jl.generate(MODEL, VARIABLES, PROMPTS, stream=to_stdout, **options)
    assert out.text is not None
    assert capsys.readouterr().out == out.text[0]


# Errors.

NOT_ONE: Any = {"a": jnp.zeros(1)}


@pytest.mark.parametrize(
    ("prompts", "error", "match"),
    [
        ([], ConfigError, "at least one prompt"),
        ("ab", ConfigError, r"\[prompt\] for one"),
        ({"input_ids": [[1]]}, ConfigError, r"\[prompt\] for one"),
        ([1, 2], ModelError, r"shape \(\), expected"),
        ([{"role": "user", "content": "a"}], ModelError, "one item a row"),
        ([[1], []], ModelError, "Prompt 1 is empty"),
        ([[1, 29]], ModelError, "Prompt 0 has the token id 29, expected 0 to 28"),
        ([[1, -1]], ModelError, "token id -1"),
        ([[1.5]], ModelError, "Prompt 0 is float64"),
        ([[[1]]], ModelError, r"shape \(1, 1\)"),
        ([[1] * 90], ModelError, "has 90 tokens and 7 are to follow, expected at most 96"),
        (["ab"], ConfigError, "Prompt 0 is a string, and there is no tokenizer"),
        ([[{"role": "user", "content": "a"}]], ConfigError, "Prompt 0 is a chat, and there is no"),
    ],
)
def test_a_prompt_that_cannot_be_continued(prompts, error, match):
    with pytest.raises(error, match=match):
        jl.generate(MODEL, VARIABLES, prompts, max_new_tokens=7)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_context_can_be_filled_to_its_end(name):
    prompts = [[1, 2, 3] * 6, [4], [5, 6]]
    if name == "llama":
        short, long = (
            LlamaForCausalLM(dataclasses.replace(CONFIG, max_position_embeddings=n))
            for n in (24, 96)
        )
        variables = VARIABLES
        expected = jl.generate(long, variables, prompts, max_new_tokens=6).ids
    else:
        short = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=29, n_embd=16, n_layer=1, n_head=2, n_positions=24, initializer_range=0.5
            )
        )
        variables = init(short)
        expected = [by_hand(short, variables, prompt, 6) for prompt in prompts]
    assert jl.generate(short, variables, prompts, max_new_tokens=6).ids == expected
    with pytest.raises(ModelError, match="18 tokens and 7 are to follow, expected at most 24"):
        jl.generate(short, variables, prompts, max_new_tokens=7)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 1.5}, "num_beams is 1.5"),
        ({"length_penalty": float("nan"), "num_beams": 2}, "length_penalty is nan"),
        ({"sampling": 0.7}, "sampling is a float"),
        ({"sampling": HOT}, "key is None with temperature 1.5"),
        ({"sampling": HOT, "key": 0}, "key is 0 with"),
        ({"sampling": HOT, "key": KEY, "num_beams": 2}, "beam search does not draw"),
        ({"num_beams": 2, "stream": to_stdout}, "with stream, expected 1"),
        ({"num_beams": 2, "stop": "a", "tokenizer": Pieces()}, "with stop strings, expected 1"),
        ({"stop": "a"}, "there is no tokenizer"),
        ({"stop": ["a", ""], "tokenizer": Pieces()}, "stop has ''"),
        ({"eos_id": 29}, "eos_id is 29"),
        ({"eos_id": [1, -2]}, "eos_id is -2"),
        ({"eos_id": "a"}, "eos_id is 'a'"),
    ],
)
def test_an_option_that_cannot_mean_anything(options, match):
    with pytest.raises(ConfigError, match=match):
        jl.generate(MODEL, VARIABLES, PROMPTS, **options)


def test_a_chat_without_a_template():
    with pytest.raises(ConfigError, match="has no chat_template"):
        jl.generate(MODEL, VARIABLES, [[{"role": "user", "content": "a"}]], tokenizer=Pieces())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected a number of at least 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": None}, "temperature is None"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_p": 0}, r"top_p is 0, expected a number in \(0, 1\], or None"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected a number above 0"),
    ],
)
def test_a_sampling_option_outside_of_its_range(options, match):
    with pytest.raises(ConfigError, match=match):
        Sampling(**options)


def test_a_model_or_adapter_that_does_not_fit():
    dense = nn.Dense(3)
    with pytest.raises(ModelError, match="got a Dense, expected a causal model"):
        jl.generate(dense, {"params": {}}, PROMPTS)
    with pytest.raises(ModelError, match=r"Bare params go in as"):
        jl.generate(MODEL, VARIABLES["params"], PROMPTS)
    with pytest.raises(AdapterError, match="where the adapter belongs"):
        jl.generate(MODEL, VARIABLES, PROMPTS, adapter=NOT_ONE)
