"""The small codec and the word table: causality, round trips, shipped files, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_models.assets import asset
from paris_models.checkpoint import load_tensors
from paris_models.codec import PatchPCA, cut, fingerprint, paste
from paris_models.initial import TRAIN, make_encoders
from paris_models.text import HashedWords, collisions, words_of
from paris_models.worlds import CAPTIONS, factors, render


@pytest.fixture(scope="module")
def codec() -> PatchPCA:
    return PatchPCA.from_tensors(load_tensors(asset("codec.safetensors")))


def test_the_first_frame_alone_is_the_first_latent(codec: PatchPCA) -> None:
    clips, _ = render(12, 3)
    latents = codec.encode(clips)
    assert latents.shape == (12, 32, 3, 4, 4) and latents.dtype == torch.float32
    assert torch.equal(codec.encode_first(clips), latents[:, :, :1])
    changed = clips.clone()
    changed[:, :, 5:] = 255 - changed[:, :, 5:]
    assert torch.equal(codec.encode(changed)[:, :, :2], latents[:, :, :2])
    assert not torch.equal(codec.encode(changed), latents)


def test_quality_of_the_round_trip_per_world(codec: PatchPCA) -> None:
    clips, captions = render(300, 200)
    error = (codec.decode(codec.encode(clips)).float() - clips.float()).square().mean((1, 2, 3, 4))
    decibel = -10 * (error / 255**2).log10()
    world = factors(captions)[0]
    for k, floor in enumerate((30.0, 25.0, 27.0)):
        assert decibel[world == k].mean() > floor


def test_unit_spread_and_fixed_signs(codec: PatchPCA) -> None:
    clips, _ = render(600, 100)
    assert abs(codec.encode(clips).std() - 1) < 0.05
    again = PatchPCA.fit(clips.flip(0), 32)
    one = PatchPCA.fit(clips, 32)
    assert (one.first.basis - again.first.basis).abs()[:, :8].max() < 1e-3


@pytest.mark.slow
def test_shipped_codec_and_words_are_those_of_the_script(codec: PatchPCA) -> None:
    clips, _ = render(*TRAIN)
    made, words = make_encoders(clips)
    for name, tensor in made.tensors().items():
        rows = slice(None) if tensor.ndim < 2 else (slice(None), slice(0, 8))
        assert torch.allclose(tensor[rows].float(), codec.tensors()[name][rows].float(), atol=1e-3)
    shipped = HashedWords.from_tensors(load_tensors(asset("text.safetensors")))
    for name, tensor in words.tensors().items():
        assert torch.allclose(tensor.float(), shipped.tensors()[name].float(), atol=1e-5)


def test_tensors_make_the_same_codec(codec: PatchPCA) -> None:
    again = PatchPCA.from_tensors(codec.tensors())
    assert again.fingerprint == codec.fingerprint and len(codec.fingerprint) == 64
    tensors = codec.tensors()
    tensors["first.mean"] = tensors["first.mean"] + 1e-3
    assert PatchPCA.from_tensors(tensors).fingerprint != codec.fingerprint
    del tensors["rest.scale"]
    with pytest.raises(ValueError, match="scale"):
        PatchPCA.from_tensors(tensors)


def test_fingerprint_separates_names_shapes_and_types() -> None:
    a = torch.arange(4.0)
    prints = {
        fingerprint({"a": a}),
        fingerprint({"b": a}),
        fingerprint({"a": a.reshape(2, 2)}),
        fingerprint({"a": a.to(torch.float64)}),
        fingerprint({"a": a}, "other"),
    }
    assert len(prints) == 5


@pytest.mark.parametrize("shape", [(10, 24, 24), (9, 25, 24), (9, 24, 20)])
def test_clips_that_do_not_fit_are_refused(codec: PatchPCA, shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        codec.encode(torch.zeros(1, 3, *shape, dtype=torch.uint8))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_cut_and_paste_are_inverse(n: int, rows: int, block: int, patch: int) -> None:
    x = torch.randn(n, 3, 2 * block, rows * patch, 2 * patch)
    patches = cut(x, patch, block)
    assert patches.shape == (n, 2, rows, 2, 3 * block * patch**2)
    assert torch.equal(paste(patches, patch, block), x)


def test_words_give_a_sequence_with_an_end_and_a_pooled_vector() -> None:
    words = HashedWords.fit(CAPTIONS, 6, 64)
    sequence, pooled = words.encode([*CAPTIONS, ""])
    assert sequence.shape == (217, 6, 64) and pooled.shape == (217, 64)
    assert pooled[:216].mean(0).abs().max() < 1e-5
    assert (pooled[:216].std(0) - 1).abs().max() < 1e-5
    assert torch.equal(sequence[216, 0], sequence[0, 5]) and not sequence[216, 1:].any()
    again, _ = words.encode(["A Red ball, moves left!"])
    assert torch.equal(again[0], sequence[0])
    assert not collisions(CAPTIONS)


def test_a_caption_with_too_many_words_is_refused() -> None:
    words = HashedWords.fit(CAPTIONS, 6, 64)
    with pytest.raises(ValueError, match="6 words, at most 5"):
        words.encode(["one two three four five six"])


def test_collisions_are_found() -> None:
    many = [f"word{i}" for i in range(200)]
    found = collisions(many)
    assert found and all(len(group) > 1 for group in found)
    table = HashedWords.fit(many, 6, 8)
    first, second = (table.encode([word])[0] for word in found[0][:2])
    assert torch.equal(first, second)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_encoded_or_refused(caption: str) -> None:
    words = HashedWords.fit(["a b", "c d"], 6, 8)
    if len(words_of(caption)) > 5:
        with pytest.raises(ValueError, match="at most"):
            words.encode([caption])
    else:
        assert words.encode([caption])[0].isfinite().all()


def test_word_tensors_that_do_not_fit_are_refused() -> None:
    tensors = HashedWords.fit(CAPTIONS, 6, 64).tensors()
    for broken in ({**tensors, "table": tensors["table"][:100]}, {"mean": tensors["mean"]}):
        with pytest.raises(ValueError, match="table"):
            HashedWords.from_tensors(broken)
