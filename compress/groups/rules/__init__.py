"""What each op does to the labels of its inputs; an op without a rule freezes what it touches."""

from compress.groups.rules import layout, linear, moving, values

__all__ = ["layout", "linear", "moving", "values"]
