"""The encoders; tests/data/test_features.py has what is done with their output."""

import math
import re
import shutil
from collections import Counter
from pathlib import Path

import gin
import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from data.encoders import SentenceEncoder, TfidfSvd
from data.items import Items
from data.processed import RecDataset, load_corpus
from tests.data.test_features import TEXTS, make


def of(texts: list[str]) -> Items:
    return Items(texts, texts, [[]] * len(texts))


def encoded(encoder: TfidfSvd, texts: list[str]) -> np.ndarray:
    """The vectors of the texts that the encoder is fitted to."""
    return encoder.transform(encoder.fit(make(texts), None), of(texts))


def tfidf_by_hand(texts: list[str], min_df: int) -> np.ndarray:
    """[N, terms]: (1 + log tf) * (log((1 + N) / (1 + df)) + 1) of words and pairs, rows of length 1."""
    terms = []
    for text in texts:
        words = re.findall(r"\w\w+", text)
        terms.append(Counter(words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]))
    frequency = Counter(term for counter in terms for term in counter)
    names = sorted(term for term in frequency if frequency[term] >= min_df)
    rows = np.zeros((len(texts), len(names)))
    for n, counter in enumerate(terms):
        for m, term in enumerate(names):
            if counter[term]:
                idf = math.log((1 + len(texts)) / (1 + frequency[term])) + 1
                rows[n, m] = (1 + math.log(counter[term])) * idf
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)


def test_tfidf_svd_is_the_projection_on_the_leading_singular_vectors():
    values = encoded(TfidfSvd(dim=3, ngrams=2, min_df=2), TEXTS)
    assert values.shape == (7, 3) and values.dtype == np.float32
    left, singular, _ = np.linalg.svd(tfidf_by_hand(TEXTS, min_df=2), full_matrices=False)
    expected = left[:, :3] * singular[:3]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True).clip(min=1e-6)
    np.testing.assert_allclose(values @ values.T, expected @ expected.T, atol=1e-6)  # up to the signs of columns
    assert not values[6].any(), "no term of this text is in two texts"


def test_what_the_components_do_not_see_is_zero_and_not_amplified_rounding_error():
    texts = ["red ball"] * 5 + ["blue chess"] * 2
    values = encoded(TfidfSvd(dim=1), texts)
    np.testing.assert_allclose(np.abs(values[:, 0]), [1, 1, 1, 1, 1, 0, 0], atol=1e-6)


def test_tfidf_svd_is_deterministic(tmp_path):
    texts = load_corpus(RecDataset.SAMPLE, str(tmp_path)).texts()[:800]
    encoder = TfidfSvd(dim=32)
    values = encoded(encoder, texts)
    assert np.array_equal(values, encoded(encoder, texts))
    with threadpool_limits(1):
        np.testing.assert_allclose(encoded(encoder, texts), values, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(values, axis=1)[values.any(axis=1)], 1, atol=1e-6)


def test_the_largest_dim_is_named_and_works():
    with pytest.raises(ValueError, match=r"TfidfSvd.dim = 256 .*the largest possible value is (\d+)") as raised:
        encoded(TfidfSvd(), TEXTS)
    largest = int(str(raised.value).rpartition(" ")[2])
    assert encoded(TfidfSvd(dim=largest), TEXTS).shape == (7, largest)
    with pytest.raises(ValueError, match=f"the largest possible value is {largest}"):
        encoded(TfidfSvd(dim=largest + 1), TEXTS)


def test_texts_without_terms_are_refused():
    with pytest.raises(ValueError, match="TfidfSvd.min_df = .* in that many of the 2 texts"):
        encoded(TfidfSvd(dim=1), ["one", "two"])


def test_the_identity_holds_every_parameter_and_gin_sets_them():
    variants = [TfidfSvd(), TfidfSvd(dim=8), TfidfSvd(ngrams=1), TfidfSvd(min_df=3)]
    assert len({variant.identity for variant in variants}) == 4
    with gin.unlock_config():
        gin.parse_config(["TfidfSvd.dim = 8", "SentenceEncoder.model = 'some/model'"])
    try:
        assert TfidfSvd().identity == variants[1].identity
        assert SentenceEncoder().identity == "some/model"
    finally:
        gin.clear_config()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A sentence encoder of one tiny BERT layer, with random weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "ball", "game", "chess", "of"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder / "bert")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    transformer = modules.Transformer(str(folder / "bert"), max_seq_length=16)
    SentenceTransformer(modules=[transformer, modules.Pooling(8)], device="cpu").save(str(folder / "whole"))
    return folder


def test_sentence_encoder_pools_what_the_transformer_says(model_folder):
    from transformers import AutoModel, AutoTokenizer

    encoder = SentenceEncoder(str(model_folder / "whole"), batch_size=2, device="cpu")
    values = encoder.encode(TEXTS)
    assert values.shape == (7, 8) and values.dtype == np.float32
    tokenizer, bert = (cls.from_pretrained(model_folder / "bert") for cls in (AutoTokenizer, AutoModel))
    for text, row in zip(TEXTS, values, strict=True):
        with torch.no_grad():
            states = bert(**tokenizer(text, return_tensors="pt")).last_hidden_state
        np.testing.assert_allclose(row, states[0].mean(0).numpy(), atol=1e-5)


def test_a_local_model_is_known_by_its_files(tmp_path, model_folder):
    encoder = SentenceEncoder(str(model_folder / "whole"))
    copy = shutil.copytree(model_folder / "whole", tmp_path / "copy")
    (copy / "README.md").write_text("Words about the model.")
    assert SentenceEncoder(str(copy)).identity == encoder.identity != SentenceEncoder().identity
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = SentenceEncoder(str(copy)).identity
    assert changed != encoder.identity and "/" not in changed
    shutil.copy(model_folder / "whole/model.safetensors", weights)
    (copy / "vocab.txt").write_text("another vocabulary")
    assert SentenceEncoder(str(copy)).identity != encoder.identity


def test_other_texts_are_projected_on_the_fitted_components():
    state = (encoder := TfidfSvd(dim=3)).fit(make(), None)
    together = encoder.transform(state, of([*TEXTS, "blue red ball of chess", "words nobody knows"]))
    np.testing.assert_array_equal(together[:7], encoded(encoder, TEXTS))
    alone = encoder.transform(state, of(["blue red ball of chess"]))
    np.testing.assert_array_equal(alone[0], together[7])
    assert not together[8].any() and encoder.transform(state, of([])).shape == (0, 3)


@pytest.mark.parametrize("model", ["/not/there", "some/model"])
def test_a_model_that_cannot_be_loaded_is_one_clear_error(monkeypatch, model):
    import sentence_transformers

    def offline(name, **_):
        raise OSError(f"no connection for {name}")

    if model == "some/model":
        monkeypatch.setattr(sentence_transformers, "SentenceTransformer", offline)
    with pytest.raises(ValueError, match="TfidfSvd") as raised:
        SentenceEncoder(model).encode(TEXTS)
    assert repr(model) in str(raised.value) and "path of a downloaded model" in str(raised.value)


def test_precision_normalization_and_prompt(model_folder):
    model = str(model_folder / "whole")
    plain = SentenceEncoder(model, device="cpu")
    values = plain.encode(TEXTS)
    normalized = SentenceEncoder(model, device="cpu", normalize=True)
    expected = values / np.linalg.norm(values, axis=1, keepdims=True)
    np.testing.assert_allclose(normalized.encode(TEXTS), expected, atol=1e-6)
    prompted = SentenceEncoder(model, device="cpu", prompt="red game ")
    np.testing.assert_allclose(prompted.encode(TEXTS), plain.encode(["red game " + text for text in TEXTS]), atol=1e-6)
    half = SentenceEncoder(model, device="cpu", precision="bfloat16")
    assert half.encode(TEXTS).dtype == np.float32
    np.testing.assert_allclose(half.encode(TEXTS), values, atol=0.05)
    assert not np.array_equal(half.encode(TEXTS), values)
    assert len({encoder.identity for encoder in (plain, normalized, prompted, half)}) == 4
    assert plain.identity == SentenceEncoder(model, batch_size=2, chunk_items=3, device="cpu").identity
    with pytest.raises(ValueError, match="SentenceEncoder.precision = 'int8': Input should be 'float32'"):
        SentenceEncoder(model, precision="int8")


def test_the_settings_name_the_model_and_what_was_read_of_it(monkeypatch, model_folder, tmp_path):
    folder = model_folder / "whole"
    monkeypatch.chdir(model_folder)
    local = SentenceEncoder("whole", device="cpu", prompt="red ")
    again = SentenceEncoder(**local.settings)
    assert (again.model, again.prompt, again.device) == (str(folder.resolve()), "red ", None)
    assert again.identity == local.identity
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "modules.json").write_text("[]")
    for name, commit in (("main", "c0ffee"), ("old", "beef")):
        (tmp_path / "models--owner--name" / "refs").mkdir(exist_ok=True)
        (tmp_path / "models--owner--name" / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub = SentenceEncoder("owner/name")
    assert hub.settings["revision"] == "c0ffee" and SentenceEncoder(**hub.settings).identity == "owner/name"
    assert SentenceEncoder("owner/name", revision="old").settings["revision"] == "old", "not fetched"
    assert SentenceEncoder("/gone/folder").settings["model"] == "/gone/folder"
    assert SentenceEncoder("owner/name", "old").content(make(), None) != hub.content(make(), None)


def test_a_catalogue_is_encoded_in_chunks(tmp_path, model_folder):
    from tests.data.test_features import compute, make

    model = str(model_folder / "whole")
    whole = compute(make(), [SentenceEncoder(model, device="cpu")], tmp_path / "a").values
    chunked = compute(make(), [SentenceEncoder(model, device="cpu", chunk_items=3)], tmp_path / "b").values
    np.testing.assert_allclose(chunked, whole, atol=1e-6)
    assert isinstance(chunked, np.memmap)
