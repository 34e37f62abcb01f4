"""Used ranks: the singular values of updates whose rank is known."""

import numpy as np
import pytest

import jaxlora as jl
from jaxlora import algebra
from jaxlora.ranks import used_ranks
from tests.test_properties import fresh, trained
from tests.zoo import CASES


def test_a_doubled_update_uses_half_its_rank(tmp_path):
    _, adapter = fresh(CASES["mlp"])
    adapter = trained(adapter)
    ranks = used_ranks(algebra.add(adapter, adapter), energy=0.9999)
    assert [(row.path, row.rank, row.used) for row in ranks.rows] == [
        ("down/kernel", 4, 2),
        ("up/kernel", 4, 2),
    ]
    for row in ranks.rows:
        full = 2 * algebra.delta(adapter)[row.path]
        np.testing.assert_allclose(row.norm, np.linalg.norm(full), 1e-5)
        assert 1 <= row.effective <= 2
    lines = str(ranks).splitlines()
    assert lines[1].split()[:3] == ["down/kernel", "4", "2"]
    assert lines[1].endswith("#" * 10)
    assert ranks.plot(tmp_path / "ranks.png").stat().st_size > 1000


def test_slices_and_blocks_have_rows_of_their_own():
    _, adapter = fresh(CASES["fused"])
    paths = [row.path for row in used_ranks(trained(adapter)).rows]
    assert paths[:4] == ["axis/kernel[0]", "axis/kernel[1]", "c_attn/kernel[0]", "c_attn/kernel[1]"]
    assert paths[4:] == [f"layers/gate_up/kernel[{n}]" for n in range(3)]


def test_an_energy_out_of_range_is_an_error():
    with pytest.raises(jl.LoraError, match=r"energy is 0, expected a share in \(0, 1\]"):
        used_ranks(fresh(CASES["mlp"])[1], energy=0)
