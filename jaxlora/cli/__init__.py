"""The command `jaxlora`: one file a command."""

from jaxlora.cli.main import main as main
