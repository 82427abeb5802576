"""What every format of weights has in common: the same model, whatever it was stored as."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gptcore import weights
from gptcore.catalogue import RANDOM, Catalogue
from gptcore.device import Placement
from gptcore.errors import InvalidWeights
from gptcore.model import GPT
from gptcore.passes.base import PassContext
from gptcore.passes.quantize import Int4, Int8Weights, Quantizer
from gptcore.spec import PRESETS, ModelSpec
from gptcore.tokenizer import load_tokenizer
from gptcore.weights import Checkpoint
from tests.conftest import ROOT
from tests.families import CASES, GPT2, LLAMA, Case
from tests.gguf_files import write_gguf
from tests.tiny import tiny_checkpoint

TOLERANCE = 1e-4
"""Of logits in fp32, as in the tests of the model."""
CPU = Placement(precision="fp32", threads=1)
LONG_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

Write = Callable[[Case, Path, Path], Path]


def single(case: Case, folder: Path, tokenizer: Path) -> Path:
    case.model.save_pretrained(folder / "model")
    return folder / "model"


def sharded(case: Case, folder: Path, tokenizer: Path) -> Path:
    case.model.save_pretrained(folder / "model", max_shard_size=20_000)
    assert len(list((folder / "model").glob("*.safetensors"))) > 2
    return folder / "model"


def with_old_leftovers(case: Case, folder: Path, tokenizer: Path) -> Path:
    """What old GPT-2 files hold beside weights: a prefix, masks, and the head once more."""
    case.model.save_pretrained(folder / "model")
    file = folder / "model" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): one for name, one in load_file(file).items()}
    for layer in range(case.fields["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder / "model"


def as_gguf(case: Case, folder: Path, tokenizer: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return write_gguf(case.model, tokenizer, folder / "model.gguf")


def spoken(case: Case) -> Case:
    """The same with a vocabulary that holds a tokenizer of all bytes."""
    return Case(case.family, case.fields | {"vocab_size": 320})


@dataclass(frozen=True)
class Format:
    """A checkpoint and how it is stored."""

    case: Case
    write: Write


FORMATS = {
    "single, tied": Format(CASES["qwen2-tied-one-kv-head"], single),
    "single, untied": Format(CASES["llama-untied"], single),
    "sharded, tied": Format(CASES["llama-tied-sharded"], sharded),
    "sharded, untied": Format(CASES["llama-untied"], sharded),
    "single, gpt2": Format(CASES["gpt2"], single),
    "single, gpt2 with leftovers": Format(CASES["gpt2"], with_old_leftovers),
    "GGUF, llama untied": Format(spoken(CASES["llama-untied"]), as_gguf),
    "GGUF, llama tied": Format(spoken(CASES["llama-tied-sharded"]), as_gguf),
    "GGUF, llama own head width": Format(spoken(CASES["llama-all-heads-own-width"]), as_gguf),
    "GGUF, llama 3 rope": Format(
        spoken(Case("llama", LLAMA | {"head_dim": 16, "rope_parameters": LONG_ROPE})), as_gguf
    ),
    "GGUF, gpt2": Format(spoken(CASES["gpt2"]), as_gguf),
    "GGUF, gpt2 untied own hidden width": Format(
        spoken(Case("gpt2", GPT2 | {"n_inner": 72, "tie_word_embeddings": False})), as_gguf
    ),
    "GGUF, qwen2": Format(spoken(CASES["qwen2-biases"]), as_gguf),
    "GGUF, qwen3": Format(spoken(CASES["qwen3-norms"]), as_gguf),
}


@pytest.fixture(scope="module", autouse=True)
def own_data(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The conversions of this module go to a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTLAB_DATA", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tokenizer") / "tiny") / "tokenizer.json"


@pytest.fixture(scope="module", params=FORMATS.values(), ids=FORMATS)
def format(request: pytest.FixtureRequest) -> Format:
    return request.param


@pytest.fixture(scope="module")
def path(format: Format, tmp_path_factory: pytest.TempPathFactory, tokenizer_json: Path) -> Path:
    return format.write(format.case, tmp_path_factory.mktemp("source"), tokenizer_json)


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Checkpoint:
    return weights.describe(path)


def test_the_loaded_model_computes_what_its_source_computes(format: Format, checkpoint: Checkpoint):
    ids = torch.randint(0, 211, (2, 60), generator=torch.Generator().manual_seed(3))
    model = weights.build(checkpoint, CPU)
    with torch.inference_mode():
        expected = format.case.model(ids).logits
        found = model(ids)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_every_format_gives_the_spec_of_the_plain_one(
    format: Format, checkpoint: Checkpoint, tmp_path: Path
):
    plain = weights.describe(single(format.case, tmp_path, tmp_path))
    assert checkpoint.spec == plain.spec
    config = format.case.model.config
    assert checkpoint.spec.tied_head == config.tie_word_embeddings
    assert checkpoint.spec.layers == config.num_hidden_layers


def test_a_description_is_the_same_each_time_and_follows_content_not_place(
    path: Path, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert weights.describe(path) == checkpoint
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path / "data"))  # nothing remembered
    copy = tmp_path / f"elsewhere{path.suffix}"
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
    again = weights.describe(copy)
    assert again.weights_id == checkpoint.weights_id
    assert (again.spec, again.source_precision) == (checkpoint.spec, checkpoint.source_precision)
    assert again.stored_bytes == checkpoint.stored_bytes


def test_one_changed_weight_changes_the_weights_id(checkpoint: Checkpoint, tmp_path: Path):
    copy = shutil.copytree(checkpoint.directory, tmp_path / "changed")
    assert weights.describe(copy).weights_id == checkpoint.weights_id
    last = sorted(copy.glob("*.safetensors"))[-1]
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    assert weights.describe(copy).weights_id != checkpoint.weights_id


def test_the_stored_bytes_are_those_of_all_weights(checkpoint: Checkpoint):
    needed = checkpoint.spec.weights_bytes("fp32")
    assert needed <= checkpoint.stored_bytes < 1.6 * needed + 10_000  # headers, and leftovers


def test_progress_grows_to_one(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path))
    told: list[float] = []
    checkpoint = weights.describe(path, told.append)
    assert path.is_dir() or told[-1] == 1.0
    begun = len(told)
    weights.build(checkpoint, CPU, told.append)
    assert told[-1] == 1.0
    assert told[:begun] == sorted(told[:begun])
    assert told[begun:] == sorted(told[begun:])


@pytest.mark.parametrize(
    "one", [Int8Weights(), Int8Weights(head=False), Int4(group=32), Int4(group=32, embedding=True)]
)
def test_a_pass_makes_the_same_of_weights_as_they_are_stored(
    one: Quantizer, checkpoint: Checkpoint
):
    """Else the whole model would be there in bf16 before its first layer is packed."""
    placement = Placement(precision="bf16", threads=1)
    told: list[float] = []
    at_once, streamed = (
        weights.build(checkpoint, placement, as_stored=as_stored) for as_stored in (False, True)
    )
    assert one.converts
    assert streamed.embedding.weight.dtype == torch.float32
    assert streamed.norm.weight.dtype == torch.bfloat16
    one.apply(at_once, PassContext(placement=placement))
    one.apply(streamed, PassContext(placement=placement, progress=told.append))
    assert told[-1] == 1.0
    assert told == sorted(told)
    assert {one.dtype for one in streamed.parameters()} <= {torch.bfloat16}
    expected = at_once.state_dict()
    assert expected.keys() == streamed.state_dict().keys()
    for name, found in streamed.state_dict().items():
        assert torch.equal(found, expected[name]), name
    if not one.head and checkpoint.spec.tied_head:
        assert streamed.head.weight is streamed.embedding.weight


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_take_the_precision_of_their_placement(checkpoint: Checkpoint, precision: str):
    model = weights.build(checkpoint, Placement(precision=precision, threads=1))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    parameters = list(model.parameters())
    assert {one.dtype for one in parameters} == {dtype}
    assert not any(one.requires_grad or one.is_meta for one in parameters)
    assert (model.head.weight is model.embedding.weight) == checkpoint.spec.tied_head


def test_the_source_precision_is_said(format: Format, checkpoint: Checkpoint):
    said = {as_gguf: "F32 (GGUF)"}.get(format.write, "fp32")
    assert checkpoint.source_precision == said


def test_the_tokenizer_of_a_gguf_is_the_one_that_went_into_it(tokenizer_json: Path, tmp_path: Path):
    file = as_gguf(spoken(CASES["llama-untied"]), tmp_path, tokenizer_json)
    found = load_tokenizer(weights.describe(file).directory)
    expected = load_tokenizer(tokenizer_json.parent)
    for text in ("The fox said: how do you do?", "<|im_end|>", "  a\n\n b", "中文 😀", "12 345"):
        assert found.encode(text) == expected.encode(text)
        assert found.decode(found.encode(text)) == text
    assert found.eos_ids == expected.eos_ids == {2}
    assert found.chat_template == expected.chat_template


@pytest.mark.parametrize("begins", [True, False])
def test_a_gguf_says_whether_texts_begin_with_a_first_token(
    begins: bool, tokenizer_json: Path, tmp_path: Path
):
    case = spoken(CASES["llama-untied"])
    keys = {"tokenizer.ggml.add_bos_token": begins}
    file = write_gguf(case.model, tokenizer_json, tmp_path / "model.gguf", keys=keys)
    found = load_tokenizer(weights.describe(file).directory)
    first = [1] if begins else []
    assert found.encode_prompt("The fox") == [*first, *found.encode("The fox")]


@pytest.mark.parametrize("stored", ["bf16", "fp16", "fp64"])
def test_weights_that_are_stored_otherwise_are_those_numbers(stored: str, tmp_path: Path):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[stored]
    case = CASES["llama-untied"]
    folder = single(case, tmp_path, tmp_path)
    file = folder / "model.safetensors"
    tensors = {name: one.to(dtype) for name, one in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = weights.describe(folder)
    assert checkpoint.source_precision == stored
    found = weights.build(checkpoint, CPU).state_dict()
    rows = tensors["model.layers.1.mlp.down_proj.weight"].float()
    assert torch.equal(found["blocks.1.mlp.down.weight"], rows)


def test_files_that_changed_since_they_were_described_are_refused(tmp_path: Path):
    folder = single(CASES["llama-untied"], tmp_path, tmp_path)
    checkpoint = weights.describe(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InvalidWeights, match="not what they were"):
        weights.build(checkpoint, CPU)
    file.unlink()
    with pytest.raises(InvalidWeights, match="has no model"):
        weights.build(checkpoint, CPU)


def small(preset: str) -> ModelSpec:
    shape = {"layers": 3, "vocabulary": 500, "context": 32}
    return ModelSpec(**PRESETS[preset].model_dump() | shape)


@pytest.mark.parametrize("preset", ["gpt2", "smollm2-135m"])
class TestRandom:
    def test_the_same_seed_gives_the_same_weights_and_another_others(self, preset: str):
        spec = small(preset)
        first, again, other = (
            weights.build_random(spec, CPU, seed).state_dict() for seed in (0, 0, 1)
        )
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["embedding.weight"], other["embedding.weight"])

    def test_it_is_of_the_shape_and_computes(self, preset: str):
        spec = small(preset)
        told: list[float] = []
        model = weights.build_random(spec, CPU, progress=told.append)
        assert model.spec == spec
        assert told == sorted(told)
        assert told[-1] == 1.0
        assert sum(one.numel() for one in model.parameters()) == spec.parameters
        with torch.inference_mode():
            logits = model(torch.arange(20)[None])
        assert logits.isfinite().all()
        assert logits.std() > 0.01

    def test_its_numbers_are_spread_as_published(self, preset: str):
        spec = small(preset)
        model = weights.build_random(spec, CPU)
        found = dict(model.named_parameters())
        # Of 10⁵ draws the standard deviation is off by 0.2 % on average.
        assert found["embedding.weight"].std() == pytest.approx(0.02, rel=0.02)
        inward = found["blocks.1.attention.out.weight"].std()
        assert inward == pytest.approx(0.02 / 6**0.5, rel=0.02)
        norms = [one for name, one in found.items() if "norm" in name and "weight" in name]
        assert all((one == 1).all() for one in norms)
        biases = [one for name, one in found.items() if name.endswith("bias")]
        assert all((one == 0).all() for one in biases)
        assert bool(biases) == spec.bias


def test_a_preset_says_that_its_weights_are_random(data_folder: Path):
    (data_folder / "models").mkdir()
    spec, weights_id = Catalogue(data_folder / "models").identity("gpt2")
    assert (spec, weights_id) == (PRESETS["gpt2"], RANDOM)


def test_an_empty_model_has_no_memory_yet():
    model = weights.empty(PRESETS["gpt3-175b"])
    assert isinstance(model, GPT)
    assert all(one.is_meta for one in model.parameters())


def test_describing_and_converting_import_no_torch(tokenizer_json: Path, tmp_path: Path):
    file = as_gguf(spoken(CASES["llama-untied"]), tmp_path, tokenizer_json)
    code = (
        "import sys; from pathlib import Path\n"
        "import gptcore.weights.gguf_child\n"
        "from gptcore import weights\n"
        f"weights.describe(Path({str(file)!r}))\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "assert 'transformers' not in sys.modules, 'transformers'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_transformers_reads_what_a_gguf_becomes(tokenizer_json: Path, tmp_path: Path):
    case = spoken(CASES["llama-untied"])
    directory = weights.describe(as_gguf(case, tmp_path, tokenizer_json)).directory
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name, parameter in case.model.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], parameter), name
