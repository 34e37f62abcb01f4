"""Eight virtual CPU devices, in one process and in two, train as one device does.

They are made in processes of their own: the number of devices is fixed when JAX starts.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlora.cli import main
from jaxlora.runs import Run
from jaxlora.tasks import load_run
from tests import scaled, tiny

ROOT = Path(__file__).parent.parent


def started(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.scaled", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},  # it compiles faster
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def started_twice(part, *arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [started(part, *arguments, port, number) for number in (0, 1)]


def finished(*processes):
    for process in processes:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]


@pytest.mark.parametrize("part", ["meshes", "by_hand", "microbatches", "collectives", "explicit"])
def test_eight_devices_train_as_one(part):
    finished(started(part))


def test_a_state_of_some_devices_goes_on_with_others(tmp_path):
    finished(started("checkpoints", tmp_path))


def test_the_command_trains_on_a_mesh_as_on_one_device(tmp_path):
    finished(started("command", tmp_path))


def test_a_run_that_is_stopped_goes_on_bit_for_bit_and_on_other_devices_closely(tmp_path):
    finished(started("resumed", tmp_path))


def test_two_processes_of_four_devices_train_as_one_device():
    finished(*started_twice("process"))


def test_the_command_on_two_hosts_writes_one_run_and_stops_and_resumes_as_one_device(tmp_path):
    tiny.causal(tmp_path / "model", layers=1)
    turns = [[{"role": r, "content": c} for r, c in d] for d in tiny.DIALOGUES]
    lines = [json.dumps({"messages": m}) for m in turns]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    both = started_twice("command_on_hosts", tmp_path)
    out = tmp_path / "one"
    assert main(["train", "chat", *scaled.flags_on_hosts(tmp_path), "--out", str(out)]) == 0
    finished(*both)
    one, two = (Run(tmp_path / name, resume=True) for name in ("one", "run"))
    assert (two.config["mesh"], one.config["mesh"]) == ("data=2,fsdp=4", None)
    rows = list(zip(one.history(), two.history(), strict=True))
    assert [row["step"] for row, _ in rows if "loss" in row] == list(range(1, 13))
    for row, other in rows:
        assert row.keys() == other.keys()
        np.testing.assert_allclose(list(other.values()), list(row.values()), 1e-5, 1e-5)
    assert len(list((two.folder / "tensorboard").iterdir())) == 2  # of two starts, by one process
    pair = [load_run(run.folder, "last").adapter for run in (one, two)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-4), *pair)  # Adam's sums
    # What two hosts wrote goes on without a mesh.
    assert main(["train", "chat", "--resume", "--mesh", "None", "--out", str(two.folder)]) == 0
