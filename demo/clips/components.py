"""The demo's video model in the Wan format, one expert: built, saved and loaded.

Called by training, the evaluation and the tests of clips. Sizes are the only thing that sets the components apart from
Wan 2.1's: classes, configuration keys, scheduler and file names are the family's own.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, WanResample
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import nn
from transformers.models.t5.tokenization_t5 import T5Tokenizer
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from demo.clips.captions import caption
from demo.clips.scenes import sample_moving_scene

TEXT_WIDTH = 128
LATENT_CHANNELS = 16
FLOW_SHIFT = 3.0
"""Wan 2.1's at small sizes. Noise levels are trained as the scheduler spreads them."""
_TRAINED = ("text_encoder", "transformer", "vae")
PICTURE_MODEL = Path(__file__).parents[1] / "checkpoints" / "qwen_image"


@dataclass(slots=True)
class WanComponents:
    """Everything a folder of Wan 2.1 (text to video) holds."""

    tokenizer: T5Tokenizer
    text_encoder: UMT5EncoderModel
    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan
    scheduler: UniPCMultistepScheduler


def build(seed: int = 0) -> WanComponents:
    """All components with random weights in fp32, the same for the same seed."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    return WanComponents(
        tokenizer=tokenizer,
        text_encoder=_text_encoder(tokenizer),
        transformer=_transformer(),
        vae=build_autoencoder(),
        scheduler=UniPCMultistepScheduler(
            num_train_timesteps=1000,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=FLOW_SHIFT,
            solver_order=2,
        ),
    )


def pipeline_of(components: WanComponents) -> WanPipeline:
    """The stock pipeline over these components."""
    return WanPipeline(
        tokenizer=components.tokenizer,
        text_encoder=components.text_encoder,
        vae=components.vae,
        scheduler=components.scheduler,
        transformer=components.transformer,
    )


def load(folder: Path) -> WanPipeline:
    """The stock pipeline of a saved folder in fp32."""
    return WanPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)


def copy_weights(components: WanComponents, folder: Path) -> None:
    """Starts from the weights of a saved folder.

    Raises: RuntimeError when its components have other sizes, or a tokenizer of other words; nothing is copied then.
    """
    saved = load(folder)
    if saved.tokenizer.get_vocab() != components.tokenizer.get_vocab():
        raise RuntimeError(f"the tokenizer of {folder} has other words than the captions")
    copies = [(name, getattr(components, name), getattr(saved, name)) for name in _TRAINED]
    for name, mine, theirs in copies:
        if _sizes(mine) != _sizes(theirs):
            raise RuntimeError(f"the {name} of {folder} has other sizes than the one that is trained now")
    for _, mine, theirs in copies:
        mine.load_state_dict(theirs.state_dict())


def _sizes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


@torch.no_grad()
def copy_picture_autoencoder(vae: AutoencoderKLWan, folder: Path = PICTURE_MODEL) -> None:
    """Starts from the autoencoder of the demo's picture model, which sees every frame alone.

    A clip of one frame is then coded as the picture model does; of four frames the newest is encoded, and it is decoded
    four times. Motion within them is what is left to learn.

    Raises: RuntimeError when the picture model has other sizes.
    """
    vae.load_state_dict(AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=torch.float32).state_dict())
    for layer in vae.modules():
        if isinstance(layer, WanResample) and layer.mode in ("downsample3d", "upsample3d"):
            _keep_newest(layer.time_conv)


def _keep_newest(conv: WanCausalConv3d) -> None:
    """Each group of as many channels as come in is a copy of the newest frame's."""
    copies = conv.out_channels // conv.in_channels
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    conv.weight[:, :, -1, 0, 0] = torch.eye(conv.in_channels).repeat(copies, 1)


def save(components: WanComponents, folder: Path) -> None:
    """Writes the folder that WanPipeline.from_pretrained reads, fp16, one file per component.

    The modules are left in fp16.
    """
    for name in _TRAINED:
        getattr(components, name).half()
    pipeline_of(components).save_pretrained(folder, safe_serialization=True)
    # transformers loads in the configuration's dtype and diffusers in fp32: name fp32, so that a plain
    # from_pretrained gives components that fit together.
    config_path = folder / "text_encoder" / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")


def build_tokenizer(num_captions: int = 20_000) -> T5Tokenizer:
    """T5's marks and every word of the captions; anything else is unknown. The result is always the same."""
    rng = Random(0)
    texts = (caption(rng, sample_moving_scene(rng)).text for _ in range(num_captions))
    words = sorted({word for text in texts for word in re.findall(r"[A-Za-z]+", text)})
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -4.0)]
    pieces = [(piece, -1.0) for piece in (*(f"▁{word}" for word in words), ",", ".", ":")]
    return T5Tokenizer(vocab=marks + pieces, extra_ids=0)


def _text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    model = UMT5EncoderModel(_text_config(tokenizer))
    # The class starts these close to zero, where "right, then down" reads like "down, then right" and stays so.
    for block in model.encoder.block:
        nn.init.normal_(block.layer[0].SelfAttention.relative_attention_bias.weight)
    return model


def _text_config(tokenizer: T5Tokenizer) -> UMT5Config:
    return UMT5Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        is_encoder_decoder=False,
        tie_word_embeddings=False,
    )


def _transformer() -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=384,
        num_layers=8,
    )
    # Blocks start as the identity and the prediction as zero (adaLN-zero), which trains fastest.
    with torch.no_grad():
        for block in model.blocks:
            block.scale_shift_table.zero_()
            nn.init.zeros_(block.attn2.to_out[0].weight)
    for layer in (model.condition_embedder.time_proj, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def build_autoencoder() -> AutoencoderKLWan:
    """With random weights; the picture model's has the same sizes."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 3, 3],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
