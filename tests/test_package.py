"""The package as a whole: which module imports which, what an import costs, and the docstrings."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import jaxlora

ROOT = Path(jaxlora.__file__).parent
ORDER = [
    "errors",
    "backend",
    "hosts",
    "stopping",
    "whole",
    "tree",
    "config",
    "dispatch",
    "layout",
    "adapter",
    "quantize",
    "layers",
    "tokens",
    "branch",
    "dora",
    "fold",
    "apply",
    "finite",
    "sampling",
    "decode",
    "beam",
    "text",
    "generate",
    "discover",
    "initializers",
    "targets",
    "plan",
    "init",
    "eva",
    "merge",
    "weight_space",
    "joint",
    "about",
    "checkpoint",
    "train",
    "sharding",
    "algebra",
    "ranks",
    "rows",
    "batches",
    "metrics",
    "resume",
    "saver",
    "runs",
    "fit",
]
OPTIONAL = (
    "transformers",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "matplotlib",
    "rich",
    "tyro",
    "qwix",
    "grain",
    "yaml",
    "tensorboardX",
    "sklearn",
    "sacrebleu",
    "nltk",
    "rouge_score",
    "pycocoevalcap",
    "gguf",
)


def imported_names(name):
    """The full names of all that a module imports."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            package = node.module == "jaxlora"
            found |= {f"jaxlora.{a.name}" for a in node.names} if package else {node.module or ""}
    return found


def imported(name):
    """The names of the jaxlora modules that a module imports."""
    parts = [n.split(".") for n in imported_names(name)]
    return {n[1] for n in parts if n[0] == "jaxlora" and len(n) > 1}


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_modules_that_stand_before_it(name):
    assert imported(name) <= set(ORDER[: ORDER.index(name)])


def test_the_order_covers_the_core_and_the_last_ones_import_something():
    assert imported("__init__") <= set(ORDER)
    assert imported("train")
    assert imported("checkpoint") >= {"about", "adapter", "errors"}


def test_importing_jaxlora_imports_no_optional_dependency_and_says_nothing():
    # Flax itself imports rich; jaxlora is to add none of them to what its requirements import.
    code = (
        "import sys, jax, flax.linen, optax, orbax.checkpoint; "
        "config, modules = dict(jax.config.values), set(sys.modules); import jaxlora; "
        f"print([m for m in {OPTIONAL} if m in set(sys.modules) - modules], "
        "config == dict(jax.config.values))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[] True\n"
    assert run.stderr == ""


@pytest.mark.parametrize("name", ["__init__", *ORDER])
def test_the_core_imports_only_what_it_requires(name):
    outside = {n.split(".")[0] for n in imported_names(name)} - set(sys.stdlib_module_names)
    assert outside <= {"jaxlora", "jax", "flax", "optax", "orbax", "tensorstore", "numpy", "etils"}


PUBLIC = {name: value for name, value in vars(jaxlora).items() if not name.startswith("_")}
PUBLIC = {name: value for name, value in PUBLIC.items() if not inspect.ismodule(value)}


def test_every_name_of_the_api_is_public():
    promised = [
        "LoraConfig",
        "plan",
        "Plan",
        "lora_init",
        "Adapter",
        "lora_apply",
        "combine",
        "split",
        "lora_mask",
        "lora_optimizer",
        "merge",
        "unmerge",
        "summary",
        "save_adapter",
        "load_adapter",
        "TrainState",
        "make_train_step",
        "make_eval_step",
        "register",
        "Linear",
        "register_init",
        "LoraError",
    ]
    assert set(promised) <= set(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_has_a_docstring_of_its_own_and_types(name):
    value = PUBLIC[name]
    assert (value.__doc__ or "").strip().splitlines()[0].endswith((".", ":", "]"))
    assert not value.__doc__.startswith(f"{name}(")
    methods = (
        [m for n, m in vars(value).items() if inspect.isfunction(m) and not n.startswith("_")]
        if inspect.isclass(value)
        else [value]
    )
    for function in methods:
        assert function.__doc__
        hints = inspect.signature(function)
        assert hints.return_annotation is not inspect.Signature.empty
        typed = [p for p in hints.parameters.values() if p.name not in ("self", "cls")]
        assert all(p.annotation is not p.empty for p in typed)


def test_the_package_is_marked_as_typed():
    assert (ROOT / "py.typed").is_file()


MODULES = sorted(f"jaxlora.{m.name}" for m in pkgutil.iter_modules([str(ROOT)]) if m.name in ORDER)


@pytest.mark.parametrize("name", MODULES)
def test_every_example_in_a_docstring_runs(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted or ">>>" not in inspect.getsource(module)
