"""`jaxlora plan MODEL`: does it fit?"""

import dataclasses
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxlora.cli import show
from jaxlora.cli.options import parse, positional
from jaxlora.errors import ConfigError, TooLargeError
from jaxlora.models.architectures import architecture
from jaxlora.models.shapes import SHAPES, config_of, from_config
from jaxlora.tasks.base import Remat, Settings, adapter_config, remat_of, source_of
from jaxlora.tasks.classify import HEADS
from jaxlora.tasks.memory import Memory, held_memory, step_memory
from jaxlora.tasks.mesh import AXES, ROWS, mesh_sizes
from jaxlora.tasks.topology import memory_of, mesh_on, topology_devices

MOST = 4096
"""The largest fsdp size that is proposed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Tell the memory that a training step needs on each device, and whether it fits.

    Nothing is loaded and no device is needed: the step of `jaxlora train`, its layers scanned, is
    compiled for devices that are not there. The exit status is 0 if it fits, 1 if not. To train as
    the defaults plan: --scan-layers --remat all --dtype bfloat16 --param-dtype bfloat16, and the
    same --max-length and --batch-size.

    Example: jaxlora plan llama-3.1-70b --mesh fsdp=8 --fits 80
    """

    model: Annotated[str, positional]
    """A folder with a config.json, a hub id, a GGUF file, a name of `jaxlora fetch`; or one of
    llama-7b, llama-3.1-8b, llama-3.1-70b, gpt3-175b."""
    mesh: str | None = None
    """Devices by the axes data, fsdp and tensor: fsdp=8. By default fsdp over the topology."""
    fits: float | None = None
    """The memory of a device in GB (10^9 bytes); by default that of the topology's."""
    topology: str | None = None
    """Compile for these TPUs: v5e:2x4, v5p:4x4x4, v6e:8x8. By default XLA for CPU plans."""
    head: Literal["lm", "classification"] | None = None
    """What is trained; by default lm where the model has that."""
    num_labels: int = 2
    """Classes of a classification head."""
    batch_size: int | None = None
    """Rows of a step on all devices; by default one for each device that rows lie over."""
    max_length: int | None = None
    """Tokens of a row; by default 2048, or as many as the model takes."""
    rank: int = 8
    """Rank of the update of each adapted kernel."""
    targets: str = "default"
    """default (all linear layers), qv (queries and values), all-linear, or a pattern of layers."""
    dropout: float = 0.0
    """Dropout of the inputs of the update."""
    dora: bool = False
    """Train the magnitude of each kernel as well."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype that the model computes in."""
    param_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the base's params."""
    remat: Remat = "all"
    """What is computed again in the backward pass: none, all of a layer, all but its products
    (dots), or all but the adapter's A x (lora)."""


@dataclasses.dataclass(frozen=True)
class _Case:
    """What is asked, with the devices that it is asked about."""

    options: Plan
    sizes: dict[str, int]
    mesh: Mesh
    fields: dict[str, Any]

    def made(self, **changes: Any) -> tuple[Any, Any, Any]:
        """(model, params, config), with some of the options changed."""
        o = dataclasses.replace(self.options, **changes)
        heads = architecture(self.fields.get("model_type")).heads
        model, params = from_config(
            self.fields,
            head=o.head or ("lm" if "lm" in heads else "classification"),
            num_labels=o.num_labels,
            dtype=jnp.dtype(o.dtype),
            param_dtype=jnp.dtype(o.param_dtype),
            scan_layers=True,
            remat=remat_of(o.remat),
        )
        settings = Settings(rank=o.rank, targets=o.targets, dropout=o.dropout, dora=o.dora)
        head = () if type(model) is heads.get("lm") else HEADS
        return model, params, adapter_config(settings, params, head)

    def filled(self) -> "_Case":
        """The same with the rows and the length that are meant where none are given."""
        o = self.options
        context = getattr(self.made()[0].config, "context", None) or 2048
        length = min(2048, context) if o.max_length is None else o.max_length
        if not 1 <= length <= context:
            raise ConfigError(
                f"max_length is {length}, expected 1 to {context}, the positions of the model."
            )
        rows = self.fewest if o.batch_size is None else o.batch_size
        options = dataclasses.replace(o, batch_size=rows, max_length=length)
        return dataclasses.replace(self, options=options)

    @property
    def fewest(self) -> int:
        """The fewest rows of a step: one on each device that rows lie over."""
        return math.prod(self.sizes[name] for name in ROWS)

    def step(self, **changes: Any) -> Memory:
        """The memory of a step, with some of the options changed."""
        o = dataclasses.replace(self.options, **changes)
        rows, length = o.batch_size or 0, o.max_length or 0
        return step_memory(*self.made(**changes), self.mesh, batch_size=rows, length=length)

    def held(self, fsdp: int) -> Memory:
        """What lies on each device with another size of fsdp."""
        shape = tuple((self.sizes | {"fsdp": fsdp})[name] for name in AXES)
        return held_memory(*self.made(), AbstractMesh(shape, AXES))


def run(argv: Sequence[str]) -> int:
    """Plan, print, and tell by the status whether it fits."""
    options = parse(Plan, argv, "jaxlora plan")
    fields = config_of(options.model if options.model in SHAPES else source_of(options.model))
    if options.topology is None:
        text = options.mesh or "fsdp=1"
        count = math.prod(mesh_sizes(text).values())
        if not _start(count):
            return subprocess.run([sys.executable, "-m", "jaxlora", "plan", *argv]).returncode
        devices = jax.devices("cpu")[:count]
    else:
        _start(1)
        devices = topology_devices(options.topology)
        text = options.mesh or f"fsdp={len(devices)}"
    sizes = mesh_sizes(text)
    case = _Case(options, sizes, mesh_on(sizes, devices), fields).filled()
    room = memory_of(devices) if options.fits is None else options.fits
    where = f"{options.model} on {options.topology or 'devices'} {text}"
    try:
        found, total, note = case.step(), 0, _compiler(options)
    except TooLargeError as e:
        found, total, note = case.held(sizes["fsdp"]), math.inf, str(e)
    total += found.total
    _print(where, found, note)
    if room is None:
        return int(total == math.inf)
    if total <= room * 1e9:
        show.line(f"fits: {_gb(total)} of {room:g} GB a device")
        return 0
    needs = _gb(total) if total < math.inf else "more than there is"
    show.line(f"does not fit: {needs} of {room:g} GB a device")
    for line in _ways(case, found, room * 1e9):
        show.line(f"  {line}")
    return 1


def _start(count: int) -> bool:
    """Asks for virtual CPU devices; False if JAX has started in this process with fewer."""
    try:
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:  # it has started
        return len(jax.devices("cpu")) >= count
    return True


def _compiler(options: Plan) -> str:
    if options.topology is not None:
        return f"Planned by the TPU's own compiler for {options.topology}."
    return (
        "Planned by XLA for CPU, which computes bfloat16 products in float32: the activations are "
        "an estimate, above those of a TPU's compiler (--topology). Params, adapter and optimizer "
        "are exact."
    )


def _print(where: str, found: Memory, note: str) -> None:
    parts = {
        "params of the base": found.params,
        "adapter": found.adapter,
        "optimizer": found.optimizer,
        "batch, step and key": found.inputs,
        "activations and gradients": found.activations,
        "program and padding": found.other,
        "in all" if found.activations else "held between steps": found.total,
    }
    known = [(name, f"{n:,}", _gb(n)) for name, n in parts.items() if n]
    show.table(where, ("on each device", "bytes", ""), known)
    show.line(note)


def _ways(case: _Case, found: Memory, room: float) -> Iterator[str]:
    """What would help, each of them planned."""
    o, rest = case.options, found.total - found.held
    fsdp = case.sizes["fsdp"]
    while rest < room and (fsdp := 2 * fsdp) <= MOST:
        held = case.held(fsdp).held
        if held + rest <= room:
            after = f"{_gb(held + rest)} with the rest as it is" if rest else "the rest aside"
            yield f"fsdp={fsdp} holds {_gb(held)}, {after}"
            break
    tries: list[dict[str, Any]] = []
    if o.param_dtype == "float32":
        tries.append({"param_dtype": "bfloat16"})
    if o.remat != "all" and found.held < room:
        tries.append({"remat": "all"})
    if o.batch_size != case.fewest and found.held < room:
        tries.append({"batch_size": case.fewest})
    if o.max_length != 1 and found.held < room:
        tries.append({"max_length": (o.max_length or 0) // 2})
    for change in tries:
        flags = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in change.items())
        try:
            total = case.step(**change).total
        except TooLargeError:
            yield f"{flags} does not fit either"
            continue
        yield f"{flags} needs {_gb(total)}: {'fits' if total <= room else 'not enough alone'}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
