"""Randomness depends on (seed, purpose, what it belongs to) and on nothing else."""

import numpy as np
import pytest
import torch

from finetune.seeding import PositionRandom, key, permutation

torch.set_num_threads(1)


def test_key_is_pinned():
    """These numbers decide every draw of every run: if they change, resumed runs silently change too."""
    assert key(0, "noise", 0) == 0x9425464de128b7e
    assert key(2**40, "crop", 3, 17) == 0x1ca500e73168aca


def test_key_depends_on_every_argument_and_on_their_boundaries():
    calls = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a"), (0, "a", 1, 0), (0, "a", 11), (0, "a, 1")]
    assert len({key(*call) for call in calls}) == len(calls)
    assert key(np.int64(0), "a", np.int32(1)) == key(0, "a", 1)
    assert all(0 <= key(0, "a", i) < 2**64 for i in range(100))
    assert len({key(0, "noise", i) for i in range(20000)}) == 20000


def test_key_refuses_what_is_not_an_integer():
    with pytest.raises(TypeError):
        key(0, "noise", 1.5)


def test_permutation_is_a_permutation_pinned_and_keyed():
    assert permutation(0, "order", 0, 8).tolist() == [5, 6, 0, 2, 3, 7, 1, 4]
    order = permutation(5, "order", 1, 10007)
    assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(10007))
    for other in [(6, "order", 1), (5, "rows", 1), (5, "order", 2)]:
        assert np.mean(permutation(*other, 10007) == order) < 0.01


def test_permutation_is_uniform():
    first = np.bincount([permutation(s, "order", 0, 4)[0] for s in range(4000)], minlength=4)
    assert np.abs(first - 1000).max() < 5 * 27.4  # 5 standard deviations of a binomial(4000, 1/4)


def test_draws_are_pinned():
    random = PositionRandom(0, torch.tensor([0, 12345678901]))
    normal = random.normal("noise", (4, 4, 4))
    assert normal.dtype == torch.float32 and normal.shape == (2, 4, 4, 4)
    pinned = torch.tensor([[1.467921, -1.310697], [-0.811769, -1.200236]])
    torch.testing.assert_close(normal[:, 0, 0, :2], pinned, rtol=1e-5, atol=1e-6)
    assert random.integers("level", 1000).tolist() == [156, 554]
    assert random.uniform("dropout").tolist() == pytest.approx([0.5364955550782687, 0.5402620489250949], abs=1e-12)


def test_a_draw_belongs_to_its_position_not_to_its_batch():
    positions = torch.tensor([7, 3, 100, 8, 2**40])
    whole = PositionRandom(1, positions)
    whole.uniform("something drawn before")
    for part in ([0, 1], [2, 3, 4], [4, 0, 2]):
        alone = PositionRandom(1, positions[part])
        assert torch.equal(alone.normal("noise", (3, 8, 8)), whole.normal("noise", (3, 8, 8))[part])
        assert torch.equal(alone.uniform("u"), whole.uniform("u")[part])
        assert torch.equal(alone.integers("level", 1000), whole.integers("level", 1000)[part])


def test_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = PositionRandom(1, torch.arange(3)).normal("noise", (4, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(PositionRandom(1, torch.arange(3)).normal("noise", (4, 4)), first)


def test_seed_purpose_and_position_each_matter():
    def draw(seed: int, purpose: str, position: int) -> torch.Tensor:
        return PositionRandom(seed, torch.tensor([position])).normal(purpose, (1000,))[0]

    one = draw(0, "noise", 0)
    assert torch.equal(one, draw(0, "noise", 0))
    for other in (draw(1, "noise", 0), draw(0, "posterior", 0), draw(0, "noise", 1)):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 5 / 1000**0.5


def test_distributions():
    n = 20000
    random = PositionRandom(3, torch.arange(n))
    normal = random.normal("noise", (3, 2, 2)).double()
    count = normal.numel()
    assert abs(normal.mean()) < 5 / count**0.5 and abs(normal.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((normal[:-1] * normal[1:]).mean()) < 5 / count**0.5  # neighbouring positions are independent
    uniform = random.uniform("u")
    assert uniform.dtype == torch.float64 and uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 5 / (12 * n) ** 0.5
    integers = random.integers("level", 10)
    counts = torch.bincount(integers, minlength=10)
    assert len(counts) == 10 and (counts - n / 10).abs().max() < 5 * (n * 0.09) ** 0.5


def test_small_and_scalar_shapes():
    random = PositionRandom(0, torch.arange(4))
    assert random.normal("offset_noise", (3, 1, 1)).shape == (4, 3, 1, 1)
    assert random.normal("scalar", ()).unique().numel() == 4
