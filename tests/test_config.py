"""LoraConfig: what it accepts, how it compares, and its JSON."""

import json
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.config import LoraConfig, covers, matches
from jaxlora.errors import ConfigError

INVALID = {
    "rank zero": ({"rank": 0}, r"rank is 0, expected an integer of at least 1"),
    "rank negative": ({"rank": -4}, r"rank is -4, expected an integer"),
    "rank fractional": ({"rank": 2.0}, r"rank is 2\.0, expected an integer"),
    "rank boolean": ({"rank": True}, r"rank is True, expected an integer"),
    "rank text": ({"rank": "8"}, r"rank is '8', expected an integer"),
    "rank none": ({"rank": None}, r"rank is None, expected an integer"),
    "alpha zero": ({"alpha": 0}, r"alpha is 0, expected a number greater than 0"),
    "alpha negative": ({"alpha": -1.0}, r"alpha is -1\.0, expected a number greater"),
    "alpha nan": ({"alpha": float("nan")}, r"alpha is nan, expected a number greater"),
    "alpha infinite": ({"alpha": float("inf")}, r"alpha is inf, expected a number greater"),
    "alpha boolean": ({"alpha": True}, r"alpha is True, expected a number greater"),
    "alpha text": ({"alpha": "16"}, r"alpha is '16', expected a number greater"),
    "dropout one": ({"dropout": 1.0}, r"dropout is 1\.0, expected a probability in \[0, 1\)"),
    "dropout negative": ({"dropout": -0.1}, r"dropout is -0\.1, expected a probability"),
    "dropout nan": ({"dropout": float("nan")}, r"dropout is nan, expected a probability"),
    "dropout boolean": ({"dropout": False}, r"dropout is False, expected a probability"),
    "dropout text": ({"dropout": "0.1"}, r"dropout is '0\.1', expected a probability"),
    "bias unknown": ({"bias": "some"}, r"bias is 'some', expected one of none, all, lora_only"),
    "rslora text": ({"rslora": "yes"}, r"rslora is 'yes', expected True or False"),
    "rslora number": ({"rslora": 1}, r"rslora is 1, expected True or False"),
    "targets empty": ({"targets": ()}, r"targets is empty, expected a pattern or 'all-linear'"),
    "targets number": ({"targets": 3}, r"targets is 3, expected a pattern or several"),
    "targets of numbers": ({"targets": [3]}, r"targets is \[3\], expected a pattern or several"),
    "targets no regex": ({"targets": "a(b"}, r"targets pattern 'a\(b' is no regular expression"),
    "exclude number": ({"exclude": 3}, r"exclude is 3, expected a pattern or several"),
    "exclude no regex": ({"exclude": "*"}, r"exclude pattern '\*' is no regular expression"),
    "modules_to_save none": ({"modules_to_save": None}, r"modules_to_save is None, expected a pat"),
    "modules_to_save no regex": (
        {"modules_to_save": ["["]},
        r"modules_to_save pattern '\[' is no regular expression",
    ),
    "rank_pattern value": (
        {"rank_pattern": {"query": 0}},
        r"rank_pattern\['query'\] is 0, expected an integer of at least 1",
    ),
    "rank_pattern list": ({"rank_pattern": ["query"]}, r"rank_pattern is \['query'\], expected a"),
    "rank_pattern number": ({"rank_pattern": 4}, r"rank_pattern is 4, expected a dict"),
    "rank_pattern no regex": (
        {"rank_pattern": {"(": 4}},
        r"rank_pattern pattern '\(' is no regular expression",
    ),
    "alpha_pattern value": (
        {"alpha_pattern": {"query": -2.0}},
        r"alpha_pattern\['query'\] is -2\.0, expected a number greater than 0",
    ),
    "alpha_pattern no regex": (
        {"alpha_pattern": {")": 4}},
        r"alpha_pattern pattern '\)' is no regular expression",
    ),
    "param_dtype integer": ({"param_dtype": jnp.int32}, r"param_dtype is int32, expected a float"),
    "param_dtype complex": ({"param_dtype": "complex64"}, r"param_dtype is complex64, expected"),
    "param_dtype unknown": ({"param_dtype": "float7"}, r"param_dtype is 'float7', expected a fl"),
}


@pytest.mark.parametrize(("fields", "message"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_value_is_a_config_error_that_names_it(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**fields)


def test_the_defaults_are_those_of_the_api():
    promised = {
        "rank": 8,
        "alpha": 16.0,
        "targets": ["all-linear"],
        "exclude": [],
        "dropout": 0.0,
        "modules_to_save": [],
        "bias": "none",
        "init": "kaiming",
        "rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "param_dtype": "float32",
    }
    assert LoraConfig().to_dict() | promised == LoraConfig().to_dict()


EQUAL = {
    "order of rank_pattern": (
        {"rank_pattern": {"query": 4, "value": 2}},
        {"rank_pattern": {"value": 2, "query": 4}},
    ),
    "order of alpha_pattern": (
        {"alpha_pattern": {"query": 4, "value": 2.0}},
        {"alpha_pattern": [("value", 2), ("query", 4.0)]},
    ),
    "a target and a list of one": ({"targets": "query"}, {"targets": ["query"]}),
    "order of targets": ({"targets": ["query", "value"]}, {"targets": ("value", "query")}),
    "targets twice": ({"targets": ["query", "query"]}, {"targets": {"query"}}),
    "exclude": ({"exclude": "head"}, {"exclude": ["head"]}),
    "modules_to_save": ({"modules_to_save": "head"}, {"modules_to_save": iter(["head"])}),
    "numpy numbers": (
        {"rank": np.int64(4), "alpha": np.float32(2), "dropout": np.float64(0.5)},
        {"rank": 4, "alpha": 2.0, "dropout": 0.5},
    ),
    "integer alpha": ({"alpha": 16}, {"alpha": 16.0}),
    "numpy boolean": ({"rslora": np.bool_(True)}, {"rslora": True}),
    "dtype": ({"param_dtype": jnp.bfloat16}, {"param_dtype": "bfloat16"}),
}


@pytest.mark.parametrize(("left", "right"), EQUAL.values(), ids=EQUAL.keys())
def test_configs_that_mean_the_same_are_one_key_of_a_jit_cache(left, right):
    left, right = LoraConfig(**left), LoraConfig(**right)
    assert left == right
    assert hash(left) == hash(right)
    traces = []

    def run(config):
        traces.append(config)
        return 0

    run = jax.jit(run, static_argnums=0)
    run(left)
    run(right)
    assert len(traces) == 1


DIFFERENT = {
    "rank": 9,
    "alpha": 17.0,
    "targets": "query",
    "exclude": "head",
    "dropout": 0.5,
    "modules_to_save": "head",
    "bias": "all",
    "init": "gaussian",
    "rslora": True,
    "rank_pattern": {"query": 4},
    "alpha_pattern": {"query": 4.0},
    "param_dtype": "bfloat16",
}


@pytest.mark.parametrize(("name", "value"), DIFFERENT.items(), ids=DIFFERENT.keys())
def test_a_field_that_differs_makes_another_config_and_survives_json(name, value):
    config = LoraConfig(**{name: value})
    assert config != LoraConfig()
    again = LoraConfig.from_json(config.to_json())
    assert again == config
    assert getattr(again, name) != getattr(LoraConfig(), name)


def test_a_config_is_frozen():
    with pytest.raises(AttributeError, match="cannot assign to field 'rank'"):
        LoraConfig().rank = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_a_config_takes_keywords_only():
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        LoraConfig(8)  # pyright: ignore[reportCallIssue]


words = st.text(string.ascii_lowercase + "/_", min_size=1, max_size=8)
positive = st.floats(0.001, 1e6)
configs = st.builds(
    LoraConfig,
    rank=st.integers(1, 10_000),
    alpha=positive,
    targets=st.one_of(words, st.lists(words, min_size=1, max_size=3)),
    exclude=st.lists(words, max_size=3),
    dropout=st.floats(0, 1, exclude_max=True),
    modules_to_save=st.lists(words, max_size=3),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    init=st.sampled_from(["kaiming", "gaussian", "mine"]),
    rslora=st.booleans(),
    rank_pattern=st.dictionaries(words, st.integers(1, 64), max_size=3),
    alpha_pattern=st.dictionaries(words, positive, max_size=3),
    param_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)


@settings(deadline=None, max_examples=100)
@given(configs)
def test_json_brings_back_an_equal_config(config):
    again = LoraConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_json() == config.to_json()
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(words, st.integers(1, 64), max_size=4), st.randoms())
def test_the_order_of_a_pattern_dict_never_matters(patterns, random):
    pairs = list(patterns.items())
    random.shuffle(pairs)
    left, right = LoraConfig(rank_pattern=patterns), LoraConfig(rank_pattern=dict(pairs))
    assert left == right
    assert hash(left) == hash(right)


def test_an_unknown_field_is_an_error_with_the_nearest_names():
    with pytest.raises(ConfigError, match=r"Unknown config field 'rnak'. Nearest: rank, "):
        LoraConfig.from_dict({"rnak": 4})


def test_text_that_is_no_json_is_an_error():
    with pytest.raises(ConfigError, match=r"The config is not JSON: Expecting property name"):
        LoraConfig.from_json("{rank: 4}")


def test_json_that_is_no_object_is_an_error():
    with pytest.raises(ConfigError, match=r"The config is a JSON list, expected an object"):
        LoraConfig.from_json("[4]")


def test_scaling_is_alpha_over_rank_or_over_its_root():
    assert LoraConfig().scaling(4, 8.0) == 2.0
    assert LoraConfig(rslora=True).scaling(4, 8.0) == 4.0


@pytest.mark.parametrize(
    ("pattern", "path", "matched"),
    [
        ("query", "encoder/layer_0/query", True),
        ("query", "query", True),
        ("query", "encoder/layer_0/not_query", False),
        ("query", "encoder/query/dense", False),
        ("attention/(query|value)", "encoder/attention/value", True),
        ("query|value", "encoder/value", True),
        ("layer_[0-3]/.*/query", "encoder/layer_3/self/query", True),
        ("layer_[0-3]/.*/query", "encoder/layer_4/self/query", False),
        ("layer_1", "encoder/layer_11", False),
    ],
)
def test_a_pattern_matches_the_end_of_a_path_in_full(pattern, path, matched):
    assert matches(pattern, path) is matched


@pytest.mark.parametrize(
    ("pattern", "path", "covered"),
    [
        ("head", "head/dense/kernel", True),
        ("model/head", "model/head/dense/kernel", True),
        ("dense", "head/dense/kernel", True),
        ("he", "head/dense/kernel", False),
        ("head/kernel", "head/dense/kernel", False),
    ],
)
def test_a_pattern_covers_all_in_the_scope_it_matches(pattern, path, covered):
    assert covers(pattern, path) is covered


def test_a_rank_beyond_every_float_is_an_error():
    with pytest.raises(ConfigError, match="rank is too large, expected at most 2147483647"):
        LoraConfig(rank=10**5000)
