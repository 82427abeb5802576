"""Folders that are damaged, foreign or dangerous: refused in one sentence, and never run."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gptcore import weights
from gptcore.device import Placement
from gptcore.errors import InvalidInput, InvalidSpec, InvalidWeights
from gptcore.weights.huggingface import read_header, spec_of
from tests.families import CASES

CPU = Placement(threads=1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that can be read; tests change copies of it."""
    return CASES["llama-untied"].save(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASES["llama-tied-sharded"].save(tmp_path_factory.mktemp("sharded") / "model")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "models" / "mine")


def refusal(path: Path, kind: type[InvalidInput] = InvalidWeights) -> str:
    """The one sentence or two with which ``path`` is refused, within two seconds."""
    begin = time.monotonic()
    with pytest.raises(kind) as refused:
        weights.describe(path)
    assert time.monotonic() - begin < 2
    said = str(refused.value)
    assert "\n" not in said
    assert 10 < len(said) < 3000
    assert said.endswith(".")
    return said


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_sound_folder_is_read(sound: Path, sharded: Path):
    assert weights.describe(sound).spec.layers == 2
    assert weights.describe(sharded).spec.tied_head


def header(content: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    written = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(written)) + written + data


def entry(shape: Any = (2, 2), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


DAMAGED = {
    "empty": (b"", "0 bytes: it is empty or cut off"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "7 bytes"),
    "a giant header": (struct.pack("<Q", 2**62) + b"{}", "header of 4,611,686,018,427,387,904"),
    "a header of 100 GB": (struct.pack("<Q", 10**11) + b"{" * 100, "100,000,000,000"),
    "a header behind the end": (struct.pack("<Q", 1000) + b"{}", "1,000 bytes in a file of 10"),
    "no JSON": (header(b"hello, world"), "damaged header"),
    "no UTF-8": (header(b'{"\xff": 1}'), "damaged header"),
    "a list": (header(b"[1, 2]"), "damaged header"),
    "deep": (header(b'{"x":' * 100_000), "damaged header"),
    "a number for a tensor": (header({"x": 1}), "damaged header"),
    "no offsets": (header({"x": {"dtype": "F32", "shape": [1]}}), "damaged header"),
    "offsets in words": (header(entry(offsets=["a", "b"])), "damaged header"),
    "one offset": (header(entry(offsets=[0])), "damaged header"),
    "a shape in words": (header(entry(shape="ab")), "damaged header"),
    "a shape of lists": (header(entry(shape=[[2], 2])), "not what its shape takes"),
    "many dimensions": (header(entry(shape=[1] * 9 + [4]), b"\0" * 16), "10 dimensions"),
    "million dimensions": (header(entry(shape=[9999] * 10**6)), "1000000 dimensions"),
    "another type": (header(entry(dtype="F8_E4M3")), "'F8_E4M3'"),
    "a list for a type": (header(entry(dtype=["F32"])), "damaged header"),
    "backwards": (header(entry(offsets=[16, 0]), b"\0" * 16), "not what its shape takes"),
    "negative offsets": (header(entry(offsets=[-16, 0]), b"\0" * 16), "not what its shape takes"),
    "too few bytes for the shape": (header(entry(shape=[3, 2]), b"\0" * 16), "16 bytes"),
    "an endless shape": (header(entry(shape=[2**62, 2**62])), "not what its shape takes"),
    "cut off": (header(entry(), b"\0" * 15), "is cut off: "),
}


@pytest.mark.parametrize(("content", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_safetensors_file_is_refused(folder: Path, content: bytes, said: str):
    (folder / "model.safetensors").write_bytes(content)
    assert said in refusal(folder)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_off_says_how_much_is_there(folder: Path, share: float):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    there = int(share * len(content))
    file.write_bytes(content[:there])
    assert f"{there:,}" in refusal(folder)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_change_of_a_header_is_read_or_refused_but_never_breaks(
    data: st.DataObject, sound: Path, tmp_path_factory: pytest.TempPathFactory
):
    content = bytearray((sound / "model.safetensors").read_bytes())
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "changed.safetensors"
    file.write_bytes(content)
    try:
        found = read_header(file)
    except InvalidWeights:
        return
    assert all(isinstance(one["shape"], tuple) for one in found.values())


def test_overlapping_tensors_are_refused_before_they_become_a_model(folder: Path):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    found = json.loads(content[8 : 8 + length])
    names = [name for name in found if name.endswith("input_layernorm.weight")]
    found[names[0]]["data_offsets"] = found[names[1]]["data_offsets"]
    file.write_bytes(header(found, content[8 + length :]))
    with pytest.raises(InvalidWeights):
        weights.build(weights.describe(folder), CPU)


class Bomb:
    """A value whose unpickling makes a folder: what a dangerous file would do, but harmless."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.mkdir, (self.witness,)


def pickled(bomb: Bomb, protocol: int) -> bytes:
    return pickle.dumps({"weight": bomb}, protocol=protocol)


def torch_saved(bomb: Bomb, zipped: bool) -> bytes:
    out = io.BytesIO()
    torch.save({"weight": bomb}, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def in_a_zip(bomb: Bomb) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(bomb, 2))
    return out.getvalue()


def in_numpy(bomb: Bomb) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([bomb], dtype=object), allow_pickle=True)
    return out.getvalue()


def behind_a_length(bomb: Bomb) -> bytes:
    """A pickle where a safetensors header is expected."""
    return header(pickled(bomb, 4))


PICKLES: dict[str, Callable[[Bomb], bytes]] = {
    **{f"protocol {n}": (lambda bomb, n=n: pickled(bomb, n)) for n in range(6)},
    "torch zip": lambda bomb: torch_saved(bomb, True),
    "torch before zips": lambda bomb: torch_saved(bomb, False),
    "zip": in_a_zip,
    "numpy": in_numpy,
    "behind a length": behind_a_length,
}


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    return tmp_path / "the pickle was opened"


def test_the_bomb_of_these_tests_would_go_off(witness: Path):
    pickle.loads(pickled(Bomb(witness), 4))
    assert witness.exists()


@pytest.mark.parametrize("make", PICKLES.values(), ids=PICKLES)
def test_a_pickle_that_is_called_safetensors_is_refused_unopened(
    folder: Path, witness: Path, make: Callable[[Bomb], bytes]
):
    (folder / "model.safetensors").write_bytes(make(Bomb(witness)))
    refusal(folder)
    assert not witness.exists()


@pytest.mark.parametrize("make", PICKLES.values(), ids=PICKLES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_pickle_that_is_called_json_is_refused_unopened(
    folder: Path, witness: Path, make: Callable[[Bomb], bytes], name: str
):
    (folder / name).write_bytes(make(Bomb(witness)))
    assert name in refusal(folder)
    assert not witness.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("pytorch_model.bin", "model.pt", "model.pth", "weights.ckpt", "model.pkl"),
        *("model.PT", "MODEL.Bin", "model.pickle", "model.joblib", "model.npz"),
    ],
)
def test_a_folder_with_pickles_alone_says_that_they_are_never_opened(
    folder: Path, witness: Path, name: str
):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickled(Bomb(witness), 2))
    said = refusal(folder)
    assert f"only {name}, a pickle, which can run any code and is never opened" in said
    assert not witness.exists()


def test_pickles_beside_safetensors_are_left_alone(folder: Path, witness: Path):
    before = weights.describe(folder)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(torch_saved(Bomb(witness), True))
    checkpoint = weights.describe(folder)
    assert checkpoint == before
    weights.build(checkpoint, CPU)
    assert not witness.exists()


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00001.bin", "model.pt"])
def test_an_index_cannot_name_a_pickle_as_a_shard(folder: Path, witness: Path, name: str):
    (folder / name).write_bytes(torch_saved(Bomb(witness), True))
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "pickle" in refusal(folder)
    assert not witness.exists()


@pytest.mark.parametrize("make", PICKLES.values(), ids=PICKLES)
def test_a_pickle_that_is_called_gguf_is_refused_unopened(
    witness: Path, tmp_path: Path, make: Callable[[Bomb], bytes]
):
    from gptcore.weights.gguf_file import GGUFFile, Refused

    (tmp_path / "model.gguf").write_bytes(make(Bomb(witness)))
    with pytest.raises(Refused, match="no GGUF file"):
        GGUFFile(tmp_path / "model.gguf")
    assert not witness.exists()


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "10^9 layers": ({"num_hidden_layers": 10**9}, "layers"),
    "no layer": ({"num_hidden_layers": 0}, "layers"),
    "negative vocabulary": ({"vocab_size": -5}, "vocabulary"),
    "giant vocabulary": ({"vocab_size": 10**12}, "vocabulary"),
    "no heads": ({"num_attention_heads": 0, "head_dim": 0}, "wrong kind"),
    "negative heads": ({"num_attention_heads": -6}, "heads"),
    "heads that do not share": ({"num_key_value_heads": 4}, "6 query heads cannot share 4"),
    "an odd head": ({"head_dim": 7}, "even head width, not 7"),
    "giant width": ({"hidden_size": 10**9}, "width"),
    "too many parameters": (
        {"hidden_size": 10**6, "intermediate_size": 4 * 10**6, "num_hidden_layers": 1000},
        "parameters is more than",
    ),
    "endless context": ({"max_position_embeddings": 10**18}, "context"),
    "half a layer": ({"num_hidden_layers": 2.5}, "layers"),
    "width in words": ({"hidden_size": "wide"}, "config.json"),
    "width in a list": ({"hidden_size": [48]}, "config.json"),
    "no width": ({"hidden_size": None}, "config.json"),
    "epsilon of nothing": ({"rms_norm_eps": 0}, "norm_eps"),
    "epsilon NaN": ({"rms_norm_eps": float("nan")}, "norm_eps"),
    "theta infinite": ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta"),
    "theta negative": ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta"),
    "rope in a list": ({"rope_parameters": [1, 2]}, "config.json"),
    "rope in words": ({"rope_parameters": "llama3"}, "config.json"),
    "another rope": ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn' is not supported"),
    "half a rope": ({"rope_parameters": {"rope_type": "llama3"}}, "lacks 'factor'"),
    "rope the wrong way round": (
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 32,
            }
        },
        "high_freq_factor must be above low_freq_factor",
    ),
    "another activation": ({"hidden_act": "relu"}, "'relu' is not supported"),
    "an activation in a list": ({"hidden_act": ["silu"]}, "not supported"),
    "biases": ({"attention_bias": True}, "not supported"),
    "biases in the MLP": ({"mlp_bias": True}, "not supported"),
    "another family": ({"model_type": "mamba"}, "'mamba' are not supported"),
    "a family of many letters": ({"model_type": "x" * 10**6}, "are not supported"),
    "a family in a list": ({"model_type": ["llama"]}, "are not supported"),
    "no family": ({"model_type": None}, "are not supported"),
}


@pytest.mark.parametrize(("changes", "said"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_config_is_refused(folder: Path, changes: dict[str, Any], said: str):
    change_config(folder, **changes)
    assert said in refusal(folder, InvalidSpec)


@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "model_type"]
)
def test_what_a_config_lacks_is_named(folder: Path, name: str):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config[name]
    file.write_text(json.dumps(config))
    said = refusal(folder, InvalidSpec)
    assert (f"lacks {name!r}" in said) or name == "model_type"


GPT2_IMPOSSIBLE = {
    "heads that do not divide": ({"n_head": 5}, "5 heads do not divide a width of 32"),
    "no heads": ({"n_head": 0}, "config.json"),
    "an activation": ({"activation_function": "relu"}, "'relu' is not supported"),
    "an activation in a list": ({"activation_function": ["gelu"]}, "config.json"),
    "scaling by layer": ({"scale_attn_by_inverse_layer_idx": True}, "not supported"),
    "no scaling": ({"scale_attn_weights": False}, "not supported"),
}


@pytest.mark.parametrize(("changes", "said"), GPT2_IMPOSSIBLE.values(), ids=GPT2_IMPOSSIBLE)
def test_an_impossible_gpt2_is_refused(tmp_path: Path, changes: dict[str, Any], said: str):
    folder = CASES["gpt2"].save(tmp_path / "model")
    change_config(folder, **changes)
    assert said in refusal(folder, InvalidSpec)


SMALL = dict.fromkeys(
    (
        *("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"),
        *("intermediate_size", "max_position_embeddings", "n_layer", "n_head", "n_embd"),
        "n_positions",
    ),
    4,
)


@given(
    config=st.dictionaries(
        st.sampled_from(
            [
                *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size"),
                *("intermediate_size", "max_position_embeddings", "vocab_size", "head_dim"),
                *("rms_norm_eps", "rope_parameters", "rope_theta", "hidden_act", "rope_scaling"),
                *("n_layer", "n_head", "n_embd", "n_positions", "n_inner", "activation_function"),
                *("tie_word_embeddings", "layer_norm_epsilon", "attention_bias"),
            ]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["rope_type", "type", "factor", "rope_theta", "x"]), inner
                )
            ),
            max_leaves=4,
        ),
    ),
    family=st.sampled_from(["gpt2", "llama", "qwen2", "qwen3"]),
)
@settings(max_examples=500, deadline=None)
def test_any_config_is_a_spec_or_refused_but_never_breaks(config: dict[str, Any], family: str):
    try:
        spec = spec_of(SMALL | config | {"model_type": family})
    except InvalidSpec:
        return
    assert spec.parameters > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling_evil.EvilModel"}},
        {"auto_map": None},
        {"trust_remote_code": True},
    ],
    ids=["auto_map", "an empty auto_map", "trust_remote_code"],
)
def test_a_model_that_asks_for_code_of_its_own_is_refused(
    folder: Path, witness: Path, changes: dict[str, Any]
):
    (folder / "modeling_evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass EvilModel: ...\n")
    change_config(folder, **changes)
    assert "code of its own" in refusal(folder)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no config.json"),
        (b"", "is no JSON"),
        (b"{}", "has no config.json"),
        (b"[]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
        (b"\xff\xfe", "is no UTF-8"),
        (b'{"a":' * 100_000, "is no JSON"),
        (b"9" * 10_000, "is no JSON"),
    ],
    ids=["missing", "empty", "no fields", "a list", "null", "no UTF-8", "deep", "a long number"],
)
def test_a_damaged_config_is_refused(folder: Path, content: bytes | None, said: str):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    assert said in refusal(folder)


def test_a_giant_config_is_refused_unread(folder: Path):
    with (folder / "config.json").open("wb") as out:
        out.truncate(10**12)
    assert "larger than 64 MiB" in refusal(folder)


def test_missing_extra_and_wrongly_shaped_tensors_are_all_in_one_message(folder: Path):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    del tensors["model.layers.0.mlp.up_proj.weight"]
    del tensors["model.layers.1.mlp.up_proj.weight"]
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
    tensors["model.layers.7.input_layernorm.weight"] = torch.zeros(48)
    tensors["evil"] = torch.zeros(1)
    tensors["lm_head.weight"] = torch.zeros(210, 48)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(48, 16)
    save_file(tensors, file)
    said = refusal(folder)
    assert said == (
        "mine: its tensors do not match its config. "
        "4 missing: model.layers.{0-1}.mlp.up_proj.weight, "
        "model.layers.1.self_attn.o_proj.weight, model.norm.weight; "
        "3 not known: evil, model.layers.0.self_attn.q_proj.bias, "
        "model.layers.7.input_layernorm.weight; "
        "2 wrongly shaped: model.layers.0.self_attn.k_proj.weight is (48, 16), not (16, 48), "
        "lm_head.weight is (210, 48), not (211, 48)."
    )


def test_a_config_of_other_sizes_lists_every_layer_in_one_short_message(folder: Path):
    change_config(folder, num_hidden_layers=1000, intermediate_size=81)
    said = refusal(folder)
    assert "8982 missing" in said
    assert "model.layers.{2-999}.mlp.up_proj.weight" in said
    assert "model.layers.{0-1}.mlp.up_proj.weight is (80, 48), not (81, 48)" in said


def test_thousands_of_foreign_tensors_are_counted_not_all_named(folder: Path):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors |= {f"{at}" + "x" * 500: torch.zeros(1) for at in range(5000)}
    save_file(tensors, file)
    said = refusal_of_any_length(folder)
    assert "5000 not known" in said
    assert "and 4960 more" in said
    assert len(said) < 10_000


def refusal_of_any_length(folder: Path) -> str:
    with pytest.raises(InvalidWeights) as refused:
        weights.describe(folder)
    return str(refused.value)


def test_weights_in_whole_numbers_are_refused(folder: Path):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, file)
    assert "weights of type I8" in refusal(folder)


def index(folder: Path, table: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.safetensors", "/etc/passwd", "sub/../../outside.safetensors", "..", "/"),
        *("a\x00b.safetensors", "x" * 5000, "\ud800.safetensors", "~root/x"),
    ],
)
def test_a_shard_outside_the_folder_is_refused(folder: Path, name: str):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    index(folder, {"weight_map": {"model.norm.weight": name}})
    said = refusal(folder)
    assert "leads out of the model's folder" in said or "is missing" in said
    assert len(said) < 300


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"metadata": {}}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({"weight_map": {"a": 7}}, "7 of the index is missing"),
        ({"weight_map": {f"{n}": f"{n}.safetensors" for n in range(1001)}}, "1001 shards"),
    ],
    ids=["none", "empty", "a list", "a number", "too many"],
)
def test_a_damaged_index_is_refused(folder: Path, table: Any, said: str):
    index(folder, table)
    assert said in refusal(folder)


def test_every_missing_shard_is_named(sharded: Path, tmp_path: Path):
    folder = shutil.copytree(sharded, tmp_path / "mine")
    gone = sorted(folder.glob("*.safetensors"))[1:3]
    for file in gone:
        file.unlink()
    said = refusal(folder)
    assert all(file.name in said for file in gone)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "model.safetensors.index.json", "gptlab.json"]
)
def test_a_link_that_leads_out_is_refused(folder: Path, name: str):
    outside = folder.parent / "outside"
    if (folder / name).exists():
        shutil.move(folder / name, outside)
    else:
        outside.write_text('{"weight_map": {"a": "model.safetensors"}}')
    (folder / name).symlink_to(outside)
    assert "leads out of the model's folder" in refusal(folder)


def test_a_link_inside_the_folder_is_followed(folder: Path):
    before = weights.describe(folder)
    (folder / "model.safetensors").rename(folder / "blob")
    (folder / "model.safetensors").symlink_to("blob")
    assert weights.describe(folder).weights_id == before.weights_id


def test_a_circle_of_links_is_refused(folder: Path):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_in_the_place_of_a_file_is_refused(folder: Path, name: str):
    (folder / name).unlink()
    (folder / name).mkdir()
    assert f"has no {name}" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "is neither a model folder nor a .gguf file"),
        ("a file.txt", "is neither a model folder nor a .gguf file"),
        ("\x00", "is neither a model folder nor a .gguf file"),
        ("x" * 5000, "x" * 80),
        ("x" * 5000 + ".gguf", "x" * 80),
        ("nothing.gguf", "There is no file"),
        ("a folder.gguf", "There is no file"),
    ],
    ids=["nothing", "a text", "NUL", "long", "a long GGUF", "no GGUF", "a folder"],
)
def test_a_path_that_is_no_model_is_refused(tmp_path: Path, name: str, said: str):
    (tmp_path / "a file.txt").write_text("hello")
    (tmp_path / "a folder.gguf").mkdir()
    assert said in refusal(tmp_path / name)
