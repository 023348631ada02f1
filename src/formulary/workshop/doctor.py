"""What this machine offers (threads, instruction sets, compiler, memory, lab models, network) and what that means for speed."""

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTRUCTIONS = ("amx_tile", "amx_int8", "amx_bf16", "avx512_vnni", "avx512_bf16", "avx512f", "avx2", "asimd", "asimddp", "i8mm", "bf16", "sve")


@dataclass
class Finding:
    """One line of the examination: what was looked at, what was found, what it means."""

    what: str
    found: str
    means: str


@dataclass
class Examination:
    """All findings."""

    findings: list[Finding]

    def as_dict(self) -> dict[str, Any]:
        return {"findings": [vars(f) for f in self.findings]}

    def __str__(self) -> str:
        return "\n".join(f"{f.what}: {f.found}\n    {f.means}" for f in self.findings)


def examine() -> Examination:
    """Look at the machine; nothing is changed and nothing is sent."""
    return Examination([_threads(), _instructions(), _compiler(), _memory(), _disk(), _torch(), _lab(), _extras(), _network()])


def _threads() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("threads", f"{cores} cores for this process", "formulary times on one thread, so that figures compare across machines")


def _instructions() -> Finding:
    flags = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.partition(":")[2].split())
                break
    except OSError:
        if platform.system() == "Darwin" and platform.machine() == "arm64":
            flags = {"asimd", "asimddp", "bf16", "i8mm"}
    has = [name for name in INSTRUCTIONS if name in flags]
    if "amx_int8" in has:
        means = "AMX: int8 and bf16 products run several times faster than fp32; bf16 is a baseline that a method must beat"
    elif {"avx512_vnni", "i8mm", "asimddp"} & set(has):
        means = "fast int8 products; bf16 gains little without avx512_bf16 or AMX"
    elif "avx2" in has or "asimd" in has:
        means = "no fast int8 or bf16: compression saves memory here more than time"
    else:
        means = "no vector instructions were recognized: expect no speed-up from low precision"
    return Finding("instruction sets", f"{platform.machine()}: {', '.join(has) or 'none recognized'}", means)


def _compiler() -> Finding:
    found = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    means = "torch.compile and native kernels can be built" if found else "torch.compile falls back; formulary's plain paths still work"
    return Finding("C++ compiler", found or "none", means)


def _memory() -> Finding:
    try:
        info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(info[key].split()[0]) / 1e6 for key in ("MemTotal", "MemAvailable"))
        return Finding("memory", f"{free:.1f} GB free of {total:.1f} GB", f"models of up to about {free / 10:.1f} B fp32 weights can be measured before and after")
    except (OSError, KeyError, ValueError):
        return Finding("memory", "unknown", "use --dry-run to see what a method needs")


def _disk() -> Finding:
    from formulary.files import cache_dir

    cache = cache_dir()
    free = shutil.disk_usage(cache).free / 1e9
    return Finding("cache", f"{free:.0f} GB free", "converted lab models and trained check models are kept there; it can be removed at any time")


def _torch() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("PyTorch", "not installed", "find and show work; check, use and compare need it: pip install torch")
    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ", no GPU"
    return Finding("PyTorch", f"{torch.__version__}{gpu}", "everything works on the CPU" if "no GPU" in gpu else "--device cuda uses the GPU")


def _lab() -> Finding:
    from formulary.lab import available

    have = available()
    ready = [name for name, state in have.items() if state is True]
    missing = [f"{name} ({state})" for name, state in have.items() if state is not True]
    means = "checks and the demo can run" if not missing else f"missing: {'; '.join(missing)}"
    return Finding("lab models", ", ".join(ready) or "none", means)


def _extras() -> Finding:
    from importlib.util import find_spec

    names = ("peft", "accelerate", "compressed_tensors", "onnx", "onnxruntime", "gguf")
    have = [name for name in names if find_spec(name)]
    return Finding("optional libraries", ", ".join(have) or "none", "used for file formats and comparisons only")


def _network() -> Finding:
    """Whether a hub could be asked, judged without asking: offline settings, else a name look-up with a short limit."""
    import socket

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes"):
        return Finding("network", "off (HF_HUB_OFFLINE)", "hub ids cannot be used; directories and lab models can")
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(2)
        socket.getaddrinfo("huggingface.co", 443)
        return Finding("network", "the hub's name resolves", "hub ids can be tried as models")
    except OSError:
        return Finding("network", "the hub is not reachable", "hub ids cannot be used; directories and lab models can")
    finally:
        socket.setdefaulttimeout(before)
