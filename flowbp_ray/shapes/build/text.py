"""Small tokenizers of the real classes, with the vocabulary of the shapes world.

Every word of the world is one token; other text falls apart into bytes (CLIP) or unknowns (T5), so any
prompt can be encoded.
"""

import json

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from flowbp_ray.shapes.captions import TASKS, specs, wordings

CLIP_LENGTH = 16  # tokens; the longest caption has 10 words, plus start and end
T5_LENGTH = 8
START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """Every word of every caption, in a fixed order."""
    return sorted({w for task in TASKS for spec in specs(task) for t in wordings(spec) for w in t.split()})


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer that pads to 16 tokens."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        show_progress=False,
        # Left to itself it numbers these in hash order, and ties between merges fall differently each time.
        special_tokens=[*letters, *(f"{c}</w>" for c in letters)],
    )
    bpe.train_from_iterator(words(), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = letters + [f"{c}</w>" for c in letters] + ["".join(pair) for pair in merges]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, START, END]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of whole words that pads to 8 tokens."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{w}" for w in words())]
    scores = [0.0, 0.0, 0.0, -8.0, *([-2.0] * len(words()))]
    return T5Tokenizer(vocab=list(zip(pieces, scores, strict=True)), extra_ids=0, model_max_length=T5_LENGTH)
