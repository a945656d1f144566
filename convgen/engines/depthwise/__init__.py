"""Layers whose groups have one channel: unstaged, vectorized kernels in the units of ``simt``."""
