"""Freed memory is kept for what comes next, and given back afterwards."""

import subprocess
import sys

import pytest
import torch

from formulary.kernels import memory
from formulary.kernels.memory import keeping_freed

PROGRAM = """
import resource
import torch
from formulary.kernels.memory import keeping_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [torch.ones(3_000_000) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20
faults()
outside, before = faults(), resident()
with keeping_freed():
    faults()
    inside = faults()
print(outside, inside, resident() - before)
"""


@pytest.mark.skipif(memory._glibc() is None, reason="not glibc")
def test_buffers_are_not_mapped_anew():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    outside, inside, more = map(int, done.stdout.split())
    assert outside > 10_000 and inside < outside / 10 and more < 20


def test_without_glibc_it_does_nothing(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with keeping_freed():
        assert torch.ones(3).sum() == 3
