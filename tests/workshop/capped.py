"""Streams a model under a cap on the process's memory: `python -m tests.workshop.capped SMALL BIG TEXT OUT MB` prints JSON.

The cap is on what the process allocates beyond what it has once everything is imported and a tiny model was streamed.
"""

import json
import os
import re
import resource
import sys
from pathlib import Path

os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the stacks of threads would count as memory allocated

import formulary
from formulary.errors import FormularyError
from formulary.evidence.memory import high_water_mark
from tests.workshop.test_streaming import LAST_BLOCK


def allocated() -> int:
    return 1024 * int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def main(small: str, big: str, text: str, out: str, megabytes: str) -> None:
    """Streams unasked, since it does not fit; then tries the same in memory."""
    options = {"data": text, "measure": False, "batch_size": 2, "max_length": 32, "samples": 4}
    formulary.use("gptq", small, out=f"{out}-small", stream=True, **options)
    before = high_water_mark()
    resource.setrlimit(resource.RLIMIT_DATA, (allocated() + int(megabytes) * 10**6, resource.RLIM_INFINITY))
    outcome = formulary.use("gptq", big, out=out, targets=LAST_BLOCK, **options)
    grown = high_water_mark() - before
    try:
        formulary.use("gptq", big, targets=LAST_BLOCK, stream=False, **options)
        refused = ""
    except (MemoryError, RuntimeError, FormularyError) as error:
        refused = str(error) or "MemoryError"
    print(json.dumps({"grown": grown, "notes": outcome.notes, "refused": refused}))


if __name__ == "__main__":
    main(*sys.argv[1:])
