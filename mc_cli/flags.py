"""Every flag of the command line: which settings field it sets, in which unit, and what it says about itself.

One table per settings dataclass, so that a flag means the same in every command. Types and defaults are not repeated
here: they come from the dataclass. A recipe's keys are the field names, checked by the same table.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any

from mc_cli import settings as s
from mc_cli.errors import InputError, Problems, shown

RUN_LEAVES_OUT = {("allocate", "bits")}  # `run --bits` is what is scored; allocate chooses among that

# The sections of a recipe, in the order of a run; all but `compute` are stages and commands.
COMPUTE = "compute"
_MOST = 2**63 - 1
SECTIONS: dict[str, type] = {
    "calibrate": s.CalibrateSettings,
    "score": s.ScoreSettings,
    "allocate": s.AllocateSettings,
    "quantize": s.QuantizeSettings,
    "prune-eval": s.EvaluateSettings,
    "export": s.ExportSettings,
    COMPUTE: s.RunSettings,
}
STAGES = tuple(section for section in SECTIONS if section != COMPUTE)
TARGETS = (
    "target_stored_bits",
    "target_bits",
    "target_size_bytes",
    "cut_ratio",
)  # of allocate; they exclude each other


@dataclass(frozen=True)
class Flag:
    """One flag, and the settings field that it sets.

    option   its name; "" = the field's, with dashes
    parse    from a flag's text (a list of texts where `repeated`) to the field's value; None = the plain type's own
    default  how help shows the default; "" = the dataclass's value
    """

    field: str
    help: str
    panel: str
    option: str = ""
    metavar: str | None = None
    parse: Callable[[Any], Any] | None = None
    repeated: bool = False
    default: str = ""
    required: bool = False

    @property
    def name(self) -> str:
        return self.option or "--" + self.field.replace("_", "-")


def parse_floors(texts: list[str]) -> tuple[tuple[int, int], ...]:
    """(width, experts) pairs of texts like `3:1`; `none` alone is no floor. Raises InputError for anything else."""
    if texts == ["none"]:
        return ()
    try:
        return tuple((int(width), int(count or 1)) for width, _, count in (text.partition(":") for text in texts))
    except ValueError as error:
        shown = " ".join(texts)
        raise InputError(
            f"--floor {shown!r}: write WIDTH:EXPERTS, for example 3:1, once per width, or none."
        ) from error


def parse_names(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


_TEXT, _SCORE, _BUDGET, _PARTS = "Text", "Measures", "Budget (exactly one)", "Widths of the other parts"
_METHOD, _QUANTIZER, _EVALUATION, _OUTPUT, _MODEL = "Method", "Quantizer", "Evaluation", "Output", "Model"
_PRUNING = "Skipping experts while running"
COMPUTING = "Computing"

_DATA = (
    "Text: a .txt, .jsonl, .json or .parquet file, a folder of them, a `datasets` name (NAME or NAME:CONFIG), or "
    "bundled:"
)
_SPLIT = "Split of a `datasets` name; files have none."
_TEXT_FIELD = (
    "Field of a .jsonl object, a .parquet row or a `datasets` row that holds the text. Rows without `text` are chats "
    "(messages, conversations, or prompt and completion), else their first field with a text is taken."
)
_CHAT_TEMPLATE = "Template that makes texts of chats: the name of one of the tokenizer's, or a file."
_NO_CHAT_TEMPLATE = "Take the turns of chats as plain text, one under the other."
_SEED = "Seed of everything random in this stage."


def _beside(widths: tuple[tuple[float, int], ...]) -> str:
    """A table of widths by the bits of the experts, in words."""
    return "; ".join(
        f"{bits} where experts have more than {border:g} bits" if border > 0 else f"else {bits}"
        for border, bits in widths
    )


_WIDTH = "1 to 8, or 16 to keep the checkpoint's own."

ACTIVATION_BITS_HELP = (
    "Bits of inputs in a processor's compiled products with packed weights. 8 is faster with many tokens at a time, "
    "and less exact: prune-eval says what it costs."
)

FLAGS: dict[type, tuple[Flag, ...]] = {
    s.CalibrateSettings: (
        Flag(
            "model",
            "Checkpoint: a folder with config.json and *.safetensors, a hub id, or bundled:demo-moe.",
            _MODEL,
            metavar="DIR|ID",
            required=True,
        ),
        Flag("revision", "Branch, tag or commit of a hub id.", _MODEL, default="the hub's main branch"),
        Flag("data", _DATA + "calibration.", _TEXT, metavar="PATH|NAME", required=True),
        Flag("split", _SPLIT, _TEXT),
        Flag("text_field", _TEXT_FIELD, _TEXT),
        Flag("chat_template", _CHAT_TEMPLATE, _TEXT, metavar="NAME|FILE", default="the tokenizer's own"),
        Flag("no_chat_template", _NO_CHAT_TEMPLATE, _TEXT),
        Flag("sequences", "Sequences to measure on.", _TEXT, metavar="COUNT"),
        Flag(
            "length",
            "Tokens per sequence.",
            _TEXT,
            metavar="TOKENS",
            default="2048, or the model's whole context where that is shorter",
        ),
        Flag("seed", _SEED, _TEXT),
        Flag(
            "gradient_tokens",
            "Tokens of the backward pass that measures how much each layer matters; 0 goes by the residual "
            "stream's energy instead, without a backward pass.",
            _TEXT,
            metavar="TOKENS",
        ),
        Flag("gradient_samples", "Labels drawn from the model for each of these tokens.", _TEXT, metavar="COUNT"),
        Flag(
            "choice_costs",
            "Count in what it costs that errors make later routers choose other experts.",
            _TEXT,
        ),
    ),
    s.QuantizerSettings: (
        Flag(
            "quantizer",
            "How weights are rounded: trellis (default), gptq, or rtn (round to nearest).",
            _QUANTIZER,
            metavar="NAME",
        ),
        Flag("damping", "Fraction of the mean Hessian diagonal that is added to it.", _QUANTIZER, metavar="FRACTION"),
        Flag(
            "shrinkage",
            "Tokens per input feature at which an expert's own statistics and its layer's pooled ones weigh the same.",
            _QUANTIZER,
            metavar="TOKENS",
        ),
        Flag("activation_order", "Round the columns with the largest inputs first.", _QUANTIZER),
        Flag(
            "sweeps",
            "Rounds in which every code is chosen again, given all others; with trellis, errors are then not fed into "
            "later rows, which loses more than this gains.",
            _QUANTIZER,
            metavar="COUNT",
            default="0 for trellis, 4 for gptq",
        ),
        Flag(
            "group_size",
            "Weights that share one scale, at most; each matrix gets the largest divisor of its width up to this.",
            _QUANTIZER,
            metavar="COUNT",
        ),
        Flag(
            "error_correction",
            "Fit each expert's down projection to make good for what was quantized before it.",
            _QUANTIZER,
            default="yes with trellis, else no",
        ),
    ),
    s.ScoreSettings: (
        Flag(
            "bits",
            "Candidate widths, bits per weight; 0 lets experts be dropped.",
            _SCORE,
            metavar="LIST",
            parse=s.parse_bits_list,
        ),
        Flag(
            "loss_tokens", "Tokens per expert, at most, on which output errors are measured.", _SCORE, metavar="TOKENS"
        ),
        Flag(
            "unit",
            "channel measures every channel of the experts too, in the same pass: allocate --cut-ratio asks for that.",
            _SCORE,
            metavar="expert|channel",
        ),
    ),
    s.AllocateSettings: (
        Flag(
            "target_stored_bits",
            "Mean stored bits per expert weight, scales and zero points included.",
            _BUDGET,
            metavar="BITS",
            default="not set",
        ),
        Flag(
            "target_bits",
            "Mean code bits per expert weight, scales and zero points left out.",
            _BUDGET,
            metavar="BITS",
            default="not set",
        ),
        Flag(
            "target_size_bytes",
            "Bytes of the whole checkpoint, for example 16GiB.",
            _BUDGET,
            option="--target-size",
            metavar="SIZE",
            parse=s.parse_file_size,
            default="not set",
        ),
        Flag(
            "cut_ratio",
            "Share of the experts' channels to cut away, those of the lowest score. The others keep 16 bits, or get "
            "the one width of --bits (0,4).",
            _BUDGET,
            metavar="SHARE",
            default="not set",
        ),
        Flag(
            "method",
            "How widths are chosen: global (over the whole model), pmq (per layer, as published), uniform, ... With "
            "--cut-ratio how channels are scored: camera-p, heapr, weight-norm, activation-norm, random.",
            _METHOD,
            metavar="NAME",
        ),
        Flag(
            "scope",
            "With --cut-ratio. layer: the same share in each; global: the lowest of all.",
            _METHOD,
            metavar="NAME",
        ),
        Flag(
            "uniform_width",
            "With --cut-ratio: cut as many channels of every expert, so that stock architectures hold the result.",
            _METHOD,
        ),
        Flag(
            "bits",
            "Candidate widths, bits per weight; 0 lets experts be dropped.",
            _METHOD,
            metavar="LIST",
            parse=s.parse_bits_list,
            default="the method's own, else those that were scored",
        ),
        Flag(
            "floors",
            "At least this many experts of a width in each layer, WIDTH:EXPERTS; once per width; none for no floor.",
            _METHOD,
            option="--floor",
            metavar="3:1",
            parse=parse_floors,
            repeated=True,
            default="the method's own",
        ),
        Flag(
            "alpha",
            "pmq: exponent of the routing frequency. camera-p: share of the largest activation, from 0 to 1.",
            _METHOD,
            default="1 and 0.9, as published",
        ),
        Flag("beta", "pmq: exponent of the routing weight.", _METHOD, default="1.5, as published"),
        Flag("gamma", "pmq: exponent of the loss.", _METHOD, default="1, as published"),
        Flag("seed", _SEED, _METHOD),
        Flag(
            "gap",
            "Relative distance to the optimum at which the solver may stop.",
            _METHOD,
            metavar="FRACTION",
            default="the method's own: 0.0001 for global, 0 for pmq",
        ),
        Flag("time_limit_s", "Seconds for one integer programme.", _METHOD, option="--time-limit", metavar="SECONDS"),
        Flag(
            "attention_bits",
            f"Attention and other sequence mixers: {_WIDTH}",
            _PARTS,
            metavar="BITS",
            default=_beside(s.BESIDE),
        ),
        Flag("shared_bits", f"Shared experts: {_WIDTH}", _PARTS, metavar="BITS", default=_beside(s.BESIDE)),
        Flag(
            "dense_bits",
            f"MLPs of layers without experts: {_WIDTH}",
            _PARTS,
            metavar="BITS",
            default="as --shared-bits",
        ),
        Flag("head_bits", f"Output head: {_WIDTH}", _PARTS, metavar="BITS", default=_beside(s.HEAD_BESIDE)),
        Flag(
            "embedding_bits",
            f"Token embedding, and a head that is tied to it: {_WIDTH}",
            _PARTS,
            metavar="BITS",
            default=_beside(s.EMBEDDING_BESIDE),
        ),
        Flag("router_bits", f"Routers: {_WIDTH}", _PARTS, metavar="BITS"),
    ),
    s.QuantizeSettings: (
        Flag(
            "plan",
            "A plan.yaml to follow instead of the work directory's.",
            "Plan",
            metavar="FILE",
            default="the one that allocate wrote",
        ),
    ),
    s.EvaluateSettings: (
        Flag(
            "data",
            _DATA + "heldout. Never text that was calibrated on.",
            _EVALUATION,
            metavar="PATH|NAME",
            required=True,
        ),
        Flag("split", _SPLIT, _EVALUATION),
        Flag("text_field", _TEXT_FIELD, _EVALUATION),
        Flag("chat_template", _CHAT_TEMPLATE, _EVALUATION, metavar="NAME|FILE", default="the tokenizer's own"),
        Flag("no_chat_template", _NO_CHAT_TEMPLATE, _EVALUATION),
        Flag(
            "length",
            "Tokens per window.",
            _EVALUATION,
            metavar="TOKENS",
            default="2048, or the model's whole context where that is shorter",
        ),
        Flag(
            "stride",
            "Tokens by which windows advance; smaller than --length gives each token more context.",
            _EVALUATION,
            metavar="TOKENS",
            default="--length: no overlap",
        ),
        Flag(
            "max_sequences",
            "Windows at most, taken evenly over the text.",
            _EVALUATION,
            metavar="COUNT",
            default="all of the text",
        ),
        Flag(
            "tasks",
            "lm-eval tasks, separated by commas (needs the extra: pip install 'mixture-compressor[eval]').",
            _EVALUATION,
            metavar="LIST",
            parse=parse_names,
            default="none",
        ),
        Flag(
            "include_path",
            "Folder with lm-eval task files of your own (YAML).",
            _EVALUATION,
            metavar="DIR",
            default="none",
        ),
        Flag("task_limit", "Examples per lm-eval task at most.", _EVALUATION, metavar="COUNT", default="all"),
        Flag("activation_bits", ACTIVATION_BITS_HELP, _EVALUATION, metavar="16|8"),
    ),
    s.PruneSettings: (
        Flag(
            "policy",
            "Policy that lets tokens skip experts: otp, odp, top-k, random or router-threshold. It is fitted, measured "
            "and exported. More names, separated by commas, are fitted and measured beside it.",
            _PRUNING,
            metavar="LIST",
            parse=parse_names,
            default="none",
        ),
        Flag("target_rate", "Share of expert calls to drop.", _PRUNING, metavar="SHARE", default="not set"),
        Flag(
            "max_loss",
            "Drop as many calls as raise the perplexity of fitting text by at most this share.",
            _PRUNING,
            metavar="SHARE",
            default="0.01 unless --target-rate is set",
        ),
        Flag("sweep", "Measure the policies and the baselines at all --rates, and draw the front.", _PRUNING),
        Flag("rates", "Shares of expert calls to find thresholds for.", _PRUNING, metavar="LIST", parse=s.parse_rates),
        Flag("protect", "odp: share of tokens that keep all their experts.", _PRUNING, metavar="SHARE"),
        Flag(
            "fit_data",
            "Text to fit the policy on, as --data. Never the text it is evaluated on.",
            _PRUNING,
            metavar="PATH|NAME",
            default="the calibration tokens",
        ),
        Flag("fit_sequences", "Windows to fit the policy on.", _PRUNING, metavar="COUNT"),
        Flag("policy_seed", "Seed of everything random in a policy.", _PRUNING, metavar="NUMBER"),
        Flag("otp_steps", "otp: steps of training.", _PRUNING, metavar="COUNT"),
        Flag("otp_learning_rate", "otp: learning rate at the start.", _PRUNING, metavar="RATE"),
        Flag("otp_batch", "otp: windows per step.", _PRUNING, metavar="COUNT"),
        Flag(
            "drop_experts",
            "Share of experts that no token is sent to any more; with --policy all, nothing else is dropped.",
            _PRUNING,
            metavar="SHARE",
        ),
        Flag("drop_by", "Which experts: lowest by reap, frequency or router-weight.", _PRUNING, metavar="NAME"),
        Flag("drop_scope", "layer: the same share in each; global: the lowest of all.", _PRUNING, metavar="NAME"),
    ),
    s.ExportSettings: (
        Flag(
            "format",
            "transformers: packed, loads after `import mc_cli`; dense: dequantized, original layout.",
            _OUTPUT,
            metavar="NAME",
        ),
        Flag("out", "Directory to make.", _OUTPUT, metavar="DIR", required=True),
        Flag(
            "shard_bytes",
            "Bytes per safetensors file at most.",
            _OUTPUT,
            option="--shard-size",
            metavar="SIZE",
            parse=s.parse_file_size,
        ),
    ),
    s.RunSettings: (
        Flag("device", "auto takes cuda where there is one.", COMPUTING, metavar="auto|cpu|cuda"),
        Flag(
            "dtype",
            "Of activations and kept weights: auto, float32, bfloat16 or float16; auto is float32 on a CPU and the "
            "checkpoint's own on a GPU.",
            COMPUTING,
            metavar="NAME",
        ),
        Flag("batch_tokens", "Tokens per forward.", COMPUTING, metavar="TOKENS"),
        Flag("trust_remote_code", "Run the Python code that the checkpoint brings along.", COMPUTING),
    ),
}

# `run` reads two texts; the flags of the one that is evaluated on get this prefix there.
RUN_PREFIX = "eval"
HELD_OUT = "bundled:heldout"  # what `run` evaluates on unless told: never the text it calibrated on
_PREFIXED = ("data", "split", "text_field", "length")


@cache
def flags_of(section: str) -> tuple[Flag, ...]:
    """The flags of a stage or of `compute`, nested settings included, in the table's order."""
    return tuple(_flags(SECTIONS[section]))


def _flags(cls: type) -> Iterator[Flag]:
    yield from FLAGS[cls]
    for kind in annotations_of(cls).values():
        if kind in FLAGS:
            yield from FLAGS[kind]


@cache
def annotations_of(cls: type) -> Mapping[str, Any]:
    """Field name -> resolved type of a settings dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


@cache
def type_of(section: str, name: str) -> Any:
    """The resolved type of a field, nested settings included."""
    return annotations_of(_owner(SECTIONS[section], name))[name]


def plain_type(kind: Any) -> type:
    """int, float, bool or str of `kind` or `kind | None`; tuple for every sequence."""
    if isinstance(kind, types.UnionType):
        kind = next(member for member in kind.__args__ if member is not type(None))
    return typing.get_origin(kind) or kind


def default_text(section: str, flag: Flag) -> str:
    """How help and docs show a flag's default; "" for none."""
    if section == "quantize" and flag.field in shared_with_score():
        return "as score did"
    if flag.required or flag.default:
        return flag.default
    field = next(f for f in fields(_owner(SECTIONS[section], flag.field)) if f.name == flag.field)
    value = field.default
    if value is MISSING or value is None or value is False or value == "":
        return "no" if value is False else ""
    return ",".join(map(str, value)) if isinstance(value, tuple) else "yes" if value is True else str(value)


@cache
def shared_with_score() -> frozenset[str]:
    """The fields in which quantize follows score unless told otherwise, so that what was measured is what ships."""
    return frozenset(annotations_of(s.QuantizerSettings))


def _owner(cls: type, name: str) -> type:
    """The dataclass that a flat field name belongs to: one nested in `cls` if it has the name, else `cls`."""
    kinds = annotations_of(cls)
    for kind in kinds.values():
        if kind in FLAGS and name in annotations_of(kind):
            return kind
    return cls


def build(section: str, values: Mapping[str, Any]) -> Any:
    """The settings of a section from flat field values. Raises InputError naming all that its dataclasses refuse."""
    return _build(SECTIONS[section], values)


def _build(cls: type, values: Mapping[str, Any]) -> Any:
    kinds = annotations_of(cls)
    problems = Problems()
    given = {name: values[name] for name, kind in kinds.items() if kind not in FLAGS and name in values}
    for name, kind in kinds.items():
        if kind in FLAGS:
            with problems.catching():
                given[name] = _build(kind, values)
    with problems.catching():  # what is nested and wrong is left at its defaults here
        built = cls(**given)
    with problems.catching():  # after the dataclass, whose own words are better where it has some
        _check_numbers(cls, values)
    problems.tell()
    return built


def _check_numbers(cls: type, values: Mapping[str, Any]) -> None:
    """Raises InputError for NaN, which is neither below nor above any limit, infinity, and numbers beyond 64 bits."""
    for flag in FLAGS[cls]:
        value = values.get(flag.field)
        if isinstance(value, int | float) and not (
            math.isfinite(value) if isinstance(value, float) else -_MOST <= value <= _MOST
        ):
            raise InputError(f"{flag.name} {shown(value)}: give a finite number of at most 63 bits.")


def run_name(section: str, flag: Flag) -> str:
    """The parameter that sets a field in `run`: its own name, or with a prefix where calibrate has the plain one."""
    return f"{RUN_PREFIX}_{flag.field}" if section == "prune-eval" and flag.field in _PREFIXED else flag.field


def run_option(section: str, flag: Flag) -> str:
    """The flag that sets a field in `run`."""
    prefixed = run_name(section, flag) != flag.field
    return f"--{RUN_PREFIX}-{flag.name.removeprefix('--')}" if prefixed else flag.name


def parsed(flag: Flag, value: Any) -> Any:
    """A flag's value as its field holds it. Raises InputError, naming the flag, for a value that it does not take."""
    if flag.parse is None or value is None:
        return value
    try:
        return flag.parse(value)
    except InputError as error:
        named = str(error).startswith(flag.name)
        raise error if named else InputError(f"{flag.name}: {error}") from error


def run_flags() -> dict[str, list[tuple[str, Flag]]]:
    """Each settings parameter of `run`, and the (section, flag) pairs that it sets."""
    found: dict[str, list[tuple[str, Flag]]] = {}
    for section in (*STAGES, COMPUTE):
        for flag in flags_of(section):
            if (section, flag.field) not in RUN_LEAVES_OUT:
                found.setdefault(run_name(section, flag), []).append((section, flag))
    return found
