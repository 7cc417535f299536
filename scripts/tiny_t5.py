"""A T5 of half a million parameters that reads the captions of the text demo.

Its tokens are words. Each word learns to name the object that it speaks of and where this object
stands in the image, which binds attributes and resolves relations. A released T5 has read far more.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from captions import SINGLE_PLACES, Caption, CaptionMaker
from grammar import grammar_words
from shapes import COLOURS, SHAPES, SIZES
from torch.nn import functional as F

STEPS, BATCH, LR = 1000, 64, 3e-3
WARM_UP = 0.1  # of the steps
SORTED = 16  # batches of captions that are sorted by length together, so that little is padding
PAIRS = 0.8  # captions of two objects: the single ones are learnt in no time
# Each head of attention prefers one distance from the start, or it learns slowly what belongs
# together: the words around a word, and None for two heads that are free.
DISTANCES, PREFERENCE = (-1, 1, -2, 2, -3, 3, None, None), 4.0
UNKNOWN = 0.05  # chance that an unknown word precedes a word
SPECIAL = ("<pad>", "</s>", "<unk>")
# What a word names: the facts of the object that it speaks of.
FACTS = [tuple(COLOURS), SHAPES, (None, *SIZES), SINGLE_PLACES]
WIDTHS = [len(values) for values in FACTS]
IGNORED = -100  # the target of a word that speaks of no object


def write_t5(folder: Path, maker: CaptionMaker) -> None:
    """Train the encoder and write it as a folder of transformers, with a vocabulary of words.

    It takes the place of what is there.
    """
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    tokenizer = word_tokenizer(grammar_words())
    shape: dict[str, Any] = {
        "d_model": 128,
        "d_kv": 16,
        "num_heads": len(DISTANCES),
        "num_layers": 3,
        "d_ff": 256,
    }
    config = T5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **shape)
    model = T5EncoderModel(config)
    prefer_distances(model)
    train_t5(model, tokenizer, maker)
    temporary = folder.with_name("t5.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


@torch.no_grad()
def prefer_distances(model: Any) -> None:  # noqa: ANN401
    """Start the encoder's attention near each word: a head for each of DISTANCES."""
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    torch.nn.init.normal_(bias, std=0.3)
    half = len(bias) // 2  # T5 numbers the distances back first: 0, -1, -2, then those ahead
    for head, distance in enumerate(DISTANCES):
        if distance is not None:
            bias[abs(distance) + (half if distance > 0 else 0), head] += PREFERENCE


def word_tokenizer(words: list[str]) -> Any:  # noqa: ANN401 - a tokenizer of transformers
    """A tokenizer of words and punctuation marks; any other word becomes <unk>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def word_facts(caption: Caption) -> list[list[int]]:
    """The facts that each word and punctuation mark learns to name, as indices into FACTS."""
    facts = [
        [values.index(value) for values, value in zip(FACTS, thing, strict=True)]
        for thing in caption.things
    ]
    return [facts[i - 1] if i else [IGNORED] * len(FACTS) for i in caption.owners]


def train_t5(model: Any, tokenizer: Any, maker: CaptionMaker) -> None:  # noqa: ANN401
    """Train the encoder on new captions at every step."""
    head = torch.nn.Linear(model.config.d_model, sum(WIDTHS))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=STEPS, pct_start=WARM_UP
    )
    vocabulary, stream = tokenizer.get_vocab(), batches(maker)
    print(f"\ntraining a tiny T5 for {STEPS} steps", flush=True)
    for step in range(STEPS):
        ids, facts = token_batch(next(stream), vocabulary, maker.random)
        mask = ids != vocabulary["<pad>"]
        features = model(ids, attention_mask=mask.long()).last_hidden_state
        loss = fact_loss(head(features[mask]), facts[mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {STEPS}: loss {loss.item():.3f}", flush=True)


def fact_loss(guesses: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """The cross-entropy, summed over facts: guesses (n, sum(WIDTHS)), facts (n, len(FACTS))."""
    parts = zip(guesses.split(WIDTHS, dim=1), facts.unbind(1), strict=True)
    return torch.stack([F.cross_entropy(guess, fact) for guess, fact in parts]).sum()


def batches(maker: CaptionMaker) -> Iterator[list[Caption]]:
    """New captions without end, BATCH at a time, those of like length together."""
    while True:
        many = [maker.caption() for _ in range(SORTED * BATCH)]
        many.sort(key=lambda caption: len(caption.words))
        some = [many[start : start + BATCH] for start in range(0, len(many), BATCH)]
        maker.random.shuffle(some)
        yield from some


def token_batch(
    captions: list[Caption], vocabulary: dict[str, int], random: Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (n, T) and the facts of each token (n, T, len(FACTS)).

    Unknown words are strewn in, as people's prompts have them.
    """
    ignored = [IGNORED] * len(FACTS)
    unknown = (vocabulary["<unk>"], ignored)
    rows = []
    for caption in captions:
        row = []
        for word, facts in zip(caption.words, word_facts(caption), strict=True):
            if random.random() < UNKNOWN:
                row.append(unknown)
            row.append((vocabulary[word], facts))
        rows.append([*row, (vocabulary["</s>"], ignored)])
    longest = max(map(len, rows))
    rows = [row + [(vocabulary["<pad>"], ignored)] * (longest - len(row)) for row in rows]
    return (
        torch.tensor([[token for token, _ in row] for row in rows]),
        torch.tensor([[facts for _, facts in row] for row in rows]),
    )
