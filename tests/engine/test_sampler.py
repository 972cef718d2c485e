"""The next token: greedy, drawn, bounded by k and p, the same in any company, None where logits are no numbers."""

import itertools

import pytest
import torch

from server.engine.sampler import _keep_top, _uniform
from tests.engine.fakes import sampled, sequence

LOGITS = torch.tensor([1.0, -2.0, 0.5, 3.0, 2.5, float("-inf"), 0.0, 1.5])


def drawn(logits, count, first_seed=0, **sampling):
    """How often each token comes in `count` draws of different seeds."""
    asked = [sequence(seed=first_seed + i, **({"temperature": 1.0} | sampling)) for i in range(count)]
    tokens = sampled(logits.expand(count, -1), asked)
    return torch.bincount(torch.tensor(tokens), minlength=len(logits))


def chi_square(counts, probabilities):
    expected = probabilities.double() * counts.sum()
    seen = expected > 0
    assert not counts[~seen].any(), "an impossible token was drawn"
    return float(((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum())


def test_greedy_is_the_largest():
    logits = torch.randn(6, 100)
    assert sampled(logits, [sequence(temperature=0.0)] * 6) == logits.argmax(dim=1).tolist()


def test_no_rows_no_tokens():
    assert sampled(torch.empty(0, 8), []) == []


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    counts = drawn(LOGITS, 20_000, temperature=temperature)
    assert (
        chi_square(counts, torch.softmax(LOGITS / temperature, 0)) < 24.3
    )  # 6 degrees of freedom: 1 in 2000


def test_draws_at_successive_positions_of_one_seed_follow_the_softmax():
    asked = [sequence(output=[0] * i, seed=7, temperature=1.0) for i in range(4000)]
    counts = torch.bincount(torch.tensor(sampled(LOGITS.expand(4000, -1), asked)), minlength=8)
    assert chi_square(counts, torch.softmax(LOGITS, 0)) < 24.3


def test_the_chi_square_can_fail():
    counts = drawn(LOGITS, 20_000, temperature=1.1)
    assert chi_square(counts, torch.softmax(LOGITS, 0)) > 24.3


@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 100])
def test_top_k(top_k):
    kept = LOGITS.clone()
    kept[LOGITS.argsort(descending=True)[top_k:]] = float("-inf")
    assert chi_square(drawn(LOGITS, 5000, top_k=top_k), torch.softmax(kept, 0)) < 24.3


@pytest.mark.parametrize("top_k", [2**63, 10**30])
def test_a_top_k_beyond_the_vocabulary_is_as_if_it_were_off(top_k):
    """Also one that no tensor's integers hold, beside a neighbour that has its tokens ranked."""
    logits = torch.randn(2, 50)
    neighbour = sequence(seed=1, temperature=1.0, top_p=0.5)
    for top_p in (1.0, 0.9):
        off, large = (
            sampled(logits, [sequence(seed=4, temperature=1.0, top_p=top_p, top_k=k), neighbour])
            for k in (0, top_k)
        )
        assert large == off


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p):
    ordered, order = torch.softmax(LOGITS, 0).sort(descending=True)
    size = int((ordered.cumsum(0) < top_p).sum()) + 1
    kept = torch.full_like(LOGITS, float("-inf"))
    kept[order[:size]] = LOGITS[order[:size]]
    assert chi_square(drawn(LOGITS, 5000, top_p=top_p), torch.softmax(kept, 0)) < 24.3


@pytest.mark.parametrize("block", [64, 1000, 4096])
def test_whatever_the_order_of_summing_top_p_keeps_the_same(monkeypatch, block):
    """A GPU sums blocks by themselves and adds what lies before them; float32 has room for a sum's order to show."""
    logits = torch.zeros(20, 100_000)  # and just what the bound falls on
    limits = torch.full((20, 1), logits.shape[1]), torch.arange(4000, 84_000, 4000)[:, None] / logits.shape[1]
    want, whole = _keep_top(logits, *limits), torch.Tensor.cumsum

    def in_blocks(x, dim):
        parts = [whole(part, dim) for part in x.split(block, dim)]
        for before, part in itertools.pairwise(parts):
            part += before[:, -1:]
        return torch.cat(parts, dim)

    monkeypatch.setattr(torch.Tensor, "cumsum", in_blocks)
    assert torch.equal(_keep_top(logits, *limits), want)


def test_top_p_is_of_what_top_k_left():
    logits = torch.tensor([2.0, 2.0, 2.0, 2.0])
    counts = drawn(logits, 400, top_k=2, top_p=0.6)
    assert counts.tolist()[2:] == [0, 0]
    assert min(counts.tolist()[:2]) > 100
    assert drawn(logits, 400, top_k=2, top_p=0.4).tolist() == [400, 0, 0, 0]


def test_equal_logits_keep_the_lower_ids():
    assert drawn(torch.zeros(6), 300, top_k=2)[2:].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 1e-300, 5e-324])
def test_a_vanishing_temperature_is_greedy(temperature):
    logits = torch.tensor([0.0, 5.0, -1.0, 7.0, 6.9])
    assert drawn(logits, 20, temperature=temperature).tolist() == [0, 0, 0, 20, 0]
    assert drawn(-logits.abs(), 20, temperature=temperature).tolist() == [20, 0, 0, 0, 0]


def test_a_seed_draws_the_same_alone_and_anywhere_in_a_batch():
    logits = torch.randn(9, 500)
    asked = [
        sequence(output=[1] * i, seed=2**40 * i - 5, temperature=0.0 if i == 4 else 0.5 + i / 4,
                 top_k=[0, 20][i % 2], top_p=[1.0, 1.0, 0.8][i % 3])
        for i in range(9)
    ]  # fmt: skip
    together = sampled(logits, asked)
    assert [sampled(logits[i : i + 1], asked[i : i + 1])[0] for i in range(9)] == together
    order = torch.randperm(9).tolist()
    assert sampled(logits[order], [asked[i] for i in order]) == [together[i] for i in order]


@pytest.mark.parametrize("certainty", [1.0, 20.0])
def test_top_p_of_one_keeps_every_token(certainty):
    """In float32 the probabilities before a rare token add up to 1; a neighbour's bound must not cut it for that."""
    logits = torch.zeros(2, 1000)
    logits[:, 0] = certainty
    kept = _keep_top(logits, torch.tensor([[1000], [1000]]), torch.tensor([[1.0], [0.5]]))
    assert torch.equal(kept[0], logits[0])
    assert kept[1].isinf().any()


def test_seeds_and_positions_matter():
    logits = torch.zeros(64, 1000)
    by_seed = sampled(logits, [sequence(seed=seed, temperature=1.0) for seed in range(64)])
    by_position = sampled(logits, [sequence(output=[0] * at, temperature=1.0) for at in range(64)])
    assert len(set(by_seed)) > 55
    assert len(set(by_position)) > 55


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 2**64 - 1])
def test_any_seed_of_64_bits(seed):
    asked = [sequence(seed=seed, temperature=1.0)]
    assert sampled(torch.zeros(1, 1000), asked) == sampled(torch.zeros(1, 1000), asked)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}]
)
def test_rows_that_are_not_numbers_are_none_and_leave_others_alone(sampling):
    logits = torch.randn(5, 50)
    asked = [sequence(seed=i, **sampling) for i in range(5)]
    whole = sampled(logits, asked)
    logits[1, 7] = torch.nan
    logits[2] = float("-inf")
    logits[3, 0] = float("inf")
    assert sampled(logits, asked) == [whole[0], None, None, None, whole[4]]


def test_minus_infinity_forbids_a_token_and_no_more():
    logits = torch.full((1, 9), float("-inf"))
    logits[0, 4] = -3.0
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}):
        assert sampled(logits, [sequence(**sampling)]) == [4]


@pytest.mark.parametrize("along", ["seed", "position", "token"])
def test_the_hash_is_uniform_along_each_of_its_inputs(along):
    inputs = {"seed": torch.tensor([3]), "position": torch.tensor([5]), "token": torch.tensor([11])}
    inputs[along] = torch.arange(40_000)
    values = _uniform(**inputs)
    assert ((values > 0) & (values < 1)).all()
    assert values.unique().numel() == 40_000
    counts = torch.histc(values.float(), bins=50, min=0, max=1)
    assert chi_square(counts, torch.full((50,), 1 / 50)) < 86  # 49 degrees of freedom: 1 in 1000
    neighbours = torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]
    assert abs(float(neighbours)) < 0.02


HASHES = [0.5918941111098942, 0.16126109651045784, 0.3328409497434829]


def test_the_hash_is_fixed():
    """A seed gives the same text after an upgrade."""
    got = _uniform(torch.tensor([42]), torch.tensor([3]), torch.arange(3)).tolist()
    assert got == HASHES
