"""Names of the files that more than one stage reads or writes; their formats have modules of their own here."""

from __future__ import annotations

IMPORTANCE = "importance.json"  # score writes it
PLAN = "plan.yaml"  # allocate writes it
CHANNEL_ORDER = "channels.safetensors"  # allocate writes it where a plan says which channels its blocks hold
CONSIDERED = "considered.json"  # allocate writes it where it could have cut channels
COVERAGE = "coverage.json"  # quantize writes it
EVALUATION = "eval.json"  # prune-eval writes it
ROUTERS = "routers.safetensors"  # prune-eval writes it while it trains the routers of otp
# These lie in the work directory itself; none of them is an artifact of a stage.
POINTER = "model.json"  # where the model lies on this machine: the digests say which model it is
DIGESTS = "digests.json"  # digests of files that were read before, so that they are not read again
EXPORTS = "exports.json"  # where exports of this directory lie
