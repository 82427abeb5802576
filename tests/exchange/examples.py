"""Runs to send, and files as llama-bench, vLLM and GuideLLM write them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from gptcore.exchange import Parcel
from gptcore.records import (
    Annotation,
    Measurement,
    Numbers,
    Provenance,
    Run,
    RunKind,
    RunState,
)

AT = datetime(2026, 11, 20, 9, 30, 15, 123456, tzinfo=UTC)
MADE = Provenance(
    app_version="0.3",
    git_commit="0123456789abcdef",
    python="3.11.9",
    torch="2.13.0",
    platform="Linux-6.1-x86_64",
    cpu="AMD EPYC 9R14",
    gpu=None,
    cores=2,
    memory_bytes=33_000_000_000,
    weights_hash="sha256:ab",
    threads=2,
)
NUMBERS = Numbers(
    prompt_tokens=12,
    new_tokens=33,
    finish_reason="length",
    queue_s=0.0,
    load_s=1.25,
    ttft_s=0.0625,
    tpot_s=0.01,
    e2e_s=0.3825,
    prefill_tokens_per_s=192.0,
    decode_tokens_per_s=100.0,
    peak_memory_bytes=2**40,
    mbu_ratio=0.1 + 0.2,
)


def bench(id: str = "b0b0b0b0b0b0") -> Parcel:
    """Return a bench of two cells, one of them with a batch."""
    run = Run(
        id=id,
        kind=RunKind.BENCH,
        state=RunState.DONE,
        created_at=AT,
        started_at=AT + timedelta(seconds=1),
        ended_at=AT + timedelta(seconds=31, microseconds=5),
        model="smollm2-135m",
        precision="bf16",
        device="cpu",
        variant_hash="c" * 40,
        settings={"repetitions": 3, "cells": [{"prompt_tokens": 128, "new_tokens": 33}]},
        result={"measurements": [{"name": "decode_s", "median": 0.5}], "cells": []},
    )
    observed = {
        "load_s": (1.5, 1.25),
        "pp128 tg33 b1 prefill_s": (0.1, 0.11, 0.105),
        "pp128 tg33 b1 prefill_tokens_per_s": (1280.0, 1163.6363636363637, 1219.047619047619),
        "pp128 tg33 b1 decode_s": (0.5, 0.4999999999999999, 0.512),
        "pp16 tg9 b4 decode_s": (1 / 3,),
    }
    return Parcel(
        run,
        tuple(Measurement(id, name, values) for name, values in observed.items()),
        Annotation(tags=("nightly", "ä=1"), note="=HYPERLINK(1)", pinned=True, baseline=True),
        {"model": "smollm2-135m", "placement": {"device": "cpu", "threads": 2}},
        MADE,
    )


def generation(id: str = "9e9e9e9e9e9e", text: str = "Once upon a time", **fields: Any) -> Parcel:
    """Return a generation that ended well."""
    run = Run(
        id=id,
        kind=RunKind.GENERATE,
        state=RunState.DONE,
        created_at=AT + timedelta(minutes=1),
        model="gpt2",
        precision="fp32",
        device="cuda:0",
        settings={"prompt": "Tell", "temperature": 0.8, "seed": 2**53 - 1, "stop": []},
        text=text,
        numbers=NUMBERS,
        parent_id="b0b0b0b0b0b0",
    )
    return Parcel(
        Run(**{name: getattr(run, name) for name in Run.__slots__} | fields),
        provenance=MADE,
    )


def failed(id: str = "fa11fa11fa11") -> Parcel:
    """Return a run that failed before there was a number."""
    return Parcel(
        Run(
            id=id,
            kind=RunKind.EVALUATE,
            state=RunState.FAILED,
            created_at=AT - timedelta(days=1),
            model="C:\\models\\x",
            error_kind="does_not_fit",
            error='The model needs 9.1 GiB;\nthere is "1 GiB".',
        )
    )


def llama_bench_line(**changes: Any) -> dict[str, Any]:
    """Return one object as llama-bench's JSONL holds it."""
    return {
        "build_commit": "8cf427ff",
        "build_number": 5163,
        "cpu_info": "AMD Ryzen 7 7800X3D 8-Core Processor",
        "gpu_info": "NVIDIA GeForce RTX 4080",
        "backends": "CUDA",
        "model_filename": "models/Qwen2.5-7B-Instruct-Q4_K_M.gguf",
        "model_type": "qwen2 7B Q4_K - Medium",
        "model_size": 4677120000,
        "model_n_params": 7615616512,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_threads": 8,
        "cpu_mask": "0x0",
        "cpu_strict": False,
        "poll": 50,
        "type_k": "f16",
        "type_v": "f16",
        "n_gpu_layers": -1,
        "n_cpu_moe": 0,
        "split_mode": "layer",
        "main_gpu": 0,
        "no_kv_offload": False,
        "flash_attn": -1,
        "devices": "auto",
        "tensor_split": "0.00",
        "tensor_buft_overrides": "none",
        "use_mmap": True,
        "use_direct_io": False,
        "embeddings": False,
        "no_op_offload": 0,
        "no_host": False,
        "fit_target": 0,
        "fit_min_ctx": 0,
        "n_prompt": 512,
        "n_gen": 0,
        "n_depth": 0,
        "test_time": "2025-04-24T11:58:50Z",
        "avg_ns": 72135640,
        "stddev_ns": 1453752,
        "avg_ts": 7100.002165,
        "stddev_ts": 140.341520,
        "samples_ns": [74601900, 71632900, 71745200, 71952700, 70745500],
        "samples_ts": [6863.1, 7147.55, 7136.37, 7115.79, 7237.21],
        **changes,
    }


LLAMA_BENCH = (
    llama_bench_line(),
    llama_bench_line(
        n_prompt=0,
        n_gen=128,
        test_time="2025-04-24T11:58:51Z",
        avg_ns=1076767880,
        stddev_ns=9449585,
        avg_ts=118.881588,
        stddev_ts=1.041811,
        samples_ns=[1075361300, 1065089400, 1071761200, 1081934900, 1089692600],
        samples_ts=[119.03, 120.178, 119.43, 118.307, 117.464],
    ),
)


def vllm(detailed: bool = False, **changes: Any) -> dict[str, Any]:
    """Return what ``vllm bench serve --save-result`` saves, and with ``--save-detailed``."""
    result = {
        "date": "20250714-153012",
        "endpoint_type": "vllm",
        "backend": "vllm",
        "label": None,
        "model_id": "meta-llama/Llama-3.1-8B-Instruct",
        "tokenizer_id": "meta-llama/Llama-3.1-8B-Instruct",
        "num_prompts": 3,
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": 2,
        "duration": 4.5,
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 1024,
        "total_output_tokens": 6,
        "request_throughput": 0.4444444444444444,
        "request_goodput": None,
        "output_throughput": 1.3333333333333333,
        "total_token_throughput": 228.88888888888889,
    }
    if detailed:
        result |= {
            "input_lens": [512, 512, 512],
            "output_lens": [3, 3, 0],
            "ttfts": [0.0215, 0.025, 0.0],
            "itls": [[0.0101, 0.0102], [0.0105, 0.0099], []],
            "generated_texts": ["a b c", "d e f", ""],
            "errors": ["", "", "Connection reset by peer"],
        }
    for name, scale in (("ttft", 23.0), ("tpot", 10.0), ("itl", 10.1)):
        result |= {
            f"mean_{name}_ms": scale,
            f"median_{name}_ms": scale + 0.25,
            f"std_{name}_ms": 1.5,
            f"p99_{name}_ms": scale * 2,
        }
    return result | changes


def guidellm(model: str = "Qwen/Qwen3-0.6B") -> dict[str, Any]:
    """Return a report as GuideLLM's ``benchmarks.json`` holds it, with one benchmark."""

    def spread(middle: float, count: int = 3) -> dict[str, Any]:
        ok = {
            "mean": middle,
            "median": middle + 1,
            "mode": middle,
            "variance": 4.0,
            "std_dev": 2.0,
            "min": middle - 2,
            "max": middle + 2,
            "count": count,
            "total_sum": middle * count,
            "percentiles": {"p001": middle - 2, "p50": middle + 1, "p99": middle + 2},
            "cumulative_distribution_function": None,
        }
        none = dict.fromkeys(ok, 0.0) | {"percentiles": {"p50": 0.0}}
        return {"successful": ok, "incomplete": none, "errored": none, "total": ok}

    def request(at: int) -> dict[str, Any]:
        return {
            "type_": "generative_request_stats",
            "request_id": f"r{at}",
            "prompt_tokens": 256,
            "output_tokens": 11,
            "request_latency": 0.5 + at / 10,
            "time_to_first_token_ms": 40.0 + at,
            "time_per_output_token_ms": 45.0,
            "inter_token_latency_ms": 20.0 + at if at else None,
            "output": "text of a request",
        }

    return {
        "metadata": {"version": 1, "guidellm_version": "0.4.0", "python_version": "3.12.3"},
        "args": {"target": "http://localhost:8000", "model": model, "profile": "sweep"},
        "benchmarks": [
            {
                "type_": "generative_benchmark",
                "config": {"run_id": "x", "strategy": {"type_": "constant", "rate": 2.0}},
                "scheduler_metrics": {"queued_time_avg": 0.001},
                "metrics": {
                    "request_totals": {
                        "successful": 3,
                        "incomplete": 1,
                        "errored": 2,
                        "total": 6,
                    },
                    "requests_per_second": spread(2.0),
                    "request_concurrency": spread(1.5),
                    "request_latency": spread(0.6),
                    "prompt_token_count": spread(256.0),
                    "output_token_count": spread(11.0),
                    "time_to_first_token_ms": spread(41.0),
                    "time_per_output_token_ms": spread(45.0),
                    "inter_token_latency_ms": spread(21.0),
                    "output_tokens_per_second": spread(22.0),
                    "tokens_per_second": spread(534.0),
                },
                "requests": {
                    "successful": [request(at) for at in range(3)],
                    "incomplete": [],
                    "errored": [],
                },
                "start_time": 1763630000.25,
                "end_time": 1763630030.25,
                "duration": 30.0,
            }
        ],
    }


def lines(*documents: Any) -> bytes:
    """Return JSONL."""
    return "".join(f"{json.dumps(one)}\n" for one in documents).encode()
