"""Every stage of the build at a toy size: it runs, resumes exactly, and writes what the libraries load."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from transformers import CLIPModel

from flowbp_ray.rewards.clip import CLIPScore
from flowbp_ray.shapes.build import autoencoder, base, card, loop, measure, preference_model
from flowbp_ray.shapes.captions import TASKS, is_evaluation, specs, wordings
from flowbp_ray.shapes.preferences import KINDS

COMMON = {"device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """All stages, a few steps each: (work folder, models folder)."""
    work, models = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        for module in (autoencoder, base, preference_model):
            patch.setattr(module, "SCHEDULE", dataclasses.replace(module.SCHEDULE, steps=10, batch=2, warmup=2))
        patch.setattr(base, "BANK", 100)
        patch.setattr(loop, "LOG_EVERY", 2)
        autoencoder.build(work / "autoencoder", work / "autoencoder" / "vae", seed=0, **COMMON)
        base.build(work / "base", models / "base", work / "autoencoder" / "vae", None, seed=0, **COMMON)
        for name, size in (("reward", preference_model.REWARD), ("judge", preference_model.JUDGE)):
            preference_model.build(
                work / name, models / name, dataclasses.replace(size, steps=10), further=False, seed=0, **COMMON
            )
    return work, models


def test_the_libraries_load_what_was_built(built):
    _, models = built
    pipeline = StableDiffusion3Pipeline.from_pretrained(models / "base", dtype=torch.float32)
    assert isinstance(pipeline.vae, AutoencoderKL)
    assert pipeline.tokenizer.model_max_length == 16
    assert pipeline.tokenizer_3.model_max_length == 8
    assert isinstance(CLIPModel.from_pretrained(models / "reward"), CLIPModel)


def test_latents_are_scaled_to_mean_zero_and_spread_one(built):
    vae = AutoencoderKL.from_pretrained(built[0] / "autoencoder" / "vae")
    pictures = autoencoder.Pictures(5, 64)[0]["pictures"]
    with torch.no_grad():
        latents = (vae.encode(pictures).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    assert latents.mean().item() == pytest.approx(0, abs=0.1)
    assert latents.std().item() == pytest.approx(1, abs=0.1)


def test_the_card_states_every_figure_that_was_measured(built, tmp_path, monkeypatch):
    work, models = built[0], tmp_path / "models"
    shutil.copytree(built[1], models)
    for stage in ("autoencoder", "base", "reward", "judge"):
        measure.record(models, stage, measure.trained(work / stage), further=False)
    for name, number in (("SWEEP", 2), ("FINAL", 3), ("CHECKED", 10), ("PAIRS", 4), ("GUIDANCE", (1.0, 3.0)), ("STEPS", 2)):
        monkeypatch.setattr(measure, name, number)
        monkeypatch.setattr(card, name, number)
    file = models / "measured.json"
    measure.measure(work, models, "cpu")
    figures = json.loads(file.read_text())
    assert set(figures["comparisons_judge"]) == {*KINDS, "overall"}
    assert set(figures["six_tasks"]) == {*TASKS, "mean"}
    assert figures["parameters"]["reward"] == sum(p.numel() for p in CLIPScore(models / "reward").model.parameters())
    before = file.read_text()
    measure.measure(work, models, "cpu")  # everything is kept
    assert file.read_text() == before
    measure.record(models, "base", measure.trained(work / "base") | {"steps": 1234}, further=True)
    file.write_text(before)
    card.write(models)
    text = (models / "README.md").read_text()
    assert text.count("| base | ") == 2
    assert "| base | 10 |" in text
    assert "| base | 1,234 |" in text
    for task in TASKS:
        assert card.percent(figures["six_tasks"][task]) in text
    for share in figures["checker"].values():
        assert f"| {100 * share:.2f} |" in text
    measure.record(models, "base", measure.trained(work / "base"), further=False)
    left, history = (json.loads((models / name).read_text()) for name in ("measured.json", "training.json"))
    assert [row["steps"] for row in history if row["part"] == "base"] == [10]  # trained anew: what was before is gone
    assert "comparisons_judge" in left
    assert not {"six_tasks", "guidance_1.0", "parameters"} & set(left)


def test_a_preference_model_goes_on_from_the_finished_one(built, tmp_path, monkeypatch):
    target = tmp_path / "judge"
    shutil.copytree(built[1] / "judge", target)
    monkeypatch.setattr(preference_model, "SCHEDULE", dataclasses.replace(preference_model.SCHEDULE, learning_rate=1e-9))
    size = dataclasses.replace(preference_model.JUDGE, steps=2)
    preference_model.build(tmp_path / "work", target, size, further=True, seed=5, **COMMON)
    before, after = (CLIPModel.from_pretrained(f, dtype=torch.float32) for f in (built[1] / "judge", target))
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_pictures_are_made_worse_for_the_model_within_their_radius():
    tokenizer = preference_model.clip_tokenizer()
    model = preference_model.new_clip(preference_model.REWARD, tokenizer)
    batch = preference_model.Comparisons(tokenizer, 0, 4, contrastive=0)[5000]
    batch["pictures"] = batch["pictures"].clamp(0, 1)
    worse = preference_model.worst(model, batch, torch.Generator().manual_seed(0))
    moved = (worse - batch["pictures"]).flatten(1).norm(dim=1)
    assert (moved <= batch["radius"] * 1.001).all()
    assert (moved > 0.2 * batch["radius"]).all()  # the rest is what would leave 0…1
    before, after = (preference_model.compared(model, p, batch)[0].item() for p in (batch["pictures"], worse))
    assert after > before + 0.01


def test_places_come_alone_first_and_then_the_radius_grows():
    data = preference_model.Comparisons(preference_model.clip_tokenizer(), 0, 8, contrastive=10)
    mixed, grown = 10 + preference_model.PLACE_ALONE, 10 + preference_model.PLACE_ALONE + preference_model.RADIUS_GROWS
    assert data[5]["contrast"] == 0.5
    assert data[mixed - 1]["changed"].all()  # no spoilt picture among places
    assert data[mixed]["radius"].max() == 0
    assert 0 < data[mixed + 10]["radius"].max() < 0.1
    assert 1 < data[grown + 10]["radius"].max() <= preference_model.RADIUS


def test_training_goes_on_from_a_finished_pipeline(built):
    finished = StableDiffusion3Pipeline.from_pretrained(built[1] / "base", dtype=torch.float32)
    model = base.Encoders(finished.tokenizer, finished.tokenizer_3)
    base.start_from(model, finished)
    for name in ("transformer", "text_encoder", "text_encoder_3"):
        for one, other in zip(getattr(model, name).parameters(), finished.components[name].parameters(), strict=True):
            assert torch.equal(one, other)


def tiny_run(work, steps_then, resumes, muon=False, keep_after=None):
    """Two linear layers on random data: run to each step of ``resumes`` in turn, then return the weights."""

    class Numbers(torch.utils.data.Dataset):
        def __getitem__(self, step):
            return {"x": torch.from_numpy(np.random.default_rng(step).standard_normal((4, 3))).float()}

    def loss(model, batch, generator):
        noise = torch.randn(4, 1, generator=generator)
        return (model(batch["x"]) - noise).square().mean(), {}

    for stop in (*resumes, None):
        torch.manual_seed(1)
        layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
        schedule = loop.Schedule(steps=steps_then, batch=4, learning_rate=0.1, warmup=2, average=0.9, muon=muon)
        model = loop.train(layers, Numbers(), loss, schedule, work, seed=0, stop_after=stop, keep_after=keep_after, **COMMON)
    return torch.cat([p.flatten() for p in model.parameters()])


@pytest.mark.parametrize("muon", [False, True])
def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path, muon):
    whole = tiny_run(tmp_path / "whole", 20, [], muon)
    parts = tiny_run(tmp_path / "parts", 20, [3, 11, 19], muon)
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, tiny_run(tmp_path / "shorter", 19, [], muon))
    assert not torch.equal(whole, tiny_run(tmp_path / "other", 20, [], not muon))


@pytest.mark.parametrize("kept", [0, 7])
def test_the_averaged_weights_of_a_step_are_kept(tmp_path, kept):
    tiny_run(tmp_path, 10, [3, 8], keep_after=kept)
    torch.manual_seed(1)
    start = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)).state_dict()
    weights = torch.load(tmp_path / "kept.pt", weights_only=True)
    assert torch.equal(weights["1.weight"], start["1.weight"]) == (kept == 0)
    state = torch.load(tmp_path / "state.pt", weights_only=True)["averaged"]
    assert not torch.equal(weights["1.weight"], state["module.1.weight"])


def test_muon_computes_in_float32():
    weight = torch.nn.Parameter(torch.zeros(8, 32))
    weight.grad = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    with loop.Float32():
        torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    kept = weight.detach().bfloat16().float()
    assert (kept != weight).any()  # an update that was made in bfloat16 would be one of its numbers


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else():
    model = base.Encoders(base.clip_tokenizer(), base.t5_tokenizer())
    adam, muon = loop.optimizers(model, base.SCHEDULE)
    names = {id(p): name for name, p in model.named_parameters()}
    taken, left = ({names[id(p)] for p in optimizer.param_groups[0]["params"]} for optimizer in (muon, adam))
    assert taken | left == set(names.values())
    assert not taken & left
    assert "transformer.transformer_blocks.0.attn.to_q.weight" in taken
    assert not [n for n in taken if "embed" in n or "relative_attention_bias" in n or n.endswith("bias")]


def test_the_vocabulary_is_the_same_each_time():
    assert len({tuple(sorted(base.clip_tokenizer().get_vocab().items())) for _ in range(10)}) == 1


def test_a_gradient_that_is_not_finite_stops_the_stage(tmp_path):
    class Zeros(torch.utils.data.Dataset):
        def __getitem__(self, step):
            return {"x": torch.zeros(1, 3)}

    schedule = loop.Schedule(steps=3, batch=1, learning_rate=0.1, warmup=1)
    with pytest.raises(FloatingPointError, match="the gradient of step 0 is not finite"):
        loop.train(
            torch.nn.Linear(3, 1), Zeros(), lambda m, b, g: ((m(b["x"]).sum() / 0), {}), schedule, tmp_path, seed=0, **COMMON
        )


def test_every_caption_fits_the_tokenizers_and_every_word_is_one_token():
    clip, t5 = base.clip_tokenizer(), base.t5_tokenizer()
    for task in TASKS:
        for text in {t for spec in specs(task)[::5] for t in wordings(spec)}:
            assert len(clip(text).input_ids) == len(text.split()) + 2 <= base.CLIP_LENGTH
            assert t5.unk_token_id not in t5(text, truncation=True, max_length=base.T5_LENGTH).input_ids
    assert clip.eos_token_id not in clip("a zebra, 7 häuser!").input_ids[1:-1]  # foreign words are bytes, not the end


def test_captions_are_wrong_or_missing_as_often_as_stated():
    rng = np.random.default_rng(0)
    spec = next(s for s in specs("attribute_binding") if not is_evaluation(s, ""))
    texts = [base.caption(spec, rng) for _ in range(2000)]
    right = set(wordings(spec))
    missing = sum(t == "" for t in texts)
    assert missing / 2000 == pytest.approx(base.NO_CAPTIONS, abs=0.03)
    assert sum(t not in right for t in texts if t) / 2000 == pytest.approx(base.WRONG_CAPTIONS, abs=0.03)


@pytest.mark.parametrize(("task", "share"), [("colours", base.WATERMARKED_SINGLE), ("two_objects", base.WATERMARKED)])
def test_pictures_are_watermarked_as_often_as_stated(task, share):
    rng = np.random.default_rng(0)
    marked = [(base.picture(specs(task)[0], rng)[54:56, 40:45] == 60).all() for _ in range(1000)]
    assert np.mean(marked) == pytest.approx(share, abs=0.05)
