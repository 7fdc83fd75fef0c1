"""What a directory says of a model that generates, and its tokenizer: no MLX, and no weights."""

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chat.infill import FAMILIES, marks_of
from engine import chat_folder
from engine.backends.mlx import check_room
from engine.backends.mlx_tokenizer import MlxTokenizer
from engine.chat_folder import end_tokens, read_chat_folder, read_tokenizer, suppressed_tokens
from engine.model_folder import read_model_folder
from errors import ModelLoadFailed
from model_source import ModelSource
from settings import ServerSettings, TierSettings
from tests.engines import engine_of

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300,
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": 2,
}  # fmt: skip
TOKENIZER_CONFIG: dict[str, Any] = {
    "bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}",
}  # fmt: skip


def write_safetensors(path: Path, tensors: dict[str, tuple[str, int]]) -> None:
    """Tensors by type and size in bytes, all of zeros."""
    header, end = {}, 0
    for name, (kind, size) in tensors.items():
        header[name] = {"dtype": kind, "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": {"format": "mlx"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def sentencepiece() -> Any:
    """A vocabulary as llama 2's: bytes, a space before a text, BOS."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i"]
    pieces += ["▁h", "▁hi", "<|im_end|>"]
    merges = [("▁", "h"), ("▁h", "i")]
    model = tokenizers.models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges,
        unk_token="<unk>", byte_fallback=True, fuse_unk=True,
    )  # fmt: skip
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    for text in ("<unk>", "<s>", "</s>", "<|im_end|>"):
        tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "a-model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    sentencepiece().save(str(path / "tokenizer.json"))
    write_safetensors(path / "model.safetensors", {"a": ("U32", 100), "b": ("F16", 20)})
    return path


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | values).items() if v is not None}))


def test_other_weights_of_one_size_and_an_older_time_are_another_model(folder: Path) -> None:
    weights, other = folder / "model.safetensors", folder.with_name("other")
    other.write_bytes(weights.read_bytes()[:-1] + b"1")
    for n, file in enumerate((other, weights)):
        os.utime(file, ns=(n, n))
    tier = TierSettings(backend="mlx", model_path=str(folder))
    source = ModelSource("light", tier, ServerSettings().hub)
    source.read(is_loaded=False)
    before = source.identity
    assert source.is_unchanged()
    other.replace(weights)
    assert not source.is_unchanged()
    source.read(is_loaded=False)
    assert source.identity != before


def test_another_pooling_one_level_below_is_another_model(folder: Path) -> None:
    below, hidden = folder / "1_Pooling", folder / ".git"
    for directory in (below, hidden):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
    tier = TierSettings(backend="mlx", model_path=str(folder))
    source = ModelSource("light", tier, ServerSettings().hub)
    source.read(is_loaded=False)
    before = source.identity
    change(hidden / "config.json", pooling_mode_cls_token=True)
    assert source.is_unchanged()
    change(below / "config.json", pooling_mode_cls_token=True)
    assert not source.is_unchanged()
    source.read(is_loaded=False)
    assert source.identity != before


def test_the_facts_of_a_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_folder, "FLOAT_BYTES", 4)
    facts = read_chat_folder(folder)
    assert facts.size_bytes == 100 + 2 * 20, "halves become floats on a CPU"
    assert facts.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert (facts.n_ctx_train, facts.n_vocab, facts.kind) == (512, 300, "chat")
    assert (facts.bos_token, facts.eos_token, facts.add_bos) == ("<s>", "</s>", True)
    assert facts.control_tokens == ("<|im_end|>", "<unk>", "</s>", "<s>")
    assert facts.chat_template == "{{ messages }}"
    assert facts.max_token_bytes == len("<|im_end|>")
    monkeypatch.setattr(chat_folder, "FLOAT_BYTES", 2)
    assert read_chat_folder(folder).size_bytes == 120


FORMS = [
    "<｜Assistant｜>", "<|object_ref_start|>", "<unused7>", "<pad>", "[@BOS@]", "▁<PRE>",
]  # fmt: skip


def with_ordinary_tokens(folder: Path, *texts: str) -> None:
    """More tokens of which the file does not say that they are special."""
    library = sentencepiece()
    for text in texts:
        library.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False)])
    library.save(str(folder / "tokenizer.json"))


def test_tokens_in_the_form_of_control_tokens_are_such_whatever_the_file_says(folder: Path) -> None:
    """And those of the names that llama.cpp knows. Tags of tools stay text."""
    before = read_chat_folder(folder).control_tokens
    with_ordinary_tokens(folder, *FORMS, "<tool_call>", "<b>")
    facts = read_chat_folder(folder)
    assert {*facts.control_tokens} == {*before, *FORMS}
    tokenizer = MlxTokenizer(facts)
    for token, text in enumerate(FORMS, start=265):
        mine = tokenizer.tokenize(f"hi{text}", parse_special=False, continues=True)
        assert b"".join(map(tokenizer.piece, mine)).decode() == f"hi{text}"
        assert token not in mine
        assert token in tokenizer.tokenize(text, parse_special=True, continues=True)
        assert (tokenizer.piece(token), tokenizer.literal(token)) == (b"", text.encode())
    assert tokenizer.piece(265 + len(FORMS)) == b"<tool_call>"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0])
def test_models_whose_marks_are_ordinary_tokens_can_fill_in(
    family: tuple[str, str, str], folder: Path
) -> None:
    with_ordinary_tokens(folder, *family)
    assert marks_of(read_chat_folder(folder).control_tokens) == family


def test_a_template_may_be_elsewhere(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    change(config, chat_template=[{"name": "tool_use", "template": "T"},
                                  {"name": "default", "template": "D"}])  # fmt: skip
    assert read_chat_folder(folder).chat_template == "D"
    assert read_chat_folder(folder).tool_template == "T"
    (folder / "chat_template.jinja").write_text("{{ F }}")
    assert read_chat_folder(folder).chat_template == "{{ F }}"
    assert read_chat_folder(folder).tool_template is None
    (folder / "chat_template.jinja").unlink()
    change(config, chat_template=None)
    assert read_chat_folder(folder).chat_template is None
    assert read_chat_folder(folder).tool_template is None
    (folder / "chat_template.json").write_text('{"chat_template": "J"}')
    assert read_chat_folder(folder).chat_template == "J"
    (folder / "chat_template.jinja").write_text("{{ F }}")
    assert read_chat_folder(folder).chat_template == "{{ F }}"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ T }}")
    assert read_chat_folder(folder).tool_template == "{{ T }}"


def test_what_a_layer_keeps_may_be_nothing(folder: Path) -> None:
    config = folder / "config.json"
    plain = read_chat_folder(folder)
    change(config, mamba_n_heads=0, mamba_d_head=16, mamba_d_state=64)
    facts = read_chat_folder(folder)
    assert (facts.kv_bytes_per_token, facts.state_bytes) == (plain.kv_bytes_per_token, 0)
    change(config, kv_lora_rank=16, qk_rope_head_dim=0)
    assert read_chat_folder(folder).kv_bytes_per_token == 2 * 16 * 4  # two layers


def test_models_that_also_see_say_it_of_their_text_part(folder: Path) -> None:
    sizes = {key: CONFIG[key] for key in CONFIG if key.startswith(("hidden", "num_", "max_"))}
    change(folder / "config.json", **dict.fromkeys(sizes), text_config=sizes)
    assert read_chat_folder(folder).n_layer == 2


def test_infinity_in_a_config_is_a_number(folder: Path) -> None:
    """Python's writer of JSON makes such, as in Nemotron's."""
    for file in ("config.json", "generation_config.json"):
        content = {**CONFIG, "time_step_limit": [0.0, float("inf")], "suppress_tokens": [5]}
        (folder / file).write_text(json.dumps(content))
    assert read_chat_folder(folder).n_layer == 2
    assert suppressed_tokens(folder) == [5]
    assert end_tokens(folder, *read_tokenizer(folder)) == {2, 264}


@pytest.mark.parametrize(
    "layers",
    [
        {"layers_block_type": ["mamba", "moe", "attention"]},
        {"layer_types": ["linear_attention", "mlp", "full_attention"]},
        {"hybrid_override_pattern": "M-*"},
    ],
)
def test_layers_may_be_listed_instead_of_counted(layers: dict[str, Any], folder: Path) -> None:
    change(folder / "config.json", num_hidden_layers=None, **layers)
    assert read_chat_folder(folder).n_layer == 3


def test_an_answer_ends_with_any_of_the_tokens_that_the_files_name(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert end_tokens(folder, *read_tokenizer(folder)) == {2, 7, 9, 264}  # 264 is <|im_end|>


Breaks = Callable[[Path], object]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda p: (p / "config.json").unlink(), "has no config.json that can be read"),
        (lambda p: (p / "config.json").write_text("[]"), "has no config.json that can be read"),
        (lambda p: (p / "config.json").write_text("[" * 10**5), "has no config.json that can be"),
        (lambda p: (p / "config.json").write_bytes(b"{\xff}"), "has no config.json that can be"),
        (lambda p: change(p / "config.json", hidden_size="64"), "has no hidden_size"),
        (lambda p: change(p / "config.json", num_hidden_layers=None, layer_types=7),
         "has no num_hidden_layers"),
        (lambda p: change(p / "config.json", architectures=["BertModel"]), "does not generate"),
        (lambda p: (p / "tokenizer.json").unlink(),
         "has no tokenizer.json; take a conversion that has one"),
        (lambda p: (p / "tokenizer.json").write_text("{"), "has no tokenizer.json that can be"),
        (lambda p: (p / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": []}}'),
         "only BPE is read"),
        (lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda p: (p / "model.safetensors").write_bytes(b"version https"), "download it again"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 100), "is damaged"),
        (lambda p: (p / "model.safetensors").write_bytes(
            (p / "model.safetensors").read_bytes()[:-1]), "is cut short"),
        (lambda p: (p / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'),
         "lacks model-00002-of-00002.safetensors"),
        (lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'),
         "has no model.safetensors.index.json that can be read"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"[]"),
         "has a model.safetensors that cannot be read"),
        (lambda p: change(p / "config.json", text_config="llama"), "no text_config"),
        (lambda p: change(p / "config.json", architectures=7), "no architectures"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence_without_the_path(
    broken: Breaks, words: str, folder: Path
) -> None:
    broken(folder)
    with pytest.raises(ModelLoadFailed) as caught:
        read_chat_folder(folder)
    assert words in caught.value.message
    assert caught.value.message.startswith("a-model ")
    assert str(folder.parent) not in caught.value.message


def test_ends_are_not_read_of_what_is_no_text_config(folder: Path) -> None:
    tokenizer = read_tokenizer(folder)
    change(folder / "config.json", text_config="llama")
    with pytest.raises(ModelLoadFailed, match="no text_config"):
        end_tokens(folder, *tokenizer)


@pytest.mark.parametrize("read", [read_chat_folder, read_model_folder])
def test_a_model_of_the_hub_is_called_by_its_repo_and_not_by_a_commit(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--mlx-community--a-model-4bit" / "snapshots" / ("4f" * 20)
    snapshot.mkdir(parents=True)
    with pytest.raises(ModelLoadFailed, match=r"^mlx-community/a-model-4bit has no config\.json"):
        read(snapshot)


def test_a_file_is_no_directory(folder: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="is no directory"):
        read_chat_folder(folder / "config.json")


def test_without_mlx_it_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(ModelLoadFailed, match=r"is not installed .*: run `\./setup\.sh --mlx`, or"):
        engine_of(folder)


class Device:
    """Of mlx.core what is asked of the device in use; only a Mac's GPU has a limit."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self.wired: int | None = None

    def device_info(self) -> dict[str, Any]:
        return {} if self._limit is None else {"max_recommended_working_set_size": self._limit}

    def set_wired_limit(self, limit: int) -> None:
        self.wired = limit


def test_a_mac_keeps_weights_resident_and_takes_none_beyond_its_limit(folder: Path) -> None:
    facts = read_chat_folder(folder)
    mac = Device(limit=facts.size_bytes)
    check_room(mac, facts)
    assert mac.wired == facts.size_bytes
    small = Device(limit=facts.size_bytes - 1)
    with pytest.raises(ModelLoadFailed, match=r"a-model has .* GB of weights, and the GPU may"):
        check_room(small, facts)
    assert small.wired is None
    cpu = Device()  # also a Mac's, with N_GPU_LAYERS=0
    check_room(cpu, facts)
    assert cpu.wired is None


def test_a_vocabulary_of_sentencepiece_spells_texts_exactly(folder: Path) -> None:
    tokenizer = MlxTokenizer(read_chat_folder(folder))
    assert (tokenizer.bos, tokenizer.n_vocab) == (1, 265)

    def ids(text: str, parse_special: bool = False, continues: bool = True) -> list[int]:
        return tokenizer.tokenize(text, parse_special=parse_special, continues=continues)

    for text in ("hi", " hi", "hi hi", "é", "🎉hi", "</s>", "<|im_end|>", ""):
        assert b"".join(map(tokenizer.piece, ids(text))).decode() == text
    first = ids("hi", continues=False)
    assert b"".join(map(tokenizer.piece, first)) == b" hi"
    assert ids("<|im_end|>", parse_special=True, continues=False)[-1] == 264
    assert (tokenizer.piece(264), tokenizer.literal(264)) == (b"", b"<|im_end|>")
    assert tokenizer.ends == [2, 264]
    assert tokenizer.piece(3 + 0xC3) == b"\xc3"
    assert tokenizer.piece(9999) == b""


def test_runs_of_spaces_may_be_added_tokens(folder: Path) -> None:
    """As Gemma's are."""
    with_ordinary_tokens(folder, "▁▁")
    tokenizer = MlxTokenizer(read_chat_folder(folder))
    assert (tokenizer.piece(265), tokenizer.literal(265)) == (b"  ", b"  ")
