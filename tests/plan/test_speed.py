"""Speed: the roofline's arithmetic, and predictions against runs."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from gptcore.plan.cards import card
from gptcore.plan.peaks import MachinePeaks, Rates
from gptcore.plan.speed import (
    CPU_PIECE,
    Device,
    Made,
    Setup,
    accuracy,
    card_device,
    compare,
    decode,
    machine_device,
    prefill,
    step,
)
from gptcore.records import Numbers, Run, RunKind, RunState
from gptcore.spec import PRESETS

GPT3 = PRESETS["gpt3-175b"]
FREE = Device("no overhead", Rates(1e15, 1e12, 1e15, 1e12, 0.0), 1e12, 0.0, on_cpu=False)
PEAKS = MachinePeaks(
    rates={name: Rates(1e11, 1e10, 5e10, 1e10, 1e-4) for name in ("fp32", "bf16", "int8")},
    sampling_s_per_id=1e-7,
    stream_bytes_per_s=5e9,
    device="cpu",
    device_name="a machine",
    threads=2,
    torch="2",
    measured_at="2026-01-01T00:00:00+00:00",
    seconds=1.0,
)


def test_a_decode_step_reads_every_weight_once() -> None:
    found = decode(GPT3, "fp16", FREE, 1)
    weights = sum(one.rows * one.columns * one.count for one in GPT3.linears) * 2
    assert found.bytes == pytest.approx(weights, rel=0.01)
    assert found.flop == pytest.approx(weights, rel=0.01)
    assert found.bound == "memory"
    assert found.seconds == pytest.approx(weights / 1e12, rel=0.01)


def test_a_batch_shares_the_weights_until_it_is_bound_by_arithmetic() -> None:
    one = decode(GPT3, "fp16", FREE, 1).seconds
    assert decode(GPT3, "fp16", FREE, 1, batch=64).seconds < 1.2 * one
    assert decode(GPT3, "fp16", FREE, 1, batch=4096).seconds > 2 * one


def test_prefill_is_bound_by_arithmetic_and_counts_two_flops_a_weight() -> None:
    found = step(GPT3, "fp16", FREE, tokens=512, known=0)
    assert found.bound == "compute" or found.operations[1].intensity > 100
    blocks = sum(o.flop for o in found.operations if o.name in {"q", "k", "v", "out", "up", "down"})
    layers = [one for one in GPT3.linears if one.name != "head"]
    weights = sum(one.rows * one.columns * one.count for one in layers)
    assert blocks == pytest.approx(2 * weights * 512)


def test_prefill_in_pieces_takes_longer_where_attention_looks_back() -> None:
    whole = prefill(GPT3, "fp16", FREE, 1024)
    assert whole > 2 * prefill(GPT3, "fp16", FREE, 512)


def test_a_longer_context_slows_decoding_by_its_cache() -> None:
    near, far = decode(GPT3, "fp16", FREE, 1), decode(GPT3, "fp16", FREE, 2001)
    assert far.bytes - near.bytes == pytest.approx(2000 * 4_718_592)


def test_fewer_bits_are_read_sooner() -> None:
    times = [
        decode(GPT3, precision, FREE, 128).seconds for precision in ("fp32", "fp16", "int8", "int4")
    ]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[3] == pytest.approx(7.5, rel=0.1)


def test_tensor_parallelism_gains_less_than_its_devices() -> None:
    device = card_device(card("h100"), "fp16", 0.5, 0.75)
    one, eight = (decode(GPT3, "fp16", device, 512, tensor=n).seconds for n in (1, 8))
    assert one / 8 < eight < one / 4


def test_a_card_reaches_the_share_of_its_data_sheet() -> None:
    full, half = (card_device(card("h100"), "fp16", 1, share) for share in (1.0, 0.5))
    assert half.rates.bytes_per_s == full.rates.bytes_per_s / 2


def test_no_prediction_for_a_precision_that_was_not_measured() -> None:
    assert machine_device(PEAKS, "int4") is None


def run(model: str, precision: str, tpot_s: float, **changes: object) -> Run:
    numbers = Numbers(
        prompt_tokens=int(changes.pop("prompt_tokens", 64)),
        new_tokens=int(changes.pop("new_tokens", 64)), finish_reason="length",
        queue_s=0, load_s=0, ttft_s=0.1, tpot_s=tpot_s, e2e_s=1,
        prefill_tokens_per_s=changes.pop("prefill_tokens_per_s", None),
        decode_tokens_per_s=1, peak_memory_bytes=1, mbu_ratio=None,
    )  # fmt: skip
    return Run(
        id="a", kind=RunKind.GENERATE, state=RunState.DONE, created_at=datetime.now(UTC),
        model=model, precision=precision, device=str(changes.get("device", "cpu")), numbers=numbers,
        variant_hash=str(changes.get("model_hash", "plain")),
    )  # fmt: skip


def test_runs_of_one_setup_are_one_median() -> None:
    runs = [run("gpt2", "fp32", seconds) for seconds in (0.05, 0.9, 0.06)]
    (setup,) = compare(runs, PRESETS, PEAKS).setups
    assert (setup.runs, setup.measured_s, setup.tokens, setup.what) == (3, 0.06, 96, "decode")
    device = machine_device(PEAKS, "fp32")
    assert device is not None
    predicted = decode(PRESETS["gpt2"], "fp32", device, 96).seconds
    assert setup.residual == pytest.approx(0.06 / predicted - 1)


def test_what_cannot_be_compared_is_counted_by_reason() -> None:
    runs = [
        run("gone", "fp32", 0.05),
        run("gpt2", "int4", 0.05),
        run("gpt2", "fp32", 0.05, device="cuda:0"),
        run("gpt2", "fp32", 0.05, new_tokens=3),
        run("gpt2", "bf16", 0.05),
        run("gpt2", "fp32", 0.05, model_hash="pruned"),
        run("gpt2", "fp32", 0.05, model_hash="arrived"),
    ]

    def made(run: Run) -> Made:
        passes = ("prune",) if run.variant_hash == "pruned" else ()
        machine = "another one" if run.variant_hash == "arrived" else PEAKS.device_name
        return Made(1 if run.precision == "bf16" else 2, passes, machine)

    found = compare(runs, PRESETS, PEAKS, made)
    assert not found.setups
    assert sorted(found.left_out.values()) == [1, 1, 1, 1, 1, 2]
    assert compare(runs, PRESETS, None).left_out["this machine's peaks are not measured"] == 5


def test_the_pass_of_a_precision_is_no_reason_to_leave_a_run_out() -> None:
    (setup,) = compare(
        [run("gpt2", "int8", 0.05)], PRESETS, PEAKS, lambda run: Made(2, ("int8",))
    ).setups
    assert setup.precision == "int8"


def test_a_bench_tells_of_prefill_and_of_batches() -> None:
    cell = {"prompt_tokens": 128, "new_tokens": 17, "batch": 4}
    bench = replace(
        run("gpt2", "fp32", 0.0),
        kind=RunKind.BENCH,
        numbers=None,
        result={
            "measurements": [
                {"name": "load_s", "median": 3.0},
                {"name": "prefill_s", "median": 2.0, **cell},
                {"name": "decode_s", "median": 1.6, **cell},
                {"name": "decode_s", "median": 1.6, **cell, "new_tokens": 4},
            ]
        },
    )
    decoding, reading = compare([bench], PRESETS, PEAKS).setups
    assert (decoding.what, decoding.tokens, decoding.batch) == ("decode", 136, 4)
    assert decoding.measured_s == pytest.approx(0.1)
    assert (reading.what, reading.tokens, reading.measured_s) == ("prefill", 128, 2.0)
    device = machine_device(PEAKS, "fp32")
    assert device is not None
    quiet = replace(device, sampling_s_per_id=0.0)
    assert decoding.predicted_s == decode(PRESETS["gpt2"], "fp32", quiet, 136, 4).seconds
    assert reading.predicted_s == prefill(PRESETS["gpt2"], "fp32", quiet, 128, 4)


def test_the_prompt_of_a_generation_is_a_setup_of_its_own() -> None:
    long = run("gpt2", "fp32", 0.05, prompt_tokens=200, prefill_tokens_per_s=100.0)
    assert [(one.what, one.measured_s) for one in compare([long], PRESETS, PEAKS).setups] == [
        ("decode", 0.05),
        ("prefill", 2.0),
    ]


def test_several_positions_at_once_have_an_overhead_of_their_own() -> None:
    rates = Rates(1e15, 1e12, 1e15, 1e12, 1e-6, 1e-3)
    device = Device("native for one", rates, 1e12, 0.0, on_cpu=True)
    spec = PRESETS["gpt2"]
    assert decode(spec, "fp32", device, 8).overhead_s == pytest.approx(12e-6)
    assert decode(spec, "fp32", device, 8, batch=2).overhead_s == pytest.approx(12e-3)
    assert step(spec, "fp32", device, tokens=2, known=0).overhead_s == pytest.approx(12e-3)


def test_a_cpu_reads_a_prompt_in_the_engines_pieces() -> None:
    from gptcore.engine import CPU_CHUNK

    assert CPU_PIECE == CPU_CHUNK


def test_an_endless_prompt_is_predicted_from_few_pieces() -> None:
    """A piece reads all weights; a thousand times the pieces would be a thousand times slower."""
    seconds = prefill(GPT3, "fp16", FREE, 10_000_000)
    assert seconds > 4 * prefill(GPT3, "fp16", FREE, 2_500_000)


def setup(precision: str, ratio: float) -> Setup:
    return Setup("m", precision, 1, "decode", 100, 1, 1, ratio * 0.01, 0.01)


def test_a_constant_error_is_corrected_by_the_others() -> None:
    found = accuracy(tuple(setup("fp32", 1.5) for _ in range(5)), {})
    assert found.median_error == pytest.approx(0.5)
    assert found.corrected_error == pytest.approx(0.0)
    assert (found.low, found.high) == pytest.approx((1.0, 1.0))


def test_the_band_is_of_setups_that_had_no_part_in_their_correction() -> None:
    """One outlier in five: its own value would shrink its error, leaving it out must not."""
    found = accuracy((*(setup("fp32", 1.0) for _ in range(4)), setup("fp32", 3.0)), {})
    assert found.high == pytest.approx(1 + 0.6 * 2)
    assert found.corrected_error == pytest.approx(0.0)


def test_few_setups_give_no_band() -> None:
    assert accuracy((setup("fp32", 1.0),) * 3, {}).corrected_error is None
    assert accuracy((), {}).median_error is None
