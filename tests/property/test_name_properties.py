"""Names of factored tensors: formatting and parsing are inverse, everything else is refused."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tuckerize.domain import GATE_UP, Coupling, Mode, Projection
from tuckerize.names import CorePart, TensorKind, TensorName

indices = st.integers(0, 10**6)
modules = st.text(min_size=1) | st.sampled_from(
    ["model.layers.3.mlp.experts", "group_1.gate_proj.core", "experts.group_2"]
)


@st.composite
def names(draw: st.DrawFn) -> TensorName:
    """Any name, relative to the group, the layer or the checkpoint."""
    projection = draw(st.sampled_from(Projection))
    coupling: Coupling | None = draw(st.sampled_from([None, GATE_UP, (projection,)]))
    core = st.builds(TensorName.core, st.just(projection), st.none() | indices)
    name = draw(
        core
        | st.builds(replace, core, part=st.sampled_from(CorePart))
        | st.builds(
            TensorName.factor, st.sampled_from(Mode), st.just(projection), st.just(coupling)
        )
    )
    if draw(st.booleans()):
        return name
    return name.within(draw(indices), draw(st.none() | modules))


@given(names())
def test_parsing_is_the_inverse_of_formatting(name: TensorName) -> None:
    assert TensorName.parse(str(name)) == name
    assert TensorName.parse(str(name.within_group)) == name.within_group
    assert str(name).endswith(str(name.within_group))


words = st.sampled_from(
    [
        "group_0",
        "group_01",
        "experts",
        "gate_proj",
        "gate_up_proj",
        *TensorKind,
        *CorePart,
        "0",
        "07",
        "",
        "x",
    ]
)


@given(st.lists(words, max_size=6).map(".".join) | st.text())
def test_what_is_parsed_is_formatted_as_the_same_text(text: str) -> None:
    name = TensorName.find(text)
    assert name is None or str(name) == text


@given(names(), st.characters(exclude_characters="0123456789"))
def test_name_with_anything_after_it_is_refused(name: TensorName, more: str) -> None:
    assert TensorName.find(str(name) + more) is None
    assert TensorName.find(f"{name}.bias") is None
