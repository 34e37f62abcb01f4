import os

import jax
import pytest

# Half of the time of the tests is LLVM's. XLA's own passes, which the tests of HLO read, all run.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield
