"""Runs one operation for a command: at the running node over its local API, else on the state directory.

Knows how to reach the node; knows no operation by name.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import closing

from node.errors import UserError
from node.home import PodHome, RunningNode

Json = dict[str, object]
ShowProgress = Callable[[Mapping[str, object]], None]

CONNECT_TIMEOUT_S = 5.0
START_TIMEOUT_S = 20.0
# Adding a model may download it; every progress line resets this deadline.
SILENCE_TIMEOUT_S = 600.0


def this_home() -> PodHome:
    return PodHome.locate(os.environ)


def require_pod(home: PodHome) -> None:
    if not home.has_pod():
        raise UserError(f"{home.path} is in no pod yet; say `pod create NAME` or `pod join INVITE`")


def perform(operation: str, arguments: Json, show_progress: ShowProgress | None = None) -> Json:
    """Run `operation` and return its result. Raises UserError with one clear line.

    A node that is just starting or stopping is waited for.
    """
    home = this_home()
    require_pod(home)
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        running = home.running_node()
        if running is not None:
            return _perform_at_node(running, operation, arguments, show_progress)
        if home.try_acquire():
            return _perform_offline(home, operation, arguments, show_progress)
        if time.monotonic() > deadline_s:
            raise UserError(f"a node is starting or stopping in {home.path}; try again shortly")
        time.sleep(0.1)


def wait_until_stopped() -> None:
    """After an operation that ends the node: return when it has let go of the state directory."""
    home, deadline_s = this_home(), time.monotonic() + START_TIMEOUT_S
    while not home.try_acquire() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    home.release()


def _perform_at_node(
    running: RunningNode, operation: str, arguments: Json, show_progress: ShowProgress | None
) -> Json:
    import httpx

    headers = {"authorization": f"Bearer {running.local_token}"}
    timeout = httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    url = f"{running.local_url}/pod/v1/{operation}"
    try:
        # A proxy meant for the internet must not be given this machine's token.
        with (
            httpx.Client(trust_env=False, timeout=timeout) as client,
            client.stream("POST", url, json=arguments, headers=headers) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise UserError(f"the node at {running.local_url} answered {response.status_code}")
            for line in response.iter_lines():
                message = json.loads(line)
                if "error" in message:
                    raise UserError(str(message["error"]["message"]))
                if "result" in message:
                    result: Json = message["result"]
                    return result
                if show_progress is not None:
                    show_progress(message["progress"])
    except httpx.HTTPError as error:
        raise UserError(f"cannot reach the node at {running.local_url}: {error}") from None
    raise UserError(f"the node at {running.local_url} stopped before it answered")


def _perform_offline(
    home: PodHome, operation: str, arguments: Json, show_progress: ShowProgress | None
) -> Json:
    from node.office import open_offline
    from node.operations import run_operation

    try:
        with closing(open_offline(home)) as office:
            return asyncio.run(run_operation(office, operation, arguments, show_progress or (lambda _: None)))
    finally:
        home.release()
