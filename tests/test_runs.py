"""A run's folder: what is written, what is refused, what is taken back."""

import json

import pytest

from jaxlora import runs
from jaxlora.errors import ConfigError, RunError
from jaxlora.runs import Run, check, read_config, read_yaml


def test_the_settings_and_the_metrics_come_back(tmp_path):
    config = {"rank": 4, "rate": 5e-4, "words": ["a", "b"], "none": None, "text": "é: 'x'"}
    run = Run(tmp_path / "run", config)
    run.log(1, {"loss": 0.1 + 0.2})
    run.log(2, {"loss": 0.25, "valid_loss": 1.0})
    assert read_config(tmp_path / "run") == config
    assert run.history() == [
        {"step": 1, "loss": 0.1 + 0.2},
        {"step": 2, "loss": 0.25, "valid_loss": 1.0},
    ]
    assert run.plot().read_bytes()[:4] == b"\x89PNG"
    run.close()
    assert list((tmp_path / "run" / runs.EVENTS).iterdir())
    assert not list((tmp_path / "run").glob(".*"))


def test_a_plot_of_nothing_is_a_plot(tmp_path):
    assert Run(tmp_path, {}).plot().is_file()


def test_rewinding_takes_back_steps_evaluations_and_a_line_cut_short(tmp_path):
    run = Run(tmp_path, {})
    rows = [(0, "valid_loss"), (1, "loss"), (2, "loss"), (2, "valid_loss"), (3, "loss")]
    for step, name in rows:
        run.log(step, {name: 1.0})
    file = tmp_path / runs.METRICS
    file.write_text(file.read_text() + '{"step": 4, "lo')
    with pytest.raises(RunError, match=r"metrics.jsonl is damaged: .* Take the broken line out"):
        run.history()
    run.rewind(2, evaluated=0)
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["step"], *(n for n in row if n != "step")) for row in kept] == rows[:3]
    run.close()


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path):
    run = Run(tmp_path, {"rank": 4})
    Run(tmp_path, {"rank": 5})  # it never began
    run.log(1, {"loss": 1.0})
    run.close()
    with pytest.raises(RunError, match=r"holds a run already, expected a new folder"):
        Run(tmp_path, {"rank": 4})
    with pytest.raises(RunError, match="other settings: new None -> 1, rank 5 -> 4"):
        check(tmp_path, {"rank": 4, "new": 1}, resume=True)
    assert Run(tmp_path, {"rank": 5, "mesh": "fsdp=8"}, resume=True).config == {"rank": 5}
    assert Run(tmp_path, resume=True).config == {"rank": 5}


def test_errors(tmp_path):
    with pytest.raises(RunError, match="no run to go on with"):
        Run(tmp_path, {}, resume=True)
    with pytest.raises(RunError, match="holds no run"):
        read_config(tmp_path)
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="holds a list, expected `name: value` lines"):
        read_yaml(tmp_path / "list.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_yaml(tmp_path / "bytes.yaml")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_yaml(tmp_path / "none.yaml")
