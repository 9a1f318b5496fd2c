"""Tiny real components, built in milliseconds: what the tests use in place of mocks.

- images are 32 x 32, latents 4 x 4 x 4 (both autoencoders reduce by 8); a pipeline has below 200 thousand parameters
- the same `seed` gives the same weights, and the random state of the caller is left as it was

    pipe = tiny_pipeline(kinds=("text", "labels"))
    pipe("chest x-ray", labels="glaucoma=1").images[0]
"""

import torch
from diffusers import AutoencoderDC, AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import (
    BitImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from medisyn.pipelines.medisyn_pipeline import MediSynPipeline, label_width

IMAGE_SIZE = 32
TEXT_WIDTH = 16
IMAGE_WIDTH = 24
TEXT_WINDOW = 16

LABEL_SCHEMA = {
    "name": "tiny_fundus",
    "fields": {
        "dr_grade": {"type": "ordinal", "values": ["0", "1", "2", "3", "4"], "display": "Diabetic retinopathy grade"},
        "gc": {"type": "binary", "display": "Glaucoma"},
        "eye_side": {"type": "categorical", "values": ["right", "left"], "display": "Eye side"},
    },
}


def tiny_vae(kind: str = "dc", seed: int = 0) -> AutoencoderDC | AutoencoderKL:
    """An untrained autoencoder, 32 x 32 x 3 images to 4 x 4 x 4 latents; "dc" is deterministic, "kl" has moments."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "dc":
            return AutoencoderDC(
                in_channels=3,
                latent_channels=4,
                encoder_block_types="ResBlock",
                decoder_block_types="ResBlock",
                encoder_block_out_channels=(8, 8, 8, 8),
                decoder_block_out_channels=(8, 8, 8, 8),
                encoder_layers_per_block=(0, 1, 1, 1),
                decoder_layers_per_block=(0, 1, 1, 1),
                encoder_qkv_multiscales=((), (), (), ()),
                decoder_qkv_multiscales=((), (), (), ()),
                encoder_out_shortcut=False,
                decoder_in_shortcut=False,
                scaling_factor=0.8,
            ).eval()
        if kind == "kl":
            return AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(8, 8, 8, 8),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=2,
                sample_size=IMAGE_SIZE,
                scaling_factor=0.5,
            ).eval()
    raise ValueError(f"vae {kind!r} is not one of: dc, kl")


def tiny_tokenizer(max_length: int = TEXT_WINDOW) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: every letter is a token, so any text can be encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=max_length)


def tiny_text_encoder(tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH, seed: int = 0) -> CLIPTextModel:
    """An untrained two-layer CLIP text encoder for `tokenizer`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        encoder = CLIPTextModel(config)
        # the default initialisation is so small that every prompt looks the same; tests need prompts to differ
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        return encoder.eval()


def tiny_image_encoder(registers: int = 0, width: int = IMAGE_WIDTH, seed: int = 0) -> tuple:
    """An untrained DINOv2 (with `registers` register tokens) for 28 x 28 crops, 4 patches, and its image processor."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = dict(
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2,
            image_size=28,
            patch_size=14,
            initializer_range=0.3,
        )
        if registers:
            encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **shape))
        else:
            encoder = Dinov2Model(Dinov2Config(**shape))
    processor = BitImageProcessor(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return encoder.eval(), processor


def tiny_unet(kinds: tuple[str, ...] = ("text",), cross_attention_dim: int = TEXT_WIDTH, seed: int = 0, **config):
    """An untrained UNet on 4 x 4 x 4 latents, wired for `kinds` as `MediSynPipeline` documents."""
    widths = [{"text": TEXT_WIDTH, "image": IMAGE_WIDTH}[kind] for kind in kinds if kind != "labels"]
    if widths and widths != [cross_attention_dim]:
        config |= {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": sum(widths)}
    if "labels" in kinds:
        config |= {
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": label_width(LABEL_SCHEMA),
        }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            **{
                "sample_size": IMAGE_SIZE // 8,
                "in_channels": 4,
                "out_channels": 4,
                "block_out_channels": (16, 16),
                "layers_per_block": 1,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "cross_attention_dim": cross_attention_dim,
                "attention_head_dim": 2,
                "norm_num_groups": 4,
            }
            | config
        ).eval()


def tiny_components(
    kinds: tuple[str, ...] = ("text",),
    prediction_type: str = "v_prediction",
    vae: str = "dc",
    seed: int = 0,
    registers: int = 0,
) -> dict:
    """The constructor arguments of a tiny `MediSynPipeline` conditioned on `kinds` ("text", "image", "labels")."""
    unknown = set(kinds) - {"text", "image", "labels"}
    if unknown:
        raise ValueError(f"kinds {sorted(unknown)} are not among: text, image, labels")
    components = {
        "vae": tiny_vae(vae, seed),
        "unet": tiny_unet(kinds, seed=seed),
        "scheduler": DPMSolverMultistepScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, steps_offset=1
        ),
    }
    if "text" in kinds:
        tokenizer = tiny_tokenizer()
        components |= {"tokenizer": tokenizer, "text_encoder": tiny_text_encoder(tokenizer, seed=seed)}
    if "image" in kinds:
        encoder, processor = tiny_image_encoder(registers, seed=seed)
        components |= {"image_encoder": encoder, "feature_extractor": processor}
    if "labels" in kinds:
        components["label_schema"] = LABEL_SCHEMA
    return components


def tiny_pipeline(
    kinds: tuple[str, ...] = ("text",),
    prediction_type: str = "v_prediction",
    vae: str = "dc",
    seed: int = 0,
    image_tokens: str = "global",
    registers: int = 0,
) -> MediSynPipeline:
    """A complete untrained pipeline of real components; see `tiny_components`. Its progress bar is off."""
    components = tiny_components(kinds, prediction_type, vae, seed, registers)
    pipe = MediSynPipeline(**components, image_tokens=image_tokens)
    pipe.set_progress_bar_config(disable=True)
    return pipe
