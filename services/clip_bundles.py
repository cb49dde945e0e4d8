"""A clip, piece by piece, from a VAE to an interpolator: bundles of frames, and of sound beside them if it has some."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from services.clip_reader import Frames
from services.errors import CorruptTensor
from services.sound import LAYOUTS, MAX_SAMPLING_RATE, Sound
from services.tensor_wire import WHOLE_BYTES
from services.tensors import Bundle, bundle_frames

FRAMES, SOUND, SAMPLING_RATE = "frames", "sound", "sampling_rate"


def messages_of(frames: Frames, sound: Sound | None) -> Iterator[bytes]:
    """The next frames [F, H, W, C] and the next sound as serialised messages; they must not change any more."""
    tensors, attributes = {FRAMES: torch.from_numpy(frames)}, {}
    if sound is not None:
        tensors[SOUND] = torch.from_numpy(sound.samples)
        attributes[SAMPLING_RATE] = str(sound.sampling_rate)
    return bundle_frames(tensors, attributes, whole_bytes=WHOLE_BYTES)


def piece_of(bundle: Bundle) -> tuple[torch.Tensor, Sound | None]:
    """The frames, which are not looked at, and the sound.

    Raises:
        CorruptTensor: the bundle has no frames, or more than frames and sound, or what is to be sound is none.
    """
    if not {FRAMES} <= bundle.tensors.keys() <= {FRAMES, SOUND}:
        names = ", ".join(bundle.tensors)
        raise CorruptTensor(f"a bundle has the tensors {names}: it must have {FRAMES}, and may have {SOUND}")
    samples = bundle.tensors.get(SOUND)
    if samples is None:
        return bundle.tensors[FRAMES], None
    rate = bundle.attributes.get(SAMPLING_RATE, "")
    if samples.dtype != torch.float32 or samples.dim() != 2 or len(samples) not in LAYOUTS:
        raise CorruptTensor(
            f"the sound is {samples.dtype} of shape {list(samples.shape)}: it must be float32, [C, N], of one channel "
            "or two"
        )
    if not (rate.isdecimal() and 0 < int(rate) <= MAX_SAMPLING_RATE):
        raise CorruptTensor(f"{SAMPLING_RATE} is {rate!r}: it must be between 1 and {MAX_SAMPLING_RATE}")
    return bundle.tensors[FRAMES], Sound(samples.numpy(), int(rate))
