"""Answers to the six exercises of TEACHING.md. Try them first."""

import math

import numpy as np
import pytest
import torch

import audio
import weights
from fused import attention
from merge import Merge
from tokenize_audio import steady
from vocab import Vocab

# --- 1. the merge in ten lines ---


def merge(base, speech, instruct, lam, markers):
    """The sum, {name: tensor}, of three such dicts. markers: rows that only instruct has learnt."""
    merged = {}
    for name in base:
        b, s, i = base[name].double(), speech[name].double(), instruct[name].double()
        new = s.clone()
        new[: len(b)] = b + lam * (s[: len(b)] - b) + (i - b)
        if "embed" in name:
            new[markers] = i[markers]
        merged[name] = new.to(speech[name].dtype)
    return merged


def test_exercise_1_the_merge_in_ten_lines_is_the_one_that_was_written(speedrun):
    base, speech, instruct, merged = (
        weights.Tensors(speedrun / name) for name in ("base", "speech", "instruct", "merged")
    )
    special = Vocab(speedrun / "instruct").special
    ours = merge(
        {n: base[n] for n in base},
        {n: speech[n] for n in speech},
        {n: instruct[n] for n in instruct},
        1.15,
        [special["<|im_start|>"], special["<|im_end|>"]],
    )
    assert ours.keys() == set(merged)
    assert all(torch.equal(ours[name], merged[name]) for name in merged)


# --- 2. rounding ---


def lost_in_bf16(size, n=1 << 20):
    """How much of a delta of a relative size is lost where (speech + instruct) - base is
    rounded to bf16 at every step.
    """
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(n, generator=rng).bfloat16()
    speech, instruct = (
        (base.float() + size * torch.randn(n, generator=rng)).bfloat16() for _ in range(2)
    )
    stepwise = (speech + instruct) - base
    exact = speech.double() + instruct.double() - base.double()
    return ((stepwise.double() - exact).norm() / (exact - base.double()).norm()).item()


def test_exercise_2_a_small_delta_is_mostly_lost_where_every_step_is_rounded():
    assert 0.10 < lost_in_bf16(0.02) < 0.20 and 0.40 < lost_in_bf16(0.005) < 0.60


# --- 3. what lam = 0 leaves ---


def test_exercise_3_at_lam_0_the_sum_is_instruct_with_the_speech_models_new_rows(speedrun):
    plan = Merge(*(speedrun / name for name in ("base", "instruct", "speech")))
    for name in plan.names:
        merged, (instruct, speech) = plan.merged(name, 0.0), (
            plan.tensors[which][name] for which in ("instruct", "speech")
        )
        # Every tensor and row that base has.
        assert torch.equal(merged[: len(instruct)], instruct)
        # Units and speech markers.
        assert torch.equal(merged[len(instruct) :], speech[len(instruct) :])


# --- 4. the price of a change ---


def viterbi(distance, price):
    """The textbook's form: every label looks at every label before it, K * K sums a frame.
    distance (T, K).
    """
    T, K = distance.shape
    change = price * (1 - np.eye(K))  # (K from, K to)
    cost, came = distance[0], []
    for t in range(1, T):
        every = cost[:, None] + change  # (K from, K to)
        came.append(every.argmin(0))
        cost = every.min(0) + distance[t]
    path = [int(cost.argmin())]
    for back in reversed(came):
        path.append(int(back[path[-1]]))
    return np.array(path[::-1])


@pytest.mark.parametrize("price", [0.0, 0.5, 2.0, 8.0])
def test_exercise_4_where_all_changes_cost_the_same_a_step_need_not_look_at_all_pairs(price):
    x = torch.randn(60, 3, dtype=torch.float64)
    centroids = torch.randn(7, 3, dtype=torch.float64)
    distance = ((x[:, None] - centroids) ** 2).sum(-1).numpy()  # (T, K)
    (ours,) = steady([x], centroids, price)
    assert np.array_equal(viterbi(distance, price), ours)
    assert price or np.array_equal(ours, distance.argmin(1))


# --- 5. attention without its matrix ---


def attended(q, keys, values, tile=4):
    """softmax(q . keys) values for one query, D wide, with the scores of one tile alive at a
    time.
    """
    m = -math.inf
    l = 0.0
    a = torch.zeros_like(values[0])  # the largest score so far; sums relative to it
    for k, v in zip(keys.split(tile), values.split(tile)):
        score = k @ q / math.sqrt(len(q))  # (tile,)
        larger = max(m, score.max().item())
        p = torch.exp(score - larger)
        old = math.exp(m - larger)  # what was summed before was relative to m
        m, l, a = larger, l * old + p.sum(), a * old + p @ v
    return a / l


def test_exercise_5_a_softmax_can_be_taken_a_tile_at_a_time():
    q, k, v = (torch.randn(1, 2, 10, 8, dtype=torch.float64) for _ in range(3))
    wanted = attention(q, k, v)
    for i in range(10):
        assert torch.allclose(
            attended(q[0, 1, i], k[0, 1, : i + 1], v[0, 1, : i + 1]), wanted[0, 1, i]
        )


# --- 6. how much is thrown away ---


def bits_per_second(units, durations, frame_rate):
    """(entropy of the units, each taken alone, times how many a second has; those of 16 kHz
    samples of 16 bits).
    """
    share = np.bincount(units) / len(units)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    return entropy * len(units) / (durations.sum() / frame_rate), audio.SAMPLE_RATE * 16


def test_exercise_6_units_keep_a_bit_in_some_thousand(speedrun):
    corpus = audio.Units(speedrun / "units")
    kept, given = bits_per_second(
        np.asarray(corpus.units), np.asarray(corpus.durations), corpus.meta["frame_rate"]
    )
    assert given == 256_000
    assert 0 < kept <= math.log2(corpus.meta["k"]) * corpus.meta["frame_rate"]
    assert given / kept > 1000
