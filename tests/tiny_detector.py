"""Narrow random models of GenEval's real classes, saved as the published ones are."""

import torch
from tiny_rewards import shaken
from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from flowbp_ray.evaluators.geneval_rules import CLASSES
from flowbp_ray.shapes.build.text import clip_tokenizer

#: COCO's names as the published checkpoint has them: where it differs, in an older spelling.
OTHERS = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard", "couch": "sofa", "tv": "tvmonitor"}


LABELS = [OTHERS.get(name, name) for name in CLASSES]


def saved_detector(folder, labels=LABELS):
    """A folder with a narrow random Mask2Former over a narrow Swin, sure of what it sees."""
    swin = SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=3, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=12, id2label=dict(enumerate(labels)),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model = Mask2FormerForUniversalSegmentation(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        model.class_predictor.weight *= 6
        model.save_pretrained(folder)
    return folder


def saved_clip(folder):
    """A folder with a narrow random CLIP that reads 77 tokens, and its tokenizer."""
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 77
    shared = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = {"image_size": 32, "patch_size": 8}
    model = shaken(CLIPModel(CLIPConfig(text_config=shared | text, vision_config=shared | vision, projection_dim=16)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
