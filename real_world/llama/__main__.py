"""Llama 3 in miniature: compared with transformers', and trained by the lesson's train().

    python -m real_world.llama                                     all of it; trains for a minute
    python -m real_world.llama --prompt "A class"                  generate with the trained model
    python -m real_world.llama --prompt "A class" --weights DIR    with a Llama from Hugging Face
    python -m real_world.llama --prompt "Hello" --pretrained smollm2    with SmolLM2, a chat model

The article: "Every production PyTorch model, from a two-layer classifier to a 70-billion-parameter
language model, follows this exact same pattern." This is that language model: its sizes are
smaller, its tokens are bytes, and lm_head shares the weights of the embedding.
"""

import argparse
import dataclasses
import sys
import textwrap
import time
from pathlib import Path

import torch

import lesson_code as lesson
from real_world.common import (
    CheckFailed,
    bounded_int,
    check,
    make_parser,
    print_heading,
    run_cli,
    show,
)
from real_world.llama.chat import apply_chat_template
from real_world.llama.checkpoint import load_pretrained, read_sampling, save_pretrained
from real_world.llama.config import LLAMA_TINY
from real_world.llama.costs import compare_decoding, num_parameters, print_costs
from real_world.llama.data import byte_entropies, load_corpus, train_val_split
from real_world.llama.generate import (
    batch_generate,
    printable,
    stream_generate,
)
from real_world.llama.model import Llama
from real_world.llama.parity import check_parity
from real_world.llama.quantize import quantize_int8
from real_world.llama.sampling import SamplingParams
from real_world.llama.tokenizer import ByteTokenizer, load_tokenizer
from real_world.llama.train import TrainConfig, evaluate, train_llama
from real_world.training import as_tested, save_config, show_config, with_options

SAMPLING = SamplingParams(temperature=0.8)
DTYPES = {
    "auto": None,  # that of the files
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.bfloat16,  # before quantization, and of everything but linear layers
}


def prompt_text(text: str) -> str:
    """Argparse type: a text that is not empty, and can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("must be UTF-8") from None
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = "Llama 3 in miniature: parity, training, generation, costs."
    parser = make_parser("llama", about, SAMPLING, TrainConfig())  # their fields are options
    add = parser.add_argument
    text = "answer or continue this text with a trained model (can be repeated: one batch)"
    add("--prompt", metavar="TEXT", type=prompt_text, action="append", help=text)
    source = parser.add_mutually_exclusive_group()
    weights = "a model in Hugging Face's format (default: the one that this example trained)"
    source.add_argument("--weights", metavar="DIR", type=Path, help=weights)
    pretrained = "use SmolLM2-135M-Instruct (93 MB, downloaded once)"
    source.add_argument("--pretrained", choices=["smollm2"], help=pretrained)
    add("--no-chat", action="store_true", help="continue the prompt, without a chat template")
    stop = "end before this text (can be repeated)"
    add("--stop", metavar="TEXT", type=prompt_text, action="append", default=[], help=stop)
    dtype = "of the weights (default: as in the files); int8 is for --compile"
    add("--dtype", choices=DTYPES, default="auto", help=dtype)
    add(
        "--compile",
        action="store_true",
        help="compile the decoding (the first time: up to a minute)",
    )
    max_tokens = bounded_int(1, 2**17)
    add("--max-new-tokens", metavar="N", type=max_tokens, default=240, help="default: 240")
    args = parser.parse_args(argv)
    needs_prompt = {
        "--weights": args.weights,
        "--pretrained": args.pretrained,
        "--no-chat": args.no_chat,
        "--stop": args.stop,
        "--dtype": DTYPES[args.dtype],
        "--compile": args.compile,
    }
    for option, value in needs_prompt.items():
        if value and args.prompt is None:
            parser.error(f"{option} requires --prompt")
    for field in dataclasses.fields(TrainConfig):
        if args.prompt and field.name != "seed" and getattr(args, field.name) is not None:
            parser.error(f"argument --{field.name}: has no effect with --prompt".replace("_", "-"))
    args.config = with_options(TrainConfig(), args)
    if args.config.context_length > LLAMA_TINY.max_position_embeddings:
        parser.error(f"argument --context-length: at most {LLAMA_TINY.max_position_embeddings}")
    try:
        args.params = with_options(SAMPLING, args)
    except ValueError as error:
        parser.error(f"argument --{error}".replace("_", "-"))
    return args


def model_folder(args: argparse.Namespace) -> Path:
    """Return the folder of the model that --weights or --pretrained names, or the trained one."""
    if args.weights:
        return args.weights
    if args.pretrained:
        from real_world.llama.pretrained import download_smollm2

        return download_smollm2(args.output)
    folder = args.output / "llama"
    if not (folder / "config.json").exists():
        message = f"no trained model in {folder}; 'python -m real_world.llama' trains one"
        raise lesson.CheckpointError(message)
    return folder


def continue_prompts(args: argparse.Namespace) -> None:
    """Print a model's answer to each prompt, or without a chat template the text that continues it.

    One prompt is continued piece by piece; several are one batch.
    """
    folder = model_folder(args)
    model = load_pretrained(folder, args.device, DTYPES[args.dtype])
    if args.dtype == "int8":
        quantize_int8(model)
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    for stop in args.stop:
        tokens = tokenizer.encode(stop, add_special_tokens=False)
        if not all(tokenizer.decode([token, token]) for token in tokens):  # one may be a space
            raise CheckFailed(f"--stop {stop!r} has a special token, which is never in the text")
    starts, prompts = [], []  # what is printed before each text, and the tokens that it continues
    for prompt in args.prompt:
        chat = None
        if not args.no_chat:
            chat = apply_chat_template(folder, [{"role": "user", "content": prompt}])
        if chat is None:
            prompts.append(tokenizer.encode(prompt))
            starts.append(printable(prompt))
        else:
            prompts.append(tokenizer.encode(chat, add_special_tokens=False))
            starts.append("" if len(args.prompt) == 1 else f"{printable(prompt)}\n")
    for text, prompt in zip(args.prompt, prompts, strict=True):
        if not prompt:
            raise CheckFailed(f"--prompt {text!r} has no tokens")
    recommended = read_sampling(folder)
    if recommended:
        print(f"generation_config.json: {recommended}; options win", file=sys.stderr)
    try:
        params = with_options(dataclasses.replace(SAMPLING, **recommended), args)
    except (ValueError, TypeError) as error:
        raise lesson.CheckpointError(f"{folder / 'generation_config.json'}: {error}") from None
    options = (args.max_new_tokens, params, args.stop, args.compile)
    if len(prompts) == 1:
        print(starts[0], end="", flush=True)
        for piece in stream_generate(model, tokenizer, prompts[0], *options):
            print(piece, end="", flush=True)
        print()
        return
    for start, text in zip(
        starts, batch_generate(model, tokenizer, prompts, *options), strict=True
    ):
        print(f"{start}{text}\n")


def print_sample(title: str, model: Llama, max_new_tokens: int, params: SamplingParams) -> None:
    print(f"\n  {title}")
    tokenizer = ByteTokenizer()
    start = "The "
    pieces = stream_generate(model, tokenizer, tokenizer.encode(start), max_new_tokens, params)
    text = start + "".join(pieces)
    for paragraph in text.split("\n"):
        for line in textwrap.wrap(paragraph, 72) or [""]:
            print(f"    | {line}".rstrip())


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.prompt is not None:
        continue_prompts(args)
        return
    print_heading(
        "Llama 3 in miniature",
        "from a two-layer classifier to a 70-billion-parameter language model",
    )
    folder = args.output / "llama"
    config: TrainConfig = args.config
    if (folder / "config.json").exists() and not (folder / "train_config.json").exists():
        raise CheckFailed(f"{folder} has a model that was not trained here: use another --output")
    show("parameters", f"{num_parameters(LLAMA_TINY):,}")

    print("\n  Compared with transformers' LlamaForCausalLM, with the same random weights")
    check_parity()

    print("\n  Data: Python's language reference, in bytes")
    train_text, validation_text = train_val_split(load_corpus())
    unigram, bigram = byte_entropies(validation_text)
    show("training + validation", f"{len(train_text):,} + {len(validation_text):,}")
    show("unigram entropy of validation", f"{unigram:.4f} nats per byte")
    show("bigram entropy of validation", f"{bigram:.4f} nats per byte")

    torch.manual_seed(config.seed)
    model = Llama(LLAMA_TINY).to(args.device)
    print_sample("Generated before training", model, args.max_new_tokens, args.params)

    print(f"\n  Training on {args.device}")
    show_config(config)
    start = time.perf_counter()
    losses = train_llama(model, train_text, config, folder)
    seconds = time.perf_counter() - start
    rate = config.steps * config.batch_size * config.context_length / seconds
    show("trained in", f"{seconds:.0f} s, {rate:,.0f} bytes per second")
    save_config(folder, config)
    save_pretrained(model, folder)
    show("saved to", folder)
    validation_loss = evaluate(model, validation_text, config)
    value = f"{validation_loss:.4f} nats per byte, bigram {bigram:.4f}"
    passed = validation_loss < 0.75 * bigram
    check("validation loss", value, passed, as_tested(config, TrainConfig()))
    print_sample("Generated after training", model, args.max_new_tokens, args.params)

    print("\n  Decoding with and without KV cache")
    prompt = torch.tensor([ByteTokenizer().encode("The ")], device=args.device)  # (1, length)
    times = compare_decoding(model, prompt)

    print("\n  Costs at a context length of 8,192 (128 for this model)")
    print_costs(model)

    if not args.no_figure:
        from real_world.llama.plot import plot_llama

        path = args.output / "llama.png"
        plot_llama(path, losses, validation_loss, unigram, bigram, times)
        print()
        show("figure saved to", path)


if __name__ == "__main__":
    run_cli(main)
