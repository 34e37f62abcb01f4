"""A tiny Llama trained on devices that are parts of a CPU; each part of it runs in a process."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlora as jl
from jaxlora import hosts, tree
from jaxlora.batches import Batches
from jaxlora.cli import main
from jaxlora.errors import CheckpointError, LoraError, RunError
from jaxlora.fit import fit
from jaxlora.models.architectures import architecture
from jaxlora.models.llama import LlamaConfig, LlamaForCausalLM
from jaxlora.models.sharding import default_specs
from jaxlora.resume import load_state, save_state
from jaxlora.runs import Run
from jaxlora.tasks import launch, load_run, train
from jaxlora.tasks.chat import Chat
from jaxlora.tasks.mesh import placing
from tests import tiny

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    initializer_range=0.2,
    scan_layers=True,
)
STEPS, ROWS, LENGTH = 20, 8, 16
BATCH = P(("data", "fsdp"))


class Case:
    """Model, params, adapter, optimizer and batches, the same in every process."""

    def __init__(self, tx=None, config=CONFIG, rank=2):
        self.model = LlamaForCausalLM(config)
        ids = jax.random.randint(jax.random.key(3), (STEPS, ROWS, LENGTH), 0, 64)
        self.batches = np.asarray(ids)[np.arange(STEPS) % 4]
        init = jax.jit(self.model.init)
        self.params = jax.tree.map(np.asarray, init(jax.random.key(0), ids[0])["params"])
        self.config = jl.LoraConfig(rank=rank, targets="all-linear")
        self.spec = jl.plan(self.model, {"params": self.params}, self.config, ids[0]).spec
        self.tx = tx or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
        self.ids = ids[0]
        self.traces = 0

    def init(self, key, params):
        return jl.lora_init(key, self.model, {"params": params}, self.config, self.ids)

    def state(self, adapter):
        return jl.TrainState.create(adapter, self.tx, jax.random.key(2))

    def loss(self, adapter, variables, ids, key):
        self.traces += 1
        logits = jl.lora_apply(self.model, variables, adapter, ids)
        every = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
        return jnp.mean(every)

    def one(self):
        """Losses of a single device, and the state."""
        adapter = jax.jit(self.init)(jax.random.key(1), self.params)
        step = jl.make_train_step(self.loss, self.tx)
        return run(step, self.state(adapter), {"params": self.params}, self.batches)

    def on(self, mesh):
        """(state, variables, shardings of the state) on a mesh; each made where it lies."""
        rule = default_specs(mesh, architecture("llama").row_parallel)
        specs = tree.map_leaves(lambda path, x: P(*rule(path, x.shape)), self.params)
        params = jax.tree.map(lambda x, s: placed(x, NamedSharding(mesh, s)), self.params, specs)
        shardings = jl.adapter_shardings(self.spec, params, mesh)
        made = jl.state_shardings(self.tx, shardings)
        fresh = jax.jit(self.init, out_shardings=shardings)(jax.random.key(1), params)
        state = jax.jit(self.state, out_shardings=made)(fresh)
        return state, {"params": params}, made

    def sharded(self, mesh, batch=BATCH):
        """Losses on a mesh, and the state. The step must compile once."""
        state, variables, made = self.on(mesh)
        step, before = jl.make_train_step(self.loss, self.tx, shardings=made), self.traces
        batches = [placed(ids, NamedSharding(mesh, batch)) for ids in self.batches]
        losses, state = run(step, state, variables, batches)
        assert self.traces == before + 1
        same_place = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, made)
        assert all(jax.tree.leaves(same_place))
        return losses, state


def placed(x, sharding):
    """An array on a mesh that may have devices of other processes."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def mesh_of(data=1, fsdp=1, tensor=1):
    shape = (data, fsdp, tensor)
    devices = jax.devices()[: data * fsdp * tensor]
    names = ("data", "fsdp", "tensor")
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3, devices=devices)


def run(step, state, variables, batches):
    losses = []
    for ids in batches:
        state, metrics = step(state, variables, ids)
        losses.append(np.asarray(metrics["loss"]).ravel()[0])
    return np.array(losses), state


def close(found, losses):
    assert losses[-1] != losses[0]
    assert len(found) == len(losses)
    np.testing.assert_allclose(found, losses, 1e-5, 1e-5)


def meshes():
    case = Case()
    losses, one = case.one()
    for sizes in [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]:
        found, state = case.sharded(mesh_of(*sizes))
        close(found, losses)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-4),  # Adam divides by small sums
            state.adapter,
            one.adapter,
        )


def by_hand():
    case = Case()
    losses, _ = case.one()
    adapter = case.init(jax.random.key(1), case.params)
    variables = {"params": case.params}

    copies = jax.tree.map(lambda a: jnp.stack([a] * 8), case.state(adapter))
    step = jl.make_train_step(case.loss, case.tx, axis_name="batch")
    found, _ = run(step, copies, variables, case.batches.reshape(STEPS, 8, 1, LENGTH))
    close(found, losses)

    def mapped(adapter, variables, ids, key):
        def local(adapter, variables, ids):
            return jax.lax.pmean(case.loss(adapter, variables, ids, key), "data")

        specs = (P(), P(), P("data"))
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(
            adapter, variables, ids
        )

    step = jl.make_train_step(mapped, case.tx)
    found, _ = run(step, case.state(adapter), variables, case.batches)
    close(found, losses)


def microbatches():
    case = Case(optax.MultiSteps(optax.adamw(1e-2), 4))
    case.batches = case.batches[np.arange(STEPS) // 4]
    losses, _ = case.one()
    assert losses[0] == losses[3] != losses[4]
    found, state = case.sharded(mesh_of(2, 2, 2))
    close(found, losses)
    assert int(state.opt_state.gradient_step) == STEPS // 4


def collectives():
    from benchmarks.collectives import bytes_of, measured

    for sizes in [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]:
        base, lora, adapter = measured(mesh_of(*sizes))
        assert lora["all-reduce"][1] > 0, sizes
        # What is gathered beyond the base's own is factors, a few times each: never a kernel.
        for kind in ("all-gather", "all-to-all", "collective-permute"):
            assert bytes_of(lora, kind) - bytes_of(base, kind) <= 3 * adapter, (sizes, kind)


def explicit():
    x = jax.random.normal(jax.random.key(5), (8, 16, 16))
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    assert set(mesh.axis_types) == {AxisType.Explicit}

    def column(*args, **kwargs):
        return jax.lax.dot_general(*args, **kwargs, out_sharding=P("data", None, "tensor"))

    def row(*args, **kwargs):
        return jax.lax.dot_general(*args, **kwargs, out_sharding=P("data"))

    class Mlp(nn.Module):
        dots: tuple = (None, None)

        @nn.compact
        def __call__(self, x):
            up, down = (
                nn.Dense(n, dot_general=d) for n, d in zip((32, 16), self.dots, strict=True)
            )
            return down(nn.gelu(up(x)))

    whole = {"Dense_0": {"kernel": P(), "bias": P()}, "Dense_1": {"kernel": P(), "bias": P()}}
    parts = {
        "Dense_0": {"kernel": P(None, "tensor"), "bias": P("tensor")},
        "Dense_1": {"kernel": P("tensor"), "bias": P()},
    }
    both = {
        "Dense_0": {"kernel": P("data", "tensor"), "bias": P("tensor")},
        "Dense_1": {"kernel": P("tensor", "data"), "bias": P()},
    }
    variables = Mlp().init(jax.random.key(0), x)
    for rank in (2, 8):  # few tokens beside the rank, and many
        config = jl.LoraConfig(rank=rank, targets="all-linear")
        fresh = jl.lora_init(jax.random.key(1), Mlp(), variables, config, x)
        adapter = jax.tree.map(lambda a: a + 0.1, fresh)

        def gradient(adapter, variables, x, model):
            return jax.value_and_grad(
                lambda a: jnp.mean(jl.lora_apply(model, variables, a, x) ** 2)
            )(adapter)

        wanted = gradient(adapter, variables, x, Mlp())
        for specs, rows, dots in [
            (whole, P("data"), (None, None)),
            (whole, P("data", "tensor"), (None, None)),
            (whole, P(None, "tensor"), (None, None)),
            (parts, P("data"), (column, row)),
            (both, P("data"), (column, row)),
        ]:
            shardings = jl.adapter_shardings(adapter.spec, specs, mesh)
            where = jax.tree.map(lambda s: NamedSharding(mesh, s), {"params": specs})
            with jax.set_mesh(mesh):
                found = jax.jit(gradient, static_argnums=3)(
                    jax.device_put(adapter, shardings),
                    jax.device_put(variables, where),
                    jax.device_put(x, NamedSharding(mesh, rows)),
                    Mlp(dots),
                )
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), found, wanted)
            alike = jax.tree.map(lambda a, s: a.sharding == s, found[1], shardings)
            assert all(jax.tree.leaves(alike))


def checkpoints(folder):
    """What n devices wrote, m devices go on with."""
    case = Case()
    case.batches = case.batches[:2]
    meshes = {1: mesh_of(), 2: mesh_of(2), 4: mesh_of(1, 2, 2), 8: mesh_of(2, 2, 2)}
    made = {n: case.on(mesh)[2] for n, mesh in meshes.items()}
    _, state = case.sharded(meshes[8])
    for wrote in (8, 1, 2, 4):
        path = f"{folder}/{wrote}"
        save_state(path, jax.device_put(state, made[wrote]), {"step": wrote})
        for reads in (1, 2, 4, 8) if wrote == 8 else (8,):
            found, about = load_state(path, state)
            found = jax.device_put(found, made[reads])
            assert about == {"step": wrote}
            assert (
                len(found.adapter.params["lm_head"]["kernel_lora_a"].sharding.device_set) == reads
            )
            jax.tree.map(same, found, state)
            adapter = jax.device_put(jl.load_adapter(path), made[reads].adapter)
            jax.tree.map(same, adapter, state.adapter)


def same(left, right):
    if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
        left, right = jax.random.key_data(left), jax.random.key_data(right)
    np.testing.assert_array_equal(left, right)


def command(folder):
    """`jaxlora train` on a mesh and without one."""
    folder = Path(folder)
    tiny.causal(folder / "model")
    turns = [[{"role": r, "content": c} for r, c in d] for d in tiny.DIALOGUES]
    (folder / "talk.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in turns))
    flags = f"--model {folder}/model --data {folder}/talk.jsonl --valid {folder}/talk.jsonl"
    flags += " --batch-size 4 --epochs 3 --max-length 48 --log-every 1 --quiet"

    def trained(name, *more):
        out = folder / name
        assert main(["train", "chat", *flags.split(), "--out", str(out), *more]) == 0
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return np.array([v["loss"] for v in map(json.loads, lines) if "loss" in v])

    losses = trained("one")
    close(trained("many", "--mesh", "data=2,fsdp=2,tensor=2"), losses)
    load_run(folder / "many")
    for mesh, said in [
        ("data=2", "which is 2 devices, expected the 8"),
        ("data=8", "multiple of 8"),
    ]:
        with pytest.raises(LoraError, match=said):
            train(Chat(model=str(folder / "model"), mesh=mesh, batch_size=4, out=f"{folder}/no"))


def resumed(folder):
    """A run that is stopped within an accumulation and goes on, on its devices and on others."""
    from tests.test_fit import CONFIG, EXAMPLE, MODEL, VARIABLES, examples, loss_fn

    tx: Any = optax.MultiSteps(optax.adamw(1e-2), 2)
    batches = Batches(examples(64), ROWS, lengths=(12,), seed=0)

    def init(params):
        args = ({"params": params}, CONFIG, EXAMPLE, EXAMPLE)
        adapter = jl.lora_init(jax.random.key(1), MODEL, *args)
        return jl.TrainState.create(adapter, tx, jax.random.key(2))

    def of(mesh):
        params = VARIABLES["params"]
        if mesh is None:
            return init(params), jl.make_train_step(loss_fn, tx), {"params": params}
        split = NamedSharding(mesh, P("fsdp", "tensor"))
        where = tree.map_leaves(lambda _, x: split if x.shape == (8, 8) else None, params)
        params = jax.device_put(params, where)
        spec = jax.eval_shape(init, params).adapter.spec
        made = jl.state_shardings(tx, jl.adapter_shardings(spec, params, mesh))
        step, place = jl.make_train_step(loss_fn, tx, shardings=made), placing(mesh, made)
        state = jax.jit(init, out_shardings=made)(params)
        return state, lambda *args: step(*place(*args)), {"params": params}

    def trained(name, made, source=None, stop=0):
        state, step, variables = made
        if source:
            shutil.copytree(f"{folder}/{source}", f"{folder}/{name}")
        run, calls = Run(f"{folder}/{name}", {"mesh": name}, resume=bool(source)), []

        def counted(*args):
            calls.append(1)
            if len(calls) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args)

        state = jax.tree.map(jnp.copy, state)
        state = fit(run, state, counted, variables, batches, resume=bool(source), quiet=True).state
        assert int(state.step) == (stop or 8)
        return np.array([row["loss"] for row in run.history()]), state

    cube, line, one = of(mesh_of(2, 2, 2)), of(mesh_of(1, 8, 1)), of(None)
    assert len(cube[0].adapter.params["inner"]["kernel_lora_b"].sharding.device_set) == 8
    losses, state = trained("whole", cube)
    trained("stopped", cube, stop=3)
    again, found = trained("again", cube, "stopped")
    np.testing.assert_array_equal(again, losses)
    jax.tree.map(same, found, state)
    close(trained("line", line, "stopped")[0], losses)
    close(trained("one", one, "stopped")[0], losses)
    trained("alone", one, stop=5)
    close(trained("spread", cube, "alone")[0], losses)


def command_on_hosts(folder, port, number):
    """`jaxlora train` on two hosts of four devices: told to stop, and resumed."""
    os.environ |= {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": number,
    }
    folder = Path(folder)

    def trained(name, *more):
        on = ["--out", f"{folder}/{name}", "--mesh", "data=2,fsdp=4", "--distributed"]
        return main(["train", "chat", *flags_on_hosts(folder), *on, *more])

    calls = []

    def told_to_stop(*args, **options):
        step = jl.make_train_step(*args, **options)

        def run(*args):
            calls.append(1)
            if len(calls) == 2 and number == "1":
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.4 * (len(calls) > 2))  # jax passes the notice on within a second
            return step(*args)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "make_train_step", told_to_stop)
        assert trained("run") == 130
    assert (jax.process_count(), jax.device_count()) == (2, 8)
    assert 2 <= len(calls) < 12
    hosts.check_same("a last step", len(calls))
    assert trained("run", "--resume") == 0

    # What one cannot do stops both.
    adapter = jl.load_adapter(folder / "run" / "last")
    with pytest.raises(CheckpointError if number == "0" else RunError, match="could not be saved"):
        jl.save_adapter(folder / "talk.jsonl" / "no", adapter)
    with pytest.raises(OSError if number == "1" else RunError, match="no room"):
        full_on_the_second(number)
    assert trained("other", "--seed", number) == 2
    assert not (folder / "other").exists()


def full_on_the_second(number):
    with hosts.together():
        if number == "1":
            raise OSError("no room")


def flags_on_hosts(folder):
    data = f"--model {folder}/model --data {folder}/talk.jsonl --valid {folder}/talk.jsonl"
    return (
        f"{data} --batch-size 8 --epochs 12 --max-length 16 --dropout 0.1 --eval-every 6 "
        "--log-every 3 --quiet"
    ).split()


def process(port, number):
    """One of two processes with four devices each."""
    jax.distributed.initialize(f"localhost:{port}", 2, int(number))
    assert jax.device_count() == 8
    assert jax.local_device_count() == 4
    case = Case()
    losses, _ = case.one()
    for sizes in [(2, 2, 2), (1, 8, 1)]:
        found, _ = case.sharded(mesh_of(*sizes))
        close(found, losses)


PARTS = {
    f.__name__: f
    for f in (
        *(meshes, by_hand, microbatches, collectives, explicit, checkpoints, command, resumed),
        *(process, command_on_hosts),
    )
}

if __name__ == "__main__":
    part, *more = sys.argv[1:]
    several = part in ("process", "command_on_hosts")
    jax.config.update("jax_num_cpu_devices", 4 if several else 8)
    if several:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_default_matmul_precision", "highest")
    PARTS[part](*more)
