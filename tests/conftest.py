import os
import socket

import jax
import pytest

# Half of the time of the tests is LLVM's. XLA's own passes, which the tests of HLO read, all run.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def _here(address):
    """Whether an address is a path, or of this machine."""
    if not isinstance(address, tuple):
        return True
    host = address[0].decode() if isinstance(address[0], bytes) else address[0] or "localhost"
    return host in ("localhost", "::1", socket.gethostname()) or host.startswith("127.")


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    """A test that reaches out fails; what it starts as a process of its own is not seen."""
    with pytest.MonkeyPatch.context() as patch:

        def guard(owner, name, address_of):
            real = getattr(owner, name)

            def guarded(*args, **kwargs):
                if not _here(address_of(args)):
                    pytest.fail(
                        f"{name} to {address_of(args)}: tests use no network (NETWORK=1 lifts this)"
                    )
                return real(*args, **kwargs)

            patch.setattr(owner, name, guarded)

        if "NETWORK" not in os.environ:
            for name in ("connect", "connect_ex", "sendto"):
                guard(socket.socket, name, lambda args: args[-1])
            guard(socket, "getaddrinfo", lambda args: args[:2])
        yield
