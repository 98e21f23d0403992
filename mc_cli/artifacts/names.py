"""Names of the files that more than one stage reads or writes; their formats have modules of their own here."""

from __future__ import annotations

IMPORTANCE = "importance.json"  # of score
PLAN = "plan.yaml"  # of allocate
CHANNEL_ORDER = "channels.safetensors"  # of allocate, where a plan says which channels its blocks hold
COVERAGE = "coverage.json"  # of quantize
EVALUATION = "eval.json"  # of prune-eval
ROUTERS = "routers.safetensors"  # of prune-eval, while it trains those of otp
# In the work directory itself; none of them is an artifact of a stage.
POINTER = "model.json"  # where the model lies on this machine: the digests say which model it is
DIGESTS = "digests.json"  # of files that were read before, so that they are not read again
EXPORTS = "exports.json"  # where exports of this directory lie
