"""Figures: the same bytes each time, colours that stay apart for the colour-blind, nothing of the user's settings."""

import itertools

import numpy
import pytest

from motkit import figures
from motkit.errors import UserError


def draw():
    with figures.house_style():
        figure, axes = figures.new_figure(1, 2)
        for arm in figures.ARM_NAMES:
            style = figures.arm_style(arm)
            figures.plot_band(axes[0, 0], [0, 1, 2], [1, 2, 4], [0.1, 0.2, 0.1], style, figures.ARM_NAMES[arm])
        axes[0, 0].legend()
        axes[0, 1].scatter([1, 2], [3, 4], clip_on=True)
    return figure


def test_the_same_figure_gives_the_same_bytes_whatever_the_users_settings(tmp_path):
    import matplotlib

    first = figures.save(draw(), tmp_path / "a", "figure")
    with matplotlib.rc_context({"font.size": 30, "savefig.dpi": 30, "svg.hashsalt": None}):
        second = figures.save(draw(), tmp_path / "b", "figure")
    assert [path.name for path in first] == ["figure.png", "figure.svg"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert first[0].read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["figure.png", "figure.svg"]


def test_two_svgs_on_one_page_share_no_clip_path_id():
    import re

    ids = [set(re.findall(r'clipPath id="([^"]+)"', figures.to_svg(draw(), stem))) for stem in ("one", "two")]
    assert ids[0]
    assert not ids[0] & ids[1]


# Viénot, Brettel and Mollon (1999): what a dichromat sees, in linear RGB.
_DICHROMATS = {
    "protan": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deutan": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


def _lab(linear):
    xyz = numpy.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    scaled = numpy.maximum(xyz / numpy.array([0.9505, 1.0, 1.089]), 0)
    f = numpy.where(scaled > 0.008856, numpy.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return numpy.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eyes", _DICHROMATS)
def test_arms_stay_apart_for_the_colour_blind(eyes):
    seen = {}
    for arm in figures.ARM_NAMES:
        rgb = numpy.array([int(figures.arm_style(arm).colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        linear = numpy.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen[arm] = _lab(numpy.clip(numpy.array(_DICHROMATS[eyes]) @ linear, 0, 1))
    for one, other in itertools.combinations(seen, 2):
        # A difference of 10 in CIELAB is seen at a glance.
        assert numpy.linalg.norm(seen[one] - seen[other]) > 10, (one, other)
    lines = {(figures.arm_style(arm).marker, figures.arm_style(arm).line) for arm in figures.ARM_NAMES}
    assert len(lines) == len(figures.ARM_NAMES)


def test_further_series_have_a_style_each_and_arms_keep_theirs():
    names = [f"teacher-{number}" for number in range(16)]
    styles = figures.series_styles(["mot", *names])
    assert styles["mot"] == figures.arm_style("mot")
    assert len({(style.colour, style.marker) for style in styles.values()}) == 17


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        figures.save(draw(), tmp_path / "file", "figure")
