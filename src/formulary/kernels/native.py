"""C++ beside a kernel, compiled at first use with the machine's own compiler and kept in the cache.

Without a compiler, or where one fails, `library` is None and the caller takes its plain path; `why_not` says why.
The file's name holds a hash of the source and the headers beside it, the compiler and the processor's features: another machine that shares the
cache makes its own. `FORMULARY_NATIVE=0` turns native code off.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from formulary.files import cache_dir

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_WHY: dict[str, str] = {}


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `kernels/<name>.cpp`, or None.

    >>> library("no_such_source") is None
    True
    """
    try:
        return ctypes.CDLL(str(_compiled(Path(__file__).with_name(f"{name}.cpp"))))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _WHY[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None


def why_not(name: str) -> str:
    """Why `library(name)` is None, in one line; empty when it is there.

    >>> "no_such_source" in why_not("no_such_source")
    True
    """
    return "" if library(name) else _WHY.get(name, "")


def compiler() -> str | None:
    """The C++ compiler that would be used: `$CXX`, else the first of c++, g++ and clang++ on the path."""
    return next((path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))), None)


def _compiled(source: Path) -> Path:
    if os.environ.get("FORMULARY_NATIVE") == "0":
        raise RuntimeError("native code is turned off by FORMULARY_NATIVE=0")
    text = b"".join(path.read_bytes() for path in [source, *sorted(source.parent.glob("*.hpp"))])
    found = compiler()
    if found is None:
        raise RuntimeError("no C++ compiler is on the path")
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    flags = [tune, *FLAGS]
    openmp = _openmp()
    key = hashlib.sha256(b"\0".join([text, found.encode(), _processor(), *map(str.encode, flags + openmp)])).hexdigest()
    target = cache_dir("native") / f"{source.stem}-{key[:20]}.so"
    if not target.exists():
        handle, beside = tempfile.mkstemp(suffix=".so", dir=target.parent)
        os.close(handle)
        try:
            for extra in (openmp, []):
                command = [found, *flags, str(source), "-o", beside, *extra]
                done = subprocess.run(command, capture_output=True, text=True, timeout=120)
                if not done.returncode:
                    break
            else:
                raise RuntimeError(f"{found} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
            os.replace(beside, target)
        finally:
            Path(beside).unlink(missing_ok=True)
    return target


def _openmp() -> list[str]:
    """Flags that make loops parallel on torch's own OpenMP, so that `torch.set_num_threads` holds and one thread pool
    exists.
    """
    import torch

    here = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ["-fopenmp", "-nodefaultlibs", str(here[0]), "-lstdc++", "-lm", "-lc", "-lgcc_s", "-lgcc"] if here else []


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})).encode()
