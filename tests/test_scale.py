"""Eight virtual CPU devices, in one process and in two, train as one device does.

They are made in processes of their own: the number of devices is fixed when JAX starts.
"""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def started(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.scaled", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


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


def test_two_processes_of_four_devices_train_as_one_device():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    finished(*[started("process", port, number) for number in (0, 1)])
