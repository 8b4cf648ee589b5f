"""Load a DeepSeek-V4 checkpoint, continue one prompt, print the text and a timing line."""

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import dsv4
from dsv4.chat import PromptTexts, encode_chat, parse_completion
from dsv4.config import ModelConfig
from dsv4.device import DEVICES, resolve_device
from dsv4.engine import default_dtype
from dsv4.loading.checkpoint import Checkpoint
from dsv4.numerics import ACTIVATIONS, DTYPES, NUMERICS, WEIGHTS, Numerics
from dsv4.ops.dispatch import expand_rooms, use_reference
from dsv4.plan import CACHE_DEQUANTISED_MB, format_plan, make_plan
from dsv4.progress import progress_bar
from dsv4.prompt_files import read_messages, read_text
from dsv4.tokenizer import BOS, Tokenizer

TINY = Path(__file__).resolve().parent / "models" / "tiny"
DEMO_PROMPT = "ROMEO:"
EXIT_OK, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 2, 130


def main(args: argparse.Namespace) -> int:
    sampling = dsv4.Sampling(
        args.temperature, args.top_k, args.top_p, args.min_p, args.seed, tuple(args.stop)
    )
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: expected at least 1, found {args.max_new_tokens}")
    if args.screen_head and args.temperature:
        raise ValueError(f"--screen-head: expected --temperature 0, found {args.temperature}")
    if args.dry_run:
        print(dry_run(args))
        return EXIT_OK
    config = ModelConfig.from_checkpoint(args.ckpt)
    if config.synthetic:
        print("note: this checkpoint is synthetic; its weights are random, expect noise", file=sys.stderr)
    prompt_ids = Tokenizer.from_checkpoint(args.ckpt).encode(read_prompt(args))
    engine = load(args, args.max_context or len(prompt_ids) + args.max_new_tokens)
    with progress_bar("prefill", "tok") as progress:
        generation = engine.generate(prompt_ids, args.max_new_tokens, sampling, progress=progress)
        text = stream(generation, show=not args.json)
    if args.json:
        print(json.dumps(result(args, engine, generation, prompt_ids, text), ensure_ascii=False))
    print(summary(generation), file=sys.stderr)
    return EXIT_INTERRUPTED if generation.finish == "interrupt" else EXIT_OK


def read_prompt(args: argparse.Namespace) -> str:
    """The text to encode: the chat format around the question, or with --raw BOS and the text itself."""
    tools, messages = None, []
    if args.messages is not None:
        if args.raw or args.system is not None:
            raise ValueError("--messages: expected alone, found together with --raw or --system")
        messages, tools = read_messages(args.messages)
    else:
        text, raw = args.prompt, args.raw
        if args.prompt_file is not None:
            text = read_text(args.prompt_file, "--prompt-file")
        if text is None and args.ckpt == str(TINY):  # the demonstration: that model knows plain text only
            text, raw = DEMO_PROMPT, True
        if not text:
            raise ValueError("the prompt is empty: expected text in --prompt or a file, found none")
        if raw:
            return text if text.startswith(BOS) else BOS + text
        if args.system is not None:
            messages.append({"role": "system", "content": args.system})
        messages.append({"role": "user", "content": text})
    texts = PromptTexts.from_checkpoint(args.ckpt)
    if not texts.trained and (tools or args.thinking == "max"):
        print(
            f"note: {args.ckpt} has no encoding/encoding_dsv4.py; tools and --thinking max use our wording, "
            "not the one the model was trained with",
            file=sys.stderr,
        )
    return encode_chat(messages, thinking=args.thinking, tools=tools, texts=texts)


def load(args: argparse.Namespace, max_context: int) -> dsv4.Engine:
    names = ("device", "weights", "activations", "numerics", "dtype", "reference", "screen_head")
    choices = {name: getattr(args, name) for name in names}
    with progress_bar("load", "B") as progress:
        return dsv4.load(args.ckpt, max_context=max_context, progress=progress, **choices)


def dry_run(args: argparse.Namespace) -> str:
    """The memory plan and who serves each operation, without reading weights."""
    device = resolve_device(args.device)
    numerics = Numerics(args.weights, args.activations, args.numerics, args.dtype or default_dtype(device))
    expand_rooms(args.reference)
    checkpoint = Checkpoint.open(args.ckpt, ModelConfig.from_checkpoint(args.ckpt))
    max_context = args.max_context or dsv4.engine.DEFAULT_MAX_CONTEXT
    plan = make_plan(checkpoint, numerics, device, max_context, CACHE_DEQUANTISED_MB, args.screen_head)
    with use_reference(*args.reference):
        return format_plan(plan)


def stream(generation: dsv4.Generation, *, show: bool) -> str:
    """Run the generation to its end or to an interrupt; print text as it becomes certain."""
    pieces = []
    try:
        for _ in generation:
            pieces.append(generation.take_text())
            if show:
                print(pieces[-1], end="", flush=True)
    except KeyboardInterrupt:
        generation.close()
    pieces.append(generation.take_text())
    if show:
        print(pieces[-1], flush=True)
    return "".join(pieces)


def result(
    args: argparse.Namespace,
    engine: dsv4.Engine,
    generation: dsv4.Generation,
    prompt_ids: list[int],
    text: str,
) -> dict[str, Any]:
    """What --json prints."""
    reasoning, tool_calls = None, []
    if not args.raw:
        completion = parse_completion(text, thinking=args.thinking)
        text, reasoning = completion.content, completion.reasoning
        tool_calls = [{"name": call.name, "arguments": call.arguments} for call in completion.tool_calls]
    return {
        "text": text,
        "reasoning": reasoning,
        "tool_calls": tool_calls,
        "prompt_ids": prompt_ids,
        "ids": generation.ids,
        "finish": generation.finish,
        "timings": generation.timings.as_dict(),
        "config": engine.describe(),
    }


def summary(generation: dsv4.Generation) -> str:
    t = generation.timings
    return (
        f"{t.prompt_tokens} prompt + {t.new_tokens} new tokens ({generation.finish}) | first token "
        f"{t.ttft_s:.2f} s | prefill {t.prefill_tps:.1f} tok/s | decode {t.decode_tps:.1f} tok/s"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", default=str(TINY), metavar="DIR", help="checkpoint folder (default: tiny)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompt-file", metavar="FILE", help="UTF-8 text")
    source.add_argument("--messages", metavar="FILE", help="JSON: messages, or {messages, tools}")
    parser.add_argument("--system", metavar="TEXT")
    parser.add_argument("--thinking", choices=("off", "on", "max"), default="off")
    parser.add_argument("--raw", action="store_true", help="no chat format: BOS and the text itself")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="end before any of these")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 = greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--max-context", type=int, metavar="N", help="default: prompt + new tokens")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--weights", choices=WEIGHTS, default="stored")
    parser.add_argument("--activations", choices=ACTIVATIONS, default="bf16")
    parser.add_argument("--numerics", choices=NUMERICS, default="trained")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--reference", default=[], type=lambda s: s.split(","), metavar="ROOMS")
    parser.add_argument("--screen-head", action="store_true", help="greedy, from half of a bf16 head")
    parser.add_argument("--dry-run", action="store_true", help="print the memory plan and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    return parser.parse_args(argv)


if __name__ == "__main__":
    logging.basicConfig(format="note: %(message)s")
    logging.getLogger("dsv4").setLevel(logging.INFO)
    try:
        sys.exit(main(parse_args()))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of stdout went away, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_OK)
