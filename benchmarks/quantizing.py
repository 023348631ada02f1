"""GPTQ on SmolLM2-135M: seconds to quantize beside llm-compressor and GPTQModel, and held-out loss beside rounding to nearest.

    python benchmarks/quantizing.py --peers PYTHON      # tables and plots in docs/benchmarks

All quantize the linears in the blocks on the same 16 texts of 512 tokens in batches of 4, an asymmetric grid in groups of 64,
damping 0.01, columns in order, every linear of a block calibrated in one pass; once from a model in float32 and once in bfloat16,
in which the peers are faster. Ours multiplies in bfloat16 for both. Held out are 12 other texts, judged in float32.
llm-compressor takes its grid from the weight before compensation, the others from the weight so far. The peers pin other versions
of transformers than formulary does, so PYTHON is an environment of their own (`make bench` makes it). One thread, CPU time.
GPTQModel's loss is that of the files it saves, read here: what it leaves in memory is no model that computes.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = "formulary"
CALIBRATION, HELD_OUT, LENGTH, BATCH, GROUP, DAMP = 16, 12, 512, 4, 64, 0.01


BITS, DTYPES = (4, 3), ("float32", "bfloat16")


# ---------------------------------------------------------------- arms, each in a process of its own: (model, seconds)


def clock(work) -> tuple[object, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    made = work()
    return made, {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def loaded(task: dict):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(task["model"], dtype=getattr(torch, task["dtype"]))


def formulary_arm(task: dict):
    import torch

    from formulary.contracts import Data
    from formulary.papers.quantization.gptq import GPTQ

    data = Data([{"input_ids": torch.tensor(ids)} for ids in task["calibration"]], batch_size=BATCH)
    model, method = loaded(task), GPTQ(bits=task["bits"], group_size=GROUP, damp=DAMP)
    return clock(lambda: method.apply(model, data)[0])


def nearest_arm(task: dict):
    import torch

    from formulary.contracts import parts
    from formulary.papers.quantization._parts import Grid, round_to_nearest

    model, grid = loaded(task), Grid(task["bits"], GROUP)

    @torch.no_grad()
    def work():
        for part in parts.linears(model):
            part.raw.copy_(part.stored(round_to_nearest(part.weight(), grid, part.raw.dtype).dense(grid)))
        return model

    return clock(work)


def llm_compressor_arm(task: dict):
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    rows = task["calibration"]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * LENGTH for _ in rows]})
    weights = {"num_bits": task["bits"], "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
    recipe = GPTQModifier(
        config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"], actorder=None, dampening_frac=DAMP
    )
    model = loaded(task)
    given = {"max_seq_length": LENGTH, "num_calibration_samples": len(rows), "batch_size": BATCH, "pipeline": "sequential"}
    return clock(lambda: (oneshot(model=model, dataset=data, recipe=recipe, **given), model)[1])


def gptqmodel_arm(task: dict):
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores its default of one is refused by its own thread pool
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=task["bits"], group_size=GROUP, sym=False, desc_act=False, act_group_aware=False, damp_percent=DAMP,
        true_sequential=False, offload_to_disk=False, device="cpu",
    )  # fmt: skip
    model = GPTQModel.load(task["model"], config, dtype=getattr(torch, task["dtype"]))
    torch.set_num_threads(1)
    rows = [{"input_ids": ids, "attention_mask": [1] * LENGTH} for ids in task["calibration"]]
    _, seconds = clock(lambda: model.quantize(rows, batch_size=BATCH))
    with tempfile.TemporaryDirectory() as directory:
        model.save(directory)
        return from_gptq_files(task, Path(directory)), seconds


def from_gptq_files(task: dict, directory: Path):
    """The model with the weights that a directory in GPTQ's format stands for: scale (code - zero), where zero - 1 is stored."""
    import torch
    from safetensors.torch import load_file

    model, bits = loaded({**task, "dtype": "float32"}), task["bits"]
    if json.loads((directory / "quantize_config.json").read_text()).get("checkpoint_format", "gptq") != "gptq":
        raise RuntimeError("GPTQModel saved another format than gptq")
    state = {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}
    filled = 0
    for name, module in model.named_modules():
        if f"{name}.qweight" not in state:
            continue
        qweight, qzeros, scales, group = (state[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
        codes, zeros = unpacked(qweight, bits), unpacked(qzeros.T, bits).T + 1
        group = group.long()
        with torch.no_grad():
            module.weight.copy_(((codes - zeros[group]) * scales.float()[group]).T)
        filled += 1
    if not filled:
        raise RuntimeError("GPTQModel saved no quantized weights")
    return model


def unpacked(words, bits: int):
    """(n, columns) int32 -> (32 n / bits, columns): each column a stream of bits, the lowest first."""
    import torch

    stream = (words[:, None] >> torch.arange(32)[:, None] & 1).flatten(0, 1)
    return (stream.unflatten(0, (-1, bits)) << torch.arange(bits)[:, None]).sum(1)


ARMS = {
    OURS: formulary_arm,
    "llm-compressor": llm_compressor_arm,
    "GPTQModel": gptqmodel_arm,
    "round to nearest": nearest_arm,
    "unquantized": lambda task: clock(lambda: loaded(task)),
}
PEERS = {"llm-compressor", "GPTQModel"}


def nats(model, rows: list[list[int]]) -> list[float]:
    """Loss of each text, nats/token."""
    import torch

    found = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            logits = model(input_ids=ids).logits[0, :-1].float()
            found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
    return found


def serve(name: str, task: dict) -> None:
    """The arm's own process: one line of JSON on what was its standard output."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    model, seconds = ARMS[name](task)
    print(json.dumps({**seconds, "nats": nats(model.float(), task["held_out"])}), file=channel, flush=True)


# ---------------------------------------------------------------- all arms, tables and plots


def texts(split: str, count: int) -> list[list[int]]:
    """Token ids of passages that do not overlap."""
    from formulary import lab

    verses, (_, tokenizer) = lab.kjv(split=split), lab.smollm2()
    step = min(60, (len(verses) - 60) // count)
    return [tokenizer(" ".join(verses[i * step : i * step + 60]))["input_ids"][:LENGTH] for i in range(count)]


def run_arm(name: str, python: str, file: Path) -> dict | str:
    """What the arm found, or in one line why it is not here."""
    import side_by_side

    command = [python, __file__, "--arm", name, "--task", str(file)]
    with tempfile.TemporaryDirectory() as scratch:  # peers leave files where they are started
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env={**os.environ, **side_by_side.ONE})
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or ["no message"])[-1][:160]
    return json.loads(lines[-1])


def interval(differences) -> str:
    """Mean and 95 % t interval over texts."""
    import numpy as np
    from scipy import stats

    values = np.asarray(differences)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.4f} [{values.mean() - half:.4f}, {values.mean() + half:.4f}]"


def table(found: dict[str, list[dict] | str], millions: float) -> str:
    """Markdown: CPU and wall seconds (medians), CPU seconds per million parameters, how many times as fast ours is within a round
    (median, least and most), loss.
    """
    import numpy as np

    line = lambda *cells: "| " + " | ".join(cells) + " |"
    rows = [line("", "CPU s", "wall s", "CPU s per M", f"{OURS} is", "perplexity", "loss over unquantized, nats/token"), "|---" * 7 + "|"]
    median = lambda name, key: float(np.median([one[key] for one in found[name]]))
    for name, runs in found.items():
        if isinstance(runs, str):
            rows.append(line(name, f"not here: {runs}", *[""] * 5))
            continue
        cpu, loss = median(name, "cpu"), np.array(runs[0]["nats"])
        timed = name not in ("unquantized", OURS) and not isinstance(found[OURS], str)
        excess = "" if name == "unquantized" else interval(loss - np.array(found["unquantized"][0]["nats"]))
        cells = ["", "", ""] if name == "unquantized" else [f"{cpu:.1f}", f"{median(name, 'wall'):.1f}", f"{cpu / millions:.3f}"]
        times = ""
        if timed and name in PEERS:
            ratios = [peer["cpu"] / ours["cpu"] for peer, ours in zip(runs, found[OURS])]
            least_most = f" [{min(ratios):.2f}, {max(ratios):.2f}]" if len(ratios) > 1 else ""
            times = f"{np.median(ratios):.2f}x{least_most}"
        rows.append(line(f"**{name}**" if name == OURS else name, *cells, times, f"{np.exp(loss.mean()):.2f}", excess))
    return "\n".join(rows)


def plot(found: dict, path: Path) -> None:
    """Seconds against loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name, runs in found.items():
        if not isinstance(runs, str) and name != "unquantized":
            loss = np.mean(runs[0]["nats"]) - np.mean(found["unquantized"][0]["nats"])
            axes.plot([one["cpu"] for one in runs], [loss] * len(runs), "o", label=name)
    axes.set_xlabel("CPU seconds, one thread; a dot is a run")
    axes.set_ylabel("loss over unquantized, nats/token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bits", nargs="*", type=int, default=BITS, choices=BITS)
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="of the environment that has the peers")
    options = parser.parse_args()
    if options.arm:
        return serve(options.arm, json.loads(Path(options.task).read_text()))
    import side_by_side

    from formulary import lab
    from formulary.contracts import parts

    peers = os.path.abspath(options.peers)  # arms run elsewhere; a link is not followed, since it is what makes the environment
    model, tokenizer = lab.smollm2()
    millions = sum(part.weights for part in parts.linears(model)) / 1e6
    calibration, held_out = texts("train", CALIBRATION), texts("test", HELD_OUT)
    head = f"`python benchmarks/quantizing.py --rounds {options.rounds}` on {side_by_side.machine()}; {millions:.0f} million weights."
    about = " ".join(__doc__.split("\n\n")[2].split())
    text = [f"# Quantizing: {__doc__.splitlines()[0]}", "", head, "", about, ""]
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        for bits, dtype in itertools.product(options.bits, DTYPES):
            title = f"{bits} bits, {dtype}"
            task = {"model": directory, "bits": bits, "dtype": dtype, "calibration": calibration, "held_out": held_out}
            (file := Path(directory) / "task.json").write_text(json.dumps(task))
            found: dict = {}
            for number in range(options.rounds):
                for name in ARMS:
                    if isinstance(found.get(name), str):
                        continue
                    seen = run_arm(name, peers if name in PEERS else sys.executable, file)
                    found[name] = seen if isinstance(seen, str) else [*found.get(name, []), seen]
                    shown = seen if isinstance(seen, str) else {k: round(v, 1) for k, v in seen.items() if k != "nats"}
                    print(f"{title}, round {number + 1}, {name}: {shown}", file=sys.stderr, flush=True)
            print(table(found, millions), flush=True)
            side_by_side.DOCS.mkdir(parents=True, exist_ok=True)
            plot(found, side_by_side.DOCS / f"quantizing-{bits}-{dtype}.png")
            text += [f"## {title}", "", table(found, millions), "", f"![](quantizing-{bits}-{dtype}.png)", ""]
            (side_by_side.DOCS / "quantizing.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
