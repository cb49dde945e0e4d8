from protos import types_pb2 as _types_pb2
from protos import text_encoder_pb2 as _text_encoder_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DecodeStart(_message.Message):
    __slots__ = ("context", "params", "frames_only")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    FRAMES_ONLY_FIELD_NUMBER: _ClassVar[int]
    context: _types_pb2.RequestContext
    params: _types_pb2.GenerationParams
    frames_only: bool
    def __init__(self, context: _Optional[_Union[_types_pb2.RequestContext, _Mapping]] = ..., params: _Optional[_Union[_types_pb2.GenerationParams, _Mapping]] = ..., frames_only: _Optional[bool] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("start", "frame")
    START_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    start: DecodeStart
    frame: _types_pb2.TensorFrame
    def __init__(self, start: _Optional[_Union[DecodeStart, _Mapping]] = ..., frame: _Optional[_Union[_types_pb2.TensorFrame, _Mapping]] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("media", "frame", "usage", "chunk", "frames")
    MEDIA_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    media: _types_pb2.MediaHeader
    frame: _types_pb2.TensorFrame
    usage: _types_pb2.StageUsage
    chunk: _types_pb2.MediaChunk
    frames: int
    def __init__(self, media: _Optional[_Union[_types_pb2.MediaHeader, _Mapping]] = ..., frame: _Optional[_Union[_types_pb2.TensorFrame, _Mapping]] = ..., usage: _Optional[_Union[_types_pb2.StageUsage, _Mapping]] = ..., chunk: _Optional[_Union[_types_pb2.MediaChunk, _Mapping]] = ..., frames: _Optional[int] = ...) -> None: ...
