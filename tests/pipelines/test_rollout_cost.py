"""What is counted of sampling, at the published sizes."""

from pipelines import rollout_cost


def test_modulation_is_next_to_nothing_of_a_velocity():
    shares = rollout_cost.modulation(["sd35", "flux1", "flux2"])
    # Of SD3's blocks at 512x512: a modulation of 6 (or 9) d x d matrices a picture, beside 12 of each of 1,357 tokens.
    assert 1 / 3000 < shares["sd35"] < 1 / 1000
    assert 0 < shares["flux2"] < shares["flux1"] < shares["sd35"]  # FLUX.2's blocks share one modulation
