"""What rows that nobody wants are worth (engine/rounding.py): steps of so many sequences with them
and without, taking turns, in several formats of the weights.

    python -m bench.rows /tmp/made                  # makes the models there, and measures them
    python -m bench.compare /tmp/made/smollm2-q8_0.gguf --only uneven

The models are SmolLM2, and one of random weights whose layers are as wide as those of a model of
1B: formats in blocks of 256 weights fit into such alone. One line of JSON for each.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.engine import Bench
from bench.speculation import as_type
from bench.uncut_models import Model
from settings import DEFAULT_CHAT_MODEL, ROOT

FORMATS = {"smollm2": ("q4_0", "q8_0"), "wide": ("q4_0", "q8_0", "q4_k_m", "q5_k_m", "q6_k")}
LEVELS = (3, 5, 7, 11, 15)
N_LAYER, N_EMBD, N_FF, N_KV = 6, 2048, 8192, 8
N_STEPS = 40  # of a turn; the first turn is not counted: in it numbers of rows are tried


def write_wide(path: Path) -> None:
    model = Model(path, "llama", N_EMBD, N_FF, N_KV, n_layer=N_LAYER)
    model.writer.add_head_count_kv(N_KV)
    model.norms("output_norm")
    model.matrix("token_embd", model.n_vocab, N_EMBD)
    for n in range(N_LAYER):
        layer = f"blk.{n}"
        model.norms(f"{layer}.attn_norm", f"{layer}.ffn_norm")
        model.attention(layer, has_norms=False)
        model.feed_forward(layer)
    model.close()


def made(folder: Path) -> list[Path]:
    """The models, of which some may be there already."""
    folder.mkdir(parents=True, exist_ok=True)
    wide = folder / "wide.gguf"
    if not wide.exists():
        write_wide(wide)
    paths = []
    for name, source in (("smollm2", ROOT / DEFAULT_CHAT_MODEL), ("wide", wide)):
        for format in FORMATS[name]:
            paths.append(folder / f"{name}-{format}.gguf")
            if not paths[-1].exists():
                as_type(str(source), format, paths[-1])
    return paths


def measure(path: Path, n_threads: int, rounds: int, levels: Sequence[int] = LEVELS) -> None:
    bench = Bench(str(path), n_threads)
    for n in levels:
        ratios, speeds = [], []
        for number in range(rounds + 1):
            found = {}
            for rounds_up in (True, False)[:: -1 if number % 2 else 1]:
                bench.decoder.can_round = rounds_up
                found[rounds_up], _ = bench.decode_tokens(n, N_STEPS)
            if number:
                ratios.append(found[True] / found[False])
                speeds.append(found[True])
        figures = {
            "tokens_per_s": round(statistics.median(speeds), 1),
            "of_without": round(statistics.median(ratios), 2),
            "least": round(min(ratios), 2),
            "most": round(max(ratios), 2),
        }
        print(json.dumps({"model": path.stem, "sequences": n} | figures), flush=True)
    bench.engine.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    for path in made(options.folder):
        measure(path, options.threads, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
