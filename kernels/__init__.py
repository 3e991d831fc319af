"""Kernels, one file each, holding the kernel, its launcher and its plain torch reference.

Hugging Face publishes a package that is also called `kernels`. Lockstep neither depends on it nor
runs beside it: `tests/test_packaging.py` and every worker check that this folder is the one that
is imported.
"""
