"""Tasks: examples as tokens, losses by hand, and a whole run of each on a tiny model."""

import dataclasses
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from jaxlora import algebra, models
from jaxlora.batches import Batches, pack
from jaxlora.errors import ConfigError, DataError, RunError
from jaxlora.rows import Row
from jaxlora.tasks import Chat, Classify, Nlg, load_run, train
from jaxlora.tasks import chat as chat_task
from jaxlora.tasks import classify as classify_task
from jaxlora.tasks import nlg as nlg_task
from jaxlora.tasks.base import adapter_config, check_tokens, limited
from jaxlora.tasks.language import counted, summed_losses
from jaxlora.tasks.launch import from_dict, to_dict
from tests import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return tiny.encoder(root / "encoder"), tiny.causal(root / "causal")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rows = ["text\tlabel"]
    rows += [f"{w} film\t{k}" for w, k in (("good", "yes"), ("bad", "no")) for _ in "ab"] * 4
    (root / "films.tsv").write_text("\n".join(rows))
    dialogues = [[{"role": r, "content": c} for r, c in turns] for turns in tiny.DIALOGUES]
    lines = [json.dumps({"messages": messages}) for messages in dialogues]
    (root / "talk.jsonl").write_text("\n".join(lines))
    rows = [
        f"name [ {n} ] , food [ {f} ]||the {n} serves {f} food ."
        for n in ("Mill", "Inn")
        for f in ("Italian", "French", "cheap", "good", "bad")
    ]
    (root / "food.txt").write_text("\n".join(rows))
    return root


@pytest.fixture(scope="module")
def settings(folders, data):
    encoder, causal = map(str, folders)
    shared: Any = {"epochs": 3, "batch_size": 4, "rank": 2}
    return {
        "classify": Classify(
            model=encoder,
            data=str(data / "films.tsv"),
            valid=str(data / "films.tsv"),
            max_length=16,
            **shared,
        ),
        "chat": Chat(model=causal, data=str(data / "talk.jsonl"), max_length=64, **shared),
        "nlg": Nlg(model=causal, data=str(data / "food.txt"), max_length=48, **shared),
    }


@pytest.mark.parametrize("name", ["classify", "chat", "nlg"])
def test_a_run_trains_and_comes_back_with_its_adapter(name, settings, tmp_path):
    task = dataclasses.replace(settings[name], out=str(tmp_path / "run"), learning_rate=1e-2)
    said = []
    result = train(task, quiet=True, say=said.append)
    assert not result.stopped
    assert said[0].startswith("trainable params: ")
    trained = load_run(tmp_path / "run")
    assert to_dict(trained.settings)["task"] == name
    problem = trained.settings.problem(trained[1:4])
    scores = problem.evaluate(trained.adapter, {"params": trained.params}, problem.valid)
    assert scores[problem.metric] == result.best
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [row["valid_loss"] for row in map(json.loads, lines) if "valid_loss" in row]
    assert min(losses[1:]) < losses[0]


def test_a_run_that_goes_bad_stops_before_its_adapter_does_and_names_the_module(settings, tmp_path):
    run = tmp_path / "run"
    task = dataclasses.replace(settings["classify"], out=str(run), learning_rate=1e30, warmup=0.0)
    match = (
        r"The loss of step 2 is nan.*28 of 28 leaves, .*First not finite, with the adapter after "
        r"step 4, bad steps left out: the output of bert/encoder/layer_0/attention/query "
        r"\(its inputs are finite\)"
    )
    with pytest.raises(RunError, match=match):
        train(task, quiet=True, say=lambda _: None)
    kept = load_run(run, "last").adapter
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))


def test_classes_of_the_data_are_kept_with_the_run(settings):
    filled = settings["classify"].filled()
    assert filled.classes == ("no", "yes")
    assert filled.filled() is filled
    assert from_dict(json.loads(json.dumps(to_dict(filled)))) == filled


def test_sentences_and_pairs_become_ids():
    tokenizer = tiny.tokenizer()
    rows = [
        Row("line 1", {"text": "good film", "pair": "bad", "label": "yes"}),
        Row("line 2", {"text": "the film is bad", "pair": "bad", "label": "no"}),
    ]
    examples, cut = classify_task.encode(tokenizer, rows, ["no", "yes"], 4)
    words = [tokenizer.convert_ids_to_tokens(e["input_ids"]) for e in examples]
    assert words[0] == ["good", "film", "bad"]
    assert len(words[1]) == 4
    assert cut == 1
    assert [e["label"] for e in examples] == [1, 0]
    alone = [Row("line 3", {"text": "good", "label": "maybe"})]
    with pytest.raises(DataError, match="line 3 has the label 'maybe', expected one of no, yes"):
        classify_task.encode(tokenizer, alone, ["no", "yes"], 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_loss_leaves_rows_of_weight_zero_out(smoothing):
    logits = jax.random.normal(jax.random.key(0), (3, 4))
    batch = {"label": jnp.array([1, 3, 0]), "weight": jnp.array([1.0, 1.0, 0.0])}
    logs = np.asarray(jax.nn.log_softmax(logits))
    targets = np.eye(4)[[1, 3]] * (1 - smoothing) + smoothing / 4
    expected = -np.mean((targets * logs[:2]).sum(-1))
    loss = classify_task.class_loss(logits, batch, smoothing)
    np.testing.assert_allclose(loss, expected, 1e-6)


def test_the_losses_that_count_are_those_of_masked_tokens_given_the_ones_before():
    class Model(nn.Module):
        """The loss of label i at place t is 100 i + 10 t, in a row of weight one or zero."""

        @nn.compact
        def __call__(self, ids, mask, labels, label_smoothing):
            assert ids.shape == mask.shape
            assert label_smoothing == 0.1
            return 100.0 * labels + 10.0 * jnp.arange(3)

    batch = {
        "input_ids": jnp.array([[1, 2, 3], [4, 0, 1]]),
        "attention_mask": jnp.ones((2, 3), int),
        "loss_mask": jnp.array([[1, 0, 1], [0, 1, 1]]),
        "weight": jnp.array([1.0, 0.0]),
    }
    total, count = summed_losses(Model(), None, {"params": {}}, batch, label_smoothing=0.1)
    assert (float(total), float(count)) == (310.0, 1.0)


@pytest.mark.parametrize("template", [tiny.TEMPLATE, None])
def test_only_the_answers_count_and_the_token_that_ends_them(template):
    tokenizer = tiny.tokenizer(template)
    messages = [{"role": r, "content": c} for r, c in tiny.DIALOGUES[2]]
    example, cut = chat_task.encode(tokenizer, Row("line 1", {}), messages, 64)
    assert not cut
    counts = example["input_ids"][example["loss_mask"] == 1]
    words = tokenizer.convert_ids_to_tokens(counts)
    assert words == ["very", "bad", "[EOS]", "the", "food", "was", "great", "[EOS]"]
    everything = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert everything[everything.index("the") :][:2] == ["the", "food"]
    assert "film" in everything


def test_the_plain_template_cuts_where_byte_level_bpe_does():
    words = [" is", " it", " fine"]
    pieces = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            merged = "Ġ" + word[1:end]
            if merged not in pieces:
                pieces.append(merged)
                merges.append((merged[:-1], merged[-1]))
    model = tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, merges)
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    messages = [
        {"role": "user", "content": "is it"},
        {"role": "assistant", "content": "it is fine"},
    ]
    example, _ = chat_task.encode(tokenizer, Row("line 1", {}), messages, 64)
    answer = example["input_ids"][example["loss_mask"] == 1]
    assert tokenizer.convert_ids_to_tokens(answer) == ["Ġit", "Ġis", "Ġfine", "<end>"]


def test_packed_dialogues_have_the_loss_of_padded_ones(folders, settings):
    model, params, tokenizer = models.from_pretrained(folders[1], head="lm")
    problem = settings["chat"].problem((model, params, tokenizer))
    rows = pack(problem.train, 64)
    assert len(rows) < len(problem.train)
    losses = []
    for examples in (problem.train, rows):
        batch = Batches(examples, len(examples), lengths=(64,))[0]
        losses.append(summed_losses(model, None, {"params": params}, batch))
    np.testing.assert_allclose(losses[0], losses[1], 1e-5)


def test_a_meaning_and_its_text():
    tokenizer = tiny.tokenizer()
    row = Row("line 1", {"mr": "name [ Mill ]", "text": "the Mill is near ."})
    example, _ = nlg_task.encode(tokenizer, row, 64)
    words = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert words == ["name", "[", "Mill", "]", "[BOS]", "the", "Mill", "is", "near", ".", "[EOS]"]
    assert example["loss_mask"].tolist() == [0] * 5 + [1] * 6
    assert nlg_task.prompt_ids(tokenizer, "name [ Mill ]") == example["input_ids"][:5].tolist()


def test_a_limit_draws_from_the_whole_file():
    rows = [Row(f"line {i}", {}) for i in range(1000)]
    some = limited(rows, Classify(limit=100))
    numbers = [int(row.where.split()[1]) for row in some]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 100
    assert 300 < np.mean(numbers) < 700  # the first hundred have 49.5
    assert limited(rows, Classify()) == limited(rows, Classify(limit=5000)) == rows
    with pytest.raises(ConfigError, match="limit is 0"):
        limited(rows, Classify(limit=0))


def test_meanings_are_held_out_whole():
    rows = [Row("", {"mr": mr, "text": t}) for mr, t in zip("aabbcca", "1234567", strict=True)]
    train_rows, valid_rows = nlg_task.held_out_groups(rows, 0.3)
    assert [row.fields["text"] for row in train_rows] == ["1", "2", "3", "4", "7"]
    assert [row.fields["text"] for row in valid_rows] == ["5", "6"]
    assert nlg_task.grouped(rows)["a"] == ["1", "2", "7"]


def test_gpt2_is_adapted_on_q_and_v_through_its_fused_kernel():
    names = ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    params = {"h_0": {}}
    for name in names:
        scope, leaf = name.split("/")
        params["h_0"].setdefault(scope, {})[leaf] = {"kernel": np.zeros((2, 2))}
    config = adapter_config(Chat(), params)
    assert set(config.targets) == {"c_attn", "c_fc", "c_proj"}
    assert dict(config.fused) == {"c_attn": (True, False, True)}
    assert set(adapter_config(Nlg(), params).targets) == {"c_attn"}

    config = adapter_config(Nlg(), {"l": {"q_proj": {"kernel": 0}, "v_proj": {"kernel": 0}}})
    assert set(config.targets) == {"(q_proj|v_proj)"}
    assert (config.rank, config.alpha) == (4, 32)
    assert adapter_config(Chat(rank=3), {"l": {"w": 0}}).alpha == 6
    with pytest.raises(ConfigError, match="no layers of the usual names"):
        adapter_config(Nlg(), {"l": {"w": np.zeros(2)}})


def test_a_chat_of_gpt2_trains_through_the_mask(data, tmp_path):
    settings = Chat(
        model=str(tiny.gpt2(tmp_path / "gpt2")),
        data=str(data / "talk.jsonl"),
        max_length=64,
        rank=2,
        max_steps=2,
        out=str(tmp_path / "run"),
    )
    train(settings, quiet=True, say=lambda line: None)
    adapter = load_run(tmp_path / "run", "last").adapter
    deltas = algebra.delta(adapter)
    names = ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    assert {path.split("/", 2)[2] for path in deltas} == {f"{name}/kernel" for name in names}
    assert len(deltas) == 8
    for path, delta in deltas.items():
        assert delta.any()
        if "c_attn" in path:  # q, k, v side by side
            assert delta[:, :16].any()
            assert not delta[:, 16:32].any()
            assert delta[:, 32:].any()
    with pytest.raises(ConfigError, match="max_length is 65, the model has 64 positions"):
        train(dataclasses.replace(settings, max_length=65, out=str(tmp_path / "other")))


def test_the_head_is_trained_in_full(folders, settings):
    pretrained = settings["classify"].filled().load()
    config = settings["classify"].filled().problem(pretrained).config
    assert set(config.modules_to_save) == {"classifier", "pooler"}


def dialogue(*messages):
    return Row("talk.jsonl, line 2", {"messages": list(messages)})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (dialogue({"role": "user", "content": "a"}), "line 2 has no message of the assistant"),
        (dialogue(), "line 2 has no message of the assistant"),
        (dialogue({"role": "bot", "content": "a"}), "line 2 has messages of another form"),
        (dialogue({"role": "assistant", "content": " "}), "messages of another form"),
        (dialogue({"role": "assistant"}), "messages of another form"),
        (dialogue("assistant"), "messages of another form"),
        (Row("talk.jsonl, line 2", {"messages": "hello"}), "messages of another form"),
    ],
)
def test_dialogues_of_another_form(row, message):
    with pytest.raises(DataError, match=message):
        chat_task.check_messages(row)


def test_data_that_does_not_fit_the_model(folders):
    model, _, _ = models.from_pretrained(folders[1], head="lm")
    examples = [{"input_ids": np.array([1, 64])}]
    with pytest.raises(DataError, match="token id 64, the model's vocabulary has 64"):
        check_tokens(examples, model, 96)
    with pytest.raises(ConfigError, match="max_length is 97, the model has 96 positions"):
        check_tokens([], model, 97)
    with pytest.raises(DataError, match=r"line 1 has 4 tokens, and none to learn within.* 2"):
        counted(Row("line 1", {}), [1, 2, 3, 4], [0, 0, 1, 1], 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "chess"}, "Task is 'chess', expected one of classify, chat, nlg"),
        ({"task": "chat", "rnak": 2}, "Task chat has no setting 'rnak'. Nearest: rank"),
    ],
)
def test_settings_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(fields)


def test_a_bad_file_writes_nothing(settings, tmp_path):
    bad = tmp_path / "bad.tsv"
    bad.write_text("text\tlabel\ngood\tyes\nbad\n")
    task = dataclasses.replace(settings["classify"], data=str(bad), out=str(tmp_path / "run"))
    with pytest.raises(DataError, match="line 3 has 1 columns"):
        train(task, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_run_without_checkpoints(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("task: chat\nmodel: none\n")
    with pytest.raises(RunError, match=r"has no checkpoint 'best'\. It has none yet"):
        load_run(tmp_path)
