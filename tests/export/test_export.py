"""What other programs read in an exported model: the same numbers, or a sentence before."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gptcore import export as exports
from gptcore import weights
from gptcore.__main__ import main
from gptcore.engine import Engine
from gptcore.errors import Cancelled, InvalidInput, NumericalError
from gptcore.export import FORMS, ExportResult, export, formats
from gptcore.export.dense import plain_of
from gptcore.export.gguf import permuted, splitting_of
from gptcore.export.huggingface import blocked_by
from gptcore.model import GPT
from gptcore.passes.base import Pass, PassContext
from gptcore.passes.cluster import Cluster
from gptcore.passes.drop_layers import DropLayers
from gptcore.passes.low_rank import LowRank
from gptcore.passes.prune import Prune
from gptcore.passes.quantize import Int3, Int4, Int8, Int8Weights
from gptcore.passes.shrink import Shrink
from gptcore.passes.smooth import Int8Static
from gptcore.passes.trim import Trim
from gptcore.records import Request
from gptcore.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from gptcore.weights.gguf_child import unpermuted
from tests.families import CASES
from tests.passes.small import GPT2, made, placed, text, with_outliers
from tests.tiny import TEXT, tiny_checkpoint

IDS = torch.tensor([[5, 17, 40, 99, 3, 111, 60, 8]])
llama_cpp_is_there = pytest.mark.skipif(
    not exports.find_spec("llama_cpp"), reason="llama-cpp-python is not installed"
)


@dataclass
class Given:
    """What ``export`` looks at in a loaded variant."""

    engine: Engine
    source: Path | None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


pytestmark = pytest.mark.usefixtures("one_thread")


def given(folder: Path, *recipe: Pass) -> Given:
    """Return the model of a folder after some passes, loaded as a host does."""
    tokenizer: Tokenizer = (
        load_tokenizer(folder) if (folder / "tokenizer.json").exists() else byte_tokenizer(211)
    )
    half = any(isinstance(one, Int4 | Int3 | Int8Weights) for one in recipe)
    placement = placed("bf16" if half else "fp32")
    model = weights.build(weights.describe(folder), placement)
    context = PassContext(placement=placement, tokenizer=tokenizer)
    vocabulary = min(200, model.spec.vocabulary)
    context.calibration_ids = text(model.spec.model_copy(update={"vocabulary": vocabulary}))
    if any(isinstance(one, Trim) for one in recipe):
        ids = tokenizer.encode(TEXT[0])
        context.calibration_ids = torch.tensor([ids] * (1 + 1024 // len(ids)))
    for one in recipe:
        model = one.apply(model, context)
    assert context.tokenizer is not None
    return Given(Engine(model, context.tokenizer), folder)


def logits(model: GPT, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).float()


def exported(one: Given, form: str, target: Path) -> ExportResult:
    return export(one, form, target)  # type: ignore[arg-type]


# Hugging Face


@pytest.mark.parametrize(
    "recipe",
    [
        (),
        (Prune(method="wanda"),),
        (DropLayers(layers=1),),
        (Shrink(neurons=0.5, groups=0.5),),
        (LowRank(share=0.6),),
        (LowRank(share=0.6, pivoted=False), Cluster(embedding=False)),
        (Cluster(unpacked=False),),
        (Trim(vocabulary="text", context=64),),
    ],
    ids=str,
)
def test_transformers_opens_a_folder_and_says_the_same(
    folder: Path, tmp_path: Path, recipe: tuple[Pass, ...]
) -> None:
    """To 1e-4 of the largest logit: sums in another order."""
    one = given(folder, *recipe)
    ids = IDS % one.engine.model.spec.vocabulary
    result = exported(one, "hf", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        found = theirs(ids).logits
    want = logits(one.engine.model, ids)
    assert (found - want).abs().max() < 1e-4 * want.abs().max()
    assert result.bytes == sum(one.stat().st_size for one in (tmp_path / "out").iterdir())
    assert ("multiplied out" in result.note) == any(isinstance(it, LowRank) for it in recipe)


@pytest.mark.parametrize("name", CASES)
def test_every_family_comes_back_as_it_came(tmp_path: Path, name: str) -> None:
    """transformers computes the same with our folder as with its own, biases and scaling too."""
    case = CASES[name]
    one = given(case.save(tmp_path / "in"))
    exported(one, "hf", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").float().eval()
    with torch.inference_mode():
        want, found = (model(IDS).logits for model in (case.model, theirs))
    assert (found - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize(
    "one",
    [Int8(), Int8Static(), Int8Weights(), Int4(group=32), Int3(group=32, embedding=True)],
    ids=repr,
)
def test_packed_layers_are_made_float_and_that_is_said(
    folder: Path, tmp_path: Path, one: Pass
) -> None:
    """The float numbers are exactly those that the codes stand for."""
    loaded = given(folder, one)
    result = exported(loaded, "hf", tmp_path / "out")
    assert "15 layers of packed numbers were made float" in result.note
    assert "activations are no longer rounded" in result.note or not isinstance(one, Int8)
    again = weights.build(weights.describe(tmp_path / "out"), placed())
    for name in ("blocks.1.mlp.down", "head"):
        layer, want = again.get_submodule(name), loaded.engine.model.get_submodule(name)
        assert torch.equal(layer.weight, want.dequantized())
    packed_embedding = getattr(one, "embedding", False)
    assert again.spec.tied_head == packed_embedding
    assert ("written beside the embedding" in result.note) != packed_embedding
    near = given(folder)
    gap = (logits(again) - logits(near.engine.model)).norm() / logits(near.engine.model).norm()
    assert gap < (1.0 if isinstance(one, Int3) else 0.5)  # of random weights


def test_the_tokenizer_and_the_chat_go_along(folder: Path, tmp_path: Path) -> None:
    exported(given(folder), "hf", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_tokenizer(tmp_path / "out")
    said = "The fox said: naïve 漢字 <|im_end|>"
    assert theirs.encode(said, split_special_tokens=True) == ours.encode(said)
    assert ours.chat_template == load_tokenizer(folder).chat_template
    assert ours.eos_ids == load_tokenizer(folder).eos_ids
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2


def test_a_shape_that_transformers_has_not_is_refused_before() -> None:
    spec = GPT2.model_copy(update={"heads": 2, "kv_heads": 2})
    said = blocked_by(spec)
    assert said is not None
    assert "2 heads of 12 in a width of 48" in said
    assert blocked_by(GPT2) is None
    choices = {one.form.name: one.blocked for one in formats(spec)}
    assert choices["hf"] == said
    assert choices["gguf-f16"] is not None
    assert choices["pt2"] is None


# GGUF


@pytest.mark.parametrize("name", ["gpt2", "llama-tied-sharded", "qwen2", "qwen3"])
def test_our_own_reader_gets_the_numbers_back(tmp_path: Path, name: str) -> None:
    """F16 keeps 11 bits: to 5e-4 of each number."""
    found = next((key for key in CASES if key.startswith(name)), None)
    assert found is not None
    one = given(CASES[found].save(tmp_path / "in"))
    spec = one.engine.model.spec
    exported(one, "gguf-f16", tmp_path / "out.gguf")
    from gptcore.weights.gguf_child import config_of, planned, wanted
    from gptcore.weights.gguf_file import GGUFFile

    file = GGUFFile(tmp_path / "out.gguf")
    config = config_of(file, spec.family)
    back = {
        name: read() for name, _, read in (planned(t, spec.family, config) for t in wanted(file))
    }
    from gptcore.weights.save import checkpoint_tensors

    want = checkpoint_tensors(plain_of(one.engine.model).model())
    assert back.keys() == want.keys()
    for key, tensor in want.items():
        assert np.allclose(back[key], tensor.numpy(), rtol=5e-4, atol=1e-6), key


def test_rotary_rows_come_back_in_order() -> None:
    rows = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)
    assert np.array_equal(unpermuted(permuted(rows, 3), 3), rows)
    assert not np.array_equal(permuted(rows, 3), rows)


def test_how_words_are_split_is_named_as_llama_cpp_does(folder: Path) -> None:
    known = json.loads((folder / "tokenizer.json").read_text())
    assert splitting_of(known) == "gpt-2"
    known["pre_tokenizer"] = {"type": "Whitespace"}
    assert splitting_of(known) is None


def llama(file: Path) -> Any:
    """Return what llama.cpp makes of a file."""
    import llama_cpp

    with warnings.catch_warnings(action="ignore"):
        return llama_cpp.Llama(
            str(file), n_ctx=128, n_threads=1, logits_all=True, verbose=False, seed=0
        )


@llama_cpp_is_there
@pytest.mark.parametrize(("form", "limit"), [("gguf-f16", 0.01), ("gguf-q8_0", 0.1)])
def test_llama_cpp_says_the_same(folder: Path, tmp_path: Path, form: str, limit: float) -> None:
    """Off by a share of all logits: F16 has 11 bits, Q8_0 has 8, and rounds activations too."""
    one = given(folder)
    exported(one, form, tmp_path / "out.gguf")
    theirs = llama(tmp_path / "out.gguf")
    ids = one.engine.tokenizer.encode(TEXT[0])[:40]
    assert theirs.tokenize(TEXT[0].encode(), add_bos=False) == one.engine.tokenizer.encode(TEXT[0])
    theirs.eval(ids)
    found = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    want = logits(one.engine.model, torch.tensor([ids]))[0]
    assert (found - want).norm() < limit * want.norm()


@llama_cpp_is_there
@pytest.mark.parametrize("name", ["gpt2", "llama-untied", "llama3-rope", "qwen2"])
def test_llama_cpp_computes_every_family(tmp_path: Path, name: str) -> None:
    """Without a tokenizer, from ids; positions, biases, scaling and a head of its own count."""
    found = next(key for key in CASES if key.startswith(name))
    one = given(CASES[found].save(tmp_path / "in"))
    result = exported(one, "gguf-f16", tmp_path / "out.gguf")
    assert "token ids only" in result.note
    theirs = llama(tmp_path / "out.gguf")
    theirs.eval(IDS[0].tolist())
    want = logits(one.engine.model)[0]
    got = torch.from_numpy(np.array(theirs.scores[: IDS.shape[1]]))
    assert (got - want).norm() < 0.02 * want.norm()


def test_a_number_too_large_for_16_bits_is_named(folder: Path, tmp_path: Path) -> None:
    one = given(folder)
    weight = one.engine.model.blocks[1].mlp.up.weight.clone()
    weight[0, 0] = 1e6
    one.engine.model.blocks[1].mlp.up.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(NumericalError, match=r"blk\.1\.ffn_up\.weight has a weight of 1,000,000"):
        exported(one, "gguf-f16", tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())
    exported(one, "gguf-q8_0", tmp_path / "out.gguf")


# ONNX and .pt2


@pytest.mark.parametrize("name", ["gpt2", "llama-untied"])
def test_onnx_runtime_says_the_same_for_any_length(tmp_path: Path, name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    one = given(CASES[next(key for key in CASES if key.startswith(name))].save(tmp_path / "in"))
    result = exported(one, "onnx", tmp_path / "out.onnx")
    assert "32 greedy tokens are the same" in result.note
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"))
    for shape in ((1, 2), (3, 30), (2, 128)):
        ids = torch.randint(0, 211, shape, generator=torch.Generator().manual_seed(shape[1]))
        (found,) = session.run(["logits"], {"ids": ids.numpy()})
        assert np.abs(found - logits(one.engine.model, ids).numpy()).max() < 1e-3


def test_a_packed_model_is_traced_as_its_float_numbers(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    one = given(folder, Int4(group=32))
    result = exported(one, "onnx", tmp_path / "out.onnx")
    assert "made float" in result.note
    assert "logits differ by" in result.note


@pytest.mark.filterwarnings("ignore")
def test_torch_export_gives_the_same_function_back(folder: Path, tmp_path: Path) -> None:
    one = given(folder, LowRank(share=0.6))
    exported(one, "pt2", tmp_path / "out.pt2")
    function = torch.export.load(tmp_path / "out.pt2").module()
    for ids in (IDS, IDS.repeat(3, 12)):
        assert torch.allclose(function(ids), logits(one.engine.model, ids), atol=1e-3)


# What holds for every form


@pytest.mark.parametrize("form", FORMS)
def test_an_export_leaves_one_thing_and_the_model_as_it_was(
    folder: Path, tmp_path: Path, form: str
) -> None:
    one = given(folder, Int8())
    before = logits(one.engine.model)
    told: list[float] = []
    target = tmp_path / f"out{FORMS[form].suffix}"
    result = export(one, form, target, told.append)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == [target]
    assert torch.equal(logits(one.engine.model), before)
    assert told == sorted(told)
    assert told[-1] == 1.0
    if target.is_file():
        assert hashlib.sha256(target.read_bytes()).hexdigest() == result.sha256
        assert target.stat().st_size == result.bytes
    with pytest.raises(InvalidInput, match="There is already something at 'out"):
        exported(one, form, target)
    assert one.engine.start(Request(prompt="Once")).prompt_ids  # it can go on


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_leaves_nothing(
    folder: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = given(folder)
    target = tmp_path / f"out{FORMS[form].suffix}"

    def full(file: Path) -> str:
        assert file.stat().st_size
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exports, "_sha256", full)  # everything is written by then
    with pytest.raises(InvalidInput, match=r"No space left on device\. Nothing of it remains"):
        exported(one, form, target)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(InvalidInput, match="has 0 MB free: make room"):
        exported(one, form, target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["hf", "gguf-q8_0"])
def test_a_cancelled_export_leaves_nothing(folder: Path, tmp_path: Path, form: str) -> None:
    one = given(folder)

    def stop(share: float) -> None:
        if share > 0.5:
            raise Cancelled("Stopped.")

    with pytest.raises(Cancelled):
        export(one, form, tmp_path / f"out{FORMS[form].suffix}", stop)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_had_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = exports.find_spec
    monkeypatch.setattr(
        exports, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    blocked = {one.form.name: one.blocked for one in formats()}
    said = "onnxscript is not installed: pip install -c constraints.txt -r requirements-export.txt"
    assert blocked == {**dict.fromkeys(FORMS), "onnx": said}
    with pytest.raises(InvalidInput, match="onnxscript is not installed: pip install"):
        exported(given(folder), "onnx", tmp_path / "out.onnx")


def test_wrong_names_are_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    one = given(folder)
    with pytest.raises(InvalidInput, match="There is no format 'tflite'; there are: hf, gguf-f16"):
        exported(one, "tflite", tmp_path / "out")
    with pytest.raises(InvalidInput, match=r"'out' does not end in \.gguf: name it so"):
        exported(one, "gguf-f16", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="could not be written"):
        exported(one, "hf", tmp_path / "file" / "out")


def test_a_model_of_random_weights_has_no_tokenizer(tmp_path: Path) -> None:
    one = Given(Engine(with_outliers(made(GPT2)), byte_tokenizer(199)), None)
    result = exported(one, "hf", tmp_path / "out")
    assert "no tokenizer" in result.note
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        found = theirs(IDS).logits
    assert torch.allclose(found, logits(one.engine.model), atol=1e-3)


def test_the_command_writes_what_it_says(
    folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiny.gguf"
    command = ["export", "--model", str(folder), "--precision", "int8", "--format", "gguf-q8_0"]
    assert main([*command, "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert said["bytes"] == out.stat().st_size
    assert said["path"] == str(out)
    assert "made float" in said["note"]
    assert main([*command, "--out", str(out)]) == 2
    assert "already something" in capsys.readouterr().err
    assert main(["export", "--format", "gguf"]) == 2
    assert main(["export", "--list"]) == 0
    assert "Hugging Face folder" in capsys.readouterr().out


# The model that people use


@pytest.mark.smollm2
@pytest.mark.slow
def test_smollm2_says_the_same_in_transformers_and_llama_cpp(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    from gptcore.weights.gguf import converted

    one = given(converted(smollm2_gguf, lambda share: None))
    prompt = one.engine.tokenizer.encode("The capital of France is")
    ids = torch.tensor([prompt])
    exported(one, "hf", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.inference_mode():
        found = theirs(ids).logits
        greedy = theirs.generate(ids, max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    assert (found - logits(one.engine.model, ids)).abs().max() < 1e-3
    request = Request(prompt="The capital of France is", temperature=0.0, max_new_tokens=16)
    ours = [token.id for token in one.engine.start(request)]
    assert ours == greedy.tolist()[: len(ours)]
    if not exports.find_spec("llama_cpp"):
        return
    for form in ("gguf-f16", "gguf-q8_0"):
        exported(one, form, tmp_path / f"{form}.gguf")
        peer = llama(tmp_path / f"{form}.gguf")
        assert peer.tokenize(b"The capital of France is", add_bos=False) == prompt
        peer.eval(prompt)
        said = []
        while len(said) < len(ours):
            said.append(int(np.argmax(peer.scores[peer.n_tokens - 1])))
            peer.eval([said[-1]])
        assert said == ours
