"""The page: what is printed, and its options."""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

import lesson_code as lesson
from real_world import (
    distributed,
    heading,
    number,
    only_with,
    parser,
    run,
    show,
    shown,
    whole_number,
    writable,
    write_whole,
)
from real_world.llama.generation import generate
from real_world.llama.model import Llama
from real_world.llama.proofs import compare_cache, compare_sizes, compare_with_transformers, draw
from real_world.llama.sizes import MINIATURE, parameter_count
from real_world.llama.training import (
    BATCH,
    CONTEXT,
    STEPS,
    encoded,
    entropies,
    judge,
    learn,
    library_text,
    parts,
    train_llama,
)
from real_world.llama.weights import refuse

if TYPE_CHECKING:
    import tokenizers


def printable(text: str) -> str:
    """Return `text` with a dot for what would steer a terminal."""
    return "".join(each if each in "\n\t" or each.isprintable() else "." for each in text)


def write_on(
    model: Llama, tokenizer: tokenizers.Tokenizer | None, chosen: argparse.Namespace
) -> None:
    """Print the prompt and what `model` makes of it, as it comes; without a tokenizer, in bytes."""
    prompt = torch.tensor([tokenizer.encode(chosen.prompt).ids]) if tokenizer else None
    prompt = encoded(chosen.prompt) if prompt is None else prompt
    ends = model.config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    sampling = {name: getattr(chosen, name) for name in ("temperature", "top_k", "top_p", "seed")}
    device = model.lm_head.weight.device
    if prompt.numel() == 0 or prompt.max() >= model.config.vocab_size:
        raise lesson.CheckFailed("the prompt has no token, or one that the network does not know")
    tokens = prompt[0].tolist()
    text = said = chosen.prompt if tokenizer is None else tokenizer.decode(tokens)
    print(printable(said), end="", flush=True)
    try:
        for token in generate(model, prompt.to(device), chosen.tokens, **sampling):
            tokens.append(token.item())
            if tokens[-1] in ends:
                break
            text = tokenizer.decode(tokens) if tokenizer else bytes(tokens).decode(errors="replace")
            if not text.endswith("\ufffd"):  # the rest of a character is still to come
                print(printable(text[len(said) :]), end="", flush=True)
                said = text
    finally:
        print(printable(text[len(said) :]))


def of_hugging_face(
    folder: Path, device: torch.device
) -> tuple[Llama, tokenizers.Tokenizer | None]:
    """Return the network and the tokenizer of a folder; None where its tokens are bytes."""
    model = Llama.from_pretrained(folder, device)
    path = folder / "tokenizer.json"
    if path.exists():
        from tokenizers import Tokenizer

        try:
            return model, Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises no narrower one
            refuse(path, f"is no tokenizer that can be read ({error})")
    if model.config.vocab_size != 256:
        refuse(folder, "has no tokenizer.json, and its tokens are not bytes")
    return model, None


def sample(model: Llama, seed: int) -> None:
    """Print what `model` writes after "The "."""
    prompt = encoded("The ").to(model.lm_head.weight.device)
    tokens = generate(model, prompt, 240, temperature=0.8, seed=seed)
    text = bytes(token.item() for token in tokens).decode("ascii", errors="replace")
    text = printable(f"The {text}").translate({0xFFFD: ".", ord("\t"): "."})
    for line in text.split("\n"):
        for start in range(0, max(1, len(line)), 72):
            print(f"    | {line[start : start + 72]}")


def network(
    chosen: argparse.Namespace, group: distributed.Group | None = None
) -> tuple[Llama, list[float]]:
    """Return the network that an earlier run left, or train it and leave it; and its losses.

    Raises CheckpointError where there is none and none is to be trained.
    """
    folder = chosen.output / ("llama-divided" if group else "llama")
    kept, steps = (folder / "config.json").exists(), chosen.steps or STEPS
    if group or chosen.train or (chosen.train is None and not kept):
        writable(folder)
        start = time.perf_counter()
        model, losses = learn(steps, chosen.seed, group.device if group else chosen.device, group)
        seconds = time.perf_counter() - start
        if group is None or group.rank == 0:
            model.save_pretrained(folder)
            write_whole(folder / "losses.json", lambda path: path.write_text(json.dumps(losses)))
        rate = f"{steps * BATCH * CONTEXT / seconds:,.0f} bytes a second"
        show("trained in", f"{seconds:.0f} s, {rate}")
        show("saved, as Hugging Face does", f"{shown(folder)}/")
        return model, losses
    if not kept:
        refuse(shown(folder), "holds no network; without --no-train one is trained there")
    if chosen.steps:
        refuse(shown(folder), "holds a network already; with --steps goes --train, for another")
    show("kept; --train trains another", f"{shown(folder)}/")
    model = Llama.from_pretrained(folder, chosen.device, torch.float32)
    if model.config.vocab_size != 256:
        refuse(shown(folder), "holds a network whose tokens are not bytes; --train trains another")
    path = folder / "losses.json"
    try:
        losses = msgspec.json.decode(path.read_bytes(), type=list[float])
    except FileNotFoundError:  # it came from elsewhere
        losses = []
    except msgspec.MsgspecError:
        refuse(shown(path), "is no list of losses; delete it")
    return model, losses


QUOTE = "from a two-layer classifier to a 70-billion-parameter language model"


def introduce(title: str) -> None:
    """Print the heading, and how large the network is."""
    heading(title, QUOTE)
    count = f"{parameter_count(MINIATURE):,} parameters, {MINIATURE.num_hidden_layers} layers"
    show("this one", count)


def page(chosen: argparse.Namespace) -> None:
    """Show that the network is Llama's, train it, and measure what it does and costs."""
    introduce("Llama 3 in miniature")
    compare_with_transformers()
    text = library_text()
    alone, after_one = entropies(text)
    print("\n  The text, Python's language reference, and what is known without a network:")
    show("bytes, a tenth of them held out", f"{len(text):,}")
    show("entropy of a byte", f"{alone:.4f} nats, after the one before {after_one:.4f}")
    print("\n  Before training it writes:")
    torch.manual_seed(chosen.seed)
    sample(Llama(MINIATURE).to(chosen.device), chosen.seed)
    model, losses = network(chosen)
    judge(model, chosen.steps or STEPS)
    print("\n  And then:")
    sample(model, chosen.seed)
    times = compare_cache(model)
    compare_sizes(model)
    if not chosen.no_figure:
        path = chosen.output / "llama.png"
        draw(path, text, losses, times)
        print()
        show("drawn", shown(path))


FIRST = 10  # later, Adam makes differences of rounding visible, more on some processors


def divided_page(chosen: argparse.Namespace) -> None:
    """Train on all the processes of torchrun, each with a part of every weight and every batch."""
    torch.set_num_threads(1)  # the processes share the cores
    steps = chosen.steps or STEPS
    facts = {"seed": chosen.seed, "steps": steps}
    with distributed.together(facts, "auto", chosen.device, seconds=60) as group:
        introduce(f"Llama 3 in miniature, divided over {group.world}")
        model, losses = network(chosen, group)
        if group.rank == 0:
            judge(model, steps)
            torch.manual_seed(chosen.seed)
            alone, (known, _) = Llama(MINIATURE).to(group.device), parts(library_text())
            one = train_llama(alone, known, steps, chosen.seed, first=FIRST)
            apart = max(abs(a - b) for a, b in zip(losses, one, strict=False))
            claim = f"first {len(one)} losses, one process"
            lesson.check(claim, f"differ by {apart:.0e}", apart <= 1e-5)


def work(chosen: argparse.Namespace) -> None:
    """Do what was chosen: all of the page, or what goes on from a prompt."""
    if chosen.weights:
        write_on(*of_hugging_face(chosen.weights, chosen.device), chosen)
    elif chosen.prompt is not None:
        write_on(network(chosen)[0], None, chosen)
    else:
        (divided_page if "RANK" in os.environ else page)(chosen)


def some_text(text: str) -> str:
    """Convert an option's text; raise ArgumentTypeError where there is none."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; a prompt has one character at least")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is not UTF-8") from None
    return text


def heat(text: str) -> float:
    """Convert a temperature: 0, or what logits can be divided by."""
    value = number(text, least=0, most=100)
    return value if value == 0 else max(value, 0.001)


def options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2, after one sentence, where one is wrong."""
    about = "Llama 3 in miniature, trained by the lesson's train(). Without --prompt, all of it."
    made = parser("llama", about, "--device", "--seed", "--output", "--no-figure")
    add = made.add_argument
    positive = functools.partial(whole_number, least=1)
    many = functools.partial(whole_number, least=1, most=1_000_000)
    steps = functools.partial(whole_number, least=20)
    add("--prompt", metavar="TEXT", type=some_text, help="go on from this text, and nothing else")
    add("--tokens", metavar="N", type=many, help="how many to write (300)")
    add("--temperature", metavar="T", type=heat, help="0 always takes the likeliest (0.8)")
    add("--top-k", metavar="K", type=positive, help="draw from the K likeliest (all)")
    share = functools.partial(number, least=0, most=1)
    add("--top-p", metavar="P", type=share, help="draw from the likeliest that make up P (1)")
    add("--weights", metavar="DIR", type=Path, help="go on with a Llama of Hugging Face's instead")
    add("--steps", metavar="N", type=steps, help=f"of training ({STEPS})")
    kept = {"action": argparse.BooleanOptionalAction, "default": None}
    add("--train", help="anew, or never (if there is no network yet)", **kept)
    chosen = made.parse_args(argv)
    only_with(made, chosen, "prompt", tokens=300, temperature=0.8, top_k=None, top_p=1.0)
    only_with(made, chosen, "prompt", weights=None)
    if "RANK" in os.environ:
        alone = {"--prompt": chosen.prompt is not None, "--no-train": chosen.train is False}
        for name in (name for name, given in alone.items() if given):
            made.error(f"argument {name}: torchrun is for training")
        if int(os.environ["WORLD_SIZE"]) > BATCH:
            made.error(f"torchrun: {BATCH} processes at the most, for a batch has {BATCH} rows")
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Run the page; return its exit status."""
    chosen = options(argv)
    return run("llama", lambda: work(chosen))
