"""Runs and saves that are killed, starved or damaged: the newest whole checkpoint is what loads.

`FAULTS=200` kills that many times; the ordinary tests do it a few times.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import jaxlora as jl
from jaxlora.errors import CheckpointError, DamageError, RunError
from jaxlora.resume import load_state, save_state
from jaxlora.runs import Run
from jaxlora.saver import Saver, earlier
from tests.test_fit import STEP, assert_equal, fresh, stop_after, train
from tests.test_fit import whole as whole  # a fixture

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("FAULTS", "2"))
PARTS = 1 + KILLS // 20  # tests that share them


def share(part):
    """How many of the kills are those of one test, and what draws their moments."""
    draw = random.Random(f"{os.environ.get('FAULTS_SEED', '0')}/{part}")
    return len(range(part, KILLS, PARTS)), draw


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def flip(file, at=None):
    """Another inode with a flipped bit, so that hard links of the file stay whole."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    file.unlink()
    file.write_bytes(data)


def test_states_are_kept_by_count_and_the_best_beside_them(tmp_path):
    train(tmp_path / "run", keep=3)
    run = Run(tmp_path / "run", resume=True)
    assert [p.name for p in earlier(run.last)] == [
        "step-00000015",
        "step-00000012",
        "step-00000008",
    ]
    assert int(load_state(earlier(run.last)[1], fresh())[0].step) == 12
    assert (run.checkpoints[0].name, run.checkpoints[-1].name) == ("last", "best")


def test_a_run_whose_last_is_damaged_goes_on_from_the_one_before(whole, tmp_path):
    expected, folder = whole
    train(tmp_path / "run", step=stop_after(10))
    for name in ("last", "step-00000010"):
        for file in files_of(tmp_path / "run" / name / "params" / "d"):
            flip(file)
    with pytest.warns(
        UserWarning, match=r"last is damaged.*Went on from .*step-00000008, of step 8"
    ):
        resumed = train(tmp_path / "run", resume=True)
    assert_equal(resumed.state, expected.state)
    metrics = "metrics.jsonl"
    assert (tmp_path / "run" / metrics).read_bytes() == (folder / metrics).read_bytes()


def test_where_none_is_whole_each_is_named(tmp_path):
    train(tmp_path / "run", step=stop_after(2))
    for folder in Run(tmp_path / "run", resume=True).checkpoints:
        (folder / "run" / "metadata").write_text("{")
    with pytest.raises(DamageError, match=r"No checkpoint is whole. .*last/.*step-0.*best/"):
        train(tmp_path / "run", resume=True)


def test_a_notice_of_slurm_stops_and_saves(whole, tmp_path):
    stopped = train(tmp_path / "run", step=stop_after(3, signal.SIGUSR1))
    assert stopped.stopped
    assert int(load_state(tmp_path / "run" / "last", fresh())[0].step) == 3
    assert_equal(train(tmp_path / "run", resume=True).state, whole[0].state)


def test_a_clock_that_jumps_changes_nothing(whole, tmp_path, monkeypatch):
    clock, calls = time.time, []

    def jumping():
        return clock() + (-1) ** len(calls) * 86400

    def step(state, variables, batch):
        calls.append(1)
        return STEP(state, variables, batch)

    monkeypatch.setattr(time, "time", jumping)
    assert_equal(train(tmp_path / "run", step=step).state, whole[0].state)
    assert int(load_state(tmp_path / "run" / "last", fresh())[0].step) == 15


def test_a_second_writer_is_refused(tmp_path):
    refused = []

    def step(state, variables, batch):
        if not refused:
            with pytest.raises(RunError, match="is being written by another process") as e:
                train(tmp_path / "run", resume=True)
            refused.append(e)
        return STEP(state, variables, batch)

    assert not train(tmp_path / "run", step=step).stopped
    assert refused


def test_two_writers_of_one_adapter_leave_a_whole_one(tmp_path):
    states = [fresh().adapter, jax.tree.map(lambda x: x + 1, fresh().adapter)]
    path = tmp_path / "adapter"
    jl.save_adapter(path, states[0])
    source = jl.save_adapter(tmp_path / "source", states[1])
    code = WRITER.format(path=str(path), source=str(source))
    writers = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    read = 0
    while any(w.poll() is None for w in writers):
        try:
            jl.load_adapter(path)
            read += 1
        except CheckpointError:  # taken away while it was read: never something else
            continue
    said = [w.communicate()[0].split() for w in writers]
    assert all(w.returncode == 0 for w in writers)
    assert sum(line.count("saved") for line in said) >= 10
    assert read
    assert jl.load_adapter(path).spec == states[0].spec


WRITER = """
import jaxlora as jl
from jaxlora.errors import CheckpointError
adapter = jl.load_adapter({source!r})
for _ in range(10):
    try:
        jl.save_adapter({path!r}, adapter, overwrite=True)
        print("saved")
    except CheckpointError as e:
        assert "could not be saved" in str(e), e
        print("refused")
"""


def test_left_overs_of_killed_saves_do_not_stand_in_the_way(tmp_path):
    save_state(tmp_path / "last", fresh())
    (tmp_path / "last.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (tmp_path / ".step-00000000.part" / "params").mkdir(parents=True)
    (tmp_path / "last.replaced-x" / "new.orbax-checkpoint-tmp").mkdir(parents=True)
    with Saver() as saver:
        saver.save(tmp_path / "last", fresh(), {}, keep=2)
    assert int(load_state(tmp_path / "last", fresh())[0].step) == 0
    assert not (tmp_path / "last.replaced-x").exists()
    assert not (tmp_path / ".step-00000000.part").exists()


FULL = """
import resource, signal, subprocess, sys
from pathlib import Path
from jaxlora.errors import CheckpointError
from jaxlora.resume import load_state, save_state
from tests.test_fit import fresh
path = Path(sys.argv[1]) / "last"
save_state(path, fresh(), {"good": True})
if sys.argv[2] == "disk":
    with (path.parent / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096): pass
        except OSError: pass
elif sys.argv[2] == "read-only":
    subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
else:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    save_state(path, fresh(), {"good": False})
    print("saved")
except CheckpointError as e:
    assert "could not be saved" in str(e), e
    print("refused")
print(load_state(path, fresh())[1])
"""


@contextlib.contextmanager
def tmpfs(folder, size):
    """A file system of its own, or the test is skipped."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_run_on_a_full_disk_is_an_error_and_goes_on_when_there_is_room(whole, tmp_path):
    def step(state, variables, batch):
        state, metrics = STEP(state, variables, batch)
        if int(state.step) == 7:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
        return state, metrics

    expected, folder = whole
    with tmpfs(tmp_path, "4m"):
        run, filler = tmp_path / "run", tmp_path / "filler"
        full = r"(?s)could not be (saved|written).*No space left on device"  # or its log
        with pytest.raises((CheckpointError, RunError), match=full):
            train(run, step=step)
        assert int(load_state(run / "last", fresh())[0].step) in (0, 4)  # 4 may be under way
        filler.unlink()
        assert_equal(train(run, resume=True).state, expected.state)
        metrics = "metrics.jsonl"
        assert (run / metrics).read_bytes() == (folder / metrics).read_bytes()


def test_a_log_without_room_is_named(tmp_path):
    run = Run(tmp_path / "run")
    (run.folder / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"metrics\.jsonl could not be written: .*No space left"):
        run.log(1, {"loss": 1.0})


@pytest.mark.parametrize("kind", ["disk", "limit", "read-only"])
def test_a_folder_that_is_full_or_read_only_is_an_error_and_what_is_there_stays(kind, tmp_path):
    with contextlib.nullcontext() if kind == "limit" else tmpfs(tmp_path, "1m"):
        command = [sys.executable, "-c", FULL, str(tmp_path), kind]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stdout == "refused\n{'good': True}\n"


KILLED = """
import sys
from pathlib import Path
from jaxlora.resume import save_state
from tests.test_fit import fresh, train
folder = Path(sys.argv[1])
print("begun", flush=True)
train(folder, resume=(folder / "config.yaml").exists(), save_every=0.0, keep=3)
"""


@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_that_is_killed_again_and_again_ends_as_the_one_never_killed(part, whole, tmp_path):
    expected, folder = whole
    kills, draw = share(part)
    run, killed, runs = tmp_path / "run", 0, 0
    while killed < kills:
        runs += 1
        command = [sys.executable, "-c", KILLED, str(run)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert child.stdout
        assert child.stderr
        assert child.stdout.readline() == b"begun\n"
        try:
            child.wait(draw.uniform(0.2, 4.0))
        except subprocess.TimeoutExpired:
            child.kill()
            killed += 1
        said = child.communicate()[1]
        assert child.returncode in (0, -signal.SIGKILL), said.decode()
        assert runs < 4 * kills + 4
        if child.returncode == 0 or not killed:
            ended(run, expected.state)
            shutil.rmtree(run)
    if (run / "config.yaml").exists() and Run(run, resume=True).checkpoints:
        ended(run, expected.state)
        metrics = "metrics.jsonl"
        assert (run / metrics).read_bytes() == (folder / metrics).read_bytes()


def ended(run, expected):
    """A run that is resumed ends as it would have."""
    assert_equal(train(run, resume=True).state, expected)


SAVER = """
import itertools, sys, jax
from jaxlora.resume import save_state
from tests.test_fit import fresh
import dataclasses
state = fresh()
for n in itertools.count(1):
    moved = dataclasses.replace(state, step=state.step + n)
    save_state(sys.argv[1] + "/last", moved, {"n": n})
    print(n, flush=True)
"""


@pytest.mark.parametrize("part", range(PARTS))
def test_saves_that_are_killed_lose_nothing_that_was_saved(part, tmp_path):
    kills, draw = share(part)
    for _ in range(kills):
        command = [sys.executable, "-c", SAVER, str(tmp_path)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert child.stdout
        child.stdout.readline()
        time.sleep(draw.uniform(0, 0.4))
        child.kill()
        said = child.communicate()[0].split()
        state, about = load_state(tmp_path / "last", fresh())
        assert about["n"] == int(state.step)
        assert about["n"] >= int(said[-1] if said else 1)


REGIONS = """
import json, pathlib, sys, tempfile
import jax, numpy as np
from jaxlora.errors import LoraError
from tests import fuzz

counts = {"exact": 0, "refused": 0, "changed": 0}


def bytes_of(x):
    key = hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if key else x).tobytes()


def leaves(found):
    return [bytes_of(x) for x in jax.tree.leaves(found)]


with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(temporary)
    forms = fuzz.forms(root / "seeds")
    for name in ("run", "safetensors"):
        form, folder = forms[name], root / name
        for file, data in form.seed.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
        whole = leaves(form.read(folder))
        for file, data in form.seed.items():
            steps = max(1, len(data) // 16)
            flips = [data[:n] + bytes([data[n] ^ 1]) + data[n + 1:]
                     for n in range(0, len(data), steps)]
            cuts = [data[:n] for n in (0, len(data) // 2, len(data) - 1)]
            for bad in flips + cuts:
                (folder / file).write_bytes(bad)
                try:
                    counts["exact" if leaves(form.read(folder)) == whole else "changed"] += 1
                except LoraError as e:
                    assert str(folder) in str(e), e
                    counts["refused"] += 1
            (folder / file).write_bytes(data)
print(json.dumps(counts))
"""


def test_each_region_of_each_file_damaged_is_exact_or_an_error_that_names_it():
    command = [sys.executable, "-c", REGIONS]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    counts = json.loads(run.stdout)
    assert counts["changed"] == 0
    assert counts["refused"] > 100
