import tracemalloc

import numpy as np
import pytest
import torch

from dmsa.scoring.metrics import Histogram, scores, things_of


def by_hand(pred, label, k):
    counts = np.zeros((k, k), dtype=np.int64)
    for p, t in zip(pred.ravel().tolist(), label.ravel().tolist(), strict=True):
        if t != 255:
            counts[t, p] += 1
    return counts


def random_masks(k, shape=(7, 9), seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, k, shape, dtype=np.uint8)
    label[rng.random(shape) < 0.2] = 255
    return rng.integers(0, k, shape, dtype=np.uint8), label


@pytest.mark.parametrize("k", [1, 2, 27, 81, 254])
def test_counts_equal_a_loop(k):
    histogram = Histogram(k)
    want = np.zeros((k, k), dtype=np.int64)
    for seed in range(3):
        pred, label = random_masks(k, seed=seed)
        histogram.update(pred, label)
        want += by_hand(pred, label, k)
    np.testing.assert_array_equal(histogram.counts, want)
    assert histogram.counts.dtype == np.int64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_tensors_and_arrays_of_any_integer_type(dtype):
    pred, label = random_masks(5)
    histogram = Histogram(5)
    histogram.update(torch.from_numpy(pred).to(dtype), torch.from_numpy(label).to(dtype))
    np.testing.assert_array_equal(histogram.counts, by_hand(pred, label, 5))


def test_order_and_batch_do_not_matter():
    masks = [random_masks(6, seed=s) for s in range(6)]
    one, other = Histogram(6), Histogram(6)
    for pred, label in masks:
        one.update(pred, label)
    for i in (4, 0, 2):
        other.update(*(np.stack([masks[i][j], masks[i + 1][j]]) for j in (0, 1)))
    np.testing.assert_array_equal(one.counts, other.counts)


def test_strided_views_are_counted_right():
    pred, label = random_masks(4, (12, 10))
    histogram = Histogram(4)
    histogram.update(pred[::2, ::-1], label[::2, ::-1])
    np.testing.assert_array_equal(histogram.counts, by_hand(pred[::2], label[::2], 4))


@pytest.mark.parametrize(
    ("pred", "label", "message"),
    [
        ([[3]], [[0]], r"pred has ids \[3\]; expected 0\.\.2"),
        ([[255]], [[0]], r"pred has ids \[255\]"),
        ([[-1]], [[0]], r"pred has ids -1\.\.-1; expected 0\.\.255"),
        ([[0]], [[3]], r"label has ids \[3\]; expected 0\.\.2, or 255"),
        ([[0]], [[254]], r"label has ids \[254\]"),
        ([[0, 0]], [[0]], r"pred\.shape=\(1, 2\) label\.shape=\(1, 1\)"),
    ],
)
def test_bad_ids_are_named_and_nothing_is_counted(pred, label, message):
    histogram = Histogram(3)
    with pytest.raises(ValueError, match=message):
        histogram.update(np.array(pred), np.array(label))
    assert not histogram.counts.any()


def test_int8_labels_of_minus_one_are_not_taken_for_ignore():
    with pytest.raises(ValueError, match="label has ids -1"):
        Histogram(3).update(np.zeros((1, 1), dtype=np.uint8), np.full((1, 1), 255, dtype=np.uint8).view(np.int8))


def test_bad_types_and_sizes():
    with pytest.raises(TypeError, match=r"pred\.dtype=float32"):
        Histogram(3).update(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64))
    for k in (0, 255):
        with pytest.raises(ValueError, match=f"num_classes={k}"):
            Histogram(k)
    with pytest.raises(ValueError, match=r"hist\.shape=\(2, 3\)"):
        scores(np.zeros((2, 3), dtype=np.int64))
    with pytest.raises(ValueError, match=r"hist\.dtype=dtype\(.float64"):
        scores(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="for 2 classes"):
        scores(np.eye(2, dtype=np.int64), things=np.ones(3, dtype=bool))


def test_predictions_may_be_255_where_the_label_is():
    histogram = Histogram(2)
    histogram.update(np.array([[255, 1]], dtype=np.uint8), np.array([[255, 0]], dtype=np.uint8))
    assert histogram.counts.tolist() == [[0, 1], [0, 0]]


def test_scores_by_hand():
    # Clusters 1, 2, 0 are classes 0, 1, 2.
    hist = np.array([[1, 8, 1], [0, 2, 6], [4, 0, 0]])
    s = scores(hist, things=np.array([False, True, True]))
    assert s.assignment.tolist() == [1, 2, 0]
    np.testing.assert_allclose(s.iou, [8 / 12, 6 / 9, 4 / 5])
    assert s.miou == pytest.approx((8 / 12 + 6 / 9 + 4 / 5) / 3)
    assert s.accuracy == pytest.approx(18 / 22)
    assert s.things == pytest.approx((6 / 9 + 4 / 5) / 2)
    assert s.stuff == pytest.approx(8 / 12)
    assert s.confusion.tolist() == [[8, 1, 1], [2, 6, 0], [0, 0, 4]]
    plain = scores(hist, match=False)
    assert plain.assignment.tolist() == [0, 1, 2]
    assert plain.accuracy == pytest.approx(3 / 22)
    assert np.isnan(plain.things)


def test_iou_is_in_the_order_of_the_classes_whatever_the_clusters_are_called():
    rng = np.random.default_rng(0)
    hist = np.diag(rng.integers(50, 100, 9)) + rng.integers(0, 5, (9, 9))
    want = scores(hist)
    assert want.assignment.tolist() == list(range(9))
    renamed = rng.permutation(9)
    s = scores(hist[:, renamed])
    np.testing.assert_array_equal(s.iou, want.iou)
    np.testing.assert_array_equal(renamed[s.assignment], np.arange(9))


def test_a_class_that_is_nowhere_is_left_out_and_one_that_is_only_predicted_counts_zero():
    hist = np.array([[5, 0, 0], [0, 3, 2], [0, 0, 0]])
    s = scores(hist, match=False)
    np.testing.assert_allclose(s.iou, [1, 3 / 5, 0])
    hist[1, 2] = 0
    s = scores(hist, match=False)
    assert np.isnan(s.iou[2])
    assert s.miou == 1
    nothing = scores(np.zeros((2, 2), dtype=np.int64))
    assert np.isnan(nothing.miou)
    assert np.isnan(nothing.accuracy)


def test_the_match_is_one_to_one_and_the_best():
    from itertools import permutations

    rng = np.random.default_rng(1)
    for _ in range(20):
        hist = rng.integers(0, 30, (5, 5))
        s = scores(hist)
        assert sorted(s.assignment.tolist()) == list(range(5))
        best = max(sum(hist[i, p[i]] for i in range(5)) for p in permutations(range(5)))
        assert np.trace(s.confusion) == best


def test_counts_beyond_32_bits_and_float_precision_stay_exact():
    histogram = Histogram(2)
    histogram.counts[0, 0] = 2**60
    histogram.update(np.zeros((1, 1), dtype=np.uint8), np.zeros((1, 1), dtype=np.uint8))
    assert histogram.reduce().counts[0, 0] == 2**60 + 1


def test_memory_does_not_grow():
    histogram = Histogram(81)
    pred, label = random_masks(81, (320, 320))
    histogram.update(pred, label)
    tracemalloc.start()
    histogram.update(pred, label)
    once = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    for _ in range(50):
        histogram.update(pred, label)
    assert tracemalloc.get_traced_memory()[1] <= once + 10_000
    tracemalloc.stop()


def test_things_of_both_kinds_of_data_sets():
    class Data:
        num_classes, n_things, things_only = 4, 3, True

    assert things_of(Data).tolist() == [False, True, True, True]
    Data.things_only, Data.n_things = False, 1
    assert things_of(Data).tolist() == [True, False, False, False]


def test_pixels_without_a_prediction_are_counted_apart_or_as_misses():
    pred = np.array([[0, 0, 255, 255], [1, 1, 1, 255]], dtype=np.uint8)
    label = np.array([[0, 0, 0, 255], [1, 1, 0, 1]], dtype=np.uint8)
    with pytest.raises(ValueError, match=r"pred has ids \[255\]"):
        Histogram(2).update(pred, label)
    histogram = Histogram(2, gaps=True)
    histogram.update(pred, label)
    assert histogram.counts.tolist() == [[2, 1], [0, 2]]
    assert (histogram.unpredicted.tolist(), histogram.ignored.tolist()) == ([1, 1], [1])
    whole = histogram.reduce()
    assert (whole.counts.tolist(), whole.unpredicted.tolist()) == ([[2, 1], [0, 2]], [1, 1])
    left_out, misses = scores(whole.counts), scores(whole.counts, unpredicted=whole.unpredicted)
    assert (left_out.accuracy, misses.accuracy) == (4 / 5, 4 / 7)
    assert left_out.iou.tolist() == [2 / 3, 2 / 3]
    assert misses.iou.tolist() == [2 / 4, 2 / 4]  # TP 2, FN 1 + 1; TP 2, FP 1, FN 1
    with pytest.raises(ValueError, match=r"label has ids \[7\]"):
        histogram.update(np.array([255], dtype=np.uint8), np.array([7], dtype=np.uint8))
    with pytest.raises(ValueError, match=r"pred has ids \[9\]"):
        histogram.update(np.array([9], dtype=np.uint8), np.array([1], dtype=np.uint8))
    assert histogram.counts.sum() == 5
