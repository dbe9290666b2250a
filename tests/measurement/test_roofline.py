import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.measurement import Ceilings
from fxopt.measurement.counting import Work
from fxopt.measurement.roofline import roofline

LIMITS = Ceilings("cpu", {"float32": 100.0, "int8": 400.0}, 10.0)


def work(path, flops, count, dtype="float32"):
    return Work("node", path, flops, dtype, count)


def test_a_layer_takes_the_longer_of_its_arithmetic_and_its_traffic():
    product, norm = roofline(
        [work("a", 1000, 50), work("b", 0, 30)], {"a": "Linear", "b": "LayerNorm"}, LIMITS
    )
    assert (product.seconds, product.limit, product.intensity) == (10.0, "compute", 20.0)
    assert (norm.seconds, norm.limit, norm.intensity) == (3.0, "memory", 0.0)
    assert (product.kind, norm.kind) == ("Linear", "LayerNorm")
    assert product.share == pytest.approx(10 / 13)


def test_each_dtype_has_its_own_ceiling_and_an_unknown_one_float32_s():
    points = roofline(
        [work("a", 1000, 0, "int8"), work("b", 1000, 0, "float16"), work("c", 0, 0)], {}, LIMITS
    )
    assert [(point.path, point.seconds) for point in points] == [("a", 2.5), ("b", 10.0)]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 10**6), st.integers(1, 10**6)), min_size=1
    )
)
def test_shares_add_up_and_no_layer_beats_either_ceiling(items):
    points = roofline([work(*item) for item in items], {}, LIMITS)
    assert sum(point.share for point in points) == pytest.approx(1.0)
    assert [point.path for point in points] == list(dict.fromkeys(item[0] for item in items))
    for point in points:
        assert point.seconds >= point.bytes / LIMITS.bandwidth * (1 - 1e-12)
        assert point.seconds >= point.flops / LIMITS.flops["float32"] * (1 - 1e-12)
        assert point.intensity == point.flops / point.bytes
    assert sum(point.flops for point in points) == sum(item[1] for item in items)
