"""Every limit on what crosses the wire, in one place. Checked before memory is taken (law 4)."""

from __future__ import annotations

WIRE_VERSION = 3

CHUNK_BYTES = 128 << 10  # payload bytes of one gRPC message: a slow line shows that it moves
MESSAGE_BYTES = CHUNK_BYTES + (64 << 10)  # a whole gRPC message: header and one chunk
HEADER_BYTES = 48 << 10  # a step's header: tensor descriptions and cache operations
HEADER_WEIGHT = 8  # times its bytes on the wire: about what a header takes once it is read
PAYLOAD_BYTES = 256 << 20  # one step's payload over all its chunks

SESSION_ID_BYTES = 16
EDGE_BYTES = 16
CLIENT_KEY_BYTES = 32
SIGNATURE_BYTES = 64
PROOF_BYTES = 32  # that somebody knows a join token
SIGNED_S = 600.0  # so far the time of a signature may be from the reader's
MAX_PEER_ID_CHARS = 80
IN_FLIGHT = 8  # steps of one session on their way through its chain, replays not counted
MAX_COUNT = 1 << 62  # steps, tokens, epochs
MAX_TRACE = 256  # hops of a chain
MAX_TENSORS = 512  # parts of one step; a replay brings the parts of many steps
MAX_DIMS = 5
MAX_DIM = 1 << 24
MAX_BATCH = 1024  # rows of one session
MAX_CACHE_OPS = 32
MAX_NAME_CHARS = 64
MAX_ERROR_CHARS = 2000
MAX_RETRY_S = 3600.0  # that a peer may ask others to stay away
MAX_STEP_MS = 3.6e6  # that a peer may say a step took

HANDSHAKE_S = 10.0  # from a connection's first byte to the end of its TLS and HTTP/2 handshakes
CONNECTION_IDLE_S = 600.0  # without a call; whoever comes back later connects anew
STREAMS_PER_CONNECTION = 256  # calls at once over one connection
METADATA_BYTES = 8 << 10  # headers of one call
MAX_CONNECTIONS = 4096  # at once, of all addresses together; fewer where the system allows fewer descriptors

DIGEST_BYTES = 16  # of what crossed an edge in a step: two that are alike cannot be made
MAX_LINES = 1024  # steps in one receipt
MAX_KEY_BYTES = 1024  # of a public key or a signature
