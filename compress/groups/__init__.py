"""Which channels must be cut together, found by following every single channel."""

from compress.groups.network import Group, Layer, Network, Positions, Slice
from compress.groups.trace import trace

__all__ = ["Group", "Layer", "Network", "Positions", "Slice", "trace"]
