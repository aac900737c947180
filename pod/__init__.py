"""Who is in the pod and how bytes travel between its nodes. Knows no GPU and no accounting."""
