"""Placement in tables: what small and large pods decide, and what they keep."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from node.placement.explain import explain, predicted_tokens_per_second
from node.placement.plan import Assignment, Plan, plan
from node.placement.view import NodeCapacity, View
from tests.placement.pods import (
    AUTHOR,
    first_plan,
    id_of,
    is_cover,
    make_model,
    make_node,
    make_shard,
    make_view,
    ranges,
)


def with_live(view: View, **live: bool) -> View:
    return replace(view, nodes=tuple(replace(n, live=live.get(n.name, n.live)) for n in view.nodes))


def reasons(view: View, made: Plan | None) -> str:
    explained = explain(view, made)
    return "\n".join(remark.reason for remark in (*explained.models, *explained.nodes))


# Each row: nodes as name -> (GiB, GiB/s), the wished split, who must hold what of 30 layers of 100 MiB.
TABLE = {
    "one node holds all": ({"a": (8, 10)}, 1, {"a": (0, 30)}),
    "one node, though three are wished": ({"a": (8, 10)}, 3, {"a": (0, 30)}),
    "the fastest of two": ({"a": (8, 10), "b": (8, 20)}, 1, {"b": (0, 30)}),
    "the only one with room": ({"a": (2, 20), "b": (8, 20)}, 1, {"b": (0, 30)}),
    "two, though three are wished": ({"a": (8, 10), "b": (8, 10)}, 3, {"a": (0, 15), "b": (15, 30)}),
    "three as wished": (
        {"a": (8, 10), "b": (8, 10), "c": (8, 10)},
        3,
        {"a": (0, 10), "b": (10, 20), "c": (20, 30)},
    ),
    "cuts follow speed, not memory": (
        {"a": (64, 10), "b": (8, 20), "c": (8, 30)},
        3,
        {"a": (0, 5), "b": (5, 15), "c": (15, 30)},
    ),
    "memory limits what speed would give": ({"a": (1, 90), "b": (8, 10)}, 2, {"a": (0, 8), "b": (8, 30)}),
    "too big for one": ({"a": (2, 10), "b": (2, 10)}, 1, {"a": (0, 15), "b": (15, 30)}),
    "a slow third is left out": (
        {"a": (2, 10), "b": (2, 10), "slow": (8, 0.01)},
        1,
        {"a": (0, 15), "b": (15, 30)},
    ),
    "two fast nodes beat a slow one that would hold all": (
        {"a": (2, 10), "b": (2, 10), "slow": (8, 1)},
        1,
        {"a": (0, 15), "b": (15, 30)},
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_small_pods(case: str) -> None:
    nodes, split, expected = TABLE[case]
    view = make_view([make_node(name, *offer) for name, offer in nodes.items()], make_model(split=split))
    assert ranges(view, first_plan(view)) == expected


def test_the_head_counts_where_it_runs_and_the_embedding_only_in_memory() -> None:
    nodes = [make_node(name, 2.5) for name in "abc"]
    plain = make_model(split=3, embedding_mib=600, head_mib=600)
    view = make_view(nodes, plain)
    # 30 layers and a head worth 6: 12 units of time each; the embedding takes memory but no time.
    assert ranges(view, first_plan(view)) == {"a": (0, 12), "b": (12, 24), "c": (24, 30)}
    big = replace(plain, embedding_bytes=1500 * 1024**2)
    view = make_view(nodes, big)
    assert ranges(view, first_plan(view))["a"] == (0, 6)


def test_kv_room_is_part_of_what_a_layer_takes() -> None:
    model = make_model(layer_mib=100, kv_bytes=51200, context=2048)
    nodes = [make_node("a", 4.5), make_node("b", 4.5)]
    # 100 MiB of KV room per layer double its size: 30 layers no longer fit 85 % of 4.5 GiB.
    assert len(ranges(make_view(nodes, model), first_plan(make_view(nodes, model)))) == 2
    without = replace(model, kv_bytes_per_token_per_layer=0)
    assert len(ranges(make_view(nodes, without), first_plan(make_view(nodes, without)))) == 1


def test_headroom_is_left() -> None:
    model = make_model(num_layers=10, layer_mib=102)
    view = make_view([make_node("a", 1)], model)
    assert plan(view, None, AUTHOR) is None
    view = make_view([make_node("a", 1.2)], model)
    assert ranges(view, first_plan(view)) == {"a": (0, 10)}


def test_seven_mixed_nodes() -> None:
    offers = {
        "a": (24, 900),
        "b": (16, 400),
        "c": (8, 20),
        "d": (64, 30),
        "e": (12, 300),
        "f": (2, 5),
        "g": (24, 900),
    }
    view = make_view([make_node(name, *offer) for name, offer in offers.items()], make_model("big", 80, 600))
    made = first_plan(view)
    held = ranges(view, made, "big")
    assert is_cover(view.models[0], made)
    assert set(held) == {"a", "b", "g"}, "47 GiB need the two big fast cards and the next, nobody slower"
    assert "c would slow big down" in reasons(view, made)
    assert "f would slow big down" in reasons(view, made)


def test_fifty_mixed_nodes_share_three_models() -> None:
    rng = random.Random(50)
    nodes = [
        make_node(f"n{i:02}", rng.choice([2, 8, 16, 24, 80]), rng.choice([10, 50, 300, 900]))
        for i in range(50)
    ]
    models = [
        make_model("x", 80, 900, split=4),
        make_model("y", 32, 450, split=12),
        make_model("z", 30, 9),
    ]
    view = make_view(nodes, *models)
    made = first_plan(view)
    assert all(is_cover(model, made) for model in models)
    assert len(made.of_model(id_of("y"))) >= 12
    assert len(made.of_model(id_of("z"))) == 1


def test_models_share_memory() -> None:
    view = make_view([make_node("a"), make_node("b")], make_model("x", 30, 200), make_model("y", 30, 200))
    made = first_plan(view)
    assert sorted(ranges(view, made, "x") | ranges(view, made, "y")) == ["a", "b"]


def test_nodes_without_the_files_are_not_used_and_told_why() -> None:
    view = make_view([make_node("a", models=["other"]), make_node("b", models=["m"])], make_model(split=2))
    made = first_plan(view)
    assert ranges(view, made) == {"b": (0, 30)}
    assert "a does not have the files of m" in reasons(view, made)
    assert "m is cut into 1 of the 2 stages asked for" in reasons(view, made)


def test_nodes_that_do_not_serve_or_are_gone_are_told_why() -> None:
    view = make_view(
        [make_node("a", serving=False), make_node("b", live=False), make_node("c")], make_model()
    )
    made = first_plan(view)
    assert ranges(view, made) == {"c": (0, 30)}
    assert "a does not serve" in reasons(view, made)
    assert "b is not reachable" in reasons(view, made)


def test_too_little_memory_says_how_much_is_missing() -> None:
    view = make_view([make_node("a", 1), make_node("b", 1)], make_model(num_layers=40, layer_mib=102))
    assert plan(view, None, AUTHOR) is None
    (remark,) = explain(view, None).models
    # 870 of the 1024 MiB of each node hold 8 layers; 24 layers at 85 % of a further node are 2880 MiB.
    assert remark.num_missing_bytes == 2880 * 1024**2
    assert remark.reason == "no room for m: 2.82 GiB of memory are missing"
    more = make_view([*view.nodes, make_node("c", 2880 / 1024)], *view.models)
    assert is_cover(view.models[0], first_plan(more)), "what is said to be missing is enough"


def test_no_node_with_the_files() -> None:
    view = make_view([make_node("a", models=[])], make_model())
    assert plan(view, None, AUTHOR) is None
    assert "no live node that serves has the files of m" in reasons(view, None)


def test_a_plan_is_kept_while_it_covers() -> None:
    view = make_view([make_node(name) for name in "abc"], make_model(split=3))
    made = first_plan(view)
    assert plan(view, made, AUTHOR) is None
    slower = replace(view, nodes=(make_node("a", 8, 9), *view.nodes[1:]))
    assert plan(slower, made, AUTHOR) is None, "10 % is not worth moving layers"


def test_a_join_moves_nothing_unless_asked_for() -> None:
    model = make_model()
    small = make_view([make_node("a", 2), make_node("b", 2)], model)
    made = first_plan(small)
    joined = replace(small, nodes=(*small.nodes, make_node("c", 2)))
    assert plan(joined, made, AUTHOR) is None
    assert "c would slow m down" in reasons(joined, made)


def test_a_join_that_is_a_clear_gain_is_used() -> None:
    small = make_view([make_node("a", 2), make_node("b", 2)], make_model())
    made = first_plan(small)
    joined = replace(small, nodes=(*small.nodes, make_node("c", 8, 100)))
    better = plan(joined, made, AUTHOR)
    assert ranges(joined, better) == {"c": (0, 30)}
    before = predicted_tokens_per_second(joined, made, id_of("m"))
    after = predicted_tokens_per_second(joined, better, id_of("m")) if better else None
    assert before is not None
    assert after is not None
    assert after > 5 * before


def test_a_wish_is_met_when_nodes_come_and_they_load_only_their_own_layers() -> None:
    model = make_model(split=3)
    view = make_view([make_node("a"), make_node("b"), make_node("c")], model)
    alone = with_live(view, b=False, c=False)
    one = first_plan(alone)
    assert ranges(view, one) == {"a": (0, 30)}
    pair = with_live(view, c=False)
    two = plan(pair, one, AUTHOR)
    assert ranges(view, two) == {"a": (0, 15), "b": (15, 30)}
    three = plan(view, two, AUTHOR)
    # a and b only drop layers; c takes the ones between.
    assert ranges(view, three) == {"a": (0, 10), "c": (10, 20), "b": (20, 30)}
    assert three is not None
    assert three.epoch == 3


def test_a_spare_node_takes_exactly_what_a_dead_one_held() -> None:
    nodes = [make_node(name) for name in "abcd"]
    view = make_view(nodes, make_model(split=3))
    made = first_plan(view)
    dead, *rest = (name for name in ranges(view, made))
    after = plan(with_live(view, **{dead: False}), made, AUTHOR)
    spare = ({"a", "b", "c", "d"} - set(ranges(view, made))).pop()
    assert ranges(view, after)[spare] == ranges(view, made)[dead]
    assert {name: ranges(view, after)[name] for name in rest} == {n: ranges(view, made)[n] for n in rest}


def test_a_death_moves_nothing_else() -> None:
    speeds = {"a": 10, "b": 12, "c": 9}
    nodes = [make_node(name, 8, speed) for name, speed in speeds.items()]
    models = make_model("m", split=3), make_model("n", num_layers=12, split=2)
    view = make_view(nodes, *models)
    made = first_plan(view)
    # The spare is a little slower than b: even cuts would be different for everybody.
    joined = with_live(replace(view, nodes=(*nodes, make_node("d", 8, 8.9))), b=False)
    after = plan(joined, made, AUTHOR)
    assert after is not None
    survivors = {a for a in made.assignments if a.node != id_of("b")}
    assert survivors < set(after.assignments)
    assert ranges(joined, after)["d"] == ranges(view, made)["b"]


def test_without_a_spare_the_neighbours_share_the_hole() -> None:
    view = make_view([make_node(name) for name in "abc"], make_model(split=3))
    made = first_plan(view)
    after = plan(with_live(view, b=False), made, AUTHOR)
    assert ranges(view, after) == {"a": (0, 15), "c": (15, 30)}


def test_a_model_that_fits_nowhere_else_waits_for_its_node() -> None:
    view = make_view([make_node("a", 2), make_node("b", 2)], make_model())
    made = first_plan(view)
    halved = with_live(view, b=False)
    assert plan(halved, made, AUTHOR) is None, "a keeps its layers, so b's return needs no new plan"
    said = reasons(halved, made)
    assert "no room for m: 1.50 GiB of memory are missing" in said
    assert "part of it was on b" in said
    assert plan(view, made, AUTHOR) is None


def test_layers_that_are_loaded_are_reused() -> None:
    shards = {"a": make_shard(20, 30), "b": make_shard(0, 10), "c": make_shard(10, 20)}
    view = make_view([make_node(name, shards=[shards[name]]) for name in "abc"], make_model(split=3))
    assert ranges(view, first_plan(view)) == {"b": (0, 10), "c": (10, 20), "a": (20, 30)}


def test_layers_are_not_reused_where_that_makes_a_stage_clearly_slower() -> None:
    shards = {"a": make_shard(15, 30), "b": make_shard(0, 15)}
    nodes = [make_node("a", 8, 1, shards=[shards["a"]]), make_node("b", 8, 10, shards=[shards["b"]])]
    view = make_view(nodes, make_model(split=2, head_mib=3000))
    # In the order they hold layers, the head would run on the slow one: 31 units of time instead of 6.
    assert ranges(view, first_plan(view)) == {"a": (0, 5), "b": (5, 30)}


def test_uneven_stages_stay_when_evening_them_out_would_slow_a_token() -> None:
    view = make_view([make_node("a", 8, 11), make_node("b", 8, 10)], make_model(split=2))
    uneven = (Assignment(id_of("m"), 0, 22, id_of("a")), Assignment(id_of("m"), 22, 30, id_of("b")))
    assert plan(view, Plan(1, AUTHOR, uneven), AUTHOR) is None
    swapped = (Assignment(id_of("m"), 0, 22, id_of("b")), Assignment(id_of("m"), 22, 30, id_of("a")))
    assert plan(view, Plan(1, AUTHOR, swapped), AUTHOR) is not None


def test_of_equal_nodes_the_one_that_has_the_layers_is_taken() -> None:
    view = make_view([make_node("a"), make_node("b", shards=[make_shard(0, 30)])], make_model())
    assert ranges(view, first_plan(view)) == {"b": (0, 30)}


def test_a_removed_model_leaves_the_plan() -> None:
    view = make_view([make_node("a")], make_model("x"), make_model("y"))
    made = first_plan(view)
    after = plan(replace(view, models=view.models[:1]), made, AUTHOR)
    assert after is not None
    assert {a.model for a in after.assignments} == {id_of("x")}


def test_memory_taken_away_moves_a_model() -> None:
    view = make_view([make_node("a", 8), make_node("b", 8, 9)], make_model())
    made = first_plan(view)
    assert ranges(view, made) == {"a": (0, 30)}
    shrunk = replace(view, nodes=(make_node("a", 1), view.nodes[1]))
    assert ranges(view, plan(shrunk, made, AUTHOR)) == {"b": (0, 30)}


def test_memory_taken_away_with_nowhere_to_go_gives_the_model_up() -> None:
    view = make_view([make_node("a", 8)], make_model())
    made = first_plan(view)
    after = plan(make_view([make_node("a", 1)], make_model()), made, AUTHOR)
    assert after is not None
    assert after.assignments == ()


def test_room_kept_for_a_broken_model_goes_to_one_that_can_be_served() -> None:
    big, small = make_model("big", 30, 100), make_model("small", 10, 120)
    view = make_view([make_node("a", 2), make_node("b", 2)], big)
    made = first_plan(view)
    halved = with_live(make_view(view.nodes, big, small), b=False)
    after = plan(halved, made, AUTHOR)
    assert ranges(halved, after, "small") == {"a": (0, 10)}


def test_a_far_node_is_not_used_where_a_near_one_will_do() -> None:
    nodes = [make_node("a", 2), make_node("far", 2, rtt_us=200_000), make_node("near", 2)]
    view = make_view(nodes, make_model())
    assert set(ranges(view, first_plan(view))) == {"a", "near"}


@pytest.mark.parametrize("bad", [{"memory_bytes": -1}, {"bytes_per_second": 0}, {"link_rtt_us": -1}])
def test_impossible_numbers_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"of a node|bytes per second"):
        replace(make_node("a"), **bad)  # type: ignore[arg-type]


def test_a_big_pod_is_planned_with_bounded_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 nodes, 3 models of 80 layers: counted in cuts tried, not in seconds (about 0.4 s here)."""
    from node.placement import choice, cuts

    num_fills = 0
    plain_fill = cuts.fill

    def counting_fill(*arguments: object) -> object:
        nonlocal num_fills
        num_fills += 1
        return plain_fill(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cuts, "fill", counting_fill)
    monkeypatch.setattr(choice, "fill", counting_fill)
    rng = random.Random(200)
    nodes: list[NodeCapacity] = [
        make_node(f"n{i:03}", rng.choice([4, 8, 16, 24]), rng.choice([5, 20, 100, 500])) for i in range(200)
    ]
    models = [make_model("x", 80, 1600), make_model("y", 80, 400, split=5), make_model("z", 80, 200)]
    made = first_plan(make_view(nodes, *models))
    assert all(is_cover(model, made) for model in models)
    assert num_fills < 10_000
