"""The plan's page: every view is drawn, assumptions go into the address and come back."""

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from gptcore.device import cpu_name
from gptcore.lab import Lab
from gptcore.plan import peaks
from gptcore.plan.assumptions import Assumptions
from gptcore.plan.peaks import MachinePeaks, Rates, keep_peaks
from gptcore.records import Request, RunState
from pages.parts import plan_state
from tests.conftest import ROOT

VIEWS = ("Size", "Memory", "Fit", "Training", "Speed", "Capacity")


def opened(**query: str) -> AppTest:
    test = AppTest.from_file(str(ROOT / "pages" / "main.py"), default_timeout=60)
    for name, value in query.items():
        test.query_params[name] = value
    test.run()
    test.switch_page("plan/plan.py")
    for name, value in query.items():
        test.query_params[name] = value
    test.run()
    assert not test.exception, test.exception
    return test


def metric(test: AppTest, label: str) -> str:
    return str(next(one.value for one in test.metric if one.label == label))


def said(test: AppTest) -> list[str]:
    return [one.value.replace("\\", "") for one in test.error]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    "query",
    [
        {},
        {"p_model": "gpt3-1.3b", "p_card": "rtx-3070", "p_precision": "int4"},
        {"p_card": "machine"},
        {"p_model": "custom", "p_card": "own"},
        {"p_work": "training", "p_tensor": "8", "p_pipeline": "32", "p_data": "4"},
        {"p_model": "tiny", "p_card": "tpu-v4"},
    ],
    ids=["plain", "small", "machine", "own", "split", "installed"],
)
def test_every_view_is_drawn(lab: Lab, view: str, query: dict[str, str]) -> None:
    test = opened(view=view, **query)
    assert [one.value for one in test.title] == ["Plan"]
    assert metric(test, "Parameters")


def test_the_numbers_of_175b_stand_there(lab: Lab) -> None:
    test = opened(view="Training", p_precision="fp32")
    assert metric(test, "All weights") == "698 GB"
    assert metric(test, "One device") == "355 years"


def test_a_claim_is_one_click_away(lab: Lab) -> None:
    test = opened(view="Training", p_model="gpt2")
    next(one for one in test.button if "15 TFLOP/s" in one.label).click().run()
    assert test.query_params["p_tflop_per_s"] == "15"
    assert metric(test, "One device") == "663 years"


def test_a_choice_goes_into_the_address_and_back(lab: Lab) -> None:
    test = opened(view="Memory")
    test.number_input(key="p_batch").set_value(9).run()
    test.selectbox(key="p_model").set_value("gpt2").run()
    assert test.query_params["p_batch"] == "9"
    again = opened(view="Memory", p_batch="9", p_model="gpt2")
    assert again.session_state["plan"] == Assumptions(batch=9, model="gpt2")


def test_a_card_brings_its_power(lab: Lab) -> None:
    test = opened(view="Fit")
    test.selectbox(key="p_card").set_value("h100").run()
    assert test.session_state["plan"].watts == 700


def test_bad_values_in_the_address_are_said_and_not_used(lab: Lab) -> None:
    test = opened(view="Nonsense", p_batch="-1", p_card="voodoo2", p_tokens="nan")
    assert len(said(test)) == 3
    assert test.session_state["plan"] == Assumptions()


def test_heads_that_do_not_divide_are_said(lab: Lab) -> None:
    test = opened(view="Size", p_model="custom", p_heads="7")
    assert any("do not divide a width" in one for one in said(test))


def test_a_model_of_a_link_that_is_not_there_is_said(lab: Lab) -> None:
    assert any("There is no model" in one for one in said(opened(p_model="gpt9")))


def test_a_file_cannot_be_read_through_the_address(lab: Lab, tmp_path: Path) -> None:
    """A name in an address comes from anybody; only the command line may name files."""
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "gpt2"}')
    (sentence,) = said(opened(p_model=str(file)))
    assert "There is no model" in sentence


def test_the_link_holds_every_assumption() -> None:
    link = plan_state.link("http://x/plan", Assumptions(), "Fit")
    assert all(f"p_{name}=" in link for name in Assumptions.model_fields)
    assert link.endswith("view=Fit")


def test_runs_stand_beside_their_prediction(
    lab: Lab, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_peaks(
        MachinePeaks(
            rates={"fp32": Rates(1e11, 1e10, 5e10, 1e10, 1e-4)}, sampling_s_per_id=1e-7,
            stream_bytes_per_s=5e9, device="cpu", device_name=cpu_name() or "", threads=1,
            torch="2",
            measured_at="2026-01-01T00:00:00+00:00", seconds=1.0,
        )
    )  # fmt: skip
    assert peaks.known_peaks() is not None
    request = Request(prompt="Once", max_new_tokens=12, ignore_eos=True)
    run_id = lab.generate(lab.variant("tiny", threads=1), request)
    assert lab.wait(run_id, 60).run.state is RunState.DONE
    test = opened(view="Speed", p_card="machine", p_precision="fp32", p_model="tiny")
    assert any("over 1 set-ups" in one.value for one in test.caption)
    assert metric(test, "Decode").endswith("tokens/s")
