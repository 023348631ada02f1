"""What is kept of a streamed run until it is finished: the journal, and the outputs of the blocks done so far.

Notable here: a line of the journal is on the disk before the next step begins. The first one says what the bits of the result
depend on; a run that would go on with other bits is refused.
"""

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from formulary import __version__
from formulary.contracts.blockwise import Outputs
from formulary.contracts.data import Data
from formulary.contracts.parts import Block
from formulary.contracts.transform import BlockTransform
from formulary.errors import FormularyError
from formulary.evidence._run import environment
from formulary.workshop import models, saving
from formulary.workshop.disk import DiskModel


class MappedOutputs(Outputs):
    """Outputs of blocks in memory-mapped files, one for each stack and batch."""

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device
        folder.mkdir(exist_ok=True)

    def _file(self, stack: str, index: int) -> Path:
        return self.folder / f"{stack}-{index:05}.safetensors"

    def origin(self, stack: str, index: int) -> str | None:
        """Name of the block whose output is kept, None for none."""
        file = self._file(stack, index)
        try:
            with safe_open(file, "pt") as opened:
                return opened.metadata()["block"]
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, TypeError) as error:
            raise FormularyError(f"{file} is damaged; the unfinished run is given up: repeat the call to start over") from error

    def has(self, block: Block, index: int) -> bool:
        return self.origin(block.stack, index) == block.name

    def put(self, block: Block, index: int, output: Any) -> None:
        tensors: dict[str, Tensor] = {}
        nest = {"block": block.name, "nest": json.dumps(_encode(output, tensors))}
        saving.write_tensors(self._file(block.stack, index), tensors, nest)

    def get(self, stack: str, index: int) -> Any:
        with safe_open(self._file(stack, index), "pt") as opened:
            return _decode(json.loads(opened.metadata()["nest"]), lambda key: opened.get_tensor(key).clone().to(self.device))


def _encode(nest: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """`nest` as JSON, its tensors put into `tensors` under the names that stand for them."""
    if isinstance(nest, Tensor):
        tensors[str(len(tensors))] = nest.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": str(len(tensors) - 1)}
    if type(nest) in (tuple, list):
        return {type(nest).__name__: [_encode(one, tensors) for one in nest]}
    if nest is None or isinstance(nest, (bool, int, float, str)):
        return {"value": nest}
    raise FormularyError(f"a block that gives a {type(nest).__name__} cannot be streamed")


def _decode(nest: dict[str, Any], tensor: Callable[[str], Tensor]) -> Any:
    ((kind, value),) = nest.items()
    if kind == "tensor":
        return tensor(value)
    return value if kind == "value" else {"tuple": tuple, "list": list}[kind](_decode(one, tensor) for one in value)


class Journal:
    """Lines of JSON, each on the disk before the next step begins; a torn last line is dropped."""

    def __init__(self, file: Path):
        self.file = file
        data = file.read_bytes() if file.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            os.truncate(file, len(whole))
        try:
            self.entries = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise FormularyError(f"{file} is damaged ({error}): delete {file.parent} to start over") from error

    def add(self, entry: dict[str, Any]) -> None:
        """Append a line; it is on the disk when this returns."""
        with self.file.open("ab") as stream:
            stream.write(json.dumps(entry).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.entries.append(entry)

    def begin(self, facts: dict[str, Any]) -> None:
        """Note what the result's bits depend on; refuse when what is here already came from something else."""
        if not self.entries:
            return self.add({"facts": facts})
        before = self.entries[0].get("facts", {})
        if before != facts:
            named = sorted(name for name in before.keys() | facts.keys() if before.get(name) != facts.get(name))
            said = ", ".join(_differ(name, before.get(name), facts.get(name)) for name in named)
            raise FormularyError(
                f"{self.file.parent} holds an unfinished run with other {said}: repeat that run to finish it,"
                " or delete the directory to start over"
            )

    def blocks(self) -> list[dict[str, Any]]:
        """The lines of finished blocks."""
        return [entry for entry in self.entries if "block" in entry]

    def sequential(self) -> bool | None:
        """What was found out about the order of the blocks."""
        return next((entry["sequential"] for entry in self.entries if "sequential" in entry), None)


def _differ(name: str, before: Any, now: Any) -> str:
    """The name of a fact, with both values where they are short."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        return ", ".join(_differ(key, before.get(key), now.get(key)) for key in keys)
    short = len(str(before)) < 30 and len(str(now)) < 30
    return f"{name} ({before}, now {now})" if short else name


def facts_of(disk: DiskModel, method: BlockTransform, data: Data | None) -> dict[str, Any]:
    """What the bits of the result depend on. The model's files count by size, time and header, everything else by content."""
    return {
        "method": method.slug,
        "parameters": json.loads(json.dumps(method.parameters())),
        "model": _hash(
            f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns} {json.dumps(models.read_header(file))}".encode()
            for file in disk.files
        ),
        "config": _hash([(disk.path / "config.json").read_bytes()]),
        "data": _hash(_contents(data)) if method.observes else None,
        "seed": data.seed if data is not None else 0,
        "batch size": data.batch_size if method.observes else None,
        "threads": torch.get_num_threads(),
        "dtype": str(disk.model.dtype),
        "device": str(disk.device),
        "versions": {"formulary": __version__, **environment()},
        "source code": _hash(file.read_bytes() for file in _sources(type(method))),
    }


def _contents(data: Data) -> Iterator[bytes]:
    yield f"{data.pad_token_id} {data.pad_left}".encode()
    for item in data.items:
        for key in sorted(item):
            value = torch.as_tensor(item[key]).contiguous()
            yield f"{key} {value.dtype} {tuple(value.shape)}".encode()
            yield value.reshape(-1).view(torch.uint8).numpy().tobytes()


def _sources(cls: type) -> list[Path]:
    """The files whose code decides about bits: contracts, kernels, what streams, and the method's own and its family's."""
    room, here = Path(inspect.getfile(cls)).parent, Path(__file__).parent
    found = [*here.parent.glob("contracts/*.py"), *here.parent.glob("kernels/*.*"), *room.glob("*.py"), *room.parent.glob("_*.py")]
    found += [here / f"{name}.py" for name in ("disk", "journal", "streaming")]
    return sorted({file for file in found if not file.name.startswith("test_")})


def _hash(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()


@contextmanager
def unfinished(out: Path, facts: dict[str, Any]) -> Iterator[tuple[Path, Journal]]:
    """The directory in which to make `out`, and its journal; what is in its `result` in the end becomes `out`.

    It is removed when the method refuses what it is given, and kept when the body is killed or interrupted or the disk is
    full, so that the same call goes on where it was stopped.
    """
    folder = saving.partial(out)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FormularyError(f"{folder} is in use: another run is making {out}") from None
    try:
        journal = Journal(folder / "journal.jsonl")
        journal.begin(facts)
        (folder / "result").mkdir(exist_ok=True)
        try:
            yield folder, journal
        except FormularyError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        _publish(folder, out)
    except (OSError, SafetensorError) as error:
        if saving.is_full(error):
            raise FormularyError(
                f"{out}: the disk is full; make room and repeat the call, which goes on behind the last finished block"
                f" (or delete {folder})"
            ) from error
        raise
    finally:
        lock.release()


def _publish(folder: Path, out: Path) -> None:
    """Rename the finished result into place and remove the rest."""
    for path in [*(folder / "result").rglob("*"), folder / "result"]:
        saving.sync(path)
    if out.exists():
        raise FormularyError(f"{out} appeared while the result was being made and was left alone: move it and repeat the call")
    os.rename(folder / "result", out)
    saving.sync(out.parent)
    shutil.rmtree(folder, ignore_errors=True)
