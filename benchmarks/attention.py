"""Block-sparse attention beside PyTorch's dense attention and FlexAttention, 64 wide heads, causal.

    python benchmarks/attention.py            # tables and a plot in docs/benchmarks
    python benchmarks/attention.py --quick    # 4,096 tokens and few rounds; nothing is written

The fraction of ideal is (dense time x share of the causal blocks that are chosen) / sparse time. Blocks are the diagonal and
random ones. XAttention is timed on the queries, keys and values of a layer of SmolLM2 on the King James Bible: its choice of
blocks, the attention over them, and both.
"""

import argparse
import random
from itertools import product

import side_by_side
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from formulary.evidence.timing import Timing, compare_times
from formulary.kernels import block_sparse
from formulary.kernels.block_sparse import block_sparse_attention

WIDTH, DENSITIES = 64, (0.05, 0.10, 0.25, 0.50)
SETTINGS = {4096: (8, 64, 15), 8192: (8, 128, 15), 16384: (8, 128, 7), 32768: (1, 128, 7)}  # tokens: heads, block, rounds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLEX_LENGTH = 8192
ABOVE_ONE = """A fraction above 1 means that dense SDPA does not reach what the processor gives; the column beside it compares with
our own kernel over all causal blocks instead, and so shows what sparsity itself costs."""


def row(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def header(*cells) -> list[str]:
    return [row(*cells), "|" + "---|" * len(cells)]


def chosen_blocks(heads: int, length: int, size: int, density: float) -> torch.Tensor:
    """(1, heads, N, N): in each head the diagonal, and random causal blocks up to the density."""
    count, draw = length // size, random.Random(0)
    earlier = [(i, j) for i in range(count) for j in range(i)]
    blocks = torch.eye(count, dtype=torch.bool).repeat(1, heads, 1, 1)
    more = max(0, round(density * count * (count + 1) / 2) - count)
    for head in range(heads):
        rows, columns = zip(*draw.sample(earlier, more))
        blocks[0, head, list(rows), list(columns)] = True
    return blocks


def share(blocks: torch.Tensor) -> float:
    """Of the causal blocks, how many are chosen."""
    count = blocks.shape[-1]
    return int(blocks.sum()) / (blocks.shape[1] * count * (count + 1) / 2)


def operations(blocks: torch.Tensor, size: int) -> float:
    """Additions and multiplications of the pairs that causal attention over these blocks sees."""
    diagonal = int(blocks.diagonal(dim1=2, dim2=3).sum())
    pairs = (int(blocks.sum()) - diagonal) * size * size + diagonal * size * (size + 1) / 2
    return 4 * WIDTH * pairs


def operands(heads: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, length, WIDTH, generator=generator).to(dtype) for _ in range(3)]


def of_ideal(timing: Timing, arm: str, density: float, dense: str = "dense") -> str:
    ratio = timing.ratio(arm, dense)
    middle, low, high = (density * speedup for speedup in ratio.speedup)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def speeds(name: str) -> list[str]:
    """What the machine gives: products of two 2,048 x 2,048 matrices."""
    left, right = (torch.randn(2048, 2048).to(DTYPES[name]) for _ in range(2))
    rate = 2 * 2048**3 / compare_times({"matmul": lambda: left @ right}, rounds=15).seconds("matmul") / 1e9
    return [f"{name}: {block_sparse.path(DTYPES[name])}; a product of matrices in PyTorch runs at {rate:.0f} GFLOP/s."]


def densities(name: str, length: int, quick: bool) -> tuple[list[str], list[tuple[float, float]]]:
    """A table's rows, and (density, fraction of ideal) for the plot."""
    heads, size, rounds = SETTINGS[length]
    query, key, value = operands(heads, length, DTYPES[name])
    chosen = {f"{density:.0%}": chosen_blocks(heads, length, size, density) for density in DENSITIES}
    chosen["all"] = torch.ones(1, heads, length // size, length // size, dtype=torch.bool).tril()
    works = {"dense": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True)}
    for label, blocks in chosen.items():
        works[label] = lambda blocks=blocks: block_sparse_attention(query, key, value, blocks, size, causal=True)
    timing = compare_times(works, rounds=6 if quick else rounds)
    rows, points = [], []
    rate = lambda arm, blocks: f"{operations(blocks, size) / timing.seconds(arm) / 1e9:.0f}"
    where = f"{name}, {length:,}, {heads} x {size}"
    rows.append(row(where, "PyTorch, dense", f"{1000 * timing.seconds('dense'):.1f}", "", "", rate("dense", chosen["all"])))
    for label, blocks in chosen.items():
        density = share(blocks)
        points.append((density, density * timing.ratio(label).speedup[0]))
        own = "" if label == "all" else of_ideal(timing, label, density, "all")
        ideal = of_ideal(timing, label, density)
        rows.append(row("", f"{density:.1%}", f"{1000 * timing.seconds(label):.1f}", ideal, own, rate(label, blocks)))
    return rows, points


def flex_mask(blocks: torch.Tensor, size: int) -> BlockMask:
    """The same blocks for FlexAttention, which tests single pairs in those of the diagonal only."""
    diagonal = torch.eye(blocks.shape[-1], dtype=torch.bool)
    pack = lambda x: (x.sum(-1, dtype=torch.int32), x.int().argsort(dim=-1, descending=True, stable=True).int())
    causal = lambda b, h, q, k: q >= k
    return BlockMask.from_kv_blocks(*pack(blocks & diagonal), *pack(blocks & ~diagonal), BLOCK_SIZE=size, mask_mod=causal)


def flex(name: str, length: int, quick: bool) -> list[str]:
    heads, size, _ = SETTINGS[length]
    query, key, value = operands(heads, length, DTYPES[name])
    compiled, rows = torch.compile(flex_attention), []
    for density in DENSITIES:
        blocks = chosen_blocks(heads, length, size, density)
        mask = flex_mask(blocks, size)
        ours = lambda: block_sparse_attention(query, key, value, blocks, size, causal=True)
        peer = lambda: compiled(query, key, value, block_mask=mask)
        with torch.no_grad():
            apart = float((ours().float() - peer().float()).abs().max())
            timing = compare_times({"ours": ours, "FlexAttention": peer}, rounds=6 if quick else 15)
        middle, low, high = timing.ratio("ours", "FlexAttention").speedup
        times = [f"{1000 * timing.seconds(arm):.1f}" for arm in ("FlexAttention", "ours")]
        rows.append(row(f"{name}, {share(blocks):.1%}", *times, f"{middle:.2f}x [{low:.2f}, {high:.2f}]", f"{apart:.1g}"))
    return rows


class Found(Exception):
    """What was looked for has been seen; the rest of the model need not run."""


def layer_of_smollm2(length: int, number: int = 8) -> list[torch.Tensor]:
    """Queries, keys and values of one layer, (1, 9, length, 64)."""
    from formulary import lab
    from formulary.contracts import parts
    from formulary.contracts.attention import Attention

    class Recorder(Attention):
        def attend(self, query, key, value, **_):
            self.seen = [query, key, value]
            raise Found

    model, tokenizer = lab.smollm2()
    layer = Recorder.attach(model, parts.mixers(model)[number].name).formulary_attention
    ids = tokenizer(" ".join(lab.kjv(split="test")), return_tensors="pt", verbose=False)["input_ids"][:, :length]
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    except Found:
        return layer.seen
    raise RuntimeError("the layer was not reached")


def xattention(name: str, given: list[torch.Tensor], quick: bool) -> list[str]:
    from formulary.papers.sequence_mixing.xattention import XAttention

    query, key, value = (x.to(DTYPES[name]) for x in given)
    rows, dense = [], lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True)
    exact = dense().float()
    for stride in (8, 16):
        method = XAttention(stride=stride)
        blocks, visible = method.select(query, key, causal=True)
        density = int(blocks.sum()) / int(visible.expand_as(blocks).sum())
        works = {
            "dense": dense,
            "choice": lambda: method.select(query, key, causal=True),
            "attention": lambda: block_sparse_attention(query, key, value, blocks, method.block_size, causal=True),
            "both": lambda: method.attend(query, key, value, causal=True),
        }
        with torch.no_grad():
            error = float((method.attend(query, key, value, causal=True).float() - exact).norm() / exact.norm())
            timing = compare_times(works, rounds=6 if quick else 9)
        middle, low, high = timing.ratio("both").speedup
        times = [f"{1000 * timing.seconds(arm):.1f}" for arm in works]
        fractions = [of_ideal(timing, arm, density) for arm in ("attention", "both")]
        faster = f"{middle:.2f}x [{low:.2f}, {high:.2f}]"
        rows.append(row(f"{name}, {stride}", f"{density:.1%}", *times, *fractions, faster, f"{error:.3f}"))
    return rows


def plot(points: dict[tuple[str, int], list[tuple[float, float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for (name, length), pairs in points.items():
        style = {"fp32": ("o-", "tab:blue"), "bf16": ("s-", "tab:orange")}[name]
        alpha, label = 0.3 + 0.7 * length / max(SETTINGS), f"{name}, {length:,} tokens"
        axes.plot(*zip(*pairs), style[0], color=style[1], alpha=alpha, label=label)
    axes.axhline(0.7, color="gray", linestyle=":")
    axes.set(xscale="log", xlabel="share of the causal blocks that are chosen", ylim=(0, None))
    axes.set_ylabel("fraction of ideal against dense SDPA")
    axes.legend(fontsize=8, ncol=2)
    figure.tight_layout()
    figure.savefig(side_by_side.DOCS / "attention.png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4,096 tokens and few rounds; nothing is written")
    parser.add_argument("--only", choices=["density", "flex", "xattention"], help="one section; nothing is written")
    parser.add_argument("--lengths", type=int, nargs="*", choices=list(SETTINGS), help="these lengths alone; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lengths = [4096] if options.quick else options.lengths or list(SETTINGS)
    flex_length = 4096 if options.quick else FLEX_LENGTH
    text = [f"# Attention: {__doc__.splitlines()[0]}", "", f"`python benchmarks/attention.py` on {side_by_side.machine()}.", ""]
    points: dict[tuple[str, int], list[tuple[float, float]]] = {}

    def section(title: str, columns: list[str], makes) -> None:
        lines = [f"## {title}", "", *header(*columns)]
        print("\n".join(lines), flush=True)
        for make in makes:
            made = make()
            print("\n".join(made), flush=True)
            lines.extend(made)
        text.extend([*lines, ""])

    def measured(name: str, length: int) -> list[str]:
        rows, points[name, length] = densities(name, length, options.quick)
        return rows

    for name in DTYPES:
        told = speeds(name)
        print(*told, sep="\n", flush=True)
        text += [*told, ""]
    if options.only in (None, "density"):
        columns = ["tokens, heads x block", "chosen", "ms", "of ideal against dense SDPA", "against our own kernel, dense"]
        columns += ["GFLOP/s"]
        section("Random blocks", columns, [lambda n=n, size=size: measured(n, size) for n, size in product(DTYPES, lengths)])
        text += [ABOVE_ONE, "", "![](attention.png)", ""]
    if options.only in (None, "flex"):
        columns = ["chosen", "FlexAttention, ms", "ours, ms", "ours is", "largest difference"]
        makes = [lambda n=n: flex(n, flex_length, options.quick) for n in DTYPES]
        section(f"FlexAttention, compiled, {flex_length:,} tokens", columns, makes)
    if options.only in (None, "xattention"):
        given = layer_of_smollm2(flex_length)
        columns = ["dtype, stride", "chosen", "dense SDPA, ms", "choice, ms", "attention, ms", "both, ms", "attention, of ideal",
                   "both, of ideal", "both, against dense", "relative error"]  # fmt: skip
        title = f"XAttention at threshold 0.9 on a layer of SmolLM2, {flex_length:,} tokens"
        section(title, columns, [lambda n=n: xattention(n, given, options.quick) for n in DTYPES])
    if not (options.quick or options.only or options.lengths):
        side_by_side.DOCS.mkdir(parents=True, exist_ok=True)
        plot(points)
        (side_by_side.DOCS / "attention.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
