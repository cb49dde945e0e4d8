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

Samples = np.ndarray[Any, np.dtype[np.float32]]  # [C, N] in [-1, 1]
Pcm = np.ndarray[Any, np.dtype[np.int16]]  # [C, N]

SOUND_MIMES = {"wav": "audio/wav", "flac": "audio/flac", "raw": "application/octet-stream"}
LAYOUTS = {1: "mono", 2: "stereo"}
MAX_SAMPLING_RATE = 192_000
PCM_BYTES, PCM_PEAK = 2, 2**15 - 1
AAC_FRAME_SAMPLES = 1024
AAC_BITS_PER_S = 96_000  # of each channel


@dataclass(frozen=True, slots=True)
class Sound:
    """A piece of sound.

    Attributes:
        samples: float32 [C, N] in [-1, 1]; one channel, or left and right.
        sampling_rate: samples a second; of a clip's sound one that AAC knows (16000, 24000, 32000, 44100, 48000, ...).
    """

    samples: Samples
    sampling_rate: int

    def then(self, following: Sound) -> Sound:
        """This and what follows it."""
        return Sound(np.concatenate((self.samples, following.samples), axis=1), self.sampling_rate)


def encode_sound(pieces: Iterator[Sound], output_format: str) -> bytes:
    """Pieces that follow each other, as one file of 16 bits a sample.

    Args:
        output_format: wav, flac or raw: the samples alone, little-endian, the channels of each side by side.

    Raises:
        RuntimeError: there is none.
    """
    first = next(pieces, None)
    if first is None:
        raise RuntimeError("no sound came")
    pcm = (_pcm(piece) for piece in itertools.chain((first,), pieces))
    if output_format == "raw":
        return b"".join(samples.T.tobytes() for samples in pcm)
    file = io.BytesIO()
    (_write_wav if output_format == "wav" else _write_flac)(file, first, pcm)
    return file.getvalue()


def _pcm(sound: Sound) -> Pcm:
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
    """

    def __init__(self, container: Any, first: Sound, seconds: Fraction) -> None:
        self._channels = len(first.samples)
        self._num_samples = round(seconds * first.sampling_rate)
        self._track = _Track(container, "aac", first, "fltp", bit_rate=AAC_BITS_PER_S * self._channels)

    def add(self, sound: Sound) -> None:
        """What follows."""
        self._track.add(sound.samples[:, : self._num_samples - self._track.num_samples].clip(-1, 1))

    def end(self) -> None:
        """No more follows."""
        self._track.add(np.zeros((self._channels, self._num_samples - self._track.num_samples), np.float32))
        self._track.end()


def num_aac_frames(first: Sound, seconds: Fraction) -> int:
    """How many a clip's sound has at most, with those that begin and end it."""
    return 2 + math.ceil(seconds * first.sampling_rate / AAC_FRAME_SAMPLES)
