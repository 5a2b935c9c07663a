"""Which diffusers models can be patched: one adapter per family, in one tuple."""

from .adapter import ModelAdapter
from .wan import CHRONOEDIT, SKYREELS_V2, WAN, WAN_ANIMATE, WAN_VACE

ADAPTERS: tuple[ModelAdapter, ...] = (WAN, WAN_VACE, WAN_ANIMATE, CHRONOEDIT, SKYREELS_V2)

__all__ = ["ADAPTERS", "ModelAdapter"]
