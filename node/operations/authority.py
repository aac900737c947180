"""`pod ca`: the certificate of the pod's authority, for clients to check the gateways' HTTPS with."""

from __future__ import annotations

from cryptography.hazmat.primitives.serialization import Encoding

from node.errors import UserError
from node.office import Office, wall_clock_ms
from node.operations.arguments import Arguments, Result, TellProgress
from node.tls.authority import Authority
from node.tls.certificates import CertificateError, fingerprint, not_after_ms, read_chain


async def ca(office: Office, arguments: Arguments, _tell: TellProgress) -> Result:
    authority = Authority(office.membership, office.home.keys_dir, wall_clock_ms)
    if arguments.get("renew") is True:
        authority.renew()
    else:
        authority.ensure()
    der = authority.certificate_der
    if der is None:
        raise UserError("the pod has no authority yet: its owner's node makes it when it runs")
    try:
        (certificate,) = read_chain([der])
    except CertificateError:
        raise UserError("the pod's authority cannot be read; its owner may say `pod ca --renew`") from None
    return {
        "pem": certificate.public_bytes(Encoding.PEM).decode(),
        "fingerprint_sha256": fingerprint(certificate),
        "not_after_ms": not_after_ms(certificate),
    }
