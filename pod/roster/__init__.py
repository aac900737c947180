"""Who is in the pod: signed events, the pure `roster_of` that makes a roster of them, and their log."""
