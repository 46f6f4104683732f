"""Triton kernels of lpt-fast: prompt insertion, rows of a cache, blocks with frozen weights.

Imports torch and triton alone. Importing needs no GPU; running needs one, or Triton's interpreter
(a process started with TRITON_INTERPRET=1).
"""
