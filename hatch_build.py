"""Builds the catalogue's index into the package: the wheel then answers `find` and `show` from one file.

A wheel gets the index as a file of its own; an editable installation gets it beside the source, where it serves until a card or a
record changes. Every card is validated here, so that a wrong one stops the build with its name. Needs the standard library alone.
"""

import os
import sys
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

INDEX = "formulary/catalogue/index.json"


class IndexHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        if self.target_name != "wheel":
            return
        text = index_text(Path(self.root, "src"))
        if version == "editable":
            Path(self.root, "src", INDEX).write_text(text, encoding="utf8")
            return
        handle, self.made = tempfile.mkstemp(suffix=".json")
        with os.fdopen(handle, "w", encoding="utf8") as file:
            file.write(text)
        os.chmod(self.made, 0o644)
        build_data["force_include"][self.made] = INDEX

    def finalize(self, version: str, build_data: dict, artifact_path: str) -> None:
        if made := getattr(self, "made", None):
            os.unlink(made)


def index_text(source: Path) -> str:
    """The index of the cards under `source/formulary/papers`."""
    sys.path.insert(0, str(source))
    try:
        from formulary.catalogue import _index

        return _index.dump(_index.build(source / "formulary" / "papers"))
    finally:
        sys.path.remove(str(source))
