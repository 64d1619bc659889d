"""What comes back at a resume is complete, and by name."""

from types import SimpleNamespace

import pytest
import torch

from finetune import checkpoint
from finetune.conditioning import Unconditional
from finetune.errors import CheckpointError
from finetune.modules import Modules
from finetune.training_state import TrainingState, load_optimizer, optimizer_tensors


def test_optimizer_state_is_keyed_by_name():
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model, optimizer):
        model(torch.ones(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def names(model):
        return {p: n for n, p in model.named_parameters()}

    (model, optimizer), (again, restored) = make(), make()
    step(model, optimizer)
    saved = {k: v.clone() for k, v in optimizer_tensors(optimizer, names(model)).items()}
    assert set(saved) >= {"0.weight/exp_avg", "1.bias/step"}
    again.load_state_dict(model.state_dict())
    load_optimizer(restored, saved, names(again))
    step(model, optimizer), step(again, restored)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    (other, fresh) = make()  # negative control: without its optimizer state the next step differs
    other.load_state_dict(again.state_dict())
    step(other, fresh), step(again, restored)
    assert not torch.equal(other[0].weight, again[0].weight)


def training_state(width=4, bias=True, value=0.0):
    """The state of a training of one layer that has done a step."""
    unet = torch.nn.Linear(3, width, bias=bias)
    torch.nn.init.constant_(unet.weight, value)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.1)
    unet(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()
    objective = SimpleNamespace(parameters=dict, state_dict=dict)
    modules = Modules(space=None, conditioner=Unconditional(), objective=objective, unet=unet)
    return TrainingState(modules, optimizer, ema=None, scaler=None)


def contents(state):
    return {part: {name: t.clone() for name, t in tensors.items()} for part, tensors in state.parts().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[p][n], t) for p, tensors in b.items() for n, t in tensors.items())


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"width": 5}, r"model: weight: \(5, 3\) -> \(4, 3\)"),
        ({"bias": False}, r"model: bias: absent -> \(4,\)"),
    ],
    ids=["shape", "name"],
)
def test_another_network_is_refused_before_anything_is_touched(tmp_path, other, says):
    saved, live = training_state(**other, value=1.0), training_state()
    found = checkpoint.load(checkpoint.save(tmp_path, parts=saved.parts(), state=saved.facts()))
    before = contents(live)
    with pytest.raises(CheckpointError, match=says):
        live.load(found)
    assert equal(contents(live), before)
    same = training_state(value=1.0)
    path = checkpoint.save(tmp_path / "same", parts=same.parts(), state=same.facts())
    assert not equal(contents(live), contents(same)), "negative control"
    live.load(checkpoint.load(path))
    assert equal(contents(live), contents(same))


@pytest.mark.parametrize("name", ["wait/exp_avg", "bias/exp_avg"], ids=["no such parameter", "another shape"])
def test_moments_that_are_of_no_parameter_are_refused(tmp_path, name):
    state = training_state()
    parts = state.parts() | {"optimizer": {name: state.parts()["optimizer"]["weight/exp_avg"]}}
    found = checkpoint.load(checkpoint.save(tmp_path, parts=parts, state=state.facts()))
    with pytest.raises(CheckpointError, match=f"optimizer: {name}"):
        training_state().load(found)
