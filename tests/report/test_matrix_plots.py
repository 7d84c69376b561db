import re
from xml.etree import ElementTree

from medrl.report.matrix_plots import forest, heat_map


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text") if not len(element)]


def test_every_cell_says_its_value_and_interval():
    svg = heat_map(
        ["CT", "MRI"], ["CT"], [[0.5], [None]], [[0.4], [None]], [[0.61], [None]], label="x", marked=[(0, 0)]
    )
    assert texts(svg) == ["50.0", "40 to 61", "–"]
    assert svg.count('class="frame"') == 1


def test_a_cell_is_as_full_as_its_share_and_differences_are_scaled_to_the_largest():
    shares = heat_map(["a"], ["b", "c"], [[0.0, 1.0]], [[0, 1]], [[0, 1]], label="x")
    assert re.findall(r'fill-opacity="([\d.]+)"', shares) == ["0.0", "0.6"]
    signed = heat_map(["a"], ["b", "c"], [[-0.05, 0.1]], [[-0.1, 0]], [[0, 0.2]], label="x", signed=True)
    assert re.findall(r'class="cell (\w+)".*?fill-opacity="([\d.]+)"', signed) == [("down", "0.3"), ("up", "0.6")]
    assert texts(signed) == ["−5.0", "−10 to 0", "+10.0", "0 to +20"]


def test_no_difference_at_all_is_drawn_too():
    assert ">0.0<" in heat_map(["a"], ["b"], [[0.0]], [[0.0]], [[0.0]], label="x", signed=True)
    assert forest([("a − b", "s0", 0.0, 0.0, 0.0)], label="x")
    assert forest([], label="nothing")


def test_a_forest_puts_zero_in_the_middle_and_the_widest_interval_inside():
    svg = forest([("a − b", "s0", 0.1, -0.1, 0.3), ("c − d", "s1", -0.05, -0.1, 0.0)], label="x")
    assert 'class="zero" x1="50.0%"' in svg
    ends = [float(x) for x in re.findall(r'x[12]="([\d.]+)%" (?:x2|y1)', svg)]
    assert min(ends) >= 0 and max(ends) <= 100
    assert re.findall(r'cx="([\d.]+)%"', svg) == ["66.0", "42.0"]


def test_a_name_without_room_stands_on_several_lines_and_is_cut_after_the_third():
    name = "Other Biological Attributes of a Picture"
    svg = heat_map([name], ["Anatomy Identification"], [[0.5]], [[0.4]], [[0.6]], label="x")
    spans = [element.text for element in ElementTree.fromstring(svg).iter("tspan")]
    assert spans == ["Anatomy", "Identification", "Other", "Biological", "Attributes of…"]
    assert svg.count(f"<title>{name}</title>") == 1


def test_hostile_names_are_text_and_long_ones_are_cut_but_kept_in_the_title():
    name = "<script>alert(1)</script>\u202e" + "x" * 80
    for svg in (
        heat_map([name], [name], [[0.5]], [[0.4]], [[0.6]], label=name),
        forest([(name, "s0", 0.1, 0.0, 0.2)], label=name),
    ):
        ElementTree.fromstring(svg)
        assert "<script" not in svg and "\u202e" not in svg and "…" in svg
        assert "x" * 80 in svg


def test_means_stand_apart_from_the_cells():
    cells = [[0.5, 0.5], [0.5, 0.5]]
    together = heat_map(["CT", "mean"], ["CT", "mean"], cells, cells, cells, label="x")
    apart = heat_map(["CT", "mean"], ["CT", "mean"], cells, cells, cells, label="x", apart=(1, 1))
    places = [re.findall(r'class="cell[^>]* x="([\d.]+)" y="([\d.]+)"', svg) for svg in (together, apart)]
    moved = [(float(x) - float(a), float(y) - float(b)) for (a, b), (x, y) in zip(*places, strict=True)]
    assert moved == [(0, 0), (8, 0), (0, 8), (8, 8)]
