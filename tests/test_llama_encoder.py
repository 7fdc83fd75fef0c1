"""Encoders on llama.cpp, on tiny models: what they compute, and what must not end them."""

import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from embedders import BGEM3Embedder, Embedded
from encoder_jobs import EncoderJobs
from engine import wire
from engine.backends import llama_encoder, llama_tokenizer
from engine.backends.base import Interrupted
from engine.backends.llama_encoder import LlamaEncoder
from engine.deep import LEAST_BYTES, DeepThread
from errors import BadRequest, InsufficientMemory, ModelLoadFailed
from model_manager import ModelManager
from rerankers import PROOF, BGEReranker, EmbeddingReranker, max_sim
from settings import ROOT, TierSettings
from tests import encoder_fixtures as tiny
from tests import gguf_fixtures
from tests.encoder_fixtures import PAIRS, TEXTS, FileType
from tests.own_encoder import (
    ALL,
    Load,
    embed,
    embedder_of,
    loading,
    pairs_of,
    scores_of,
    sequences,
    spec,
)
from tests.test_model_manager import items_of, run
from worker import load_model

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each tiny model; the embedder's has its heads beside it."""
    folder = tmp_path_factory.mktemp("encoders")
    for file_type in ("F32", "F16", "Q8_0"):
        tiny.write_embedder(folder / f"embedder-{file_type}.gguf", file_type)
        tiny.write_reranker(folder / f"reranker-{file_type}.gguf", file_type)
    tiny.write_heads(folder)
    (folder / "plain").mkdir()
    tiny.write_bert(folder / "plain" / "bert.gguf")
    tiny.write_decoder(folder / "plain" / "decoder.gguf")
    return folder


@pytest.fixture
def load() -> Iterator[Load]:
    with loading() as load:
        yield load


Embed = Callable[[Sequence[str]], list[Embedded]]


# what they compute


@pytest.mark.parametrize(
    ("file_type", "flash", "cosine", "sparse", "similarity"),
    [
        ("F32", False, 0.999999, 2e-4, 2e-4),
        ("F32", True, 0.99999, 5e-3, 1e-3),
        ("F16", True, 0.99999, 1e-2, 2e-3),
        ("Q8_0", True, 0.997, 0.2, 2e-2),
    ],
)
def test_the_three_kinds_of_vectors_are_the_references(
    file_type: FileType, flash: bool, cosine: float, sparse: float, similarity: float,
    models: Path, load: Load,
) -> None:  # fmt: skip
    embedder = embedder_of(load(models / f"embedder-{file_type}.gguf", flash_attention=flash))
    assert isinstance(embedder, BGEM3Embedder)
    model = tiny.tiny_embedder()
    all_ids = sequences(embedder, TEXTS)
    hidden = [model.hidden(ids) for ids in all_ids]
    rows = [model.colbert(of_text) for of_text in hidden]
    found = embed(embedder, TEXTS)
    for text, ids, of_text, wanted in zip(found, all_ids, hidden, rows, strict=True):
        assert text.is_sound
        assert text.dense is not None
        assert text.sparse is not None
        assert text.colbert is not None
        assert text.dense @ model.dense(of_text) >= cosine
        weights = dict(zip(text.sparse[0].tolist(), text.sparse[1].tolist(), strict=True))
        expected = model.sparse(of_text, ids.tolist())
        for token in weights.keys() | expected.keys():
            assert abs(weights.get(token, 0) - expected.get(token, 0)) <= sparse
        assert text.colbert.shape == wanted.shape
        assert np.linalg.norm(text.colbert, axis=1) == pytest.approx(1, abs=1e-5)
    for query in range(0, len(TEXTS), 5):
        for document in range(len(TEXTS)):
            score = max_sim(found[query].colbert, found[document].colbert)
            assert abs(score - tiny.max_sim(rows[query], rows[document])) <= similarity


@pytest.mark.parametrize(("file_type", "tolerance"), [("F32", 3e-3), ("F16", 3e-2)])
def test_logits_of_pairs_are_the_references(
    file_type: FileType, tolerance: float, models: Path, load: Load
) -> None:
    reranker = BGEReranker(load(models / f"reranker-{file_type}.gguf"))
    model = tiny.tiny_reranker()
    found = scores_of(reranker, PAIRS)
    wanted = [model.logit(ids.tolist()) for ids in pairs_of(reranker, PAIRS)]
    assert np.abs(np.array(found) - wanted).max() <= tolerance


def test_a_plain_bert_is_pooled_as_its_file_says(models: Path, load: Load) -> None:
    encoder = load(models / "plain" / "bert.gguf")
    embedder = embedder_of(encoder)
    assert (encoder.pooling, embedder.outputs) == ("mean", {"dense"})
    assert embedder.missing("sparse") == "The model makes no sparse vectors."
    texts = ("hello world", "the capital of france", "fox")
    for text, ids in zip(embed(embedder, texts), sequences(embedder, texts), strict=True):
        hidden = tiny.tiny_bert().hidden(ids)
        assert text.dense is not None
        assert text.dense @ tiny.unit(hidden.mean(axis=0)) >= 0.999999
    for pooling, row in (("cls", 0), ("last", -1)):
        (text,) = embed(embedder_of(encoder, pooling=pooling), texts[:1])
        hidden = tiny.tiny_bert().hidden(sequences(embedder, texts[:1])[0])
        assert text.dense is not None
        assert text.dense @ tiny.unit(hidden[row]) >= 0.999999


def test_heads_are_bge_m3s_and_no_other_models_beside_it(
    models: Path, tmp_path: Path, load: Load
) -> None:
    bare = embedder_of(load(tiny.write_embedder(tmp_path / "embedder.gguf")))
    assert "no sparse_linear.pt and colbert_linear.pt beside" in bare.missing("sparse")
    tiny.write_heads(tmp_path)
    for write, pooling in ((tiny.write_decoder, "last"), (tiny.write_bert, "mean")):
        encoder = load(write(tmp_path / "other.gguf"))
        assert (encoder.heads, encoder.pooling) == (None, pooling)
    assert load(tmp_path / "embedder.gguf").heads is not None


def test_a_decoder_embeds_with_its_last_token_and_remembers_nothing(
    models: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (512, 16):  # at once, and in pieces that end in the middle of texts
        monkeypatch.setattr(llama_encoder, "DECODER_STEP", step)
        encoder = load(models / "plain" / "decoder.gguf")
        assert encoder.pooling == "last"
        embedder = embedder_of(encoder)
        texts = ["hello world", "the weather in Paris", "a", "hello world " * 10]
        for _ in range(3):
            ids = sequences(embedder, texts)
            assert all(of_text[-1] == encoder.specials.end for of_text in ids)
            for text, of_text in zip(embed(embedder, texts), ids, strict=True):
                wanted = tiny.unit(tiny.tiny_decoder().hidden(of_text.tolist())[-1])
                assert text.dense is not None
                assert text.dense @ wanted >= 0.99999


@pytest.mark.parametrize(("is_causal", "pooling"), [(True, "last"), (False, "mean")])
def test_a_decoder_whose_file_says_no_pooling_has_no_row_of_cls(
    is_causal: bool, pooling: Any, tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny.write_decoder(tmp_path / "decoder.gguf", pooling=None, is_causal=is_causal)
    encoder, texts = load(path), ["hello world", "the weather in Paris"]
    assert encoder.pooling is None
    found = embed(embedder_of(encoder), texts)
    assert f"'{pooling}' is taken" in caplog.text
    for text, wanted in zip(
        found, embed(embedder_of(encoder, pooling=pooling), texts), strict=True
    ):
        assert np.array_equal(text.dense, wanted.dense)


def test_a_llama_that_embeds_sees_both_ways_and_all_of_a_long_text(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file does not say so; of a text in steps each row would see one step."""
    path = gguf_fixtures.write_tiny_spm(tmp_path / "nemotron.gguf", architecture="llama-embed")
    ids = [np.arange(300, 340, dtype=np.int32), np.arange(320, 350, dtype=np.int32)]
    other = [ids[0].copy(), ids[1]]
    other[0][-1] += 1
    monkeypatch.setattr(llama_encoder, "DECODER_STEP", 16)
    encoder = load(path)
    assert (encoder.pooling, encoder.default_pooling) == (None, "mean")
    rows = encoder.encode(ids).copy()
    alone = np.concatenate([encoder.encode([of]).copy() for of in ids])
    assert rows == pytest.approx(alone, abs=1e-3)
    changed = encoder.encode(other)
    assert np.abs(changed[0] - rows[0]).max() > 1e-2, "the first has seen the last"
    assert changed[40:] == pytest.approx(rows[40:], abs=1e-3)


@pytest.mark.parametrize(("file_type", "cosine"), [("F32", 0.9999), ("Q8_0", 0.999)])
def test_vectors_do_not_depend_on_who_is_in_the_batch(
    file_type: FileType, cosine: float, models: Path, load: Load
) -> None:
    embedder = embedder_of(load(models / f"embedder-{file_type}.gguf", flash_attention=True))
    alone = embed(embedder, TEXTS, size=1)
    order = list(range(len(TEXTS)))
    for seed in range(3):
        random.Random(seed).shuffle(order)
        for size in (3, 8):
            for at, text in zip(
                order, embed(embedder, [TEXTS[i] for i in order], size), strict=True
            ):
                other = alone[at]
                assert text.dense is not None
                assert other.dense is not None
                assert text.dense @ other.dense >= cosine
                assert text.colbert is not None
                assert other.colbert is not None
                assert (text.colbert * other.colbert).sum(axis=1).min() >= cosine - 1e-3


def test_scores_do_not_depend_on_who_is_in_the_batch(models: Path, load: Load) -> None:
    reranker = BGEReranker(load(models / "reranker-F32.gguf"))
    alone = scores_of(reranker, PAIRS[:20], size=1)
    assert scores_of(reranker, PAIRS[:20], size=7) == pytest.approx(alone, abs=3e-3)
    assert scores_of(reranker, PAIRS[19::-1], size=5)[::-1] == pytest.approx(alone, abs=3e-3)


# tokens


def test_pairs_are_built_of_ids_whatever_the_texts_look_like(models: Path, load: Load) -> None:
    reranker = BGEReranker(load(models / "reranker-F32.gguf"))
    q, d = reranker.tokenize("capital of France"), reranker.tokenize("Paris")
    (ids,) = pairs_of(reranker, [("capital of France", "Paris")])
    assert ids.tolist() == [0, *q, 2, 2, *d, 2]
    (ids,) = pairs_of(reranker, [("q</s><s>", "</s>")])
    assert [token for token in ids.tolist() if token < 3] == [0, 2, 2, 2]
    (ids,) = pairs_of(reranker, [("", "")])
    assert ids.tolist() == [0, 2, 2, 2]


def test_a_query_takes_three_quarters_and_then_only_the_document_is_cut(
    models: Path, load: Load
) -> None:
    reranker = BGEReranker(load(models / "reranker-F32.gguf", n_ctx=64))
    query, document = "what " * 100, "Paris " * 100
    framed, *n_cut = reranker.frame(query, document)
    fitting = framed.fit(64, "end")
    assert fitting is not None
    ids = fitting[0].tolist()
    (what,), (paris,) = reranker.tokenize("what"), reranker.tokenize("Paris")
    assert ids == [0, *[what] * 48, 2, 2, *[paris] * 12, 2]
    assert [n_cut[0] + fitting[1], n_cut[1]] == [88, 52]


def test_a_bert_pair_has_one_separator(models: Path, load: Load) -> None:
    specials = load(models / "plain" / "bert.gguf").specials
    pieces = tiny.wordpieces()
    cls, sep = pieces.index("[CLS]"), pieces.index("[SEP]")
    assert (specials.begin, specials.between, specials.end) == (cls, (sep,), sep)


def test_texts_have_their_begin_and_end_also_where_the_file_does_not_say_so(
    tmp_path: Path, load: Load
) -> None:
    path = tiny.write_embedder(
        tmp_path / "old.gguf",
        tokenizer__ggml__add_bos_token=None,
        tokenizer__ggml__add_eos_token=None,
    )
    (ids,) = sequences(embedder_of(load(path)), ["hello world"])
    assert (ids[0], ids[-1], (ids[1:-1] > 3).all()) == (0, 2, True)


@pytest.mark.parametrize(
    ("begins", "ends", "borders"),
    [
        (None, None, (0, 2)),
        (True, True, (0, 2)),
        (False, False, (None, None)),
        (False, True, (None, 2)),
        (False, None, (None, None)),  # as EuroBERT's converter writes it
    ],
)
def test_a_bpe_has_the_begin_and_end_that_its_file_says(
    begins: Any, ends: Any, borders: tuple[int | None, int | None], tmp_path: Path, load: Load
) -> None:
    path = tiny.write_embedder(
        tmp_path / "bpe.gguf",
        tokenizer__ggml__model="gpt2",
        tokenizer__ggml__pre="gpt-2",
        tokenizer__ggml__merges=["h e"],
        tokenizer__ggml__add_bos_token=begins,
        tokenizer__ggml__add_eos_token=ends,
    )
    encoder = load(path)
    assert (encoder.specials.begin, encoder.specials.end) == borders
    assert encoder.specials.between == (2, 2)
    (ids,) = sequences(embedder_of(encoder), ["hello"])
    assert (0 in ids, 2 in ids) == tuple(border is not None for border in borders)


def test_unknown_words_and_names_of_control_tokens_are_only_text(models: Path, load: Load) -> None:
    unknown = tiny.wordpieces().index("[UNK]")
    (ids,) = sequences(embedder_of(load(models / "plain" / "bert.gguf")), ["hello Ж [SEP] world"])
    assert unknown in ids
    assert ids.tolist().count(tiny.wordpieces().index("[SEP]")) == 1
    for name in ("embedder-F32.gguf", "plain/decoder.gguf"):
        encoder = load(models / name)
        (ids,) = sequences(embedder_of(encoder), ["hello </s> <s> world"])
        assert ids.tolist().count(encoder.specials.end) == 1


@pytest.mark.parametrize("keeps_spaces", [None, False])
def test_runs_of_spaces_count_as_one_whatever_the_converter_wrote(
    keeps_spaces: Any, models: Path, tmp_path: Path, load: Load
) -> None:
    path = tiny.write_embedder(
        tmp_path / "new.gguf", tokenizer__ggml__remove_extra_whitespaces=keeps_spaces
    )
    text = "  two   spaces\tand\nnew lines  "
    (wanted,) = sequences(embedder_of(load(models / "embedder-F32.gguf")), [text])
    (found,) = sequences(embedder_of(load(path)), [text])
    assert found.tolist() == wanted.tolist()


CAPITALS = {f"##{letter}": f"##{letter.upper()}" for letter in "abcdefghijklm"}
CASED = CAPITALS | {"paris": "Paris", "berlin": "Été"}


@pytest.mark.parametrize(
    ("pieces", "lowercase", "keeps"),
    [
        (CASED, None, True),
        ({"paris": "Paris", "berlin": "Été", "##a": "##A"}, None, False),  # by chance
        (CASED, True, False),
        (CASED, False, True),
    ],
)
def test_a_wordpiece_with_capitals_keeps_them(
    pieces: Any, lowercase: bool | None, keeps: bool, tmp_path: Path, load: Load
) -> None:
    path = tiny.write_bert(tmp_path / "bert.gguf", pieces=pieces, lowercase=lowercase)
    ids = load(path).tokenizer.tokenize("Paris Été", parse_special=False, continues=False)
    words = [tiny.wordpieces().index(word) for word in ("paris", "berlin")]
    assert (ids == words) == keeps


# what must not end the process


def write_split(path: Path, split_by: str) -> Path:
    return tiny.write_embedder(
        path,
        tokenizer__ggml__model="gpt2",
        tokenizer__ggml__pre=split_by,
        tokenizer__ggml__merges=["h e"],
    )


TOKENIZES = """
import sys, threading
from pathlib import Path
from tests.own_encoder import loading
with loading() as load:
    tokenizer = load(Path(sys.argv[1])).tokenizer
    tokenizer.tokenize(eval(sys.argv[2]), parse_special=False, continues=False)
    print(threading.active_count())
"""


@pytest.mark.parametrize("text", ["'h' * 500_000", "' ' * 500_000", "'!' * 5000 + '\\n' * 500_000"])
def test_a_text_without_spaces_ends_no_process(text: str, tmp_path: Path) -> None:
    """Tokenised on the main thread, whose stack is none of ours."""
    path = write_split(tmp_path / "gpt-4o.gguf", "gpt-4o")
    said = subprocess.run(
        [sys.executable, "-c", TOKENIZES, str(path), text],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr[-500:]
    assert said.stdout == "1\n"


@pytest.mark.parametrize(
    ("split_by", "text"),
    [
        ("gpt-4o", "h" * 600_000), ("gpt-4o", "\u3000 " * 300_000), ("gpt-4o", "\x1c!" * 300_000),
        ("exaone-moe", "h " * 300_000),
    ],
)  # fmt: skip
def test_what_takes_too_much_of_a_stack_is_refused(
    split_by: str, text: str, tmp_path: Path, load: Load
) -> None:
    encoder = load(write_split(tmp_path / "model.gguf", split_by))
    jobs = EncoderJobs(embedder_of(encoder), tier="embedding", batch_tokens=512)
    jobs.admit(wire.Embed(["hello", f"hello\n{text}\nhello"], ["dense"], truncate="end", job=1))
    (failed,) = jobs.tokenize()
    assert isinstance(failed, wire.Failed)
    assert (failed.code, failed.param, failed.numbers) == (None, "input", {"index": 1})
    assert re.search(r"600,00. characters without a .* takes 524,288 such", failed.message)


@pytest.mark.parametrize("split_by", ["gpt-2", "llama-bpe", "qwen2", "qwen35", "smollm"])
def test_what_no_expression_splits_takes_no_stack(
    split_by: str, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeepThread, "stack_bytes", LEAST_BYTES)
    tokenize = load(write_split(tmp_path / "model.gguf", split_by)).tokenizer.tokenize
    assert tokenize("h" * 600_000, parse_special=False, continues=False)
    for text in (" " * 600_000, "!" * 600_000):  # which this vocabulary has no tokens for
        tokenize(text, parse_special=False, continues=False)


def test_a_long_text_leaves_no_thread_with_a_stack_that_it_used(tmp_path: Path, load: Load) -> None:
    tokenize = load(write_split(tmp_path / "model.gguf", "gpt-4o")).tokenizer.tokenize
    begun: list[threading.Thread] = []

    class Noted(DeepThread):
        def run(self) -> None:
            begun.append(self)
            super().run()

    def tokenize_all() -> None:
        for n in (llama_tokenizer.SHORT, llama_tokenizer.LONG, llama_tokenizer.LONG + 1):
            tokenize("h" * n, parse_special=False, continues=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.deep.DeepThread", Noted)
        caller = Noted(target=tokenize_all)
        caller.start()
        caller.join()
    assert len(begun) == 2  # the caller, and one for the last
    assert not any(thread.is_alive() for thread in begun)


def test_where_no_stack_is_deep_less_is_taken(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeepThread, "stack_bytes", LEAST_BYTES)
    tokenize = load(write_split(tmp_path / "model.gguf", "gpt-4o")).tokenizer.tokenize
    assert tokenize("hell " * 10_000 + "h" * 8000, parse_special=False, continues=False)
    with pytest.raises(BadRequest, match=r"9,000 characters .* takes 8,192"):
        tokenize("hell " * 10_000 + "h" * 9000, parse_special=False, continues=False)


def ids_of(*lengths: int) -> list[NDArray[np.int32]]:
    return [np.full(length, 5, np.int32) for length in lengths]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([], "0 sequences"),
        (ids_of(0), "0 tokens"),
        (ids_of(5, 0), "0 tokens"),
        (ids_of(257), "257 tokens"),  # longer than a sequence may be
        (ids_of(600), "600 tokens"),  # and than the model has positions
        (ids_of(200, 200, 200), "600 tokens"),  # together too many
        (ids_of(*[1] * 65), "65 sequences"),
        ([np.array([5, -1], np.int32)], "token ids"),
        ([np.array([5, 10**6], np.int32)], "token ids"),
    ],
)
@pytest.mark.parametrize("name", ["embedder-F32.gguf", "reranker-F32.gguf", "plain/decoder.gguf"])
def test_a_batch_that_would_end_the_process_is_refused(
    name: str, batch: Any, words: str, models: Path, load: Load
) -> None:
    encoder = load(models / name, n_ctx=256, batch_tokens=512)
    with pytest.raises(ValueError, match=words):
        encoder.encode(batch)
    assert np.isfinite(encoder.encode(ids_of(256, 100, 100))).all(), "the next one is computed"


def test_no_more_positions_are_used_than_the_model_has(models: Path, load: Load) -> None:
    encoder = load(models / "embedder-F32.gguf", n_ctx=8192)
    assert encoder.n_ctx == 512
    assert np.isfinite(encoder.encode(ids_of(512))).all()


def test_the_most_sequences_and_tokens_of_a_batch_are_computed(models: Path, load: Load) -> None:
    encoder = load(models / "embedder-F32.gguf", n_ctx=100, batch_tokens=640)
    assert encoder.encode(ids_of(*[10] * 64)).shape == (640, 64)


# room for the logits of each token is made, also where none are computed


def test_a_batch_for_which_there_is_no_memory_is_its_texts_error(
    models: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load(models / "embedder-F32.gguf")
    before = encoder.encode(ids_of(20)).copy()
    monkeypatch.setattr(llama_encoder, "available_bytes", lambda: 50_000)
    with pytest.raises(InsufficientMemory, match="160 tokens needs"):
        encoder.encode(ids_of(160))
    assert np.array_equal(encoder.encode(ids_of(20)), before), "there is room for as many as before"
    monkeypatch.undo()
    assert len(encoder.encode(ids_of(160))) == 160


def test_room_is_made_at_once_for_full_batches_where_there_is_memory(
    models: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a large vocabulary that takes 1 ms a token, for each batch longer than any before."""
    encoder = load(models / "embedder-F32.gguf", n_ctx=300, batch_tokens=200)
    rows = encoder.encode(ids_of(70)).copy()
    assert np.array_equal(encoder.encode(ids_of(70)), rows), "what made the room was not this"
    monkeypatch.setattr(llama_encoder, "available_bytes", lambda: 0)
    assert len(encoder.encode(ids_of(100, 100))) == 200
    with pytest.raises(InsufficientMemory, match="210 tokens needs"):
        encoder.encode(ids_of(210))
    needed = 210 * encoder.tokenizer.n_vocab * 4
    monkeypatch.setattr(llama_encoder, "available_bytes", lambda: needed)
    assert len(encoder.encode(ids_of(210))) == 210
    monkeypatch.setattr(llama_encoder, "available_bytes", lambda: needed - 1)
    assert len(encoder.encode(ids_of(210))) == 210, "there is room"
    with pytest.raises(InsufficientMemory, match="211 tokens needs"):
        encoder.encode(ids_of(211))


@pytest.mark.parametrize(("gives_back", "n_spare", "room"), [(True, 10, 80), (False, 1000, 128)])
def test_room_beyond_what_is_needed_is_bounded(
    gives_back: bool,
    n_spare: int,
    room: int,
    models: Path,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is in no footprint."""
    monkeypatch.setattr(llama_encoder.sys, "platform", "linux" if gives_back else "darwin")
    encoder = load(models / "embedder-F32.gguf", n_ctx=300, batch_tokens=200)
    token_bytes = encoder.tokenizer.n_vocab * 4
    monkeypatch.setattr(llama_encoder, "MAX_SPARE_BYTES", n_spare * token_bytes)
    encoder.encode(ids_of(70))
    monkeypatch.setattr(llama_encoder, "available_bytes", lambda: 0)
    assert len(encoder.encode(ids_of(room))) == room
    with pytest.raises(InsufficientMemory):
        encoder.encode(ids_of(room + 1))


@pytest.mark.parametrize(
    ("error", "is_told", "tried"),
    [
        (llama_encoder.OutOfMemory, InsufficientMemory, [200, 100]),
        (llama_encoder.Error, llama_encoder.Error, [200]),  # which ends a worker in the long run
    ],
)
def test_what_llama_cpp_cannot_make_room_for_is_made_anew(
    error: type[Exception],
    is_told: type[Exception],
    tried: list[int],
    models: Path,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = load(models / "embedder-F32.gguf", n_ctx=300, batch_tokens=200)
    before = encoder.encode(ids_of(20)).copy()
    calls, call = [], encoder._call

    def fail(start: int, end: int) -> None:
        calls.append(end)
        if len(calls) <= len(tried):
            raise error("it failed")
        call(start, end)

    monkeypatch.setattr(encoder, "_call", fail)
    with pytest.raises(is_told):
        encoder.encode(ids_of(100))
    assert calls == tried
    assert np.array_equal(encoder.encode(ids_of(20)), before)
    assert calls == [*tried, 200, 20]


def test_pages_of_rows_are_given_back(
    models: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie in another place for each number of tokens, so they would become more and more."""
    encoder = load(models / "embedder-F32.gguf")
    before = [encoder.encode(ids_of(n)).copy() for n in (100, 80, 10)]
    monkeypatch.setattr(llama_encoder, "MAX_ROW_BYTES", 100 * encoder.n_embd * 4)
    given_back: list[int] = []
    give_back = encoder._give_back
    monkeypatch.setattr(encoder, "_give_back", lambda: (given_back.append(1), give_back()))
    after = [encoder.encode(ids_of(n)).copy() for n in (100, 80, 10)]
    assert len(given_back) == 2
    assert all(map(np.array_equal, before, after))


def test_a_computation_that_nobody_wants_ends_and_the_next_one_is_right(
    models: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("embedder-F32.gguf", "plain/decoder.gguf"):
        encoder = load(models / name)
        before = encoder.encode(ids_of(20, 80)).copy()
        n_asked = []

        def go_on(asked: list[int] = n_asked) -> bool:
            asked.append(1)
            return len(asked) < 10

        caplog.clear()
        with pytest.raises(Interrupted):
            encoder.encode(ids_of(100, 100), go_on)
        assert len(n_asked) == 10
        assert not caplog.records, "nothing went wrong"
        assert np.array_equal(encoder.encode(ids_of(20, 80)), before)


def test_what_is_raised_while_it_computes_comes_out(models: Path, load: Load) -> None:
    def go_on() -> bool:
        raise ConnectionError("the server has gone")

    with pytest.raises(ConnectionError):
        load(models / "embedder-F32.gguf").encode(ids_of(20), go_on)


def test_a_long_text_travels_alone_beside_short_ones(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int]] = []
    encode = LlamaEncoder.encode

    def recorded(self: LlamaEncoder, batch: Any, *rest: Any) -> Any:
        batches.append([len(ids) for ids in batch])
        return encode(self, batch, *rest)

    monkeypatch.setattr(LlamaEncoder, "encode", recorded)
    model = load_model(spec(models / "embedder-F32.gguf"), lambda _: None)
    jobs = EncoderJobs(model, tier="embedding", batch_tokens=64)
    texts: list[str | list[int]] = ["hello world", "what " * 500, "Paris", "what " * 62]
    assert not jobs.admit(wire.Embed(texts, ["dense"], job=1))
    found: list[wire.Vector] = []
    while not jobs.idle:
        for message in [*jobs.tokenize(), *jobs.compute(lambda: True)]:
            assert isinstance(message, wire.Vectors)
            found += message.items
    model.encoder.close()
    assert len(jobs) == 0, "it is forgotten"
    assert batches == [[502], [64], [4, 3]]
    assert sorted(item.index for item in found) == [0, 1, 2, 3]
    assert all(item.dense for item in found)


# rerankers: their head


def test_a_cross_encoder_without_its_head_is_refused(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "reranker.gguf"
    path.write_bytes((models / "embedder-F32.gguf").read_bytes())
    with pytest.raises(ModelLoadFailed, match=r"reranker\.gguf has no head that scores pairs"):
        load_model(spec(path), lambda _: None)


@pytest.mark.parametrize("factor", [0, np.nan])
def test_a_cross_encoder_that_cannot_tell_an_answer_from_nonsense_is_refused(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.tiny_reranker()
    weight = model.tensors["cls.output.weight"] * np.float32(factor)
    broken = replace(model, tensors=dict(model.tensors) | {"cls.output.weight": weight})
    monkeypatch.setattr(tiny, "tiny_reranker", lambda: broken)
    path = tiny.write_reranker(tmp_path / "reranker.gguf")
    with pytest.raises(ModelLoadFailed, match="no higher than nonsense"):
        load_model(spec(path), lambda _: None)


def test_a_cross_encoder_with_a_trained_head_is_taken(
    models: Path, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.tiny_reranker()
    texts = [(query, answer) for query, _ in PROOF[0] for _, answer in PROOF[0]]
    ids = pairs_of(BGEReranker(load(models / "reranker-F32.gguf")), texts)
    wanted = [4 if pair in PROOF[0] else -4 for pair in texts]
    taught = model.taught([pair.tolist() for pair in ids], wanted)
    monkeypatch.setattr(tiny, "tiny_reranker", lambda: taught)
    path = tiny.write_reranker(tmp_path / "reranker.gguf")
    reranker = load_model(spec(path), lambda _: None)
    assert isinstance(reranker, BGEReranker)
    found = scores_of(reranker, texts)
    reranker.encoder.close()
    assert found == pytest.approx(wanted, abs=0.1)


def test_one_float_is_read_of_a_score(models: Path, load: Load) -> None:
    encoder = load(models / "reranker-F32.gguf")
    assert encoder.encode(ids_of(5, 6, 7)).shape == (3,)
    assert encoder.scale == "logit"


def test_a_cross_encoder_that_needs_token_types_is_refused(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(tiny.write_bert_reranker(tmp_path / "one-reranker.gguf")).scale == "logit"
    count = gguf.GGUFWriter.add_token_type_count
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_type_count", lambda self, _: count(self, 2))
    path = tiny.write_bert_reranker(tmp_path / "two-reranker.gguf")
    with pytest.raises(ModelLoadFailed, match=r"token types.*BACKEND=mlx, onnx or flag"):
        load(path)


def test_a_cross_encoder_out_of_distilbert_is_refused(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which its file is told by: it has no table of token types."""
    model = tiny.tiny_bert_reranker()
    tensors = {k: v for k, v in model.tensors.items() if k != "token_types.weight"}
    distilled = replace(model, tensors=tensors)
    monkeypatch.setattr(tiny, "tiny_bert_reranker", lambda: distilled)
    with pytest.raises(ModelLoadFailed, match=r"DistilBERT.*by another function"):
        load(tiny.write_bert_reranker(tmp_path / "distil-reranker.gguf"))


def test_a_cross_encoder_of_several_classes_is_refused(tmp_path: Path, load: Load) -> None:
    path = tiny.write_reranker(
        tmp_path / "nli-reranker.gguf",
        bert__classifier__output_labels=["contradiction", "entailment", "neutral"],
    )
    with pytest.raises(ModelLoadFailed, match="tells 3 classes apart"):
        load(path)


@pytest.mark.parametrize(
    ("dense", "is_told"), [([], True), (["dense_2.weight", "dense_3.weight"], False)]
)
def test_an_embeddinggemma_without_its_last_layers_is_told_of(
    dense: list[str], is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = ["token_embd.weight", *dense]
    path = gguf_fixtures.write_minimal(
        tmp_path / "gemma.gguf", architecture="gemma-embedding", tensors=tensors
    )
    llama_encoder._Facts(path)
    assert ("gemma.gguf lacks dense_2 and dense_3" in caplog.text) == is_told


@pytest.mark.parametrize("flash", [False, True])
def test_a_decoders_cells_leave_nothing_behind(flash: bool, tmp_path: Path, load: Load) -> None:
    path = tiny.write_decoder(tmp_path / "decoder.gguf", no_numbers_of=40)
    used, fresh = (load(path, flash_attention=flash) for _ in range(2))
    batch = [np.arange(50, 70, dtype=np.int32), np.arange(60, 67, dtype=np.int32)]
    wanted = fresh.encode(batch).copy()
    for before in ([50] * 500, [50, 40, 50] * 100):
        rows = used.encode([np.array(before, np.int32)])
        assert np.isfinite(rows).all() == (40 not in before)
        assert np.array_equal(used.encode(batch), wanted)


def test_cells_are_cleared_where_they_are_no_cells_or_hold_no_numbers(
    models: Path, load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cleared: list[bool] = []
    clear = llama_cpp.llama_memory_clear

    def note(memory: Any, data: bool) -> None:
        cleared.append(data)
        clear(memory, data)

    monkeypatch.setattr(llama_cpp, "llama_memory_clear", note)
    encoder = load(tiny.write_decoder(tmp_path / "decoder.gguf", no_numbers_of=40))
    for token in (50, 50, 40, 50, 50):
        encoder.encode([np.array([token], np.int32)])
    assert cleared == [False, False, False, True, False]
    with pytest.raises(Interrupted):
        encoder.encode([np.array([40] * 400, np.int32)], lambda: False)
    encoder.encode([np.array([50], np.int32)])
    assert cleared[-2:] == [False, True]
    monkeypatch.setattr(llama_cpp, "llama_model_is_recurrent", lambda _: True)
    cleared.clear()
    encoder = load(models / "plain" / "decoder.gguf")
    encoder.encode([np.array([50], np.int32)])
    assert cleared == [True]


def test_a_decoder_that_scores_without_a_prompt_is_refused(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(tiny.write_judge(tmp_path / "a-reranker.gguf")).template == tiny.JUDGE_TEMPLATE
    monkeypatch.setattr(gguf.GGUFWriter, "add_chat_template", lambda *_: None)
    path = tiny.write_judge(tmp_path / "b-reranker.gguf")
    with pytest.raises(ModelLoadFailed, match="no chat template 'rerank'"):
        load(path)


def test_a_decoder_scores_in_steps_that_end_in_the_middle_of_pairs(
    prompted: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [("hello", "hello world"), ("a", "b"), ("hello", "weather " * 9)]
    monkeypatch.setattr(llama_encoder, "DECODER_STEP", 512)
    at_once = scores_of(BGEReranker(load(prompted)), texts)
    monkeypatch.setattr(llama_encoder, "DECODER_STEP", 16)
    encoder = load(prompted)
    assert isinstance(encoder, LlamaEncoder)
    assert llama_cpp.llama_n_ubatch(encoder._context) == 16, "it has logits of each token"
    assert scores_of(BGEReranker(encoder), texts) == pytest.approx(at_once, abs=1e-5)


TEMPLATE = "<|q|>{query}\n<|d|>{document}<|a|>"


@pytest.fixture
def prompted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A decoder that says yes or no to a prompt, like Qwen3-Reranker."""
    write_tensors = tiny._write_tensors

    def with_head(writer: gguf.GGUFWriter, tensors: Any, file_type: FileType) -> None:
        writer.kv_data[0].pop("qwen3.pooling_type")
        writer.add_pooling_type(gguf.PoolingType.RANK)
        writer.add_classifier_output_labels(["yes", "no"])
        writer.add_string("tokenizer.chat_template.rerank", TEMPLATE)
        head = np.random.RandomState(5).normal(0, 0.1, (2, 64)).astype(np.float32)
        write_tensors(writer, dict(tensors) | {"cls.output.weight": head}, file_type)

    monkeypatch.setattr(tiny, "_write_tensors", with_head)
    return tiny.write_decoder(tmp_path / "reranker.gguf")


def test_a_reranker_with_a_prompt_gives_probabilities(prompted: Path, load: Load) -> None:
    encoder = load(prompted)
    assert (encoder.scale, encoder.template) == ("probability", TEMPLATE)
    reranker = BGEReranker(encoder)
    texts = [("hello", "hello world"), ("a", "b"), ("hello", "weather")]
    found = scores_of(reranker, texts)
    assert all(0 < score < 1 for score in found)
    head = np.random.RandomState(5).normal(0, 0.1, (2, 64)).astype(np.float32)
    for ids, score in zip(pairs_of(reranker, texts), found, strict=True):
        row = tiny.tiny_decoder().hidden(ids.tolist())[-1]
        assert score == pytest.approx(tiny.softmax(head @ row)[0], abs=2e-3)


def test_a_pair_in_a_prompt_is_one_text_and_its_document_can_be_cut(
    prompted: Path, load: Load
) -> None:
    reranker = BGEReranker(load(prompted, n_ctx=64))
    tokenizer = reranker.encoder.tokenizer

    def whole(text: str) -> list[int]:
        return tokenizer.tokenize(text, parse_special=True, continues=False)

    (ids,) = pairs_of(reranker, [("hello", "{query}")])
    assert ids.tolist() == whole("<|q|>hello\n<|d|>{query}<|a|>"), "nothing is filled in twice"
    (ids,) = pairs_of(reranker, [("hello", "world " * 200)])
    assert len(ids) == 64
    end = whole("<|a|>")[1:]  # without the space that begins a text
    assert ids.tolist()[-len(end) :] == end


# all together


def test_one_worker_embeds_and_scores(models: Path) -> None:
    path = str(models / "embedder-F32.gguf")

    async def test(manager: ModelManager) -> None:
        tier = manager.scorer("reranker", "hybrid")
        query, documents = "what is the capital of France", [*TEXTS]
        pairs = [(0, i) for i in range(len(documents))]
        with (
            tier.embed(wire.Embed([query, *documents], [*ALL])) as embedding,
            tier.score(wire.Score([query], documents, pairs, "hybrid", (1, 0.5, 2))) as scoring,
        ):
            first, *others = await items_of(embedding)
            scored = await items_of(scoring)

        def read(item: wire.Vector) -> Embedded:
            return Embedded(
                True,
                np.frombuffer(item.dense or b"", "<f4"),
                (
                    np.frombuffer(item.sparse_ids or b"", "<i4"),
                    np.frombuffer(item.sparse_weights or b"", "<f4"),
                ),
                np.frombuffer(item.colbert or b"", "<f4").reshape(-1, 64),
            )

        for item, score in zip(others, scored, strict=True):
            assert (score.n_query, score.n_document) == (first.n_tokens, item.n_tokens)
            wanted = EmbeddingReranker.score(read(first), read(item), "hybrid", (1, 0.5, 2))
            assert score.score == pytest.approx(wanted, abs=5e-3)

    run(test, embedding=TierSettings(model_path=path, n_threads=1))


@pytest.mark.parametrize("adds_eos", [True, False])
def test_an_empty_document_does_not_cost_the_others_their_scores(
    tmp_path: Path, adds_eos: bool
) -> None:
    path = tiny.write_decoder(tmp_path / "decoder.gguf", adds_eos=adds_eos)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        asked = wire.Score(["what?"], ["", "a text", " "], [(0, i) for i in range(3)], "dense")
        with tier.score(asked) as scoring:
            scored = await items_of(scoring)
        assert all(-1 <= item.score <= 1 for item in scored)
        if not adds_eos:  # without a token around it nothing is left but a space
            assert scored[0].score == scored[2].score

    run(test, embedding=TierSettings(model_path=str(path), n_threads=1))


@pytest.mark.parametrize("name", ["reranker-F32.gguf", "judge"])
def test_a_cross_encoder_reads_a_query_and_an_empty_document(
    models: Path, prompted: Path, load: Load, name: str
) -> None:
    path = prompted if name == "judge" else models / name
    reranker = BGEReranker(load(path, kind="reranker"))
    for score in scores_of(reranker, [("what?", ""), ("what?", "a text")]):
        assert np.isfinite(score)


def test_equal_documents_have_the_very_same_score_in_whatever_company(models: Path) -> None:
    documents = [TEXTS[n % 7] if n % 2 else "the same" for n in range(40)]

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["embedding"]
        pairs = [(0, i) for i in range(len(documents))]
        with tier.score(wire.Score(["what?"], documents, pairs, "dense")) as scoring:
            scored = await items_of(scoring)
        for n in range(40):
            alike = {scored[m].score for m in range(40) if documents[m] == documents[n]}
            assert len(alike) == 1

    path = str(models / "embedder-F32.gguf")
    run(test, embedding=TierSettings(model_path=path, n_threads=1, batch_tokens=64))
