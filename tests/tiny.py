"""Tiny random pipelines of the real classes, saved in the real on-disk format; tokenizers are made here, of a few words."""

from dataclasses import replace

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from flowbp_ray.backbones.published import PUBLISHED
from flowbp_ray.shapes.build.text import clip_tokenizer, t5_tokenizer

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SMALL_VAE = {**BLOCKS, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 4, "max_image_seq_len": 64}
TEMPLATE = (
    "{% for m in messages %}<user> {{ m['content'] }} <end> {% endfor %}<assistant> {% if enable_thinking %}<think>{% endif %}"
)
WORDS = "<pad> <unk> <user> <end> <assistant> <think> a red ring above cross two circles"


def chat_tokenizer():
    """Words, with a chat template, as Qwen's."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS.split())}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE, model_max_length=24
    )


def qwen3(of):
    """A Qwen3 of three layers."""
    return of(
        Qwen3Config(
            vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
        )
    )  # fmt: skip


def clip_config(clip):
    """One layer."""
    return CLIPTextConfig(
        vocab_size=len(clip), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=16,
        max_position_embeddings=clip.model_max_length, bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
    )  # fmt: skip


def t5_config(t5, width):
    """One layer."""
    return T5Config(vocab_size=len(t5), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")


def sd3():
    """Two joint blocks, the first with a second attention, as Stable Diffusion 3.5 medium's."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(latent_channels=4, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False,
                          use_post_quant_conv=False, **SMALL_VAE),
        text_encoder=CLIPTextModelWithProjection(clip_config(clip)),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(clip)),
        tokenizer_2=clip,
        text_encoder_3=T5EncoderModel(t5_config(t5, 32)),
        tokenizer_3=t5,
        transformer=SD3Transformer2DModel(
            sample_size=16, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
            caption_projection_dim=16, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=32,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
    )  # fmt: skip


def flux1():
    """Guidance is embedded, two double and one single block."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=AutoencoderKL(latent_channels=4, scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False,
                          use_post_quant_conv=False, **SMALL_VAE),
        text_encoder=CLIPTextModel(clip_config(clip)),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(t5_config(t5, 16)),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
        ),
    )  # fmt: skip


def flux2(is_distilled=False):
    """Two double and two single blocks."""
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(latent_channels=4, **SMALL_VAE),
        text_encoder=qwen3(Qwen3ForCausalLM),
        tokenizer=chat_tokenizer(),
        transformer=Flux2Transformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
        ),
        is_distilled=is_distilled,
    )  # fmt: skip


def z_image():
    """One layer each: refiners of picture and text, then the stack."""
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=AutoencoderKL(latent_channels=4, scaling_factor=0.36, shift_factor=0.12, **SMALL_VAE),
        text_encoder=qwen3(Qwen3Model),
        tokenizer=chat_tokenizer(),
        transformer=ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[4, 6, 6], axes_lens=[640, 32, 32],
        ),
    )  # fmt: skip


def saved(made, folder):
    """Random weights that move everything, on disk."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = made()
        for name, parameter in pipeline.transformer.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 or "norm" not in name else 0.1)
        if (norm := getattr(pipeline.vae, "bn", None)) is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    pipeline.save_pretrained(folder)
    return folder


def published():
    """The published configurations by their names, each as tiny as its family's pipeline here."""

    def config(part):
        return {k: v for k, v in part.config.items() if not k.startswith("_")}

    def shrunk(name, pipeline):
        given, sizes = PUBLISHED[name], pipeline.transformer.config
        text = {"prompt_embeds": (6, sizes.joint_attention_dim), "pooled_prompt_embeds": (sizes.get("pooled_projection_dim"),)}
        text = {k: text[k] for k in given.text}
        return replace(given, config=config(pipeline.transformer), text=text, vae=config(pipeline.vae))

    return {name: shrunk(name, made()) for name, made in (("sd35", sd3), ("flux1", flux1), ("flux2", flux2))}
