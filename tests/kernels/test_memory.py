"""Freed memory is kept for what comes next, and given back afterwards."""

import subprocess
import sys

import pytest
import torch

from formulary.kernels import memory
from formulary.kernels.memory import keeping_freed

# glibc's own account of its heap, in MB after 192 MB were taken and freed: not every sandbox's kernel counts page faults.
PROGRAM = """
import ctypes
from formulary.kernels.memory import keeping_freed

class Account(ctypes.Structure):  # struct mallinfo2: the heap's bytes, and nine numbers that are not asked for
    _fields_ = [("heap", ctypes.c_size_t)] + [(f"other_{i}", ctypes.c_size_t) for i in range(9)]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Account
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def left():
    for _ in range(3):
        for taken in [libc.malloc(24_000_000) for _ in range(8)]:
            libc.free(taken)
    return libc.mallinfo2().heap // 10**6

with keeping_freed():
    inside = left()
print(inside, libc.mallinfo2().heap // 10**6, left())
"""


@pytest.mark.skipif(not hasattr(memory._glibc(), "mallinfo2"), reason="not glibc 2.33 or newer")
def test_what_is_freed_is_kept_within_and_given_back_after():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    inside, after, outside = map(int, done.stdout.split())
    assert inside > 190 and after < 10 and outside < 80


def test_without_glibc_it_does_nothing(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with keeping_freed():
        assert torch.ones(3).sum() == 3
