"""Qwen-Image: pictures from text, and edits of a picture. Model and scheduler classes are those of the libraries.

`cut.py` and `dit.py` are the denoiser, `text.py` and `vae.py` the encoders, `recipes.py` what they agree on.
"""

from __future__ import annotations

from services.families.qwen_image.dit import DIT
from services.families.qwen_image.presets import PRESETS, VARIANTS
from services.families.qwen_image.text import TEXT
from services.families.qwen_image.tiny import tiny
from services.families.qwen_image.vae import VAE
from services.family import Family

FAMILY = Family(name="qwen_image", text=TEXT, dit=DIT, vae=VAE, variants=VARIANTS, presets=PRESETS, tiny=tiny)
