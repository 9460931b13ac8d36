"""Two measured KL divergences of a layer, and the law through them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuckerize.calibration.layer_profile import two_orders

quick = settings(derandomize=True, max_examples=60, deadline=None, database=None)
values = st.floats(0, 10)


@quick
@given(second=values, first=values, large=st.floats(0.01, 2), part=st.floats(0.1, 0.9))
def test_law_of_two_orders_is_found(second: float, first: float, large: float, part: float) -> None:
    points = [(e, second * e**2 + first * e) for e in (large, part * large)]
    assert two_orders(points[0], points[1]) == pytest.approx((second, first), rel=1e-6, abs=1e-6)


@quick
@given(large=values, small=values)
def test_law_is_never_negative_and_right_for_the_large_error(large: float, small: float) -> None:
    second, first = two_orders((0.2, large), (0.05, small))
    assert min(second, first) >= 0
    assert second * 0.2**2 + first * 0.2 == pytest.approx(large)
