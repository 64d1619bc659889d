"""Guidance: the numbers of generative-models, the formulas by hand, and what must change nothing."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from finetune.guidance import Guidance, doubled, extrapolated, guided, rescaled, two, unguided
from finetune.samplers import euler, karras_sigmas
from golden_numbers import arrays, compare

GUIDERS, SAMPLERS = arrays("sgm_guiders"), arrays("sgm_samplers")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("key", ["VanillaCFG_5", "VanillaCFG_7.5"])
def test_classifier_free_guidance_is_that_of_generative_models(key):
    both, scale = torch.tensor(GUIDERS["x"]), float(key.removeprefix("VanillaCFG_"))
    network = guided(None, doubled(lambda x, time: both), Guidance(scale=scale, channels=4))
    ours = network(both[:3], torch.tensor(0.0), 1.0)
    compare("sgm_guiders", key, ours)
    weak, strong = both.chunk(2)
    assert np.abs(extrapolated(strong, weak, scale).numpy() - GUIDERS[key]).max() > 0.1, "the order matters"


def test_no_guidance_is_the_identity_guider():
    x = torch.tensor(GUIDERS["x"])
    compare("sgm_guiders", "IdentityGuider", unguided(lambda x, time: x)(x, torch.tensor(0.0), 1.0), rtol=0)


def test_a_guided_loop_is_that_of_generative_models():
    """EulerEDM and VanillaCFG(3) over D + 0.1 (1, 2) with the condition, D without."""
    sigmas, x = karras_sigmas(10), torch.tensor(SAMPLERS["x_init"])
    vector = torch.tensor([0, 0, 1, 2]).view(-1, 1, 1, 1)

    def loop(scale):
        def both(x, sigma):
            return x / (1 + sigma.item() ** 2) + 0.1 * vector

        network = guided(None, doubled(both), Guidance(scale=scale, channels=3))
        start = x * float((1 + sigmas[0] ** 2).sqrt())
        return euler(lambda x, sigma: network(x, sigma, float(sigma)), start, sigmas).numpy()

    golden = SAMPLERS["EulerEDM_cfg3/final"]
    compare("sgm_samplers", "EulerEDM_cfg3/final", loop(3.0), rtol=2e-6, floor=1.0)  # ten float32 steps
    assert np.abs(loop(2.0) - golden).max() > 0.1


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaling_is_that_of_diffusers(phi):
    strong, weak = draw(3, 4, 5, 5), draw(3, 4, 5, 5, seed=1)
    plain = extrapolated(weak, strong, 7.5)
    ours = rescaled(plain, strong, phi)
    torch.testing.assert_close(ours, rescale_noise_cfg(plain, strong, phi), rtol=1e-6, atol=1e-6)
    if phi == 1:
        torch.testing.assert_close(ours.std((1, 2, 3)), strong.std((1, 2, 3)))
    assert torch.equal(ours, plain) == (phi == 0)


def test_a_learned_variance_is_that_of_the_condition():
    weak, strong = draw(2, 6, 4, 4), draw(2, 6, 4, 4, seed=1)
    output = Guidance(scale=4.0, channels=3, rescale=0.5)(weak, strong)
    expected = rescaled(weak[:, :3] + 4 * (strong - weak)[:, :3], strong[:, :3], 0.5)
    assert torch.equal(output[:, :3], expected) and torch.equal(output[:, 3:], strong[:, 3:])
    assert not torch.equal(Guidance(scale=4.0, channels=6, rescale=0.5)(weak, strong)[:, 3:], strong[:, 3:])


def test_outside_the_interval_the_network_is_asked_once_and_unguided():
    calls = []

    def network(name, value):
        return lambda x, time: calls.append(name) or value * x

    strong, weak = network("strong", 2.0), network("weak", 1.0)
    x, time = draw(2, 3, 4, 4), torch.tensor(0)
    evaluate = guided(strong, two(weak, strong), Guidance(scale=3.0, channels=3, interval=(0.3, 5.0)))
    for ratio, inside in ((0.1, False), (0.3, False), (0.31, True), (5.0, True), (5.1, False), (float("inf"), False)):
        calls.clear()
        torch.testing.assert_close(evaluate(x, time, ratio), x * (4.0 if inside else 2.0))
        assert calls == (["weak", "strong"] if inside else ["strong"])


def test_what_must_change_nothing():
    weak, strong = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    torch.testing.assert_close(Guidance(scale=1.0, channels=3)(weak, strong), strong)
    plain = Guidance(scale=3.0, channels=3)(weak, strong)
    torch.testing.assert_close(Guidance(scale=3.0, channels=3)(strong, strong), strong)  # the guide is the network
    pair = two(lambda x, time: weak, lambda x, time: strong)
    everywhere = guided(None, pair, Guidance(scale=3.0, channels=3, interval=(0.0, 1e9)))
    assert torch.equal(everywhere(weak, torch.tensor(0), 0.5), plain)
    assert (plain - strong).abs().max() > 1
