"""`pod model`: what the pod serves."""

from __future__ import annotations

import asyncio

from node.catalogue import Entry
from node.errors import UserError
from node.models.manifest import Manifest
from node.models.package import build_package
from node.models.quantization import DTYPES
from node.office import Office, check_name
from node.operations.arguments import Arguments, Result, TellProgress, optional_text, require_admin, text
from pod.roster.events import ModelDeployed, ModelRemoved
from pod.roster.roster import Model


async def model_add(office: Office, arguments: Arguments, tell: TellProgress) -> Result:
    ref, dtype = text(arguments, "ref"), text(arguments, "dtype")
    split, name = arguments.get("split"), optional_text(arguments, "name")
    if name is not None:
        check_name(name, "--name")
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)} (got {dtype!r})")
    require_admin(office, "choose models")
    loop = asyncio.get_running_loop()

    def progress(what: str, done_bytes: int, total_bytes: int) -> None:
        told = {"what": what, "done_bytes": done_bytes, "total_bytes": total_bytes}
        loop.call_soon_threadsafe(tell, told)

    package = await asyncio.to_thread(build_package, ref, dtype, office.home.models_dir, progress)
    manifest = package.manifest
    if isinstance(split, int) and split > manifest.num_layers:
        raise UserError(f"{ref} has {manifest.num_layers} layers and cannot be split {split} ways")
    deployed = ModelDeployed(
        name=name or manifest.name,
        reference=ref,
        model=manifest.model_id,
        manifest=manifest.encode(),
        num_stages=split if isinstance(split, int) else 0,
        dtype=dtype,
    )
    _check_deployable(office, deployed, manifest)
    office.membership.issue(deployed)
    return {
        "name": deployed.name,
        "id": manifest.model_id.hex(),
        "num_layers": manifest.num_layers,
        "num_parameters": manifest.stage_num_parameters(0, manifest.num_layers),
        "weight_type": manifest.weight_type,
        "split": deployed.num_stages,
    }


def _check_deployable(office: Office, deployed: ModelDeployed, manifest: Manifest) -> None:
    """One name per model; and while nodes serve, it must fit what they have together."""
    for known in office.membership.roster.models.values():
        if known.id == deployed.model and known.name != deployed.name:
            raise UserError(f"the pod serves this model already, as {known.name}")
    model = Model(
        deployed.name,
        deployed.reference,
        deployed.model,
        deployed.manifest,
        deployed.num_stages,
        deployed.dtype,
    )
    num_missing_bytes = office.state.num_missing_bytes(Entry(model, manifest))
    if num_missing_bytes:
        raise UserError(
            f"{deployed.name} is larger than the pod: the nodes that serve now lack "
            f"{num_missing_bytes / 2**30:.2f} GiB of memory"
        )


async def model_remove(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    name = text(arguments, "name")
    if name not in office.membership.roster.models:
        raise UserError(f"the pod serves no model called {name}; `pod models` lists them")
    require_admin(office, "remove models")
    office.membership.issue(ModelRemoved(name))
    return {"name": name, "removed": True}
