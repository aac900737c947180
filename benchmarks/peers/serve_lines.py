"""One JSON request a line on standard input, one JSON answer a line on what was standard output.

Runs in the environments of the peers: standard library only. Whatever the peer's library prints goes to
standard error. Also holds how a decode rate is read from the times of tokens, so that all peers use the same.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence

Operation = Callable[..., object]


def serve(load: Callable[[], dict[str, Operation]]) -> None:
    """Load the peer, say so, then answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    start_s = time.perf_counter()
    operations = load()
    print(json.dumps({"result": {"load_s": time.perf_counter() - start_s}}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": operations[request.pop("operation")](**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


def timeline(start_s: float, token_times: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of one batch: `token_times[stream]` in seconds on the clock of `start_s`.

    `first_s`: until every stream had its first token. `tokens_per_s`: sum of all streams from then until the
    first stream ends, when all of them decode; where that is less than half of the time, over the whole time,
    which is never more favourable. 0 for streams of one token.
    """
    first_s, last_s = min(times[0] for times in token_times), max(times[-1] for times in token_times)
    all_started_s = max(times[0] for times in token_times)
    begin_s, end_s = all_started_s, min(times[-1] for times in token_times)
    if end_s - begin_s < (last_s - first_s) / 2:
        begin_s, end_s = first_s, last_s
    num_tokens = sum(sum(begin_s < at <= end_s for at in times) for times in token_times)
    rate = num_tokens / (end_s - begin_s) if end_s > begin_s else 0.0
    return {"first_s": all_started_s - start_s, "tokens_per_s": rate}
