"""Adapters from and to other libraries' forms."""
