"""Text that a tokenizer does not know is told, and has no bits per byte."""

import math

import pytest
import tokenizers as library

from jaxlm import config, data
from jaxlm.data import unknown
from jaxlm.data.tokenizers import END_OF_TEXT
from jaxlm.evals import perplexity
from jaxlm.model.losses import TokenSums


@pytest.fixture
def opened(tmp_path):
    """What is open of two texts, by a tokenizer of two words; and its data section."""

    def make(train, validation):
        vocab = {END_OF_TEXT: 0, "[UNK]": 1, "a": 2, "play": 3}
        live = library.Tokenizer(library.models.WordPiece(vocab, unk_token="[UNK]"))
        live.pre_tokenizer, live.decoder = library.pre_tokenizers.Whitespace(), library.decoders.WordPiece()
        live.add_special_tokens([END_OF_TEXT, "[UNK]"])
        live.save(str(tmp_path / "tokenizer.json"))
        for name, text in {"train": train, "validation": validation}.items():
            (tmp_path / f"{name}.txt").write_text(text)
        cfg = config.default()
        cfg.data.update(
            source=str(tmp_path / "train.txt"),
            validation=str(tmp_path / "validation.txt"),
            tokenizer=str(tmp_path / "tokenizer.json"),
            cache_dir=str(tmp_path / "cache"),
            batch_size=1,
        )
        return cfg.data, data.open(cfg.data)

    return make


@pytest.mark.parametrize("pack", [False, True])
def test_held_out_text_with_unknown_words_has_no_bits_per_byte(opened, pack):
    section, found = opened("a play a play", "a play a b")
    section.pack = pack
    assert unknown.share(found.tokenizer, found.train) == 0 and unknown.share(found.tokenizer, found.validation) == 0.2
    _, bytes_per_token = data.held_out(section, found.tokenizer, found.validation, 2, 1)
    assert math.isnan(bytes_per_token)
    metrics = perplexity.metrics(TokenSums(nll=1.0, weight=1.0, correct=1.0, objective=1.0), bytes_per_token)
    assert set(metrics) == {"eval/loss", "eval/perplexity", "eval/accuracy"}
    _, said = data.training(section, found, 2, 0)
    assert said.endswith("20% of the held-out tokens stand for what it replaces by one; there is no eval/bits_per_byte")


def test_unknown_words_of_the_training_text_are_told(opened):
    section, found = opened("a b a b", "a play a play")
    _, said = data.training(section, found, 2, 0)
    assert said.endswith("does not know all of the text: 40% of the training tokens stand for what it replaces by one")
    _, bytes_per_token = data.held_out(section, found.tokenizer, found.validation, 2, 1)
    assert bytes_per_token == len("a play a play") / 4


def test_known_text_needs_no_word(opened):
    section, found = opened("a play a play", "a play")
    assert unknown.warning(found) == "" and data.training(section, found, 2, 0)[1] == ""
