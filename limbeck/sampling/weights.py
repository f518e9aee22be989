"""New weights for a running vLLM, and the version that it has, over the endpoints of its developer mode.

    POST /collective_rpc         {"method": "reload_weights", "kwargs": {"weights_path": FOLDER}}
    POST /reset_prefix_cache     what it has cached of the old weights goes
    POST /update_weight_version  {"new_version": VERSION}
    GET  /weight_info            {"weight_version": VERSION}, "default" after a start
    GET  /server_info            its configuration, of which the precision is read

vLLM loads what the folder holds between two of its steps. The version is a name that it keeps and does not check.
"""

from __future__ import annotations

import time
from dataclasses import replace

from limbeck.client.openai import Refusal, Server
from limbeck.client.replies import short_json
from limbeck.types import LimbeckError

_START = "start vLLM 0.32 or newer in developer mode (VLLM_SERVER_DEV_MODE=1)"
# Of a cache that is in use: a request that another client has under way.
_RESETS, _PAUSE_S = 20, 0.5


def require_endpoints(server: Server) -> None:
    """Check that a server can be given weights; it keeps those that it has.

    Raises:
        LimbeckError: it is down, or lacks one of the endpoints.
    """
    version_of(server)
    # Without a method it says that one is missing.
    reply = server.post("//collective_rpc", {})
    if isinstance(reply, Refusal) and reply.status in (404, 405):
        raise _lacking(server, "/collective_rpc", reply)


def version_of(server: Server) -> str:
    """The version of the weights that a server has.

    Raises:
        LimbeckError: it is down, or keeps none.
    """
    reply = server.get("//weight_info")
    version = None if isinstance(reply, Refusal) else reply.get("weight_version")
    if not isinstance(version, str):
        raise _lacking(server, "/weight_info", reply if isinstance(reply, Refusal) else short_json(reply))
    return version


def require_version(server: Server, version: str) -> None:
    """Check that a server has certain weights.

    Raises:
        LimbeckError: it is down, or has others.
    """
    if (found := version_of(server)) != version:
        raise LimbeckError(
            f"{server.root} has the weights {found!r}, expected {version!r}: it was started anew, or another client "
            "gave it others; let no other run use it: the next round, or the same command again, gives it the weights"
        )


def hand_over(server: Server, folder: str, version: str) -> None:
    """Have a server load the weights in a folder, and forget what it has cached of others.

    Raises:
        LimbeckError: it is down, or cannot load them.
    """
    # Whoever else relies on the old weights sees from now on that they are going.
    _name(server, f"{version}, being loaded")
    body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
    try:
        # A server that fails to load them fails again.
        reply = replace(server, retries=0).post("//collective_rpc", body)
    except LimbeckError as error:
        raise _unloaded(server, folder, str(error)) from None
    if isinstance(reply, Refusal):
        raise _unloaded(server, folder, str(reply))
    _forget(server)
    _name(server, version)
    require_version(server, version)


def dtype_of(server: Server) -> str | None:
    """The precision that a server computes in, such as "bfloat16"; None where it does not say."""
    reply = server.get("//server_info?config_format=json")
    for name in ("vllm_config", "model_config", "dtype"):
        reply = reply.get(name) if isinstance(reply, dict) else None
    return reply.removeprefix("torch.") if isinstance(reply, str) else None


def _name(server: Server, version: str) -> None:
    reply = server.post("//update_weight_version", {"new_version": version})
    if isinstance(reply, Refusal):
        raise _lacking(server, "/update_weight_version", reply)


def _forget(server: Server) -> None:
    """Drop the cache of prefixes, which holds states of the old weights."""
    for _ in range(_RESETS):
        reply = server.post("//reset_prefix_cache", {})
        if isinstance(reply, Refusal):
            raise _lacking(server, "/reset_prefix_cache", reply)
        if reply.get("success") is True:
            return
        time.sleep(_PAUSE_S)
    raise LimbeckError(
        f"{server.root} cannot drop what it has cached of the old weights, which requests of others hold; let no other "
        "client use it"
    )


def _lacking(server: Server, door: str, said: object) -> LimbeckError:
    return LimbeckError(
        f"{server.root} takes no new weights: {door} answers {said}; {_START}, or remove {server.section}"
    )


def _unloaded(server: Server, folder: str, why: str) -> LimbeckError:
    return LimbeckError(
        f"the weights in {folder} were not loaded ({why}); let that server see the folder ({server.section}.folder and "
        f"{server.section}.seen_as), and serve a model of the student's architecture"
    )
