"""The layer: its specification, its geometry, and the arithmetic of its taps."""

from __future__ import annotations

from convgen.spec.conv import OPERATORS as OPERATORS
from convgen.spec.conv import ConvSpec as ConvSpec
from convgen.spec.conv import SpecError as SpecError
from convgen.spec.geometry import CONTRACTIONS as CONTRACTIONS
from convgen.spec.geometry import Geometry as Geometry
from convgen.spec.geometry import Triple as Triple
