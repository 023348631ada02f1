"""Peak memory, as the high-water mark of a fresh process.

A process's own `ru_maxrss` never falls and, after a fork, starts at its parent's; so what is measured runs in a process
of its own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from formulary.errors import FormularyError, UsageError

_FUNCTION = """
import importlib, json, sys
from formulary.evidence.memory import high_water_mark
module, name, arguments, answer = sys.argv[1:]
getattr(importlib.import_module(module), name)(*json.loads(arguments))
open(answer, "w").write(str(high_water_mark()))
"""

_COMMAND = """
import os, sys
answer, *command = sys.argv[1:]
pid = os.spawnvp(os.P_NOWAIT, command[0], command)
_, status, usage = os.wait4(pid, 0)
with open(answer, "w") as file:
    file.write(str(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)))
code = os.waitstatus_to_exitcode(status)
sys.exit(code if code >= 0 else 128 - code)
"""


def high_water_mark() -> int:
    """Peak resident bytes of this process: `VmHWM` where there is a /proc (exact from its exec on).

    Elsewhere `ru_maxrss`.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory_of(function: str, arguments: Sequence[object] = (), *, timeout: int | float | None = None) -> int:
    """Peak bytes of a fresh Python that imports `function` ("package.module:name") and calls it with JSON `arguments`.

    The interpreter and its imports are counted. Raises FormularyError with the call's last line of error if it fails,
    UsageError for a name without ":".

    >>> peak_memory_of("builtins:bytearray", [100_000_000]) > 100_000_000
    True
    """
    module, _, name = function.partition(":")
    if not name:
        raise UsageError(f"{function!r} names no function; write it as package.module:name")
    return _peak(
        [sys.executable, "-c", _FUNCTION, module, name, json.dumps(list(arguments))], timeout, answer_last=True
    )


def peak_memory(argv: Sequence[str], *, timeout: int | float | None = None) -> int:
    """Peak bytes of a command, the largest single process of it.

    The command is started by a tiny helper that reads the kernel's high-water mark when it ends (the same counter as
    VmHWM, which is gone from /proc by then); the helper's own few megabytes are the least that can be read. Raises
    FormularyError if the command fails, UsageError if there is none.

    >>> peak_memory([sys.executable, "-c", "bytearray(100_000_000)"]) > 100_000_000
    True
    """
    if not argv:
        raise UsageError("peak_memory() needs a command")
    if shutil.which(argv[0]) is None:
        raise UsageError(f"there is no command {argv[0]!r}")
    return _peak([sys.executable, "-I", "-S", "-c", _COMMAND, *argv], timeout, answer_last=False)


def _peak(command: list[str], timeout: int | float | None, answer_last: bool) -> int:
    with tempfile.TemporaryDirectory() as folder:
        answer = os.path.join(folder, "peak")
        at = len(command) if answer_last else 5
        process = subprocess.Popen(
            [*command[:at], answer, *command[at:]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        try:
            _, stderr = process.communicate(timeout=timeout)
        except BaseException as stopped:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(stopped, subprocess.TimeoutExpired):
                raise FormularyError(
                    f"the measured process was still running after {timeout:g} s and was stopped"
                ) from None
            raise
        if process.returncode or not os.path.exists(answer):
            said = stderr.strip().splitlines() or ["it said nothing"]
            raise FormularyError(f"the measured process ended with code {process.returncode}: {said[-1]}")
        return int(Path(answer).read_text())
