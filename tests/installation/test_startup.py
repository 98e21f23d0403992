"""An installation teaches transformers the packed format in any process, and costs one that never asks nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.installation.conftest import TOKENS, Installed, install
from tests.installation.environments import DISTRIBUTION, STARTUP, Environment, new_environment

KINDS = ("wheel", "editable")
WAITING = "import sys; print([type(finder).__name__ for finder in sys.meta_path].count('MixtureCompressorStartup'))"

# Run as a file: workers that are spawned import it again.
SAME_LOGITS = f"""
import multiprocessing, sys

def generates(folder):
    from transformers import pipeline

    made = pipeline("text-generation", folder + "/out")("the cat", max_new_tokens=4, do_sample=False)
    assert len(made[0]["generated_text"]) > len("the cat"), made
    return same(folder)

def same(folder):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    loaded = AutoModelForCausalLM.from_pretrained(folder + "/out", dtype="float32")
    with torch.no_grad():
        found = loaded(torch.tensor({TOKENS.tolist()})).logits
    expected = torch.load(folder + "/logits.pt", weights_only=True)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)  # compiled here or not, compiled there or not
    return "same"

if __name__ == "__main__":
    if sys.argv[2] == "here":
        print(same(sys.argv[1]))
    else:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(*pool.map(generates, [sys.argv[1]]))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_every_process_waits_and_imports_nothing(kind: str, installed: Installed) -> None:
    environment = installed(kind)
    assert environment.run("-c", WAITING) == "1\n"
    assert environment.run("-S", "-c", WAITING) == "0\n"
    ours = "import sys; print([name for name in sys.modules if name.partition('.')[0] in ('mc_cli', 'transformers')])"
    assert environment.run("-c", ours) == "[]\n"


@pytest.mark.parametrize("kind", KINDS)
def test_the_line_takes_no_time(kind: str, installed: Installed) -> None:
    """Less than 5 ms, and no module; the best of five, because the machine has other work to do."""
    environment = installed(kind)
    timed = """
import site, sys, time
before, started = set(sys.modules), time.perf_counter()
site.addpackage(sys.argv[1], sys.argv[2], set())
print(time.perf_counter() - started, len(sys.meta_path), sorted(set(sys.modules) - before))
"""
    rows = [environment.run("-S", "-c", timed, str(environment.packages), STARTUP).split(maxsplit=2) for _ in range(5)]
    assert min(float(seconds) for seconds, *_ in rows) < 0.005
    assert {modules.strip() for *_, modules in rows} <= {"[]", "['codecs', 'encodings.utf_8_sig']"}, rows  # site's own
    assert len({finders for _, finders, _ in rows}) == 1 and int(rows[0][1]) == 4


@pytest.mark.parametrize(("kind", "where"), [("wheel", "here"), ("editable", "spawned")])
def test_somebody_elses_script_loads(
    kind: str, where: str, installed: Installed, exported: Path, tmp_path: Path
) -> None:
    """By its class; in the process that is spawned a pipeline is the first to load, and generates."""
    script = tmp_path / "script.py"
    script.write_text(SAME_LOGITS, encoding="utf-8")
    assert installed(kind).run(str(script), str(exported), where) == "same\n"


_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_lm_eval_loads(installed: Installed, exported: Path, tmp_path: Path) -> None:
    """Loads as `lm_eval --model hf --model_args pretrained=DIR` does; that reads its own thousands of tasks first."""
    pytest.importorskip("lm_eval")
    rows = [{"question": "the cat", "choices": ["sat", "fell"], "answer": number % 2} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(_TASK.format(data=tmp_path / "rows.jsonl"), encoding="utf-8")
    script = """
import sys
import lm_eval
from lm_eval.tasks import TaskManager
tasks = TaskManager(include_path=sys.argv[2], include_defaults=False)
options = {"model_args": "pretrained=" + sys.argv[1], "device": "cpu", "task_manager": tasks, "batch_size": 1}
print(lm_eval.simple_evaluate(model="hf", tasks=["tiny_choice"], **options)["results"]["tiny_choice"]["acc,none"])
"""
    environment, offline = installed("editable"), {"HF_DATASETS_OFFLINE": "1"}
    found = environment.run("-c", script, str(exported / "out"), str(tmp_path / "tasks"), **offline)
    assert float(found.splitlines()[-1]) == 0.5


def test_transformers_serve_answers(installed: Installed, exported: Path, tmp_path: Path) -> None:
    for needed in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(needed)
    environment, port = installed("editable"), "18437"
    command = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    asked = {"model": str(exported / "out"), "prompt": "the cat", "max_tokens": 4}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/completions",
        data=json.dumps(asked).encode(),
        headers={"Content-Type": "application/json"},
    )
    arguments = ["serve", str(exported / "out"), "--port", port, "--device", "cpu"]
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(
            [environment.python, "-c", command, *arguments], stdout=log, stderr=log, env=environment.variables()
        )
        try:
            answer = _answer(request, server)
        finally:
            server.terminate()
            server.wait()
        log.seek(0)
        assert answer is not None, log.read()[-3000:]
    assert answer["usage"]["completion_tokens"] >= 1


def _answer(request: urllib.request.Request, server: subprocess.Popen[bytes]) -> dict[str, dict[str, int]] | None:
    """The server's answer as soon as there is one, None where it ends or takes two minutes."""
    for _ in range(240):
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError:
            return None
        except OSError:
            if server.poll() is not None:
                return None
            time.sleep(0.5)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_uninstalled_it_is_gone(kind: str, sources: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What loading says then is in the test below, and in tests/packed/test_plugin.py."""
    environment = new_environment(tmp_path / kind)
    install(environment, kind, sources, request)
    assert (environment.packages / STARTUP).is_file()
    environment.pip("uninstall", "--quiet", "--yes", DISTRIBUTION)
    assert not [path.name for path in environment.packages.iterdir() if "mixture" in path.name or "mc_cli" in path.name]
    assert environment.run("-c", WAITING) == "0\n"


def test_a_line_without_its_package_is_silent(exported: Path, installed: Installed, tmp_path: Path) -> None:
    """The package's folder was removed by hand, or somebody else's mc_cli lies in its place."""
    environment = new_environment(tmp_path / "broken")
    shutil.copy(installed("wheel").packages / STARTUP, environment.packages)
    asked = (
        "import sys; print([finder.find_spec('transformers.quantizers.auto', None) for finder in sys.meta_path[:1]])"
    )
    done = environment.process("-c", asked)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[None]\n", "")
    (environment.packages / "mc_cli.py").write_text("stranger = True\n", encoding="utf-8")
    _loading_stops(environment, exported)


def _loading_stops(environment: Environment, exported: Path) -> None:
    """The library's own message names the distribution, and no loader falls back to random experts."""
    script = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, MixtralForCausalLM
from transformers.quantizers import AutoQuantizationConfig
try:
    AutoQuantizationConfig.from_dict(AutoConfig.from_pretrained(sys.argv[1]).quantization_config)
except ValueError as error:
    print(str(error).partition(" - ")[0])
for loader in (AutoModelForCausalLM, MixtralForCausalLM, AutoModel):
    try:
        loader.from_pretrained(sys.argv[1])
    except ValueError as error:
        print("pip install mixture-compressor" in str(error))
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    print("pip install mixture-compressor" in str(error))
"""
    done = environment.process("-c", script, str(exported / "out"))
    assert done.stdout.splitlines() == ["Unknown quantization type, got mixture-compressor", *["True"] * 4]
    assert "Unknown quantization type, got mixture-compressor" in done.stderr


def test_this_environment_has_the_line() -> None:
    """`make test` and `make check` work in an editable installation, which has it as any other."""
    found = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True, check=True).stdout
    assert found == "1\n", "run `make install-dev` again: it puts the line into the environment's site-packages"
