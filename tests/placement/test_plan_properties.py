"""What holds for every pod: layers covered, memory kept, the same plan everywhere, and no plan twice."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from node.placement.assignment import Assignment
from node.placement.explain import explain
from node.placement.plan import Plan, plan
from node.placement.view import DeployedModel, LoadedShard, NodeCapacity, View
from node.speed import Speed
from tests.placement.pods import AUTHOR, id_of, is_cover, make_model, make_node, make_speed

MODEL_NAMES = ("x", "y", "z")
bounded = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def shards(draw: st.DrawFn) -> LoadedShard:
    start = draw(st.integers(0, 10))
    return LoadedShard(
        id_of(draw(st.sampled_from(MODEL_NAMES))), start, start + draw(st.integers(1, 9)), True, 0, 0.001, 100
    )


@st.composite
def speeds(draw: st.DrawFn) -> Speed:
    return make_speed(draw(st.sampled_from([10, 1000, 20_000, 500_000])))


@st.composite
def nodes(draw: st.DrawFn, name: str) -> NodeCapacity:
    return make_node(
        name,
        draw(st.sampled_from([0, 0.25, 0.5, 1, 2, 4, 16])),
        draw(st.sampled_from([0.01, 1, 5, 10, 11, 100, 900])),
        live=draw(st.booleans() | st.just(True)),
        serving=draw(st.booleans() | st.just(True)),
        rtt_us=draw(st.sampled_from([0, 200, 20_000])),
        shards=draw(st.lists(shards(), max_size=2)),
        models=draw(st.none() | st.sets(st.sampled_from(MODEL_NAMES))),
        speeds=draw(st.dictionaries(st.sampled_from(MODEL_NAMES), speeds(), max_size=2)),
    )


@st.composite
def views(draw: st.DrawFn) -> View:
    names = "abcdefg"[: draw(st.integers(1, 7))]
    models = [
        make_model(
            name,
            draw(st.integers(1, 20)),
            draw(st.integers(10, 300)),
            draw(st.integers(1, 5)),
            embedding_mib=draw(st.sampled_from([0, 50, 400])),
            head_mib=draw(st.sampled_from([0, 50, 400])),
            kv_bytes=draw(st.sampled_from([0, 4096])),
        )
        for name in MODEL_NAMES[: draw(st.integers(1, 3))]
    ]
    return View(tuple(draw(nodes(name)) for name in names), tuple(models))


@st.composite
def histories(draw: st.DrawFn) -> tuple[View, Plan | None, View]:
    """A view, what was planned for it, and the view after some nodes changed."""
    before = draw(views())
    changed = tuple(draw(nodes(node.name)) if draw(st.integers(0, 2)) == 0 else node for node in before.nodes)
    return before, plan(before, None, AUTHOR), replace(before, nodes=changed)


def need_bytes(model: DeployedModel, assignment: Assignment) -> int:
    """Counted layer by layer, apart from the code under test."""
    layers = range(assignment.start_layer, assignment.end_layer)
    kv_bytes = model.kv_bytes_per_token_per_layer * min(model.max_context_tokens, 8192)
    ends = model.embedding_bytes * (0 in layers) + model.head_bytes * (model.num_layers - 1 in layers)
    return sum(model.layer_bytes[layer] + kv_bytes for layer in layers) + ends


def check_memory(view: View, made: Plan) -> None:
    models = {model.model: model for model in view.models}
    for node in view.nodes:
        needs = sum(need_bytes(models[a.model], a) for a in made.of_node(node.node))
        assert needs * 100 <= node.memory_bytes * 85


def check_used_nodes_can_hold(view: View, made: Plan, but_not: Plan | None = None) -> None:
    by_id = {node.node: node for node in view.nodes}
    kept = set(but_not.assignments) if but_not else set()
    for assignment in set(made.assignments) - kept:
        assert by_id[assignment.node].can_hold(assignment.model)


@bounded
@given(views())
def test_a_first_plan_covers_whole_models_within_memory(view: View) -> None:
    made = plan(view, None, AUTHOR)
    if made is None:
        assert all(remark.reason for remark in explain(view, None).models)
        assert len(explain(view, None).models) == len(view.models)
        return
    for model in view.models:
        assert not made.of_model(model.model) or is_cover(model, made)
    check_memory(view, made)
    check_used_nodes_can_hold(view, made)


@bounded
@given(histories())
def test_a_later_plan_covers_whole_models_within_memory(history: tuple[View, Plan | None, View]) -> None:
    _, first, after = history
    second = plan(after, first, AUTHOR) or first
    if second is None:
        return
    for model in after.models:
        assert not second.of_model(model.model) or is_cover(model, second)
    check_memory(after, second)
    check_used_nodes_can_hold(after, second, but_not=first)


@bounded
@given(histories())
def test_planning_again_changes_nothing(history: tuple[View, Plan | None, View]) -> None:
    before, first, after = history
    assert plan(before, first, AUTHOR) is None
    second = plan(after, first, AUTHOR)
    assert second is None or second.epoch == (first.epoch if first else 0) + 1
    assert plan(after, second or first, AUTHOR) is None


@bounded
@given(histories(), st.randoms(use_true_random=False))
def test_the_order_of_the_view_changes_nothing(
    history: tuple[View, Plan | None, View], random: st.randoms
) -> None:
    _, first, after = history
    shuffled = View(
        tuple(random.sample(after.nodes, len(after.nodes))),
        tuple(random.sample(after.models, len(after.models))),
    )
    assert plan(shuffled, first, AUTHOR) == plan(after, first, AUTHOR)
    assert explain(shuffled, first) == explain(after, first)


@bounded
@given(views())
def test_a_model_is_whole_where_its_fastest_node_holds_it(view: View) -> None:
    view = replace(
        view,
        nodes=(*(replace(node, speeds=()) for node in view.nodes), make_node("vast", 1000, 10_000)),
        models=tuple(replace(model, split=1) for model in view.models),
    )
    made = plan(view, None, AUTHOR)
    assert made is not None
    assert {a.node for a in made.assignments} == {id_of("vast")}


@bounded
@given(histories())
def test_a_covered_model_stays_covered_while_its_nodes_do(history: tuple[View, Plan | None, View]) -> None:
    before, first, _ = history
    if first is None:
        return
    used = {a.node for a in first.assignments}
    fewer = replace(
        before, nodes=tuple(n if n.node in used else replace(n, live=False) for n in before.nodes)
    )
    assert plan(fewer, first, AUTHOR) is None, "the loss of unused nodes moves nothing"
