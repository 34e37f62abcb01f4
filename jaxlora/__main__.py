"""`python -m jaxlora`: the command line."""

from jaxlora.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
