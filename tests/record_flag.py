"""What FlagEmbedding says about the tiny models, and about real weights with made heads.

    pip install torch==2.13.0 FlagEmbedding==1.4.2 "transformers<5" gguf
    python -m tests.record_flag

It writes tests/recorded/flag_embedding.json, with which everybody can compare; of token ids in the
real vocabulary it holds fingerprints. With transformers 5 FlagEmbedding tokenises pairs otherwise
than the models were trained; hence the bound.
"""

import base64
import json
import os
import tempfile
import zlib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from settings import DEFAULT_EMBEDDING_MODEL, ROOT
from tests import encoder_fixtures as tiny
from tests.encoder_fixtures import PAIRS, TEXTS

RECORD = ROOT / "tests" / "recorded" / "flag_embedding.json"
PAIR_LENGTHS = (512, 24)
REAL_PAIR_LENGTHS = (512, 64)

REAL_TEXTS = (
    "query: how much protein should a female eat",
    "passage: Die Hauptstadt von Frankreich ist Paris, und sie liegt an der Seine.",
    "query: 南瓜的家常做法",
    "passage: Москва — столица России, город федерального значения.",
    "query: ¿Dónde está la biblioteca?",
    "passage: def main():\n    return 1",
    "passage: " + "The quick brown fox jumps over the lazy dog. " * 12,
    ".",
)

# The first article of the Universal Declaration of Human Rights, or a greeting.
_SENTENCES = (
    "All human beings are born free and equal in dignity and rights.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "Todos os seres humanos nascem livres e iguais em dignidade e em direitos.",
    "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren.",
    "Alla människor är födda fria och lika i värde och rättigheter.",
    "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.",
    "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv.",
    "Minden emberi lény szabadon születik és egyenlő méltósága és joga van.",
    "Toate ființele umane se nasc libere și egale în demnitate și în drepturi.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
    "Semua orang dilahirkan merdeka dan mempunyai martabat dan hak-hak yang sama.",
    "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Всі люди народжуються вільними і рівними у своїй гідності та правах.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت با هم برابرند.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "人人生而自由，在尊严和权利上一律平等。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "ყველა ადამიანი იბადება თავისუფალი და თანასწორი.",
    "Բոլոր մարդիկ ծնվում են ազատ ու հավասար։",
    "ሰላም ለዓለም", "Сайн байна уу", "ສະບາຍດີ", "Xin chào thế giới", "Ẹ káàárọ̀", "Zażółć gęślą jaźń",
)  # fmt: skip
_ODD = (
    "", " ", ".", "?!", "a", "ß", "ﬁne ½ ™ №5 ﷺ", "ＦＵＬＬ　ｗｉｄｔｈ", "e\u0301 o\u0308 n\u0303",
    "tab\tand\nnewline\r\n", "  many   spaces  ", "zero\u200bwidth\u200djoiner", "🙂🌍👨‍👩‍👧 🇫🇷",
    "https://example.com/a?b=c&d=%20", "user@example.com", "def f(x):\n    return x**2  # square",
    '{"key": [1, 2.5e-3, null]}', "C:\\path\\to", "1,234,567.89 €", "2026-11-23T09:03:51Z",
    "x" * 200,
    "ACGT" * 40, "<html><body>&amp;</body></html>", "$\\frac{a}{b}$", "«guillemets» „quotes“ “x”",
    "…—–-‐‑", "ⅣⅫ ①② ㍿ ㌔", "ｶﾀｶﾅ", "ΑΒΓ αβγ ς", "İıŞş", "ǅǆ", "𝒳𝔘𝕍", "🅰️", "no\u00a0break",
)  # fmt: skip


_BETWEEN = (
    " ", "  ", "\n", "\t", "\u00a0", "\u3000", ", ", "; ", ". ", "! ", "? ", "…", " — ", "-", "_",
    "/", "|", "+", "：", ") (", "” “", " 🙂 ",
)  # fmt: skip


def strings() -> list[str]:
    """About a thousand: each sentence whole, in other letters, by half, beside others; odd ones."""
    found = [*_SENTENCES, *_ODD]
    for i, sentence in enumerate(_SENTENCES):
        words = sentence.split()
        first, second = (
            " ".join(half) for half in (words[: len(words) // 2], words[len(words) // 2 :])
        )
        found += [sentence.upper(), sentence.lower(), first, second, f"{i}. {sentence} ({i * 37})"]
        for k, between in enumerate(_BETWEEN, 1):
            found.append(second + between + _SENTENCES[(i + k) % len(_SENTENCES)])
    return list(dict.fromkeys(found))


def pairs() -> list[tuple[str, str]]:
    """150, of short and long texts, and of none."""
    texts = strings()
    found = [(texts[i * 5 % 97], texts[-1 - i * 6] * (i % 3 * 8 + 1)) for i in range(148)]
    return [*found, ("no document", ""), ("long " * 500, "query")]


def fingerprint(ids: list[int]) -> int:
    return zlib.crc32(np.array(ids, "<i4").tobytes())


@cache
def recorded() -> dict[str, Any]:
    """The record, with vectors as arrays."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for part in (record["tiny"], record["real"]):
        part["dense"] = [_array(vector) for vector in part["dense"]]
        part["sparse"] = [{int(t): w for t, w in weights.items()} for weights in part["sparse"]]
    return record


def _array(encoded: str) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(encoded), "<f4")


def real_model() -> tiny.Bert:
    """multilingual-e5-small with heads of random weights: as real as it gets without BGE-M3."""
    path = ROOT / DEFAULT_EMBEDDING_MODEL
    model = tiny.bert_in(path)
    return tiny.Bert(
        model.tensors, model.n_head, model.n_ctx, model.eps, tiny.made_heads(model.n_embd)
    )


def record_embedder(folder: Path, texts: tuple[str, ...]) -> dict[str, Any]:
    from FlagEmbedding import BGEM3FlagModel

    # Halves on a CPU would be rounded weights; the default length would be 512 too.
    model = BGEM3FlagModel(str(folder), use_fp16=False, devices="cpu")
    out = model.encode(
        list(texts), max_length=512, return_dense=True, return_sparse=True, return_colbert_vecs=True
    )
    rows = out["colbert_vecs"]
    return {
        "ids": [model.tokenizer(text)["input_ids"] for text in texts],
        "dense": [base64.b64encode(v.astype("<f4").tobytes()).decode() for v in out["dense_vecs"]],
        "sparse": [
            {token: round(float(weight), 7) for token, weight in weights.items()}
            for weights in out["lexical_weights"]
        ],
        "max_sim": [[round(float(model.colbert_score(q, d)), 7) for d in rows] for q in rows],
    }


def record_reranker(folder: Path) -> dict[str, Any]:
    from FlagEmbedding import FlagReranker

    model = FlagReranker(str(folder), use_fp16=False, devices="cpu")
    pair_ids = {}
    for length in PAIR_LENGTHS:
        pair_ids[str(length)] = [_pair_ids(model.tokenizer, *pair, length) for pair in PAIRS]
    logits = model.compute_score([list(pair) for pair in PAIRS], max_length=512)
    short = model.compute_score([list(pair) for pair in PAIRS], max_length=PAIR_LENGTHS[1])
    return {
        "pair_ids": pair_ids,
        "logits": [round(float(logit), 6) for logit in logits],
        "short_logits": [round(float(logit), 6) for logit in short],
    }


def _pair_ids(tokenizer: Any, query: str, document: str, max_length: int) -> list[int]:
    """As FlagReranker makes them, step by step (BaseReranker.compute_score_single_gpu)."""
    q = tokenizer(query, add_special_tokens=False, max_length=max_length * 3 // 4, truncation=True)
    d = tokenizer(document, add_special_tokens=False, max_length=max_length, truncation=True)
    pair = tokenizer.prepare_for_model(
        q["input_ids"], d["input_ids"], truncation="only_second", max_length=max_length
    )
    ids: list[int] = pair["input_ids"]
    return ids


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        real = real_model()
        vocab = tiny.vocabulary_in(ROOT / DEFAULT_EMBEDDING_MODEL)
        tiny.write_hf(folder / "real", real, vocab)
        record = {
            "versions": {
                name: version(name)
                for name in ("FlagEmbedding", "torch", "transformers", "tokenizers")
            },
            "tiny": record_embedder(tiny.write_hf_embedder(folder / "embedder"), TEXTS),
            "reranker": record_reranker(tiny.write_hf_reranker(folder / "reranker")),
            "real": record_embedder(folder / "real", REAL_TEXTS),
        }
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder / "real")
        record["strings"] = [fingerprint(tokenizer(text)["input_ids"]) for text in strings()]
        record["pairs"] = {
            str(length): [fingerprint(_pair_ids(tokenizer, *pair, length)) for pair in pairs()]
            for length in REAL_PAIR_LENGTHS
        }
    RECORD.parent.mkdir(exist_ok=True)
    lines = (f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in record.items())
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
