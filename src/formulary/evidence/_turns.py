"""Checks in processes of their own that compute side by side and time alone.

`computing` is held by any number of processes at once, `timing` by one while nobody computes: who wants to time waits until the
others have finished their step, and they start none before the times are taken. The two are locks on two files of a folder that
the processes were told of in the environment; without that, and where there are no such locks (Windows), nobody waits. A process
whose parent was killed stops before its next step.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FOLDER, PARENT = "FORMULARY_TURNS", "FORMULARY_TURNS_PARENT"
"""The environment variables that name the folder and the process that started all."""


def environment(folder: str) -> dict[str, str]:
    """What to tell the processes that take turns."""
    return {FOLDER: folder, PARENT: str(os.getpid())}


def supported() -> bool:
    """Whether this system has the locks."""
    return fcntl is not None


@contextmanager
def computing() -> Iterator[None]:
    """A step that may run beside those of other checks, but beside no timing."""
    with ExitStack() as held:
        with _locked("gate", shared=False):
            held.enter_context(_locked("step", shared=True))
        yield


@contextmanager
def timing() -> Iterator[None]:
    """A step beside which no other check does anything."""
    with _locked("gate", shared=False), _locked("step", shared=False):
        yield


@contextmanager
def _locked(name: str, shared: bool) -> Iterator[None]:
    folder = os.environ.get(FOLDER)
    if not folder or fcntl is None:
        yield
        return
    if os.getppid() != int(os.environ[PARENT]):
        raise KeyboardInterrupt
    with open(Path(folder, name), "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield  # closing the file gives the lock back, also where the process is killed
