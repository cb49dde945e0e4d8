"""Wan: clips of text, and of pictures, with Wan 2.1 (one transformer), Wan 2.2 A14B (two experts) and Wan 2.2 TI2V-5B.

Sources of the models: arXiv 2503.20314 and its successor Wan 2.2. Model and scheduler classes are those of diffusers;
the cut is ours.
"""

from __future__ import annotations

from services.families.wan.denoiser import DENOISER
from services.families.wan.presets import PRESETS, VARIANTS
from services.families.wan.text import TEXT
from services.families.wan.tiny import tiny
from services.families.wan.vae import VAE
from services.family import Family

FAMILY = Family(name="wan", text=TEXT, dit=DENOISER, vae=VAE, variants=VARIANTS, presets=PRESETS, tiny=tiny)
