"""Sound to encoded media: WAV, FLAC, raw samples, and the AAC track of a clip. For the stages that make media."""

from __future__ import annotations

import io
import itertools
import math
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from services.errors import InvalidRequest, StageMismatch

Samples = np.ndarray[Any, np.dtype[np.float32]]  # [C, N] in [-1, 1]
Pcm = np.ndarray[Any, np.dtype[np.int16]]  # [C, N]

SOUND_MIMES = {"wav": "audio/wav", "flac": "audio/flac", "raw": "application/octet-stream"}
LAYOUTS = {1: "mono", 2: "stereo"}
MAX_SAMPLING_RATE = 192_000
AAC_SAMPLING_RATES = (7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
PCM_BYTES, PCM_PEAK = 2, 2**15 - 1
AAC_FRAME_SAMPLES = 1024
AAC_BITS_PER_S = 96_000  # of each channel


@dataclass(frozen=True, slots=True)
class Sound:
    """A piece of sound.

    Attributes:
        samples: float32 [C, N] in [-1, 1]; one channel, or left and right.
        sampling_rate: samples a second, at most MAX_SAMPLING_RATE; in an MP4 one of AAC_SAMPLING_RATES.

    Raises:
        StageMismatch: it has other channels, or another rate.
    """

    samples: Samples
    sampling_rate: int

    def __post_init__(self) -> None:
        if len(self.samples) not in LAYOUTS:
            raise StageMismatch(f"the sound has {len(self.samples)} channels: it must have one or two")
        if not 0 < self.sampling_rate <= MAX_SAMPLING_RATE:
            raise StageMismatch(
                f"the sound has {self.sampling_rate} samples a second: it must have between 1 and {MAX_SAMPLING_RATE}"
            )

    def check_next(self, following: Sound) -> None:
        """Raises StageMismatch: what follows has other channels, or another rate."""
        kind, other = (f"{len(sound.samples)} channels of {sound.sampling_rate} Hz" for sound in (self, following))
        if kind != other:
            raise StageMismatch(f"the sound goes on with {other}: it began with {kind}, and must keep them")

    def then(self, following: Sound) -> Sound:
        """This and what follows it. Raises StageMismatch: as `check_next`."""
        self.check_next(following)
        return Sound(np.concatenate((self.samples, following.samples), axis=1), self.sampling_rate)


def encode_sound(pieces: Iterator[Sound], output_format: str) -> bytes:
    """Pieces that follow each other, as one file of 16 bits a sample.

    Args:
        output_format: wav, flac or raw: the samples alone, little-endian, the channels of each side by side.

    Raises:
        RuntimeError: there is none.
        StageMismatch: they are not all of one rate, or not of as many channels.
    """
    first = next(pieces, None)
    if first is None:
        raise RuntimeError("no sound came")
    pcm = (_pcm(first, piece) for piece in itertools.chain((first,), pieces))
    if output_format == "raw":
        return b"".join(samples.T.tobytes() for samples in pcm)
    file = io.BytesIO()
    (_write_wav if output_format == "wav" else _write_flac)(file, first, pcm)
    return file.getvalue()


def _pcm(first: Sound, sound: Sound) -> Pcm:
    first.check_next(sound)
    pcm: Pcm = np.rint(sound.samples.clip(-1, 1) * PCM_PEAK).astype("<i2")
    return pcm


def _write_wav(file: io.BytesIO, first: Sound, pcm: Iterator[Pcm]) -> None:
    with wave.open(file, "wb") as written:
        written.setnchannels(len(first.samples))
        written.setsampwidth(PCM_BYTES)
        written.setframerate(first.sampling_rate)
        for samples in pcm:
            written.writeframesraw(samples.T.tobytes())


def _write_flac(file: io.BytesIO, first: Sound, pcm: Iterator[Pcm]) -> None:
    import av

    open_container: Callable[..., Any] = av.open
    with open_container(file, "w", format="flac") as container:
        track = _Track(container, "flac", first, "s16p")
        for samples in pcm:
            track.add(samples)
        track.end()


class _Track:
    """A stream of sound in PyAV's container. What is added comes in `sample_format`, one plane for each channel."""

    def __init__(self, container: Any, codec: str, first: Sound, sample_format: str, **options: Any) -> None:
        layout = LAYOUTS[len(first.samples)]
        self._stream = container.add_stream(codec, rate=first.sampling_rate, layout=layout, **options)
        self._container = container
        self._kind = {"format": sample_format, "layout": layout}
        self._sampling_rate = first.sampling_rate
        self.num_samples = 0

    def add(self, samples: Samples | Pcm) -> None:
        """What follows, [C, N]."""
        import av

        if not samples.shape[1]:
            return
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), **self._kind)
        frame.sample_rate, frame.time_base = self._sampling_rate, Fraction(1, self._sampling_rate)
        frame.pts = self.num_samples
        self.num_samples += samples.shape[1]
        self._container.mux(self._stream.encode(frame))

    def end(self) -> None:
        """What the encoder still holds."""
        self._container.mux(self._stream.encode())


class ClipSound:
    """The AAC track of a clip, exactly as long as its frames: what is longer is cut, what is missing is silent.

    Args:
        container: PyAV's, open for writing.
        first: what comes first; nothing of it is written yet.
        seconds: of the clip.

    Raises:
        InvalidRequest: AAC does not know the rate.
    """

    def __init__(self, container: Any, first: Sound, seconds: Fraction) -> None:
        if first.sampling_rate not in AAC_SAMPLING_RATES:
            raise InvalidRequest(
                f"the model's sound has {first.sampling_rate} Hz, which an MP4 cannot have: AAC knows "
                f"{', '.join(map(str, AAC_SAMPLING_RATES))} Hz; gif, webp, zip and raw come without sound",
                param="output_format",
            )
        self._first = first
        self._channels = len(first.samples)
        self._num_samples = round(seconds * first.sampling_rate)
        self._track = _Track(container, "aac", first, "fltp", bit_rate=AAC_BITS_PER_S * self._channels)

    def add(self, sound: Sound) -> None:
        """What follows. Raises StageMismatch: as `Sound.check_next`."""
        self._first.check_next(sound)
        self._track.add(sound.samples[:, : self._num_samples - self._track.num_samples].clip(-1, 1))

    def end(self) -> None:
        """No more follows."""
        self._track.add(np.zeros((self._channels, self._num_samples - self._track.num_samples), np.float32))
        self._track.end()


def num_aac_frames(first: Sound, seconds: Fraction) -> int:
    """How many a clip's sound has at most, with those that begin and end it."""
    return 2 + math.ceil(seconds * first.sampling_rate / AAC_FRAME_SAMPLES)
