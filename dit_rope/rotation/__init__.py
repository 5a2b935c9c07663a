"""The rotation of queries and keys: the functions that check a call, the operators, the choice of a backend."""

from .api import norm_rotate, norm_rotate_qk, rotate, rotate_qk
from .rounding import Rounding

__all__ = ["Rounding", "norm_rotate", "norm_rotate_qk", "rotate", "rotate_qk"]
