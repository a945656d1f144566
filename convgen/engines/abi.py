"""The C boundary that all units share, as ``templates/common/convgen_abi.h`` states it."""

from __future__ import annotations

import struct

TENSORS = ("coarse", "fine", "weight", "bias", "workspace")
"""The pointers of a ConvgenCall, in its order; a stream follows them."""

POINTERS = struct.Struct("6Q")
"""Of a ConvgenCall: :data:`TENSORS` and the stream."""

NUMBERS = struct.Struct("11q24x")
"""Device (or threads), batch, coarse and fine channels, coarse and fine extents (D, H, W), and
which tensors have their channels side by side: a sum of :data:`CHANNELS_LAST`. Then there is no
epilogue."""

CHANNELS_LAST = {"coarse": 1, "fine": 2, "weight": 4}
"""ConvgenOperand."""

CALL = struct.Struct(POINTERS.format + NUMBERS.format)
"""A whole ConvgenCall."""

EPILOGUE = struct.Struct("q2Q")
"""The end of a ConvgenCall: flags (a sum of ConvgenEpilogue; 2: the residual is read, 4: the
pre-activation is written), and these two pointers."""

RESULTS = {"fprop": "coarse", "dgrad": "fine", "wgrad": "weight", "bgrad": "bias"}
"""The tensor that a function writes."""

TOO_LARGE = -1
"""CONVGEN_TOO_LARGE: a call that no launch can serve."""
