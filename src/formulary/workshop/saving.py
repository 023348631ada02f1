"""Writing an output directory: complete or absent. Everything is written beside, synced, and renamed into place."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from formulary.contracts import edits
from formulary.errors import FormularyError
from formulary.files import write_atomic, write_json

COPIED = {".json", ".txt", ".model", ".jinja", ".vocab", ".merges"}
NOT_COPIED = {"config.json", "generation_config.json", "formulary.json", "README.md"}


def check_out(out: str | Path, need: int = 0) -> Path:
    """The output path, refused before any work when it exists, cannot be written, or lies on a disk with less than `need` bytes free."""
    path = Path(out).expanduser()
    if path.exists():
        raise FormularyError(f"{path} exists: choose another --out or remove it; nothing was written")
    parent = path.parent if str(path.parent) else Path(".")
    existing = next((p for p in [parent, *parent.parents] if p.exists()), Path("."))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise FormularyError(f"{path} cannot be written: no permission in {existing}")
    free = shutil.disk_usage(existing).free
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
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FormularyError(f"{out}: the disk is full; nothing was written, and the inputs are untouched") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise FormularyError(f"{out} cannot be written: {error.strerror}") from error
        raise
    except Exception as error:
        if "No space left on device" in str(error):
            raise FormularyError(f"{out}: the disk is full; nothing was written, and the inputs are untouched") from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


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
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def save_model(model: nn.Module, directory: Path, source: Path | None, processor: Any) -> None:
    """Weights, config, generation config, tokenizer or processor, and the source directory's other data files and licence."""
    if not hasattr(model, "save_pretrained"):
        raise FormularyError(f"a {type(model).__name__} cannot be saved as a model directory: only transformers models can")
    variant = "formulary" if edits.edits_of(model) else None
    model.save_pretrained(directory, variant=variant, max_shard_size="1000GB")
    if source is not None:
        _copy_others(source, directory)
    elif processor is not None and hasattr(processor, "save_pretrained"):
        processor.save_pretrained(directory)


def _copy_others(source: Path, directory: Path) -> None:
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
