"""llama.cpp's own server, out of the package xllamacpp, as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.model_alias, params.hostnames, params.port = sys.argv[1], {"tiny"}, ["127.0.0.1"], 0
params.n_ctx, params.n_parallel = int(sys.argv[2]), int(sys.argv[3])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
print("listening at", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_cpp(path: Path, *, n_ctx: int = 1024, n_parallel: int = 4) -> Iterator[str]:
    """A server with a GGUF file, under the name "tiny": its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(path), str(n_ctx), str(n_parallel)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        told = next((line for line in process.stdout if line.startswith("listening at")), None)
        assert told is not None, "the server did not start"
        yield told.split()[-1] + "/v1"
    finally:
        process.kill()
        process.wait(10)
        process.stdin.close()
        process.stdout.close()
