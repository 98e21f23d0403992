"""The page on one variant of a work directory: what was done, what came of it, and how to do it again."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_cli import __version__
from mc_cli.artifacts.calibration import LayerRouting, routing_file
from mc_cli.artifacts.files import read_json
from mc_cli.artifacts.followed_plan import follows_own_plan
from mc_cli.artifacts.manifest import Manifest
from mc_cli.artifacts.names import POINTER
from mc_cli.artifacts.routes import ROUTES, LayerRoutes, read_routes
from mc_cli.artifacts.store import as_planned
from mc_cli.artifacts.work_dir import POLICY_STAGE, STAGE_FOLDERS, WorkDir
from mc_cli.errors import BudgetError, InputError
from mc_cli.overview.commands import command_lines
from mc_cli.overview.curve import Curve, curve_of
from mc_cli.overview.curve_report import curve_chart, expectation_sentence, measured_table
from mc_cli.overview.expectation import Expectation, expectation_of
from mc_cli.overview.page_figures import (
    bits_map,
    changed_table,
    domain_chart,
    flips_table,
    front_chart,
    load_charts,
    route_charts,
    router_chart,
    size_chart,
    spectrum_chart,
)
from mc_cli.overview.sources import Measured, Scores, read_measured, read_scores, seen_of
from mc_cli.progress import Progress
from mc_cli.reports.evaluation import evaluation_summary
from mc_cli.reports.html import Section, page
from mc_cli.reports.plan import plan_summary
from mc_cli.reports.tables import PERPLEXITY


@dataclass(frozen=True)
class Contents:
    """All that the page shows."""

    work: WorkDir
    scores: Scores
    measured: Measured
    others: tuple[Measured, ...]  # all variants that were evaluated
    curve: Curve | None  # None where the scores hold no predicted losses
    expectation: Expectation
    routing: tuple[LayerRouting, ...]
    routes: tuple[LayerRoutes, ...]  # on held-out text, of both models; empty where an earlier version evaluated
    manifests: Mapping[str, Manifest]
    model: str
    left_out: tuple[str, ...]


def report_page(work: WorkDir, progress: Progress, *, unit_of: Any) -> str:
    """The HTML document. Raises InputError where the variant was not evaluated, ArtifactError for what is damaged.

    unit_of   bytes -> name and bytes of the unit that sizes of that order are told in
    """
    found = read_contents(work, progress)
    measured = found.measured
    title = f"{found.model}, compressed: {work.variant}" if len(found.others) > 1 else f"{found.model}, compressed"
    before = sum(measured.evaluation.original_bytes.values())
    name, scale = unit_of(before)
    lead = (
        f"{before / scale:.4g} {name} became {measured.stored_bytes / scale:.4g} {name}, "
        f"{before / measured.stored_bytes:.2f} times smaller; on held-out text the loss rose by {measured.gap:.4f} "
        f"nats per token, from {measured.evaluation.total.original_loss:.4f} to "
        f"{measured.evaluation.total.packed_loss:.4f}."
    )
    return page(title, lead, list(_sections(found, unit_of)))


def read_contents(work: WorkDir, progress: Progress) -> Contents:
    """Everything that the page needs, read and computed."""
    scores = read_scores(as_planned(work))
    others, left_out = read_measured(work.path)
    own = next((entry for entry in others if entry.work.variant == work.variant), None)
    if own is None or own.plan is None:
        raise InputError(
            f"{work.path} has no evaluation of a packed model that was made from the plan of the variant "
            f"{work.variant}. Run `{work.command('quantize')}` and `{work.command('prune-eval')}` first."
        )
    curve, told = _curve(scores, progress)
    calibration = work.folder("calibrate")
    routing = [LayerRouting.read(calibration / routing_file(layer.layer)) for layer in scores.importance.layers]
    manifests = {stage: Manifest.read(work.folder(stage)) for stage in (*STAGE_FOLDERS, POLICY_STAGE)}
    packed = manifests["quantize"]
    if packed is not None and follows_own_plan(packed):
        del manifests["allocate"]  # it may have made another plan, which has no part in this result
    return Contents(
        work=work,
        scores=scores,
        measured=own,
        others=tuple(others),
        curve=curve,
        expectation=expectation_of(seen_of(others)),
        routing=tuple(routing),
        routes=read_routes(work.folder("prune-eval") / ROUTES),
        manifests={stage: manifest for stage, manifest in manifests.items() if manifest is not None},
        model=_model_name(work, scores),
        left_out=(*told, *left_out),
    )


def _curve(scores: Scores, progress: Progress) -> tuple[Curve | None, tuple[str, ...]]:
    """(the curve, sentences on what it lacks); None with the reason where there is none."""
    try:
        curve = curve_of(scores, None, progress)
    except (InputError, BudgetError) as error:
        return None, (str(error),)
    return curve, curve.left_out


def _model_name(work: WorkDir, scores: Scores) -> str:
    """The model as it was asked for, its last piece alone where that was a path."""
    path = work.path / POINTER
    asked = str(read_json(path).get("model", "")) if path.exists() else ""
    return Path(asked).name if asked.startswith(("/", ".", "~")) else asked or scores.inventory.model_type


def _sections(found: Contents, unit_of: Any) -> Iterator[Section]:
    evaluation, plan = found.measured.evaluation, found.measured.plan
    assert plan is not None
    summary = evaluation_summary(evaluation, None)
    facts = {name: _fact_text(name, value) for name, value in summary["facts"].items()}
    yield Section("summary", "Summary", facts=facts)
    yield Section("size", "Size by role", figures=[size_chart(evaluation, unit_of)])
    tables = [entry for entry in summary["tables"] if "bytes" not in entry["title"].lower()]
    yield Section("quality", "Quality on held-out text", figures=[domain_chart(evaluation)], tables=tables[:1])
    yield _curve_section(found, unit_of)
    yield Section("widths", "Widths", figures=[bits_map(plan)], facts=_plan_facts(plan_summary(plan)["facts"]))
    yield Section(
        "importance",
        "How much each expert matters",
        [
            "The line shows every expert's predicted rise of the loss, alone at one width, from the largest to the "
            "smallest. A steep line has few experts that matter, a flat one none that can be spared."
        ],
        figures=[spectrum_chart(found.scores.importance)],
    )
    yield _routing_section(found)
    if evaluation.pruning:
        yield Section(
            "skipping",
            "Skipping expert calls",
            figures=[front_chart(evaluation.pruning)],
            tables=[entry for entry in tables if entry["title"].startswith("Expert")],
        )
    yield _warnings_section(found)
    yield _repeat_section(found)


def _routing_section(found: Contents) -> Section:
    """The load of the experts and the routers' choices, before and after where the evaluation has both."""
    if not found.routes:
        sentence = (
            "The charts show how evenly each layer's router spread the calibration tokens, before compression, and how "
            "often the packed model chooses another expert on held-out text. An earlier version evaluated, which did "
            "not record the load after compression: run prune-eval with --force."
        )
        charts = [*load_charts(found.routing), router_chart(found.measured.evaluation)]
        return Section("routing", "Routing", [sentence], figures=charts)
    sentences = [
        "The charts show, on held-out text before and after compression, how evenly each layer's router spreads the "
        "tokens over its experts, and how much its choice tells of the token, which is the mutual information of "
        "tokens and experts under the softmax of its logits. Where both hardly move, routers still do what they did.",
        "A choice has flipped where a token goes to another expert than in the original. The exchanges "
        "are those of tokens that exchanged one expert alone.",
    ]
    return Section(
        "routing",
        "Routing",
        sentences,
        figures=[*route_charts(found.routes), router_chart(found.measured.evaluation)],
        tables=[changed_table(found.routes), flips_table(found.routes)],
    )


def _curve_section(found: Contents, unit_of: Any) -> Section:
    charts = []
    if found.curve is not None:
        unit = unit_of(max(point.stored_bytes for point in found.curve.points))
        charts = [curve_chart(found.curve, found.expectation, found.others, fit=None, unit=unit)]
    sentence = f"Expected gaps are {expectation_sentence(found.expectation)}."
    return Section(
        "curve",
        "Loss over size",
        [sentence, *found.left_out],
        figures=charts,
        tables=[measured_table(found.others, found.expectation)],
    )


def _plan_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(value) for name, value in facts.items() if value is not None}


def _warnings_section(found: Contents) -> Section:
    told = [f"{stage}: {text}" for stage, manifest in found.manifests.items() for text in manifest.warnings]
    return Section("warnings", "Warnings", told or ["No stage warned of anything."])


def _repeat_section(found: Contents) -> Section:
    facts = {f"{stage} fingerprint": manifest.fingerprint for stage, manifest in found.manifests.items()}
    facts |= {"mc-cli": __version__, "Python": platform.python_version(), "machine": platform.machine()}
    return Section(
        "repeat",
        "How to do it again",
        ["Settings that differ from the defaults are written out. Texts are named by their digests alone."],
        facts=facts,
        code=command_lines(found.work, found.manifests, found.model),
    )


def _fact_text(name: str, value: Any) -> str:
    """A fact of the summary; perplexities with as many decimals as everywhere."""
    return f"{value:.{PERPLEXITY}f}" if name.startswith("perplexity") and isinstance(value, float) else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
