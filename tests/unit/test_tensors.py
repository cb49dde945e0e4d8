"""Tensors survive the wire bit for bit, and nothing that is not a whole, true bundle gets through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import dit_pb2, text_encoder_pb2, types_pb2, vae_pb2
from services.errors import CorruptTensor, ServiceError
from services.tensor_wire import (
    CHUNK_BYTES,
    MAX_TENSORS,
    WHOLE_BYTES,
    BundleCursor,
    chunk_message,
    chunk_of,
    end_message,
    frame_of,
    header_message,
    is_end,
    is_header,
    is_whole,
    message_of,
    whole_message,
)
from services.tensors import DTYPES, Bundle, BundleReader, bundle_frames

shapes = st.lists(st.integers(0, 5), max_size=4)
names = st.text(min_size=1, max_size=20)


def read(messages: list[bytes], max_bytes: int = 1 << 30) -> Bundle:
    reader = BundleReader(max_bytes)
    for message in messages:
        frame = frame_of(message)
        assert frame is not None
        bundle = reader.feed(frame)
        if bundle is not None:
            return bundle
    raise AssertionError("the bundle did not end")


def meta(**changes: object) -> types_pb2.TensorMeta:
    return types_pb2.TensorMeta(**{"name": "x", "dtype": types_pb2.DTYPE_UINT8, "shape": [4], "nbytes": 4, **changes})


def whole(*data: bytes, **changes: object) -> bytes:
    return whole_message(types_pb2.TensorHeader(tensors=[meta(**changes)]), data)


def opening(*metas: types_pb2.TensorMeta) -> bytes:
    return header_message(types_pb2.TensorHeader(tensors=metas))


def random_tensor(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits at all, NaNs included (bool has two values only)."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


@settings(max_examples=60, deadline=None)
@given(
    content=st.dictionaries(names, st.tuples(shapes, st.sampled_from(list(DTYPES)), st.integers(0, 99)), max_size=5),
    attributes=st.dictionaries(names, st.text(max_size=20), max_size=3),
    whole_bytes=st.sampled_from([0, WHOLE_BYTES]),
)
def test_any_bundle_survives(
    content: dict[str, tuple[list[int], torch.dtype, int]], attributes: dict[str, str], whole_bytes: int
) -> None:
    tensors = {name: random_tensor(*spec) for name, spec in content.items()}
    messages = list(bundle_frames(tensors, attributes, whole_bytes=whole_bytes))
    assert whole_bytes == 0 or len(messages) == 1
    bundle = read(messages)
    assert bundle.attributes == attributes
    assert list(bundle.tensors) == list(tensors)
    for name, tensor in tensors.items():
        got = bundle.tensors[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_strided_and_large_tensors() -> None:
    large = torch.arange(3 * CHUNK_BYTES + 5, dtype=torch.int64)
    strided = torch.arange(24.0).reshape(4, 6).T[::2]
    messages = list(bundle_frames({"large": large, "strided": strided}))
    assert len(messages) == 2 + -(-large.nbytes // CHUNK_BYTES) + 1
    assert max(map(len, messages)) < CHUNK_BYTES + 64
    bundle = read(messages)
    assert torch.equal(bundle.tensors["large"], large) and torch.equal(bundle.tensors["strided"], strided)


def test_only_small_bundles_travel_whole() -> None:
    small, large = torch.zeros(WHOLE_BYTES, dtype=torch.uint8), torch.zeros(WHOLE_BYTES + 1, dtype=torch.uint8)
    [message] = bundle_frames({"x": small}, whole_bytes=WHOLE_BYTES)
    frame = frame_of(message)
    assert frame is not None and is_whole(frame) and is_end(frame) and not is_header(frame)
    assert len(list(bundle_frames({"x": large}, whole_bytes=WHOLE_BYTES))) == 3


def test_one_reader_reads_one_bundle_after_the_other() -> None:
    reader = BundleReader()
    for value in (1, 2):
        assert reader.empty
        *body, end = [frame_of(message) for message in bundle_frames({"x": torch.tensor([value])})]
        assert all(reader.feed(frame) is None for frame in body) and not reader.empty
        bundle = reader.feed(end)
        assert bundle is not None and bundle.tensors["x"].item() == value


def test_messages_own_their_bytes() -> None:
    tensor = torch.ones(8)
    messages = list(bundle_frames({"x": tensor}))
    tensor.zero_()
    assert torch.equal(read(messages).tensors["x"], torch.ones(8))


def test_a_dtype_without_wire_form_is_named() -> None:
    with pytest.raises(ValueError, match="complex64"):
        list(bundle_frames({"x": torch.zeros(2, dtype=torch.complex64)}))


# ---- The bytes are protobuf's ----------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [0, 1, 127, 128, 1023])
@pytest.mark.parametrize("offset", [0, 1, 300, 1 << 20, 1 << 33])
@pytest.mark.parametrize("size", [1, 127, 128, 70_000])
def test_chunks_by_hand_equal_protobuf(tensor: int, offset: int, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    data = data[:size]
    proto = types_pb2.TensorFrame(chunk=types_pb2.TensorChunk(tensor=tensor, offset=offset, data=data))
    message = chunk_message(tensor, offset, memoryview(data))
    assert message == dit_pb2.DenoiseRequest(frame=proto).SerializeToString()
    chunk = chunk_of(frame_of(message) or b"")
    assert (chunk.tensor, chunk.offset, bytes(chunk.data)) == (tensor, offset, data)


@pytest.mark.parametrize(
    "message_class",
    [
        text_encoder_pb2.EncodeResponse,
        dit_pb2.DenoiseRequest,
        dit_pb2.DenoiseResponse,
        vae_pb2.DecodeRequest,
        vae_pb2.DecodeResponse,
    ],
)
def test_one_frame_fits_every_stream(message_class: type) -> None:
    messages = [
        message for size in (0, WHOLE_BYTES) for message in bundle_frames({"x": torch.arange(5)}, whole_bytes=size)
    ]
    for message in messages:
        parsed = message_class.FromString(message)
        assert parsed.WhichOneof("kind") == "frame"
        frame = frame_of(message)
        assert frame is not None and parsed.frame.SerializeToString() == bytes(frame)
        assert message_of(frame) == message


def test_other_messages_are_no_frames() -> None:
    assert frame_of(b"") is None
    assert frame_of(dit_pb2.DenoiseResponse(step=dit_pb2.StepEvent(step=1)).SerializeToString()) is None
    assert frame_of(dit_pb2.DenoiseRequest(start=dit_pb2.DenoiseStart(num_bundles=2)).SerializeToString()) is None
    header, *_, end = [frame_of(message) for message in bundle_frames({"x": torch.zeros(1)})]
    assert is_header(header) and not is_end(header) and is_end(end) and not is_header(end)
    assert frame_of(end_message()) == end


# ---- What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([end_message()], "does not start with its header"),
        ([chunk_message(0, 0, b"abcd")], "does not start with its header"),
        ([opening(meta()), opening(meta())], "two headers"),
        ([opening(meta()), end_message()], "ends inside 'x'"),
        ([opening(meta()), chunk_message(0, 0, b"abc"), end_message()], "ends inside 'x'"),
        ([opening(meta()), chunk_message(0, 1, b"abc")], "continues at byte 0"),
        ([opening(meta()), chunk_message(1, 0, b"abcd")], "came where tensor 0"),
        ([opening(meta()), chunk_message(0, 0, b"abcde")], "has 5 bytes"),
        ([opening(meta()), chunk_message(0, 0, b"")], "has 0 bytes"),
        ([opening(meta()), chunk_message(0, 0, b"abcd"), chunk_message(0, 4, b"e")], "more chunks"),
        ([opening(meta()), chunk_message(0, 0, b"abcd"), end_message()], "crc32c"),
        ([opening(meta(nbytes=5))], "has 4 bytes, not 5"),
        ([opening(meta(shape=[-4]))], "shape"),
        ([opening(meta(shape=[1] * 9, nbytes=1))], "shape"),
        ([opening(meta(shape=[1 << 40], nbytes=1 << 40))], "at most 1073741824 are allowed"),
        ([opening(meta(dtype=99))], "unknown dtype"),
        ([opening(meta(dtype=0))], "unknown dtype"),
        ([opening(meta(name=""))], "is empty"),
        ([opening(meta(), meta())], "used twice"),
        ([opening(*(meta(name=str(i)) for i in range(MAX_TENSORS + 1)))], "at most 1024 fit"),
        ([message_of(b"\x0a\x05ab")], "cannot be parsed"),
        ([message_of(b"\x2a\x00")], "does not start with its header"),
        ([opening(meta()), message_of(b"\x2a\x00")], "neither header, chunk nor end"),
        ([opening(meta()), message_of(b"\x12\x04\x7a\x09ab")], "cut short"),
        ([opening(meta()), message_of(b"\x12\x02\x20\x01")], "unknown field"),
        ([opening(meta()), message_of(b"\x12\x02\x08\xff")], "cut inside a number"),
        ([opening(meta()), whole(b"abcd")], "inside another"),
        ([whole(b"abcd")], "crc32c"),
        ([whole(b"abc")], "other sizes"),
        ([whole()], "other sizes"),
        ([whole(b"abcd", b"")], "other sizes"),
        ([whole(b"abcd", nbytes=5)], "has 4 bytes, not 5"),
        ([whole(b"abcd", shape=[1 << 40], nbytes=1 << 40)], "at most 1073741824 are allowed"),
        ([message_of(b"\x22\x05ab")], "cannot be parsed"),
        ([message_of(b"\x22\x00\x1a\x00")], "more than a whole bundle"),
    ],
)
def test_wrong_bundles_are_refused(messages: list[bytes], words: str) -> None:
    with pytest.raises(CorruptTensor, match=words):
        read(messages)


def test_a_finished_bundle_takes_no_more() -> None:
    cursor = BundleCursor()
    for message in bundle_frames({"x": torch.zeros(3)}):
        cursor.feed(frame_of(message) or b"")
    assert cursor.ended
    with pytest.raises(CorruptTensor, match="follows the end"):
        cursor.feed(frame_of(end_message()) or b"")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_noise_is_refused_or_harmless(data: st.DataObject) -> None:
    """Any bytes, or a good bundle with any byte changed: CorruptTensor, or what was sent, never anything else."""
    sent = torch.arange(40, dtype=torch.uint8)
    size = data.draw(st.sampled_from([0, WHOLE_BYTES]))
    messages = list(bundle_frames({"x": sent, "y": torch.zeros(0)}, whole_bytes=size))
    index = data.draw(st.integers(0, len(messages) - 1))
    if data.draw(st.booleans()):
        messages[index] = data.draw(st.binary(max_size=64))
    else:
        changed = bytearray(messages[index])
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        messages[index] = bytes(changed)
    reader = BundleReader(1 << 20)
    try:
        for message in messages:
            frame = frame_of(message)
            bundle = reader.feed(frame) if frame is not None else None
            if bundle is not None:
                assert all(torch.equal(t, sent) for t in bundle.tensors.values() if t.numel() == 40)
    except ServiceError as error:
        assert isinstance(error, CorruptTensor)
