"""What Petals 2.2.0.post1 did in the same scenarios, with the same models (medians of three or more quiet runs)."""

from __future__ import annotations

from typing import Final

SINGLE: Final = {1: 0.80, 2: 0.73, 4: 0.63}
"""llama-small, float32, 8-token prompt, 128 new tokens, over so many peers: tokens/s over the unsplit model's."""

HOP_MS: Final = {0: 9.5, 1: 17.0, 2: 25.2, 4: 32.7, 8: 59.7}
"""llama-tiny: milliseconds per token over so many hops; 0: unsplit."""

UNSPLIT_TOKENS_PER_S: Final = 14.7
"""llama-small, float32, 8-token prompt, 128 new tokens, unsplit."""

CLIENTS_TOKENS_PER_S: Final = {1: 12.4, 2: 14.2, 4: 13.3, 8: 12.9}
"""llama-small, 1 peer, 32 new tokens: of so many clients together."""

FIRST_TOKEN: Final = {1: 1.24, 2: 1.34, 4: 1.23}
"""llama-small, a 512-token prompt over so many peers: time to the first token over the unsplit model's."""

FORWARD: Final = {1: 348 / 404, 4: 343 / 404}
"""llama-small, 8 x 128 tokens: forward passes, tokens/s over the unsplit model's."""

START_S: Final = 5.7
UNSHARED_MIB: Final = 395
PROCESSES: Final = 13
