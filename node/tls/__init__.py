"""HTTPS of the gateway: the pod's own authority, and the certificate of this node."""
