"""Sound: alone as WAV, FLAC and raw samples; in MP4 beside its frames, from a VAE's decode and past an interpolator."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from interpolation_svc import rank as interpolation_rank
from interpolation_svc.engine import InterpolationEngine
from interpolation_svc.ifnet import IFNet, IFNetSpec
from lightloom.client import Result
from protos import interpolation_pb2, vae_pb2
from services.channel import FrameQueue, Kind, OpenCall, error_from_bytes
from services.clip_bundles import piece_of
from services.clip_writer import ClipWriter, encode_frames
from services.config import ModelSection, ServiceSection, StageConfig
from services.errors import CorruptTensor, InvalidRequest, NonFinite, OutOfMemory, StageMismatch
from services.family import ChunkWithSound, Tensors
from services.rank_process import Call
from services.request import GenerationParams, Limits, ResolvedParams, resolve
from services.sound import AAC_FRAME_SAMPLES, AAC_SAMPLING_RATES, Sound
from services.tensors import Bundle, bundle_frames
from services.wire import params_to_proto
from tests.unit.test_vae_engine import FakeVae
from vae_svc import rank
from vae_svc.engine import VaeChunk, VaeEngine, VaeJob

# The second is at no chunk's end where it was at its begin: a piece that is played twice is heard.
NOTES_HZ = (440.0, 1234.5)
NO_FRAMES = np.empty((0, 0, 0, 3), np.uint8)
CLIP = Limits(
    output="video",
    max_frames=81,
    default_frames=17,
    default_fps=16.0,
    min_side_px=32,
    default_width=64,
    default_height=48,
)
SOUND = Limits(output="audio", min_side_px=32, default_width=64, default_height=64)


def tune(seconds: float, sampling_rate: int, channels: int) -> Sound:
    """A sine on the left, another on the right."""
    times_s = np.arange(round(seconds * sampling_rate)) / sampling_rate
    notes = [0.5 * np.sin(2 * np.pi * hz * times_s) for hz in NOTES_HZ[:channels]]
    return Sound(np.stack(notes).astype(np.float32), sampling_rate)


def split(sound: Sound, shares: Sequence[float]) -> list[Sound]:
    """Pieces that end at those shares of it, and the rest."""
    ends = [round(share * sound.samples.shape[1]) for share in shares]
    return [Sound(samples, sound.sampling_rate) for samples in np.split(sound.samples, ends, axis=1)]


def heard(data: bytes) -> Sound:
    """What a player plays."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.audio[0]
        as_floats = av.AudioResampler("fltp")
        pieces = [out.to_ndarray() for frame in container.decode(stream) for out in as_floats.resample(frame)]
        return Sound(np.concatenate(pieces, axis=1), stream.rate)


def loudest_hz(sound: Sound) -> list[float]:
    """Of each channel."""
    spectra = np.abs(np.fft.rfft(sound.samples * np.hanning(sound.samples.shape[1]), axis=1))
    return [float(peak) * sound.sampling_rate / sound.samples.shape[1] for peak in spectra.argmax(1)]


def alone(output_format: str, *pieces: Sound) -> tuple[str, bytes]:
    writer = ClipWriter(output_format, 90, 0.0, 0)
    for piece in pieces:
        writer.add(NO_FRAMES, piece)
    return writer.finish()


@pytest.mark.parametrize(("sampling_rate", "channels"), [(16000, 1), (44100, 2), (48000, 2)])
def test_sound_alone_in_pieces_is_what_the_file_plays(sampling_rate: int, channels: int) -> None:
    sound = tune(1.5, sampling_rate, channels)
    pieces = split(sound, (0.1, 0.1, 0.7))
    for output_format in ("wav", "flac"):
        mime, data = alone(output_format, *pieces)
        played = heard(data)
        assert (mime, played.sampling_rate) == (f"audio/{output_format}", sampling_rate)
        assert played.samples.shape == sound.samples.shape
        assert np.abs(played.samples - sound.samples).max() < 2**-15, "16 bits of it, and nothing at the joins"
        assert loudest_hz(played) == pytest.approx(NOTES_HZ[:channels], abs=1.0)
        assert alone(output_format, sound)[1] == data
    raw = np.frombuffer(alone("raw", *pieces)[1], "<i2").reshape(-1, channels).T
    assert np.array_equal(raw, np.rint(heard(alone("wav", *pieces)[1]).samples * 2**15))


def test_what_is_too_loud_is_cut_and_no_sound_is_no_file() -> None:
    loud = Sound(np.array([[-1.0, 1.0, 1.5, -2.0]], np.float32), 16000)
    assert np.frombuffer(alone("raw", loud)[1], "<i2").tolist() == [-32767, 32767, 32767, -32767]
    with pytest.raises(RuntimeError, match="no sound came"):
        alone("wav")


def test_a_wav_is_saved_under_its_name(tmp_path: Path) -> None:
    """Python's table of types knows `audio/x-wav` only."""
    for output_format in ("wav", "flac"):
        mime, data = alone(output_format, tune(0.1, 16000, 1))
        result = Result("r", mime, 0, 0, 0, {}, data)
        assert result.save(tmp_path / f"a.{output_format}").read_bytes() == data
        with pytest.raises(InvalidRequest, match=f"the result is {mime}"):
            result.save(tmp_path / "a.mp3")


def test_sound_keeps_its_channels_and_its_rate() -> None:
    first = tune(0.1, 16000, 1)
    for other, named in ((tune(0.1, 24000, 1), "1 channels of 24000 Hz"), (tune(0.1, 16000, 2), "2 channels of 16000")):
        with pytest.raises(StageMismatch, match=f"goes on with {named}"):
            first.then(other)
        for output_format in ("wav", "flac", "raw"):
            with pytest.raises(StageMismatch, match=f"goes on with {named}"):
                alone(output_format, first, other)
        with pytest.raises(StageMismatch, match=f"goes on with {named}"):
            clip(FRAMES, [first, other, None, None], 16.0)
    with pytest.raises(StageMismatch, match="3 channels: it must have one or two"):
        Sound(np.zeros((3, 8), np.float32), 16000)
    with pytest.raises(StageMismatch, match="between 1 and 192000"):
        Sound(np.zeros((1, 8), np.float32), 0)


# ---- Beside frames ---------------------------------------------------------------------------------------------------

FRAMES = np.random.default_rng(0).integers(0, 256, (17, 32, 48, 3), dtype=np.uint8)
# After which frames a chunk ends, and after which share of the sound.
ENDS = (1, 5, 13)
COMES = {"beside": [end / len(FRAMES) for end in ENDS], "first": [1, 1, 1], "late": [0, 0, 0]}


def clip(frames: np.ndarray, sounds: Sequence[Sound | None], fps: float, output_format: str = "mp4") -> bytes:
    writer = ClipWriter(output_format, 90, fps, len(frames))
    for chunk, sound in zip(np.split(frames, ENDS), sounds, strict=True):
        writer.add(chunk, sound)
    return writer.finish()[1]


def times_s(data: bytes) -> list[float]:
    """When each frame is shown."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.time for frame in container.decode(video=0)]


@pytest.mark.parametrize(("fps", "sampling_rate", "channels"), [(16.0, 16000, 2), (23.976, 44100, 2), (1.0, 48000, 1)])
def test_an_mp4_has_its_sound_however_it_came(fps: float, sampling_rate: int, channels: int) -> None:
    seconds = len(FRAMES) / fps
    sound = tune(seconds, sampling_rate, channels)
    files = {name: clip(FRAMES, split(sound, shares), fps) for name, shares in COMES.items()}
    assert len(set(files.values())) == 1, "what comes sooner or later, in pieces or whole, is written in one order"
    data = files["beside"]
    assert data.find(b"moov") < data.find(b"mdat"), "a player can begin before the end has come"
    assert times_s(data) == times_s(clip(FRAMES, [None] * 4, fps)), "the frames are shown when they are without sound"
    played = heard(data)
    assert played.sampling_rate == sampling_rate
    assert 0 <= played.samples.shape[1] - sound.samples.shape[1] < AAC_FRAME_SAMPLES
    assert loudest_hz(played) == pytest.approx(NOTES_HZ[:channels], abs=2.0)
    inside = slice(AAC_FRAME_SAMPLES, sound.samples.shape[1] - AAC_FRAME_SAMPLES)
    assert np.abs(played.samples[:, inside] - sound.samples[:, inside]).max() < 0.1, "in time, and without a gap"
    with av.open(io.BytesIO(data)) as container:
        assert container.duration / av.time_base == pytest.approx(seconds, abs=0.002)
        places = sorted(
            (packet.pos, float(packet.dts * packet.time_base)) for packet in container.demux() if packet.size
        )
    apart_s = max(before - after for (_, before), (_, after) in itertools.pairwise(places))
    assert apart_s < 1 / fps + AAC_FRAME_SAMPLES / sampling_rate, "what is heard and seen at once stands together"


@pytest.mark.parametrize("seconds", [0.5, 1.5], ids=["short", "long"])
def test_sound_is_as_long_as_its_clip(seconds: float) -> None:
    sampling_rate, clip_seconds = 24000, len(FRAMES) / 16
    played = heard(clip(FRAMES, split(tune(seconds, sampling_rate, 1), COMES["beside"]), 16.0)).samples[0]
    assert 0 <= len(played) - round(clip_seconds * sampling_rate) < AAC_FRAME_SAMPLES
    loud = np.abs(played) > 0.1
    assert loud[: round(0.45 * sampling_rate)].any()
    assert loud[round(0.6 * sampling_rate) :].any() == (seconds > clip_seconds), "what is missing is silent"


@pytest.mark.parametrize("output_format", ["gif", "webp", "zip", "raw"])
def test_formats_without_sound_are_made_of_the_frames(output_format: str) -> None:
    frames, sounds = FRAMES[:, :16, :16], split(tune(1.0, 16000, 1), COMES["beside"])
    assert clip(frames, sounds, 16.0, output_format) == encode_frames(frames, output_format, 90, 16.0)[1]


def test_an_mp4_says_which_rates_it_can_have() -> None:
    assert set(av.Codec("aac", "w").audio_rates) == set(AAC_SAMPLING_RATES)
    with pytest.raises(InvalidRequest, match="20000 Hz, .* 44100, 48000, .* gif, webp, zip and raw") as refused:
        clip(FRAMES, [tune(1.0, 20000, 1), None, None, None], 16.0)
    assert refused.value.param == "output_format"
    assert clip(FRAMES, [tune(1.0, 20000, 1), None, None, None], 16.0, "gif")


def test_sound_that_does_not_begin_with_the_clip_is_not_lost_in_silence() -> None:
    with pytest.raises(RuntimeError, match="did not begin with its first frames"):
        clip(FRAMES, [None, *split(tune(1.0, 16000, 1), (0.3, 0.6))], 16.0)


@pytest.mark.parametrize(("limits", "output_format"), [(CLIP, "wav"), (CLIP, "flac"), (SOUND, "mp4"), (SOUND, "png")])
def test_a_format_of_another_kind_of_model_is_refused(limits: Limits, output_format: str) -> None:
    with pytest.raises(InvalidRequest, match=f"does not fit a model that makes {limits.output}") as refused:
        resolve(GenerationParams(model="m", prompt="p", output_format=output_format), limits, seed=0)
    assert refused.value.param == "output_format"


# ---- From a VAE ------------------------------------------------------------------------------------------------------

RATE = 48000
CONFIG = StageConfig(service=ServiceSection(name="s", port=0), model=ModelSection(name="m", source="packaged"))


class SoundingVae(FakeVae):
    """Plays a tune beside the frames, or without any; not finite when it is told so."""

    def decode(self, model: object, rows: Sequence[Tensors], params: ResolvedParams) -> Iterator[ChunkWithSound]:
        seconds = params.num_frames / params.fps if params.fps else 2.0
        pieces = split(
            tune(seconds, RATE, 2), [k * 4 / params.num_frames for k in range(1, (params.num_frames + 3) // 4)]
        )
        if not params.fps:
            pieces = split(pieces[0], (0.25, 0.5))
        frames = (
            super().decode(model, rows, params) if params.fps else itertools.repeat(torch.empty(len(rows), 0, 3, 0, 0))
        )
        scale = torch.cat([row["latents"][:, :1, None] for row in rows]).abs() + 1
        for number, (chunk, piece) in enumerate(zip(frames, pieces, strict=bool(params.fps))):
            if number and bool((scale == 8).any()):
                raise torch.OutOfMemoryError("too large")
            yield ChunkWithSound(chunk, torch.from_numpy(piece.samples) * scale / scale.nan_to_num(), RATE)


class EarlyVae(SoundingVae):
    """Plays all before its first frame; at another rate from then on, if it is told so."""

    def __init__(self, *rates: int) -> None:
        super().__init__()
        self._rates = rates

    def decode(self, model: object, rows: Sequence[Tensors], params: ResolvedParams) -> Iterator[ChunkWithSound]:
        chunks = list(super().decode(model, rows, params))
        samples = torch.cat([chunk.samples for chunk in chunks], -1)
        yield ChunkWithSound(torch.empty(len(rows), 0, 3, 0, 0), samples, self._rates[0])
        for chunk in chunks:
            yield ChunkWithSound(chunk.frames, samples[..., :0], self._rates[-1])


def params_of(limits: Limits, **wishes: object) -> ResolvedParams:
    return resolve(GenerationParams(model="m", prompt="p", **wishes), limits, seed=0)


def payloads(outbox: FrameQueue) -> list[bytes]:
    return [frame.payload for frame in outbox.take(0) or [] if frame.kind is Kind.MESSAGE]


def decoded(
    monkeypatch: pytest.MonkeyPatch,
    limits: Limits,
    mesh: object = None,
    *,
    vae: FakeVae | None = None,
    frames_only: bool = False,
    **wishes: object,
) -> list[bytes]:
    """What the rank of a VAE of such models answers. Raises ServiceError: what it fails with."""
    monkeypatch.setattr(rank, "open_model", lambda _: None)
    monkeypatch.setattr(rank, "limits_of", lambda *_: limits)
    monkeypatch.setattr(rank, "open_engine", lambda *_: VaeEngine((vae or SoundingVae()).part(), None, 1))
    program, outbox = rank.VaeProgram(CONFIG, mesh), FrameQueue(1 << 26)
    call = Call(1, OpenCall("Decode", "request", "", 0.0), outbox)
    program.opened(call)
    params = params_to_proto(params_of(limits, **wishes))
    start = vae_pb2.DecodeStart(params=params, frames_only=frames_only)
    program.message(call, vae_pb2.DecodeRequest(start=start).SerializeToString())
    for message in bundle_frames({"latents": torch.zeros(1, 3)}):
        program.message(call, message)
    while program.tick():
        """It is decoded to its end."""
    assert call.closed
    frames = outbox.take(0) or []
    for frame in frames:
        if frame.kind is Kind.ERROR:
            raise error_from_bytes(frame.payload)
    return [frame.payload for frame in frames if frame.kind is Kind.MESSAGE]


def media_of(messages: list[bytes]) -> tuple[vae_pb2.types__pb2.MediaHeader, bytes]:
    answers = [vae_pb2.DecodeResponse.FromString(message) for message in messages]
    [header] = [answer.media for answer in answers if answer.HasField("media")]
    return header, b"".join(answer.chunk.data for answer in answers)


@pytest.mark.parametrize("mesh", [None, SimpleNamespace(rank=0)], ids=["alone", "first of several"])
def test_a_vaes_sound_comes_with_its_clip(monkeypatch: pytest.MonkeyPatch, mesh: object) -> None:
    header, data = media_of(decoded(monkeypatch, CLIP, mesh))
    assert (header.mime, header.num_frames, header.fps) == ("video/mp4", 17, 16.0)
    expected, played = tune(17 / 16, RATE, 2).samples, heard(data).samples
    assert len(times_s(data)) == 17
    inside = slice(AAC_FRAME_SAMPLES, expected.shape[1] - AAC_FRAME_SAMPLES)
    assert np.abs(played[:, inside] - expected[:, inside]).max() < 0.1, "without a gap where chunks join"


def test_of_several_ranks_one_writes_the_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = decoded(monkeypatch, CLIP, SimpleNamespace(rank=1))
    assert not any(vae_pb2.DecodeResponse.FromString(message).chunk.data for message in messages)


@pytest.mark.parametrize("output_format", ["wav", "flac", "raw"])
def test_a_model_of_sound_alone(monkeypatch: pytest.MonkeyPatch, output_format: str) -> None:
    header, data = media_of(decoded(monkeypatch, SOUND, output_format=output_format))
    assert (header.width, header.height, header.num_frames, header.nbytes) == (0, 0, 0, len(data))
    assert data == alone(output_format, tune(2.0, RATE, 2))[1]


@pytest.mark.parametrize("output_format", ["mp4", "raw", "zip"])
def test_sound_may_come_before_the_first_frame(monkeypatch: pytest.MonkeyPatch, output_format: str) -> None:
    expected = decoded(monkeypatch, CLIP, output_format=output_format)
    assert media_of(decoded(monkeypatch, CLIP, vae=EarlyVae(RATE), output_format=output_format)) == media_of(expected)


def test_a_call_says_what_is_wrong_with_its_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="20000 Hz, which an MP4 cannot have: AAC knows"):
        decoded(monkeypatch, CLIP, vae=EarlyVae(20000))
    with pytest.raises(StageMismatch, match="goes on with 2 channels of 24000 Hz: it began with 2 channels of 48000"):
        decoded(monkeypatch, CLIP, vae=EarlyVae(RATE, 24000), output_format="gif")


def test_sound_goes_past_the_interpolator(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = IFNet(IFNetSpec((16, 12, 8, 8), encodes=True)).eval().requires_grad_(False)
    monkeypatch.setattr(interpolation_rank, "open_engine", lambda _config: InterpolationEngine(net, 2))
    program, outbox = interpolation_rank.InterpolationProgram(CONFIG), FrameQueue(1 << 26)
    params = params_of(CLIP, num_frames=9)
    call = Call(1, OpenCall("Interpolate", "request", "", 0.0), outbox)
    program.opened(call)
    start = interpolation_pb2.InterpolateStart(params=params_to_proto(params), exponent=1, scale=1.0, num_frames=9)
    program.message(call, interpolation_pb2.InterpolateRequest(start=start).SerializeToString())
    for message in decoded(monkeypatch, CLIP, frames_only=True, num_frames=9):
        if message[0] == 0x12:  # a tensor frame
            program.message(call, message)
            program.tick()
    program.half_closed(call)
    while program.tick():
        """It is interpolated to its end."""
    header, data = media_of(payloads(outbox))
    assert (header.num_frames, header.fps, len(times_s(data))) == (17, 32.0, 17)
    expected, played = tune(17 / 32, RATE, 2).samples, heard(data).samples
    assert 0 <= played.shape[1] - expected.shape[1] < AAC_FRAME_SAMPLES
    inside = slice(AAC_FRAME_SAMPLES, expected.shape[1] - AAC_FRAME_SAMPLES)
    assert np.abs(played[:, inside] - expected[:, inside]).max() < 0.1


@pytest.mark.parametrize(
    ("samples", "attributes"),
    [
        (torch.zeros(2, 8, dtype=torch.float16), {"sampling_rate": "48000"}),
        (torch.zeros(8), {"sampling_rate": "48000"}),
        (torch.zeros(3, 8), {"sampling_rate": "48000"}),
        (torch.zeros(2, 8), {}),
        (torch.zeros(2, 8), {"sampling_rate": "0"}),
        (torch.zeros(2, 8), {"sampling_rate": "10000000000"}),
    ],
)
def test_sound_of_another_stage_is_checked(samples: torch.Tensor, attributes: dict[str, str]) -> None:
    with pytest.raises(CorruptTensor, match="sound|sampling_rate"):
        piece_of(Bundle({"frames": torch.zeros(1), "sound": samples}, attributes))


def test_sound_that_is_not_finite_fails_its_job() -> None:
    engine = VaeEngine(SoundingVae().part(), None, 2)
    for name, scale in (("good", 0.0), ("bad", float("nan"))):
        engine.submit(VaeJob(name, params_of(SOUND), {"latents": torch.full((1, 3), scale)}))
    events = [event for _ in range(4) for event in engine.tick()]
    assert [event.job.request_id for event in events if isinstance(event, VaeChunk)] == ["good"] * 3
    ended = {event.job.request_id: event.error for event in events if not isinstance(event, VaeChunk)}
    assert ended["good"] is None and isinstance(ended["bad"], NonFinite)


def test_sound_of_which_some_was_given_is_not_made_again() -> None:
    engine = VaeEngine(SoundingVae().part(), None, 2)
    for name in ("one", "other"):
        engine.submit(VaeJob(name, params_of(SOUND), {"latents": torch.full((1, 3), 7.0)}))
    first, second = engine.tick(), engine.tick()
    assert all(isinstance(event, VaeChunk) for event in first) and len(first) == 2
    assert [type(event.error) for event in second] == [OutOfMemory] * 2
    assert not engine.busy
