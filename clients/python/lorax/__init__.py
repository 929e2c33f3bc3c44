"""Python client of a LoRAX server."""

from lorax.client import AsyncClient, Client, MergedAdapters

__all__ = ["AsyncClient", "Client", "MergedAdapters", "__version__"]

__version__ = "0.8.0"
