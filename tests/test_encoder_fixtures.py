"""llama.cpp computes on the tiny encoders what their float64 reference says."""

from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from engine.model_file import open_header, read_model_file
from tests import encoder_fixtures as tiny
from tests.encoder_fixtures import PAIRS, TEXTS, FileType
from tests.plain_encoder import FLASH_OFF, FLASH_ON, Encoder, cosine

pytestmark = pytest.mark.real


# Largest differences allowed: hidden rows, dense (1 - cosine), sparse, MaxSim, logits. About three
# times what was measured (AVX-512, AVX2). With flash attention llama.cpp computes F32 in halves.
TOLERANCES: dict[tuple[FileType, int], tuple[float, ...]] = {
    ("F32", FLASH_OFF): (1e-3, 1e-8, 5e-5, 5e-5, 1e-3),
    ("F32", FLASH_ON): (5e-3, 1e-6, 1e-3, 7e-4, 1e-2),
    ("F16", FLASH_OFF): (8e-3, 1e-6, 1e-3, 7e-4, 1e-2),
    ("F16", FLASH_ON): (8e-3, 1e-6, 2e-3, 1e-3, 1e-2),
    ("Q8_0", FLASH_OFF): (0.2, 5e-4, 3e-2, 2e-2, 0.5),
    ("Q8_0", FLASH_ON): (0.2, 5e-4, 3e-2, 2e-2, 0.5),
}


@pytest.mark.parametrize(("file_type", "flash"), TOLERANCES)
def test_the_embedder_in_llama_cpp_is_its_reference(
    file_type: FileType, flash: int, load_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    model = tiny.tiny_embedder()
    encoder = load_encoder(
        tiny.write_embedder(tmp_path / "m3.gguf", file_type), pooling=0, flash=flash
    )
    hidden_off, dense_off, sparse_off, max_sim_off, _ = TOLERANCES[file_type, flash]
    found, expected = [], []
    for text in TEXTS:
        ids = encoder.ids(text)
        rows, reference = encoder.run(ids).astype(np.float64), model.hidden(ids)
        assert abs(rows - reference).max() < hidden_off, text
        assert cosine(rows[0], reference[0]) > 1 - dense_off, text
        sparse, right = model.sparse(rows, ids), model.sparse(reference, ids)
        for token in sparse | right:
            assert sparse.get(token, 0) == pytest.approx(right.get(token, 0), abs=sparse_off)
        found.append(model.colbert(rows))
        expected.append(model.colbert(reference))
    for i in range(len(TEXTS)):
        for j in range(len(TEXTS)):
            right_score = tiny.max_sim(expected[i], expected[j])
            assert abs(tiny.max_sim(found[i], found[j]) - right_score) < max_sim_off


@pytest.mark.parametrize(("file_type", "flash"), TOLERANCES)
def test_the_reranker_in_llama_cpp_is_its_reference(
    file_type: FileType, flash: int, load_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    encoder = load_encoder(tiny.write_reranker(tmp_path / "rr.gguf", file_type), flash=flash)
    assert encoder.pooling == llama_cpp.LLAMA_POOLING_TYPE_RANK
    pairs = [encoder.pair(*pair) for pair in PAIRS]
    logits = [float(encoder.run(ids)[0]) for ids in pairs]
    expected = [tiny.tiny_reranker().logit(ids) for ids in pairs]
    assert logits == pytest.approx(expected, abs=TOLERANCES[file_type, flash][-1])
    assert max(expected) - min(expected) > 2, "the logits tell documents apart"


def test_mean_pooling_is_the_mean_of_the_reference(
    load_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    encoder = load_encoder(tiny.write_bert(tmp_path / "bert.gguf"))
    words = tiny.wordpieces()
    assert [words[i] for i in encoder.ids("Jumping over the FOX, a world")] == (
        "[CLS] jump ##ing over the fox , a world [SEP]".split()
    )
    for text in TEXTS[:8]:
        ids = encoder.ids(text)
        mean = tiny.tiny_bert().hidden(ids).mean(axis=0)
        assert cosine(encoder.run(ids), mean) > 1 - 1e-6


def test_last_pooling_is_the_last_row_of_the_reference(
    load_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    encoder = load_encoder(tiny.write_decoder(tmp_path / "decoder.gguf"))
    assert encoder.pooling == llama_cpp.LLAMA_POOLING_TYPE_LAST
    for text in TEXTS[:8]:
        ids = encoder.ids(text)
        assert ids[-1] == 2, "it embeds with the end of the text"
        assert cosine(encoder.run(ids), tiny.tiny_decoder().hidden(ids)[-1]) > 1 - 1e-5


def test_a_bert_with_a_classifier_is_its_reference(
    load_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    encoder = load_encoder(tiny.write_bert_reranker(tmp_path / "rr.gguf"))
    model, logits = tiny.tiny_bert_reranker(), []
    for text in TEXTS[:8]:
        query, document = encoder.ids("what is the capital"), encoder.ids(text)
        ids = [*query, *document[1:]]  # [CLS] query [SEP] document [SEP]
        logits.append(model.logit(ids))
        assert encoder.run(ids)[0] == pytest.approx(logits[-1], abs=2e-4)
    assert np.ptp(logits) > 1


def test_a_judge_says_the_probability_of_yes(
    load_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    path = tiny.write_judge(tmp_path / "judge.gguf")
    encoder, chances = load_encoder(path), []
    assert encoder.pooling == llama_cpp.LLAMA_POOLING_TYPE_RANK
    assert llama_cpp.llama_model_n_cls_out(encoder.model) == 2
    with open_header(path) as header:
        assert header.text("tokenizer.chat_template.rerank") == tiny.JUDGE_TEMPLATE
    for text in TEXTS[:8]:
        ids = encoder.ids(text)
        chances.append(tiny.tiny_judge().yes(ids))
        assert encoder.run(ids)[0] == pytest.approx(chances[-1], abs=2e-3)
    assert np.ptp(chances) > 0.2


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("hello  world\n", "▁hello ▁world"),
        ("cafe\u0301", "▁café"),
        ("ＢＧＥ　Ｍ３", "▁BGE ▁M3"),
        ("½ ﬁ", "▁ 1 ⁄ 2 ▁ f i"),
        ("是 ஃ", "▁ 是 ▁ <unk>"),
        ("", ""),
    ],
)
def test_the_vocabulary_normalises_and_splits_like_xlm_r(
    text: str, pieces: str, load_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    encoder = load_encoder(tiny.write_embedder(tmp_path / "m3.gguf"), pooling=0)
    vocab = tiny.unigram().pieces
    assert [vocab[i] for i in encoder.ids(text)] == ["<s>", *pieces.split(), "</s>"]


def test_the_files_say_what_they_are(tmp_path: Path) -> None:
    embedder = read_model_file(tiny.write_embedder(tmp_path / "m3.gguf", "Q8_0"))
    assert (embedder.kind, embedder.architecture) == ("embedding", "bert")
    assert (embedder.n_ctx_train, embedder.n_embd) == (512, 64)
    assert read_model_file(tiny.write_reranker(tmp_path / "rr.gguf")).kind == "reranker"
    assert read_model_file(tiny.write_bert(tmp_path / "bert.gguf")).kind == "embedding"
    assert read_model_file(tiny.write_decoder(tmp_path / "decoder.gguf")).kind == "embedding"
    assert read_model_file(tiny.write_bert_reranker(tmp_path / "rr2.gguf")).kind == "reranker"
    assert read_model_file(tiny.write_judge(tmp_path / "judge.gguf")).kind == "reranker"


def test_they_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("first", "second"):
        tiny.write_hf_embedder(tmp_path / name)
        tiny.write_hf_reranker(tmp_path / name / "reranker")
        tiny.write_embedder(tmp_path / name / "m3.gguf", "Q8_0")
        tiny.tiny_embedder.cache_clear()
    files = {path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*")}
    assert {path.name for path in files} >= {"sparse_linear.pt", "model.safetensors", "m3.gguf"}
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_a_file_read_back_is_the_same_reference(tmp_path: Path) -> None:
    model, ids = tiny.tiny_embedder(), [0, 20, 30, 2]
    back = tiny.bert_in(tiny.write_embedder(tmp_path / "m3.gguf"), model.heads)
    assert back.hidden(ids) == pytest.approx(model.hidden(ids), abs=1e-6)
    assert back.n_ctx == model.n_ctx
