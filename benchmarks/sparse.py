"""4x1 block-sparse int8 products beside oneDNN's dense ones and CSR, at the shapes of Transformers.

    python benchmarks/sparse.py            # a table and a plot in docs/benchmarks
    python benchmarks/sparse.py --quick    # one shape, few rounds; nothing is written

Shapes are the feed-forward and projection linears of BERT mini, base and large at 128 to 512 tokens (arXiv:2306.16601, section 4).
Dense float32 is oneDNN's product, its weight packed beforehand; dense int8 is our kernel for llm-int8, and oneDNN's product of
integers alone, which leaves rounding the input out. CSR is MKL's in float32, its input turned beforehand. Rounding the input is
part of our times. The fraction of ideal is (time of our dense int8 x share of weights left) / sparse time.
"""

import argparse
import warnings

import side_by_side
import torch

from formulary.evidence.timing import Timing, compare_times
from formulary.kernels import int8, sparse_int8
from formulary.papers.inference.intel_sparse_spmm_cpu.pruning import block_mask

SHAPES = [(256, 1024, 128), (1024, 256, 128), (768, 768, 256), (768, 3072, 256), (3072, 768, 256), (1024, 4096, 128), (4096, 1024, 512)]
SPARSITIES = (0.7, 0.8, 0.9)
TARGET = "4x1 80 %"


def row(*cells) -> str:
    return "| " + " | ".join(cells) + " |"


def works(inputs: int, outputs: int, tokens: int) -> dict:
    """Arm -> a function that multiplies the same input."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator) for size in ((tokens, inputs), (outputs, inputs), (outputs,)))
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    integers, turned = int8.plain_quantize(x, float("inf")).integers.view(torch.uint8) ^ 128, x.T.contiguous()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
    prepacked, zeros = torch.ops.onednn.qlinear_prepack(codes, None), torch.zeros(outputs, dtype=torch.long)
    qlinear = torch.ops.onednn.qlinear_pointwise
    made = {
        "dense fp32, oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""),
        "dense int8, oneDNN": lambda: qlinear(
            integers, 1.0, 128, prepacked, scale, zeros, bias, 1.0, 0, torch.float32, "none", [], "none"
        ),
        "dense int8, ours": lambda: int8.linear(x, codes, scale, bias, float("inf")),
    }
    for sparsity in SPARSITIES:
        keep = block_mask(weight, sparsity)
        blocks = sparse_int8.compress(codes * keep.repeat_interleave(4, 0), keep)
        made[f"4x1 {sparsity:.0%}".replace("%", " %")] = lambda blocks=blocks: sparse_int8.linear(x, *blocks, scale, bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR tensors beta
        matrix = (weight * block_mask(weight, 0.8, block=1)).to_sparse_csr()
    made["CSR fp32 80 %"] = lambda: matrix @ turned
    return made


def rows_of(shape: tuple[int, int, int], timing: Timing, names: list[str]) -> list[str]:
    inputs, outputs, tokens = shape
    rows, label = [], f"{inputs} to {outputs}, {tokens} tokens"
    for name in names:
        middle, low, high = timing.ratio(name, "dense fp32, oneDNN").speedup
        rate, ideal = 2 * inputs * outputs * tokens / timing.seconds(name) / 1e9, ""
        if name.startswith("4x1"):
            left = 1 - float(name.split()[1]) / 100
            parts = [left * speedup for speedup in timing.ratio(name, "dense int8, ours").speedup]
            ideal = "{:.2f} [{:.2f}, {:.2f}]".format(*parts)
        shown = f"**{name}**" if name == TARGET else name
        rows.append(row(label, shown, f"{1e6 * timing.seconds(name):.0f}", f"{middle:.2f}x [{low:.2f}, {high:.2f}]", ideal, f"{rate:.0f}"))
        label = ""
    return rows


def plot(found: dict) -> None:
    """Times as fast as oneDNN's dense float32 product, one group of bars a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in next(iter(found.values())).cpu if name != "dense fp32, oneDNN"]
    figure, axes = plt.subplots(figsize=(9, 3.8))
    for place, name in enumerate(names):
        speeds = [timing.ratio(name, "dense fp32, oneDNN").speedup for timing in found.values()]
        spread = [[middle - low for middle, low, _ in speeds], [high - middle for middle, _, high in speeds]]
        where = [group + 0.8 * place / len(names) for group in range(len(found))]
        axes.bar(where, [middle for middle, _, _ in speeds], 0.8 / len(names), yerr=spread, label=name)
    axes.axhline(2, color="gray", linestyle=":")
    axes.set_xticks([group + 0.35 for group in range(len(found))], [f"{i} to {o}\n{t} tokens" for i, o, t in found], fontsize=8)
    axes.set_ylabel("times dense fp32 (oneDNN)")
    axes.legend(fontsize=8, ncol=3)
    figure.tight_layout()
    figure.savefig(side_by_side.DOCS / "sparse.png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds; nothing is written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    head = ["shape", "", "us", "times dense fp32", "of ideal against our dense int8", "dense GOP/s"]
    lines = [row(*head), "|" + "---|" * len(head)]
    print(*lines, sep="\n", flush=True)
    found = {}
    with torch.no_grad():
        for shape in SHAPES[3:4] if quick else SHAPES:
            made = works(*shape)
            found[shape] = compare_times(made, rounds=6 if quick else 25)
            lines += (rows := rows_of(shape, found[shape], list(made)))
            print(*rows, sep="\n", flush=True)
    if quick:
        return
    side_by_side.DOCS.mkdir(parents=True, exist_ok=True)
    plot(found)
    about = " ".join(__doc__.split("\n\n")[2].split())
    said = f"`python benchmarks/sparse.py` on {side_by_side.machine()}; {sparse_int8.path()}."
    text = [f"# Sparse: {__doc__.splitlines()[0]}", "", said, "", about, "", *lines, "", "![](sparse.png)", ""]
    (side_by_side.DOCS / "sparse.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
