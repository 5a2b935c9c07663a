"""Which diffusers models can be patched: one adapter per class, in one tuple."""

from ..hooks.adapter import ModelAdapter
from .ace_step import ACE_STEP
from .allegro import ALLEGRO
from .anyflow import ANYFLOW, ANYFLOW_FAR
from .cogvideox import COGVIDEOX, CONSISID
from .cogview4 import COGVIEW4, GLM_IMAGE
from .cosmos import COSMOS, COSMOS_CONTROLNET
from .cosmos3 import COSMOS3
from .easyanimate import EASYANIMATE
from .ernie_image import ERNIE_IMAGE
from .flux import CHROMA, FLUX, FLUX_CONTROLNET
from .flux2 import FLUX2, FLUX3
from .flux_like import BRIA, BRIA_FIBO, LONGCAT_IMAGE, OVIS_IMAGE
from .helios import HELIOS
from .hidream import HIDREAM
from .hunyuan_dit import HUNYUAN_DIT, HUNYUAN_DIT_CONTROLNET
from .hunyuan_video import HUNYUAN_IMAGE, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15, HUNYUAN_VIDEO_FRAMEPACK
from .ideogram4 import IDEOGRAM4
from .joyimage import JOYIMAGE_EDIT, JOYIMAGE_EDIT_PLUS
from .kandinsky import KANDINSKY5, KANDINSKY6, KANDINSKY6_SR
from .krea2 import KREA2
from .longcat_audio import LONGCAT_AUDIO
from .ltx import LTX, LTX2
from .lumina import LUMINA2, LUMINA_NEXT
from .minimax_h3 import MINIMAX_H3
from .minimax_music import MINIMAX_MUSIC_3
from .mochi import MOCHI
from .motif_video import MOTIF_VIDEO
from .omnigen import OMNIGEN
from .prx import PRX
from .qwen_image import NUCLEUS, QWEN_IMAGE, QWEN_IMAGE_21, QWEN_IMAGE_CONTROLNET
from .sana import SANA_VIDEO, SANA_WM, SANA_WM_REFINER
from .stable_audio import STABLE_AUDIO, STABLE_AUDIO_3
from .wan import CHRONOEDIT, SKYREELS_V2, WAN, WAN_ANIMATE, WAN_VACE
from .wan_animate_2 import WAN_ANIMATE_2
from .z_image import BRIA_FIBO_2, Z_IMAGE, Z_IMAGE_CONTROLNET

_VIDEO = (
    WAN,
    WAN_VACE,
    WAN_ANIMATE,
    WAN_ANIMATE_2,
    CHRONOEDIT,
    SKYREELS_V2,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_FRAMEPACK,
    HUNYUAN_VIDEO_15,
    LTX,
    LTX2,
    COGVIDEOX,
    CONSISID,
    MOCHI,
    ALLEGRO,
    EASYANIMATE,
    COSMOS,
    COSMOS_CONTROLNET,
    COSMOS3,
    KANDINSKY5,
    KANDINSKY6,
    KANDINSKY6_SR,
    HELIOS,
    SANA_VIDEO,
    SANA_WM,
    SANA_WM_REFINER,
    ANYFLOW,
    ANYFLOW_FAR,
    MOTIF_VIDEO,
    MINIMAX_H3,
)
_IMAGE = (
    FLUX,
    FLUX_CONTROLNET,
    CHROMA,
    FLUX2,
    FLUX3,
    BRIA,
    BRIA_FIBO,
    BRIA_FIBO_2,
    LONGCAT_IMAGE,
    OVIS_IMAGE,
    KREA2,
    QWEN_IMAGE,
    QWEN_IMAGE_CONTROLNET,
    QWEN_IMAGE_21,
    NUCLEUS,
    Z_IMAGE,
    Z_IMAGE_CONTROLNET,
    LUMINA2,
    LUMINA_NEXT,
    HUNYUAN_DIT,
    HUNYUAN_DIT_CONTROLNET,
    HUNYUAN_IMAGE,
    COGVIEW4,
    GLM_IMAGE,
    OMNIGEN,
    HIDREAM,
    PRX,
    ERNIE_IMAGE,
    IDEOGRAM4,
    JOYIMAGE_EDIT,
    JOYIMAGE_EDIT_PLUS,
)
_AUDIO = (
    ACE_STEP,
    STABLE_AUDIO,
    STABLE_AUDIO_3,
    LONGCAT_AUDIO,
    MINIMAX_MUSIC_3,
)
ADAPTERS: tuple[ModelAdapter, ...] = (*_VIDEO, *_IMAGE, *_AUDIO)

__all__ = ["ADAPTERS", "ModelAdapter"]
