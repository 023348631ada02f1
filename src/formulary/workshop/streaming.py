"""Streaming: a layer-wise method applied to a model on disk that need not fit into memory, one block after the other.

Notable here: in memory are what lies outside the blocks (an untied output head last, and alone), one block with its
changed twin, and what the method takes for one weight matrix. What flows into the current block is kept in memory-mapped
files, one per batch, and the block's output is renamed over it. A finished block becomes a shard of the result: written
beside, synced, renamed, and then a line of the journal. A run that was killed at any moment goes on behind the last line
and ends with the very bytes of an uninterrupted one; where it could not, since bits depend on threads, batches and
versions, it refuses.
"""

import base64
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formulary.contracts import edits, parts
from formulary.contracts.blockwise import Blockwise, inside, outside
from formulary.contracts.data import Data
from formulary.contracts.edits import Editor, editing
from formulary.contracts.parts import Block, Linear
from formulary.contracts.report import Change, Report
from formulary.contracts.transform import BlockTransform, refuse_nan, refuse_unchanged
from formulary.errors import FormularyError, UsageError
from formulary.files import write_json
from formulary.workshop import models, saving
from formulary.workshop.disk import DiskModel, give_back
from formulary.workshop.journal import Journal, MappedOutputs

FITS = 3
"""A model fits where this many times its bytes are free: itself, its changed copy and the bf16 baseline."""

LIBRARIES = 80_000_000
"""About what a run loads of libraries after its sizes were worked out, in bytes."""


# ---------------------------------------------------------------- whether to stream


def available_memory() -> int:
    """Bytes of memory that this process can still take, within the limits that are set for it."""
    try:
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1))
    except (OSError, AttributeError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = re.findall(r"active_file (\d+)", (group / "memory.stat").read_text())
        free = min(free, limit - used + sum(map(int, cached)))
    except (OSError, ValueError):
        pass
    return max(0, min([free, *_left_by_limits()]))


def _left_by_limits() -> Iterator[int]:
    """What the process's own limits leave of its data and its address space."""
    import resource

    for limit, field in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            yield soft - _status(field)


def _status(field: str) -> int:
    """A figure of this process in bytes, 0 where there is no /proc."""
    try:
        found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return 1024 * int(found.group(1)) if found else 0


def reason(
    plans: list, path: Path | None, size: int, asked: bool | None, target: Path | None, layout: str | None = None
) -> str | None:
    """Why to stream, in words, or None for a run in memory; UsageError where it was asked for and cannot be done."""
    problem = f"it writes formulary's own layout, not {layout}" if layout not in (None, "formulary") else _problem(plans, path, target)
    if asked and problem:
        raise UsageError(f"--stream: {problem}")
    if asked is False or problem:
        return None
    if asked or saving.partial(target).exists():
        return "as asked" if asked else f"to go on with {saving.partial(target)}"
    return f"since {_tight(size)}" if _tight(size) else None


def warnings(plans: list, path: Path | None, size: int, target: Path | None) -> list[str]:
    """What to say of a run in memory, for which there may be too little of it."""
    problem = _problem(plans, path, target)
    return [f"{_tight(size)}, but the model was not streamed: {problem}"] if problem and _tight(size) else []


def _tight(size: int) -> str:
    """That a model of this size does not fit, or nothing."""
    free = available_memory()
    return f"{FITS * size / 1e6:.0f} MB of memory are needed and {free / 1e6:.0f} MB are free" if FITS * size > free else ""


def _problem(plans: list, path: Path | None, target: Path | None) -> str | None:
    """Why this cannot be streamed, or None."""
    if path is None:
        return "the model is in memory already; give its directory"
    if len(plans) > 1:
        return f"one method at a time, not {'+'.join(plan.slug for plan in plans)}"
    method = plans[0].instance() if plans[0].contract == "transform" else None
    if not isinstance(method, BlockTransform) or not method.streams:
        return f"{plans[0].slug} with these settings works on the whole model at once"
    return "from disk to disk needs --out" if target is None else None


def activation_bytes(model: nn.Module, method: BlockTransform, data: Data | None) -> int:
    """About how large the memory-mapped files get that hold what flows into a block, for all batches."""
    if not method.observes or _shared(model):
        return 0
    return sum(_hidden_bytes(model, batch) for batch in data.batches())


def peak_bytes(model: nn.Module, method: BlockTransform, data: Data | None) -> int:
    """About the largest amount of memory that a streamed run takes, this process as it is now included; from shapes alone."""
    blocks = parts.blocks(model)
    size = {block.name: _bytes(block.module) for block in blocks}
    largest = max(blocks, key=lambda block: size[block.name])
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    untied = head is not None and not getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    last = _bytes(head) if untied else 0
    rest = _bytes(model) - sum(size.values()) - last
    linears = inside(method.choose(model, Report(method.slug, {}, 0)), largest)
    once = sum(size.values()) if method.observes and _shared(model) else size[largest.name]
    work = method.working_bytes(linears) if linears else 0
    if method.observes:
        widest = max([part.out_features for part in linears] + [1])
        hidden = max(_hidden_bytes(model, batch) for batch in data.batches())
        work = max(work, hidden * (4 + 4 * widest // _width(model)))
    return _status("VmRSS") + LIBRARIES + max(rest + once + size[largest.name] + work, last + (rest if method.beyond else 0))


def _shared(model: nn.Module) -> bool:
    """Whether layers share blocks (ALBERT), which are then all kept in memory."""
    return len(parts.blocks(model)) < (getattr(model.config, "num_hidden_layers", None) or 0)


def _bytes(module: nn.Module) -> int:
    """Of its parameters, shared ones once."""
    return sum(value.numel() * value.element_size() for value in module.parameters())


def _width(model: nn.Module) -> int:
    config = model.config.get_text_config()
    return getattr(config, "hidden_size", None) or config.d_model


def _hidden_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Of the hidden states between two blocks."""
    if "pixel_values" in batch:
        side = getattr(model.config, "patch_size", 16)
        height, width = batch["pixel_values"].shape[-2:]
        tokens = len(batch["pixel_values"]) * (1 + (height // side) * (width // side))
    else:
        both = ("input_ids", "labels") if getattr(model.config, "is_encoder_decoder", False) else ("input_ids",)
        tokens = sum(batch[key].numel() for key in both if key in batch)
    return tokens * _width(model) * next(value.element_size() for value in model.parameters())


# ---------------------------------------------------------------- the run


class Run:
    """One method on one model on disk, whose result is made in `folder`; the journal may say that some of it is there."""

    def __init__(self, disk: DiskModel, method: BlockTransform, data: Data | None, folder: Path, journal: Journal):
        self.disk, self.model, self.method, self.data, self.journal = disk, disk.model, method, data, journal
        self.result = folder / "result"
        self.outputs = MappedOutputs(folder / "activations", disk.device) if method.observes else None
        self.shards = len(disk.blocks) + (2 if disk.head else 1)

    def go(self) -> Report:
        """Work through the blocks that are not done yet; afterwards `result` holds every shard."""
        method, model, disk = self.method, self.model, self.disk
        method.admit(model, self.data)
        refuse_nan(model)
        report = Report(method.slug, method.parameters(), parts.count_weights(model), method.unit)
        chosen = method.choose(model, report)
        beyond = outside(chosen, model)
        devices = [disk.device.index or 0] if disk.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), editing(model, method.slug) as edit:
            torch.manual_seed(self.data.seed if self.data is not None else 0)
            self._seeded = torch.get_rng_state()
            walk = self._walk() if method.observes else None
            self._take_over(edit, report)
            self._work(chosen, walk, edit, report)
            if disk.head and (beyond or method.beyond):
                disk.load(disk.head)
            if beyond:
                method.run_block(None, beyond, walk, edit, report)
            method.conclude(model, edit, report)
            refuse_unchanged(model, report)
        self._write_rest(loaded=bool(beyond or method.beyond))
        return _read_report(report.as_dict(), Report(method.slug, method.parameters(), report.weights, method.unit))

    def _walk(self) -> Blockwise:
        """How the blocks are called is found out once, each block having its weights while it runs."""
        options = {"outputs": self.outputs, "frugal": True, "halves": self.method.halves}
        if self.journal.sequential() is None:
            with ExitStack() as stack:
                for block in self.disk.blocks:
                    load, drop = (lambda *_, act=act, name=block.name: act(name) for act in (self.disk.load, self.disk.drop))
                    stack.callback(block.module.register_forward_pre_hook(load).remove)
                    stack.callback(block.module.register_forward_hook(drop).remove)
                walk = Blockwise(self.model, self.data, **options)
            self.journal.add({"sequential": walk.sequential})
            return walk
        return Blockwise(self.model, self.data, sequential=self.journal.sequential(), **options)

    def _take_over(self, edit: Editor, report: Report) -> None:
        """Bring the model without weights, the report and the random numbers to where the journal ends."""
        for entry in self.journal.blocks():
            with torch.device("meta"):
                edits.replay(self.model, entry["edits"])
            edit.made += entry["edits"]
        self.model.eval()
        for entry in self.journal.blocks()[-1:]:
            _read_report(entry["report"], report)
            if entry["random"] is not None:
                torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(entry["random"])), dtype=torch.uint8))

    def _work(self, chosen: list[Linear], walk: Blockwise | None, edit: Editor, report: Report) -> None:
        """Every block in turn: load, change, write, and pass the data on."""
        disk, done = self.disk, len(self.journal.blocks())
        together = walk is not None and not walk.sequential
        if together:
            for number, block in enumerate(disk.blocks):
                disk.load(block.name, self._shard(number) if number < done else None)
        left = len(chosen)
        for number, block in enumerate(disk.blocks):
            here = inside(chosen, block)
            left -= len(here)
            goes_on = walk is not None and walk.sequential and left > 0
            if number >= done:
                if not together:
                    disk.load(block.name)
                if here:
                    self.method.run_block(block, here, walk, edit, report)
                self._finish(number, block, edit, report)
            elif goes_on and number == done - 1:
                self._check_outputs(number)
                disk.load(block.name, self._shard(number))
            if goes_on and number >= done - 1:
                walk.advance(block)
            elif goes_on:
                walk.done.add(block.name)
            if not together and not (goes_on and block is disk.blocks[-1]):
                disk.drop(block.name)

    def _finish(self, number: int, block: Block, edit: Editor, report: Report) -> None:
        """Write the changed block, then its line; from here on a killed run does not do it again."""
        before = sum(len(entry["edits"]) for entry in self.journal.blocks())
        saving.write_tensors(self._shard(number), self.disk.state(lambda name: name.startswith(f"{block.name}.")))
        for folder in [self.result, *([self.outputs.folder] if self.outputs else [])]:
            saving.sync(folder)
        state = torch.get_rng_state()
        random = None if torch.equal(state, self._seeded) else base64.b64encode(state.numpy().tobytes()).decode()
        self.journal.add({"block": block.name, "edits": edit.made[before:], "report": report.as_dict(), "random": random})
        edit.settle()
        give_back()

    def _check_outputs(self, number: int) -> None:
        """What is kept must have come out of the last finished block or of the one before it."""
        block, before = self.disk.blocks[number], self.disk.blocks[number - 1] if number else None
        allowed = {block.name, before.name if before is not None and before.stack == block.stack else None}
        for index in range(-(-len(self.data) // self.data.batch_size)):
            if self.outputs.origin(block.stack, index) not in allowed:
                raise FormularyError(
                    f"{self.outputs.folder} does not fit the journal; the unfinished run is given up: repeat the call to start over"
                )

    def _shard(self, number: int) -> Path:
        return self.result / f"model-{number + 1:05}-of-{self.shards:05}.safetensors"

    def _write_rest(self, loaded: bool) -> None:
        """What lies outside the blocks, and by itself an untied output head, which may be as large as the embeddings."""
        disk = self.disk
        apart = tuple(f"{name}." for name in [*(block.name for block in disk.blocks), *([disk.head] if disk.head else [])])
        saving.write_tensors(self._shard(len(disk.blocks)), disk.state(lambda name: not name.startswith(apart)))
        if disk.head:
            if not loaded:
                disk.drop_rest()
                disk.load(disk.head)
            saving.write_tensors(self._shard(self.shards - 1), disk.state(lambda name: name.startswith(f"{disk.head}.")))
        disk.drop_rest()

    def describe(self) -> None:
        """Write the index, the configs and the source's other files beside the shards, removing what a killed run left."""
        from formulary.contracts._quantizer import INDEX, FormularyConfig

        shards = [self._shard(number) for number in range(self.shards)]
        for file in self.result.iterdir():
            if file not in shards:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        made, config = edits.edits_of(self.model), self.model.config
        config.dtype, config.architectures = str(self.model.dtype).removeprefix("torch."), [type(self.model).__name__]
        if made:
            config.quantization_config = FormularyConfig(edits=made, sharded=True)
        config.save_pretrained(self.result)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(self.result)
        homes = {name: shard.name for shard in shards for name in models.read_header(shard)}
        weights, size = models.count_from_headers(shards)
        index = {"metadata": {"total_parameters": weights, "total_size": size}, "weight_map": dict(sorted(homes.items()))}
        write_json(self.result / (INDEX if made else "model.safetensors.index.json"), index)
        saving.copy_others(self.disk.path, self.result)


def _read_report(stored: dict[str, Any], report: Report) -> Report:
    """`report` with what a line of the journal says; a finished run takes the same way, so that none can tell."""
    stored = json.loads(json.dumps(stored))
    report.changes = [Change(**change) for change in stored["changed"]]
    report.skips = [Change(**skip) for skip in stored["skipped"]]
    report.notes, report.figures, report.tables = stored["notes"], stored["figures"], stored["tables"]
    return report
