"""`pod ca`: print the authority's certificate, so that tools and browsers can check the gateways' HTTPS."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from node.cli import show
from node.cli.call import perform
from node.cli.options import AsJson


def ca(
    renew: Annotated[
        bool, typer.Option("--renew", help="Make a new authority (owner): clients need the new certificate.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the certificate (PEM) of the pod's authority: `pod ca > pod-ca.pem`."""
    result: Any = perform("ca", {"renew": renew})
    if as_json:
        return show.print_json(result)
    until = show.time_text(result["not_after_ms"])[:10]
    show.err.print(f"SHA-256 {result['fingerprint_sha256']}, good until {until}", markup=False)
    print(result["pem"], end="")
    return None


def https_text(shown: Any, authority_sha256: str) -> str:
    """About a gateway's certificate: where it is from, until when, and both fingerprints."""
    source = {"pod": "under the pod's authority (`pod ca`)", "given": "as given"}.get(
        shown["source"], "self-signed"
    )
    note = f"; {shown['note']}" if shown["note"] else ""
    until = show.time_text(shown["not_after_ms"])[:10]
    authority = f"\nauthority   SHA-256 {authority_sha256}" if shown["source"] == "pod" else ""
    return f"HTTPS {source} until {until}{note}\ncertificate SHA-256 {shown['fingerprint_sha256']}{authority}"
