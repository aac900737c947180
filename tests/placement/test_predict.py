"""What a route is said to reach, and what measurements do to plans."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node.links.frames import Stage
from node.placement.ground import MAX_DISTURBANCE, Ground
from node.placement.plan import plan
from node.placement.predict import predicted_tokens_per_s
from node.placement.view import View
from tests.placement.pods import (
    AUTHOR,
    GIB,
    first_plan,
    id_of,
    make_model,
    make_node,
    make_speed,
    make_view,
    ranges,
)

MODEL = id_of("m")


def stage(name: str, start: int, end: int) -> Stage:
    return Stage(id_of(name), f"{name}.test:7000", start, end)


def measured_view(**layer_us: int) -> View:
    nodes = [
        make_node(name, rtt_us=0, speeds={"m": make_speed(us, 10 * us)}) for name, us in layer_us.items()
    ]
    return make_view(nodes, make_model())


def test_a_route_takes_layers_head_and_the_way_round() -> None:
    view = measured_view(a=100, b=300)
    whole = [stage("a", 0, 30)]
    # 30 layers and a head of 10.
    assert predicted_tokens_per_s(view, MODEL, whole) == pytest.approx(1e6 / 4000)
    assert predicted_tokens_per_s(view, MODEL, whole, num_streams=4) == pytest.approx(1e6 / (4000 * 1.3))
    halves = [stage("a", 0, 15), stage("b", 15, 30)]
    # Two hops of 50 us at least: to b, and with the token back to a.
    assert predicted_tokens_per_s(view, MODEL, halves) == pytest.approx(1e6 / (1500 + 4500 + 3000 + 100))
    far = replace(view, links_us={(id_of("a"), id_of("b")): 5000})
    assert predicted_tokens_per_s(far, MODEL, halves) == pytest.approx(1e6 / (9000 + 5000 + 50))


def test_what_was_not_measured_is_not_predicted() -> None:
    view = measured_view(a=100)
    assert predicted_tokens_per_s(view, MODEL, [stage("a", 0, 15), stage("b", 15, 30)]) is None
    assert predicted_tokens_per_s(view, id_of("other"), [stage("a", 0, 30)]) is None
    assert predicted_tokens_per_s(view, MODEL, []) is None


def test_a_split_is_not_made_where_the_measured_way_eats_what_it_wins() -> None:
    """Read from memory the big node needs 9 s for what both fast ones need 0.3 s for: worth 200 ms of hops.

    Measured, a layer takes a hundredth of the time everywhere, and the hops are what counts.
    """
    nodes = [
        make_node("big", 8, 0.33, rtt_us=200_000),
        make_node("f1", 2.2, 10, rtt_us=200_000),
        make_node("f2", 2.2, 10, rtt_us=200_000),
    ]
    view = make_view(nodes, make_model())
    made = first_plan(view)
    assert set(ranges(view, made)) == {"f1", "f2"}
    # A layer of 100 MiB from memory takes 9.8 ms on the fast nodes and 296 ms on the big one.
    quick = {"big": 2960, "f1": 98, "f2": 98}
    measured = replace(
        view, nodes=tuple(replace(n, speeds=((MODEL, make_speed(quick[n.name])),)) for n in view.nodes)
    )
    assert ranges(measured, plan(measured, made, AUTHOR)) == {"big": (0, 30)}


def test_a_disturbed_measurement_moves_nothing() -> None:
    view = make_view([make_node(name) for name in "abc"], make_model(split=3))
    made = first_plan(view)

    def with_layer_us(**layer_us: int) -> View:
        return replace(
            view, nodes=tuple(replace(n, speeds=((MODEL, make_speed(layer_us[n.name])),)) for n in view.nodes)
        )

    assert plan(with_layer_us(a=20_000, b=20_000, c=19_000 * MAX_DISTURBANCE), made, AUTHOR) is None
    moved = plan(with_layer_us(a=20_000, b=20_000, c=20_000 * MAX_DISTURBANCE * 2), made, AUTHOR)
    start, end = ranges(view, moved)["c"]
    assert end - start < 5


def test_who_never_held_the_model_is_reckoned_like_who_did() -> None:
    """Twice as fast to read memory, it stays twice as fast: no more is known of it."""
    nodes = [make_node("a", 8, 10, speeds={"m": make_speed(40_000)}), make_node("b", 8, 20)]
    seats = Ground.of(make_view(nodes, make_model()), None).seats(MODEL)
    # 100 MiB in 40 ms.
    assert seats[0].bytes_per_second == pytest.approx(100 / 1024 / 0.04 * GIB, rel=1e-4)
    assert seats[1].bytes_per_second == pytest.approx(2 * seats[0].bytes_per_second, rel=1e-4)
