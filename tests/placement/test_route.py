"""Routes: the cheapest over what is loaded, never with a gap, and a reason when there is none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.links.frames import Stage
from node.placement.route import NoRoute, route, route_text
from node.placement.view import LoadedShard, NodeCapacity, View
from tests.placement.pods import id_of, make_model, make_node, make_shard, make_speed, make_view

MODEL = id_of("m")


def text(view: View, prefer: str | None = None, **terms: int) -> str:
    found = route(view, MODEL, id_of(prefer) if prefer else None, **terms)
    return route_text(found, {node.node: node.name for node in view.nodes})


def pod(num_layers: int = 30, **shards: LoadedShard | tuple[LoadedShard, ...]) -> View:
    nodes = [
        make_node(name, shards=held if isinstance(held, tuple) else (held,)) for name, held in shards.items()
    ]
    return make_view(nodes, make_model(num_layers=num_layers))


def test_three_stages() -> None:
    view = pod(a=make_shard(0, 10), b=make_shard(10, 20), c=make_shard(20, 30))
    assert text(view) == "a[0:10),b[10:20),c[20:30)"
    assert route(view, MODEL)[1] == Stage(id_of("b"), "b.test:7000", 10, 20)


def test_an_unknown_name_is_shown_by_its_id() -> None:
    assert route_text([Stage(id_of("a"), "", 0, 5)], {}) == f"{id_of('a').hex()[:8]}[0:5)"


def test_one_whole_shard_beats_equal_stages_with_hops() -> None:
    view = pod(a=make_shard(0, 10), b=make_shard(10, 30), whole=make_shard(0, 30))
    assert text(view) == "whole[0:30)"


def test_fast_stages_beat_a_slow_whole() -> None:
    view = pod(a=make_shard(0, 10), b=make_shard(10, 30), whole=make_shard(0, 30, seconds_per_layer=0.01))
    assert text(view) == "a[0:10),b[10:30)"


def test_a_part_of_a_shard_is_used() -> None:
    view = pod(fast=make_shard(5, 30), slow=make_shard(0, 20, seconds_per_layer=0.005))
    assert text(view) == "slow[0:5),fast[5:30)"


def test_a_busy_node_is_passed_over() -> None:
    view = pod(a=make_shard(0, 30, num_active=3), b=make_shard(0, 30, num_active=1))
    assert text(view) == "b[0:30)"
    view = pod(a=make_shard(0, 30, num_active=1), b=make_shard(0, 30, num_active=3))
    assert text(view) == "a[0:30)"


def test_a_batch_costs_what_was_measured_for_it() -> None:
    """The busy node is fast with four rows at once: by sessions alone it would be passed over."""
    a = make_node("a", shards=[make_shard(0, 30, num_active=3)], speeds={"m": make_speed(100)})
    b = make_node("b", shards=[make_shard(0, 30)], speeds={"m": make_speed(140)})
    assert text(make_view([a, b], make_model())) == "a[0:30)"
    heads = {"a": make_speed(100, 1000), "b": make_speed(140, 100)}
    slow_head = [replace(node, speeds=((MODEL, heads[node.name]),)) for node in (a, b)]
    assert text(make_view(slow_head, make_model())) == "a[0:29),b[29:30)"


def test_a_way_that_was_measured_counts_as_that() -> None:
    nodes = [
        make_node("a", shards=[make_shard(0, 10)]),
        make_node("b", shards=[make_shard(10, 30)]),
        make_node("c", shards=[make_shard(10, 30, seconds_per_layer=0.00101)]),
    ]
    view = make_view(nodes, make_model())
    assert text(view) == "a[0:10),b[10:30)"
    assert text(replace(view, links_us={(id_of("a"), id_of("b")): 900})) == "a[0:10),c[10:30)"


def test_a_far_node_is_passed_over() -> None:
    view = make_view(
        [
            make_node("far", rtt_us=50_000, shards=[make_shard(10, 30)]),
            make_node("near", shards=[make_shard(10, 30, seconds_per_layer=0.0015)]),
            make_node("first", shards=[make_shard(0, 10)]),
        ],
        make_model(),
    )
    assert text(view) == "first[0:10),near[10:30)"


def test_the_preferred_node_wins_at_equal_cost_only() -> None:
    view = pod(a=make_shard(0, 30), b=make_shard(0, 30), c=make_shard(0, 30, seconds_per_layer=0.0011))
    assert text(view, prefer="a") == "a[0:30)"
    assert text(view, prefer="b") == "b[0:30)"
    assert text(view, prefer="c") in {"a[0:30)", "b[0:30)"}


def test_a_node_is_visited_once() -> None:
    # Cheapest by sums would be a, then b for its fast middle, then a again.
    view = pod(a=make_shard(0, 30), b=make_shard(10, 20, seconds_per_layer=0.00001))
    assert text(view) == "a[0:30)"


def test_shards_that_only_join_up_through_one_node_twice_are_no_route() -> None:
    view = pod(a=(make_shard(0, 10), make_shard(20, 30)), b=make_shard(10, 20))
    with pytest.raises(NoRoute, match="visit a node twice"):
        route(view, MODEL)


def test_a_detour_is_found_where_the_cheapest_way_visits_a_node_twice() -> None:
    view = pod(
        a=(make_shard(0, 10), make_shard(20, 30)),
        b=make_shard(10, 20),
        c=make_shard(20, 30, seconds_per_layer=0.5),
    )
    assert text(view) == "a[0:10),b[10:20),c[20:30)"


def test_the_cheaper_way_to_a_stage_does_not_hide_the_only_one_that_goes_on() -> None:
    view = pod(
        a=(make_shard(0, 10), make_shard(20, 30)),
        b=make_shard(10, 20),
        c=make_shard(0, 10, seconds_per_layer=0.5),
    )
    assert text(view) == "c[0:10),b[10:20),a[20:30)"


GAPS = {
    "nobody": (make_shard(20, 30), {}, r"\[10,20\) are missing \(no live node holds them\)"),
    "dead": (make_shard(10, 20), {"live": False}, r"\[10,20\) are missing \(b is not reachable\)"),
    "not serving": (make_shard(10, 20), {"serving": False}, r"\[10,20\) are missing \(b does not serve\)"),
    "loading": (make_shard(10, 20, ready=False), {}, r"\[10,20\) are missing \(b is still loading\)"),
    "full": (make_shard(10, 20, free_kv_tokens=5), {}, "b has KV room for 5 tokens, 6 are needed"),
}


@pytest.mark.parametrize("case", GAPS)
def test_no_route_says_which_layers_are_missing(case: str) -> None:
    shard, state, message = GAPS[case]
    view = make_view(
        [
            make_node("a", shards=[make_shard(0, 10)]),
            make_node("b", shards=[shard], **state),
            make_node("c", shards=[make_shard(20, 30)]),
        ],
        make_model(),
    )
    with pytest.raises(NoRoute, match=message) as caught:
        route(view, MODEL, num_kv_tokens=6)
    assert caught.value.missing == ((10, 20),)


def test_several_gaps_are_all_named() -> None:
    with pytest.raises(NoRoute, match=r"layers \[0,5\) and \[10,12\) and \[20,30\) are missing"):
        route(pod(a=make_shard(5, 10), b=make_shard(12, 20)), MODEL)


def test_a_node_that_just_failed_is_avoided() -> None:
    view = pod(a=make_shard(0, 30), b=make_shard(0, 30, seconds_per_layer=0.1))
    assert route(view, MODEL, avoid=frozenset({id_of("a")}))[0].node == id_of("b")
    with pytest.raises(NoRoute, match="a just failed; b just failed"):
        route(view, MODEL, avoid=frozenset({id_of("a"), id_of("b")}))


def test_an_unknown_model_is_no_route() -> None:
    with pytest.raises(NoRoute, match="does not serve this model"):
        route(pod(a=make_shard(0, 30)), id_of("other"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_impossible_speeds_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        make_shard(0, 1, seconds_per_layer=bad)


def test_two_hundred_replicas_of_every_cut() -> None:
    rng = random.Random(3)
    cuts = [rng.randrange(1, 79) for _ in range(100)]
    nodes = [
        make_node(f"n{i}", shards=[make_shard(*edge, seconds_per_layer=rng.random())])
        for i, edge in enumerate(edge for cut in cuts for edge in ((0, cut), (cut, 80)))
    ]
    stages = route(make_view(nodes, make_model(num_layers=80)), MODEL)
    check_is_cover(stages, 80)


def check_is_cover(stages: tuple[Stage, ...], num_layers: int) -> None:
    assert [0, *(s.end_layer for s in stages)] == [*(s.start_layer for s in stages), num_layers]
    assert len({s.node for s in stages}) == len(stages)


# The oracle: every route over every set of cuts, layer by layer, tried one after the other.
NUM_LAYERS = 6


@st.composite
def small_nodes(draw: st.DrawFn, name: str) -> NodeCapacity:
    shards = []
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.sampled_from([0, 0, 0, 1, 2, 3, 4, 5]))
        shards.append(
            make_shard(
                start,
                draw(st.integers(start + 1, NUM_LAYERS) | st.just(NUM_LAYERS)),
                ready=draw(st.integers(0, 9)) > 0,
                num_active=draw(st.integers(0, 2)),
                seconds_per_layer=draw(st.sampled_from([0.0, 0.00001, 0.001])),
            )
        )
    speed = draw(
        st.none() | st.builds(make_speed, st.sampled_from([1, 10, 1000]), st.sampled_from([0, 3000]))
    )
    return make_node(
        name,
        live=draw(st.integers(0, 9)) > 0,
        rtt_us=draw(st.integers(0, 2000)),
        shards=shards,
        speeds={"m": speed} if speed else None,
    )


def stage_ns(node: NodeCapacity, shard: LoadedShard, num_layers: int, is_last: bool) -> int:
    speed = node.speed_of(MODEL)
    if speed is None:
        return round(shard.seconds_per_layer * 1e9) * (1 + shard.num_active) * num_layers
    rows = 1 + shard.num_active
    return num_layers * speed.layer_ns(rows) + (speed.head_ns(rows) if is_last else 0)


def all_costs(
    view: View, layer: int, here: LoadedShard | None, on: NodeCapacity | None, left: frozenset[str]
) -> Iterator[int]:
    if layer == NUM_LAYERS:
        yield 0
        return
    for node in view.nodes:
        for shard in node.shards:
            if not (node.live and shard.ready and shard.start_layer <= layer < shard.end_layer):
                continue
            stays = shard is here
            if not stays and (node.name in left or node is on):
                continue
            hop_ns = 0 if stays or on is None else view.hop_ns(on, node)
            cost_ns = stage_ns(node, shard, 1, layer == NUM_LAYERS - 1) + hop_ns
            gone = left if stays or on is None else left | {on.name}
            for rest_ns in all_costs(view, layer + 1, shard, node, gone):
                yield cost_ns + rest_ns


def cost_of(view: View, stages: tuple[Stage, ...]) -> int:
    by_id = {node.node: node for node in view.nodes}
    total_ns = 0
    for number, stage in enumerate(stages):
        node = by_id[stage.node]
        total_ns += min(
            stage_ns(node, s, stage.end_layer - stage.start_layer, stage is stages[-1])
            for s in node.shards
            if s.ready and s.start_layer <= stage.start_layer and stage.end_layer <= s.end_layer
        )
        if number:
            total_ns += view.hop_ns(by_id[stages[number - 1].node], node)
    return total_ns


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.tuples(*(small_nodes(name) for name in "abcd")), st.randoms(use_true_random=False))
def test_no_cheaper_route_exists(nodes: tuple[NodeCapacity, ...], random: random.Random) -> None:
    view = make_view(nodes, make_model(num_layers=NUM_LAYERS))
    cheapest_ns = min(all_costs(view, 0, None, None, frozenset()), default=None)
    try:
        stages = route(view, MODEL)
    except NoRoute:
        assert cheapest_ns is None
        return
    check_is_cover(stages, NUM_LAYERS)
    assert cost_of(view, stages) == cheapest_ns
    shuffled = replace(view, nodes=tuple(random.sample(nodes, len(nodes))))
    assert route(shuffled, MODEL) == stages
