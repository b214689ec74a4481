import sys

import pytest
import torch

from flowbp_ray.rewards.user import UserReward, imported

MODULE = """
import torch

NUMBER = 3

def brightness(images, prompts):
    return images.double().mean((1, 2, 3)) + torch.tensor([len(p) for p in prompts])

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, images, prompts):
        return self.linear(images.mean((2, 3)))[:, 0]

def darkened(images, prompts):
    return images.mul_(0).mean((1, 2, 3))

class Needy:
    def __init__(self, folder):
        pass

def listed(images, prompts):
    return [1.0 for _ in prompts]
"""


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_rewards", None)


def test_a_function_is_called_with_pictures_and_prompts():
    images = torch.rand(2, 3, 4, 5)
    scores = UserReward("my_rewards:brightness")(images, ["a", "bcd"])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, images.mean((1, 2, 3)) + torch.tensor([1.0, 3.0]))


def test_what_is_changed_in_place_is_not_the_pictures_that_others_see():
    images = torch.rand(2, 3, 4, 5)
    before = images.clone()
    assert (UserReward("my_rewards:darkened")(images, ["", ""]) == 0).all()
    assert torch.equal(images, before)


def test_a_class_is_made_once_without_arguments_frozen_and_moved():
    reward = UserReward("my_rewards:Layer").double()
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    reward(images, ["", ""]).sum().backward()
    assert images.grad.abs().min() > 0
    assert all(p.dtype == torch.float64 and p.grad is None for p in reward.parameters())
    assert len(list(reward.parameters())) == 2


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("no_such_module:score", "the reward no_such_module:score cannot be imported: ModuleNotFoundError: No module named"),
        ("my_rewards:nothing", "the reward my_rewards:nothing cannot be imported: AttributeError: module 'my_rewards' has no"),
        ("broken_rewards:score", "the reward broken_rewards:score cannot be imported: ZeroDivisionError: division by zero"),
        ("my_rewards:Needy", "the reward my_rewards:Needy cannot be imported: TypeError: "),
        ("my_rewards:NUMBER", "the reward my_rewards:NUMBER cannot be called: name a function of pictures and prompts"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(path, sentence):
    with pytest.raises(ValueError, match=r".") as caught:
        imported(path)
    assert str(caught.value).startswith(sentence)
    assert len(str(caught.value).splitlines()) == 1


def test_something_else_than_a_tensor_is_an_error():
    with pytest.raises(ValueError, match="the reward my_rewards:listed gave a list: return a tensor with one score a picture"):
        UserReward("my_rewards:listed")(torch.rand(1, 3, 2, 2), [""])
