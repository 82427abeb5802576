"""GGUF files: every stored type, the bounds of the child that reads them, and damaged files."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import _type_traits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from gptcore import weights
from gptcore.device import Placement
from gptcore.errors import Cancelled, InvalidSpec, InvalidWeights
from gptcore.weights import gguf as bounded
from gptcore.weights.gguf_child import convert
from gptcore.weights.gguf_file import GGUFFile, Refused
from tests.conftest import ROOT
from tests.families import CASES, LLAMA, Case
from tests.gguf_files import (
    BOMB,
    add_tokenizer,
    array_key,
    finish,
    head,
    tensor_entry,
    text,
    write_gguf,
)
from tests.tiny import tiny_checkpoint

READABLE = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, *_type_traits)
UNREADABLE = tuple(kind for kind in GGML_QUANT_SIZES if kind not in READABLE)
ROWS, COLUMNS = 33, 512
"""No multiple of the 16 rows that the package takes at a time; two of its largest blocks."""
ids_of_types = [kind.name for kind in READABLE]


@pytest.fixture(scope="module", autouse=True)
def own_data(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTLAB_DATA", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tokenizer") / "tiny") / "tokenizer.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: Path) -> Path:
    """A file that can be read."""
    case = Case("llama", LLAMA | {"vocab_size": 320})
    return write_gguf(case.model, tokenizer_json, tmp_path_factory.mktemp("whole") / "model.gguf")


def stored(kind: GGMLQuantizationType) -> np.ndarray:
    """(33, bytes a row) of ``kind``: real values where the package can quantize, else any bytes."""
    random = np.random.default_rng(int(kind))
    try:
        values = random.normal(size=(ROWS, COLUMNS)).astype(np.float32)
        return gguf.quantize(values, kind).view(np.uint8).reshape(ROWS, -1)
    except NotImplementedError:
        block, size = GGML_QUANT_SIZES[kind]
        return random.integers(0, 256, (ROWS, COLUMNS // block * size), dtype=np.uint8)


def start_of(file: Path, tokenizer_json: Path, architecture: str = "llama") -> gguf.GGUFWriter:
    """A writer that has everything but tensors."""
    writer = gguf.GGUFWriter(file, architecture)
    for add in (writer.add_block_count, writer.add_head_count, writer.add_head_count_kv):
        add(2)
    for add in (writer.add_context_length, writer.add_feed_forward_length):
        add(64)
    writer.add_embedding_length(COLUMNS)
    writer.add_layer_norm_rms_eps(1e-5)
    add_tokenizer(writer, json.loads(tokenizer_json.read_text()), 320)
    return writer


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: Path) -> Path:
    """What the child made of one file that holds a tensor of every type."""
    writer = start_of(tmp_path_factory.mktemp("types") / "types.gguf", tokenizer_json)
    writer.add_tensor("token_embd.weight", np.zeros((320, COLUMNS), np.float32))
    for kind in READABLE:
        name = f"blk.{int(kind)}.ffn_up.weight"
        writer.add_tensor(name, stored(kind), raw_shape=stored(kind).shape, raw_dtype=kind)
    return bounded.converted(finish(writer), lambda ratio: None)


def test_the_package_dequantizes_the_types_that_are_tested_here():
    assert len(READABLE) > 20
    assert {"Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "BF16"} <= set(ids_of_types)


@pytest.mark.parametrize("kind", READABLE, ids=ids_of_types)
def test_every_type_becomes_the_numbers_of_the_package(kind: GGMLQuantizationType, converted: Path):
    with np.errstate(all="ignore"):  # any bytes make infinities too
        expected = gguf.dequantize(stored(kind), kind)
    with safe_open(converted / "model.safetensors", framework="np") as opened:
        found = opened.get_tensor(f"model.layers.{int(kind)}.mlp.up_proj.weight")
    assert expected.shape == found.shape == (ROWS, COLUMNS)
    assert np.unique(expected).size > 2
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", UNREADABLE, ids=[kind.name for kind in UNREADABLE])
def test_a_type_that_the_package_cannot_read_is_refused_by_name(
    kind: GGMLQuantizationType, tmp_path: Path
):
    block, size = GGML_QUANT_SIZES[kind]
    start = head(tensors=1) + tensor_entry("w", (block, 2), int(kind))
    (tmp_path / "x.gguf").write_bytes(
        start.ljust(-(-len(start) // 32) * 32, b"\0") + b"\1" * size * 2
    )
    tensor = GGUFFile(tmp_path / "x.gguf").tensors["w"]
    assert (tensor.type_name, tensor.shape) == (kind.name, (2, block))
    with pytest.raises(Refused, match=rf"'w' is stored as {kind.name}"):
        tensor.dequantized()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "BF16"])
def test_a_quantized_model_computes_with_the_numbers_that_its_file_keeps(
    name: str, tokenizer_json: Path, tmp_path: Path
):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    case = Case("llama", LLAMA | sizes | {"vocab_size": 320})
    kind = GGMLQuantizationType[name]
    file = write_gguf(case.model, tokenizer_json, tmp_path / "model.gguf", kind)
    checkpoint = weights.describe(file)
    assert checkpoint.source_precision == f"{name} (GGUF)"
    with torch.no_grad():
        for parameter in case.model.parameters():
            if parameter.ndim == 2:
                values = parameter.numpy()
                parameter.copy_(
                    torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind))
                )
    ids = torch.randint(0, 320, (1, 50), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        found = weights.build(checkpoint, Placement(threads=1))(ids)
        torch.testing.assert_close(found, case.model(ids).logits, atol=1e-4, rtol=0)


def aligned(content: bytes) -> bytes:
    return content.ljust(-(-len(content) // 32) * 32, b"\0")


def string_key(name: str, value: str) -> bytes:
    return text(name) + struct.pack("<I", 8) + text(value)


def integer_key(name: str, value: int) -> bytes:
    return text(name) + struct.pack("<II", 4, value)


DAMAGED = {
    "empty": (b"", "0 bytes: it is empty or cut off"),
    "a few bytes": (b"GGUF\3\0\0", "7 bytes"),
    "another format": (head(word=b"GGML"), "does not begin with that word"),
    "a zip": (b"PK\3\4" + b"\0" * 60, "does not begin with that word"),
    "a pickle": (b"\x80\x04\x95" + b"\0" * 60, "does not begin with that word"),
    "version 1": (head(version=1), "GGUF version 1; versions 2 and 3"),
    "version 4": (head(version=4), "GGUF version 4"),
    "the other byte order": (head(version=0x03000000), "GGUF version 50331648"),
    "giant count of tensors": (head(tensors=2**63), "damaged"),
    "giant count of keys": (head(keys=2**64 - 1), "damaged"),
    "more keys than fit": (head(keys=2) + b"\0", "promises 0 tensors and 2 keys"),
    "an array of 2^62 numbers": (BOMB, "4,611,686,018,427,387,904 bytes"),
    "an array of 2^62 texts": (head(keys=1) + array_key("a", 8, 2**62), "claims an array"),
    "an array of 2^62 arrays": (head(keys=1) + array_key("a", 9, 2**62), "claims an array"),
    "arrays in arrays": (
        head(keys=1) + array_key("a", 9, 1, struct.pack("<IQ", 9, 1) * 9),
        "more than 3 deep",
    ),
    "a giant name": (head(keys=1) + struct.pack("<Q", 2**62) + b"a" * 20, "name of a key has"),
    "a giant text": (
        head(keys=1) + text("a") + struct.pack("<IQ", 8, 2**62),
        "more than the 45 allowed",
    ),
    "a name that is no text": (head(keys=1) + text(b"\xff\xfe") + b"\0" * 20, "no UTF-8 text"),
    "texts that are no text": (
        head(keys=1) + array_key("a", 8, 1, text(b"\xff")),
        "no UTF-8 text at byte",
    ),
    "texts that run out": (
        head(keys=1) + array_key("a", 8, 2, text("x") + struct.pack("<Q", 99)),
        "runs beyond the end",
    ),
    "an unknown kind of value": (
        head(keys=1) + text("a") + struct.pack("<I", 77) + b"\0" * 8,
        "unknown type 77",
    ),
    "five dimensions": (head(tensors=1) + tensor_entry("w", (1,) * 5), "5 dimensions"),
    "no dimension": (aligned(head(tensors=1) + tensor_entry("w", ())) + b"\0" * 32, "shape"),
    "an empty tensor": (head(tensors=1) + tensor_entry("w", (0, 4)), "shape"),
    "a giant tensor": (head(tensors=1) + tensor_entry("w", (2**63, 2**63)), "ends at byte"),
    "half a block": (head(tensors=1) + tensor_entry("w", (20, 2), 2), "no whole blocks of 32"),
    "an unknown type of tensor": (
        head(tensors=1) + tensor_entry("w", (4,), 999),
        "unknown type 999",
    ),
    "a tensor behind the end": (
        aligned(head(tensors=1) + tensor_entry("w", (4,), offset=2**40)) + b"\0" * 32,
        "ends at byte",
    ),
    "the same name twice": (
        aligned(head(tensors=2) + tensor_entry("w", (4,)) * 2) + b"\0" * 64,
        "'w' occurs twice",
    ),
    "tensors that overlap": (
        aligned(head(tensors=3) + b"".join(tensor_entry(n, (64,)) for n in "abc")) + b"\0" * 256,
        "they overlap",
    ),
    "an alignment of nothing": (
        head(tensors=1, keys=1)
        + integer_key("general.alignment", 0)
        + tensor_entry("w", (4,))
        + b"\0" * 64,
        "alignment is 0",
    ),
    "an alignment of words": (
        head(keys=1) + string_key("general.alignment", "thirty-two") + b"\0" * 64,
        "alignment is thirty-two",
    ),
}


@pytest.mark.parametrize(("content", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_header_is_refused_at_once(content: bytes, said: str, tmp_path: Path):
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    begin = time.monotonic()
    with pytest.raises(Refused) as refused:
        GGUFFile(file)
    assert time.monotonic() - begin < 1
    assert said in str(refused.value)
    assert len(str(refused.value)) < 300


def test_the_bomb_has_49_bytes_and_is_refused_in_seconds(tmp_path: Path):
    assert len(BOMB) == 49
    (tmp_path / "bomb.gguf").write_bytes(BOMB)
    begin = time.monotonic()
    with pytest.raises(InvalidWeights) as refused:
        weights.describe(tmp_path / "bomb.gguf")
    assert time.monotonic() - begin < 5
    said = str(refused.value)
    assert said.startswith("bomb.gguf cannot be read: its key 'a' claims 4,611,686,018,427,387,904")
    assert said.endswith(".")
    assert "\n" not in said


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_off_is_refused(share: float, whole: Path, tmp_path: Path):
    content = whole.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(Refused):
        GGUFFile(tmp_path / "cut.gguf")


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_change_of_a_header_is_read_or_refused_but_never_breaks(
    data: st.DataObject, whole: Path, tmp_path_factory: pytest.TempPathFactory
):
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 9000))
        content[at] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "changed.gguf"
    file.write_bytes(content)
    try:
        found = GGUFFile(file)
    except Refused:
        return
    assert all(one.data.size <= len(content) for one in found.tensors.values())


def test_a_header_is_what_the_reader_of_the_package_finds(whole: Path):
    ours, theirs = GGUFFile(whole), gguf.GGUFReader(whole)
    assert set(ours.keys) == {key for key in theirs.fields if not key.startswith("GGUF.")}
    for key, value in ours.keys.items():
        expected = theirs.get_field(key).contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(tensor.shape[::-1])
        assert found.type == tensor.tensor_type
        np.testing.assert_array_equal(found.dequantized().ravel(), tensor.data.ravel())


FOREIGN = {
    "another architecture": ({"general.architecture": "mamba"}, "architecture is 'mamba'"),
    "another tokenizer": ({"tokenizer.ggml.model": "llama"}, "kind 'llama'"),
    "unknown splitting": ({"tokenizer.ggml.pre": "martian"}, "splits words ('martian')"),
    "another rotary scaling": ({"llama.rope.scaling.type": "yarn"}, "scaling 'yarn'"),
    "a shape in words": ({"llama.embedding_length": "wide"}, "embedding_length is missing or no"),
    "more heads than rows": ({"llama.attention.head_count": 5}, "5 heads cannot share"),
    "no heads": ({"llama.attention.head_count": 0}, "0 heads cannot share"),
    "another number of types": ({"tokenizer.ggml.tokens": ["a", "b"]}, "another number of types"),
    "merges that merge nothing": ({"tokenizer.ggml.merges": ["q! zz"]}, "do not belong together"),
    "merges in numbers": ({"tokenizer.ggml.merges": [1, 2]}, "merges is missing or no list"),
    "giant layers": ({"llama.block_count": 10**9}, "layers"),
}


def rewritten(whole: Path, file: Path, changes: dict[str, object]) -> Path:
    """Copy a file with other values of some keys."""
    source = gguf.GGUFReader(whole)
    keys = {
        name: field.contents()
        for name, field in source.fields.items()
        if not name.startswith("GGUF.")
    }
    architecture = (keys | changes)["general.architecture"]
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in ({**keys, **changes}).items():
        if name == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, int(value))
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    return finish(writer)


def test_a_rewritten_file_alone_can_be_read(whole: Path, tmp_path: Path):
    file = rewritten(whole, tmp_path / "same.gguf", {})
    assert weights.describe(file).spec == weights.describe(whole).spec


@pytest.mark.parametrize(("changes", "said"), FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_not_ours_is_refused_in_a_sentence(
    changes: dict[str, object], said: str, whole: Path, tmp_path: Path
):
    file = rewritten(whole, tmp_path / "foreign.gguf", changes)
    with pytest.raises((InvalidWeights, InvalidSpec)) as refused:
        weights.describe(file)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "Traceback" not in str(refused.value)


def test_rotary_factors_that_are_not_llama_3s_are_refused(tokenizer_json: Path, tmp_path: Path):
    case = CASES["llama3-rope"]
    case = Case("llama", case.fields | {"vocab_size": 320})
    file = write_gguf(case.model, tokenizer_json, tmp_path / "model.gguf")
    with pytest.raises(InvalidWeights, match="rotary factors are not those of Llama 3"):
        weights.describe(file)


def test_a_missing_file_is_named():
    with pytest.raises(InvalidWeights, match=r"There is no file 'nowhere\.gguf'"):
        weights.describe(Path("nowhere.gguf"))


def bound_and(code: str, memory_bytes: int, seconds: int) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process that holds itself to the limits of the child."""
    begin = f"from gptcore.weights.gguf_child import bound\nbound({memory_bytes}, {seconds})\n"
    return subprocess.run(
        [sys.executable, "-c", begin + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds to these limits")


@linux_only
def test_the_child_cannot_take_more_memory_than_its_bound():
    assert bound_and("bytearray(2**28)", 2**31, 60).returncode == 0
    done = bound_and("bytearray(2**32)", 2**31, 60)
    assert done.returncode == 1
    assert "MemoryError" in done.stderr


@linux_only
def test_the_child_cannot_compute_longer_than_its_bound():
    begin = time.monotonic()
    done = bound_and("while True: pass", 2**33, 1)
    assert done.returncode < 0
    assert time.monotonic() - begin < 30


@linux_only
def test_a_file_that_takes_too_much_memory_is_given_up(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path))
    monkeypatch.setattr(bounded, "BASE_BYTES", 2**25)
    with pytest.raises(InvalidWeights, match="memory"):
        weights.describe(whole)
    assert_nothing_is_left(tmp_path)


def test_a_file_that_takes_too_long_is_given_up(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path))
    monkeypatch.setattr(bounded, "BASE_S", 0.05)
    with pytest.raises(InvalidWeights, match="took too long and was given up"):
        weights.describe(whole)
    assert_nothing_is_left(tmp_path)


def assert_nothing_is_left(data: Path) -> None:
    assert list((data / "cache" / "gguf").iterdir()) == []
    assert not [one for one in psutil.Process().children() if "gguf_child" in one.cmdline()]


def test_a_conversion_that_is_cancelled_ends_its_child_and_leaves_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path))

    def cancel(ratio: float) -> None:
        raise Cancelled("Enough.")

    with pytest.raises(Cancelled):
        weights.describe(whole, cancel)
    assert_nothing_is_left(tmp_path)


@pytest.mark.smollm2
def test_a_long_conversion_can_be_cancelled_in_its_middle(
    smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path))
    told: list[float] = []

    def cancel(ratio: float) -> None:
        told.append(ratio)
        if len(told) == 3:
            raise Cancelled("Enough.")

    with pytest.raises(Cancelled):
        weights.describe(smollm2_gguf, cancel)
    assert told == sorted(told)
    assert told[-1] < 0.9
    assert_nothing_is_left(tmp_path)


def test_a_conversion_is_kept_until_the_file_changes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path / "data"))
    file = tmp_path / "model.gguf"
    file.write_bytes(whole.read_bytes())
    first = weights.describe(file).directory
    renamed = file.rename(tmp_path / "renamed.gguf")
    assert weights.describe(renamed).directory == first
    os.utime(renamed, ns=(1, 1))
    assert weights.describe(renamed).directory != first


def test_two_that_convert_at_once_get_the_same(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path))
    code = (
        "import sys; from pathlib import Path; from gptcore import weights\n"
        "print(weights.describe(Path(sys.argv[1])).weights_id)\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(whole)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    answers = {one.communicate()[0] for one in started}
    assert [one.returncode for one in started] == [0, 0, 0]
    assert len(answers) == 1
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 1


def test_a_full_disk_is_said_in_a_sentence(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bounded.tempfile, "TemporaryDirectory", full)
    with pytest.raises(InvalidWeights, match="could not be converted: No space left on device"):
        weights.describe(whole)


@linux_only
def test_a_disk_that_fills_up_under_the_child_is_said_in_a_sentence(whole: Path, tmp_path: Path):
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    code = (
        "import sys; from gptcore.weights import gguf_child\n"
        f"sys.argv = ['', {str(whole)!r}, {str(tmp_path)!r}, str(2**33), '60']\n"
        "sys.exit(gguf_child.main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "refused: its conversion could not be written: No space left on device"
    ]


def test_converting_twice_gives_the_same_bytes(whole: Path, tmp_path: Path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        convert(whole, folder)
    names = sorted(one.name for one in folders[0].iterdir())
    assert names == sorted(
        [
            "config.json",
            "gptlab.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
