"""Files that are never half written: beside, synced, renamed. And the one place where the cache lives."""

import json
import os
import tempfile
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """The directory for what can be made again: `$FORMULARY_CACHE`, else `$XDG_CACHE_HOME/formulary`, else `~/.cache/formulary`."""
    base = os.environ.get("FORMULARY_CACHE")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "formulary")
    path = Path(base, *parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Write `content` so that a reader sees the old file or the new one, never a part, even across a crash."""
    path = Path(path)
    data = content.encode("utf8") if isinstance(content, str) else content
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        if os.path.exists(beside):
            os.unlink(beside)
        raise


def write_json(path: str | os.PathLike, value) -> None:
    """Write `value` as readable JSON, atomically; NaN and infinities are refused, since JSON has none."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
