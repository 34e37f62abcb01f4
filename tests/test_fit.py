"""The training loop: stop and resume are bit for bit one run, and what is wrong stops it."""

import dataclasses
import json
import os
import signal
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora as jl
from jaxlora.batches import Batches
from jaxlora.errors import ConfigError, LoraError, RunError
from jaxlora.fit import fit
from jaxlora.resume import load_state
from jaxlora.runs import Run


class Tagger(nn.Module):
    @nn.compact
    def __call__(self, ids, mask):
        x = nn.Embed(20, 8, name="embed")(ids) * mask[..., None]
        return nn.Dense(3, name="head")(nn.tanh(nn.Dense(8, name="inner")(x.mean(1))))


MODEL = Tagger()
EXAMPLE = jnp.ones((1, 4), jnp.int32)
VARIABLES = MODEL.init(jax.random.key(0), EXAMPLE, EXAMPLE)
CONFIG = jl.LoraConfig(rank=2, targets="inner", dropout=0.3, modules_to_save="head")
SCHEDULE = optax.linear_schedule(0.1, 0.0, 12)
TX = optax.adamw(SCHEDULE)


def logits(adapter, variables, batch, **kwargs):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return jl.lora_apply(MODEL, variables, adapter, ids, mask, **kwargs)


def loss_fn(adapter, variables, batch, key):
    out = logits(adapter, variables, batch, rngs={"dropout": key})
    losses = optax.softmax_cross_entropy_with_integer_labels(out, batch["label"])
    return jnp.sum(losses * batch["weight"]) / jnp.sum(batch["weight"])


STEP = jl.make_train_step(loss_fn, TX)


def examples(n=21):
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 12, n)
    return [{"input_ids": generator.integers(1, 20, k), "label": int(k % 3)} for k in sizes]


def batches(epochs=3):
    return Batches(examples(), 5, lengths=(4, 12), epochs=epochs, seed=3)


def fresh():
    adapter = jl.lora_init(jax.random.key(1), MODEL, VARIABLES, CONFIG, EXAMPLE, EXAMPLE)
    return jl.TrainState.create(adapter, TX, jax.random.key(2))


def evaluate(adapter):
    out = logits(adapter, VARIABLES, Batches(examples(), 21)[0])
    return {"spread": float(jnp.std(out))}


def train(folder, resume=False, **options):
    run = Run(folder, {"rank": 2}, resume=resume)
    options = {"evaluate": evaluate, "eval_every": 4, "metric": "spread", "quiet": True} | options
    return fit(
        run,
        options.pop("state", None) or fresh(),
        options.pop("step", STEP),
        VARIABLES,
        batches(),
        log_every=3,
        resume=resume,
        schedule=SCHEDULE,
        **options,
    )


def stop_after(steps, number=signal.SIGINT):
    """A step that is sent a signal in its last call."""
    calls = []

    def step(state, variables, batch):
        calls.append(1)
        if len(calls) == steps:
            os.kill(os.getpid(), number)
        return STEP(state, variables, batch)

    return step


def assert_equal(left, right):
    left, right = (dataclasses.replace(s, key=jax.random.key_data(s.key)) for s in (left, right))
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train(folder), folder


@pytest.mark.parametrize(
    ("steps", "number"), [(1, signal.SIGTERM), (4, signal.SIGINT), (14, signal.SIGINT)]
)
def test_a_stopped_and_resumed_run_is_the_one_never_stopped(steps, number, whole, tmp_path):
    expected, folder = whole
    assert not expected.stopped
    assert int(expected.state.step) == 15

    stopped = train(tmp_path / "run", step=stop_after(steps, number))
    assert stopped.stopped
    assert int(stopped.state.step) == steps
    resumed = train(tmp_path / "run", resume=True)
    assert not resumed.stopped
    assert (resumed.best, resumed.best_step) == (expected.best, expected.best_step)
    assert_equal(resumed.state, expected.state)
    for name in ("metrics.jsonl", "config.yaml"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()
    for name in ("best", "last"):
        pair = [load_state(f / name, fresh())[0] for f in (tmp_path / "run", folder)]
        assert_equal(*pair)


def test_a_run_that_is_stopped_within_an_accumulation_is_the_one_never_stopped(tmp_path):
    tx: Any = optax.MultiSteps(TX, 4)
    step = jl.make_train_step(loss_fn, tx)

    def trained(name, resume=False, stop=0):
        calls = []

        def counted(*args):
            calls.append(1)
            if len(calls) == stop:
                os.kill(os.getpid(), signal.SIGINT)
            return step(*args)

        start = jl.TrainState.create(fresh().adapter, tx, jax.random.key(2))
        return train(tmp_path / name, resume, state=start, step=counted).state

    expected = trained("whole")
    stopped = trained("run", stop=6)
    assert (int(stopped.step), int(stopped.opt_state.mini_step)) == (6, 2)
    assert_equal(trained("run", resume=True), expected)


def test_a_signal_in_an_evaluation_stops_it_and_a_resumed_run_does_it_again(whole, tmp_path):
    expected, folder = whole
    calls = []

    def interrupted(adapter):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the evaluation went on")
        return evaluate(adapter)

    stopped = train(tmp_path / "run", evaluate=interrupted)
    assert stopped.stopped
    assert int(stopped.state.step) == 8
    resumed = train(tmp_path / "run", resume=True)
    assert_equal(resumed.state, expected.state)
    metrics = "metrics.jsonl"
    assert (tmp_path / "run" / metrics).read_bytes() == (folder / metrics).read_bytes()


def test_a_killed_run_goes_on_from_its_last_checkpoint(whole, tmp_path):
    expected, folder = whole
    calls = []

    def killed(state, variables, batch):
        calls.append(1)
        if len(calls) == 11:
            raise MemoryError("killed")
        return STEP(state, variables, batch)

    with pytest.raises(MemoryError, match="killed"):
        train(tmp_path / "run", step=killed)
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 1')  # cut short
    resumed = train(tmp_path / "run", resume=True)
    assert_equal(resumed.state, expected.state)
    assert file.read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_the_run_folder_holds_what_it_promises(whole):
    result, folder = whole
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 16))
    assert [row["step"] for row in rows if "valid_spread" in row] == [0, 4, 8, 12, 15]
    rates = [row["learning_rate"] for row in rows if "loss" in row]
    np.testing.assert_allclose(rates[:13], np.linspace(0.1, 0, 13), 1e-6, 1e-8)
    scores = {row["step"]: row["valid_spread"] for row in rows if "valid_spread" in row}
    assert result.best == min(scores.values())
    assert scores[result.best_step] == result.best
    best = jl.load_adapter(folder / "best", params=VARIABLES["params"])
    assert evaluate(best)["spread"] == result.best
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((folder / "tensorboard").glob("events*"))


def test_a_loss_that_is_not_finite_stops_with_its_step_and_saves_nothing_of_it(tmp_path):
    calls = []

    def step(state, variables, batch):
        state, metrics = STEP(state, variables, batch)
        calls.append(1)
        bad = jnp.float32(np.nan if len(calls) == 6 else 1.0)
        return state, metrics | {"loss": metrics["loss"] * bad}

    with pytest.raises(RunError, match="The loss of step 6 is nan, expected a finite number"):
        train(tmp_path / "run", step=step)
    assert int(load_state(tmp_path / "run" / "last", fresh())[0].step) == 4
    rows = Run(tmp_path / "run", resume=True).history()
    assert max(row["step"] for row in rows) == 5


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"steps is 16.*the 15 that the data has"):
        train(tmp_path / "a", steps=16)
    with pytest.raises(ConfigError, match="chosen by 'accuracy', the evaluation gives spread"):
        train(tmp_path / "b", metric="accuracy")
    with pytest.raises(RunError, match="no run to go on with"):
        train(tmp_path / "c", resume=True)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    run = Run(tmp_path / "run", {"rank": 2})
    run.log(0, {"valid_spread": 1.0})
    run.log(1, {"loss": 1.0})
    run.close()
    with pytest.warns(UserWarning, match="has no checkpoint yet: it begins anew"):
        train(tmp_path / "run", resume=True)
    train(tmp_path / "whole")
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("run", "whole")]
    assert logs[0] == logs[1]


def test_a_run_of_another_optimizer_cannot_be_resumed(tmp_path):
    train(tmp_path / "run", step=stop_after(2))
    other = jl.TrainState.create(fresh().adapter, optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(LoraError, match="is of another optimizer: it lacks nothing and has opt"):
        load_state(tmp_path / "run" / "last", other)
