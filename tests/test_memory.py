"""What a step needs on each device: against arrays that lie there, and for models of any size."""

import doctest
import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

import jaxlora as jl
from jaxlora import tree
from jaxlora.cli import main
from jaxlora.errors import CheckpointError, ConfigError, MissingDependencyError, ShardingError
from jaxlora.models import shapes
from jaxlora.models.shapes import SHAPES, config_of, from_config
from jaxlora.tasks import memory
from jaxlora.tasks.memory import held_memory, step_memory
from jaxlora.tasks.topology import memory_of, topology_devices

GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
GPT2 |= {"n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LORA = jl.LoraConfig(rank=2, targets="c_attn|c_fc")


def in_a_process(script):
    """What a script prints; the number of devices is fixed when JAX starts."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def one_device():
    names = ("data", "fsdp", "tensor")
    return jax.make_mesh((1, 1, 1), names, axis_types=(AxisType.Auto,) * 3)


def test_what_is_held_is_what_the_arrays_of_a_run_have_on_each_of_eight_devices():
    in_a_process("""
        import jax
        jax.config.update("jax_num_cpu_devices", 8)
        from jaxlora.tasks.memory import held_memory, step_memory
        from tests.scaled import Case, mesh_of

        def on_first(arrays):
            shards = [s for x in jax.tree.leaves(arrays) for s in x.addressable_shards]
            return sum(s.data.nbytes for s in shards if s.device == jax.devices()[0])

        case, whole = Case(), set()
        for sizes in [(1, 8, 1), (2, 2, 2)]:
            mesh = mesh_of(*sizes)
            state, variables, _ = case.on(mesh)
            told = held_memory(case.model, case.params, case.config, mesh, case.tx)
            assert told.params == on_first(variables)
            assert told.adapter == on_first(state.adapter)
            assert told.optimizer == on_first(state.opt_state)
            whole.add(told.held)
        assert len(whole) == 2
        step = step_memory(
            case.model, case.params, case.config, mesh, batch_size=8, length=16, tx=case.tx
        )
        assert step.held == told.held and step.other == 0 < step.activations
    """)


def test_the_plan_of_a_70b_model_has_no_array_of_it():
    said = in_a_process("""
        from pathlib import Path
        from jaxlora.cli import main

        # 76 GB if XLA for CPU were to make float32 of all layers at once.
        assert main(["plan", "llama-3.1-70b", "--mesh", "fsdp=8", "--fits", "40"]) == 0
        # The peak of this process; getrusage begins from that of the one that started it.
        (peak,) = (x for x in Path("/proc/self/status").read_text().split("\\n") if "VmHWM" in x)
        assert int(peak.split()[1]) < 3e6, peak  # KB; the params are 141 GB
    """)
    assert "17,640,734,720" in said
    assert "fits: " in said


@pytest.mark.parametrize(
    ("name", "millions"),
    [("llama-7b", 6738), ("llama-3.1-8b", 8030), ("llama-3.1-70b", 70554), ("gpt3-175b", 174604)],
)
def test_the_shapes_have_the_sizes_that_are_known(name, millions):
    params = from_config(SHAPES[name], scan_layers=True).params
    assert round(sum(x.size for x in tree.flat(params).values()) / 1e6) == millions
    assert set(SHAPES) == {"llama-7b", "llama-3.1-8b", "llama-3.1-70b", "gpt3-175b"}


def test_fsdp_divides_what_is_held_and_bfloat16_halves_the_base():
    model, params = from_config(GPT2, scan_layers=True)
    half = from_config(GPT2, scan_layers=True, param_dtype=jnp.bfloat16)

    def held(model, params, fsdp):
        mesh = AbstractMesh((1, fsdp, 1), ("data", "fsdp", "tensor"))
        return held_memory(model, params, LORA, mesh)

    one, four = held(model, params, 1), held(model, params, 4)
    assert one.params == tree.nbytes(params)
    assert four.params < one.params / 3
    assert four.adapter < one.adapter
    assert held(*half, 1).params == one.params / 2
    assert held(*half, 1).adapter == one.adapter


def test_a_step_needs_less_with_remat_and_the_total_is_the_sum():
    def needs(remat):
        model, params = from_config(GPT2, scan_layers=True, remat=remat)
        return step_memory(model, params, LORA, one_device(), batch_size=4, length=128)

    kept, again = needs(False), needs(True)
    assert again.activations < kept.activations
    assert again.held == kept.held
    parts = (kept.params, kept.adapter, kept.optimizer, kept.inputs, kept.activations, kept.other)
    assert kept.total == sum(parts)


def test_a_classifier_is_planned_as_well():
    fields = {"model_type": "bert", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 2, "intermediate_size": 32}
    model, params = from_config(fields, head="classification", num_labels=3, scan_layers=True)
    config = jl.LoraConfig(rank=2, targets="query", modules_to_save="classifier")
    found = step_memory(model, params, config, one_device(), batch_size=2, length=8)
    assert found.activations > 0


def test_what_cannot_be_planned_says_why():
    model, params = from_config(GPT2)
    with pytest.raises(ShardingError, match="batch_size is 0, expected a multiple of 1"):
        step_memory(model, params, LORA, one_device(), batch_size=0, length=8)
    with pytest.raises(ConfigError, match="head is 'token', expected one of lm"):
        from_config(GPT2, head="token")
    bare = from_config(GPT2, head="none")
    with pytest.raises(ConfigError, match="GPT2, expected one that is trained"):
        step_memory(*bare, LORA, one_device(), batch_size=1, length=8)
    vit = from_config({"model_type": "vit"}, head="classification")
    with pytest.raises(ConfigError, match="reads no tokens"):
        held_memory(*vit, LORA, one_device())
    with pytest.raises(CheckpointError, match=r"Nearest: llama-3\.1-70b\."):
        config_of("./llama-3.1-70")


def test_the_command_needs_only_a_config_and_its_status_tells_whether_it_fits(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(GPT2 | {"n_embd": 64, "vocab_size": 8192}))
    flags = ["plan", str(tmp_path), "--targets", "qv"]
    assert main([*flags, "--max-length", "2", "--remat", "none", "--fits", "0.003"]) == 1
    text = capsys.readouterr().out
    assert "does not fit: 3." in text
    assert "fsdp=4 holds 0.3" in text
    for change in ("remat all", "max-length 1"):
        assert f"--{change} needs " in text
    assert main([*flags, "--max-length", "129"]) == 2
    assert "max_length is 129, expected 1 to 128" in capsys.readouterr().err


def test_a_process_that_has_started_with_too_few_devices_asks_another(tmp_path, capfd):
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    flags = ["plan", str(tmp_path), "--mesh", "fsdp=2", "--max-length", "16"]
    assert main([*flags, "--fits", "0.1"]) == 0
    text = capfd.readouterr().out
    assert "on devices fsdp=2" in text
    assert "MB of 0.1 GB a device" in text


def test_a_tpu_that_is_not_there_plans_the_step(tmp_path):
    pytest.importorskip("libtpu")
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    said = in_a_process(f"""
        import jax
        jax.config.update("jax_platforms", "cpu")
        import pytest
        from jaxlora.cli import main
        from jaxlora.errors import ShardingError
        from jaxlora.tasks.topology import memory_of, mesh_on, topology_devices

        with pytest.raises(ShardingError, match="Topology is 'v5e:3x3', expected a TPU's"):
            topology_devices("v5e:3x3")
        devices = topology_devices("v5e:2x2")
        assert memory_of(devices) == 16
        with pytest.raises(ShardingError, match="2 devices, the topology has 4"):
            mesh_on(dict(data=1, fsdp=2, tensor=1), devices)
        assert main(["plan", "{tmp_path}", "--topology", "v5e:2x2"]) == 0
    """)
    assert "MB of 16 GB a device" in said


def test_without_libtpu_the_error_tells_what_to_install():
    if importlib.util.find_spec("libtpu") is not None:
        pytest.skip("libtpu is there")
    with pytest.raises(MissingDependencyError, match=r"pip install 'jaxlora\[topology\]'"):
        topology_devices("v5e:2x4")
    assert memory_of(jax.devices()) is None


@pytest.mark.parametrize("module", [shapes, memory])
def test_the_examples_run(module):
    assert doctest.testmod(module).failed == 0
