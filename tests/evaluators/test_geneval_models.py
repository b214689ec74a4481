import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_rewards import shaken
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from flowbp_ray.evaluators import geneval
from flowbp_ray.evaluators.geneval import GenEval, objects, prepared
from flowbp_ray.evaluators.geneval_rules import CLASSES, COLOURS, Detection
from flowbp_ray.shapes.build.text import clip_tokenizer

SIZE = 96  # of pictures, and here of the detector's input
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return saved_detector(tmp_path_factory.mktemp("detector")), saved_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def evaluator(folders):
    return GenEval(*folders)


@pytest.fixture(scope="module")
def pictures():
    """Four coarse pictures (4, SIZE, SIZE, 3) that the detector sees different things in."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (4, 4, 4, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for c in coarse])


@pytest.fixture
def unresized(monkeypatch):
    """The detector's input has the pictures' size."""
    monkeypatch.setattr(geneval, "SHORT", SIZE)


def test_detections_are_those_of_transformers_own_processing(evaluator, pictures, monkeypatch):
    """Which looks at masks in 384 × 384; so pictures of that size here, for which it is the same."""
    monkeypatch.setattr(geneval, "SHORT", 384)
    large = pictures.repeat(4, 1).repeat(4, 2)
    processor = Mask2FormerImageProcessorPil(size={"height": 384, "width": 384})
    output = evaluator.detector(**processor(list(large), return_tensors="pt"))
    found = evaluator.detect(large)
    expected = processor.post_process_instance_segmentation(output, threshold=geneval.CONFIDENCE, return_binary_maps=True)
    assert sum(map(len, found)) >= 4
    for ours, theirs in zip(found, expected, strict=True):
        assert [CLASSES.index(d.name) for d in ours] == [s["label_id"] for s in theirs["segments_info"]]
        assert [d.score for d in ours] == pytest.approx([s["score"] for s in theirs["segments_info"]], abs=1e-4)
        for detection, mask in zip(ours, theirs["segmentation"], strict=True):
            assert (detection.mask != mask.numpy().astype(bool)).mean() < 1e-4
            rows, columns = np.nonzero(detection.mask)
            assert detection.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


@pytest.mark.parametrize(
    ("shape", "inner", "padded"),
    [((512, 512), (800, 800), (800, 800)), ((1024, 1024), (800, 800), (800, 800)), ((480, 640), (800, 1067), (800, 1088)),
     ((300, 900), (444, 1333), (448, 1344)), ((900, 300), (1333, 444), (1344, 448))],
)  # fmt: skip
def test_the_detector_sees_what_mmdetection_would_show_it(shape, inner, padded):
    picture = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    picture = np.asarray(Image.fromarray(picture).resize(shape[::-1], Image.Resampling.BICUBIC))
    pixels, size = prepared(torch.from_numpy(picture.copy())[None])
    assert (size, tuple(pixels.shape)) == (inner, (1, 3, *padded))
    padding = torch.ones(pixels.shape[-2:], dtype=torch.bool)
    padding[: inner[0], : inner[1]] = False
    shown = pixels[0] * torch.tensor(geneval.STD).view(3, 1, 1) + torch.tensor(geneval.MEAN).view(3, 1, 1)
    torch.testing.assert_close(shown[:, padding], torch.full((3, int(padding.sum())), 128 / 255))
    processor = Mask2FormerImageProcessorPil(size={"height": inner[0], "width": inner[1]}, size_divisor=0)
    theirs = processor(picture, return_tensors="pt").pixel_values[0]
    assert (pixels[0, :, : inner[0], : inner[1]] - theirs).abs().max() <= 6 / 255 / 0.225  # PIL rounds, and antialiases


def logits_of(*rows):
    """Class logits (Q, 81) from the probabilities of some classes; the rest is for none."""
    whole = torch.full((len(rows), 81), 1e-9)
    for row, given in zip(whole, rows, strict=True):
        for name, probability in given.items():
            row[CLASSES.index(name)] = probability
        row[-1] = 1 - sum(given.values())
    return whole.log()


def test_masks_become_objects_without_the_padding_and_in_the_pictures_own_size():
    masks = torch.full((3, 8, 8), -20.0)
    masks[0, 2:4, 2:6] = 20
    masks[1] = 20
    found = objects(logits_of({"cat": 0.9}, {"dog": 0.5, "bus": 0.4}, {}), masks, (32, 32), (32, 16), (64, 32))
    assert [d.name for d in found] == ["cat", "dog", "bus"]  # a query may be two things
    assert [d.score for d in found] == pytest.approx([0.9, 0.5, 0.4], abs=0.03)  # at an outline masks are less sure
    assert [d.mask.shape for d in found] == [(64, 32)] * 3
    assert found[0].box == (16, 16, 32, 32)  # its right half lies in the padding
    assert found[1].box == found[2].box == (0, 0, 32, 64)


def test_a_score_is_the_classes_times_the_masks_and_an_empty_mask_is_no_object():
    masks = torch.full((3, 4, 4), -1.0)
    masks[0] = masks[1] = 1
    found = objects(logits_of({"cat": 0.9}, {"dog": 0.4}, {"bus": 0.9}), masks, (8, 8), (8, 8), (8, 8))
    assert [(d.name, d.score) for d in found] == [("cat", pytest.approx(0.9 / (1 + np.exp(-1)), rel=1e-4))]
    assert objects(logits_of({"cat": 0.3}), masks[:1], (8, 8), (8, 8), (8, 8)) == []


def described(clip, name):
    """The published recipe, written out for one text at a time: (10, D)."""
    tokenizer, means = clip_tokenizer(), []
    for colour in COLOURS:
        texts = [f"a photo of a {text}" for text in (f"{colour} {name}", f"{colour}-colored {name}", f"{colour} object")]
        embeddings = [clip.get_text_features(**tokenizer(t, return_tensors="pt")).pooler_output[0] for t in texts]
        means.append(torch.stack([F.normalize(e, dim=-1) for e in embeddings]).mean(0))
    return torch.stack(means)


def test_colours_are_those_of_the_published_recipe_written_out(evaluator, folders, pictures):
    clip = CLIPModel.from_pretrained(folders[1]).requires_grad_(False)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    descriptions = [(name, described(clip, name)) for name in ("cat", "hot dog")]
    rng, seen = np.random.default_rng(1), set()
    for number in range(16):
        picture, (name, texts) = pictures[number % 4] // 3 + rng.integers(0, 160, 3, np.uint8), descriptions[number % 2]
        mask = np.zeros((SIZE, SIZE), bool)
        top, left = rng.integers(0, 50, 2)
        mask[top : top + 36, left : left + 32] = rng.random((36, 32)) < 0.8
        rows, columns = np.nonzero(mask)
        box = tuple(map(int, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)))
        cut = Image.composite(Image.fromarray(picture), Image.new("RGB", (SIZE, SIZE), "#999"), Image.fromarray(mask)).crop(box)
        shown = clip.get_image_features(**processor(cut, return_tensors="pt")).pooler_output
        likeness = F.cosine_similarity(texts, shown)
        best, second = likeness.topk(2).values.tolist()
        if best - second > 2e-3:  # PIL rounds, tensors don't
            assert evaluator.colour(picture, Detection(name, 1.0, box, mask)) == COLOURS[likeness.argmax()]
            seen.add(COLOURS[likeness.argmax()])
    assert len(seen) >= 2


def test_pictures_are_judged_each_by_its_own_entry(evaluator, pictures, unresized):
    surest = [max(there, key=lambda d: d.score) for there in evaluator.detect(pictures)]
    colours = [evaluator.colour(picture, thing) for picture, thing in zip(pictures, surest, strict=True)]
    wanted = [{"class": d.name, "count": 1, "color": c} for d, c in zip(surest, colours, strict=True)]
    rows = [{"tag": "colors", "prompt": "a prompt", "include": [w]} for w in wanted]
    judged = evaluator(pictures, rows)
    assert judged["right"].tolist() == [True] * 4
    assert judged["right"].dtype == bool
    assert judged["reason"].tolist() == ["right"] * 4
    other = [w | {"color": next(c for c in COLOURS if c != w["color"])} for w in wanted]
    judged = evaluator(pictures, [row | {"include": [w]} for row, w in zip(rows, other, strict=True)])
    assert judged["right"].tolist() == [False] * 4
    assert judged["reason"].tolist() == [
        f"{w['class']} {c}, not {o['color']}" for w, c, o in zip(wanted, colours, other, strict=True)
    ]
    many = [{"tag": "two_object", "prompt": "", "include": [{"class": w["class"], "count": 13}]} for w in wanted]
    assert not evaluator(pictures, many)["right"].any()
    assert len({w["class"] for w in wanted}) > 1


def test_entries_that_say_nothing_of_objects_are_refused(evaluator, pictures):
    with pytest.raises(ValueError, match="'a red ring' says nothing of objects: give GenEval entries"):
        evaluator(pictures[:1], [{"prompt": "a red ring"}])
    with pytest.raises(ValueError, match="4 pictures but 1 entries"):
        evaluator(pictures, [{"prompt": "a red ring"}])


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, folders):
    file = saved_detector(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["class_predictor.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is no Mask2Former: it has no class_predictor\.weight"):
        GenEval(tmp_path, folders[1])


@pytest.mark.parametrize("labels", [CLASSES[:79], CLASSES[1:] + CLASSES[:1], [f"LABEL_{i}" for i in range(80)]])
def test_a_detector_of_other_things_is_refused(tmp_path, folders, labels):
    with pytest.raises(ValueError, match="finds other things than COCO's 80 classes"):
        GenEval(saved_detector(tmp_path, labels), folders[1])


def test_evaluators_need_no_ray_no_mlflow_and_no_torchvision():
    names = ", ".join(f"flowbp_ray.evaluators.{name}" for name in ("geneval", "unified_reward", "shapes_checker"))
    code = f"import sys, {names}; sys.exit(bool({{'ray', 'mlflow', 'torchvision'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
