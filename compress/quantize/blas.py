"""How many threads the linear algebra of numpy and scipy takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from threadpoolctl import ThreadpoolController


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let products of matrices take one thread.

    Small ones gain nothing from more, and the threads that wait for the next one spin: of a small
    network that was a fifth of all the processor time that quantization took.
    """
    with ThreadpoolController().limit(limits=1, user_api="blas"):
        yield
