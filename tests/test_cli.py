"""The driver as a user runs it: a process with arguments, its output, its exit code."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config_dict, write_with_tokenizer
from driver import DRIVER, ENVIRONMENT, ROOT, refused, run
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tiny_config_dict(vocab_size=288, max_position_embeddings=2048)
    return write_with_tokenizer(tmp_path_factory.mktemp("cli"), raw=raw)


@pytest.fixture
def broken(ckpt: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, for a test to damage."""
    return Path(shutil.copytree(ckpt, tmp_path / "ckpt"))


def test_text_goes_to_stdout_and_the_summary_to_stderr(ckpt: Path) -> None:
    options = ("--ckpt", ckpt, "--prompt", "Hello", "--max-new-tokens", 12)
    first, second = run(*options), run(*options, "--json")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "12 new tokens (length)" in first.stderr and "tok/s" in first.stderr
    result = json.loads(second.stdout)
    assert first.stdout == result["text"] + "\n"
    assert result["finish"] == "length" and len(result["ids"]) == 12
    assert (result["reasoning"], result["tool_calls"]) == (None, [])
    assert set(result["timings"]) == {
        "load_s",
        "prefill_s",
        "ttft_s",
        "decode_s",
        "prefill_tps",
        "decode_tps",
    }
    assert result["config"] == {
        "weights": "stored",
        "activations": "bf16",
        "numerics": "trained",
        "dtype": "float32",
        "device": "cpu",
        "reference": [],
    }


def test_every_option_is_taken(ckpt: Path, tmp_path: Path) -> None:
    messages = {
        "messages": [{"role": "user", "content": "2+2?"}],
        "tools": [{"name": "add", "description": "adds", "parameters": {"type": "object"}}],
    }
    (tmp_path / "m.json").write_text(json.dumps(messages), encoding="utf-8")
    choices = "--weights nvfp4 --activations nvfp4 --numerics exact --dtype bfloat16 --reference norm,mhc"
    sampling = "--temperature 0.7 --top-k 50 --top-p 0.9 --min-p 0.01 --seed 3 --stop zzzz qqqq"
    options = [*choices.split(), *sampling.split(), "--device", "cpu", "--json", "--max-context", 1200]
    done = run(
        "--ckpt",
        ckpt,
        "--messages",
        tmp_path / "m.json",
        "--thinking",
        "max",
        "--max-new-tokens",
        4,
        *options,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["reasoning"] is not None and len(result["ids"]) <= 4
    assert result["config"]["reference"] == ["mhc", "norm"] and result["config"]["weights"] == "nvfp4"
    assert "our wording" in done.stderr


def test_raw_prompt_from_a_file(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("ab", encoding="utf-8")
    done = run("--ckpt", ckpt, "--prompt-file", tmp_path / "p.txt", "--raw", "--json", "--max-new-tokens", 1)
    ids = json.loads(done.stdout)["prompt_ids"]
    assert len(ids) == 3 and ids[0] == 0


def test_dry_run_reads_no_weights(broken: Path) -> None:
    for shard in broken.glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({name: spoil(value) for name, value in tensors.items()}, shard)
    done = run("--ckpt", broken, "--dry-run", "--max-context", 100)
    assert done.returncode == 0, done.stderr
    for text in ("routed experts", "nvfp4", "KV cache", "fits", "gemm.linear", "reference"):
        assert text in done.stdout


def spoil(value: torch.Tensor) -> torch.Tensor:
    """NaN everywhere but in scalars, which are checked with the headers."""
    if value.dtype in (torch.float32, torch.bfloat16) and value.dim():
        return torch.full_like(value, torch.nan)
    return value


def test_interrupt_prints_what_there_is(ckpt: Path) -> None:
    command = [*DRIVER, "--ckpt", str(ckpt), "--prompt", "Hello", "--max-new-tokens", "900"]
    environment = ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)  # generation has begun
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert rest.endswith(b"\n") and b"(interrupt)" in errors and b"Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--ckpt", "/no/such/folder"], ("/no/such/folder", "no such folder")),
        (["--prompt", ""], ("prompt is empty",)),
        ([], ("prompt is empty",)),
        (["--prompt", "a long prompt", "--max-context", "4"], ("too long", "max_context = 4")),
        (["--prompt-file", "/no/such/file"], ("--prompt-file", "/no/such/file")),
        (["--messages", "/no/such/file"], ("--messages", "/no/such/file")),
        (["--temperature", "-1"], ("temperature", "-1")),
        (["--top-p", "1.5"], ("top_p", "1.5")),
        (["--max-new-tokens", "0"], ("--max-new-tokens", "found 0")),
        (["--prompt", "x", "--max-context", "5000"], ("max_context", "2048", "5000")),
        (["--prompt", "x", "--reference", "nowhere"], ("no room 'nowhere'",)),
        (["--thinking", "maybe"], ("--thinking",)),
    ],
)
def test_bad_options_are_refused_with_a_sentence(
    ckpt: Path, options: list[str], expected: tuple[str, ...]
) -> None:
    refused(run("--ckpt", ckpt, *options), *expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_refused(ckpt: Path) -> None:
    refused(run("--ckpt", ckpt, "--prompt", "x", "--device", "cuda"), "CUDA device", "none")


def test_bad_files_are_refused(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    refused(run("--ckpt", ckpt, "--prompt-file", tmp_path / "latin"), "latin", "UTF-8")
    (tmp_path / "m.json").write_text('{"messages": 3}', encoding="utf-8")
    refused(run("--ckpt", ckpt, "--messages", tmp_path / "m.json"), "m.json", "list of messages")
    (tmp_path / "m.json").write_text('[{"role": "judge", "content": "x"}]', encoding="utf-8")
    refused(run("--ckpt", ckpt, "--messages", tmp_path / "m.json"), "judge")


def test_token_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    small = write_with_tokenizer(tmp_path, "bf16", tiny_config_dict(vocab_size=128))
    refused(run("--ckpt", small, "--prompt", "\u00ff"), "token id", "expected 0 to 127")


def test_memory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsv4.loading.synthetic", "--preset", "pro", "--format", "deepseek"]
    subprocess.run([*command, "--headers-only", "--out", str(tmp_path / "pro")], check=True, cwd=ROOT)
    refused(run("--ckpt", tmp_path / "pro", "--prompt", "x"), "memory", "GB free")
