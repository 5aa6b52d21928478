"""Zero-cost proxies: figures of an untrained network that are said to tell how good it will be."""

from diswot.proxies.registry import PROXIES, compute, names

__all__ = ["PROXIES", "compute", "names"]
