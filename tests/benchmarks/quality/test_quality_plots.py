"""Labels of the frontier where points lie close together."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from benchmarks.quality.report.plots import LABELS_AT, _axes, _spread_labels

CLOSE = [(0.5, 0.5), (0.51, 0.5), (0.5, 0.52), (0.53, 0.51), (0.0, 0.0), (1.0, 1.0), (0.03, 0.3), (0.7, 0.98)]


def labelled(points: list[tuple[float, float]]):
    """An axes with a number at each point, placed but not spread."""
    axes = _axes(1, 1)[1]
    axis = axes[0][0]
    axis.plot(*zip(*points, strict=True), "o", ms=4)
    axis.set(xlim=(0, 1), ylim=(0, 1))
    for number, point in enumerate(points):
        axis.annotate(f"0.{number}", point, LABELS_AT["PDL"], textcoords="offset points", fontsize=7)
    return axis


def boxes_of(axis):
    renderer = axis.figure.canvas.get_renderer()
    return [label.get_window_extent(renderer) for label in axis.texts if label.get_visible()]


def test_labels_keep_clear_of_each_other_of_points_and_of_the_edge():
    axis = labelled(CLOSE)
    assert any(box.count_overlaps(boxes_of(axis)) > 1 for box in boxes_of(axis)), "else there is nothing to spread"
    _spread_labels(axis)
    boxes = boxes_of(axis)
    assert len(boxes) == len(CLOSE), "there is room for all"
    inside = axis.get_window_extent(axis.figure.canvas.get_renderer())
    for box in boxes:
        assert box.count_overlaps(boxes) == 1, "itself"
        assert inside.contains(*box.min)
        assert inside.contains(*box.max)
        assert not any(box.contains(*axis.transData.transform(point)) for point in CLOSE)


def test_a_label_without_room_is_left_out():
    axis = labelled([(0.5, 0.5)] * 40)
    _spread_labels(axis)
    boxes = boxes_of(axis)
    assert 1 <= len(boxes) < 40
    assert all(box.count_overlaps(boxes) == 1 for box in boxes)


def test_labels_keep_clear_of_points_that_have_none():
    axis = labelled([(0.5, 0.5)])
    _spread_labels(axis)
    (before,) = boxes_of(axis)
    unlabelled = axis.transData.inverted().transform((before.min + before.max) / 2)
    axis.plot(*unlabelled, "-")  # the end of a line is no point
    _spread_labels(axis)
    assert boxes_of(axis)[0].bounds == before.bounds
    axis.plot(*unlabelled, "D")
    _spread_labels(axis)
    (box,) = boxes_of(axis)
    assert not box.contains(*axis.transData.transform(unlabelled))


def test_labels_with_room_stay():
    axis = labelled([(0.2, 0.2), (0.8, 0.8)])
    _spread_labels(axis)
    assert [label.xyann for label in axis.texts] == [LABELS_AT["PDL"]] * 2
    for box, label in zip(boxes_of(axis), axis.texts, strict=True):
        x, y = axis.transData.transform(label.xy)
        assert box.x1 < x, "its text ends left of the point"
        assert box.y0 > y
