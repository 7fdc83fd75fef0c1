"""The heads of BGE-M3: where they are found, and what is refused."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.heads import Heads, find_heads
from engine.tensors import read_tensors
from errors import ModelLoadFailed
from models.convert.hf_folder import write_safetensors
from tests import gguf_fixtures
from tests.torch_files import pickled, write_legacy_pt, write_pt

N_EMBD = 8
Tensors = dict[str, NDArray[np.float32]]


def layer(n_out: int, seed: int = 0, n_embd: int = N_EMBD) -> Tensors:
    random = np.random.RandomState(seed)
    return {
        "weight": random.standard_normal((n_out, n_embd)).astype(np.float32),
        "bias": random.standard_normal(n_out).astype(np.float32),
    }


def named(name: str, tensors: Tensors) -> Tensors:
    return {f"{name}.{part}": values for part, values in tensors.items()}


def bge_m3(path: Path, **metadata: object) -> Path:
    """The header of such a model, without its heads."""
    of = {"tokenizer__ggml__model": "t5", "bert__pooling_type": 2} | metadata
    return gguf_fixtures.write_minimal(path, architecture="bert", **of)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return bge_m3(tmp_path / "bge-m3-Q8_0.gguf")


def heads_of(model: Path, sparse: Path | None = None, colbert: Path | None = None) -> Heads:
    heads, missing = find_heads(model, N_EMBD, sparse, colbert)
    assert heads is not None
    assert missing == ()
    return heads


def refused(*args: Any) -> str:
    with pytest.raises(ModelLoadFailed) as error:
        find_heads(*args)
    return error.value.message


# Where they are found


def test_a_model_without_heads_says_which_files_are_missing(model: Path) -> None:
    missing = "sparse_linear.pt", "colbert_linear.pt"
    assert find_heads(model, N_EMBD, None, None) == (None, missing)
    write_pt(model.with_name("sparse_linear.pt"), layer(1))
    assert find_heads(model, N_EMBD, None, None) == (None, missing[1:])


def test_the_files_of_bge_m3_are_found_beside_the_model(model: Path) -> None:
    sparse, colbert = layer(1), layer(6, 1)
    write_pt(model.with_name("sparse_linear.pt"), sparse)
    write_safetensors(model.with_name("colbert_linear.safetensors"), colbert)
    heads = heads_of(model)
    assert (heads.sparse_weight == sparse["weight"][0]).all()
    assert heads.sparse_bias == sparse["bias"][0]
    assert (heads.colbert_weight == colbert["weight"]).all()
    assert (heads.colbert_bias == colbert["bias"]).all()


def test_given_paths_come_before_metadata_and_that_before_files_beside_it(tmp_path: Path) -> None:
    given, inside, packed, loose = (layer(1, seed) for seed in range(4))
    colbert = layer(6)
    metadata = {
        f"bge_m3__{name}__{part}": values.ravel().tolist()
        for name, tensors in (("sparse_linear", inside), ("colbert_linear", colbert))
        for part, values in tensors.items()
    }
    model = gguf_fixtures.write_minimal(tmp_path / "with-F16.gguf", **metadata)
    bare = bge_m3(tmp_path / "bge-m3-Q4_K_M.gguf", bert__pooling_type=None)
    write_pt(tmp_path / "given.pt", given)
    write_pt(tmp_path / "sparse_linear.pt", loose)
    write_pt(tmp_path / "colbert_linear.pt", colbert)

    assert (heads_of(model, tmp_path / "given.pt").sparse_weight == given["weight"][0]).all()
    assert (heads_of(model).sparse_weight == inside["weight"][0]).all()
    assert (heads_of(model).colbert_weight == colbert["weight"]).all()
    assert (heads_of(bare).sparse_weight == loose["weight"][0]).all()
    write_safetensors(
        tmp_path / "bge-m3.heads.safetensors",
        named("sparse_linear", packed) | named("colbert_linear", colbert),
    )
    assert (heads_of(bare).sparse_weight == packed["weight"][0]).all()


@pytest.mark.parametrize(
    "metadata",
    [
        {"bert__pooling_type": 1},  # multilingual-e5-large
        {"bert__pooling_type": 3},
        {"tokenizer__ggml__model": "bert"},  # bge-large
        {"general__architecture": "qwen3"},  # Qwen3-Embedding, also of BGE-M3's width
    ],
)
def test_heads_beside_another_kind_of_model_are_not_its_own(
    metadata: dict[str, object], model: Path
) -> None:
    sparse = write_pt(model.with_name("sparse_linear.pt"), layer(1))
    colbert = write_pt(model.with_name("colbert_linear.pt"), layer(6))
    other = bge_m3(model.with_name("other.gguf"), **metadata)
    assert find_heads(other, N_EMBD, None, None) == (None, ()), "none would be taken"
    heads_of(model)
    heads_of(other, sparse, colbert)
    both = named("sparse_linear", layer(1)) | named("colbert_linear", layer(6))
    write_safetensors(model.with_name("other.heads.safetensors"), both)
    heads_of(other)


def test_heads_of_another_width_beside_a_model_are_not_its_own(model: Path) -> None:
    for name, n_out in (("sparse_linear", 1), ("colbert_linear", 6)):
        write_pt(model.with_name(f"{name}.pt"), layer(n_out, n_embd=16))
    assert find_heads(model, N_EMBD, None, None) == (None, ())


@pytest.mark.parametrize(
    "name", ["bge-m3-Q4_K_M", "bge-m3.f16", "bge-m3-IQ4_XS", "bge-m3-FP16", "bge-m3_bf16", "bge-m3"]
)
def test_the_quantization_is_no_part_of_the_name(name: str, tmp_path: Path) -> None:
    model = gguf_fixtures.write_minimal(tmp_path / f"{name}.gguf")
    both = named("sparse_linear", layer(1)) | named("colbert_linear", layer(6))
    write_safetensors(tmp_path / "bge-m3.heads.safetensors", both)
    heads_of(model)


def test_one_file_can_be_given_for_both(model: Path, tmp_path: Path) -> None:
    both = named("sparse_linear", layer(1)) | named("colbert_linear", layer(6, 1))
    path = write_safetensors(tmp_path / "both.safetensors", both)
    heads = heads_of(model, path, path)
    assert (heads.colbert_weight == layer(6, 1)["weight"]).all()


# What does not fit


def test_heads_of_another_model_are_refused(model: Path, tmp_path: Path) -> None:
    colbert = write_pt(tmp_path / "c.pt", layer(6))
    wide = write_pt(tmp_path / "wide.pt", layer(1, n_embd=16))
    assert refused(model, N_EMBD, wide, colbert) == (
        "wide.pt has a weight of 1 × 16, and the model needs 1 × 8; "
        "give the heads that belong to it."
    )
    turned = write_pt(tmp_path / "turned.pt", layer(N_EMBD, n_embd=1) | {"bias": layer(1)["bias"]})
    assert refused(model, N_EMBD, turned, colbert).startswith("turned.pt has a weight of 8 × 1, ")
    two = write_pt(tmp_path / "two.pt", layer(2))
    assert "two.pt has a weight of 2 × 8" in refused(model, N_EMBD, two, colbert)
    sparse = write_pt(tmp_path / "s.pt", layer(1))
    odd = write_pt(tmp_path / "odd.pt", layer(6, n_embd=16))
    assert "odd.pt has a weight of 6 × 16" in refused(model, N_EMBD, sparse, odd)


def test_weights_that_are_not_finite_are_refused(model: Path, tmp_path: Path) -> None:
    colbert = write_pt(tmp_path / "c.pt", layer(6))
    for part in ("weight", "bias"):
        tensors = layer(1)
        tensors[part].flat[0] = np.inf
        sparse = write_pt(tmp_path / "s.pt", tensors)
        assert refused(model, N_EMBD, sparse, colbert) == (
            f"s.pt has a {part} that is not finite; download it again."
        )


def test_a_given_file_that_is_missing_or_lacks_its_layer_is_an_error(
    model: Path, tmp_path: Path
) -> None:
    missing = refused(model, N_EMBD, tmp_path / "none.pt", None)
    assert missing == "none.pt cannot be read: No such file or directory; check its path."
    half = write_pt(tmp_path / "half.pt", {"weight": layer(1)["weight"]})
    assert refused(model, N_EMBD, half, None) == (
        "half.pt has no sparse_linear.weight and sparse_linear.bias; "
        "give BGE-M3's sparse_linear.pt."
    )


# The formats


@pytest.mark.parametrize("write", [write_pt, write_legacy_pt])
@pytest.mark.parametrize(
    ("storage", "off"),
    [("FloatStorage", 0), ("DoubleStorage", 0), ("HalfStorage", 2e-3), ("BFloat16Storage", 2e-2)],
)
def test_what_torch_saves_is_read_in_both_formats(
    write: Any, storage: str, off: float, tmp_path: Path
) -> None:
    tensors = layer(6)
    read = read_tensors(write(tmp_path / "head.pt", tensors, storage))
    assert read.keys() == tensors.keys()
    for name, values in read.items():
        assert values.dtype == np.float32
        assert values == pytest.approx(tensors[name], abs=off)


def archive(path: Path, program: bytes, data: bytes = b"", compression: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("head/data.pkl", program)
        for i in range(2):
            file.writestr(f"head/data/{i}", data)
    return path


def test_a_transposed_view_is_read_as_what_it_shows(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    # Shape 2 × 3 over the bytes of its transpose, as torch saves `tensor.T`.
    program = pickled({"weight": values}, strides=(1, 2))
    path = archive(tmp_path / "t.pt", program, values.T.tobytes())
    assert (read_tensors(path)["weight"] == values).all()


def reason(path: Path) -> str:
    with pytest.raises(ModelLoadFailed) as error:
        read_tensors(path)
    message = error.value.message
    assert message.startswith(path.name)
    assert message.endswith(".")
    return message.removeprefix(f"{path.name} ")


class Hostile:
    """What pickle.loads would run."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_runs_something_is_an_error_and_runs_nothing(
    protocol: int, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    program = pickle.dumps({"weight": Hostile(Path.touch, victim)}, protocol)
    for path in (archive(tmp_path / "h.pt", program), tmp_path / "legacy.pt"):
        if not path.exists():
            path.write_bytes(program)
        message = reason(path)
        assert "holds more than tensors" in message or "wants to run" in message
    assert not victim.exists()


def test_what_a_pickle_wants_to_run_is_named(tmp_path: Path) -> None:
    program = b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."
    path = archive(tmp_path / "h.pt", program)
    assert reason(path) == "wants to run os.system, and only tensors are read."


@pytest.mark.parametrize(
    ("offset", "strides"), [(1, None), (-1, None), (0, (8, 2)), (0, (-8, 1)), (1 << 30, (0, 0))]
)
def test_a_tensor_outside_its_storage_is_an_error(
    offset: int, strides: tuple[int, ...] | None, tmp_path: Path
) -> None:
    values = layer(2)["weight"]
    program = pickled({"weight": values}, offset=offset, strides=strides)
    message = reason(archive(tmp_path / "o.pt", program, values.tobytes()))
    assert message.startswith("has a tensor ")


def test_a_small_file_cannot_claim_a_large_tensor(tmp_path: Path) -> None:
    program = pickled({"weight": np.zeros((1 << 13, 1 << 13), np.float32)}, strides=(0, 0))
    message = reason(archive(tmp_path / "large.pt", program, bytes(32)))
    assert message == "has a tensor that reaches outside its storage."
    one = pickled({"weight": np.zeros((1, 1), np.float32)})
    assert reason(archive(tmp_path / "deflated.pt", one, bytes(1 << 20), zipfile.ZIP_DEFLATED)) == (
        "is compressed, which torch.save never does."
    )


# A memo's index may be anything; a tuple of tuples of tuples takes for ever to hash.
HUGE_MEMO = b"\x80\x02}r\xff\xff\xff\x7f."
DEEP_KEY = b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 64 + b"K\x01s."


@pytest.mark.timeout(5)
@pytest.mark.parametrize(
    "program",
    [HUGE_MEMO, DEEP_KEY, b"", b".", b"\x80\x02t.", b"\x80\x02K\x01.", b"\x80\x02}", b"\x80\x02(u.",
     b"\x80\x02}h\x05.", b"\x80\x02)R.", b"\x80\x02K\x01Q."],
)  # fmt: skip
def test_a_damaged_pickle_is_an_error_at_once(program: bytes, tmp_path: Path) -> None:
    reason(archive(tmp_path / "d.pt", program))


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    for write in (write_pt, write_legacy_pt):
        whole = write(tmp_path / "head.pt", layer(2)).read_bytes()
        for n_bytes in range(0, len(whole), 7):
            cut = tmp_path / "cut.pt"
            cut.write_bytes(whole[:n_bytes])
            reason(cut)
    whole = write_safetensors(tmp_path / "head.safetensors", layer(2)).read_bytes()
    for n_bytes in range(len(whole)):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(whole[:n_bytes])
        reason(cut)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "head.onnx").write_bytes(b"?")
    assert reason(tmp_path / "head.onnx") == "is none of .bin, .pt, .safetensors."
    assert reason(tmp_path / "none.pt").startswith("cannot be read: No such file")
