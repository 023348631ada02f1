"""How long the command line takes to start: CPU seconds of fresh processes, children included.

    python benchmarks/start.py              # a table in docs/benchmarks

`use --dry-run` reads a Llama directory of 1 GB whose weights are a file of zeros with holes. It counts in a model built without
weights from transformers' own class, whose import is its limit.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import side_by_side

MODEL_CLASS = "from transformers import LlamaForCausalLM"
LIMITS = {"formulary find": "0.3", "import formulary": "0.1", "formulary use --dry-run, 1 GB": "3.0", MODEL_CLASS: ""}


def large_directory(directory: Path) -> None:
    """A Llama of 1 GB in bfloat16 by its config and header; the file's data are one hole."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16)
    import torch

    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, value in model.state_dict().items():
        size = 2 * value.numel()
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)


def seconds(command: list[str]) -> float:
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    cli = [sys.executable, "-m", "formulary.cli"]
    with tempfile.TemporaryDirectory() as directory:
        large_directory(Path(directory))
        commands = [
            [*cli, "find", "int8 quantization"],
            [sys.executable, "-c", "import formulary"],
            [*cli, "use", "gptq", directory, "--dry-run"],
            [sys.executable, "-c", MODEL_CLASS],
        ]
        rows = ["| | CPU seconds, median | largest | aim |", "|---|---|---|---|"]
        for (name, limit), command in zip(LIMITS.items(), commands):
            seconds(command)
            taken = [seconds(command) for _ in range(rounds)]
            rows.append(f"| {name} | {np.median(taken):.3f} | {max(taken):.3f} | {limit} |")
    text = ["# Start", "", f"`python benchmarks/start.py` on {side_by_side.machine()}, {rounds} processes each.", "", *rows, ""]
    side_by_side.DOCS.mkdir(parents=True, exist_ok=True)
    (side_by_side.DOCS / "start.md").write_text("\n".join(text))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
