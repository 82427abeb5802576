"""Fetching from the hub, against a stand-in that breaks off, lies and refuses."""

from __future__ import annotations

import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import filelock
import huggingface_hub
import pytest

from gptcore import hub as module
from gptcore.catalogue import FILES, Catalogue
from gptcore.errors import Cancelled, InvalidInput, NetworkError, UnknownModel
from tests.hub_server import Hub, files_of, serving
from tests.tiny import tiny_checkpoint

NAME = "Somebody/tiny-1.5B"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture
def hub(source: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model that is as it should be."""
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.close_session()
    readme = b"---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\nlicense: none\n"
    with serving(Hub(NAME, files_of(source) | {"README.md": readme})) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served
    huggingface_hub.close_session()


@pytest.fixture
def catalogue(data_folder: Path) -> Catalogue:
    (data_folder / "models").mkdir()
    return Catalogue(data_folder / "models")


def quiet(ratio: float) -> None:
    """Tell nobody."""


def weights_of(hub: Hub) -> bytes:
    return hub.files["model.safetensors"]


def kept(data_folder: Path) -> dict[str, int]:
    """What the cache keeps for the next try."""
    folder = data_folder / "cache" / "hub"
    return {one.name: one.stat().st_size for one in folder.rglob("*") if one.is_file()}


def test_a_model_is_added_by_its_name_on_the_hub(hub: Hub, catalogue: Catalogue, data_folder: Path):
    told: list[float] = []
    assert catalogue.add(NAME, None, told.append) == "tiny-1.5B"
    entry = catalogue.entry("tiny-1.5B")
    assert entry.problem is None
    assert entry.provenance == f"hub {NAME}"
    assert entry.licence == "apache-2.0"
    assert entry.chat
    assert (entry.path / "model.safetensors").read_bytes() == weights_of(hub)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(set(told)) > 3
    assert not any(name.endswith(("safetensors", "part")) for name in kept(data_folder))


def test_only_what_a_model_needs_is_fetched(hub: Hub, catalogue: Catalogue):
    hub.files |= {
        "pytorch_model.bin": b"\x80\x02.",
        "model.gguf": b"GGUF",
        "original/model.safetensors": b"x",
        "modeling_evil.py": b"raise SystemExit",
        "tf_model.h5": b"x",
    }
    catalogue.add(NAME, "mine", quiet)
    assert sorted(name for name, _, _ in hub.asked) == sorted(
        ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    )


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/evil.safetensors", "..", "a\\..\\evil.safetensors", ".json"]
)
def test_a_hub_cannot_name_files_outside(
    hub: Hub, catalogue: Catalogue, data_folder: Path, name: str
):
    hub.listed = hub.files | {name: b"evil"}
    catalogue.add(NAME, "mine", quiet)
    assert not list(data_folder.parent.rglob("*evil*"))


def test_a_revision_cannot_lead_out(hub: Hub, catalogue: Catalogue, data_folder: Path):
    (data_folder / "cache").mkdir(exist_ok=True)
    precious = data_folder / "precious"
    precious.mkdir()
    hub.revision = "../../../precious"
    with pytest.raises((NetworkError, UnknownModel)):
        catalogue.add(NAME, "mine", quiet)
    assert precious.is_dir()


def test_a_connection_that_breaks_off_is_taken_up_where_it_ended(hub: Hub, catalogue: Catalogue):
    size = len(weights_of(hub))
    small = [name for name in hub.files if name != "model.safetensors"]
    hub.files = {"model.safetensors": weights_of(hub), **{n: hub.files[n] for n in small}}
    hub.cut_after = [1000, 30_000]
    told: list[float] = []
    catalogue.add(NAME, "mine", told.append)
    ranges = [asked for name, asked, _ in hub.asked if name == "model.safetensors"]
    assert ranges == [None, "bytes=1000-", "bytes=31000-"]
    assert (catalogue.folder / "mine" / "model.safetensors").read_bytes() == weights_of(hub)
    assert hub.sent == size + sum(len(hub.files[name]) for name in small)  # no byte twice
    assert told == sorted(told)


def test_what_came_before_the_network_went_is_kept_for_the_next_try(
    hub: Hub, catalogue: Catalogue, data_folder: Path
):
    hub.files = {"model.safetensors": weights_of(hub), **hub.files}
    hub.cut_after = [50_000] + [0] * 20
    with pytest.raises(NetworkError) as failed:
        catalogue.add(NAME, "mine", quiet)
    assert "What has come is kept; try again" in str(failed.value)
    assert str(failed.value).startswith(f"{NAME} could not be fetched: ")
    assert kept(data_folder)["model.safetensors.part"] == 50_000
    assert list(catalogue.folder.iterdir()) == []
    hub.cut_after, hub.asked, hub.sent = [], [], 0
    told: list[float] = []
    catalogue.add(NAME, "mine", told.append)
    assert hub.asked[0][:2] == ("model.safetensors", "bytes=50000-")
    assert told[0] > 50_000 / sum(map(len, hub.files.values())) * 0.99
    assert (catalogue.folder / "mine" / "model.safetensors").read_bytes() == weights_of(hub)


def test_a_file_that_is_there_is_not_fetched_again(hub: Hub, catalogue: Catalogue):
    hub.files["model.safetensors"] = hub.files.pop("model.safetensors")  # the last one
    hub.cut_after = [10**9] * (len(hub.files) - 1) + [100] + [0] * 20
    with pytest.raises(NetworkError):
        catalogue.add(NAME, "mine", quiet)
    hub.cut_after, hub.asked = [], []
    catalogue.add(NAME, "mine", quiet)
    assert [name for name, _, _ in hub.asked] == ["model.safetensors"]


def test_a_server_that_sends_only_whole_files_is_good_enough(hub: Hub, catalogue: Catalogue):
    hub.ranges = False
    hub.files = {"model.safetensors": weights_of(hub), **hub.files}
    hub.cut_after = [60_000]
    catalogue.add(NAME, "mine", quiet)
    assert (catalogue.folder / "mine" / "model.safetensors").read_bytes() == weights_of(hub)


def test_weights_that_are_not_those_of_the_list_are_thrown_away(
    hub: Hub, catalogue: Catalogue, data_folder: Path
):
    right = weights_of(hub)
    hub.listed = dict(hub.files)
    hub.files["model.safetensors"] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(NetworkError, match="not as the hub promised: it was thrown away"):
        catalogue.add(NAME, "mine", quiet)
    assert not any("model.safetensors" in name for name in kept(data_folder))
    assert list(catalogue.folder.iterdir()) == []
    hub.files["model.safetensors"] = right
    catalogue.add(NAME, "mine", quiet)


@pytest.mark.parametrize("change", [b"more", None], ids=["longer", "shorter"])
def test_a_file_of_another_length_is_refused(hub: Hub, catalogue: Catalogue, change: bytes | None):
    right = weights_of(hub)
    hub.listed = dict(hub.files)
    hub.files["model.safetensors"] = right + change if change else right[:-4]
    with pytest.raises(NetworkError, match=r"model\.safetensors"):
        catalogue.add(NAME, "mine", quiet)
    assert list(catalogue.folder.iterdir()) == []


def test_another_revision_begins_anew(hub: Hub, catalogue: Catalogue, data_folder: Path):
    hub.files = {"model.safetensors": weights_of(hub), **hub.files}
    hub.cut_after = [50_000] + [0] * 20
    with pytest.raises(NetworkError):
        catalogue.add(NAME, "mine", quiet)
    hub.revision, hub.cut_after, hub.asked = "f" * 40, [], []
    catalogue.add(NAME, "mine", quiet)
    assert hub.asked[0][:2] == ("model.safetensors", None)
    assert "model.safetensors.part" not in kept(data_folder)


def test_a_fetch_that_is_cancelled_adds_nothing_and_can_be_taken_up(
    hub: Hub, catalogue: Catalogue, data_folder: Path
):
    hub.files = {"model.safetensors": weights_of(hub), **hub.files}

    def cancel(ratio: float) -> None:
        raise Cancelled("Enough.")

    with pytest.raises(Cancelled):
        catalogue.add(NAME, "mine", cancel)
    assert list(catalogue.folder.iterdir()) == []
    there = kept(data_folder)["model.safetensors.part"]
    assert there > 0
    catalogue.add(NAME, "mine", quiet)
    asked = [one for one in hub.asked if one[0] == "model.safetensors"]
    assert len(asked) == (1 if there == len(weights_of(hub)) else 2)


REFUSALS = {
    "no such model": ((404, "RepoNotFound"), UnknownModel, "has no model"),
    "closed": ((401, "GatedRepo"), UnknownModel, "accept its conditions"),
    "closed to this token": ((403, "GatedRepo"), UnknownModel, "accept its conditions"),
    "broken": ((500, ""), NetworkError, "could not be fetched"),
    "busy": ((503, ""), NetworkError, "could not be fetched"),
}


@pytest.mark.parametrize(("refuse", "kind", "said"), REFUSALS.values(), ids=REFUSALS)
def test_a_hub_that_refuses_is_told_in_a_sentence(
    hub: Hub, catalogue: Catalogue, refuse: tuple[int, str], kind: type[Exception], said: str
):
    hub.refuse = refuse
    with pytest.raises(kind) as failed:
        catalogue.add(NAME, "mine", quiet)
    assert said in str(failed.value)
    assert "\n" not in str(failed.value)
    assert str(failed.value).endswith(".")
    assert list(catalogue.folder.iterdir()) == []


@pytest.mark.parametrize("portal", [b"", b"<html>Please log in</html>", b"{}", b"[]"])
def test_something_else_in_the_hubs_place_is_told_in_a_sentence(
    hub: Hub, catalogue: Catalogue, portal: bytes
):
    hub.portal = portal
    with pytest.raises(NetworkError, match=f"{NAME} could not be fetched"):
        catalogue.add(NAME, "mine", quiet)
    assert list(catalogue.folder.iterdir()) == []


def test_without_a_network_a_sentence_says_so(
    hub: Hub, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError) as failed:
        catalogue.add(NAME, "mine", quiet)
    assert str(failed.value).startswith(f"{NAME} could not be fetched: ")
    assert str(failed.value).endswith("What has come is kept; try again with a network.")
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("name", ["a--b/c", "a/b.git", "a/..b"])
def test_names_that_no_hub_has_are_refused(hub: Hub, catalogue: Catalogue, name: str):
    with pytest.raises(InvalidInput):
        catalogue.add(name, "mine", quiet)
    assert hub.asked == []


def test_a_model_that_is_no_gpt_is_refused_and_not_added(hub: Hub, catalogue: Catalogue):
    hub.files["config.json"] = b'{"model_type": "bert"}'
    with pytest.raises(InvalidInput, match="'bert' are not supported"):
        catalogue.add(NAME, "mine", quiet)
    assert list(catalogue.folder.iterdir()) == []


def test_a_token_goes_to_the_hub_and_not_where_it_sends_us(
    hub: Hub, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(Hub(NAME, hub.files)) as elsewhere:
        hub.moved_to = elsewhere.url
        catalogue.add(NAME, "mine", quiet)
    assert {authorization for _, _, authorization in hub.asked} == {"Bearer hf_secret"}
    assert len(elsewhere.asked) == len(hub.asked)
    assert {authorization for _, _, authorization in elsewhere.asked} == {None}


def test_a_disk_without_room_is_said_before_a_byte_is_fetched(
    hub: Hub, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(InvalidInput, match=r"needs 0\.0 GB more on disk, and 0\.0 GB are free"):
        catalogue.add(NAME, "mine", quiet)
    assert hub.asked == []


def test_one_model_is_fetched_once_at_a_time(hub: Hub, catalogue: Catalogue, data_folder: Path):
    folder = data_folder / "cache" / "hub"
    folder.mkdir(parents=True)
    with (
        filelock.FileLock(folder / f"{NAME.replace('/', '--')}.lock"),
        pytest.raises(InvalidInput, match="is being fetched already"),
    ):
        in_a_thread(lambda: module.fetch(NAME, FILES, data_folder, quiet))
    catalogue.add(NAME, "mine", quiet)


def in_a_thread(work) -> None:
    """Run ``work`` elsewhere, as a second page would, and raise what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
