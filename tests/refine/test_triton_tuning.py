"""Launch configurations and chunk plans: pure functions, no Triton."""

from __future__ import annotations

import pytest

from dmsa_kernels import tuning


def test_lists_are_short_and_keep_their_default():
    for kernel, candidates in tuning._CONFIGS.items():
        assert len(set(candidates)) == len(candidates) <= tuning.MAX_CONFIGS
        for neighbours in (8, 48, 64, 200):
            assert tuning.configs(kernel, neighbours=neighbours)[0] == candidates[0]
    with pytest.raises(ValueError, match="no configurations"):
        tuning.configs("nothing", neighbours=8)


def test_long_lists_lose_the_tiles_that_would_spill():
    few = tuning.configs("propagate_fwd", neighbours=8)
    many = tuning.configs("propagate_fwd", neighbours=64)
    assert set(many) < set(few)
    assert set(tuning.configs("propagate_fwd", neighbours=48, width=8)) < set(
        tuning.configs("propagate_fwd", neighbours=48)
    )


def test_measured_configuration_is_kept_for_its_bucket_alone(monkeypatch):
    monkeypatch.setattr(tuning, "_CHOSEN", {})
    wanted = tuning.configs("propagate_fwd", neighbours=16)[-1]
    cost = {wanted: 1.0}
    key = (16, tuning.bucket(1000))
    assert tuning.tune("propagate_fwd", key, lambda c: cost.get(c, 2.0), neighbours=16) == wanted
    assert tuning.select("propagate_fwd", (16, tuning.bucket(900))) == wanted
    assert tuning.select("propagate_fwd", (16, tuning.bucket(2000))) != wanted
    # the second call measures nothing
    assert tuning.tune("propagate_fwd", key, lambda c: pytest.fail("measured again"), neighbours=16) == wanted


def test_a_measurement_that_fails_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(tuning, "_CHOSEN", {})
    default = tuning.select("propagate_fwd", "key")

    def measure(config):
        tuning.remember("propagate_fwd", "key", config)
        if config != default:
            raise RuntimeError("out of resources")
        return 1.0

    with pytest.raises(RuntimeError, match="out of resources"):
        tuning.tune("propagate_fwd", "key", measure, neighbours=16)
    assert tuning.select("propagate_fwd", "key") == default


@pytest.mark.parametrize(
    ("channels", "itemsize", "width"),
    [(1, 4, 1), (2, 4, 2), (3, 4, 1), (4, 4, 4), (6, 4, 2), (21, 4, 4), (81, 4, 4), (21, 2, 8), (2, 2, 2)],
)
def test_planes_waste_little(channels, itemsize, width):
    assert tuning.plane_width(channels, itemsize) == width


def chunk(batch, channels, height, width, neighbours):
    side = tuning.plane_width(channels, 4)
    pixels = height * width
    groups = -(-channels // side)
    plan = tuning.plan_chunks(batch, groups, 4 * side * pixels, 4 * neighbours * pixels, pixels * neighbours * side)
    return plan, groups


def test_small_work_is_one_chunk():
    plan, groups = chunk(1, 3, 256, 256, 48)
    assert plan == (1, groups)


@pytest.mark.parametrize(("channels", "height", "width", "neighbours"), [(1281, 512, 683, 16), (6, 6000, 6000, 24)])
def test_buffers_hold_at_most_one_copy_of_large_masks(channels, height, width, neighbours):
    (images, count), groups = chunk(1, channels, height, width, neighbours)
    assert 2 * images * count <= groups + 1


@pytest.mark.parametrize("batch", [1, 2, 32])
@pytest.mark.parametrize("channels", [1, 21, 150])
def test_chunks_are_never_empty(batch, channels):
    (images, count), groups = chunk(batch, channels, 160, 160, 48)
    assert 1 <= images <= batch
    assert 1 <= count <= groups


def test_empty_work_has_a_plan():
    assert tuning.plan_chunks(0, 3, 16, 16, 16) == (1, 1)


SIX = (1, 2, 4, 8, 12, 24)


def step(dilations, count, groups, height, width, side=4):
    return tuning.plan_step("propagate_fwd", None, dilations, side, count, groups, height, width)


def test_taps_that_meet_are_counted_once():
    # one pixel: nine places of the 3 x 3 window without its centre
    assert tuning.distinct_taps((1,), 1, 1) == 8
    # a row of four: its own pixels but the ends, two beside it, and the rows above and below with their ends
    assert tuning.distinct_taps((1,), 1, 4) == (6 + 6 + 6) / 4
    for stride in (1, 2, 8):
        brute = {
            (y * stride + dy * d, x + dx * d)
            for y in range(8)
            for x in range(32)
            for d in SIX
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if dy or dx
        }
        assert tuning.distinct_taps(SIX, 8, 32, stride) == len(brute) / 256


def test_rows_lie_a_dilation_apart_where_taps_then_meet():
    assert step((8, 16), 1, 38, 512, 683).row_stride == 8
    assert step(SIX, 16, 6, 160, 160).row_stride == 2
    assert step((1, 2, 4), 1, 2, 512, 512).row_stride == 1
    assert step((3,), 1, 2, 512, 512).row_stride == 3


def test_the_last_tiles_of_a_column_lie_closer():
    """Five tiles of 32 rows dealt in blocks of four: the last is alone, its rows one below the other."""
    config = tuning.Config(32, 32, 32)
    met = tuning._mean_distinct_taps((8, 16), config, 4, 160)
    four, one = (tuning.distinct_taps((8, 16), 32, 32, stride) for stride in (4, 1))
    assert met == (4 * four + one) / 5
    assert tuning._mean_distinct_taps((8, 16), config, 8, 64) == tuning.distinct_taps((8, 16), 32, 32, 2)


def test_the_tile_fits_the_registers():
    assert step((8, 16), 1, 38, 512, 683).config.num_warps >= 8
    assert step(SIX, 16, 6, 160, 160).config == tuning.Config(16, 32, 16)
    # 64 weights leave room for 16 warps, and beside eight channels for 8
    long = (1, 2, 4, 8, 12, 24, 32, 64)
    assert step(long, 1, 4, 1024, 1024).config.num_warps == 16
    assert step(long, 1, 2, 1024, 1024, side=8).config.num_warps == 8
    few = tuning.plan_step("propagate_fwd", None, long, 4, 1, 4, 1024, 1024, most_warps=8)
    assert few.config.num_warps == 8


def test_groups_are_shared_only_where_the_device_would_idle():
    assert step(SIX, 1, 6, 32, 32).groups_each < 6
    assert step(SIX, 32, 6, 160, 160).groups_each == 6


def test_a_measured_tile_is_taken(monkeypatch):
    monkeypatch.setattr(tuning, "_CHOSEN", {})
    tuning.remember("propagate_fwd", "key", tuning.Config(16, 16, 8))
    chosen = tuning.plan_step("propagate_fwd", "key", SIX, 4, 1, 6, 160, 160)
    assert chosen.config == tuning.Config(16, 16, 8)


@pytest.mark.parametrize(("channels", "height", "width", "neighbours"), [(150, 512, 683, 16), (171, 480, 640, 16)])
def test_chunks_are_even(channels, height, width, neighbours):
    (images, count), groups = chunk(1, channels, height, width, neighbours)
    assert images == 1
    parts = -(-groups // count)
    assert groups - (parts - 1) * count > count - parts


def together(count, groups, height, width, *, programs=132, dilations=SIX, side=1, num_iter=10):
    return tuning.plan_resident(programs, dilations, side, count, groups, height, width, num_iter)


def test_maps_whose_tiles_run_at_the_same_time_are_launched_once():
    plan = together(1, 3, 256, 256)
    assert (plan.config, plan.groups_each, plan.teams) == (tuning.Config(16, 32, 16), 3, 1)
    assert "128 tiles and 108 programs" in together(1, 3, 256, 256, programs=108)
    assert together(1, 3, 224, 224, programs=108).teams == 1
    assert isinstance(together(1, 3, 1024, 1024), str)
    assert isinstance(together(1, 1, 1, 1), tuning.Resident)


@pytest.mark.parametrize("programs", [1, 16, 82, 108, 132])
@pytest.mark.parametrize(("count", "groups", "height", "width"), [(1, 3, 224, 224), (5, 6, 81, 81), (2, 1, 9, 200)])
def test_a_launch_never_has_more_programs_than_run_at_the_same_time(programs, count, groups, height, width):
    plan = together(count, groups, height, width, programs=programs)
    if isinstance(plan, str):
        return
    tiles = -(-height // plan.config.block_h) * -(-width // plan.config.block_w)
    assert 1 <= plan.teams * tiles <= programs
    assert plan.teams <= count * -(-groups // plan.groups_each)


def test_multiprocessors_that_idle_speak_against_one_launch():
    assert "of the work" in together(32, 6, 160, 160, side=4)
    assert "of the work" in together(16, 6, 81, 81, side=4)
