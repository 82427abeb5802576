"""A finished variant on disk: every pass survives the way there and back, number for number."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptcore import artifact
from gptcore.catalogue import Catalogue
from gptcore.errors import Cancelled, InvalidInput, InvalidWeights
from gptcore.host.worker import Watcher, Worker
from gptcore.model import GPT
from gptcore.passes.base import Pass
from gptcore.passes.drop_layers import DropLayers
from gptcore.passes.kv_cache import KVCacheBits
from gptcore.passes.prune import Prune
from gptcore.passes.quantize import Int4, Int8
from gptcore.passes.registry import passes
from gptcore.recipe import Calibration, Recipe, Variant, place, recipe_from_text
from gptcore.spec import ModelSpec, gpt
from gptcore.work import Loaded

LLAMA = ModelSpec(
    family="llama",
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=16,
    width=64,
    hidden=128,
    context=128,
    vocabulary=256,
    norm="rmsnorm",
    position="rotary",
    mlp="swiglu",
    bias=False,
    qkv_bias=False,
    tied_head=True,
)
SHAPES = {"llama": LLAMA, "gpt2": gpt(2, 64, 4, context=128, vocabulary=256)}
TEXT = Calibration(sequences=16, tokens=64)
IDS = torch.arange(3, 60)[None]


def variant(spec: ModelSpec, *chosen: Pass, name: str = "gpt2") -> Variant:
    for precision in ("fp32", "bf16"):
        placement, recipe = place(precision, "cpu", 1, Recipe(passes=chosen, calibration=TEXT))
        made = Variant(
            model=name, spec=spec, weights_id="random:7", placement=placement, recipe=recipe
        )
        if made.blocked_by is None:
            return made
    pytest.skip(made.blocked_by)


@pytest.fixture
def worker(data_folder: Path) -> Worker:
    return Worker("cpu", Catalogue(data_folder / "models"))


@pytest.fixture
def models(data_folder: Path) -> Path:
    (data_folder / "models").mkdir()
    return data_folder / "models"


def written(loaded: Loaded, directory: Path, **changes: bool) -> artifact.Artifact:
    return artifact.write(
        directory,
        model=loaded.engine.model,
        tokenizer=loaded.engine.tokenizer,
        tokenizer_files=None,
        variant=loaded.variant,
        coverage=loaded.coverage,
        resident_bytes=loaded.resident_bytes,
        source_precision="random",
        seconds=sum(loaded.passes_s.values()),
        peak_memory_bytes=loaded.passes_peak_bytes,
        made={"app_version": "test"},
        **changes,
    )


def logits(loaded: Loaded) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.engine.model(IDS % loaded.engine.model.spec.vocabulary).float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name in passes() if name != "trim"])
def test_a_variant_of_every_pass_comes_back_with_identical_logits(
    name: str, shape: str, worker: Worker, models: Path
) -> None:
    """The file alone is read: the pass does not run again, as its seconds tell."""
    made = worker.load(variant(SHAPES[shape], passes()[name]()), Watcher())
    before = logits(made)
    found = written(made, models / "mine")
    worker.unload()
    again = worker.load(made.variant.model_copy(update={"model": "mine"}), Watcher())
    ran = {one.name for one in made.variant.recipe.passes if one.stage.name == "RUNTIME"}
    assert set(again.passes_s) == ran
    assert torch.equal(logits(again), before)
    assert again.resident_bytes == made.resident_bytes == found.resident_bytes
    assert again.coverage == made.coverage


def test_the_same_recipe_gives_the_same_weights(worker: Worker, models: Path) -> None:
    """And another recipe gives others, else the hash would say nothing."""
    hashes = []
    for number, one in enumerate((Int4(), Int4(), Int4(group=32))):
        worker.unload()
        made = worker.load(variant(LLAMA, Prune(), one), Watcher())
        hashes.append(written(made, models / str(number)).weights_sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_further_passes_go_on_from_a_finished_variant(worker: Worker, models: Path) -> None:
    """Only the new pass runs, and the result is that of the whole recipe from the start."""
    whole = worker.load(variant(LLAMA, Prune(), Int8()), Watcher())
    expected = logits(whole)
    worker.unload()
    written(worker.load(variant(LLAMA, Prune()), Watcher()), models / "pruned")
    worker.unload()
    catalogue = Catalogue(models)
    further = catalogue.variant("pruned", recipe=Recipe(passes=(Int8(),)))
    assert further.recipe.passes == (Prune(), Int8())
    loaded = worker.load(
        further.model_copy(update={"placement": whole.variant.placement}), Watcher()
    )
    assert set(loaded.passes_s) == {"int8"}
    assert torch.equal(logits(loaded), expected)


def test_what_cannot_go_on_from_it_begins_with_what_it_was_made_of(
    worker: Worker, models: Path
) -> None:
    """Layers are dropped before quantizing; the quantized file cannot be the start of that."""
    made = worker.load(variant(LLAMA, Int8()), Watcher())
    written(made, models / "int8")
    further = Catalogue(models).variant(
        "int8", recipe=Recipe(passes=(DropLayers(),), calibration=TEXT)
    )
    assert [one.name for one in further.recipe.passes] == ["drop_layers", "int8"]
    loaded = worker.load(further, Watcher())
    assert set(loaded.passes_s) == {"drop_layers", "int8"}
    assert loaded.engine.model.spec.layers == 1


def test_passes_of_the_runtime_stay_a_recipe(worker: Worker, models: Path) -> None:
    made = worker.load(variant(LLAMA, KVCacheBits(bits=4)), Watcher())
    written(made, models / "small-cache")
    again = worker.load(Catalogue(models).variant("small-cache"), Watcher())
    assert again.variant.kv_bytes_per_token == made.variant.kv_bytes_per_token
    kinds = {type(one.engine.model.new_cache(8)) for one in (made, again)}
    assert len(kinds) == 1
    assert kinds != {type(worker.load(variant(LLAMA), Watcher()).engine.model.new_cache(8))}


def test_a_catalogue_lists_it_and_gives_its_own_precision(worker: Worker, models: Path) -> None:
    written(worker.load(variant(LLAMA, Int8()), Watcher()), models / "mine")
    catalogue = Catalogue(models)
    entry = catalogue.entry("mine")
    assert (entry.kind, entry.problem) == ("variant", None)
    assert entry.variant is not None
    assert entry.variant.precision == "int8"
    assert catalogue.variant("mine").recipe.passes == (Int8(),)
    assert catalogue.variant("mine", precision="int8").precision == "int8"
    with pytest.raises(InvalidInput, match="was made in int8 and is used as it is"):
        catalogue.variant("mine", precision="bf16")
    with pytest.raises(InvalidInput, match="both quantize"):
        catalogue.variant("mine", recipe=Recipe(passes=(Int4(),)))
    with pytest.raises(InvalidInput, match="was made for cpu"):
        catalogue.variant("mine", device="cuda:0")


@pytest.mark.parametrize("at", [200, -3])
def test_weights_that_were_changed_are_refused_by_hash(
    at: int, worker: Worker, models: Path
) -> None:
    written(worker.load(variant(LLAMA, Int8()), Watcher()), models / "mine")
    file = models / "mine" / artifact.WEIGHTS
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(InvalidWeights, match=r"were changed after they were written.*hash"):
        artifact.describe(models / "mine")
    assert "were changed" in str(Catalogue(models).entry("mine").problem)


@pytest.mark.parametrize("file", [artifact.CARD, artifact.CONFIG, artifact.WEIGHTS])
def test_a_damaged_or_missing_file_is_one_sentence(file: str, worker: Worker, models: Path) -> None:
    written(worker.load(variant(LLAMA, Int8()), Watcher()), models / "mine")
    for content in (b"{", b"{}", b"[]", None):
        path = models / "mine" / file
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InvalidWeights) as said:
            artifact.describe(models / "mine")
        assert "\n" not in str(said.value)


def test_a_config_that_lies_is_refused_when_it_is_loaded(worker: Worker, models: Path) -> None:
    found = written(worker.load(variant(LLAMA, Int8()), Watcher()), models / "mine")
    path = models / "mine" / artifact.CONFIG
    config = json.loads(path.read_text())
    modules = config["quantization_config"]["modules"]
    for lie in ({"kind": "pickle"}, {"kind": "int8_dynamic", "bits": 8}, {}):
        modules["head"] = lie
        path.write_text(json.dumps(config))
        with pytest.raises(InvalidWeights, match="mine is damaged"):
            artifact.load(found, lambda ratio: None)


def test_a_full_disk_leaves_nothing(
    worker: Worker, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = worker.load(variant(LLAMA, Int8()), Watcher())

    def full(self: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InvalidInput, match=r"No space left on device.*nothing of it was kept"):
        written(made, models / "mine")
    assert list(models.iterdir()) == []


def test_what_is_there_is_replaced_only_when_asked(worker: Worker, models: Path) -> None:
    made = worker.load(variant(LLAMA, Int8()), Watcher())
    first = written(made, models / "mine")
    with pytest.raises(InvalidInput, match="already something at 'mine'"):
        written(made, models / "mine")
    again = written(replace(made, coverage={}), models / "mine", replace=True)
    assert again.weights_sha256 == first.weights_sha256
    assert again.coverage == {}
    assert [one.name for one in models.iterdir()] == ["mine"]


def test_it_can_be_carried_to_where_its_model_is_not(
    worker: Worker, models: Path, tmp_path: Path
) -> None:
    made = worker.load(variant(LLAMA, Int8()), Watcher())
    written(made, tmp_path / "carried")
    there = Catalogue(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "carried", tmp_path / "elsewhere" / "brought")
    loaded = Worker("cpu", there).load(there.variant("brought"), Watcher())
    assert torch.equal(logits(loaded), logits(made))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int4(group=32), drop_layers(layers=1)", "the order is SHAPE, NUMBERS, RUNTIME"),
        ("smaller()", "There is no pass 'smaller'"),
        ("int4(bits=3)", "has no parameter 'bits'"),
        ("int4(group=65)", "65"),
        ("prune(sparsity=1.0)", "parsity is 1"),
        ('{"version": 2, "passes": []}', "of version 2; this program reads version 1"),
        ("int4(group=__import__('os'))", "cannot be read"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        recipe_from_text(text)


def test_a_recipe_reads_back_from_its_file_and_from_calls() -> None:
    recipe = Recipe(passes=(Prune(sparsity=0.4), Int4(group=32)), calibration=TEXT)
    assert recipe_from_text(recipe.as_file()) == recipe
    assert recipe_from_text("prune(sparsity=0.4) → int4(group_size=32)").passes == recipe.passes
    assert recipe_from_text("int4(method=gptq)") == recipe_from_text("int4(method='gptq')")


def test_what_a_killed_process_left_is_swept_away_later(models: Path) -> None:
    """Not at once: another process may be writing there."""
    for name in (".writing-abc", ".adding-abc", ".other-abc"):
        (models / name / "half").mkdir(parents=True)
    Catalogue(models).sweep()
    assert len(list(models.iterdir())) == 3
    for one in models.iterdir():
        os.utime(one, (0, 0))
    Catalogue(models).sweep()
    assert [one.name for one in models.iterdir()] == [".other-abc"]


def test_a_stop_in_a_pass_lets_the_memory_go(worker: Worker, models: Path) -> None:
    """Nothing of the half-made model is alive when the stop has come through."""
    others = weakref.WeakSet(one for one in gc.get_objects() if type(one) is GPT)
    alive: list[weakref.ref[torch.nn.Module]] = []

    def stop(phase: str, progress: float | None) -> None:
        if phase.startswith("applying"):
            alive.extend(
                weakref.ref(one)
                for one in gc.get_objects()
                if type(one) is GPT and one not in others
            )
            raise Cancelled("Stopped.")

    with pytest.raises(Cancelled):
        worker.load(variant(LLAMA, Prune()), Watcher(on_phase=stop))
    assert alive
    assert not [one for one in alive if one() is not None]
