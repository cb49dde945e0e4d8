from protos import types_pb2 as _types_pb2
from protos import vae_pb2 as _vae_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InterpolateStart(_message.Message):
    __slots__ = ("context", "params", "exponent", "scale", "num_frames")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    EXPONENT_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    context: _types_pb2.RequestContext
    params: _types_pb2.GenerationParams
    exponent: int
    scale: float
    num_frames: int
    def __init__(self, context: _Optional[_Union[_types_pb2.RequestContext, _Mapping]] = ..., params: _Optional[_Union[_types_pb2.GenerationParams, _Mapping]] = ..., exponent: _Optional[int] = ..., scale: _Optional[float] = ..., num_frames: _Optional[int] = ...) -> None: ...

class InterpolateRequest(_message.Message):
    __slots__ = ("start", "frame")
    START_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    start: InterpolateStart
    frame: _types_pb2.TensorFrame
    def __init__(self, start: _Optional[_Union[InterpolateStart, _Mapping]] = ..., frame: _Optional[_Union[_types_pb2.TensorFrame, _Mapping]] = ...) -> None: ...
