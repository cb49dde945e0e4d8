"""The vocabulary of the model side: what a family is, and the state of a request while it is denoised.

A family is one file of plain functions over plain data in `services/families/`. Its DiT is cut in three,
`embed -> blocks -> head`, and the engine runs the block list; features act on that list through the
`ModelPlan`. Families and features never know each other; they meet here.

Shape legend: B rows of a batch, S tokens, D width, F frames, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from services.attention import Attend
from services.request import Limits, ResolvedParams
from services.weights import ModelSource

Tensors = dict[str, torch.Tensor]
Frames = np.ndarray[Any, np.dtype[np.uint8]]  # [F, H, W, 3], RGB, 0 to 255
Inputs = Mapping[str, Sequence[Frames]]  # a request's pictures and clips, decoded, by role


class Streams(Protocol):
    """What flows through the block list: a small dataclass of tensors of the family's own making.

    `hidden` [B, S, D] is the stream that leaves the last block for the head; step caches act on it.
    """

    hidden: torch.Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """One entry of the block list: the library's own block module, and how to call it on streams.

    `run` calls `module.forward` and builds the next streams; a feature may replace `module.forward` (compile)
    or wrap `run` (caches, offload) but never both at once for the same purpose.
    """

    name: str
    module: nn.Module
    run: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A field of the streams that holds one entry for each token of the sequence, in dimension `dim`.

    A field that is a tuple holds tokens in each of its tensors. With `ndim` it does so only while it has that many
    dimensions (time embeddings for each token of some models).
    """

    field: str
    dim: int = 1
    ndim: int = 0

    def holds(self, value: Any) -> bool:
        """Whether the field's present value is one entry a token."""
        return value is not None and (not self.ndim or value.ndim == self.ndim)


# A module's first result, where its inputs go by their names.
RESULT = "return"
Fields = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SequenceRegion:
    """Where ranks of tensor parallelism may share the tokens: all of a block but attention and feed-forwards.

    Tokens at a border are those of some fields of the streams, side by side.

    Attributes:
        fields: of the streams, read token by token.
        gathers: of modules (globs) which inputs, by argument, or `RESULT`, are to have all tokens, and of which fields.
        scatters: of row linears and summed modules, whose results are to have own tokens only, the fields.
        pieces: names of modules (identities on one rank) that take own tokens out of what every rank has whole.
    """

    fields: tuple[Tokens, ...] = ()
    gathers: Mapping[str, Mapping[str, Fields]] = field(default_factory=dict)
    scatters: Mapping[str, Fields] = field(default_factory=dict)
    pieces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What features may know of a DiT: data only.

    Attributes:
        block_classes: classes of the repeated blocks; compile makes two graphs of each.
        column: names (globs on the module path) of linears split by output features.
        row: names of linears split by input features, whose results are summed over the ranks.
        partial: names of more such linears, whose results are added to each other first, and
        summed: names of the modules (identities on one rank) that then sum over the ranks.
        gathered: names of linears split by output features whose results every rank needs whole (modulation,
            embeddings).
        segments: for linears whose cut features are several laid side by side, their ratio by name.
        norms_across_heads: names of RMS norms over the features of all heads.
        experts: names of the lists of experts in mixture-of-experts blocks (`services/experts.py`).
        heads: the config's key for the number of attention heads.
        attention: the kinds of attention calls, as `DitModel.attention` names them.
        spread: those of them that attend over the sequence which sequence parallelism cuts.
        sequence: the fields of the streams that are cut with it.
        region: what tensor parallelism needs to spread norms as well.
        joint: the token fields that make the attended sequence, in its order.
        flow: the fields that blocks change, which travel from one pipeline rank to the next.
        fills_text: texts are filled up and attention passes filling over: prompts of any length share a batch.
        high_precision: names of modules that keep their dtype under quantisation.
        cache_signal: name of the Streams field, or "modulated" for the modulated input of block 0.
    """

    block_classes: tuple[type[nn.Module], ...]
    column: tuple[str, ...] = ()
    row: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    segments: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    norms_across_heads: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    heads: str = "num_attention_heads"
    attention: tuple[str, ...] = ()
    spread: tuple[str, ...] = ()
    sequence: tuple[Tokens, ...] = ()
    region: SequenceRegion = SequenceRegion()
    joint: tuple[str, ...] = ("hidden",)
    flow: tuple[str, ...] = ("hidden",)
    fills_text: bool = False
    high_precision: tuple[str, ...] = ()
    cache_signal: str = "hidden"


@dataclass(slots=True)
class DenoiseState:
    """One request between two steps. All of it serialises to safetensors bytes (`dit_svc/checkpoint.py`).

    Attributes:
        latents: [1, ...] in the layout the scheduler steps on.
        step: steps done.
        timesteps: [steps], on the CPU, in the scheduler's own unit and dtype.
        sigmas: [steps + 1] noise level before each step and after the last, 1 to 0, for events.
        scheduler: this request's own scheduler object (diffusers class).
        conditioning: tensors by branch; the first branch is the positive one. Rows have batch dimension 1.
        shared: tensors that all branches share (image latents of edit models).
        caches: state of step caches, by (feature, branch).
    """

    request_id: str
    params: ResolvedParams
    latents: torch.Tensor
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    scheduler: Any
    conditioning: dict[str, Tensors]
    shared: Tensors = field(default_factory=dict)
    step: int = 0
    caches: dict[tuple[str, str], Tensors] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return len(self.timesteps)

    @property
    def done(self) -> bool:
        """Whether the last step has been made."""
        return self.step >= self.num_steps


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a forward: a request and one of its guidance branches."""

    state: DenoiseState
    branch: str


@dataclass(frozen=True, slots=True)
class DitModel:
    """The loaded denoiser of a component.

    `modules` maps an expert's name to its transformer ("" when there is one only), `attention` a kind of attention call
    to what all modules of that kind call. `geometry` carries what the
    DiT service must know of the VAE without loading it: compression and latent statistics, from its config.
    """

    variant: str
    modules: Mapping[str, nn.Module]
    attention: Mapping[str, Attend]
    scheduler_class: Any
    scheduler_config: Mapping[str, Any]
    geometry: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype
    options: Mapping[str, Any] = field(default_factory=dict)


def one_expert(_source: ModelSource) -> Mapping[str, str]:
    """A model of one transformer."""
    return {"": "transformer"}


@dataclass(frozen=True, slots=True)
class DitPart:
    """A family's denoiser as functions. None of them loops over steps: the engine owns the loop.

    Attributes:
        load: reads the transformer(s), or that of `source.expert` alone, the scheduler's config and nothing else.
        plan: data for the features, the same for every model of the family.
        prepare: parameters and conditions (names as the text and VAE parts made them) to a state at step 0. Noise
            comes from a CPU generator with the request's seed, full shape. Raises InvalidRequest when a
            peer sent conditions of the wrong name, shape or dtype.
        expert: which module takes the state's next step; where it is held elsewhere, the request goes on there.
        branches: guidance branches the next step needs, positive first.
        batch_key: states with equal keys may share a forward (shape, expert, text length where unmasked; never step).
        collate: rows to the family's batch (opaque to the engine).
        embed: batch to streams: patchify, text projection, time and position embeddings.
        blocks: the block list of a module; the same list object for the module's life.
        head: streams to predictions [B, ...] aligned with the rows.
        combine: one state's predictions by branch to one prediction (guidance).
        advance: scheduler step; sets latents and step.
        finish: the tensors that leave for the VAE (or the client), batch dimension 1.
        preview_latents: the state's estimate of the clean latents as [F, C, H, W] in VAE layout, normalised.
        token_count: tokens of one row, for cost and memory estimates.
        example_conditions: random conditions for a warm-up, with that many text tokens.
        experts: names of a model's experts and the subfolders of their weights, in the order of their steps.
    """

    load: Callable[[ModelSource, torch.device, torch.dtype], DitModel]
    plan: ModelPlan
    prepare: Callable[[DitModel, str, ResolvedParams, Tensors], DenoiseState]
    expert: Callable[[DitModel, DenoiseState], str]
    branches: Callable[[DitModel, DenoiseState], tuple[str, ...]]
    batch_key: Callable[[DitModel, DenoiseState], tuple[Any, ...]]
    collate: Callable[[DitModel, Sequence[Row]], Any]
    embed: Callable[[nn.Module, Any], Any]
    blocks: Callable[[nn.Module], Sequence[Block]]
    head: Callable[[nn.Module, Any], torch.Tensor]
    combine: Callable[[DitModel, DenoiseState, Mapping[str, torch.Tensor]], torch.Tensor]
    advance: Callable[[DitModel, DenoiseState, torch.Tensor], None]
    finish: Callable[[DitModel, DenoiseState], Tensors]
    preview_latents: Callable[[DitModel, DenoiseState, torch.Tensor], torch.Tensor]
    token_count: Callable[[DitModel, ResolvedParams], int]
    example_conditions: Callable[[DitModel, ResolvedParams, int], Tensors]
    experts: Callable[[ModelSource], Mapping[str, str]] = one_expert


@dataclass(frozen=True, slots=True)
class TextInput:
    """One text to encode, with the pictures a vision-language encoder sees beside it."""

    text: str
    images: tuple[Frames, ...] = ()


def sees_images(_model: Any) -> tuple[str, ...]:
    """Roles of the inputs that a vision-language encoder looks at."""
    return ("image",)


def guided_branches(params: ResolvedParams) -> tuple[str, ...]:
    """The branches of classifier-free guidance: the negative one while `guidance` is above 1."""
    return ("positive", "negative") if params.guidance > 1 else ("positive",)


@dataclass(frozen=True, slots=True)
class EncoderPlan:
    """How an encoder of transformers is cut over ranks: globs on the paths of its modules.

    Attributes:
        attention: attention modules, which count their heads.
        column: linears split by output features; those of keys and values that query heads share are split anyway.
        row: linears split by input features, whose results are summed over the ranks.
        segments: for linears whose features are several laid side by side, their ratio by name.
        tables: of words, split by features.
        unused: modules with weights that no forward reads: no rank holds them.
    """

    attention: tuple[str, ...]
    column: tuple[str, ...]
    row: tuple[str, ...]
    segments: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TextPart:
    """A family's text encoder.

    Attributes:
        load: reads tokenizer, encoder (and processor) and nothing else; returns an object only `encode` understands.
        encode: a batch of inputs to one dict of tensors each, batch dimension dropped, padding trimmed where a mask
            or the denoiser makes up for it.
        branches: guidance branches whose text a request needs, positive first.
        plans: of the encoders that are spread over ranks, by subfolder; each rank holds others whole.
        sees: roles of the inputs that a loaded model looks at, in the order of `TextInput.images`.
    """

    load: Callable[[ModelSource, torch.device, torch.dtype], Any]
    encode: Callable[[Any, Sequence[TextInput]], list[Tensors]]
    branches: Callable[[ResolvedParams], tuple[str, ...]] = guided_branches
    plans: Mapping[str, EncoderPlan] = field(default_factory=dict)
    sees: Callable[[Any], tuple[str, ...]] = sees_images


class Codec(Protocol):
    """A VAE between latents as its decoder takes them and pixels in [-1, 1]; h and w are the last two dimensions.

    Latents are [B, C, h, w] of a VAE for pictures, [B, C, F', h, w] of one for clips, pixels [B, 3, H, W] or
    [B, 3, F, H, W]. Codecs wrap each other: whole pictures, tiles, rows of pictures on several ranks.
    """

    def decode(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Pixels, a chunk of frames at a time; a picture is one chunk. Decoders may pass -1 and 1 by a little."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Means and log variances, side by side in dimension 1."""


@dataclass(frozen=True, slots=True)
class VaeModel:
    """A loaded VAE: the library's module, and the codec that all work goes through."""

    module: Any
    codec: Codec

    def mode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels on any device to the latents that are likeliest."""
        return self.codec.encode(pixels.to(self.module.device, self.module.dtype)).chunk(2, dim=1)[0]


@dataclass(frozen=True, slots=True)
class VaePlan:
    """What ranks may know of a VAE to share its pictures: data only.

    Convolutions, group norms and up- and down-sampling tell by themselves how they reach over the border of a piece.

    Attributes:
        attention: classes of modules that look at whole pictures.
    """

    attention: tuple[type[nn.Module], ...] = ()


@dataclass(frozen=True, slots=True)
class ChunkWithSound:
    """A chunk of a decode that makes sound.

    Attributes:
        frames: as those of a chunk without; [B, 0, 3, 0, 0] where a model makes sound alone.
        samples: [B, C, N] in [-1, 1], of one channel or two: what follows on the chunk before. A clip's sound begins in
            its first chunk; in between it need not keep step with the frames.
        sampling_rate: samples a second, the same in all chunks.
    """

    frames: torch.Tensor
    samples: torch.Tensor
    sampling_rate: int


def opaque(_model: VaeModel) -> bool:
    """No picture has transparency."""
    return False


@dataclass(frozen=True, slots=True)
class VaePart:
    """A family's VAE.

    Attributes:
        load: reads the VAE and nothing else.
        plan: data for ranks that share pictures, the same for every model of the family.
        decode: rows of `DitPart.finish` tensors of equal shape to float frames, [B, F, 3, H, W] in [-1, 1], in chunks
            of consecutive frames, or of frames and sound. Raises InvalidRequest at once when the tensors have not the
            shape that the parameters ask for.
        encode: pictures and clips of one request to the tensors `DitPart.prepare` expects.
        latent_geometry: (channels, spatial compression, temporal compression).
        picture_latents: pixels of single pictures [B, 3, H, W] in [-1, 1] on the CPU, sides multiples of the spatial
            compression, to normalised latents [B, C, h, w] with the channels of `DitPart.preview_latents`. None: the
            VAE has no encoder for pictures, and its models make no previews.
        alpha: whether `encode` takes pictures, and `decode` gives frames, with a fourth channel: how opaque they are.
    """

    load: Callable[[ModelSource, torch.device, torch.dtype], VaeModel]
    plan: VaePlan
    decode: Callable[[VaeModel, Sequence[Tensors], ResolvedParams], Iterator[torch.Tensor | ChunkWithSound]]
    encode: Callable[[VaeModel, Inputs, ResolvedParams], Tensors]
    latent_geometry: Callable[[VaeModel], tuple[int, int, int]]
    picture_latents: Callable[[VaeModel, torch.Tensor], torch.Tensor] | None = None
    alpha: Callable[[VaeModel], bool] = opaque


@dataclass(frozen=True, slots=True)
class Variant:
    """One kind of model of a family: the pipeline its folders name, and what it accepts."""

    name: str
    pipelines: tuple[str, ...]
    limits: Limits


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: three parts, its variants, full-size presets and a tiny random model.

    Attributes:
        presets: config of every component by preset name, for `random:SEED` sources: preset -> subfolder -> config,
            with "model_index" holding the pipeline's class name.
        tiny: writes a random model of the variant under 5 MB into a folder in the diffusers format.
    """

    name: str
    text: TextPart
    dit: DitPart
    vae: VaePart
    variants: Mapping[str, Variant]
    presets: Mapping[str, Mapping[str, Mapping[str, Any]]]
    tiny: Callable[[Path, str, int], None]
