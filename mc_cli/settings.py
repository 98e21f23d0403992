"""Settings of every stage: one frozen dataclass each, with defaults, units and validation. Imports no torch.

What depends on the quantizer is looked up in the registry when it is asked for: that imports the quantizers.

`result_fields` are what changes a stage's result, and go into its fingerprint; device and batch size do not.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from mc_cli.errors import InputError, MissingFlagsError, Problems, shown
from mc_cli.parts import DROPPED, KEPT_BITS, Role, read_width
from mc_cli.registry import QUANTIZERS, candidate_widths, widths_of

# (above this many bits per expert weight, width of what is computed for every token): measured, see docs/results.md.
BESIDE = ((2.75, 8), (2.5, 6), (-1.0, 5))
# The same of the embedding, whose errors go through all layers and their routers, and of a head of its own.
EMBEDDING_BESIDE = ((2.5, 8), (-1.0, 6))
HEAD_BESIDE = ((2.75, 8), (-1.0, 6))
WIDTH_BORDERS = sorted(
    {above for widths in (BESIDE, EMBEDDING_BESIDE, HEAD_BESIDE) for above, _ in widths}, reverse=True
)
# What `run --effort` sets beneath recipe and flags: section -> settings.
EFFORTS: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {
        "calibrate": {"sequences": 64, "gradient_tokens": 8192, "gradient_samples": 1},
        "score": {"loss_tokens": 512},
    },
    "default": {},
    # No sweeps: errors fed into later rows, which they would undo, are worth more.
    "best": {"calibrate": {"sequences": 256, "gradient_samples": 8}, "score": {"loss_tokens": 4096}},
}
REAP, FREQUENCY, ROUTER_WEIGHT = "reap", "frequency", "router-weight"  # by which experts are dropped as a whole
PER_LAYER, GLOBAL = "layer", "global"  # the same share of experts in each layer, or the lowest of the whole model
EXPERT, CHANNEL = "expert", "channel"  # what score measures: experts and their projections, or channels besides
LARGEST_GROUP = 2**20  # inputs per scale; more than any matrix has
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(B|[KMGT]i?B)?\s*", re.IGNORECASE)
_LEAST_PLAIN_BYTES = 10**6
_LARGEST_SIZE = 1 << 62  # bytes
_LARGEST_COUNT = 1 << 31  # of what flags count: more tokens than any run reads, in as many sequences as tokens
_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _refuse(*messages: str) -> None:
    """Raises InputError for every message that is not empty, all at once."""
    problems = Problems()
    for message in messages:
        problems.refuse(message)
    problems.tell()


def _one_of(flag: str, value: str, known: tuple[str, ...]) -> str:
    return "" if value in known else f"{flag} {value!r}: known are {', '.join(known)}."


def _length(value: int) -> str:
    if value == 0 or value >= 8:
        return ""
    return f"--length {value}: at least 8 tokens, or 0 for 2048 (or the model's whole context where shorter)."


def _one_template(template: str | None, none: bool) -> str:
    if template is None or not none:
        return ""
    return f"--chat-template {template} and --no-chat-template exclude each other. Give one."


def check_activation_bits(bits: int) -> int:
    """The bits as they are. Raises InputError unless they are 16 or 8."""
    _refuse(_activation_bits(bits))
    return bits


def _activation_bits(bits: int) -> str:
    return "" if bits in (16, 8) else f"--activation-bits {bits}: 16 or 8."


def _at_least(flag: str, value: int, minimum: int, most: int = _LARGEST_COUNT) -> str:
    if value < minimum:
        return f"{flag} {shown(value)}: at least {minimum}."
    return "" if value <= most else f"{flag} {shown(value)}: at most {most:,}."


def parse_size(text: str) -> int:
    """Bytes of a size like `16GiB`, `900MB` or `123456`. Raises InputError for anything else."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise InputError(
            f"{text!r} is not a size. Write bytes, or a number with B, kB, MB, GB, KiB, MiB or GiB, for example 16GiB."
        )
    size = float(match[1]) * _UNITS[(match[2] or "B").upper()]
    if size > _LARGEST_SIZE:
        raise InputError(f"{shown(text, 40)} is more than any disk holds. Write a size such as 16GiB.")
    return round(size)


def parse_file_size(text: str) -> int:
    """The same for the size of a model or file: a plain number below 1 MB lacks its unit. Raises InputError for one."""
    size = parse_size(text)
    if size < _LEAST_PLAIN_BYTES and text.strip().replace(".", "", 1).isdigit():
        raise InputError(
            f"{text.strip()!r} is {size:,} bytes, too few for a model or a file of it. Write the unit, for example "
            f"{text.strip()}GiB; with B a size of so many bytes is taken as it is."
        )
    return size


def parse_bits_list(text: str) -> tuple[float, ...]:
    """Candidate widths of a list like `0,1,1.5,2,4`, ascending; 0 drops an expert, 16 keeps what is cut to size.

    Raises InputError for others.
    """
    try:
        widths = tuple(sorted({read_width(piece) for piece in text.split(",")}))
    except ValueError as error:
        raise InputError(f"--bits {text!r}: write widths separated by commas, for example 1,1.5,2,3,4.") from error
    known = (width in (DROPPED, KEPT_BITS) or (1 <= width <= 8 and float(2 * width).is_integer()) for width in widths)
    if not all(known):
        raise InputError(
            f"--bits {text!r}: widths are 1 to 8 in steps of one half, 0 for dropping an expert, or with --cut-ratio "
            "16 for keeping the weights that are left."
        )
    if widths == (DROPPED,):
        raise InputError(f"--bits {text!r}: not all experts can be dropped. Add at least one width above 0.")
    return widths


@dataclass(frozen=True)
class RunSettings:
    """How to compute: nothing here may change what is computed beyond rounding, so none of it is fingerprinted.

    device       auto = cuda where there is one
    dtype        auto = float32 on a CPU, the checkpoint's on a GPU; this one IS part of each stage's fingerprint
    batch_tokens tokens per forward
    """

    device: str = "auto"
    dtype: str = "auto"
    batch_tokens: int = 8192
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _refuse(
            _one_of("--device", self.device, DEVICES),
            _one_of("--dtype", self.dtype, DTYPES),
            _at_least("--batch-tokens", self.batch_tokens, 1),
        )


class StageSettings:
    """Base of what a stage's settings share: their plain form for manifests."""

    not_fingerprinted: ClassVar[frozenset[str]] = frozenset()

    def resolved(self) -> dict[str, Any]:
        """Plain JSON values of all fields that change the result."""
        names = {field.name for field in fields(self)} - self.not_fingerprinted  # type: ignore[arg-type]
        return {name: _plain(value) for name, value in asdict(self).items() if name in names}  # type: ignore[call-overload]


@dataclass(frozen=True)
class CalibrateSettings(StageSettings):
    """model: folder, hub id or bundled:NAME. data: file, folder of files, datasets name or bundled:NAME.

    gradient_tokens: tokens of the backward pass that gives each layer's sensitivity; 0 leaves it out, and score
    then uses the share of the residual stream's energy. gradient_samples: labels drawn for each of them. choice_costs:
    whether sensitivities hold what it costs that errors make later routers choose other experts.
    """

    model: str = ""
    data: str = ""
    revision: str | None = None
    split: str = "train"
    text_field: str = "text"
    chat_template: str | None = None
    no_chat_template: bool = False
    sequences: int = 128
    length: int = 0  # 0 = 2048, or the model's whole context where that is shorter
    seed: int = 0
    gradient_tokens: int = 32768
    gradient_samples: int = 4
    choice_costs: bool = True
    # The digests of model files and of the text, which counts its chat template, stand for these.
    not_fingerprinted = frozenset({"model", "data", "chat_template", "no_chat_template"})

    def __post_init__(self) -> None:
        _refuse(
            _one_template(self.chat_template, self.no_chat_template),
            _at_least("--sequences", self.sequences, 1),
            _at_least("--gradient-tokens", self.gradient_tokens, 0),
            _at_least("--gradient-samples", self.gradient_samples, 1),
            _length(self.length),
        )


@dataclass(frozen=True)
class QuantizerSettings(StageSettings):
    """Which quantizer, and its knobs; score and quantize must agree on them, so that score predicts what ships."""

    quantizer: str = "trellis"
    damping: float = 0.01
    activation_order: bool = True
    shrinkage: float = (
        0.25  # tokens per input feature at which an expert's own Hessian and the pooled one weigh the same
    )
    sweeps: int | None = None  # rounds of polishing after the first pass; None = the quantizer's own
    group_size: int = 128  # inputs per scale at most: the largest divisor of each matrix's width up to this is taken

    # Whether down projections make good for errors before them; None = as the quantizer's CORRECTS_ERRORS says.
    error_correction: bool | None = None

    @property
    def corrects_errors(self) -> bool:
        """`error_correction`, or what its absence means for the quantizer."""
        if self.error_correction is not None:
            return self.error_correction
        return bool(self._fact("CORRECTS_ERRORS"))

    @property
    def joins_rows(self) -> bool:
        """Whether the quantizer weighs the errors of rows together, where the calibration tells how."""
        return bool(self._fact("JOINS_ROWS"))

    @property
    def family(self) -> str:
        """The family of encodings that the quantizer makes."""
        return str(self._fact("FAMILY"))

    def _fact(self, name: str) -> Any:
        """What the quantizer says of itself; of an unknown one, which is refused where it is built, what most say."""
        return QUANTIZERS.fact(QUANTIZERS.modules.get(self.quantizer), name)

    def candidate_widths(self, target_bits: float = 0.0) -> tuple[float, ...]:
        """The widths that are worth scoring for a target in bits per expert weight; without one, for small ones."""
        return candidate_widths(self.family, target_bits)

    def __post_init__(self) -> None:
        too_wide = f"--group-size {self.group_size}: at most {LARGEST_GROUP} inputs share a scale."
        fraction = f"--damping {self.damping}: a fraction of the mean Hessian diagonal, between 0 and 1."
        _refuse(
            "" if 0 < self.damping < 1 else fraction,
            "" if self.shrinkage >= 0 else f"--shrinkage {self.shrinkage}: tokens per input feature, 0 or more.",
            _at_least("--group-size", self.group_size, 8),
            "" if self.group_size <= LARGEST_GROUP else too_wide,
            _at_least("--sweeps", self.sweeps or 0, 0),
        )


@dataclass(frozen=True)
class ScoreSettings(StageSettings):
    """bits: candidate widths; 0 measures what dropping an expert costs.

    loss_tokens: tokens per expert at most on which output errors are measured.
    unit: "channel" measures every channel of the experts as well, in the same pass, so that allocate can cut some
    """

    bits: tuple[float, ...] = ()  # none given: what the encodings of the quantizer's family say
    quantizer: QuantizerSettings = QuantizerSettings()
    loss_tokens: int = 1024
    unit: str = EXPERT

    def resolved(self) -> dict[str, Any]:
        """Plain JSON values of all fields that change the result; the unit only where it is not that of experts."""
        plain = super().resolved()
        return plain if self.unit != EXPERT else {name: value for name, value in plain.items() if name != "unit"}

    def __post_init__(self) -> None:
        if not self.bits:
            object.__setattr__(self, "bits", self.quantizer.candidate_widths())
        _refuse(
            _at_least("--loss-tokens", self.loss_tokens, 1),
            _one_of("--unit", self.unit, (EXPERT, CHANNEL)),
            self._unknown_widths(),
        )

    def _unknown_widths(self) -> str:
        """What is wrong with widths that the quantizer does not make; whole ones up to 8 it always does."""
        known = widths_of(self.quantizer.family)
        wrong = [width for width in self.bits if width != DROPPED and width not in known]
        if not wrong:
            return ""
        return (
            f"--bits {','.join(map(str, self.bits))}: --quantizer {self.quantizer.quantizer} does not make "
            f"{', '.join(map(str, wrong))}, but {', '.join(map(str, sorted(known)))}."
        )


@dataclass(frozen=True)
class AllocateSettings(StageSettings):
    """Exactly one target: stored bits or code bits (mean per expert weight), bytes of the whole checkpoint, or a share
    of channels to cut.

    cut_ratio      share of the experts' channels that are cut away, those with the lowest score by `method`; the others
                   get the one width above 0 in `bits`, or keep their 16 bits
    scope          cut the same share in every layer, or the lowest of the whole model
    uniform_width  cut as many channels of every expert, so that an architecture without widths of their own holds them

    attention_bits, shared_bits and so on: width of every part that is not a routed expert; 16 = kept, None = what pays
                   beside experts of the mean width asked for
    floors         at least this many experts per layer of each width, for example {3: 1, 2: 1}; None = the method's own
    """

    method: str = "global"
    target_stored_bits: float | None = None
    target_bits: float | None = None
    target_size_bytes: int | None = None
    cut_ratio: float | None = None
    scope: str = PER_LAYER
    uniform_width: bool = False
    bits: tuple[float, ...] | None = None  # None = the candidates that were scored
    attention_bits: int | None = None
    shared_bits: int | None = None
    dense_bits: int | None = None  # None = shared_bits
    head_bits: int | None = None
    embedding_bits: int | None = None  # of a head that is tied to it, too
    router_bits: int = KEPT_BITS
    floors: tuple[tuple[int, int], ...] | None = None
    alpha: float | None = None  # exponents of pmq; None = as published (1, 1.5, 1). Of camera-p the maximum's share
    beta: float | None = None
    gamma: float | None = None
    seed: int = 0
    gap: float | None = None  # None = the method's own: 1e-4 for global, 0 for pmq
    time_limit_s: float = 300.0

    def __post_init__(self) -> None:
        given = [
            name
            for name in ("target_stored_bits", "target_bits", "target_size_bytes", "cut_ratio")
            if getattr(self, name) is not None
        ]
        problems = Problems()
        if len(given) != 1:
            kind = InputError if given else MissingFlagsError
            problems.add(
                kind(
                    f"allocate needs exactly one target, {len(given)} given: --target-stored-bits (scales included), "
                    "--target-bits (codes only), --target-size (the whole checkpoint, for example 16GiB) or "
                    "--cut-ratio (share of the experts' channels to cut away)."
                )
            )
        for message in self._cut_problems():
            problems.refuse(message)
        for name in given:
            if name == "cut_ratio":
                continue
            target = getattr(self, name)
            if not (math.isfinite(target) and target > 0):
                flag = name.removesuffix("_bytes").replace("_", "-")
                problems.refuse(f"--{flag} {target}: a target is above 0.")
        for role, bits in self.role_bits(0).items():
            if not (1 <= bits <= 8 or bits == KEPT_BITS):
                problems.refuse(f"--{role.value}-bits {bits}: a width is 1 to 8, or 16 to keep the checkpoint's own.")
        if self.gap is not None and not 0 <= self.gap < 1:
            problems.refuse(f"--gap {self.gap}: a relative distance, from 0 to below 1.")
        if not self.time_limit_s > 0:
            problems.refuse(f"--time-limit {self.time_limit_s}: seconds above 0.")
        problems.tell()

    def _cut_problems(self) -> list[str]:
        """What is wrong with what is asked of cuts, or asked without one."""
        if self.cut_ratio is None:
            asked = {"--scope": self.scope != PER_LAYER, "--uniform-width": self.uniform_width}
            asked["--bits 16"] = KEPT_BITS in (self.bits or ())
            return [f"{flag} is about channels to cut: give --cut-ratio." for flag, given in asked.items() if given]
        problems = []
        if not 0 < self.cut_ratio < 1:
            problems.append(f"--cut-ratio {self.cut_ratio}: a share of the experts' channels, above 0 and below 1.")
        if self.floors:
            problems.append("--floor counts experts by their width, but those that --cut-ratio leaves have one width.")
        left = [bits for bits in self.bits or (KEPT_BITS,) if bits != DROPPED]
        if len(left) != 1:
            problems.append(
                f"--bits {','.join(map(str, self.bits or ()))}: with --cut-ratio all channels that are left have one "
                "width, for example --bits 0,4; 0,16 keeps their weights."
            )
        if self.uniform_width and self.scope != PER_LAYER:
            problems.append(f"--uniform-width cuts every expert alike, so --scope {self.scope} has no meaning.")
        return [*problems, _one_of("--scope", self.scope, (PER_LAYER, GLOBAL))]

    @property
    def width_left(self) -> float:
        """Of channels that a cut leaves."""
        return next((bits for bits in self.bits or () if bits != DROPPED), KEPT_BITS)

    def resolved(self) -> dict[str, Any]:
        """Plain JSON values of all fields that change the result; those of cuts only where there is one."""
        plain = super().resolved()
        cuts = ("cut_ratio", "scope", "uniform_width")
        return {name: value for name, value in plain.items() if self.cut_ratio is not None or name not in cuts}

    def role_bits(self, mean_bits: float) -> dict[Role, int]:
        """Width per role beside experts of `mean_bits`, kept beside kept ones; DENSE follows SHARED unless set."""

        def width(given: int | None, beside: tuple[tuple[float, int], ...] = BESIDE) -> int:
            if given is None and mean_bits == KEPT_BITS:
                return KEPT_BITS
            return next(bits for above, bits in beside if mean_bits > above) if given is None else given

        return {
            Role.ATTENTION: width(self.attention_bits),
            Role.SHARED: width(self.shared_bits),
            Role.DENSE: width(self.shared_bits if self.dense_bits is None else self.dense_bits),
            Role.ROUTER: self.router_bits,
            Role.HEAD: width(self.head_bits, HEAD_BESIDE),
            Role.EMBEDDING: width(self.embedding_bits, EMBEDDING_BESIDE),
        }


@dataclass(frozen=True)
class QuantizeSettings(StageSettings):
    """plan: a plan.yaml to use instead of the work directory's."""

    quantizer: QuantizerSettings = QuantizerSettings()
    plan: str | None = None
    not_fingerprinted = frozenset({"plan"})


def parse_rates(text: str) -> tuple[float, ...]:
    """Rates of a list like `0.1,0.2,0.3`, ascending. Raises InputError for anything else."""
    try:
        rates = tuple(sorted({float(piece) for piece in text.split(",")}))
    except ValueError as error:
        raise InputError(f"--rates {text!r}: write shares separated by commas, for example 0.1,0.2,0.3.") from error
    if not all(0 < rate < 1 for rate in rates):
        raise InputError(f"--rates {text!r}: a rate is a share of expert calls, above 0 and below 1.")
    return rates


@dataclass(frozen=True)
class PruneSettings(StageSettings):
    """Which experts a token skips while running. Without `policy` nothing is pruned, and nothing else here counts.

    policy        the one that ships first, others for comparison behind it
    target_rate   share of expert calls to drop; or max_loss, the relative rise of perplexity that is allowed; neither
                  means max_loss 0.01
    sweep         evaluate every policy and the baselines at all `rates`, and draw the front
    fit_data      text to fit on instead of the calibration tokens; fit_sequences windows of it, or of them
    protect       share of tokens that odp spares
    otp_*         training of the routers that otp learns
    drop_experts  share of experts that are dropped as a whole, chosen by drop_by in each layer or the whole model
    """

    policy: tuple[str, ...] = ()
    target_rate: float | None = None
    max_loss: float | None = None
    sweep: bool = False
    rates: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45)
    protect: float = 0.02
    fit_data: str | None = None
    fit_sequences: int = 128
    policy_seed: int = 0
    otp_steps: int = 200
    otp_learning_rate: float = 0.01
    otp_batch: int = 8
    drop_experts: float = 0.0
    drop_by: str = REAP
    drop_scope: str = PER_LAYER
    not_fingerprinted = frozenset({"fit_data"})

    def __post_init__(self) -> None:
        problems = Problems()
        if self.target_rate is not None and self.max_loss is not None:
            problems.refuse("--target-rate and --max-loss exclude each other: one follows from the other. Give one.")
        if self.target_rate is not None and not 0 < self.target_rate < 1:
            problems.refuse(f"--target-rate {self.target_rate}: a share of expert calls, above 0 and below 1.")
        if self.max_loss is not None and not self.max_loss > 0:
            problems.refuse(f"--max-loss {self.max_loss}: a relative rise of perplexity above 0, for example 0.01.")
        if not 0 <= self.protect < 1:
            problems.refuse(f"--protect {self.protect}: a share of tokens, from 0 to below 1.")
        asked = self.target_rate is not None or self.max_loss is not None or self.sweep
        if asked and not self.policy:
            problems.refuse("--target-rate, --max-loss and --sweep need --policy, for example --policy odp.")
        if not 0 <= self.drop_experts < 1:
            problems.refuse(f"--drop-experts {self.drop_experts}: a share of the experts, from 0 to below 1.")
        if self.drop_experts and not self.policy:
            problems.refuse("--drop-experts needs --policy; --policy all drops whole experts and nothing per token.")
        problems.refuse(_one_of("--drop-by", self.drop_by, (REAP, FREQUENCY, ROUTER_WEIGHT)))
        problems.refuse(_one_of("--drop-scope", self.drop_scope, (PER_LAYER, GLOBAL)))
        if not self.otp_learning_rate > 0:
            problems.refuse(f"--otp-learning-rate {self.otp_learning_rate}: above 0.")
        for flag, value, least in (
            ("--fit-sequences", self.fit_sequences, 4),
            ("--otp-steps", self.otp_steps, 1),
            ("--otp-batch", self.otp_batch, 1),
        ):
            problems.refuse(_at_least(flag, value, least))
        problems.tell()


@dataclass(frozen=True)
class EvaluateSettings(StageSettings):
    """data: held-out text. Perplexity over windows of `length` tokens that advance by `stride` (0 = length)."""

    data: str = ""
    split: str = "test"
    text_field: str = "text"
    chat_template: str | None = None
    no_chat_template: bool = False
    length: int = 0  # 0 = 2048, or the model's whole context where that is shorter
    stride: int = 0
    max_sequences: int = 0  # 0 = all of the text
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    task_limit: int | None = None
    activation_bits: int = 16
    prune: PruneSettings = PruneSettings()
    not_fingerprinted = frozenset({"data", "chat_template", "no_chat_template"})

    def resolved(self) -> dict[str, Any]:
        """Plain JSON values of all fields that change the result; a policy's only where there is one."""
        plain = super().resolved()
        del plain["prune"]
        return {**plain, "prune": self.prune.resolved()} if self.prune.policy else plain

    def __post_init__(self) -> None:
        beyond = self.stride < 0 or bool(self.length and self.stride > self.length)
        limited = self.task_limit is not None
        _refuse(
            _one_template(self.chat_template, self.no_chat_template),
            _length(self.length),
            f"--stride {self.stride}: from 0 (no overlap) to --length {self.length}." if beyond else "",
            _at_least("--max-sequences", self.max_sequences, 0),
            _at_least("--task-limit", self.task_limit or 0, 1) if limited else "",
            _activation_bits(self.activation_bits),
        )


@dataclass(frozen=True)
class ExportSettings(StageSettings):
    """format: an exporter's name. out: the directory to make."""

    format: str = "transformers"
    out: str = ""
    shard_bytes: int = 4 * 10**9

    def __post_init__(self) -> None:
        _refuse(
            "" if self.out else "export needs --out, the directory to write.",
            _at_least("--shard-size", self.shard_bytes, 1, _LARGEST_SIZE),
        )
