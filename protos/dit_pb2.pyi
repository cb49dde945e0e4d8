from protos import types_pb2 as _types_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReleaseRequest(_message.Message):
    __slots__ = ("context",)
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    context: _types_pb2.RequestContext
    def __init__(self, context: _Optional[_Union[_types_pb2.RequestContext, _Mapping]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DenoiseStart(_message.Message):
    __slots__ = ("context", "params", "num_bundles", "resume", "latent_rgb_fit")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    NUM_BUNDLES_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    LATENT_RGB_FIT_FIELD_NUMBER: _ClassVar[int]
    context: _types_pb2.RequestContext
    params: _types_pb2.GenerationParams
    num_bundles: int
    resume: bool
    latent_rgb_fit: _types_pb2.LatentRgbFit
    def __init__(self, context: _Optional[_Union[_types_pb2.RequestContext, _Mapping]] = ..., params: _Optional[_Union[_types_pb2.GenerationParams, _Mapping]] = ..., num_bundles: _Optional[int] = ..., resume: _Optional[bool] = ..., latent_rgb_fit: _Optional[_Union[_types_pb2.LatentRgbFit, _Mapping]] = ...) -> None: ...

class DenoiseRequest(_message.Message):
    __slots__ = ("start", "frame", "checkpoint")
    START_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    start: DenoiseStart
    frame: _types_pb2.TensorFrame
    checkpoint: CheckpointRequest
    def __init__(self, start: _Optional[_Union[DenoiseStart, _Mapping]] = ..., frame: _Optional[_Union[_types_pb2.TensorFrame, _Mapping]] = ..., checkpoint: _Optional[_Union[CheckpointRequest, _Mapping]] = ...) -> None: ...

class CheckpointRequest(_message.Message):
    __slots__ = ("stop",)
    STOP_FIELD_NUMBER: _ClassVar[int]
    stop: bool
    def __init__(self, stop: _Optional[bool] = ...) -> None: ...

class StepEvent(_message.Message):
    __slots__ = ("step", "total", "sigma", "seconds", "batch")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    SIGMA_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    step: int
    total: int
    sigma: float
    seconds: float
    batch: int
    def __init__(self, step: _Optional[int] = ..., total: _Optional[int] = ..., sigma: _Optional[float] = ..., seconds: _Optional[float] = ..., batch: _Optional[int] = ...) -> None: ...

class BundleStart(_message.Message):
    __slots__ = ("kind", "step", "expert")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[BundleStart.Kind]
        KIND_LATENTS: _ClassVar[BundleStart.Kind]
        KIND_CHECKPOINT: _ClassVar[BundleStart.Kind]
    KIND_UNSPECIFIED: BundleStart.Kind
    KIND_LATENTS: BundleStart.Kind
    KIND_CHECKPOINT: BundleStart.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    kind: BundleStart.Kind
    step: int
    expert: str
    def __init__(self, kind: _Optional[_Union[BundleStart.Kind, str]] = ..., step: _Optional[int] = ..., expert: _Optional[str] = ...) -> None: ...

class DenoiseResponse(_message.Message):
    __slots__ = ("step", "frame", "usage", "preview", "bundle")
    STEP_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    step: StepEvent
    frame: _types_pb2.TensorFrame
    usage: _types_pb2.StageUsage
    preview: _types_pb2.Media
    bundle: BundleStart
    def __init__(self, step: _Optional[_Union[StepEvent, _Mapping]] = ..., frame: _Optional[_Union[_types_pb2.TensorFrame, _Mapping]] = ..., usage: _Optional[_Union[_types_pb2.StageUsage, _Mapping]] = ..., preview: _Optional[_Union[_types_pb2.Media, _Mapping]] = ..., bundle: _Optional[_Union[BundleStart, _Mapping]] = ...) -> None: ...
