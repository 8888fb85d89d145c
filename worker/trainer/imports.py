"""Makes importing torch's libraries faster: it takes seconds, and every run waits for it."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_NO_COMPILER = "TORCHDYNAMO_DISABLE"


@contextmanager
def quickly() -> Iterator[None]:
    """Imports without looking for garbage among what is imported, which all stays, and without torch's compiler.

    While it is imported, bitsandbytes asks the compiler for the kernels of devices that have no others: that imports
    600 modules more. Whatever asks for the compiler after this block gets it.
    """
    chosen = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if chosen is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = chosen
