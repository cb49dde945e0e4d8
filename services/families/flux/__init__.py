"""FLUX.1: pictures from text, with the guidance-distilled dev model and the step-distilled schnell model.

Source of the models: the authors' announcement and code (github.com/black-forest-labs/flux); the paper of the later
Kontext, arXiv 2506.15742, describes the architecture. Model and scheduler classes are those of the libraries.
`cut.py` and `dit.py` are the denoiser, `text.py` and `vae.py` the encoders, `conditions.py` what they agree on.
"""

from __future__ import annotations

from services.families.flux.dit import DIT
from services.families.flux.presets import PRESETS, VARIANTS
from services.families.flux.text import TEXT
from services.families.flux.tiny import tiny
from services.families.flux.vae import VAE
from services.family import Family

FAMILY = Family(name="flux", text=TEXT, dit=DIT, vae=VAE, variants=VARIANTS, presets=PRESETS, tiny=tiny)
