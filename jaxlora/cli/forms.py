"""The forms that an adapter has on disk: how each is told, read and written. One table, `FORMS`."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlora import models, runs
from jaxlora.adapter import Adapter
from jaxlora.checkpoint import load_adapter, save_adapter
from jaxlora.errors import CheckpointError, ConfigError, listing
from jaxlora.interop import loralib, loralib_state, peft, safetensors
from jaxlora.interop.peft_config import FILE as CONFIG
from jaxlora.interop.peft_config import read_config
from jaxlora.interop.tensors import PICKLE, SAFETENSORS, read_tensors
from jaxlora.merge import merge
from jaxlora.models import hub
from jaxlora.tasks import load_run
from jaxlora.tasks.base import pretrained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to read and write, and what a source does not tell: flags of `jaxlora convert`."""

    source: str
    target: str
    base: str | None = None
    head: str | None = None
    alpha: float | None = None
    rank: int | None = None
    fused: tuple[str, ...] = ()
    checkpoint: str = "best"
    overwrite: bool = False


class Base(NamedTuple):
    """The model that an adapter adapts."""

    name: str
    model: Any
    params: Any
    tokenizer: Any
    classes: list[str] | None = None


class Found(NamedTuple):
    """What a source holds; a form that needs no base may come without one."""

    adapter: Adapter
    base: Base | None

    def need(self, form: str) -> Base:
        """The base, or a ConfigError that says who needs it."""
        if self.base is None:
            raise ConfigError(
                f"base is None, expected the model: to write {form} it is needed. Pass --base."
            )
        return self.base


class Form(NamedTuple):
    """One form.

    Attributes:
      what: its name for people.
      detect: whether a path is of it; None for one that is only written.
      read: reads it.
      write: writes it; None for one that is only read.
      flags: the fields of a request that reading it uses.
    """

    what: str
    detect: Callable[[Path], bool] | None
    read: Callable[[Request], Found] | None
    write: Callable[[Request, Found], Path] | None
    flags: tuple[str, ...] = ()


def detect(source: str) -> str:
    """The name of the form that a source has.

    Raises:
      CheckpointError: it has none of them.
    """
    path = Path(source).expanduser()
    for name, form in FORMS.items():
        if form.detect is not None and form.detect(path):
            return name
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return "peft"  # an id of the hub
    known = "; ".join(form.what for form in FORMS.values() if form.read)
    there = listing(sorted(p.name for p in path.iterdir())) if path.is_dir() else ""
    holds = f"is a folder of {there or 'nothing'}" if path.is_dir() else "is a file of another kind"
    raise CheckpointError(
        f"{source} {holds if path.exists() else 'is not there'}, expected one of: {known}."
    )


def check(request: Request, name: str) -> None:
    """Raises ConfigError if a form has no use for a flag, or writing would remove the source."""
    form = FORMS[name]
    for field in dataclasses.fields(request):
        if field.name in ("source", "target", "overwrite", *form.flags):
            continue
        if getattr(request, field.name) != field.default:
            raise ConfigError(
                f"{field.name} is given, and {form.what} has no use for it, expected of its flags: "
                f"{', '.join(f'--{flag}' for flag in form.flags)}."
            )
    source, target = (Path(p).expanduser().absolute() for p in (request.source, request.target))
    if source.is_relative_to(target):
        raise ConfigError(f"{request.target} holds the source, expected another place to write.")
    if target.exists() and not request.overwrite:
        raise CheckpointError(
            f"{request.target} is there already, expected a new path. --overwrite replaces it."
        )


def _run(request: Request) -> Found:
    trained = load_run(request.source, request.checkpoint)
    classes: Any = list(getattr(trained.settings, "classes", ())) or None
    name = str(getattr(trained.settings, "model", request.source))
    return Found(
        trained.adapter, Base(name, trained.model, trained.params, trained.tokenizer, classes)
    )


def _native(load: Callable[..., Adapter]) -> Callable[[Request], Found]:
    """A reader of a form that holds the whole spec; a base is checked if it is given."""

    def read(request: Request) -> Found:
        adapter = load(request.source)
        if request.base is None:
            return Found(adapter, None)
        leaves = adapter.spec.saved
        base = _base(request, request.base, {leaf.path: leaf.shape for leaf in leaves}, -1)
        return Found(load(request.source, params=base.params), base)

    return read


def _peft(request: Request) -> Found:
    folder = hub.resolve(request.source, files=(CONFIG, SAFETENSORS, PICKLE), holds=CONFIG)
    config = read_config(folder)
    shapes = {name: x.shape for name, x in read_tensors(folder).items()}
    named = request.base or config.get("base_model_name_or_path")
    if not named:
        raise ConfigError(f"base is None, and {folder} names no base model. Pass --base.")
    heads = {"CAUSAL_LM": "lm", "SEQ_CLS": "classification", "TOKEN_CLS": "token"}
    base = _base(request, named, shapes, 0, heads.get(str(config.get("task_type"))))
    return Found(peft.load(folder, base.model, {"params": base.params}), base)


def _loralib(request: Request) -> Found:
    state = loralib_state.read(request.source)
    if request.base is None or request.alpha is None:
        lacking = "base" if request.base is None else "alpha"
        raise ConfigError(
            f"{lacking} is None, and a loralib file does not hold it. Pass --{lacking}."
        )
    shapes = {name: x.shape for name, x in state.whole.items()}
    base = _base(request, request.base, shapes, 0)
    adapter = loralib.load(
        request.source,
        base.model,
        {"params": base.params},
        alpha=request.alpha,
        rank=request.rank,
        fused=dict(map(_mask, request.fused)),
    )
    return Found(adapter, base)


def _mask(text: str) -> tuple[str, tuple[bool, ...]]:
    pattern, equals, mask = text.rpartition("=")
    if not equals or not re.fullmatch("[01]{2,}", mask):
        raise ConfigError(f"fused is {text!r}, expected LAYER=MASK such as c_attn=101.")
    return pattern, tuple(on == "1" for on in mask)


def _base(request: Request, name: str, shapes: Any, axis: int, head: str | None = None) -> Base:
    """Load the base; a head that the adapter brings has as many labels as there."""
    ends = r"(?:.*[./])?(?:classifier|score)(?:[./]out_proj)?[./](?:weight|kernel|bias)"
    labels = [shape[axis] for path, shape in shapes.items() if re.fullmatch(ends, path)]
    options: dict[str, Any] = {"head": request.head or head, "key": jax.random.key(0)}
    if labels:
        options |= {"num_labels": labels[0], "fresh_head": True}
    found = pretrained(name, **{k: x for k, x in options.items() if x is not None})
    return Base(name, *found)


def _save_orbax(request: Request, found: Found) -> Path:
    params = None if found.base is None else found.base.params
    return save_adapter(request.target, found.adapter, params=params, overwrite=request.overwrite)


def _save_safetensors(request: Request, found: Found) -> Path:
    params = None if found.base is None else found.base.params
    return safetensors.save(request.target, found.adapter, params, overwrite=request.overwrite)


def _save_peft(request: Request, found: Found, profile: str | None = None) -> Path:
    base = found.need("a folder of PEFT")
    return peft.save(
        request.target,
        found.adapter,
        base.model,
        base_model_name_or_path=base.name,
        profile=profile,
        overwrite=request.overwrite,
    )


def _save_vllm(request: Request, found: Found) -> Path:
    return _save_peft(request, found, "vllm")


def _save_loralib(request: Request, found: Found) -> Path:
    model = found.need("a loralib file").model
    return loralib.save(request.target, found.adapter, model, overwrite=request.overwrite)


def _save_merged(request: Request, found: Found) -> Path:
    base = found.need("a merged model")
    return models.save_pretrained(
        request.target,
        base.model,
        merge(base.params, found.adapter),
        tokenizer=base.tokenizer,
        labels=base.classes,
        overwrite=request.overwrite,
    )


def _starts(*starts: bytes) -> Callable[[Path], bool]:
    def detect(path: Path) -> bool:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(2).startswith(starts)

    return detect


def _holds(*names: str) -> Callable[[Path], bool]:
    return lambda path: all((path / name).is_file() for name in names)


_OF_MODEL = ("base", "head")
FORMS = {
    "run": Form("a training run", _holds(runs.CONFIG), _run, None, ("checkpoint",)),
    "orbax": Form(
        "an Orbax checkpoint",
        _holds("adapter/metadata"),
        _native(load_adapter),
        _save_orbax,
        _OF_MODEL,
    ),
    "peft": Form("a folder of PEFT", _holds(CONFIG), _peft, _save_peft, _OF_MODEL),
    "safetensors": Form(
        "bare safetensors",
        safetensors.is_adapter,
        _native(safetensors.load),
        _save_safetensors,
        _OF_MODEL,
    ),
    "loralib": Form(
        "a loralib file",
        _starts(b"PK", b"\x80\x02"),
        _loralib,
        _save_loralib,
        (*_OF_MODEL, "alpha", "rank", "fused"),
    ),
    "vllm": Form("a folder of PEFT that vLLM loads", None, None, _save_vllm),
    "merged-hf": Form("a Hugging Face folder with the update merged", None, None, _save_merged),
}
"""{name: form}, in the order in which a source is tried. A form is one entry."""
