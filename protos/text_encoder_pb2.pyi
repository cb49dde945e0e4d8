from protos import types_pb2 as _types_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EncodeRequest(_message.Message):
    __slots__ = ("context", "params")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    context: _types_pb2.RequestContext
    params: _types_pb2.GenerationParams
    def __init__(self, context: _Optional[_Union[_types_pb2.RequestContext, _Mapping]] = ..., params: _Optional[_Union[_types_pb2.GenerationParams, _Mapping]] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("frame", "usage")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    frame: _types_pb2.TensorFrame
    usage: _types_pb2.StageUsage
    def __init__(self, frame: _Optional[_Union[_types_pb2.TensorFrame, _Mapping]] = ..., usage: _Optional[_Union[_types_pb2.StageUsage, _Mapping]] = ...) -> None: ...
