"""The control transport over libp2p: TCP, Noise, Yamux. The only place that knows libp2p and trio."""
