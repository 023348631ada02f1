"""Recurrent mixers at 2,048 tokens, forward and backward, beside transformers' Mamba and Mamba-2; growth to 65,536 tokens.

    python benchmarks/scans.py                    # four tables and plots in docs/benchmarks
    python benchmarks/scans.py --section growth   # one of them; the others stay as they are

Mixers of equal state are whole layers with their projections, `as is` at a small width only: transformers' loop over tokens
indexes tensors of all tokens, so that its backward pass is quadratic. `unbound` is the same loop with the tensors taken apart
once, the fair rival. Scans alone compute one function, Mamba-2's; outputs are compared before anything is timed.
"""

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import side_by_side

LENGTH, WIDTH, NARROW, STATE = 2048, 768, 32, 16
OURS, PLAIN = "formulary", "formulary without C++"
AS_IS, UNBOUND, MAMBA2 = "Mamba, transformers as is", "Mamba, the same loop unbound", "Mamba-2, transformers"
PEAK, BYTES = "limit: operations at peak", "limit: bytes once"
HEADS, KEYS, VALUES = 24, 16, 64  # of the scans alone: Mamba-2's heads at WIDTH, with STATE numbers a channel
LENGTHS = [2048 * 2**n for n in range(6)]
SDPA = "SDPA, causal"


# ---------------------------------------------------------------- layers


def gla(width: int, native: bool = True):
    from formulary.kernels import scan
    from formulary.papers.sequence_mixing.gla import GatedLinearAttention

    if not native:
        scan._library = lambda: None
    wide = {"heads": 12} if width == WIDTH else {"heads": 1, "expand_k": 1.0}
    layer = GatedLinearAttention(width, **wide)
    return layer, layer.state_size(LENGTH)


def mamba(width: int, unbound: bool):
    from transformers import MambaConfig
    from transformers.models.mamba import modeling_mamba

    if unbound:
        modeling_mamba.mamba_selective_scan = unbound_scan
    layer = modeling_mamba.MambaMixer(MambaConfig(hidden_size=width, state_size=STATE, num_hidden_layers=1), 0)
    return layer, 2 * width * STATE


def unbound_scan(x, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **_):
    """transformers' loop, with tensors taken apart once instead of indexed at every token."""
    import torch
    from torch.nn import functional as F

    dt = dt + delta_bias[..., None] if delta_bias is not None else dt
    dt = F.softplus(dt) if delta_softplus else dt
    decay = torch.exp(A[None, :, None] * dt[..., None])
    added = dt[..., None] * B.mT[:, None] * x[..., None]
    state, outputs = torch.zeros_like(added[:, :, 0]), []
    for a, u, c in zip(decay.unbind(2), added.unbind(2), C.unbind(2)):
        state = a * state + u
        outputs.append((state @ c.unsqueeze(-1)).squeeze(-1))
    out = torch.stack(outputs, -1)
    out = out if D is None else out + x * D[None, :, None]
    out = out if z is None else out * F.silu(z)
    return (out, state) if return_last_state else out


def mamba2(width: int):
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    sizes = {"num_heads": 2 * width // 64, "head_dim": 64, "state_size": STATE, "n_groups": 1}
    return Mamba2Mixer(Mamba2Config(hidden_size=width, num_hidden_layers=1, **sizes), 0), 2 * width * STATE


def layer_arm(make, width: int):
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer, state = make()
    x = torch.randn(1, LENGTH, width, requires_grad=True)

    def work():
        layer.zero_grad()
        layer(x).square().mean().backward()

    return work, {"state": state}


# ---------------------------------------------------------------- scans alone


def scan_operands():
    """Mamba-2's own operands: inputs, steps, rates of decay, and keys and queries that all heads share."""
    import torch

    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=draw)
    x, b, c = normal(1, LENGTH, HEADS, VALUES), normal(1, LENGTH, 1, KEYS), normal(1, LENGTH, 1, KEYS)
    step, rate = torch.rand(1, LENGTH, HEADS, generator=draw) * 0.1, -torch.rand(HEADS, generator=draw) * 15
    return [t.requires_grad_() for t in (x, step, rate, b, c)], normal(1, LENGTH, HEADS, VALUES)


def theirs(x, step, rate, b, c):
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return mamba2_chunk_scan(x, step, rate, b, c, chunk_size=256)


def ours(x, step, rate, b, c):
    from formulary.kernels.scan import scan

    heads = lambda t: t.expand(-1, -1, HEADS, -1).transpose(1, 2)
    out, _ = scan(heads(c), heads(b), (x * step[..., None]).transpose(1, 2), (rate * step).transpose(1, 2)[..., None])
    return out.transpose(1, 2)


def scan_arm(form, native: bool = True):
    import torch

    from formulary.kernels import scan

    if not native:
        scan._library = lambda: None
    given, weights = scan_operands()
    with torch.no_grad():
        torch.testing.assert_close(form(*given), theirs(*given), atol=1e-3, rtol=1e-3)
    return (lambda: torch.autograd.grad(form(*given), given, weights)), {"state": HEADS * KEYS * VALUES}


def peak_arm():
    """As many operations as the recurrence has: 5 a number of the state and token forward, 12 backward."""
    from formulary.kernels.native import compiler

    source = """typedef float v16 __attribute__((vector_size(64)));
    extern "C" float turn(long n) {
        v16 a[16];
        const v16 m = v16{} + 0.999f, c = v16{} + 1e-3f;
        _Pragma("GCC unroll 16") for (int j = 0; j < 16; ++j) a[j] = v16{} + 1e-3f * j;
        for (long i = 0; i < n; ++i) { _Pragma("GCC unroll 16") for (int j = 0; j < 16; ++j) a[j] = a[j] * m + c; }
        v16 s = {};
        _Pragma("GCC unroll 16") for (int j = 0; j < 16; ++j) s += a[j];
        return s[0];
    }"""
    with tempfile.TemporaryDirectory() as directory:
        code, made = Path(directory) / "peak.cpp", Path(directory) / "peak.so"
        code.write_text(source)
        subprocess.run([compiler(), "-O3", "-march=native", "-shared", "-fPIC", str(code), "-o", str(made)], check=True)
        turn = ctypes.CDLL(str(made)).turn
    turn.argtypes, turn.restype = [ctypes.c_long], ctypes.c_float
    count = 17 * KEYS * VALUES * HEADS * LENGTH // (16 * 16 * 2)
    return (lambda: turn(count)), {}


def bytes_arm():
    """What both passes must read and write, once: operands, outputs and gradients, with keys and queries shared by heads."""
    import torch

    torch.set_num_threads(1)
    read = torch.ones(LENGTH * (3 * HEADS * VALUES + 2 * HEADS + 4 * KEYS))  # forward x, decay, k, q; backward the same and d_out
    written = torch.empty(LENGTH * (2 * HEADS * VALUES + HEADS + 2 * KEYS))
    return (lambda: (read.sum(), written.fill_(1.0))), {}


# ---------------------------------------------------------------- growth


def grown(name: str, length: int) -> dict:
    """Seconds of CPU forward alone and with backward, and MB, of mixing by one head of 64 x 64."""
    import torch
    from torch.nn import functional as F

    from formulary.kernels.scan import scan

    torch.set_num_threads(1)

    def operands(length):
        draw = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 1, length, 64, generator=draw).requires_grad_() for _ in range(3))
        return q, k * 0.125, v, (F.logsigmoid(torch.randn(1, 1, length, 64, generator=draw)) / 16).requires_grad_()

    def mix(q, k, v, g):
        return scan(q, k, v, g)[0] if name == OURS else F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(given):
        with torch.no_grad():
            mix(*given)

    def both(given):
        torch.autograd.grad(mix(*given), given[:3], torch.ones_like(given[2]))

    both(operands(256))
    forward(operands(256))
    given = operands(length)
    found = {"MB": peak_memory(lambda: both(given))}
    for pass_name, work in (("forward", forward), ("both", both)):
        taken = []
        while len(taken) < 9 and sum(taken) < 0.8:
            start = time.process_time()
            work(given)
            taken.append(time.process_time() - start)
        found[pass_name] = float(np.median(taken))
    return found


def peak_memory(work) -> float:
    """MB that `work` needs at most beyond what the process holds before; memory freed earlier is given back first."""

    def status(name):
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def growth() -> str:
    found = {name: {} for name in (OURS, SDPA)}
    for length in LENGTHS:
        for name in found:
            command = [sys.executable, __file__, "--grown", name, str(length)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **side_by_side.ONE})
            found[name][length] = json.loads(done.stdout.splitlines()[-1])
            print(name, length, found[name][length], file=sys.stderr)
    line = lambda *cells: "| " + " | ".join(cells) + " |"
    columns = [(name, what) for name in found for what in ("forward", "both")]
    heads = [f"{name}, {'forward' if what == 'forward' else 'and backward'}" for name, what in columns]
    rows = [line("tokens", *heads, *(f"{name}, MB more" for name in found)), "|---" * (len(columns) + 3) + "|"]
    for length in LENGTHS:
        times = [f"{1e6 * found[name][length][what] / length:.3g}" for name, what in columns]
        rows.append(line(f"{length:,}", *times, *(f"{found[name][length]['MB']:.0f}" for name in found)))
    draw_growth(found)
    said = "Microseconds of CPU a token, and memory that forward and backward need beyond the operands; a process each."
    return said + "\n\n" + "\n".join(rows)


def draw_growth(found: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, color in ((OURS, "tab:orange"), (SDPA, "tab:blue")):
        for what, style in (("forward", "--"), ("both", "-")):
            label = name + (", forward" if what == "forward" else ", forward and backward")
            axes.plot(LENGTHS, [1e6 * found[name][n][what] / n for n in LENGTHS], style, marker="o", color=color, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds of CPU a token, one head of 64 x 64")
    axes.legend()
    figure.tight_layout()
    figure.savefig(side_by_side.DOCS / "scans-growth.png", dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------- the page

ARMS = {
    "layer": {
        OURS: lambda: layer_arm(lambda: gla(WIDTH), WIDTH),
        PLAIN: lambda: layer_arm(lambda: gla(WIDTH, native=False), WIDTH),
        MAMBA2: lambda: layer_arm(lambda: mamba2(WIDTH), WIDTH),
        UNBOUND: lambda: layer_arm(lambda: mamba(WIDTH, unbound=True), WIDTH),
    },
    "narrow": {
        OURS: lambda: layer_arm(lambda: gla(NARROW), NARROW),
        UNBOUND: lambda: layer_arm(lambda: mamba(NARROW, unbound=True), NARROW),
        AS_IS: lambda: layer_arm(lambda: mamba(NARROW, unbound=False), NARROW),
    },
    "alone": {
        OURS: lambda: scan_arm(ours),
        PLAIN: lambda: scan_arm(ours, native=False),
        MAMBA2: lambda: scan_arm(theirs),
        PEAK: peak_arm,
        BYTES: bytes_arm,
    },
}
TITLES = {
    "layer": f"Layers of equal state, width {WIDTH}",
    "narrow": f"Layers of equal state, width {NARROW}",
    "alone": f"The scan alone, {HEADS} heads of {KEYS} x {VALUES}, a gate a head",
    "growth": "Growth of the mixing alone, one head of 64 x 64",
}


def compared(section: str, rounds: int) -> str:
    found = side_by_side.measure(__file__, [f"{section}: {name}" for name in ARMS[section]], rounds)
    found = {name.partition(": ")[2]: one for name, one in found.items()}
    side_by_side.plot(found, OURS, LENGTH, "tokens", side_by_side.DOCS / f"scans-{section}.png")
    return side_by_side.table(found, OURS, LENGTH, "tokens", {"state": "numbers of state"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--grown", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--section", nargs="*", choices=list(TITLES), default=list(TITLES))
    options = parser.parse_args()
    if options.arm:
        section, _, name = options.arm.partition(": ")
        return side_by_side.serve(ARMS[section][name])
    if options.grown:
        return print(json.dumps(grown(options.grown[0], int(options.grown[1]))))
    side_by_side.DOCS.mkdir(parents=True, exist_ok=True)
    page = side_by_side.DOCS / "scans.md"
    kept = dict(re.findall(r"^## (.*?)\n\n(.*?)(?=\n## |\Z)", page.read_text() if page.exists() else "", re.M | re.S))
    for section in options.section:
        shown = growth() if section == "growth" else compared(section, options.rounds)
        print(shown, flush=True)
        kept[TITLES[section]] = f"{shown}\n\n![](scans-{section}.png)\n"
        head = f"# Scans: {__doc__.splitlines()[0]}\n\n`python benchmarks/scans.py` on {side_by_side.machine()}.\n\n"
        page.write_text(head + "\n".join(f"## {title}\n\n{kept[title]}" for title in TITLES.values() if title in kept))


if __name__ == "__main__":
    main()
