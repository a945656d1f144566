"""Tensor-core kernels that gather operands into registers: tf32, tf32x3 and 16 bits."""
