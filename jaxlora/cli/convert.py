"""`jaxlora convert SOURCE TARGET --to FORM`."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import jax.numpy as jnp

from jaxlora.adapter import Adapter, Spec
from jaxlora.cli import show
from jaxlora.cli.forms import FORMS, Found, Request, check, detect
from jaxlora.cli.options import parse, positional
from jaxlora.errors import listing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Turn an adapter into another form. What it is, is found out and shown, and then written.

    Example: jaxlora convert runs/pirate adapters/pirate --to peft
    """

    source: Annotated[str, positional]
    """A run, an Orbax checkpoint, a PEFT folder or hub id, a loralib file, or bare safetensors."""
    target: Annotated[str, positional]
    """The folder or file to write."""
    to: Literal["peft", "vllm", "orbax", "loralib", "safetensors", "merged-hf"]
    """What to write."""
    base: str | None = None
    """The model, where the source names none: a name of `jaxlora fetch`, a folder or a hub id."""
    head: Literal["lm", "classification", "token", "embedding", "none"] | None = None
    """The head to give that model; default: as the source tells, or the first that it has."""
    alpha: float | None = None
    """The lora_alpha of a loralib file, which does not hold it."""
    rank: int | None = None
    """The r of a loralib file, to be checked."""
    fused: tuple[str, ...] = ()
    """The MergedLinears of a loralib file and their blocks: c_attn=101 for q and v."""
    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint of a run."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Cast the leaves to it."""
    overwrite: bool = False
    """Replace what is there."""


def run(argv: Sequence[str]) -> int:
    """Find out, show, and write."""
    options = parse(Convert, argv, "jaxlora convert")
    fields = dataclasses.asdict(options)
    request = Request(**{f.name: fields[f.name] for f in dataclasses.fields(Request)})
    name = detect(options.source)
    check(request, name)
    found = FORMS[name].read(request)  # type: ignore[misc]
    if options.dtype is not None:
        found = found._replace(adapter=_cast(found.adapter, options.dtype))
    _show(options, FORMS[name].what, found)
    target = FORMS[options.to].write(request, found)  # type: ignore[misc]
    files = [target] if target.is_file() else target.rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    show.line(f"{target}: {size / 1e3:,.1f} kB")
    if options.to == "loralib":
        spec = found.adapter.spec
        show.line(f"loralib's lora_alpha is {spec.config.alpha:g}, which the file does not hold")
    return 0


def _show(options: Convert, what: str, found: Found) -> None:
    spec = found.adapter.spec
    shapes = spec.leaf_shapes | spec.frozen_shapes
    count = sum(map(math.prod, shapes.values()))
    rows = {
        "from": f"{options.source}, {what}",
        "base": "none given" if found.base is None else found.base.name,
        "method": ", ".join(_method(spec)),
        "ranks": _counted(str(site.rank) for site in spec.sites),
        "scaling": _counted(f"{site.scaling:g}" for site in spec.sites),
        "kernels": _counted(_starred(site.path) for site in spec.sites),
        "in full": _counted(_starred(leaf.path) for leaf in spec.saved) or "nothing",
        "parameters": f"{count:,} of {jnp.dtype(spec.config.param_dtype).name}",
        "to": f"{options.target}, {FORMS[options.to].what}",
    }
    show.table("convert", ("what", "found"), rows.items())


def _method(spec: Spec) -> list[str]:
    """What is special about the sites, in words."""
    words = {
        "rsLoRA": spec.config.rslora,
        "DoRA": any(site.dora for site in spec.sites),
        f"{spec.config.init} start kept": any(site.keeps_start for site in spec.sites),
        "A frozen": any(site.freeze_a for site in spec.sites),
        "fused blocks": any(site.layout.blocks for site in spec.sites),
        "in weight space": any(site.weights for site in spec.sites),
        "rows of tables": any(leaf.rows for leaf in spec.saved),
    }
    return ["LoRA", *(word for word, there in words.items() if there)]


def _counted(values: Iterable[str]) -> str:
    """`8 (24), 4 (2)`."""
    return listing((f"{value} ({n})" for value, n in Counter(values).most_common()), 12)


def _starred(path: str) -> str:
    return re.sub(r"(?<=_)\d+(?=/)", "*", path)


def _cast(adapter: Adapter, dtype: str) -> Adapter:
    config = dataclasses.replace(adapter.spec.config, param_dtype=dtype)
    spec = dataclasses.replace(adapter.spec, config=config)
    return spec.adapter({p: x.astype(config.param_dtype) for p, x in adapter.values().items()})
