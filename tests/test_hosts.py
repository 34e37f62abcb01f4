"""What the processes of several hosts agree on; with several it is tried in test_scale.py."""

import jax
import pytest

from jaxlora import hosts
from jaxlora.cli import main
from jaxlora.errors import LoraError, RunError


def test_alone_nothing_changes():
    assert hosts.alone()
    assert hosts.is_writer()
    tree = {"x": [1]}
    assert hosts.on_host(tree) is tree
    assert hosts.same(tree) is tree
    with pytest.raises(ZeroDivisionError), hosts.together():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"JAX_PROCESS_ID": "1"}, "names JAX_PROCESS_ID and lacks JAX_COORDINATOR_ADDRESS, "),
        ({}, "other processes were not found: none here. Expected SLURM"),
    ],
)
def test_processes_that_are_not_found(given, said, monkeypatch, tmp_path, capsys):
    def initialize(**options):
        raise ValueError("none here.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=said):
        hosts.initialize()
    assert main(["train", "chat", "--distributed", "--out", str(tmp_path / "run")]) == 2
    assert "JAX_COORDINATOR_ADDRESS" in capsys.readouterr().err


def test_processes_that_differ_are_named(monkeypatch):
    monkeypatch.setattr(hosts, "gathered", lambda text: [text, text, "other"])
    with pytest.raises(RunError, match=r"Process 2 has settings other than those of process 0"):
        hosts.check_same("settings", {"rank": 4})


def test_what_another_process_says_is_said(monkeypatch):
    monkeypatch.setattr(hosts, "alone", lambda: False)
    monkeypatch.setattr(hosts, "gathered", lambda text: [text, "OSError: no room"])
    with pytest.raises(LoraError, match=r"Process 1 of 2 stopped all. OSError: no room"):
        nothing_together()
    with pytest.raises(ZeroDivisionError), hosts.together():
        raise ZeroDivisionError


def nothing_together():
    with hosts.together():
        pass
