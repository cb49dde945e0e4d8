from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT8_E4M3: _ClassVar[DType]
    DTYPE_INT64: _ClassVar[DType]
    DTYPE_INT32: _ClassVar[DType]
    DTYPE_UINT8: _ClassVar[DType]
    DTYPE_BOOL: _ClassVar[DType]

class OutputFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTPUT_FORMAT_UNSPECIFIED: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_PNG: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_JPEG: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_WEBP: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_MP4: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_WAV: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_FLAC: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_RAW: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_ZIP: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_GIF: _ClassVar[OutputFormat]

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    STAGE_TEXT_ENCODER: _ClassVar[Stage]
    STAGE_DIT: _ClassVar[Stage]
    STAGE_VAE: _ClassVar[Stage]
    STAGE_INTERPOLATION: _ClassVar[Stage]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_FLOAT16: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT8_E4M3: DType
DTYPE_INT64: DType
DTYPE_INT32: DType
DTYPE_UINT8: DType
DTYPE_BOOL: DType
OUTPUT_FORMAT_UNSPECIFIED: OutputFormat
OUTPUT_FORMAT_PNG: OutputFormat
OUTPUT_FORMAT_JPEG: OutputFormat
OUTPUT_FORMAT_WEBP: OutputFormat
OUTPUT_FORMAT_MP4: OutputFormat
OUTPUT_FORMAT_WAV: OutputFormat
OUTPUT_FORMAT_FLAC: OutputFormat
OUTPUT_FORMAT_RAW: OutputFormat
OUTPUT_FORMAT_ZIP: OutputFormat
OUTPUT_FORMAT_GIF: OutputFormat
STAGE_UNSPECIFIED: Stage
STAGE_TEXT_ENCODER: Stage
STAGE_DIT: Stage
STAGE_VAE: Stage
STAGE_INTERPOLATION: Stage

class TensorMeta(_message.Message):
    __slots__ = ("name", "dtype", "shape", "nbytes", "crc32c")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    nbytes: int
    crc32c: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., nbytes: _Optional[int] = ..., crc32c: _Optional[int] = ...) -> None: ...

class TensorHeader(_message.Message):
    __slots__ = ("tensors", "attributes")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorMeta]
    attributes: _containers.ScalarMap[str, str]
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorMeta, _Mapping]]] = ..., attributes: _Optional[_Mapping[str, str]] = ...) -> None: ...

class TensorChunk(_message.Message):
    __slots__ = ("tensor", "offset", "data")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    offset: int
    data: bytes
    def __init__(self, tensor: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class TensorEnd(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TensorBundle(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: TensorHeader
    data: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, header: _Optional[_Union[TensorHeader, _Mapping]] = ..., data: _Optional[_Iterable[bytes]] = ...) -> None: ...

class TensorFrame(_message.Message):
    __slots__ = ("header", "chunk", "end", "whole")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    header: TensorHeader
    chunk: TensorChunk
    end: TensorEnd
    whole: TensorBundle
    def __init__(self, header: _Optional[_Union[TensorHeader, _Mapping]] = ..., chunk: _Optional[_Union[TensorChunk, _Mapping]] = ..., end: _Optional[_Union[TensorEnd, _Mapping]] = ..., whole: _Optional[_Union[TensorBundle, _Mapping]] = ...) -> None: ...

class Media(_message.Message):
    __slots__ = ("mime", "data", "role")
    MIME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    mime: str
    data: bytes
    role: str
    def __init__(self, mime: _Optional[str] = ..., data: _Optional[bytes] = ..., role: _Optional[str] = ...) -> None: ...

class MediaHeader(_message.Message):
    __slots__ = ("mime", "width", "height", "num_frames", "fps", "nbytes")
    MIME_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    mime: str
    width: int
    height: int
    num_frames: int
    fps: float
    nbytes: int
    def __init__(self, mime: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., num_frames: _Optional[int] = ..., fps: _Optional[float] = ..., nbytes: _Optional[int] = ...) -> None: ...

class MediaChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class GenerationParams(_message.Message):
    __slots__ = ("model", "prompt", "negative_prompt", "width", "height", "num_frames", "fps", "steps", "guidance", "guidance_2", "seed", "output_format", "quality", "preview_every", "inputs", "enable_frame_interpolation", "frame_interpolation_exp", "frame_interpolation_scale")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_2_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_EVERY_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    ENABLE_FRAME_INTERPOLATION_FIELD_NUMBER: _ClassVar[int]
    FRAME_INTERPOLATION_EXP_FIELD_NUMBER: _ClassVar[int]
    FRAME_INTERPOLATION_SCALE_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: float
    steps: int
    guidance: float
    guidance_2: float
    seed: int
    output_format: OutputFormat
    quality: int
    preview_every: int
    inputs: _containers.RepeatedCompositeFieldContainer[Media]
    enable_frame_interpolation: bool
    frame_interpolation_exp: int
    frame_interpolation_scale: float
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., num_frames: _Optional[int] = ..., fps: _Optional[float] = ..., steps: _Optional[int] = ..., guidance: _Optional[float] = ..., guidance_2: _Optional[float] = ..., seed: _Optional[int] = ..., output_format: _Optional[_Union[OutputFormat, str]] = ..., quality: _Optional[int] = ..., preview_every: _Optional[int] = ..., inputs: _Optional[_Iterable[_Union[Media, _Mapping]]] = ..., enable_frame_interpolation: _Optional[bool] = ..., frame_interpolation_exp: _Optional[int] = ..., frame_interpolation_scale: _Optional[float] = ...) -> None: ...

class RequestContext(_message.Message):
    __slots__ = ("request_id", "fence", "attempt", "alone")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    fence: int
    attempt: int
    alone: bool
    def __init__(self, request_id: _Optional[str] = ..., fence: _Optional[int] = ..., attempt: _Optional[int] = ..., alone: _Optional[bool] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("name", "process", "start_unix_ns", "duration_ns", "attributes")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    START_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    process: str
    start_unix_ns: int
    duration_ns: int
    attributes: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., process: _Optional[str] = ..., start_unix_ns: _Optional[int] = ..., duration_ns: _Optional[int] = ..., attributes: _Optional[_Mapping[str, str]] = ...) -> None: ...

class StageUsage(_message.Message):
    __slots__ = ("busy_s", "spans", "cached")
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    busy_s: float
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    cached: bool
    def __init__(self, busy_s: _Optional[float] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., cached: _Optional[bool] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("size_multiple_px", "min_side_px", "max_side_px", "max_pixels", "max_frames", "frame_multiple", "max_steps", "max_guidance", "max_prompt_chars", "max_inputs", "default_width", "default_height", "default_frames", "default_fps", "default_steps", "default_guidance", "default_negative_prompt", "output", "min_inputs", "default_guidance_2", "separate_guidance_2", "min_steps", "needed_roles", "optional_roles", "pictures_need_mask", "needs_any_input")
    SIZE_MULTIPLE_PX_FIELD_NUMBER: _ClassVar[int]
    MIN_SIDE_PX_FIELD_NUMBER: _ClassVar[int]
    MAX_SIDE_PX_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAMES_FIELD_NUMBER: _ClassVar[int]
    FRAME_MULTIPLE_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_CHARS_FIELD_NUMBER: _ClassVar[int]
    MAX_INPUTS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_WIDTH_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FRAMES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FPS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_STEPS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    MIN_INPUTS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_GUIDANCE_2_FIELD_NUMBER: _ClassVar[int]
    SEPARATE_GUIDANCE_2_FIELD_NUMBER: _ClassVar[int]
    MIN_STEPS_FIELD_NUMBER: _ClassVar[int]
    NEEDED_ROLES_FIELD_NUMBER: _ClassVar[int]
    OPTIONAL_ROLES_FIELD_NUMBER: _ClassVar[int]
    PICTURES_NEED_MASK_FIELD_NUMBER: _ClassVar[int]
    NEEDS_ANY_INPUT_FIELD_NUMBER: _ClassVar[int]
    size_multiple_px: int
    min_side_px: int
    max_side_px: int
    max_pixels: int
    max_frames: int
    frame_multiple: int
    max_steps: int
    max_guidance: float
    max_prompt_chars: int
    max_inputs: int
    default_width: int
    default_height: int
    default_frames: int
    default_fps: float
    default_steps: int
    default_guidance: float
    default_negative_prompt: str
    output: str
    min_inputs: int
    default_guidance_2: float
    separate_guidance_2: bool
    min_steps: int
    needed_roles: _containers.RepeatedScalarFieldContainer[str]
    optional_roles: _containers.RepeatedScalarFieldContainer[str]
    pictures_need_mask: bool
    needs_any_input: bool
    def __init__(self, size_multiple_px: _Optional[int] = ..., min_side_px: _Optional[int] = ..., max_side_px: _Optional[int] = ..., max_pixels: _Optional[int] = ..., max_frames: _Optional[int] = ..., frame_multiple: _Optional[int] = ..., max_steps: _Optional[int] = ..., max_guidance: _Optional[float] = ..., max_prompt_chars: _Optional[int] = ..., max_inputs: _Optional[int] = ..., default_width: _Optional[int] = ..., default_height: _Optional[int] = ..., default_frames: _Optional[int] = ..., default_fps: _Optional[float] = ..., default_steps: _Optional[int] = ..., default_guidance: _Optional[float] = ..., default_negative_prompt: _Optional[str] = ..., output: _Optional[str] = ..., min_inputs: _Optional[int] = ..., default_guidance_2: _Optional[float] = ..., separate_guidance_2: _Optional[bool] = ..., min_steps: _Optional[int] = ..., needed_roles: _Optional[_Iterable[str]] = ..., optional_roles: _Optional[_Iterable[str]] = ..., pictures_need_mask: _Optional[bool] = ..., needs_any_input: _Optional[bool] = ...) -> None: ...

class InterpolationLimits(_message.Message):
    __slots__ = ("max_exp", "min_scale", "max_scale", "max_pixels", "max_frames")
    MAX_EXP_FIELD_NUMBER: _ClassVar[int]
    MIN_SCALE_FIELD_NUMBER: _ClassVar[int]
    MAX_SCALE_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAMES_FIELD_NUMBER: _ClassVar[int]
    max_exp: int
    min_scale: float
    max_scale: float
    max_pixels: int
    max_frames: int
    def __init__(self, max_exp: _Optional[int] = ..., min_scale: _Optional[float] = ..., max_scale: _Optional[float] = ..., max_pixels: _Optional[int] = ..., max_frames: _Optional[int] = ...) -> None: ...

class Feature(_message.Message):
    __slots__ = ("name", "config", "exact")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    name: str
    config: str
    exact: bool
    def __init__(self, name: _Optional[str] = ..., config: _Optional[str] = ..., exact: _Optional[bool] = ...) -> None: ...

class LatentRgbFit(_message.Message):
    __slots__ = ("weight", "bias")
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    weight: _containers.RepeatedScalarFieldContainer[float]
    bias: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, weight: _Optional[_Iterable[float]] = ..., bias: _Optional[_Iterable[float]] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("protocol_version", "build", "stage", "replica_id", "component_id", "family", "variants", "models", "limits", "features", "device", "dtype", "world_size", "max_in_flight", "in_flight", "draining", "latent_rgb_fit", "max_cost", "interpolation_limits", "expert", "experts", "layout")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    COMPONENT_ID_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LATENT_RGB_FIT_FIELD_NUMBER: _ClassVar[int]
    MAX_COST_FIELD_NUMBER: _ClassVar[int]
    INTERPOLATION_LIMITS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    build: str
    stage: Stage
    replica_id: str
    component_id: str
    family: str
    variants: _containers.RepeatedScalarFieldContainer[str]
    models: _containers.RepeatedScalarFieldContainer[str]
    limits: Limits
    features: _containers.RepeatedCompositeFieldContainer[Feature]
    device: str
    dtype: str
    world_size: int
    max_in_flight: int
    in_flight: int
    draining: bool
    latent_rgb_fit: LatentRgbFit
    max_cost: float
    interpolation_limits: InterpolationLimits
    expert: str
    experts: _containers.RepeatedScalarFieldContainer[str]
    layout: str
    def __init__(self, protocol_version: _Optional[int] = ..., build: _Optional[str] = ..., stage: _Optional[_Union[Stage, str]] = ..., replica_id: _Optional[str] = ..., component_id: _Optional[str] = ..., family: _Optional[str] = ..., variants: _Optional[_Iterable[str]] = ..., models: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., features: _Optional[_Iterable[_Union[Feature, _Mapping]]] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., world_size: _Optional[int] = ..., max_in_flight: _Optional[int] = ..., in_flight: _Optional[int] = ..., draining: _Optional[bool] = ..., latent_rgb_fit: _Optional[_Union[LatentRgbFit, _Mapping]] = ..., max_cost: _Optional[float] = ..., interpolation_limits: _Optional[_Union[InterpolationLimits, _Mapping]] = ..., expert: _Optional[str] = ..., experts: _Optional[_Iterable[str]] = ..., layout: _Optional[str] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("reason", "message", "request_id", "retryable", "retry_after_s", "param")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    request_id: str
    retryable: bool
    retry_after_s: float
    param: str
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., request_id: _Optional[str] = ..., retryable: _Optional[bool] = ..., retry_after_s: _Optional[float] = ..., param: _Optional[str] = ...) -> None: ...
