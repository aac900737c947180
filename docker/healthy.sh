#!/bin/sh
# Asks this node's own /healthz, wherever POD_API has it listen. Certificates are not checked: it is ourselves.
exec python -c '
import os, ssl, sys, urllib.error, urllib.request
port = os.environ.get("POD_API", "127.0.0.1:8420").rpartition(":")[2]
for scheme in ("http", "https"):
    try:
        url = f"{scheme}://127.0.0.1:{port}/healthz"
        with urllib.request.urlopen(url, timeout=4, context=ssl._create_unverified_context()) as answer:
            sys.exit(answer.status != 200)
    except urllib.error.HTTPError as refusal:
        sys.exit(f"/healthz answered {refusal.code}")
    except OSError as error:
        reason = error
sys.exit(f"/healthz does not answer: {reason}")
'
