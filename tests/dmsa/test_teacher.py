"""Snapshot and moving-average teachers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dmsa.config import Config, TrainConfig
from dmsa.models.segmenter import Segmenter
from dmsa.models.teacher import Teacher
from tests.dmsa.tiny import tiny_config, tiny_encoder


def student_and_teacher(**model) -> tuple[Segmenter, Teacher]:
    torch.manual_seed(0)
    config = Config(model=tiny_config(**model), train=TrainConfig(teacher_start=2, teacher_interval=(2,)))
    student = Segmenter(config.model, 4, tiny_encoder())
    return student, Teacher(student, config)


@torch.no_grad()
def disturb(student: Segmenter) -> dict[str, torch.Tensor]:
    for parameter in student.trainable_parameters().values():
        parameter.add_(torch.randn_like(parameter))
    return student.trainable_state()


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_snapshot_takes_the_student_and_resets_it():
    student, teacher = student_and_teacher()
    initial = student.trainable_state()
    grid, attended = (6, 6), student.encoder.features(torch.randn(1, 3, 48, 48))
    for epoch in (0, 1):
        assert not teacher.start_epoch(epoch)
        assert teacher.epochs_since_snapshot is None
        assert teacher.logits(attended, grid) is None
    trained = disturb(student)
    assert teacher.start_epoch(2)
    assert teacher.active
    assert equal(teacher.model.trainable_state(), trained)
    assert equal(student.trainable_state(), initial)
    later = disturb(student)
    teacher.after_step()
    assert equal(teacher.model.trainable_state(), trained)
    # entering the same epoch again, as after a restart, must not throw the student away
    assert not teacher.start_epoch(2)
    assert not teacher.start_epoch(3)
    assert teacher.epochs_since_snapshot == 1
    assert equal(student.trainable_state(), later)
    assert teacher.start_epoch(4)
    assert teacher.epochs_since_snapshot == 0
    assert equal(teacher.model.trainable_state(), later)
    logits = teacher.logits(attended, grid)
    assert logits.shape == (1, 4, 6, 6)
    assert not logits.requires_grad


def test_ema_follows_the_student():
    student, teacher = student_and_teacher(teacher="ema", ema_momentum=0.75)
    teacher.start_epoch(1)
    teacher.after_step()
    start = disturb(student)
    assert not teacher.start_epoch(2)
    assert equal(student.trainable_state(), start)
    assert equal(teacher.model.trainable_state(), start)
    end = disturb(student)
    teacher.after_step()
    for key, value in teacher.model.trainable_state().items():
        torch.testing.assert_close(value, 0.75 * start[key] + 0.25 * end[key])
    assert not teacher.start_epoch(4)
    assert teacher.epochs_since_snapshot == 2


def test_state_dict_continues():
    student, teacher = student_and_teacher()
    initial = student.trainable_state()
    disturb(student)
    teacher.start_epoch(2)
    disturb(student)
    other_student, other = student_and_teacher()
    disturb(other_student)
    other.load_state_dict(teacher.state_dict())
    assert other.epochs_since_snapshot == 0
    assert equal(other.model.trainable_state(), teacher.model.trainable_state())
    other.start_epoch(4)
    assert equal(other_student.trainable_state(), initial)


def test_bad_switches_are_named():
    student, _ = student_and_teacher()
    config = Config()
    with pytest.raises(ValueError, match=r"config\.model\.teacher='mean'"):
        Teacher(student, replace(config, model=replace(config.model, teacher="mean")))
    with pytest.raises(ValueError, match="ema_momentum=2"):
        Teacher(student, replace(config, model=replace(config.model, ema_momentum=2)))
