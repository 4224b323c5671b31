"""A micro-batch's share of the loss: shares add up, alpha 0 changes nothing, missing fields are named."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from megatron_entropic.algorithms import (
    MicrobatchLocalController,
    PromptAlpha,
    Steering,
    kl_penalty,
    policy_loss,
    token_weights,
)
from megatron_entropic.algorithms.entropy_control.steering import Focus
from megatron_entropic.config.run import Config
from megatron_entropic.policy.step.loss import SUMS, MicrobatchLoss, Normalizers, count_high_prob, local_normalizers
from megatron_entropic.policy.step.loss_fields import LossSettings, TokenFields, token_fields
from megatron_entropic.types import Sequence

LENGTHS = (3, 11, 1, 6)
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
CPU = torch.device("cpu")
PUSHED = Steering(alpha=0.4)


def settings(high_prob_denominator: bool = False, correction: str = "tis", **algorithm) -> LossSettings:
    config = Config(
        model={"hf_dir": "unused"},
        data={"train_files": ["unused"]},
        rollout={"importance_correction": correction, "max_response_tokens": 20},
        algorithm={"kl": {"coefficient": 0.1}, **algorithm},
        entropy_control={"tau": 0.6},
    )
    return replace(LossSettings.from_config(config), high_prob_denominator=high_prob_denominator)


def sequences() -> list[Sequence]:
    generator = torch.Generator().manual_seed(1)

    def noise(n: int) -> torch.Tensor:
        return torch.randn(n, generator=generator)

    return [
        Sequence(
            tokens=torch.arange(n + 2),
            prompt_length=2,
            advantages=noise(n),
            old_logprobs=-0.5 + 0.3 * noise(n),
            rollout_logprobs=-0.5 + 0.3 * noise(n),
            reference_logprobs=-0.5 + 0.3 * noise(n),
        )
        for n in LENGTHS
    ]


def logprobs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return (-torch.rand(sum(LENGTHS), generator=generator)).requires_grad_()


def normalizers(high: float) -> Normalizers:
    return Normalizers(tokens=sum(LENGTHS), sequences=len(LENGTHS), high_prob_tokens=high)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("high_prob_denominator", [False, True])
def test_shares_add_up_to_the_loss_of_one_microbatch(mode, high_prob_denominator):
    chosen = settings(aggregation=mode, high_prob_denominator=high_prob_denominator)
    whole, parts = logprobs(), logprobs()
    counts = normalizers(count_high_prob(whole.detach(), chosen.tau))
    assert 0 < counts.high_prob_tokens < sum(LENGTHS)
    loss, sums = MicrobatchLoss(token_fields(sequences(), chosen, CPU), chosen, counts, PUSHED).share(whole, None)
    loss.backward()
    added = torch.zeros(len(SUMS), dtype=torch.float64)
    starts = [0, 3, 14, 15, 21]
    for members in ([0], [1, 2], [3]):
        piece = parts[starts[members[0]] : starts[members[-1] + 1]]
        some = [sequences()[i] for i in members]
        share, measured = MicrobatchLoss(token_fields(some, chosen, CPU), chosen, counts, PUSHED).share(piece, None)
        share.backward()
        added += measured
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(added, sums, rtol=1e-6, atol=1e-8)
    names = dict(zip(SUMS, sums.tolist(), strict=True))
    assert loss.item() == pytest.approx(names["policy_loss"] + names["entropic_loss"] + names["kl_loss"], rel=1e-6)
    assert names["high_prob"] == counts.high_prob_tokens
    assert names["tokens"] == sum(LENGTHS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_losses_of_some_tokens_add_up_to_the_share(mode, alpha):
    """Cut anywhere, also within a sequence."""
    chosen = settings(aggregation=mode)
    loss = MicrobatchLoss(token_fields(sequences(), chosen, CPU), chosen, normalizers(0), Steering(alpha=alpha))
    whole, parts = logprobs(), logprobs()
    loss.share(whole, None)[0].backward()
    cuts = [0, 2, 5, 14, 21]
    for begin, end in itertools.pairwise(cuts):
        loss.of_tokens(parts[begin:end], None, slice(begin, end)).backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-9)


def test_divergences_from_a_teacher_add_up_with_the_tokens_weights():
    chosen = replace(settings(aggregation="seq-mean-token-mean"), divergence_coefficient=0.3)
    loss = MicrobatchLoss(token_fields(sequences(), chosen, CPU), chosen, normalizers(0), PUSHED)
    divergences = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(4)).requires_grad_()
    base, _ = loss.share(logprobs(), None)
    share, sums = loss.share(logprobs(), None, divergences)
    means = [part.mean() for part in divergences.detach().split(LENGTHS)]
    expected = 0.3 * float(torch.stack(means).mean())
    names = dict(zip(SUMS, sums.tolist(), strict=True))
    assert share.item() - base.item() == pytest.approx(expected, abs=1e-6)
    assert names["distillation_loss"] == pytest.approx(expected, rel=1e-6)
    assert names["divergence"] == pytest.approx(divergences.sum().item(), rel=1e-6)
    parts = [loss.of_divergences(divergences[a:b], slice(a, b)) for a, b in itertools.pairwise([0, 2, 14, 21])]
    assert sum(parts).item() == pytest.approx(expected, rel=1e-6)


def test_high_prob_denominators_have_no_loss_of_some_tokens():
    assert settings().adds_up_over_tokens
    assert not settings(high_prob_denominator=True).adds_up_over_tokens


def test_without_steering_it_is_the_base_loss_bit_for_bit():
    chosen = settings()
    fields = token_fields(sequences(), chosen, CPU)
    results = []
    for steering in (Steering(), PUSHED):
        values = logprobs()
        loss, sums = MicrobatchLoss(fields, chosen, normalizers(0), steering).share(values, None)
        loss.backward()
        results.append((loss, sums[0], values.grad))
    base = logprobs()
    terms = policy_loss(
        base, fields.old_logprobs, fields.advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0,
        importance_weights=fields.correction,
    )  # fmt: skip
    weights = token_weights("token-mean", fields.lengths, global_tokens=21, global_sequences=4, max_response_tokens=20)
    loss = (weights * terms.loss).sum() + 0.1 * (weights * kl_penalty(base, fields.reference_logprobs, "k3")).sum()
    loss.backward()
    assert torch.equal(results[0][0], loss)
    assert torch.equal(results[0][2], base.grad)
    assert not torch.equal(results[1][2], base.grad), "the EntroPIC term changes nothing: it was not tested"


def test_a_token_that_crossed_tau_since_the_count_does_not_blow_up():
    chosen = settings(high_prob_denominator=True)
    fields = token_fields(sequences(), chosen, CPU)
    loss, sums = MicrobatchLoss(fields, chosen, normalizers(0), PUSHED).share(logprobs(), None)
    assert torch.isfinite(loss)
    assert torch.isfinite(sums).all()


def test_local_normalizers_are_the_published_weights():
    fields = TokenFields(torch.tensor([3, 4]), torch.zeros(7), torch.zeros(7))
    assert local_normalizers(fields, minibatch_sequences=8, data_parallel=2) == Normalizers(
        tokens=7.0, sequences=2, scale=2 / 16
    )


@pytest.mark.parametrize("name", ["old_logprobs", "advantages", "rollout_logprobs", "reference_logprobs"])
def test_a_missing_or_misshapen_field_is_named(name):
    for value, found in ((None, "nothing"), (torch.zeros(5), r"shape \(5,\)")):
        batch = sequences()
        batch[1] = replace(batch[1], **{name: value})
        with pytest.raises(ValueError, match=rf"sequence 1: {name} needs \[11\], got {found}"):
            token_fields(batch, settings(), CPU)


def test_fields_that_no_loss_reads_may_be_missing():
    batch = [replace(sequence, rollout_logprobs=None, reference_logprobs=None) for sequence in sequences()]
    fields = token_fields(batch, settings(correction="none", kl={"coefficient": 0.0}), CPU)
    assert fields.correction is None
    assert fields.reference_logprobs is None


def test_an_entropy_bonus_is_the_weighted_entropy():
    chosen = settings()
    loss = MicrobatchLoss(
        token_fields(sequences(), chosen, CPU), chosen, normalizers(0), Steering(entropy_coefficient=0.3)
    )
    values, entropies = logprobs(), torch.rand(sum(LENGTHS), requires_grad=True)
    total, sums = loss.share(values, entropies)
    total.backward()
    torch.testing.assert_close(entropies.grad, torch.full((sum(LENGTHS),), -0.3 / sum(LENGTHS)))
    measured = dict(zip(SUMS, sums.tolist(), strict=True))
    assert measured["entropy_loss"] == pytest.approx(-0.3 * entropies.mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("steering", "kept"),
    [
        (Steering(samples="positive"), lambda logp, a: a > 0),
        (Steering(samples="negative"), lambda logp, a: a < 0),
        (Steering(drop_positive_above=0.6), lambda logp, a: ~((a > 0) & (logp.exp() >= 0.6))),
    ],
)
def test_dropped_tokens_have_no_policy_loss_and_stay_in_the_denominator(steering, kept):
    chosen = settings(kl={"coefficient": 0.0})
    fields = token_fields(sequences(), chosen, CPU)
    base, steered = logprobs(), logprobs()
    MicrobatchLoss(fields, chosen, normalizers(0), Steering()).share(base, None)[0].backward()
    _, sums = MicrobatchLoss(fields, chosen, normalizers(0), steering).share(steered, None)
    MicrobatchLoss(fields, chosen, normalizers(0), steering).share(steered, None)[0].backward()
    expected = kept(steered.detach(), fields.advantages)
    assert 0 < int(expected.sum()) < sum(LENGTHS)
    torch.testing.assert_close(steered.grad, base.grad.masked_fill(~expected, 0.0))
    assert dict(zip(SUMS, sums.tolist(), strict=True))["kept"] == int(expected.sum())


@pytest.mark.parametrize("correction", ["tis", "mis"])
def test_sequence_correction_does_not_depend_on_packing(correction):
    chosen = replace(settings(correction=correction), correction_level="sequence", correction_cap=1.1)
    together = token_fields(sequences(), chosen, CPU).correction
    apart = [token_fields([one], chosen, CPU).correction for one in sequences()]
    assert torch.equal(together, torch.cat(apart))
    assert len(set(together[3:14].tolist())) == 1, "one weight a response"
    assert (0.0 in together.tolist()) == (correction == "mis")


def test_microbatch_local_reproduces_the_published_loss_on_recorded_numbers():
    """Two micro-batches of one rank by the published code's formulas, number by number.

    K = (1, 0.01), target 0.1, tau 0.6, a mini-batch of 3 sequences as 2 + 1, log-probs at ratio 1.1 and 1:

        micro-batch 1: H .30; alpha 1 * .20 + .01 * 0 = .2;      acc 0 + .20 * 2 / 3 = .13333
        micro-batch 2: H .05; alpha -.05 + .01 * .13333 = -.048667; acc .13333 - .05 * 1 / 3 = .116667
        loss = 2/3 (mean of -A r + .2 * mean over pi > .6 of -|A| r) + 1/3 (the same with the second alpha)
    """
    chosen = replace(settings(high_prob_denominator=True, correction="none", kl={"coefficient": 0.0}), tau=0.6)
    control = MicrobatchLocalController(0.1, 1.0, 0.01)
    recorded = [
        # (probabilities, ratios, advantages, response lengths, token mean of H)
        ([0.9, 0.5, 0.7], [1.1, 1.0, 1.1], [1.0, 1.0, -2.0], [2, 1], 0.30),
        ([0.8, 0.4], [1.0, 1.1], [0.5, 0.5], [2], 0.05),
    ]
    alphas, total = [], 0.0
    for probabilities, ratios, advantages, lengths, entropy in recorded:
        current = torch.tensor(probabilities).log()
        fields = TokenFields(torch.tensor(lengths), current - torch.tensor(ratios).log(), torch.tensor(advantages))
        alphas.append(control.step(entropy, len(lengths), 3))
        counts = local_normalizers(fields, minibatch_sequences=3, data_parallel=1)
        total += float(MicrobatchLoss(fields, chosen, counts, Steering(alpha=alphas[-1])).share(current, None)[0])
    assert alphas == pytest.approx([0.2, -0.05 + 0.01 * 0.4 / 3])
    assert control.integral == pytest.approx(0.2 * 2 / 3 - 0.05 / 3)
    first = (-1.1 - 1.0 + 2.2) / 3 + 0.2 * (-1.1 - 2.2) / 2
    second = (-0.5 - 0.55) / 2 + (-0.05 + 0.01 * 0.4 / 3) * -0.5 / 1
    assert total == pytest.approx(first * 2 / 3 + second / 3, rel=1e-6)


UNSOLVED = PromptAlpha(gain=2.0, limit=1.5, low=-1.5, high=0.0)


def judged(*shares: float) -> list[Sequence]:
    return [replace(sequence, success=share) for sequence, share in zip(sequences(), shares, strict=True)]


def gradient(batch: list[Sequence], steering: Steering, chosen: LossSettings) -> torch.Tensor:
    values = logprobs()
    counts = normalizers(count_high_prob(values.detach(), chosen.tau))
    MicrobatchLoss(token_fields(batch, chosen, CPU), chosen, counts, steering).share(values, None)[0].backward()
    assert values.grad is not None
    return values.grad


@pytest.mark.parametrize("high_prob_denominator", [False, True])
def test_where_nothing_is_solved_prompts_have_the_constant_alpha(high_prob_denominator):
    chosen = settings(high_prob_denominator)
    unsolved = gradient(judged(0, 0, 0, 0), Steering(prompt_alpha=UNSOLVED), chosen)
    assert torch.equal(unsolved, gradient(sequences(), Steering(alpha=-1.5), chosen))


@pytest.mark.parametrize("high_prob_denominator", [False, True])
def test_where_all_is_solved_the_gradient_is_that_of_the_base_loss(high_prob_denominator):
    chosen = settings(high_prob_denominator)
    solved = gradient(judged(1, 1, 1, 1), Steering(prompt_alpha=UNSOLVED), chosen)
    assert torch.equal(solved, gradient(sequences(), Steering(), chosen))


def test_two_prompts_have_the_weights_computed_by_hand():
    """s = 1/8 and 7/8: alpha -min(1.5, 2 * 7/8) = -1.5 and -min(1.5, 2 / 8) = -0.25, on tokens with pi > .6.

    At ratio 1 the gradient of a token is -A (1 + alpha sign(A)) / 4, without the factor where pi <= .6.
    """
    chosen = settings(correction="none", kl={"coefficient": 0.0})
    old = torch.tensor([0.9, 0.5, 0.8, 0.7]).log()
    batch = [
        Sequence(torch.arange(3), 1, torch.tensor([1.0, 1.0]), old[:2], success=1 / 8),
        Sequence(torch.arange(3), 1, torch.tensor([2.0, -1.0]), old[2:], success=7 / 8),
    ]
    values = old.clone().requires_grad_()
    counts = Normalizers(tokens=4, sequences=2)
    loss = MicrobatchLoss(token_fields(batch, chosen, CPU), chosen, counts, Steering(prompt_alpha=UNSOLVED))
    total, sums = loss.share(values, None)
    total.backward()
    expected = [-1 * (1 - 1.5) / 4, -1 / 4, -2 * (1 - 0.25) / 4, 1 * (1 + 0.25) / 4]
    torch.testing.assert_close(values.grad, torch.tensor(expected))
    measured = dict(zip(SUMS, sums.tolist(), strict=True))
    assert measured["negative_weight"] == 1, "the first token is rewarded and pushed away"
    assert [measured[f"tokens_solved_{n}"] for n in range(1, 6)] == [2, 0, 0, 0, 2]
    assert [measured[f"actuated_solved_{n}"] for n in range(1, 6)] == [1, 0, 0, 0, 2]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("high_prob_denominator", [False, True])
def test_alphas_of_prompts_do_not_depend_on_packing(mode, high_prob_denominator):
    chosen = settings(aggregation=mode, high_prob_denominator=high_prob_denominator)
    steering = Steering(alpha=0.3, prompt_alpha=UNSOLVED)
    batch = judged(0, 0.5, 1, 0.25)
    whole, parts = logprobs(), logprobs()
    counts = normalizers(count_high_prob(whole.detach(), chosen.tau))
    _, sums = MicrobatchLoss(token_fields(batch, chosen, CPU), chosen, counts, steering).share(whole, None)
    MicrobatchLoss(token_fields(batch, chosen, CPU), chosen, counts, steering).share(whole, None)[0].backward()
    added = torch.zeros(len(SUMS), dtype=torch.float64)
    for members, piece in (([0, 1], parts[:14]), ([2, 3], parts[14:])):
        fields = token_fields([batch[i] for i in members], chosen, CPU)
        share, measured = MicrobatchLoss(fields, chosen, counts, steering).share(piece, None)
        share.backward()
        added += measured
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(added, sums, rtol=1e-6, atol=1e-8)
    if chosen.adds_up_over_tokens:
        cut = logprobs()
        loss = MicrobatchLoss(token_fields(batch, chosen, CPU), chosen, counts, steering)
        for begin, end in itertools.pairwise([0, 5, 21]):
            loss.of_tokens(cut[begin:end], None, slice(begin, end)).backward()
        torch.testing.assert_close(cut.grad, whole.grad, rtol=1e-6, atol=1e-9)


def test_a_weight_limit_keeps_tokens_from_being_pushed_against_their_advantage():
    """With the published denominator the weights are 1 +- alpha N / N_high, here of 21 / 11 at |alpha| = 1."""
    free = settings(True, correction="none", kl={"coefficient": 0.0})
    bounded = replace(free, weight_limit=1.0)
    fields, counts = token_fields(sequences(), free, CPU), normalizers(count_high_prob(logprobs().detach(), free.tau))
    negative = {}
    for name, chosen in (("free", free), ("bounded", bounded)):
        _, sums = MicrobatchLoss(fields, chosen, counts, Steering(alpha=-1.0)).share(logprobs(), None)
        negative[name] = dict(zip(SUMS, sums.tolist(), strict=True))["negative_weight"]
    assert negative["free"] > 0
    assert negative["bounded"] == 0
    small = Steering(alpha=-0.2)
    assert torch.equal(gradient(sequences(), small, free), gradient(sequences(), small, bounded)), "within the limit"


@pytest.mark.parametrize("steering", [Steering(prompt_alpha=UNSOLVED), Steering(focus=Focus(1.0, 0.5))])
def test_a_controller_that_reads_success_refuses_sequences_without(steering):
    assert steering.reads_success
    with pytest.raises(ValueError, match="sequences carry no success"):
        gradient(sequences(), steering, settings())


def test_rescaled_advantages_and_clips_of_a_step_are_those_of_the_loss():
    chosen = settings(correction="none", kl={"coefficient": 0.0})
    scale = Steering(logprob_scale=0.3)
    by_hand, start = [], 0
    for sequence in sequences():
        values = logprobs().detach()[start : start + sequence.response_length]
        start += sequence.response_length
        by_hand.append(replace(sequence, advantages=scale.rescaled(values, sequence.advantages)))
    torch.testing.assert_close(gradient(sequences(), scale, chosen), gradient(by_hand, Steering(), chosen))
    wider = settings(correction="none", kl={"coefficient": 0.0}, clip_high=0.7)
    clipped = gradient(sequences(), Steering(clip_high=0.7), chosen)
    assert torch.equal(clipped, gradient(sequences(), Steering(), wider))
    assert not torch.equal(clipped, gradient(sequences(), Steering(), chosen))


def test_a_bonus_and_a_focus_of_prompts_by_hand():
    chosen = settings(correction="none", kl={"coefficient": 0.0})
    fields = token_fields(judged(0.0, 0.25, 0.5, 1.0), chosen, CPU)
    values, entropies = logprobs(), torch.rand(sum(LENGTHS), requires_grad=True)
    steering = Steering(entropy_coefficient=0.3, bonus_threshold=0.5)
    MicrobatchLoss(fields, chosen, normalizers(0), steering).share(values, entropies)[0].backward()
    expected = torch.tensor([1.0, 0.5, 0.0, 0.0]).repeat_interleave(torch.tensor(LENGTHS)) * -0.3 / sum(LENGTHS)
    torch.testing.assert_close(entropies.grad, expected)
    focused = gradient(judged(0.0, 0.25, 0.5, 1.0), Steering(focus=Focus(1.0, 0.5)), chosen)
    shares = torch.tensor([1.0, 0.75, 0.5, 0.0]).repeat_interleave(torch.tensor(LENGTHS))
    torch.testing.assert_close(focused, shares * gradient(sequences(), Steering(), chosen))


def test_the_threshold_of_a_step_can_be_the_controllers():
    chosen = settings()
    moved = gradient(sequences(), Steering(alpha=-1.0, tau=0.8), chosen)
    assert torch.equal(moved, gradient(sequences(), Steering(alpha=-1.0), replace(chosen, tau=0.8)))
    assert not torch.equal(moved, gradient(sequences(), Steering(alpha=-1.0), chosen))
