"""The dashboard: what a person sees of the pod in a browser. Knows `node.gateway.backend`, nothing more."""
