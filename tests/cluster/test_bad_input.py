"""Bad input at every door: a clear error with the right code, the service lives, and nothing stays behind."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import grpc
import pytest
import torch
from PIL import Image

from protos import (
    dit_pb2,
    dit_pb2_grpc,
    gateway_pb2,
    text_encoder_pb2,
    text_encoder_pb2_grpc,
    types_pb2,
    vae_pb2,
    vae_pb2_grpc,
)
from services.client import error_from_rpc
from services.errors import CorruptTensor, InvalidRequest, ServiceError, UnknownModel, UnknownRequest
from services.request import GenerationParams, Limits, Media, ResolvedParams, resolve
from services.tensor_wire import header_message
from services.tensors import bundle_frames
from services.wire import params_to_proto
from tests.cluster.running import RunningCluster, wait_for
from tests.unit.test_media import bomb

MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def nothing_left(running_cluster, rest) -> Iterator[None]:
    """After every test: the same rank processes, none restarted, holding nothing."""
    before = pids(running_cluster)
    yield
    wait_for(lambda: not running_cluster.leftovers())
    assert pids(running_cluster) == before
    assert rest.get("/health").status_code == 200


def pids(running: RunningCluster) -> dict[str, int]:
    stages = ("text_encoder", "dit", "vae")
    return {name: running.rank(name).pid for stage in stages for name in running.names(stage)}


# ---- REST ------------------------------------------------------------------------------------------------------------

BODIES = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": " \n"}, "prompt is empty"),
    ({"prompt": "x" * 9000}, "at most 8000"),
    ({"prompt": "a\x00b"}, "NUL"),
    ({"prompt": 5}, "must be a string"),
    ({"prompt": None}, "must be a string"),
    ({}, "prompt is required"),
    ({"prompt": "a", "size": "100x256"}, "not a multiple of 16"),
    ({"prompt": "a", "size": "8192x8192"}, "between 64 and 1024"),
    ({"prompt": "a", "size": "1024x1024"}, "at most 262144"),
    ({"prompt": "a", "size": "256*256"}, "WIDTHxHEIGHT"),
    ({"prompt": "a", "size": 256}, "must be a string"),
    ({"prompt": "a", "steps": 0}, "between 2 and 200"),
    ({"prompt": "a", "steps": -1}, "between 2 and 200"),
    ({"prompt": "a", "steps": 1}, "steps is 1: it must be between 2 and 200"),
    ({"prompt": "a", "steps": 10**6}, "between 2 and 200"),
    ({"prompt": "a", "steps": 10**30}, "between 2 and 200"),
    ({"prompt": "a", "steps": "20"}, "must be an integer"),
    ({"prompt": "a", "steps": 2.5}, "must be an integer"),
    ({"prompt": "a", "steps": True}, "must be an integer"),
    ({"prompt": "a", "guidance": "high"}, "must be a number"),
    ({"prompt": "a", "guidance": 1000}, "between 0.0 and 30.0"),
    ({"prompt": "a", "guidance": -1}, "between 0.0 and 30.0"),
    ({"prompt": "a", "seed": -1}, "seed"),
    ({"prompt": "a", "n": 1000}, "n is 1000"),
    ({"prompt": "a", "stream": "yes"}, "must be true or false"),
    ({"prompt": "a", "output_format": "gif"}, "png"),
    ({"prompt": "a", "partial_images": 2}, "needs stream"),
    ({"prompt": "a", "colour": "red"}, "unknown field 'colour'"),
    ({"prompt": "a", "last_image": "data:image/png;base64,AAAA"}, "unknown field 'last_image': allowed are"),
    ({"prompt": "a", "image": "data:image/png;base64,AAAA"}, "no known type: send png, jpeg, webp"),
    ({"prompt": "a", "image": "http://example.com/a.png"}, "send the picture itself"),
    ({"prompt": "a", "image": "data:image/png;base64,%%%"}, "not valid base64"),
    ({"prompt": "a", "steps": 3, "num_inference_steps": 4}, "mean the same and differ"),
]


@pytest.mark.parametrize(("body", "text"), BODIES, ids=[f"{index} {text}" for index, (_, text) in enumerate(BODIES)])
def test_bad_bodies_are_refused_with_what_is_allowed(rest, body, text):
    answer = rest.post("/v1/images/generations", json={"model": "demo", **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert text in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")


CONTENTS = {
    "cut": (b'{"prompt": ', 400, "not valid JSON"),
    "empty": (b"", 400, "JSON object"),
    "nan": (b'{"prompt": "a", "guidance": NaN}', 400, "guidance"),
    "infinity": (b'{"prompt": "a", "guidance": Infinity}', 400, "guidance"),
    "list": (b'["a"]', 400, "JSON object"),
    "text": (b'"a"', 400, "JSON object"),
    "not utf-8": (b'{"prompt": "\xff\xfe"}', 400, "JSON"),
    "half a character": (b'{"prompt": "\\ud800"}', 400, "surrogate"),
    "half a name": (b'{"prompt": "a", "\\ud800": 1}', 400, "surrogate"),
    "deep": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, ""),
    "model": (b'{"prompt": "a", "model": "none"}', 404, "there are demo"),
    "large": (b'{"prompt": "' + b"a" * 13_000_000 + b'"}', 413, "too large"),
}


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/requests"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_bad_bytes_are_refused(rest, path, kind):
    content, status, text = CONTENTS[kind]
    answer = rest.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert text in answer.json()["error"]["message"]


def test_bad_paths_and_queries(rest):
    for path, status, code in (
        ("/v1/requests/none", 404, "unknown_request"),
        ("/v1/requests/none/events", 404, "unknown_request"),
        ("/v1/requests/none/content", 404, "unknown_request"),
        ("/v1/requests/none/trace", 404, "unknown_request"),
        ("/v1/requests/..%2f..%2fetc%2fpasswd/content", 404, ""),
        ("/v1/requests?limit=many", 400, "invalid_request"),
        ("/v1/requests?limit=-5", 400, "invalid_request"),
        ("/nowhere", 404, "unknown_route"),
        ("/v1/images/generations", 405, "method_not_allowed"),
    ):
        answer = rest.get(path)
        assert answer.status_code == status, (path, answer.text)
        assert code in answer.json()["error"]["code"]
    request_id = rest.post("/v1/requests", json={"prompt": "a", "steps": 2}).json()["id"]
    for event_id in ("yesterday", "1-", "-1", "9" * 40, "1-2-3", "\u00b2".encode("latin-1")):
        bad = rest.get(f"/v1/requests/{request_id}/events", headers={"Last-Event-ID": event_id})
        assert bad.status_code == 400 and "not one of ours" in bad.json()["error"]["message"]
    rest.get(f"/v1/requests/{request_id}/events")


# ---- gRPC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 9000}, "prompt"),
        ({"steps": 0}, "steps"),
        ({"steps": 1}, "steps"),
        ({"steps": 10**6}, "steps"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"width": 100}, "width"),
        ({"width": 1024, "height": 1024}, "width"),
        ({"height": 8192}, "height"),
        ({"num_frames": 5}, "num_frames"),
        ({"output_format": "mp4"}, "output_format"),
        ({"images": [b"\x89PNG\r\n\x1a\n"]}, "inputs"),
    ],
)
def test_bad_requests_over_grpc(client, options, param):
    with pytest.raises(InvalidRequest) as caught:
        client.generate(**{"prompt": "a cat", **options})
    assert caught.value.param == param


def test_unknown_names_and_oversized_messages_over_grpc(client, running_cluster):
    with pytest.raises(UnknownModel, match="there are demo"):
        client.generate("a cat", model="none")
    with pytest.raises(UnknownRequest):
        client.get("none")
    with pytest.raises(InvalidRequest, match="too large"):
        client.generate("a cat", images=[b"x" * 17 * MIB])
    with grpc.insecure_channel(running_cluster.cluster.grpc_address) as channel:
        for path in ("Generate", "Watch"):
            raw = channel.unary_stream(f"/lightloom.v1.Gateway/{path}")
            with pytest.raises(grpc.RpcError):
                list(raw(b"\xff\xff\xff\xff", timeout=10))
        odd = types_pb2.GenerationParams(prompt="a cat")
        odd.output_format = 99  # type: ignore[assignment]
        call = channel.unary_stream("/lightloom.v1.Gateway/Generate")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(gateway_pb2.GenerateRequest(params=odd).SerializeToString(), timeout=10))
        assert "output_format 99" in error_from_rpc(caught.value).message
    assert client.generate("a cat", steps=2).data


# ---- What a stage gets from its neighbours ---------------------------------------------------------------------------


def params(**changes: object) -> ResolvedParams:
    wish = GenerationParams(model="demo", prompt="a cat", width=64, height=64, steps=2, guidance=1.0)
    return replace(resolve(wish, Limits(), seed=0), **changes)


def context(name: str = "r") -> types_pb2.RequestContext:
    return types_pb2.RequestContext(request_id=f"bad-{name}", fence=2**40)


def denoise(running: RunningCluster, messages: Sequence[bytes], start: dit_pb2.DenoiseStart | None = None) -> None:
    """Sends conditions straight to a denoiser."""
    first = start or dit_pb2.DenoiseStart(context=context(), params=params_to_proto(params()), num_bundles=1)
    requests = [dit_pb2.DenoiseRequest(start=first), *map(dit_pb2.DenoiseRequest.FromString, messages)]
    with grpc.insecure_channel(running.address(running.names("dit")[0])) as channel:
        list(dit_pb2_grpc.DitStub(channel).Denoise(iter(requests), timeout=30))


def decode(running: RunningCluster, messages: Sequence[bytes]) -> None:
    """Sends latents straight to a VAE."""
    start = vae_pb2.DecodeStart(context=context(), params=params_to_proto(params()))
    requests = [vae_pb2.DecodeRequest(start=start), *map(vae_pb2.DecodeRequest.FromString, messages)]
    with grpc.insecure_channel(running.address(running.names("vae")[0])) as channel:
        list(vae_pb2_grpc.VaeStub(channel).Decode(iter(requests), timeout=30))


def encode(running: RunningCluster, stage: str, picture: bytes) -> None:
    """Sends a picture straight to an encoder."""
    wish = params(inputs=(Media("image/png", picture),))
    request = text_encoder_pb2.EncodeRequest(context=context(), params=params_to_proto(wish))
    stub = {"text_encoder": text_encoder_pb2_grpc.TextEncoderStub, "vae": vae_pb2_grpc.VaeStub}[stage]
    with grpc.insecure_channel(running.address(running.names(stage)[0])) as channel:
        list(stub(channel).Encode(request, timeout=30))


def failure(call, *arguments: object) -> ServiceError:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)
    return error_from_rpc(caught.value)


def spoilt(tensors: dict[str, torch.Tensor]) -> dict[str, list[bytes]]:
    """The frames of a bundle, broken in every way."""
    frames = list(bundle_frames(tensors))
    flipped = bytearray(frames[1])
    flipped[-9] ^= 1
    huge = types_pb2.TensorMeta(name="x", dtype=types_pb2.DTYPE_FLOAT32, shape=[2**20, 2**21], nbytes=2**43)
    lying = types_pb2.TensorMeta(name="x", dtype=types_pb2.DTYPE_FLOAT32, shape=[4], nbytes=400)
    return {
        "without its end": frames[:-1],
        "without its header": frames[1:],
        "nothing": [],
        "a flipped bit": [frames[0], bytes(flipped), *frames[2:]],
        "the same chunk twice": [frames[0], frames[1], frames[1], *frames[2:]],
        "8 TiB": [header_message(types_pb2.TensorHeader(tensors=[huge]))],
        "sizes that differ": [header_message(types_pb2.TensorHeader(tensors=[lying])), *frames[1:]],
    }


TEXT = {"positive/text": torch.zeros(1, 7, 192)}
LATENTS = {"latents": torch.zeros(1, 16, 64)}


@pytest.mark.parametrize("way", spoilt(TEXT))
def test_broken_tensor_streams_are_refused(running_cluster, way):
    assert isinstance(failure(denoise, running_cluster, spoilt(TEXT)[way]), CorruptTensor)
    assert isinstance(failure(decode, running_cluster, spoilt(LATENTS)[way]), CorruptTensor)


@pytest.mark.parametrize(
    ("call", "tensors"),
    [
        pytest.param(denoise, {"positive/text": torch.zeros(1, 7, 191)}, id="text of another width"),
        pytest.param(denoise, {"positive/text": torch.zeros(2, 7, 192)}, id="text of two requests"),
        pytest.param(denoise, {"positive/text": torch.zeros(7, 192)}, id="text of no request"),
        pytest.param(denoise, {"positive/text": torch.zeros(1, 0, 192)}, id="no tokens"),
        pytest.param(denoise, {"positive/text": torch.zeros(1, 7, 192, dtype=torch.int64)}, id="text of integers"),
        pytest.param(denoise, {"text": torch.zeros(1, 7, 192)}, id="text of no branch"),
        pytest.param(denoise, {}, id="no text"),
        pytest.param(decode, {"latents": torch.zeros(1, 15, 64)}, id="latents of another size"),
        pytest.param(decode, {"latents": torch.zeros(16, 64)}, id="latents of no request"),
        pytest.param(decode, {"latents": torch.zeros(1, 16, 64, dtype=torch.uint8)}, id="latents of bytes"),
        pytest.param(decode, {"other": torch.zeros(1, 16, 64)}, id="no latents"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(running_cluster, call, tensors):
    error = failure(call, running_cluster, list(bundle_frames(tensors)))
    assert isinstance(error, InvalidRequest)
    assert "text" in error.message or "latents" in error.message
    # No parameter is to blame: whoever sent the tensors is.
    assert not error.param


def test_incomplete_parameters_are_refused(running_cluster):
    half = dit_pb2.DenoiseStart(context=context(), params=types_pb2.GenerationParams(model="demo"), num_bundles=1)
    error = failure(denoise, running_cluster, list(bundle_frames(TEXT)), half)
    assert isinstance(error, InvalidRequest) and "complete parameters" in error.message
    fit = dit_pb2.DenoiseStart(context=context(), params=params_to_proto(params()), num_bundles=1)
    fit.latent_rgb_fit.weight.extend([0.0] * 7)
    error = failure(denoise, running_cluster, list(bundle_frames(TEXT)), fit)
    assert isinstance(error, InvalidRequest) and "latent_rgb_fit" in error.message


def test_oversized_messages_between_stages_are_refused(running_cluster):
    chunk = types_pb2.TensorFrame(chunk=types_pb2.TensorChunk(data=b"x" * 9 * MIB))
    message = dit_pb2.DenoiseRequest(frame=chunk).SerializeToString()
    error = failure(denoise, running_cluster, [message])
    assert isinstance(error, InvalidRequest) and "at most" in error.message


def png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("stage", ["vae"])  # The demo's text encoder looks at no pictures.
@pytest.mark.parametrize(
    ("picture", "words"),
    [(png()[:500], "cannot be decoded"), (b"GIF89a", "cannot be decoded"), (bomb(60000, 60000), "too many pixels")],
    ids=["cut", "header only", "bomb"],
)
def test_pictures_that_are_none_are_refused(running_cluster, stage, picture, words):
    error = failure(encode, running_cluster, stage, picture)
    assert isinstance(error, InvalidRequest)
    assert error.param == "inputs" and words in error.message


def test_every_error_is_json(rest):
    """The longest refusals too: a client can always parse what it gets."""
    answer = rest.post("/v1/images/generations", json={"prompt": "a", "ä" * 5000: 1})
    assert answer.status_code == 400 and len(answer.text) < 2000
    json.loads(answer.text)
