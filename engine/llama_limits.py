"""How llama.cpp computes, as far as the server reckons with it before it starts a worker."""

CELLS = 256  # of a context are a multiple of this
# Answers at once that gain by cells apart; without flash attention, which computes for all cells
LEAST_IN_LANES, LEAST_IN_PLAIN_LANES = 3, 2
PLAIN_TOKENS = 128  # at most have their scores in memory at once, without flash attention
# Tokens in one call of a decoder that embeds or scores: llama.cpp computes logits of every token
# whose row is wanted, which for 8,192 of a large vocabulary are gigabytes. What is before them
# stays in its memory.
DECODER_STEP = 512
