"""Feeds broken and hostile files to all that reads files: `python -m tests.fuzz 2000 0`.

A process of its own, with a limit on its memory and on the time of each input. A hook of the
interpreter sees every process that is started, every connection, and every file that is opened for
writing, so that what a file makes us do outside of the folder of the input is found.
"""

import dataclasses
import faulthandler
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxlora as jl
from jaxlora import models
from jaxlora.errors import LoraError
from jaxlora.interop import loralib, peft, safetensors, torch_zip
from jaxlora.models.gguf_file import open_gguf
from jaxlora.models.llama import LlamaConfig, LlamaForCausalLM
from jaxlora.resume import load_state, save_state

SECONDS, MEMORY = 10, 3 * 2**30
Files = dict[str, bytes]


@dataclasses.dataclass
class Form:
    """A kind of file or folder: whole ones, what reads them, and how often it gets its turn."""

    seed: Files
    read: Callable[[Path], Any]
    weight: int


MODEL = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=8,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
)
IDS = jnp.ones((1, 2), jnp.int32)


def forms(folder: Path) -> dict[str, Form]:
    """All of them, with the files of whole ones."""
    variables = MODEL.init(jax.random.key(0), IDS)
    config = jl.LoraConfig(rank=2, targets="q_proj|v_proj", rank_pattern={"v_proj": 3}, alpha=4)
    adapter = jl.lora_init(jax.random.key(1), MODEL, variables, config, IDS)
    dense, x = nn.Sequential([nn.Dense(3)]), jnp.ones((2, 4))
    small = dense.init(jax.random.key(0), x)
    factors = jl.lora_init(jax.random.key(1), dense, small, jl.LoraConfig(rank=2, alpha=4), x)
    names = {"layers_0": "fc"}
    state = jl.TrainState.create(factors, optax.adam(1e-3), jax.random.key(2))
    jl.save_adapter(folder / "orbax" / "it", factors, params=small["params"])
    save_state(folder / "run" / "it", state, {"epoch": 1})
    safetensors.save(folder / "safetensors" / "it.safetensors", factors)
    peft.save(folder / "peft" / "it", adapter, MODEL)
    loralib.save(folder / "loralib" / "it.pt", factors, dense, names)
    tensors = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.arange(3)}
    torch_zip.write(folder / "torch" / "it.pt", tensors)
    models.save_pretrained(folder / "model" / "it", MODEL, variables["params"])
    (folder / "config").mkdir()
    full = jl.LoraConfig(targets=["q", "v"], rank_pattern={"q": 3}, fused={"c": (True, False)})
    (folder / "config" / "it.json").write_text(full.to_json())
    (folder / "gguf").mkdir()
    (folder / "gguf" / "it.gguf").write_bytes(gguf())

    def of(name: str, read: Callable[[Path], Any], weight: int) -> Form:
        root = folder / name
        files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        return Form(files, read, weight)

    def read_gguf(folder: Path) -> None:
        file = open_gguf(folder / "it.gguf")
        for entry in file.entries:
            file.read(entry)

    def read_loralib(folder: Path) -> Any:
        return loralib.load(folder / "it.pt", dense, small, x, alpha=4, names=names)

    return {
        "orbax": of("orbax", lambda f: jl.load_adapter(f / "it"), 2),
        "run": of("run", lambda f: load_state(f / "it", state), 1),
        "safetensors": of("safetensors", lambda f: safetensors.load(f / "it.safetensors"), 10),
        "peft": of("peft", lambda f: peft.load(f / "it", MODEL, variables), 3),
        "loralib": of("loralib", read_loralib, 4),
        "torch": of("torch", lambda f: torch_zip.read(f / "it.pt"), 10),
        "model": of("model", lambda f: models.from_pretrained(f / "it", head="lm"), 2),
        "config": of("config", lambda f: jl.LoraConfig.from_json(text_of(f / "it.json")), 10),
        "gguf": of("gguf", read_gguf, 10),
    }


def text_of(file: Path) -> str:
    return file.read_bytes().decode(errors="replace")


def gguf() -> bytes:
    """A file with metadata of several kinds and two tensors."""

    def text(x: str) -> bytes:
        return struct.pack("<Q", len(x)) + x.encode()

    metadata = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("llama.block_count") + struct.pack("<II", 4, 1),
        text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.5, 1.0),
    ]
    tensors = [
        text("a.weight") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0),
        text("b.weight") + struct.pack("<IQIQ", 1, 32, 2, 32),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    data = head + b"".join(metadata + tensors)
    return data + b"\0" * (-len(data) % 32) + np.arange(8, dtype="<f4").tobytes() + b"\x11" * 18


HOSTILE: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan"), "", "../../../escape",
    "/etc/passwd", "\0", "(a+)+$", "x" * 70_000, [], {}, [[]], [[[[1]]]], {"a": {"b": []}}, "*",
    "[", "\ud800", [2**40, 2**40], "__import__('os').system('id')",
]  # fmt: skip


def changed_json(draw: random.Random, data: bytes) -> bytes:
    """One value of a JSON replaced, removed or doubled."""
    found = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    if isinstance(found, dict | list):
        walk(found)
    for _ in range(draw.choice([1, 1, 1, 3])):
        if not places:
            break
        node, key = draw.choice(places)
        if draw.random() < 0.2 and isinstance(node, dict):
            node.pop(key, None)
        elif draw.random() < 0.1 and isinstance(node, dict):
            node[draw.choice(["__class__", "", "rank", "x" * 300])] = node.get(key)
        elif isinstance(node, dict) or key < len(node):
            node[key] = draw.choice(HOSTILE)
    text = json.dumps(found)
    if draw.random() < 0.02:
        text = "[" * 100_000
    return text.encode(errors="surrogatepass")


def changed_bytes(draw: random.Random, data: bytes) -> bytes:
    """One damage: bits, bytes, numbers, cuts, insertions, doublings."""
    at, to = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    if draw.random() < 0.5:  # headers are where sizes stand
        at, to = at % 200, at % 200 + draw.randrange(1, 9)
    kind = draw.randrange(7)
    if kind == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[to:]
    if kind == 3:
        return data[:at] + draw.randbytes(draw.randrange(1, 30)) + data[at:]
    if kind == 4:
        number = draw.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**62, 2**63, 2**64 - 1, 10**9])
        size = draw.choice([4, 8])
        return data[:at] + (number % 256**size).to_bytes(size, "little") + data[at + size :]
    if kind == 5:
        return data[:to] + data[at:to] * draw.randrange(1, 4) + data[to:]
    return data[:at] + draw.randbytes(to - at) + data[to:]


def changed_header(draw: random.Random, data: bytes) -> bytes:
    """The JSON in the head of a safetensors file changed, with its size kept true."""
    size = int.from_bytes(data[:8], "little")
    head = changed_json(draw, data[8 : 8 + size])
    return len(head).to_bytes(8, "little") + head + data[8 + size :]


def mutated(draw: random.Random, seed: Files) -> Files:
    """The files with one of them damaged, missing or another's."""
    files = dict(seed)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        name = draw.choice(sorted(files))
        data, is_json = files[name], files[name][:1] in (b"{", b"[")
        if draw.random() < 0.02 and len(files) > 1:
            del files[name]
        elif draw.random() < 0.02:
            files[name] = draw.choice(list(seed.values()))
        elif draw.random() < 0.6 and (is_json or name.endswith(".safetensors")):
            try:
                files[name] = (changed_json if is_json else changed_header)(draw, data)
            except (ValueError, RecursionError):
                files[name] = changed_bytes(draw, data)
        else:
            files[name] = changed_bytes(draw, data)
    return files


class Escape(BaseException):
    """A file made us do what reading must not."""


class Slow(BaseException):
    """An input took longer than it may."""


_watched: list[Path] = []
_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen")
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod")


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Raises at what reading a file must not do."""
    if not _watched:
        return
    if event in _STARTS or event in ("socket.connect", "pickle.find_class"):
        raise Escape(f"{event} {arguments!r:.200}")
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
    if (writes or event in _CHANGES) and isinstance(arguments[0], str | bytes):
        path = Path(os.fsdecode(arguments[0])).absolute()
        if _watched[0] not in path.parents and path != Path("/dev/null"):
            raise Escape(f"{event} {path}")


def attempt(form: Form, files: Files, folder: Path) -> str:
    """What came of one input: "read", or the name of our error."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # where even a signal is not seen
    signal.alarm(SECONDS)
    _watched.append(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            form.read(folder)
        return "read"
    except LoraError as e:
        if not str(e):
            raise AssertionError("an error that says nothing") from e
        return type(e).__name__
    finally:
        _watched.clear()
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()


def main(count: int, seed: int, part: int = 0, parts: int = 1) -> None:
    """Runs a part of `count` inputs and prints what came of them; a finding ends in an error."""

    def slow(*_: Any) -> None:
        raise Slow(f"more than {SECONDS} s")

    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, slow)
    findings: Counter[str] = Counter()
    results: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        all_forms = forms(root / "seeds")
        for form in all_forms.values():  # whole ones are read, and what is lazy is imported
            assert attempt(form, form.seed, root / "whole") == "read"
            shutil.rmtree(root / "whole")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        sys.addaudithook(audit)
        weights = [form.weight for form in all_forms.values()]
        for n in range(part, count, parts):
            draw = random.Random(f"{seed}/{n}")
            (name,) = draw.choices(list(all_forms), weights)
            form, folder = all_forms[name], root / "input"
            try:
                result = attempt(form, mutated(draw, form.seed), folder)
            except (Exception, Escape, Slow) as e:
                at = e.__traceback__
                while at and at.tb_next:
                    at = at.tb_next
                where = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}" if at else ""
                findings[f"{name}: {type(e).__name__} at {where}: {str(e)[:150]!r}"] += 1
                if findings.total() <= 20:
                    print(f"input {n}: {list(findings)[-1]}", file=sys.stderr)
                result = "FOUND"
            results.setdefault(name, Counter())[result] += 1
            shutil.rmtree(folder, ignore_errors=True)
    found = {name: dict(counter) for name, counter in sorted(results.items())}
    print(json.dumps({"results": found, "findings": dict(findings)}))
    sys.stdout.flush()
    os._exit(bool(findings))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
