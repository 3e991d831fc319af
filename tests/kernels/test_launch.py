"""Kernels that are compiled late are told of."""

from types import SimpleNamespace

import pytest
import triton

from kernels.launch import tell_of_compilations


def test_a_compilation_is_told_with_its_kernel_and_its_time(monkeypatch):
    for hook in ("jit_cache_hook", "jit_post_compile_hook"):
        monkeypatch.setattr(triton.knobs.runtime, hook, None)
    told = []
    tell_of_compilations(lambda kernel, seconds: told.append((kernel, seconds)))
    about = {"fn": SimpleNamespace(name="a_kernel"), "key": "any"}
    assert not triton.knobs.runtime.jit_cache_hook(**about)  # true would skip the compilation
    triton.knobs.runtime.jit_post_compile_hook(**about)
    assert told == [("a_kernel", pytest.approx(0.0, abs=1.0))]
