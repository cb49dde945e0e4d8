"""HiDream-I1: pictures from text. Model and scheduler classes are those of the libraries.

Source of the model: arXiv 2505.22705. `cut.py`, `moe.py` and `dit.py` are the denoiser, `text.py` its four text
encoders, `vae.py` the autoencoder.
"""

from __future__ import annotations

from services.families.hidream.dit import DIT
from services.families.hidream.presets import PRESETS, VARIANTS
from services.families.hidream.text import TEXT
from services.families.hidream.tiny import tiny
from services.families.hidream.vae import VAE
from services.family import Family

FAMILY = Family(name="hidream", text=TEXT, dit=DIT, vae=VAE, variants=VARIANTS, presets=PRESETS, tiny=tiny)
