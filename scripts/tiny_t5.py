"""A T5 of half a million parameters that reads the captions of the text demo.

Its tokens are words. Each word learns to name the object that it speaks of and where that object
stands, and the last token learns to name the whole scene. A released T5 has read far more.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from captions import Caption, CaptionMaker, Said
from shapes import COLOURS, PLACES, SHAPES, SIZES
from torch.nn import functional as F

STEPS, BATCH, LR = 700, 64, 2e-3
EXTRA_WORDS = 0.06  # chance that a word the encoder does not know stands before a word
SPECIAL = ("<pad>", "</s>", "<unk>")
# What a word names: its object's number in the scene, and what the caption says of the object.
KINDS = ("one", "above", "left")
FACTS = [tuple(COLOURS), SHAPES, (None, *SIZES), (None, *PLACES)]
OWN_WIDTHS = [2, *map(len, FACTS)]
# What the last token names: the arrangement, and the facts of two objects (0: there is no second).
WIDTHS = [len(KINDS), *2 * [len(values) + 1 for values in FACTS]]
IGNORED = -100  # the target of a word that speaks of no object


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
    # Attention prefers some distances from the start, or it learns slowly what belongs together.
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    torch.nn.init.normal_(bias.weight, std=1.0)
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

    split = pre_tokenizers.BertPreTokenizer()  # words, and each punctuation mark
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


def scene_facts(caption: Caption) -> list[int]:
    """The index of each fact that the last token learns to name, in the order of WIDTHS."""
    facts = [KINDS.index(caption.relation or "one")]
    for thing in (*caption.things, None)[:2]:
        facts += [1 + fact for fact in _said(thing)] if thing else [0] * len(FACTS)
    return facts


def word_facts(caption: Caption) -> list[list[int]]:
    """The facts that each word and punctuation mark learns to name, in the order of OWN_WIDTHS."""
    facts = [[number, *_said(thing)] for number, thing in enumerate(caption.things)]
    return [facts[i - 1] if i else [IGNORED] * len(OWN_WIDTHS) for i in caption.owners]


def _said(thing: Said) -> list[int]:
    said = (thing.colour, thing.shape, thing.size, thing.place)
    return [values.index(value) for values, value in zip(FACTS, said, strict=True)]


def train_t5(model: Any, tokenizer: Any, maker: CaptionMaker) -> None:  # noqa: ANN401
    """Train the encoder on new captions at every step."""
    dim = model.config.d_model
    heads = torch.nn.ModuleList([torch.nn.Linear(dim, sum(w)) for w in (WIDTHS, OWN_WIDTHS)])
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    print(f"\ntraining a tiny T5 for {STEPS} steps", flush=True)
    for step in range(STEPS):
        captions = [maker.caption() for _ in range(BATCH)]
        ids, facts = token_batch(captions, tokenizer, maker)
        mask = ids != tokenizer.pad_token_id
        features = model(ids, attention_mask=mask.long()).last_hidden_state
        last = features[torch.arange(BATCH), mask.sum(1) - 1]
        scene = torch.tensor([scene_facts(caption) for caption in captions])
        loss = named(heads[0](last), scene, WIDTHS)
        loss = loss + named(heads[1](features).flatten(0, 1), facts.flatten(0, 1), OWN_WIDTHS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {STEPS}: loss {loss.item():.3f}", flush=True)


def named(guesses: torch.Tensor, facts: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """The cross-entropy, summed over facts: guesses (n, sum(widths)), facts (n, len(widths))."""
    parts = zip(guesses.split(widths, dim=1), facts.unbind(1), strict=True)
    return torch.stack([F.cross_entropy(guess, fact) for guess, fact in parts]).sum()


def token_batch(
    captions: list[Caption],
    tokenizer: Any,  # noqa: ANN401
    maker: CaptionMaker,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (n, T) and the facts of each token (n, T, len(OWN_WIDTHS)).

    Unknown words are strewn in, as people's prompts have them.
    """
    ignored = [IGNORED] * len(OWN_WIDTHS)
    rows = []
    for caption, ids in zip(
        captions, tokenizer([c.text for c in captions])["input_ids"], strict=True
    ):
        known = zip(ids, [*word_facts(caption), ignored], strict=True)
        row = []
        for token in known:
            if maker.random.random() < EXTRA_WORDS:
                row.append((tokenizer.unk_token_id, ignored))
            row.append(token)
        rows.append(row)
    longest = max(map(len, rows))
    rows = [row + [(tokenizer.pad_token_id, ignored)] * (longest - len(row)) for row in rows]
    return (
        torch.tensor([[token for token, _ in row] for row in rows]),
        torch.tensor([[facts for _, facts in row] for row in rows]),
    )
