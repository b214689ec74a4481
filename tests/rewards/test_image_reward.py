import pytest
import torch
from tiny_rewards import LONG, PROMPTS, saved_image_reward
from torch.nn import functional as F
from transformers import BertTokenizer

from flowbp_ray.config.reward import FILES
from flowbp_ray.rewards.checkpoints import read
from flowbp_ray.rewards.clip import pixel_values
from flowbp_ray.rewards.image_reward import ImageReward, text_config, vision_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_image_reward(tmp_path_factory.mktemp("image_reward"))


@pytest.fixture
def reward(folder):
    return ImageReward(folder / FILES["image_reward"].weights, folder)


class Formula:
    """The published model on its own names: BLIP's vision transformer, its BERT with cross-attention, and the head."""

    def __init__(self, weights):
        self.weights = {k: v.double() for k, v in weights.items()}

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name, x, eps):
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def attention(self, q, k, v, mask=None):
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))  # heads of 64
        scores = q @ k.mT / 8
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def vision(self, pixels):
        name = "blip.visual_encoder"
        patches = F.conv2d(pixels, *(self.weights[f"{name}.patch_embed.proj.{k}"] for k in ("weight", "bias")), stride=8)
        x = torch.cat([self.weights[f"{name}.cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).mT], 1)
        x = x + self.weights[f"{name}.pos_embed"]
        for i in range(2):
            block = f"{name}.blocks.{i}"
            q, k, v = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.linear(f"{block}.attn.proj", self.attention(q, k, v))
            hidden = F.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", hidden)
        return self.norm(f"{name}.norm", x, 1e-6)

    def text(self, ids, mask, seen):
        name = "blip.text_encoder"
        words, places = (self.weights[f"{name}.embeddings.{k}_embeddings.weight"] for k in ("word", "position"))
        x = self.norm(f"{name}.embeddings.LayerNorm", words[ids] + places[: ids.shape[1]], 1e-12)
        for i in range(2):
            layer = f"{name}.encoder.layer.{i}"
            for part, source, keep in (("attention", None, mask), ("crossattention", seen, None)):
                of = x if source is None else source
                q, k, v = (self.linear(f"{layer}.{part}.self.{n}", y) for n, y in (("query", x), ("key", of), ("value", of)))
                y = self.linear(f"{layer}.{part}.output.dense", self.attention(q, k, v, keep))
                x = self.norm(f"{layer}.{part}.output.LayerNorm", y + x, 1e-12)
            y = self.linear(f"{layer}.output.dense", F.gelu(self.linear(f"{layer}.intermediate.dense", x)))
            x = self.norm(f"{layer}.output.LayerNorm", y + x, 1e-12)
        return x

    def score(self, pixels, ids, mask):
        x = self.text(ids, mask, self.vision(pixels))[:, 0]
        for number in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{number}", x)
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_score_and_gradient_are_those_of_the_published_formula(folder, reward):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 40, 56, dtype=torch.float64, requires_grad=True)
    tokens = BertTokenizer.from_pretrained(folder)(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    formula = Formula(read(folder / FILES["image_reward"].weights))
    there = formula.score(pixel_values(images, 32), tokens.input_ids, tokens.attention_mask)
    here = reward.double()(images, PROMPTS)
    assert here.dtype == torch.float32
    torch.testing.assert_close(here.double(), there, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(scores.sum(), images)[0] for scores in (here, there))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    assert theirs.abs().max() > 1e-5


def test_the_prompt_matters(reward):
    images = torch.rand(1, 3, 32, 32).expand(2, -1, -1, -1)
    scores = reward(images, PROMPTS)
    assert (scores[0] - scores[1]).abs() > 1e-3


def test_the_published_widths_give_sixteen_and_twelve_heads(folder):
    weights = read(folder / FILES["image_reward"].weights)
    vision, text = weights.under("blip.visual_encoder."), weights.under("blip.text_encoder.")
    with torch.device("meta"):
        vision |= {"embeddings.patch_embedding.weight": torch.empty(1024, 3, 16, 16)}
        vision |= {"encoder.layers.0.mlp.fc1.weight": torch.empty(4096, 1024)}
        vision |= {"embeddings.position_embedding": torch.empty(1, 197, 1024)}
        text |= {"embeddings.word_embeddings.weight": torch.empty(30524, 768)}
    assert vision_config(vision).num_attention_heads == 16
    assert (vision_config(vision).image_size, vision_config(vision).patch_size) == (224, 16)
    assert text_config(text).num_attention_heads == 12


def test_35_tokens_are_read_and_that_is_said_once(reward, recwarn):
    images = torch.rand(1, 3, 32, 32)
    scores = reward(images, [LONG])
    assert [str(w.message) for w in recwarn] == [f"ImageReward reads 35 tokens and {LONG!r} has 58: its end is not scored"]
    torch.testing.assert_close(reward(images, [" ".join(LONG.split()[:33])]), scores)
    reward(images, [LONG])
    assert len(recwarn) == 1


def test_another_file_is_refused_in_one_sentence(folder, tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"other\.pt is another reward's checkpoint, or none: it has no embeddings\.patch"):
        ImageReward(path, folder)
