"""The model that ships: how it is trained from the corpus, judged, and described.

All that decides the outcome stands here, so that one command makes the model again and says how
near it came to the one that ships.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore import weights
from gptcore.corpus.shards import texts
from gptcore.device import Placement
from gptcore.records import FinishReason, Request
from gptcore.tokenizer import load_tokenizer
from gptcore.train.checkpoint import steps as checkpoints
from gptcore.train.events import Observer, Validated, read_log
from gptcore.train.order import TOKENIZER, Order, job
from gptcore.train.settings import Training
from gptcore.train.trainer import Outcome, train

if TYPE_CHECKING:
    from gptcore.catalogue import Catalogue
    from gptcore.model import GPT
    from gptcore.tokenizer import Tokenizer

TITLE = "Tales 6M"
PASSES = {1.0: 5, 1 / 4: 6, 1 / 16: 10}
"""How often a training reads its share of the corpus: the less there is, the more often."""
ORDER = Order(
    tokenizer="bpe",
    vocabulary=4096,
    layers=6,
    width=256,
    heads=4,
    context=512,
    prompt="Once upon a time",
    settings=Training(
        batch=8,
        optimizer="muon",
        learning_rate=4e-3,
        least_rate_ratio=0.02,
        warmup=100,
        dropout=0.1,
        validate_every=200,
        validation_windows=120,
        sample_tokens=80,
    ),
)
SAMPLE_TOKENS = 160
TAMED: dict[str, dict[str, float]] = {
    "temperature 0.5": {"temperature": 0.5},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1 and min-p 0.1": {"temperature": 1.0, "min_p": 0.1},
}
"""Other ways to draw, of which the teacher reads as many samples; no card shows these."""
HELD_OUT = 60
"""Texts of the test part that the teacher reads for comparison."""
JUDGED = "judged.json"
OPENINGS = (
    "Once upon a time",
    "The old lighthouse keeper",
    "Mira had never seen snow",
    "On the last day of summer",
    "A small blue door",
    "Bees make honey",
    "The baker opened his shop",
    "Nobody in the village knew",
    "Two brothers shared one boat",
    "It rained for three days",
    "The map was wrong",
    "Under the bridge lived",
    "Grandmother kept a secret",
    "The wind carried a letter",
    "Every morning the fox",
    "A tree grows",
    "The clock in the tower stopped",
    "Tomas wanted to be brave",
    "The river was frozen",
    "When the music began",
)
"""Of the samples that stand in the card, none of them chosen."""


@dataclass(frozen=True, slots=True)
class Learned:
    """One training, as the card tells of it."""

    share: float
    train_tokens: int
    steps: int
    seconds: float
    best_step: int
    validation_bits_per_byte: float
    curve: tuple[tuple[int, float], ...]
    """(step, validation bits per byte)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the model wrote behind an opening."""

    opening: str
    seed: int
    text: str
    ended: bool


@dataclass(frozen=True, slots=True)
class Judged:
    """The shipped model in numbers."""

    parameters: int
    stored_bytes: int
    corpus_texts: int
    learned: tuple[Learned, ...]
    """The whole corpus first."""
    test_bits_per_byte: float
    test_perplexity: float
    test_tokens: int
    samples: tuple[Sample, ...]
    teacher: str | None
    """Who read samples and held-out texts, None where it is not installed."""
    samples_logprob: float | None
    """The teacher's mean log-likelihood of a token of the samples, in nats."""
    held_out_logprob: float | None
    """Likewise of texts of the test part."""
    tamed: tuple[tuple[str, float], ...] = ()
    """(one of ``TAMED``, the teacher's mean log-likelihood of a token of samples drawn so)."""


def order(corpus: str, share: float, tokenizer: str, train_tokens: int) -> Order:
    """Return the training for a share of the corpus.

    Args:
        corpus: its folder, empty for the one that ships.
        share: of its training texts.
        tokenizer: ``bpe`` for a new one, or the folder of one.
        train_tokens: of the share.
    """
    settings = ORDER.settings
    steps = round(PASSES[share] * train_tokens / (settings.batch * ORDER.context))
    warmup = min(settings.warmup, max(1, steps // 5))
    every = min(settings.validate_every, max(1, steps // 8))
    settings = settings.model_copy(
        update={"steps": max(1, steps), "warmup": warmup, "validate_every": every}
    )
    return ORDER.model_copy(
        update={"corpus": corpus, "share": share, "tokenizer": tokenizer, "settings": settings}
    )


def learn(
    corpus: str,
    work: Path,
    share: float,
    *,
    observe: Observer = lambda event: None,
    breathe: Callable[[], None] = lambda: None,
) -> tuple[Learned, Path]:
    """Train on a share of the corpus, or go on where that was stopped.

    All shares use the tokenizer of the whole, so the whole comes first.

    Args:
        corpus: as ``order``.
        work: keeps one folder a share.
        share: 1, a quarter or a sixteenth.
        observe: told every event.
        breathe: called before every step.

    Returns:
        What was learned, and the model's folder.

    Raises:
        InvalidInput, StoreError, DoesNotFit, Cancelled: as ``train``.
    """
    folder = _folder(work, share)
    tokenizer = "bpe" if share == 1 else str(_folder(work, 1) / TOKENIZER)
    # A first look at the tokens says how many steps there are.
    counted = job(order(corpus, share, tokenizer, 0), folder / "counted")
    shutil.rmtree(folder / "counted")
    wanted = order(corpus, share, tokenizer, counted.data.train.tokens)
    resume = bool(checkpoints(folder))
    what = job(wanted, folder, resume=resume)
    done = train(what, folder, resume=resume, observe=observe, breathe=breathe)
    return _learned(share, what.data.train.tokens, done, folder), done.model


def _folder(work: Path, share: float) -> Path:
    return work / ("whole" if share == 1 else f"share-{share:g}")


def _learned(share: float, train_tokens: int, done: Outcome, folder: Path) -> Learned:
    curve = tuple(
        (event.step, round(event.bits_per_byte, 4))
        for event in read_log(folder)
        if isinstance(event, Validated)
    )
    return Learned(
        share=share,
        train_tokens=train_tokens,
        steps=done.steps,
        seconds=done.seconds,
        best_step=done.best_step,
        validation_bits_per_byte=done.best_bits_per_byte,
        curve=curve,
    )


def judge(
    model: Path,
    corpus: Path,
    learned: Sequence[Learned],
    catalogue: Catalogue,
    teacher: str,
    *,
    breathe: Callable[[], None] = lambda: None,
) -> Judged:
    """Return what the card says of a model.

    Args:
        model: its folder.
        corpus: whose test part it is held against.
        learned: the whole corpus first.
        catalogue: has the teacher, or not.
        teacher: reads the samples, and held-out texts beside them.
        breathe: called between two texts.
    """
    built, tokenizer = _built(weights.describe(model))
    held_out = [one.text for one in texts(corpus, "test")]
    nats, tokens = cost_of_stream(built, tokenizer, held_out)
    written = []
    for sample in samples(built, tokenizer):
        breathe()
        written.append(sample)
    entry = {one.name: one for one in catalogue.entries()}.get(teacher)
    reading = entry is not None and entry.kind == "installed" and not entry.problem
    of_samples = of_held_out = None
    tamed: list[tuple[str, float]] = []
    if reading:
        reader = _built(catalogue.checkpoint(teacher))
        for name, sampling in TAMED.items():
            drawn = (one.text for one in samples(built, tokenizer, **sampling))
            tamed.append((name, mean_logprob(*reader, drawn, breathe)))
        of_samples = mean_logprob(*reader, (one.text for one in written), breathe)
        of_held_out = mean_logprob(*reader, held_out[:HELD_OUT], breathe)
    return Judged(
        parameters=built.spec.parameters,
        stored_bytes=sum(file.stat().st_size for file in model.glob("*.safetensors")),
        corpus_texts=sum(1 for _ in texts(corpus)),
        learned=tuple(learned),
        test_bits_per_byte=nats / math.log(2) / sum(len(one.encode()) for one in held_out),
        test_perplexity=math.exp(nats / tokens),
        test_tokens=tokens,
        samples=tuple(written),
        teacher=teacher if reading else None,
        samples_logprob=of_samples,
        held_out_logprob=of_held_out,
        tamed=tuple(tamed),
    )


def _built(checkpoint: weights.Checkpoint) -> tuple[GPT, Tokenizer]:
    model = weights.build(checkpoint, Placement(precision="fp32"))
    return model, load_tokenizer(checkpoint.directory)


def cost_of_stream(model: GPT, tokenizer: Tokenizer, held_out: Iterable[str]) -> tuple[float, int]:
    """Return nats and tokens of texts one behind another, as the trainer reads them.

    Windows of the whole context side by side; the first token of a window is not scored, the end
    of a text is.
    """
    import torch
    from torch.nn import functional as F

    end = min(tokenizer.eos_ids)
    stream = [id for one in held_out for id in (*tokenizer.encode(one), end)]
    nats, tokens = 0.0, 0
    with torch.inference_mode():
        for begin in range(0, len(stream) - 1, model.spec.context):
            ids = torch.tensor(stream[begin : begin + model.spec.context + 1])
            logits = model(ids[None, :-1])[0].float()  # (T, V)
            nats += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
            tokens += len(ids) - 1
    return nats, tokens


def samples(
    model: GPT, tokenizer: Tokenizer, *, temperature: float = 1.0, min_p: float = 0.0
) -> Iterator[Sample]:
    """Yield a text for each opening, as the program's engine writes it."""
    from gptcore.engine import Engine

    engine = Engine(model, tokenizer)
    for seed, opening in enumerate(OPENINGS, start=1):
        request = Request(
            prompt=opening,
            temperature=temperature,
            min_p=min_p,
            max_new_tokens=SAMPLE_TOKENS,
            seed=seed,
        )
        generation = engine.start(request)
        text = opening + "".join(token.text for token in generation)
        yield Sample(opening, seed, text, generation.finish_reason is FinishReason.EOS)


def mean_logprob(
    model: GPT, tokenizer: Tokenizer, read: Iterable[str], breathe: Callable[[], None]
) -> float:
    """Return a model's mean log-likelihood of a token over some texts, each read alone, in nats.

    The first token of a text is not scored.
    """
    import torch
    from torch.nn import functional as F

    total, tokens = 0.0, 0
    for one in read:
        breathe()
        ids = torch.tensor(tokenizer.encode(one)[: model.spec.context])
        with torch.inference_mode():
            logits = model(ids[None, :-1])[0].float()
        total -= float(F.cross_entropy(logits, ids[1:], reduction="sum"))
        tokens += len(ids) - 1
    return total / tokens


def read_judged(folder: Path) -> Mapping[str, Any] | None:
    """Return the numbers of a model made here, as JSON, or None where it has none."""
    try:
        found: Mapping[str, Any] = json.loads((folder / JUDGED).read_text())
    except (OSError, ValueError):
        return None
    return found


def publish(model: Path, target: Path, judged: Judged) -> None:
    """Put a model with its card into a folder, in place of what is there.

    Args:
        model: the folder that the trainer wrote.
        target: of the catalogue.
        judged: for the card.
    """
    work = target.with_name(f".writing-{target.name}")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(model, work)
    (work / JUDGED).write_text(json.dumps(asdict(judged), indent=1, ensure_ascii=False) + "\n")
    (work / "README.md").write_text(card(judged))
    about = {
        "title": TITLE,
        "licence": "Apache-2.0",
        "provenance": "trained by this program from data/corpus (python -m gptcore corpus learn)",
        "note": "It knows short tales and explanations in plain English, and nothing else; its "
        "weights were never quantized.",
    }
    (work / "card.json").write_text(json.dumps(about, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    work.rename(target)


def card(judged: Judged) -> str:
    """Return the model's card, Markdown."""
    whole = judged.learned[0]
    settings = ORDER.settings
    tokens_seen = whole.steps * settings.batch * ORDER.context
    lines = [
        "---",
        "license: apache-2.0",
        "language: en",
        "---",
        f"# {TITLE}",
        "",
        f"A GPT-2-shaped model of {judged.parameters:,} parameters ({ORDER.layers} layers, width "
        f"{ORDER.width}, {ORDER.heads} heads, context {ORDER.context}, {ORDER.vocabulary:,} "
        "tokens of byte-level BPE), trained in fp32 and stored in fp32. It writes short tales, "
        "scenes and explanations in plain English.",
        "",
        "## Data",
        "",
        f"{judged.corpus_texts:,} texts that SmolLM2-135M-Instruct wrote "
        f"([how](../../corpus/README.md)); {whole.train_tokens:,} tokens to learn from. The split "
        "follows from each text's hash.",
        "",
        "## Recipe",
        "",
        f"{whole.steps:,} steps of {settings.batch} × {ORDER.context} tokens "
        f"({tokens_seen:,} in all, {tokens_seen / whole.train_tokens:.1f} passes); Muon for the "
        f"blocks' matrices, AdamW ({settings.beta1}, {settings.beta2}) for all else; rate "
        f"{settings.learning_rate:g} after {settings.warmup} steps, falling to "
        f"{settings.least_rate_ratio:g} of it by a cosine, weight decay "
        f"{settings.weight_decay:g}, dropout {settings.dropout:g}, clipping at {settings.clip:g}, "
        f"seed {settings.seed}; {whole.seconds / 60:.0f} minutes on two CPU cores. "
        "`python -m gptcore corpus learn` makes it again.",
        "",
        "## How good it is",
        "",
        f"On the test part of the corpus, {judged.test_tokens:,} tokens that it never saw: "
        f"**{judged.test_bits_per_byte:.3f} bits per byte**, perplexity "
        f"{judged.test_perplexity:.2f} a token.",
        "",
        *_likelihood(judged),
        *_shares(judged),
        "The curve, validation bits per byte:",
        "",
        "| step | bits per byte |",
    ]
    lines += ["|---:|---:|", *(f"| {step:,} | {bits:.3f} |" for step, bits in whole.curve)]
    lines += [
        "",
        "## Limits",
        "",
        "It has read no book and no news: what it says of the world may be false, names and plots "
        "come again and again, and it loses the thread after some sentences. It knows no chat, no "
        "other language and no code. What its teacher got wrong, it learned.",
        "",
        f"## {len(judged.samples)} samples",
        "",
        f"Temperature 1, at most {SAMPLE_TOKENS} new tokens, seeds 1 to {len(judged.samples)}, "
        "none left out.",
    ]
    for sample in judged.samples:
        text = " ".join(sample.text.split())
        lines += ["", f"{sample.seed}. {text}{'' if sample.ended else ' …'}"]
    return "\n".join(lines) + "\n"


def _shares(judged: Judged) -> list[str]:
    if len(judged.learned) == 1:
        return []
    lines = [
        "How quality grows with data, the same shape on parts of the corpus:",
        "",
        "| share | training tokens | steps | passes | best validation, bits per byte |",
        "|---|---:|---:|---:|---:|",
    ]
    for one in sorted(judged.learned, key=lambda one: one.share):
        passes = one.steps * ORDER.settings.batch * ORDER.context / one.train_tokens
        lines.append(
            f"| {_fraction(one.share)} | {one.train_tokens:,} | {one.steps:,} | {passes:.1f} | "
            f"{one.validation_bits_per_byte:.3f} (step {one.best_step:,}) |"
        )
    return [*lines, ""]


def _likelihood(judged: Judged) -> list[str]:
    if judged.samples_logprob is None or judged.held_out_logprob is None:
        return []
    ratio = judged.samples_logprob / judged.held_out_logprob
    tamed = ", ".join(
        f"{name} {nats:.2f} (× {nats / judged.held_out_logprob:.2f})" for name, nats in judged.tamed
    )
    return [
        f"{judged.teacher} gives a token of the samples below {judged.samples_logprob:.2f} nats "
        f"on average, and a token of held-out texts {judged.held_out_logprob:.2f} "
        f"(× {ratio:.2f})." + (f" Drawn otherwise: {tamed}." if tamed else ""),
        "",
    ]


def _fraction(share: float) -> str:
    return "all" if share == 1 else f"1/{round(1 / share)}"
