"""The gateway: the OpenAI API of the pod, at every node. Knows HTTP and text; no torch, ledger or libp2p."""
