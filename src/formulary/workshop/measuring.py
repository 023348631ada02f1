"""Measuring a model before and after: CPU time per item, peak memory of a fresh process, bytes on disk, quality.

The rows of every table are `unchanged`, `bf16` (a plain cast, the baseline that a method must beat) and the methods.
"""

import contextlib
import copy
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from formulary.contracts import edits
from formulary.contracts.data import Data
from formulary.evidence.memory import peak_memory
from formulary.evidence.timing import Ratio, compare_times
from formulary.workshop import quality
from formulary.workshop.quality import Quality

ROUNDS = 15
DECODED = 8
TIMED_ITEMS = {"decoder": 1, "encoder": 16, "encoder-decoder": 4, "vision": 4}


@dataclass
class Row:
    """One line of the table. Times are CPU seconds per item on one thread; ratios are against `unchanged`. `memory` is what
    loading the model and running it once takes, `run_memory` what a streamed run took to make it.
    """

    name: str
    seconds: float | None = None
    ratio: Ratio | None = None
    decode_seconds: float | None = None
    decode_ratio: Ratio | None = None
    memory: int | None = None
    run_memory: int | None = None
    disk: int | None = None
    qualities: list[Quality] = field(default_factory=list)
    headline: str = ""
    why_not_faster: str = ""

    def as_dict(self) -> dict:
        """JSON-ready values."""
        ratio = lambda r: None if r is None else {"estimate": r.estimate, "low": r.low, "high": r.high, "wall": r.wall, "verdict": r.verdict}
        return {
            "row": self.name,
            "cpu_seconds_per_item": self.seconds,
            "time_ratio": ratio(self.ratio),
            "decode_cpu_seconds_per_token": self.decode_seconds,
            "decode_time_ratio": ratio(self.decode_ratio),
            "peak_memory_bytes": self.memory,
            "memory_of_the_run_bytes": self.run_memory,
            "disk_bytes": self.disk,
            "quality": [
                dict(zip(("estimate", "low", "high"), q.interval()), name=q.name, better=q.better, loss=q.loss())
                for q in self.qualities
            ],
            "headline": self.headline,
            "why_not_faster": self.why_not_faster,
        }


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run the body on one torch thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bf16_copy(model: nn.Module) -> nn.Module:
    """The same model cast to bfloat16."""
    return copy.deepcopy(model).to(torch.bfloat16)


def timed_batch(kind: str, data: Data) -> dict[str, Tensor]:
    """The batch that is timed: the first held-out items, without labels."""
    batch = data.collate(data.items[: TIMED_ITEMS[kind]])
    if kind != "encoder-decoder":
        batch.pop("labels", None)
    return batch


def time_models(models: dict[str, nn.Module], kind: str, data: Data, *, rounds: int = ROUNDS):
    """CPU time per item of every model against the first, and per decoded token for decoders: (timing, decode timing or None)."""
    batch = timed_batch(kind, data)

    def forward(model):
        inputs = quality._cast(model, batch)
        return lambda: model(**inputs)

    with torch.inference_mode():
        timing = compare_times({name: forward(m) for name, m in models.items()}, rounds=rounds)
        decode = None
        if kind == "decoder":
            decode = compare_times({name: _decoder_step(m, batch) for name, m in models.items()}, rounds=rounds)
    return timing, decode


def _decoder_step(model: nn.Module, batch: dict[str, Tensor]):
    """A call that decodes `DECODED` tokens greedily after a prompt of 64, from a copy of the prompt's cache."""
    from transformers import DynamicCache

    prompt = batch["input_ids"][:1, :64]
    cache = DynamicCache(config=model.config)
    out = model(input_ids=prompt, cache=cache, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)

    def decode():
        mine, last = copy.deepcopy(cache), token
        for _ in range(DECODED):
            last = model(input_ids=last, cache=mine, use_cache=True).logits[:, -1:].argmax(-1)

    return decode


# ---------------------------------------------------------------- memory and disk


def measure_memory(directory: Path, kind: str, data: Data, dtype: str | None = None) -> int:
    """Peak bytes of a fresh process that loads `directory` and runs the timed batch once."""
    with tempfile.TemporaryDirectory() as folder:
        batch = Path(folder, "batch.safetensors")
        save_file({k: v.contiguous() for k, v in timed_batch(kind, data).items()}, batch)
        program = [sys.executable, "-m", "formulary.workshop.measuring", str(directory), str(batch), dtype or ""]
        return peak_memory(program)


def run_once(directory: str, batch: str, dtype: str) -> None:
    """Load a model and run one batch; what the memory-measuring process does."""
    from formulary.workshop.models import load_directory

    with one_thread(), torch.inference_mode():
        model = load_directory(Path(directory), dtype=dtype or None)
        model(**quality._cast(model, load_file(batch)))


def disk_bytes(directory: Path) -> int:
    """Bytes of the weight files in a model directory, as the file system sees them."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


# ---------------------------------------------------------------- why it is not faster


def why_not_faster(model: nn.Module, before: nn.Module, kind: str, data: Data) -> str:
    """The reason that a changed model did not get faster, from what its parts say and from a profile of the timed batch."""
    reasons = list(
        dict.fromkeys(
            module.slow_because for module in model.modules() if isinstance(getattr(module, "slow_because", None), str)
        )
    )
    zeros = _zero_fraction(model)
    if zeros > 0.2 and zeros > _zero_fraction(before) + 0.1:
        reasons.append(f"{100 * zeros:.0f} % of the weights are zero but stored and multiplied densely")
    share = _edited_share(model, kind, data)
    if share is not None and share < 0.5:
        reasons.append(f"the changed modules take {100 * share:.0f} % of the time: they were not the bottleneck")
    return "; ".join(reasons) or "the changed modules cost as much as those they replace at this shape and batch"


def _zero_fraction(model: nn.Module) -> float:
    total = zero = 0
    for parameter in model.parameters():
        if parameter.ndim >= 2 and parameter.is_floating_point():
            total += parameter.numel()
            zero += int((parameter == 0).sum())
    return zero / max(1, total)


def _edited_share(model: nn.Module, kind: str, data: Data) -> float | None:
    """Fraction of one forward pass spent in edited modules, or None when nothing was edited or timing says nothing."""
    import time

    named = [model.get_submodule(entry["name"]) for entry in edits.edits_of(model)]
    if not named:
        return None
    spent, started, handles = [0.0], [], []
    for module in {id(m): m for m in named}.values():
        handles.append(module.register_forward_pre_hook(lambda *_: started.append(time.process_time())))
        handles.append(module.register_forward_hook(lambda *_: spent.__setitem__(0, spent[0] + time.process_time() - started.pop())))
    try:
        with one_thread(), torch.inference_mode():
            inputs = quality._cast(model, timed_batch(kind, data))
            model(**inputs)
            spent[0] = 0.0
            begin = time.process_time()
            model(**inputs)
            total = time.process_time() - begin
    finally:
        for handle in handles:
            handle.remove()
    return min(1.0, spent[0] / total) if total > 0 else None


if __name__ == "__main__":
    import formulary  # noqa: F401  (registers the loader)

    run_once(*sys.argv[1:4])
    json.dump("done", sys.stdout)
