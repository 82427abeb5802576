"""Files of llama-bench, vLLM and GuideLLM: our names, our units, nothing claimed that they lack."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from gptcore.errors import InvalidInput
from gptcore.exchange import MAPPING, Arrived, Format, Source, export, imported, read
from gptcore.records import RunKind, RunState
from tests.exchange.examples import LLAMA_BENCH, guidellm, lines, llama_bench_line, vllm


def measured(arrived: Arrived) -> dict[str, tuple[float, ...]]:
    (parcel,) = arrived.parcels
    return {one.name: one.observations for one in parcel.measurements}


FILES = {
    "llama-bench": lines(*LLAMA_BENCH),
    "vllm": json.dumps(vllm()).encode(),
    "vllm, detailed": json.dumps(vllm(detailed=True)).encode(),
    "guidellm": json.dumps(guidellm()).encode(),
}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_it_is_a_finished_bench_of_unknown_provenance(data: bytes) -> None:
    (parcel,) = read(data).parcels
    run = parcel.run
    assert (run.kind, run.state) == (RunKind.BENCH, RunState.DONE)
    assert (run.precision, run.variant_hash, run.numbers) == ("", None, None)
    assert parcel.provenance is None
    came = imported(run)
    assert came is not None
    assert came.provenance is None
    assert came.origin is not None
    assert came.origin["from"] == came.source.value
    assert {one.run_id for one in parcel.measurements} == {run.id}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_the_same_file_gives_the_same_run(data: bytes) -> None:
    assert read(data) == read(data)


@pytest.mark.parametrize("form", Format)
@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_it_can_be_sent_on_to_the_byte_and_keeps_its_origin(data: bytes, form: Format) -> None:
    first = read(data).parcels
    out = export(first, form)
    if not out.runs:  # llama-bench measures nothing of what a server's benchmark does
        assert out.without_tests == 1
        return
    second = read(out.data).parcels
    assert export(second, form).data == out.data
    one, two = imported(first[0].run), imported(second[0].run)
    assert one is not None
    assert two is not None
    assert one.origin == two.origin


def test_llama_bench_in_seconds_and_under_the_names_of_our_cells() -> None:
    found = measured(read(lines(*LLAMA_BENCH)))
    assert set(found) == {
        "pp512 tg1 b1 prefill_s",
        "pp512 tg1 b1 prefill_tokens_per_s",
        "pp0 tg129 b1 decode_s",
        "pp0 tg129 b1 decode_tokens_per_s",
    }
    assert found["pp512 tg1 b1 prefill_s"][0] == 0.0746019
    assert found["pp0 tg129 b1 decode_s"][0] == 1.0753613
    for name, theirs in (("pp512 tg1 b1 prefill", 0), ("pp0 tg129 b1 decode", 1)):
        assert found[f"{name}_tokens_per_s"] == pytest.approx(
            LLAMA_BENCH[theirs]["samples_ts"], rel=1e-5
        )


def test_llama_bench_goes_out_with_its_own_numbers() -> None:
    """Every field as it came, and ours only under our key."""
    out = export(read(lines(*LLAMA_BENCH)).parcels, Format.LLAMA_BENCH).data
    back = {one["n_gen"]: one for one in map(json.loads, out.splitlines())}
    for theirs in LLAMA_BENCH:
        ours = back[theirs["n_gen"]]
        del ours["gptlab"]
        exact = set(theirs) - {"avg_ts", "stddev_ts", "samples_ts", "test_time"}
        assert {name: ours[name] for name in exact} == {name: theirs[name] for name in exact}
        assert ours["samples_ts"] == pytest.approx(theirs["samples_ts"], rel=1e-5)
        assert ours["avg_ts"] == pytest.approx(theirs["avg_ts"], abs=2e-6)
        assert ours["stddev_ts"] == pytest.approx(theirs["stddev_ts"], abs=2e-6)


def test_llama_bench_as_a_json_list_is_the_same() -> None:
    ours, theirs = read(json.dumps(LLAMA_BENCH).encode()), read(lines(*LLAMA_BENCH))
    assert ours == theirs


def test_each_model_and_setting_of_llama_bench_is_a_run() -> None:
    other = llama_bench_line(n_threads=4)
    arrived = read(lines(*LLAMA_BENCH, other))
    assert len(arrived.parcels) == 2
    one, two = arrived.parcels
    assert one.run.model == two.run.model == "models/Qwen2.5-7B-Instruct-Q4_K_M.gguf"
    assert one.run.device == "cuda"
    assert one.run.created_at == datetime(2025, 4, 24, 11, 58, 50, tzinfo=UTC)


def test_a_field_that_is_not_in_the_table_is_named_and_kept() -> None:
    arrived = read(lines(llama_bench_line(moe_cache="auto")))
    assert arrived.unmapped == ("moe_cache",)
    came = imported(arrived.parcels[0].run)
    assert came is not None
    assert came.origin is not None
    assert came.origin["fields"]["moe_cache"] == "auto"
    assert came.origin["fields"]["gpu_info"] == "NVIDIA GeForce RTX 4080"


def test_prompt_and_generation_together_have_no_name_here() -> None:
    (parcel,) = read(lines(llama_bench_line(n_gen=64), llama_bench_line())).parcels
    assert {one.name for one in parcel.measurements} == {
        "pp512 tg1 b1 prefill_s",
        "pp512 tg1 b1 prefill_tokens_per_s",
    }
    came = imported(parcel.run)
    assert came is not None
    assert came.origin is not None
    assert came.origin["fields"]["tests_that_have_no_name_here"] == 1


def test_vllm_under_our_names_and_in_seconds() -> None:
    arrived = read(json.dumps(vllm()).encode())
    found = measured(arrived)
    assert found["ttft_median_s"] == pytest.approx((0.02325,))
    assert found["ttft_p99_s"] == pytest.approx((0.046,))
    assert found["itl_std_s"] == pytest.approx((0.0015,))
    assert found["tpot_mean_s"] == pytest.approx((0.01,))
    assert found["output_tokens_per_s"] == (1.3333333333333333,)
    assert (found["completed_requests"], found["failed_requests"]) == ((2,), (1,))
    assert (found["prompt_tokens"], found["new_tokens"]) == ((1024,), (6,))
    assert "goodput_requests_per_s" not in found, "null is not zero"
    assert "ttft_s" not in found, "there are no observations, only statistics of them"
    run = arrived.parcels[0].run
    assert run.model == "meta-llama/Llama-3.1-8B-Instruct"
    assert run.created_at == datetime(2025, 7, 14, 15, 30, 12, tzinfo=UTC)
    assert "request_rate" in arrived.unmapped
    assert not {"date", "model_id", "duration", "median_ttft_ms"} & set(arrived.unmapped)


def test_vllms_details_are_observations_without_the_failed_requests() -> None:
    arrived = read(json.dumps(vllm(detailed=True)).encode())
    found = measured(arrived)
    assert found["ttft_s"] == (0.0215, 0.025)
    assert found["itl_s"] == (0.0101, 0.0102, 0.0105, 0.0099)
    assert {"generated_texts", "errors", "input_lens", "output_lens"} <= set(arrived.unmapped)


def test_results_that_vllm_appended_are_a_run_each() -> None:
    """``--append-result`` writes one object a line."""
    data = lines(vllm(), vllm(date="20250714-160000", model_id="gpt2"))
    assert [one.run.model for one in read(data).parcels] == [
        "meta-llama/Llama-3.1-8B-Instruct",
        "gpt2",
    ]


def test_what_guidellm_calls_inter_token_latency_is_our_tpot() -> None:
    arrived = read(json.dumps(guidellm()).encode())
    found = measured(arrived)
    assert found["tpot_s"] == pytest.approx((0.021, 0.022)), "None is left out"
    assert found["tpot_median_s"] == pytest.approx((0.022,))
    assert found["ttft_s"] == pytest.approx((0.040, 0.041, 0.042))
    assert found["ttft_p99_s"] == pytest.approx((0.043,))
    assert found["ttft_std_s"] == pytest.approx((0.002,))
    assert found["ttft_p0.1_s"] == pytest.approx((0.039,))
    assert found["e2e_s"] == pytest.approx((0.5, 0.6, 0.7))
    assert found["prompt_tokens"] == (768.0,)
    assert found["output_tokens_per_s"] == (22.0,)
    assert [found[f"{name}_requests"] for name in ("completed", "failed", "incomplete")] == [
        (3,),
        (2,),
        (1,),
    ]
    assert not any(name.startswith("itl") for name in found)
    assert "metrics.time_per_output_token_ms" in arrived.unmapped, "it counts the first token"
    assert "metrics.request_concurrency" in arrived.unmapped
    assert not {"duration", "metrics.request_latency", "requests"} & set(arrived.unmapped)


def test_each_benchmark_of_guidellm_is_a_run() -> None:
    report = guidellm()
    report["benchmarks"] *= 1
    second = json.loads(json.dumps(report["benchmarks"][0]))
    second["config"]["strategy"]["rate"] = 4.0
    report["benchmarks"].append(second)
    one, two = read(json.dumps(report).encode()).parcels
    assert one.run.id != two.run.id
    assert one.run.model == "Qwen/Qwen3-0.6B"
    assert one.run.created_at == datetime.fromtimestamp(1763630000.25, UTC)
    assert one.run.ended_at == datetime.fromtimestamp(1763630030.25, UTC)
    came = imported(two.run)
    assert came is not None
    assert came.origin is not None
    assert came.origin["fields"]["config"]["strategy"]["rate"] == 4.0
    assert came.origin["fields"]["metadata"]["guidellm_version"] == "0.4.0"


def test_texts_of_requests_are_not_brought_in() -> None:
    for data in (FILES["guidellm"], FILES["vllm, detailed"]):
        (parcel,) = read(data).parcels
        assert "text of a request" not in str(parcel)
    long = vllm(detailed=True, generated_texts=["x" * 5000] * 3)
    assert "xxx" not in str(read(json.dumps(long).encode()).parcels)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (json.dumps(vllm(date="yesterday")), "Result 1 of the file: date is 'yesterday'"),
        (json.dumps(vllm(duration=float("nan"))), "duration is nan; it must be finite"),
        (json.dumps({"benchmarks": []}), "holds no benchmark"),
        (json.dumps({"benchmarks": [{"metrics": {}, "start_time": "x"}]}), "a time is 'x'"),
        (
            json.dumps({"benchmarks": [{"metrics": {}, "start_time": 1, "end_time": 2}]}),
            "none of the numbers that are known",
        ),
        (json.dumps(llama_bench_line(samples_ns=[0])), "Line 1: samples_ns must be"),
        (json.dumps(llama_bench_line(samples_ns="many")), "Line 1: samples_ns must be"),
        (json.dumps(llama_bench_line(n_prompt=0)), "a test of no tokens"),
        (json.dumps(llama_bench_line(n_prompt=-1)), "must be whole numbers"),
        (json.dumps(llama_bench_line(n_prompt="512")), "must be whole numbers"),
        (json.dumps(llama_bench_line(test_time="noon")), "test_time is 'noon'"),
    ],
)
def test_what_is_wrong_in_it_is_said_in_a_sentence(data: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        read(data.encode())


def test_the_mapping_is_a_table_that_a_page_can_show() -> None:
    assert {one.source for one in MAPPING} == {Source.VLLM, Source.GUIDELLM}
    names = [(one.source, one.theirs) for one in MAPPING]
    assert len(set(names)) == len(names)
    for one in MAPPING:
        assert one.factor == (1e-3 if "_ms" in one.theirs else 1.0)
        assert one.theirs.count("*") == one.ours.count("*")
