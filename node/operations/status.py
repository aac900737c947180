"""`pod status` and `pod models`: the nodes, what they serve, where time went."""

from __future__ import annotations

from node.books_view import member_name, model_name, node_name
from node.office import Office
from node.operations.arguments import Arguments, Result, TellProgress
from node.time_view import request_rows, time_per_token
from node.tls.certificates import fingerprint_of_der


async def status(office: Office, _arguments: Arguments, _tell: TellProgress) -> Result:
    roster, state = office.membership.roster, office.state
    statuses, live = state.statuses(), state.live() if office.running else frozenset()
    nodes = []
    for node in sorted(roster.nodes.values(), key=lambda n: n.name):
        known = statuses.get(node.id)
        nodes.append(
            {
                "id": node.id.hex(),
                "name": node.name,
                "member": member_name(roster, node.member),
                "live": node.id in live,
                "device": known.device if known else "",
                "data_address": known.data_address if known else "",
                "memory_bytes": known.memory_bytes if known else 0,
                "note": state.note_of(node.id),
                "shards": [
                    {
                        "model": model_name(roster, shard.model),
                        "start_layer": shard.start_layer,
                        "end_layer": shard.end_layer,
                        "ready": shard.ready,
                        "percent": shard.loaded_per_mille // 10,
                    }
                    for shard in (known.shards if known else ())
                ],
            }
        )
    own = office.membership.node_id
    return {
        "pod": {
            "id": roster.pod.hex(),
            "name": roster.name,
            "authority_sha256": fingerprint_of_der(roster.authority_der) if roster.authority_der else "",
        },
        "node": {
            "id": own.hex(),
            "name": node_name(roster, own),
            "member": member_name(roster, office.membership.member_id),
            "running": office.running is not None,
            "is_in_pod": own in roster.nodes,
            "api_url": office.running.api_url if office.running else "",
            "https": office.https(),
            "home": str(office.home.path),
        },
        "nodes": nodes,
        "models": _model_rows(office),
        "loading": list(office.loading()),
        "recent_requests": request_rows(office.state),
    }


def _model_rows(office: Office) -> list[Result]:
    rows: list[Result] = []
    state = office.state
    for entry in office.catalogue.entries():
        condition = state.condition_of(entry)
        rows.append(
            {
                "name": entry.deployed.name,
                "reference": entry.deployed.reference,
                "id": entry.deployed.id.hex(),
                "num_layers": entry.manifest.num_layers,
                "max_context_tokens": entry.manifest.max_context_tokens,
                "dtype": entry.manifest.dtype,
                "weight_type": entry.manifest.weight_type,
                "num_weight_bytes": entry.manifest.stage_bytes(0, entry.manifest.num_layers),
                "split": entry.deployed.num_stages,
                "state": condition.state if office.running else "node not running",
                "reason": condition.reason,
                "loaded_percent": condition.loaded_per_mille // 10,
                "tokens_per_s": state.tokens_per_s(entry.deployed.id),
                "predicted_tokens_per_s": state.predicted_tokens_per_s(entry.deployed.id, condition.route),
                "time_per_token": time_per_token(state, entry.deployed.id),
                "num_stages": len(condition.route),
                "route": state.route_text(condition.route),
            }
        )
    return rows


async def models(office: Office, _arguments: Arguments, _tell: TellProgress) -> Result:
    return {"models": _model_rows(office)}
