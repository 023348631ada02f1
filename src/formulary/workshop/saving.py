"""Writing an output directory: complete or absent. Everything is written beside, synced, and renamed into place."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from formulary.contracts import edits
from formulary.errors import FormularyError
from formulary.files import write_atomic, write_json
from formulary.workshop import formats

COPIED = {".json", ".txt", ".model", ".jinja", ".vocab", ".merges"}
NOT_COPIED = {"config.json", "generation_config.json", "formulary.json", "README.md"}


def check_out(out: str | Path, need: int = 0) -> Path:
    """The output path, refused before any work when it exists, cannot be written, or lies on a disk with less than `need` bytes free."""
    path = Path(out).expanduser()
    if path.exists():
        if partial(path).exists() and not (partial(path) / "result").exists():
            shutil.rmtree(partial(path), ignore_errors=True)  # of a run that was killed just after it had finished
        raise FormularyError(f"{path} exists: choose another --out or remove it; nothing was written")
    parent = path.parent if str(path.parent) else Path(".")
    existing = next((p for p in [parent, *parent.parents] if p.exists()), Path("."))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise FormularyError(f"{path} cannot be written: no permission in {existing}")
    free = shutil.disk_usage(existing).free
    need -= bytes_in(partial(path))
    if free < need:
        raise FormularyError(f"{path}: about {need / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free; nothing was written")
    return path


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A hidden directory beside `out` to fill; renamed to `out` if the body succeeds, removed if it fails or is interrupted."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    stage = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        stage.mkdir()
        yield stage
        _sync(stage)
        if out.exists():
            raise FormularyError(f"{out} appeared while the result was being made; it was left alone and nothing was written")
        os.rename(stage, out)
    except Exception as error:
        if is_full(error):
            raise FormularyError(f"{out}: the disk is full; nothing was written, and the inputs are untouched") from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise FormularyError(f"{out} cannot be written: {error.strerror}") from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def is_full(error: BaseException) -> bool:
    """Whether the error says that the disk is full, whoever raised it."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def partial(out: Path) -> Path:
    """Where a streamed run keeps what it has made of `out`, so that it can go on after it was stopped."""
    return out.with_name(f"{out.name}.partial")


def bytes_in(directory: Path) -> int:
    """Bytes of all files below a directory, 0 if there is none."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that is complete or as it was before, even across a crash: written beside, synced, renamed.

    That it has its name is certain after a crash once the directory is synced too.
    """
    beside = file.with_name(f".{file.name}.beside")
    try:
        save_file(tensors, beside, {"format": "pt", **(metadata or {})})
        sync(beside)
        os.replace(beside, file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file or a directory's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(out: Path) -> None:
    """Remove what a killed run left for the same output; a run that is alive keeps its own."""
    for left in out.parent.glob(f".{out.name}.partial-*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            sync(file)


def save_model(model: nn.Module, directory: Path, source: Path | None, processor: Any, format: str | None = None) -> None:
    """Weights, config, generation config, tokenizer or processor, and the source directory's other data files and licence."""
    if not hasattr(model, "save_pretrained"):
        raise FormularyError(f"a {type(model).__name__} cannot be saved as a model directory: only transformers models can")
    if format == "compressed-tensors":
        formats.save(model, directory)
    else:
        variant = "formulary" if edits.edits_of(model) else None
        model.save_pretrained(directory, variant=variant, max_shard_size="1000GB")
    if source is not None:
        copy_others(source, directory)
    elif processor is not None and hasattr(processor, "save_pretrained"):
        processor.save_pretrained(directory)


def copy_others(source: Path, directory: Path) -> None:
    """Data files only: never weights, never Python, never a link that leads out of the directory."""
    root = source.resolve()
    homes = {root, root.parent.parent / "blobs"}  # the hub's cache keeps a snapshot's files as links into its blobs
    for file in source.rglob("*"):
        inside = file.relative_to(source)
        if not file.is_file() or len(inside.parts) > 2 or inside.parts[0].startswith("."):
            continue
        is_data = file.suffix in COPIED or file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        leads_out = not homes & set(file.resolve().parents)
        target = directory / inside
        if is_data and not leads_out and file.name not in NOT_COPIED and ".index." not in file.name and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def write_facts(directory: Path, facts: dict[str, Any], card: str) -> None:
    """`formulary.json` (method, parameters, versions, report, table) and the model card."""
    write_json(directory / "formulary.json", json.loads(json.dumps(facts, default=str)))
    write_atomic(directory / "README.md", card)
