"""Modules that are functions as well: ``compress.evaluate`` and ``compress.prune`` are both."""

from __future__ import annotations

import sys
import types
from typing import Any


class _CallableModule(types.ModuleType):
    """A module whose call is that of the function it names in ``__calls__``."""

    __calls__: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__calls__)(*args, **kwargs)


def make_callable(module: str, function: str) -> None:
    """Let a call of ``module`` be one of its ``function``; everything else stays as it is.

    Args:
        module: Its ``__name__``; it must have been imported.
        function: A name in it.
    """
    found: Any = sys.modules[module]
    found.__class__ = _CallableModule
    found.__calls__ = function
