"""The process that `llama_cpp` starts: reads its settings from standard input, says its address, ends with its parent.

{"model": PATH, "lora": PATH or null, "context": 1024, "key": SECRET}  ->  http://127.0.0.1:PORT
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Serve until standard input ends, as it does when the parent is killed."""
    import xllamacpp

    settings = json.loads(sys.stdin.readline())
    # the library writes its log to standard output too, on which the parent waits for the address alone
    told = os.dup(1)
    os.dup2(2, 1)
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    if settings["lora"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(settings["lora"], 1.0)]
    params.n_ctx = settings["context"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    params.ui = False
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.api_keys = [settings["key"]]
    params.port = 0
    server = xllamacpp.Server(params)
    os.write(told, (server.listening_address + "\n").encode())
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
