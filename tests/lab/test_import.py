"""Importing the lab must stay cheap, and its names must all resolve."""

import subprocess
import sys

from formulary import lab


def test_importing_the_lab_imports_no_heavy_library():
    code = "import sys, formulary.lab as lab; lab.names(); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_public_name_resolves():
    assert all(getattr(lab, name) is not None for name in lab.__all__)
    assert "minilm" in dir(lab) and not hasattr(lab, "no_such_name")
