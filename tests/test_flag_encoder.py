"""The backend flag: what a directory says, how it calls, and what FlagEmbedding says of the same.

Most run on stand-ins for torch and FlagEmbedding, whose network is the reference in numpy. The last
ones run where FlagEmbedding is installed (`./setup.sh --flag`).
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embedders import BGEM3Embedder, SimpleEmbedder, new_embedder
from engine import wire
from engine.backends import flag_encoder
from engine.backends.base import Encoder, Interrupted, load_encoder
from engine.backends.padded import groups
from engine.client import launch_process
from engine.model_folder import pooling_in, read_model_folder
from errors import ModelLoadFailed
from metrics import Metrics
from models.convert.hf_folder import write_safetensors
from progress import ProgressLog
from rerankers import BGEReranker, max_sim
from room import Room
from settings import ServerSettings, TierName, TierSettings
from tests import encoder_fixtures as tiny
from tests.encoder_fixtures import PAIRS, TEXTS
from tests.record_flag import PAIR_LENGTHS, REAL_TEXTS, real_model, recorded
from tests.torch_files import write_pt
from tier import Tier

ALL: frozenset[Any] = frozenset({"dense", "sparse", "colbert"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    tiny.write_hf_embedder(folder / "embedder")
    tiny.write_hf_reranker(folder / "reranker")
    return folder


def spec(path: Path, n_ctx: int = 512, **values: Any) -> wire.WorkerSpec:
    kind = "reranker" if "reranker" in path.name else "embedding"
    return wire.WorkerSpec(
        name="embedding", backend="flag", model_path=str(path), n_ctx=n_ctx, n_parallel=8,
        kv_tokens=512, n_batch=512, n_threads=1, n_gpu_layers=0,
        encoder=wire.EncoderSpec(**{"kind": kind} | values),
    )  # fmt: skip


def load(path: Path, **values: Any) -> Encoder:
    return load_encoder(spec(path, **values), lambda _: None)


# what a directory says


def test_a_directory_says_what_its_model_is_for(folders: Path) -> None:
    model = read_model_folder(folders / "embedder")
    bert = tiny.tiny_embedder()
    assert (model.kind, model.architecture, model.name) == ("embedding", "xlm-roberta", "embedder")
    assert (model.n_ctx_train, model.n_embd, model.n_layer) == (512, bert.n_embd, bert.n_layer)
    assert model.n_vocab == len(tiny.unigram().pieces)
    assert model.size_bytes == (folders / "embedder" / "model.safetensors").stat().st_size
    assert read_model_folder(folders / "reranker").kind == "reranker"


Damage = Callable[[Path], object]


def config(**values: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def modules(*kinds: str) -> Damage:
    listed = [{"idx": n, "type": f"sentence_transformers.models.{k}"} for n, k in enumerate(kinds)]
    return lambda folder: (folder / "modules.json").write_text(json.dumps(listed))


def test_modules_that_every_embedding_model_has_are_known(tmp_path: Path) -> None:
    folder = tiny.write_hf_embedder(tmp_path / "bge")
    for content in ('{"type": "Dense"}', "[1]", "no json"):
        (folder / "modules.json").write_text(content)
        assert read_model_folder(folder).kind == "embedding"
    modules("Transformer", "Pooling", "Normalize")(folder)
    assert read_model_folder(folder).kind == "embedding"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (config(model_type="llama"), "family 'llama'"),
        (config(model_type=["bert"]), "family ['bert']"),
        (config(hidden_size="many"), "no hidden_size"),
        (modules("Transformer", "Pooling", "Dense"), "not computed here (Dense)"),
        (config(position_embedding_type="alibi"), "'alibi'"),  # Jina's, which is a bert
        (config(position_embedding_type="rotary"), "'rotary'"),
        (config(architectures=["XLMRobertaForCausalLM"]), "XLMRobertaForCausalLM"),
        (
            config(architectures=["BertForSequenceClassification"], id2label={"0": "a", "1": "b"}),
            "several classes",
        ),
    ],
)
def test_a_directory_that_will_not_do_is_told_by_its_name(
    damage: Damage, says: str, tmp_path: Path
) -> None:
    folder = tiny.write_hf_embedder(tmp_path / "bge")
    damage(folder)
    with pytest.raises(ModelLoadFailed) as caught:
        read_model_folder(folder)
    assert caught.value.message.startswith("bge ")
    assert says in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_files_and_nothing_are_no_directories(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadFailed, match=r"model.gguf is a file; .* Hugging Face directory"):
        read_model_folder(tmp_path / "model.gguf")
    with pytest.raises(ModelLoadFailed, match="is not there"):
        read_model_folder(tmp_path / "bge-m3")


@pytest.mark.parametrize("kind", ["cls", "mean", "last"])
def test_the_pooling_is_sentence_transformers(kind: str, tmp_path: Path) -> None:
    assert pooling_in(tmp_path) is None
    names = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
    settings = {f"pooling_mode_{name}": name == names[kind] for name in names.values()}
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert pooling_in(tmp_path) == kind


def pooled(settings: object) -> Damage:
    def change(folder: Path) -> None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))

    return change


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("cls", "cls"), ("mean", "mean"), ("lasttoken", "last"), (["mean"], "mean"), ([], None)],
)
def test_the_pooling_is_sentence_transformers_also_as_it_writes_it_since_5_4(
    mode: object, kind: str | None, tmp_path: Path
) -> None:
    pooled({"embedding_dimension": 8, "pooling_mode": mode, "include_prompt": True})(tmp_path)
    assert pooling_in(tmp_path) == kind


def tier_of(name: TierName, path: Path) -> Tier:
    settings = TierSettings(model_path=str(path), backend="flag")
    server = ServerSettings()
    room = Room(1 << 40, patience_s=1)
    return Tier(
        name, settings, server, room=room, metrics=Metrics(), launch=launch_process,
        progress_log=ProgressLog(),
    )  # fmt: skip


def test_a_tier_knows_its_directory_before_it_is_loaded(tmp_path: Path) -> None:
    folder = tiny.write_hf_embedder(tmp_path / "bge-m3-v1.5")
    tier = tier_of("embedding", folder)
    assert (tier.n_ctx, tier.aliases) == (512, ["bge-m3-v1.5"])
    fingerprint = tier.fingerprint
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert tier.fingerprint != fingerprint, "another file in it is another model"
    with pytest.raises(ModelLoadFailed, match="for embeddings and not for chat"):
        tier_of("light", folder).model()
    with pytest.raises(ModelLoadFailed, match="for embeddings and not for reranking"):
        tier_of("reranker", folder).model()


# how it calls


@pytest.mark.parametrize("library", ["torch", "FlagEmbedding"])
def test_a_library_that_is_missing_is_told_with_the_line_to_run(
    library: str, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", Any)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(flag_encoder, "QUIET", {})
    with pytest.raises(ModelLoadFailed, match="needs FlagEmbedding") as caught:
        load(folders / "embedder")
    assert "./setup.sh --flag" in caught.value.message
    assert "pip install -r requirements-flag.txt" in caught.value.message


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([7], [[0]]),
        ([3, 3, 3, 3], [[0, 1, 2, 3]]),
        ([5, 300, 6, 290], [[1, 3], [2, 0]]),
        ([400, 100], [[0], [1]]),
        ([40, 30, 20], [[0, 1, 2]]),  # three calls would cost more than the padding
    ],
)
def test_sequences_of_like_lengths_are_computed_together(
    lengths: list[int], expected: list[list[int]]
) -> None:
    assert groups(lengths) == expected


class Tensor:
    """A stand-in for torch's."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values)

    def to(self, device: str) -> "Tensor":
        assert device == "cpu"
        return self

    def float(self) -> "Tensor":
        return Tensor(self.values.astype(np.float32))

    def cpu(self) -> "Tensor":
        return self

    def numpy(self) -> Any:
        return self.values


class Net:
    """A stand-in for a model of transformers: the reference network, text by text."""

    def __init__(self, bert: tiny.Bert) -> None:
        self.bert = bert
        self.calls: list[list[int]] = []  # the lengths of the sequences of each
        self.types: list[Any] = []
        self._hooks: list[Callable[..., None]] = []
        layer = SimpleNamespace(register_forward_pre_hook=self._hooks.append)
        self.base_model = SimpleNamespace(encoder=SimpleNamespace(layer=[layer]))

    def float(self) -> "Net":
        return self

    def eval(self) -> "Net":
        return self

    def to(self, device: str) -> "Net":
        return self

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Any:
        for hook in self._hooks:
            hook(None, ())
        lengths = attention_mask.values.sum(axis=1)
        self.calls.append(lengths.tolist())
        self.types.append(None if token_type_ids is None else token_type_ids.values.tolist())
        texts = [ids[:n].tolist() for ids, n in zip(input_ids.values, lengths, strict=True)]
        if "cls.weight" in self.bert.tensors:
            return SimpleNamespace(logits=Tensor([[self.bert.logit(ids)] for ids in texts]))
        rows = np.full((*input_ids.values.shape, self.bert.n_embd), np.nan)
        for row, ids in zip(rows, texts, strict=True):
            row[: len(ids)] = self.bert.hidden(ids)
        return SimpleNamespace(last_hidden_state=Tensor(rows))


class Backend:
    """A stand-in for tokenizers.Tokenizer: a word is a token."""

    model = object()
    encode_special_tokens = False

    def no_truncation(self) -> None: ...

    def no_padding(self) -> None: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        return SimpleNamespace(ids=[self._id(word) for word in text.split()])

    def _id(self, word: str) -> int:
        if word == "<s>" and not self.encode_special_tokens:
            return 0
        return 4 + sum(word.encode()) % 200

    def id_to_token(self, token: int) -> str | None:
        return ("<s>", "<pad>", "</s>", "<unk>")[token] if token < 4 else f"▁{token}"


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> dict[str, Net]:
    """Stand-ins for both libraries; the network of each kind."""
    nets = {"embedder": Net(tiny.tiny_embedder()), "reranker": Net(tiny.tiny_reranker())}
    tokenizer = SimpleNamespace(
        backend_tokenizer=Backend(), all_special_ids=[0, 1, 2, 3], cls_token_id=0, pad_token_id=1,
        sep_token_id=2, eos_token_id=2, unk_token_id=3,
    )  # fmt: skip

    def flag_class(kind: str) -> Callable[..., Any]:
        def start(path: str, *, use_fp16: bool, devices: str) -> Any:
            assert (Path(path).name, use_fp16, devices) == (kind, False, "cpu")
            model: Any = nets[kind]
            model = SimpleNamespace(model=model) if kind == "embedder" else model
            return SimpleNamespace(tokenizer=tokenizer, model=model)

        return start

    flag = SimpleNamespace(
        BGEM3FlagModel=flag_class("embedder"), FlagReranker=flag_class("reranker")
    )
    torch = SimpleNamespace(
        set_num_threads=lambda n: None, cuda=SimpleNamespace(is_available=lambda: False),
        inference_mode=nullcontext, from_numpy=Tensor,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "FlagEmbedding", flag)
    monkeypatch.setattr(flag_encoder, "QUIET", {})
    return nets


def embedder_of(encoder: Encoder) -> SimpleEmbedder:
    embedder = new_embedder(encoder, wire.EncoderSpec(kind="embedding"))
    assert isinstance(embedder, SimpleEmbedder)
    return embedder


def ids_of(*texts: list[int]) -> list[Any]:
    return [np.array(ids, np.int32) for ids in texts]


def test_rows_stand_in_the_order_of_the_batch_and_without_padding(
    net: dict[str, Net], folders: Path
) -> None:
    embedder = embedder_of(load(folders / "embedder"))
    assert isinstance(embedder, BGEM3Embedder)
    batch = ids_of([0, 9, 2], [0, *range(10, 130), 2], [0, 5, 6, 7, 2], [0, *range(4, 110), 2])
    found = embedder.embed(batch, [ALL] * 4, lambda: True)
    assert net["embedder"].calls == [[122, 108], [5, 3]]
    model = tiny.tiny_embedder()
    for text, ids in zip(found, batch, strict=True):
        hidden = model.hidden(ids.tolist())
        assert text.is_sound
        assert text.dense is not None
        assert text.sparse is not None
        assert text.colbert is not None
        assert text.dense @ model.dense(hidden) >= 0.9999999
        weights = dict(zip(text.sparse[0].tolist(), text.sparse[1].tolist(), strict=True))
        assert weights == pytest.approx(model.sparse(hidden, ids.tolist()), abs=1e-5)
        assert text.colbert == pytest.approx(model.colbert(hidden), abs=1e-5)


def test_pairs_are_scored_as_we_make_them(net: dict[str, Net], folders: Path) -> None:
    reranker = BGEReranker(load(folders / "reranker"))
    pairs = [("a b", "c"), ("query", "one two three"), ("q", "")]
    fits = [reranker.frame(*pair)[0].fit(512, "none") for pair in pairs]
    ids = [fit[0] for fit in fits if fit is not None]
    assert ids[0].tolist() == [0, *reranker.tokenize("a b"), 2, 2, *reranker.tokenize("c"), 2]
    wanted = [tiny.tiny_reranker().logit(pair.tolist()) for pair in ids]
    assert reranker.score(ids) == pytest.approx(wanted, abs=1e-5)
    assert reranker.scale() == "logit"


def test_a_bert_is_told_which_tokens_are_the_documents(net: dict[str, Net], tmp_path: Path) -> None:
    folder = tiny.write_hf_reranker(tmp_path / "reranker")
    config(model_type="bert")(folder)
    tensors = tiny.hf_tensors(tiny.tiny_reranker(), "bert")
    write_safetensors(folder / "model.safetensors", tensors)
    encoder = load(folder)
    assert encoder.specials.between == (2,)
    encoder.encode(ids_of([0, 7, 2, 8, 9, 2], [0, 7, 8, 2, 9, 2], [0, 7, 2, 8, 2]))
    assert net["reranker"].types == [[[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]]


def test_without_both_heads_there_are_dense_vectors_only(
    net: dict[str, Net], tmp_path: Path
) -> None:
    folder = tiny.write_hf_embedder(tmp_path / "embedder")
    (folder / "sparse_linear.pt").unlink()
    encoder = load(folder)  # FlagEmbedding would make random ones
    embedder = embedder_of(encoder)
    assert (embedder.outputs, encoder.missing_heads) == ({"dense"}, ("sparse_linear.pt",))
    assert "no sparse_linear.pt" in embedder.missing("sparse")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pooling_mode": "max"}, "(max)"),
        ({"pooling_mode": ["cls", "mean"]}, "(cls, mean)"),
        ({"pooling_mode_cls_token": False, "pooling_mode_max_tokens": True}, "(max)"),
        ({"pooling_mode_weightedmean_tokens": True}, "(weightedmean)"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "(mean_sqrt_len_tokens)"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "(cls, mean)"),
    ],
)
def test_another_pooling_is_refused_unless_one_of_ours_is_set(
    settings: object, says: str, net: dict[str, Net], tmp_path: Path
) -> None:
    folder = tiny.write_hf_embedder(tmp_path / "embedder")
    pooled(settings)(folder)
    load(folder)  # as BGE-M3, whose heads say it
    (folder / "sparse_linear.pt").unlink()
    with pytest.raises(ModelLoadFailed) as caught:
        load(folder)
    assert caught.value.message.startswith("embedder makes a vector of its rows in a way")
    assert says in caught.value.message
    load(folder, pooling="mean")
    tiny.write_hf_reranker(tmp_path / "reranker")
    pooled(settings)(tmp_path / "reranker")
    load(tmp_path / "reranker")


def test_a_directory_that_says_nothing_has_the_mean_and_bge_m3_its_cls(
    net: dict[str, Net], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.write_hf_embedder(tmp_path / "embedder")
    ids = ids_of([0, 9, 10, 2])
    hidden = tiny.tiny_embedder().hidden(ids[0].tolist())
    for row in (hidden[0], hidden.mean(axis=0)):
        (text,) = embedder_of(load(folder)).embed(ids, [{"dense"}], lambda: True)
        assert text.dense is not None
        assert text.dense @ tiny.unit(row) >= 0.9999999
        (folder / "sparse_linear.pt").unlink(missing_ok=True)
    (warning,) = caplog.messages
    assert "'mean' is taken" in warning


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("roberta.encoder.layer.1.output.dense.bias", "not all weights (encoder.layer.1.output."),
        ("classifier.out_proj.weight", "no head that scores pairs (classifier.out_proj.weight"),
    ],
)
def test_weights_that_transformers_would_make_at_random_are_refused(
    missing: str, says: str, suffix: str, net: dict[str, Net], tmp_path: Path
) -> None:
    folder = tiny.write_hf_reranker(tmp_path / "reranker")
    (folder / "model.safetensors").unlink()
    tensors = tiny.hf_tensors(tiny.tiny_reranker())
    names = sorted(tensors)
    for n, part in enumerate((names[::2], names[1::2]), 1):
        if suffix == "bin":
            write_pt(folder / f"pytorch_model-{n}.bin", {name: tensors[name] for name in part})
        else:
            file = folder / f"model-{n}.safetensors"
            write_safetensors(file, {name: tensors[name] for name in part})
    load(folder)
    for file in folder.glob(f"*.{suffix}"):
        file.unlink()
    del tensors[missing]
    if suffix == "bin":
        write_pt(folder / "pytorch_model.bin", tensors)
    else:
        write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(ModelLoadFailed) as caught:
        load(folder)
    assert caught.value.message.startswith(f"reranker has {says}")


def test_what_would_end_a_process_is_refused(net: dict[str, Net], folders: Path) -> None:
    encoder = load(folders / "embedder", n_ctx=16, batch_tokens=32)
    n_vocab = encoder.tokenizer.n_vocab
    for batch in ([], [[]], [[5] * 17], [[5] * 16] * 3, [[5]] * 65, [[-1]], [[n_vocab]]):
        with pytest.raises(ValueError, match=r"batch|sequence|ids"):
            encoder.encode(ids_of(*batch))
    assert net["embedder"].calls == []


def test_a_computation_that_nobody_wants_any_more_ends(net: dict[str, Net], folders: Path) -> None:
    encoder = load(folders / "embedder")
    with pytest.raises(Interrupted):
        encoder.encode(ids_of([0, 5, 2]), lambda: False)
    assert encoder.encode(ids_of([0, 5, 2])).shape == (3, tiny.tiny_embedder().n_embd)


def test_the_tokenizer_obeys_control_tokens_only_where_told(
    net: dict[str, Net], folders: Path
) -> None:
    tokenizer = load(folders / "embedder").tokenizer
    text = "<s> hello\ud800"
    obeyed = tokenizer.tokenize(text, parse_special=True, continues=False)
    plain = tokenizer.tokenize(text, parse_special=False, continues=False)
    assert (obeyed[0], plain[0] > 3) == (0, True)
    assert (tokenizer.piece(0), tokenizer.literal(0), tokenizer.piece(9)) == (b"", b"<s>", b" 9")


def test_what_flag_embedding_says_is_told_without_the_folder(
    net: dict[str, Net], folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: str, **_: Any) -> None:
        raise OSError(f"no weights in {path}\nand more")

    monkeypatch.setattr(sys.modules["FlagEmbedding"], "BGEM3FlagModel", fails)
    with pytest.raises(ModelLoadFailed) as caught:
        load(folders / "embedder")
    assert caught.value.message == "FlagEmbedding cannot load embedder: no weights in embedder"


# what FlagEmbedding says

installed = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "FlagEmbedding")),
    reason="FlagEmbedding is not installed: ./setup.sh --flag",
)


def with_flag(test: Callable[..., None]) -> Callable[..., None]:
    """Its libraries warn of much when they are imported, which takes long."""
    for mark in (installed, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)):
        test = mark(test)
    return test


def check_vectors(embedder: SimpleEmbedder, part: dict[str, Any]) -> None:
    """Against the record: dense, sparse and MaxSim, with several texts in a batch."""
    batch = ids_of(*part["ids"])
    found = []
    for at in range(0, len(batch), 5):
        some = batch[at : at + 5]
        found += embedder.embed(some, [ALL] * len(some), lambda: True)
    for text, dense, sparse in zip(found, part["dense"], part["sparse"], strict=True):
        assert text.dense is not None
        assert text.sparse is not None
        assert text.dense @ dense >= 0.999999
        weights = dict(zip(text.sparse[0].tolist(), text.sparse[1].tolist(), strict=True))
        assert weights == pytest.approx(sparse, abs=1e-4)
    for query, scores in zip(found, part["max_sim"], strict=True):
        assert [max_sim(query.colbert, text.colbert) for text in found] == pytest.approx(
            scores, abs=1e-4
        )


@with_flag
def test_vectors_are_flag_embeddings(folders: Path) -> None:
    embedder = embedder_of(load(folders / "embedder"))
    part = recorded()["tiny"]
    for text, ids in zip(TEXTS, part["ids"], strict=True):
        if "<" not in text:  # FlagEmbedding obeys control tokens in texts
            fit = embedder.frame(text, "none").fit(512, "end")
            assert fit is not None
            assert fit[0].tolist() == ids, text
    check_vectors(embedder, part)


@with_flag
def test_logits_are_flag_rerankers(folders: Path) -> None:
    record = recorded()["reranker"]
    for length, key in zip(PAIR_LENGTHS, ("logits", "short_logits"), strict=True):
        reranker = BGEReranker(load(folders / "reranker", n_ctx=length))
        fits = [reranker.frame(*pair)[0].fit(length, "end") for pair in PAIRS]
        ids = [fit[0] for fit in fits if fit is not None]
        for pair, ours, theirs in zip(PAIRS, ids, record["pair_ids"][str(length)], strict=True):
            if "<" not in "".join(pair):
                assert ours.tolist() == theirs, pair
        theirs = ids_of(*record["pair_ids"][str(length)])
        size = 512 // length if length == 512 else 16
        found = [
            s for at in range(0, len(theirs), size) for s in reranker.score(theirs[at : at + size])
        ]
        assert found == pytest.approx(record[key], abs=1e-4)


@pytest.mark.real
@with_flag
def test_real_weights_give_flag_embeddings_vectors(e5: Path, tmp_path: Path) -> None:
    folder = tiny.write_hf(tmp_path / "embedder", real_model(), tiny.vocabulary_in(e5))
    embedder = embedder_of(load(folder, batch_tokens=4096))
    part = recorded()["real"]
    for text, ids in zip(REAL_TEXTS, part["ids"], strict=True):
        fit = embedder.frame(text, "none").fit(512, "end")
        assert fit is not None
        assert fit[0].tolist() == ids
    check_vectors(embedder, part)
