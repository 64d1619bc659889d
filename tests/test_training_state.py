"""What comes back at a resume is complete, and by name."""

import torch

from finetune.training_state import load_optimizer, optimizer_tensors


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
