"""A T5 of half a million parameters that reads the captions of the text demo.

Its tokens are words. It learns to name what a caption describes from the caption's last token, as
CLIP's text encoder puts a caption into its last token. A released T5 has read far more.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from captions import Caption, CaptionMaker
from shapes import COLOURS, PLACES, SHAPES, SIZES
from torch.nn import functional as F

STEPS, BATCH, LR = 1200, 96, 2e-3
EXTRA_WORDS = 0.06  # chance that a word the encoder does not know stands before a word
SPECIAL = ("<pad>", "</s>", "<unk>")
# The facts to name: of the arrangement, then of each of two objects; index 0 stands for "not said".
KINDS = ("one", "above", "left")
FACTS = [tuple(COLOURS), SHAPES, (None, *SIZES), (None, *PLACES)]
WIDTHS = [len(KINDS), *2 * [len(values) + 1 for values in FACTS]]


def words_of(text: str) -> list[str]:
    """The words of a prompt in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def write_t5(folder: Path, maker: CaptionMaker, captions: list[str]) -> None:
    """Train the encoder and write it as a folder of transformers, with a vocabulary of words.

    captions: the words of these are its vocabulary.
    """
    if folder.exists():
        return
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    tokenizer = word_tokenizer(captions)
    shape = {"d_model": 128, "d_kv": 32, "num_heads": 4, "num_layers": 3, "d_ff": 256}
    config = T5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **shape)
    model = T5EncoderModel(config)
    train_t5(model, tokenizer, maker)
    temporary = folder.with_name("t5.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)


def word_tokenizer(captions: list[str]) -> Any:  # noqa: ANN401 - a tokenizer of transformers
    """A tokenizer of words and punctuation marks; words outside these captions become <unk>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Whitespace()
    found = {word for text in captions for word, _ in split.pre_tokenize_str(text.lower())}
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *sorted(found)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def facts_of(caption: Caption) -> list[int]:
    """The index of each fact that the encoder learns to name, in the order of WIDTHS."""
    facts = [KINDS.index(caption.relation or "one")]
    for thing in (*caption.things, None)[:2]:
        if thing is None:
            facts += [0] * len(FACTS)
        else:
            said = (thing.colour, thing.shape, thing.size, thing.place)
            facts += [1 + values.index(x) for values, x in zip(FACTS, said, strict=True)]
    return facts


def train_t5(model: Any, tokenizer: Any, maker: CaptionMaker) -> None:  # noqa: ANN401
    """Train the encoder on new captions at every step."""
    head = torch.nn.Linear(model.config.d_model, sum(WIDTHS))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    print(f"\ntraining a tiny T5 for {STEPS} steps", flush=True)
    for step in range(STEPS):
        captions = [maker.caption() for _ in range(BATCH)]
        given = tokenizer([with_unknown_words(c.text, maker) for c in captions], padding=True)
        ids, mask = torch.tensor(given["input_ids"]), torch.tensor(given["attention_mask"])
        targets = torch.tensor([facts_of(caption) for caption in captions])
        features = model(ids, attention_mask=mask).last_hidden_state
        last = features[torch.arange(BATCH), mask.sum(1) - 1]
        guesses = head(last).split(WIDTHS, dim=1)
        losses = [F.cross_entropy(g, t) for g, t in zip(guesses, targets.unbind(1), strict=True)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {STEPS}: loss {loss.item():.3f}", flush=True)


def with_unknown_words(text: str, maker: CaptionMaker) -> str:
    """A caption with unknown words strewn in, as people's prompts have them."""
    words = text.split()
    strewn = maker.random.random(len(words)) < EXTRA_WORDS
    return " ".join(f"_ {w}" if extra else w for w, extra in zip(words, strewn, strict=True))
