"""The commands that use a finished model: to continue a text, to measure its speed, and to serve it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import typer

from mc_cli.cli.libraries import prepare_libraries
from mc_cli.cli.options import DEBUG, JSON, activation_bits, flag_parameter, made_option, parameter, settings_of
from mc_cli.failures import telling_errors
from mc_cli.flags import COMPUTE, flags_of
from mc_cli.settings import ACTIVATION_BITS

_GENERATION, _SPEED = "Text", "What is measured"
_DENSE_DTYPES = ("bfloat16", "float32")


def generate(given: Mapping[str, Any]) -> None:
    """Text to stdout as it comes; speed and memory to stderr."""
    with telling_errors(debug=given["debug"]):
        (compute,) = settings_of(COMPUTE, given=given)
        bits = ACTIVATION_BITS.checked(given["activation_bits"])
        prepare_libraries(debug=given["debug"])
        from mc_cli import console
        from mc_cli.exporters.engines import check_engine
        from mc_cli.measuring.requests import check_generation

        check_engine(given["model"], "transformers")
        folder = check_generation(given["model"], given["prompt"], given["seed"])
        from mc_cli.kernels.compiled import inputs_of
        from mc_cli.measuring.generation import generate
        from mc_cli.models.memory import peak_memory_bytes
        from mc_cli.models.session import device_named

        show = console.stream if not given["json"] else lambda text: None
        with inputs_of(bits, device_named(compute.device)):
            made = generate(
                str(folder),
                given["prompt"],
                compute=compute,
                max_new_tokens=given["max_new_tokens"],
                temperature=given["temperature"],
                seed=given["seed"],
                show=show,
                images=given["image"] or (),
            )
        peak = peak_memory_bytes()
        if given["json"]:
            figures = {"tokens_per_s": made.tokens_per_s, "peak_memory_bytes": peak}
            return console.print_json({"prompt": given["prompt"], **made.__dict__, **figures})
        show("\n")
        speed = f"{made.new_tokens} tokens in {made.generate_s:.1f} s, {made.tokens_per_s:.1f} tokens/s"
        return console.say(f"{speed}; loaded in {made.load_s:.1f} s; peak memory {console.size_text(peak)}")


def generate_parameters() -> list[inspect.Parameter]:
    """The parameters of `generate`."""
    model = typer.Argument(help="Exported directory, or any model folder.", metavar="DIR", show_default=False)
    option = partial(made_option, panel=_GENERATION)
    tokens = option("--max-new-tokens", help="Tokens to add at most. [default: 64]", metavar="COUNT", min=1)
    image = option("--image", help="Image that the model sees before the text; again for more.", metavar="FILE")
    temperature = option(
        "--temperature",
        help="0 takes the most likely token; above, tokens are drawn. [default: 0]",
        metavar="NUMBER",
        min=0,
    )
    return [
        parameter("model", str, model),
        parameter("prompt", str, option("--prompt", help="Text to continue.", metavar="TEXT")),
        parameter("image", list[Path] | None, image, None),
        parameter("max_new_tokens", int, tokens, 64),
        parameter("temperature", float, temperature, 0.0),
        activation_bits(_GENERATION),
        parameter("seed", int, option("--seed", help="Seed of what is drawn. [default: 0]", metavar="NUMBER"), 0),
        *(
            flag_parameter(COMPUTE, flag, name=flag.field, option=flag.name)
            for flag in flags_of(COMPUTE)
            if flag.field in ("device", "dtype", "trust_remote_code")
        ),
        parameter("json", bool, JSON, False),
        parameter("debug", bool, DEBUG, False),
    ]


def bench(given: Mapping[str, Any]) -> None:
    """Every model in a process of its own; the table to stdout."""
    with telling_errors(debug=given["debug"]):
        (compute,) = settings_of(COMPUTE, given=given)
        bits = ACTIVATION_BITS.checked(given["activation_bits"])
        prepare_libraries(debug=given["debug"])
        from mc_cli import console
        from mc_cli.exporters.engines import check_engine
        from mc_cli.measuring.requests import check_speed
        from mc_cli.measuring.speed import measure, reading_rate
        from mc_cli.models.model_name import resolve_model

        for name in filter(None, (given["model"], given["beside"])):
            check_engine(name, "transformers")
        wanted = {name: given[name] for name in ("prompt_tokens", "new_tokens", "threads")}
        cases = [(resolve_model(given["model"], asked_as="DIR"), compute.dtype)]
        if given["beside"]:
            beside = resolve_model(given["beside"], asked_as="--beside")
            cases += [(beside, dtype) for dtype in _DENSE_DTYPES]
        for folder in dict.fromkeys(folder for folder, _ in cases):
            check_speed(folder, **wanted)
        import torch

        from mc_cli.kernels.compiled import inputs_of

        found = []
        for folder, dtype in cases:
            console.say(f"bench: {folder}, {dtype}")
            with inputs_of(bits, torch.device("cpu")):
                found.append(measure(folder, dtype=dtype, **wanted))
            wanted["prompt_tokens"] = found[0].prompt_tokens  # all models read as much
        rate = reading_rate(given["threads"])
        if given["json"]:
            return console.print_json({"reading_bytes_per_s": rate, "models": [speed.__dict__ for speed in found]})
        return console.print_speeds(found, rate)


_PROMPT_HELP = "Random tokens to read. [default: 256, or what the model's positions leave]"


def bench_parameters() -> list[inspect.Parameter]:
    """The parameters of `bench`."""
    model = typer.Argument(help="Exported directory, or any model folder.", metavar="DIR", show_default=False)
    option = partial(made_option, panel=_SPEED)
    beside = option("--beside", help="Measure this model, too, in bfloat16 and float32: the original.", metavar="DIR")
    prompt = option("--prompt-tokens", help=_PROMPT_HELP, metavar="COUNT", min=1)
    new = option("--new-tokens", help="Tokens to decode, one at a time. [default: 64]", metavar="COUNT", min=1)
    threads = option("--threads", help="Processor threads. [default: what torch takes]", metavar="COUNT", min=1)
    return [
        parameter("model", str, model),
        parameter("beside", str, beside, None),
        parameter("prompt_tokens", int, prompt, None),
        parameter("new_tokens", int, new, 64),
        *(
            flag_parameter(COMPUTE, flag, name=flag.field, option=flag.name)
            for flag in flags_of(COMPUTE)
            if flag.field == "dtype"
        ),
        parameter("threads", int, threads, None),
        activation_bits(_SPEED),
        parameter("json", bool, JSON, False),
        parameter("debug", bool, DEBUG, False),
    ]


def serve(given: Mapping[str, Any]) -> None:
    """A server until Ctrl-C; what it says goes to stderr, the engine's own notices too."""
    with telling_errors(debug=given["debug"]):
        prepare_libraries(debug=given["debug"])
        from mc_cli import console
        from mc_cli.errors import Problems
        from mc_cli.exporters.engines import check_engine
        from mc_cli.measuring.requests import check_served
        from mc_cli.serving.server import NAMES, Server, check_port, engine_named, run_server

        problems = Problems()
        with problems.catching():
            check_engine(given["model"], *NAMES.get(given["engine"], NAMES["auto"]))
            folder = check_served(given["model"], given["dtype"])
        with problems.catching():
            engine = engine_named(given["engine"])
        with problems.catching():
            check_port(given["host"], given["port"])
        problems.tell()
        wanted = {name: given[name] for name in ("host", "port", "dtype")}
        server = Server(folder, engine, **wanted, arguments=tuple(given["arguments"] or ()))
        console.say(f"Starting {engine} for {folder}")
        run_server(server, say=console.say)


_SERVER = "Server"


def serve_parameters() -> list[inspect.Parameter]:
    """The parameters of `serve`."""
    model = typer.Argument(help="Exported directory, or any model folder.", metavar="DIR", show_default=False)
    more = typer.Argument(
        help="After `--`: arguments for the engine's own command.", metavar="-- ARGUMENTS", show_default=False
    )
    option = partial(made_option, panel=_SERVER)
    engine = "Engine that computes: transformers, vllm, or auto: vllm where it is installed. [default: auto]"
    dtype = (
        "Type of activations and kept weights: auto is the model's own; float32, bfloat16 or float16. [default: auto]"
    )
    host = option("--host", help="Address to listen at. [default: localhost]", metavar="ADDRESS")
    port = option("--port", help="Port to listen at. [default: 8000]", metavar="NUMBER", min=1, max=65535)
    return [
        parameter("model", str, model),
        parameter("arguments", list[str] | None, more, None),
        parameter("engine", str, option("--engine", help=engine, metavar="auto|transformers|vllm"), "auto"),
        parameter("host", str, host, "localhost"),
        parameter("port", int, port, 8000),
        parameter("dtype", str, option("--dtype", help=dtype, metavar="NAME"), "auto"),
        parameter("debug", bool, DEBUG, False),
    ]
