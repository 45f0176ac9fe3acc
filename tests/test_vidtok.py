"""VidTok: the numbers of diffusers' class, in bounded memory, with the frames that a clip had."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from small_models_adapters_video import (
    SMALL_FSQ,
    small_vidtok,
    small_vidtok_kl,
    small_vidtok_noncausal,
    vidtok_network,
    wrapped,
)
from zoo import media
from zoo.codecs.vidtok import VidTok, VidTokConfig
from zoo.errors import KeysError, WeightsError
from zoo.tokenizer.films import ClipInFile, FrameReader

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fsq": (small_vidtok, {}),
    "kl": (small_vidtok_kl, {"regularizer": "kl", "double_z": True}),
    "noncausal": (small_vidtok_noncausal, {"is_causal": False}),
}


def clip(frames: int, height: int = 16, width: int = 16) -> Tensor:
    noise = torch.randn(3, frames, height, width, generator=torch.Generator().manual_seed(frames))
    return noise.clamp(-1, 1)


@pytest.mark.parametrize("kind", MODELS)
def test_the_numbers_are_those_of_the_class(kind: str) -> None:
    make, settings = MODELS[kind]
    tokenizer, network = make(), vidtok_network(**SMALL_FSQ | settings)
    causal, seen = tokenizer.config.causal, set()
    for frames in (1, 2, 3, 4, 5, 8, 9, 16, 17):
        height, width = (33, 47) if frames in (3, 17) else (32, 32)
        item = clip(frames, height, width)
        encoded = tokenizer.encode(item)
        whole = F.pad(item, (0, -width % 4, 0, -height % 4), mode="replicate")
        front, back = (-frames % 4, 0) if causal else (0, -frames % 16)
        whole = torch.cat([whole[:, :1]] * front + [whole] + [whole[:, -1:]] * back, dim=1)
        with torch.no_grad():
            if tokenizer.spec.continuous:
                expected = network.encode(whole[None]).latent_dist.mode()
                assert (encoded.values[0] - expected[0]).abs().max() < 1e-5
                media = network._decode(expected)[0]
            else:
                expected = network.encode(whole[None])[1]
                assert encoded.tolist() == [expected.flatten().tolist()]
                assert tokenizer.grid(encoded) == [tuple(expected.shape[1:])]
                seen |= set(encoded.tolist()[0])
                media = network._decode(expected.long(), decode_from_indices=True)[0]
        media = media[:, -frames:] if causal else media[:, :frames]
        [decoded] = tokenizer.decode(encoded)
        assert decoded.shape == (3, frames, height, width)
        assert (decoded - media[:, :, :height, :width]).abs().max() < 1e-4
        assert tokenizer.decode(encoded, size=None)[0].shape[2:] == media.shape[2:]
    assert tokenizer.spec.continuous or len(seen) > 8


def test_blocks_are_the_whole() -> None:
    """A causal encoder goes through a clip block by block; caches make the blocks one pass, and are gone afterwards."""
    tokenizer, item = small_vidtok_kl(), clip(39)
    whole = {}
    for frames in (4, 8, 40):
        tokenizer.block_frames = frames
        whole[frames] = tokenizer.encode(item).values[0]
    assert (whole[4] - whole[40]).abs().max() < 1e-5 and (whole[8] - whole[40]).abs().max() < 1e-5
    assert not any(getattr(module, "causal_cache", None) is not None for module in tokenizer.modules())
    later = torch.cat([item[:, :21], -item[:, 21:]], dim=1)
    # 39 frames follow one that is repeated: latent frames 0 to 4 are those of 19 frames, and the sixth is of 20 to 23.
    changed = (tokenizer.encode(later).values[0] - whole[4]).abs().amax((0, 2, 3))
    assert changed[:5].max() < 1e-5 < changed[5]


@pytest.mark.parametrize("settings", [{}, {"tempo_ds": [0, 1], "tempo_us": [1, 2]}, {"tempo_ds": [1], "tempo_us": [2]}])
def test_blocks_decode_as_the_whole(settings: dict[str, Any]) -> None:
    """A causal decoder looks ahead by what its layers hold back, and takes a clip block by block all the same."""
    tokenizer = small_vidtok("small-vidtok-kl", regularizer="kl", double_z=True, **settings)
    network: Any = vidtok_network(**SMALL_FSQ | {"regularizer": "kl", "double_z": True} | settings)
    seen: list[int] = []
    tokenizer.decoder.network.register_forward_hook(lambda _, given, out: seen.append(given[0].shape[2]))
    for latents in (1, 2, 3, 4, 5, 8, 9):
        values = torch.randn(4, latents, 3, 4, generator=torch.Generator().manual_seed(latents))
        with torch.no_grad():
            expected = network._decode(values[None])[0]
        for block in (1, 2, 4, 9):
            tokenizer.block_frames = block * tokenizer.config.temporal
            [found] = tokenizer.decode([values], size=None)
            assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5
            assert max(seen) == min(block, latents)
            seen.clear()
    assert not any(getattr(module, "held", None) is not None for module in tokenizer.modules())


def test_long_films_stay_in_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small_vidtok()
    long, short = (media.write_video(tmp_path / f"{frames}.mkv", clip(frames, 16, 20)) for frames in (39, 3))
    items = [long, short, long.read_bytes(), clip(39)]
    for options in ({}, {"fit": "crop", "size": 12}, {"fps": 12}):
        whole = tokenizer.encode(items, **options)
        with monkeypatch.context() as patch:
            patch.setattr("zoo.tokenizer.video.MOST_HELD", 5_000)
            prepared = tokenizer.prepare(items, **options)
            assert [isinstance(item.tensors, ClipInFile) for item in prepared] == [True, False, True, False]
            assert tokenizer.encode(items, **options).equal(whole)
    prepared = [item for item in prepared if isinstance(item.tensors, ClipInFile)]
    # No more than a block is there at a time.
    held: list[int] = []
    part = FrameReader.part
    monkeypatch.setattr(FrameReader, "part", lambda self, *where: (part(self, *where), held.append(len(self._held)))[0])
    tokenizer.block_frames = 4
    tokens = tokenizer.encode_prepared(prepared)
    assert max(held) == 4 and tokens.tolist() == [whole.tolist()[0], whole.tolist()[2]]
    noncausal = small_vidtok_noncausal()
    assert noncausal.encode_prepared(prepared[:1]).equal(noncausal.encode(long, fps=12))
    # What travels takes its frames along; what stays notices when the film is another one.
    sent = pickle.dumps(prepared[0])
    for frames in (37, 41):
        media.write_video(long, clip(frames, 16, 20))
        with pytest.raises(zoo.ItemError, match=r"item 0: .*39\.mkv has changed since it was prepared"):
            tokenizer.encode_prepared(prepared)
    arrived = pickle.loads(sent)
    assert list(arrived.tensors) == ["frames"] and tokenizer.encode_prepared([arrived]).tolist() == tokens.tolist()[:1]


def test_little_is_kept_between_blocks() -> None:
    tokenizer = small_vidtok_kl()
    sizes: list[int] = []

    def measure(module: Any, *_: Any) -> None:
        caches = [getattr(inner, "causal_cache", None) for inner in module.modules()]
        sizes.append(sum(cache.numel() for cache in caches if cache is not None))

    tokenizer.encoder.network.register_forward_hook(measure)
    tokenizer.encode(clip(48))
    assert len(sizes) == 3 and sizes[0] == sizes[1] == sizes[2]
    tokenizer.block_frames = 48
    tokenizer.encode(clip(48))
    assert sizes[3] == sizes[0]


def test_threads_and_copies() -> None:
    tokenizer = small_vidtok()
    items = [clip(frames) for frames in (20, 5, 33)]
    expected = [tokenizer.encode(item).tolist() for item in items]
    found: dict[int, list[Any]] = {}

    def work(number: int) -> None:
        found[number] = [tokenizer.encode(item).tolist() for item in items[number:] + items[:number]]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[number] == expected[number:] + expected[:number] for number in range(3))
    assert pickle.loads(pickle.dumps(tokenizer)).encode(items[0]).tolist() == [expected[0][0]]


def test_posterior_and_precision() -> None:
    tokenizer, item = small_vidtok_kl(), clip(5)
    mode = tokenizer.encode(item)
    draws = [tokenizer.encode(item, posterior="sample", generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2]) and not draws[0].equal(mode)
    with pytest.raises(zoo.ArgumentError, match="posterior"):
        tokenizer.encode(item, posterior="mean")
    with pytest.raises(zoo.ArgumentError, match="no posterior"):
        small_vidtok().encode(item, posterior="sample")
    exact = tokenizer.decode(mode)[0]
    tokenizer.to(torch.float64)
    assert tokenizer.encode(item).equal(mode)
    assert (tokenizer.decode(mode)[0] - exact).abs().max() < 1e-4


def test_bare_ids_need_a_grid() -> None:
    tokenizer = small_vidtok()
    tokens = tokenizer.encode([clip(5), clip(2, 8, 20)])
    assert tokenizer.grid(tokens) == [(2, 4, 4), (1, 2, 5)]
    bare = [torch.tensor(ids) for ids in tokens.tolist()]
    decoded = tokenizer.decode(bare, grid=[(2, 4, 4), (1, 2, 5)])
    assert [list(media.shape) for media in decoded] == [[3, 8, 16, 16], [3, 4, 8, 20]]
    assert torch.equal(decoded[0][:, 3:], tokenizer.decode(tokens)[0])
    assert tokenizer.decode(bare[:1], grid=(2, 4, 4))[0].shape == (3, 8, 16, 16)
    with pytest.raises(zoo.InputError, match="need grid"):
        tokenizer.decode(bare)
    with pytest.raises(zoo.InputError, match="item 1: 10 ids are no grid of 2 x 4 x 4"):
        tokenizer.decode(bare, grid=(2, 4, 4))
    with pytest.raises(zoo.ArgumentError, match="a grid"):
        tokenizer.decode(bare, grid=(0, 4, 4))
    wrong = zoo.Tokens.from_sequences(
        bare, tokenizer=tokens.tokenizer, fingerprint=tokens.fingerprint, vocab_size=4096, meta=[tokens.meta[1]] * 2
    )
    with pytest.raises(zoo.InputError, match="item 0"):
        tokenizer.decode(
            zoo.Tokens.from_sequences(
                [bare[0][:31]],
                tokenizer=tokens.tokenizer,
                fingerprint=tokens.fingerprint,
                vocab_size=4096,
                meta=[tokens.meta[0]],
            )
        )
    assert tokenizer.decode(wrong[1])[0].shape == (3, 2, 8, 20)


def test_embeddings_are_what_is_decoded() -> None:
    tokenizer = small_vidtok()
    tokens = tokenizer.encode(clip(8))
    z = tokenizer.embed(tokens)[0].T.reshape(4, 2, 4, 4)
    network = vidtok_network(**SMALL_FSQ)
    with torch.no_grad():
        assert (network._decode(z[None])[0] - tokenizer.decode(tokens)[0]).abs().max() < 1e-5


# ---- checkpoints


def upstream(network: Any) -> dict[str, Tensor]:
    return {**network.state_dict(), "loss.discriminator.weight": torch.zeros(2), "loss.logvar": torch.zeros(())}


def test_a_causal_file_needs_its_version(tmp_path: Path) -> None:
    state = upstream(vidtok_network(**SMALL_FSQ))
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    settings = SMALL_FSQ | {"version": "1.1"}
    tokenizer = zoo.load_upstream("vidtok", settings, tmp_path / "model.ckpt")
    assert tokenizer.encode(clip(9)).tolist() == small_vidtok().encode(clip(9)).tolist()
    assert tokenizer.fingerprint == small_vidtok().fingerprint
    for given in (None, SMALL_FSQ, SMALL_FSQ | {"version": "1.0"}):
        with pytest.raises(WeightsError, match=r"1\.0"):
            zoo.load_upstream("vidtok", given, state)
    with pytest.raises(WeightsError, match="no family recognises"):
        from safetensors.torch import save_file

        save_file({key: tensor for key, tensor in state.items() if not key.startswith("loss")}, tmp_path / "bare.safetensors")
        zoo.load(f"local-dir:{tmp_path / 'bare.safetensors'}")


def test_a_file_that_is_not_causal_needs_nothing(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    network = vidtok_network(**SMALL_FSQ | {"is_causal": False})
    save_file(network.state_dict(), tmp_path / "bare.safetensors")
    tokenizer = zoo.load(f"local-dir:{tmp_path / 'bare.safetensors'}")
    assert tokenizer.encode(clip(5)).tolist() == small_vidtok_noncausal().encode(clip(5)).tolist()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("decoder.conv_in.conv.bias"), "missing"),
        (lambda state: state.update({"encoder.surplus": torch.zeros(1)}), "unexpected"),
        (lambda state: state.update({"decoder.conv_in.conv.bias": torch.zeros(3)}), "shape"),
    ],
)
def test_files_are_taken_strictly(change: Any, complaint: str) -> None:
    state = dict(vidtok_network(**SMALL_FSQ).state_dict())
    change(state)
    with pytest.raises(KeysError, match=complaint):
        zoo.load_upstream("vidtok", SMALL_FSQ | {"version": "1.1"}, state)


def test_halves(tmp_path: Path) -> None:
    whole = small_vidtok()
    tokens = whole.encode(clip(5))
    whole.save_pretrained(tmp_path / "saved")
    encoder, decoder = (zoo.load(f"local-dir:{tmp_path / 'saved'}", parts=part) for part in ("encoder", "decoder"))
    assert encoder.num_parameters < whole.num_parameters and decoder.num_parameters < whole.num_parameters
    assert encoder.encode(clip(5)).equal(tokens)
    assert torch.equal(decoder.decode(tokens)[0], whole.decode(tokens)[0])
    with pytest.raises(zoo.WeightsError, match="decoder"):
        encoder.decode(tokens)
    with pytest.raises(zoo.WeightsError, match="encoder"):
        decoder.encode(clip(5))
    network = vidtok_network(**SMALL_FSQ)
    for part in ("encoder", "decoder"):
        half = wrapped(VidTok, VidTokConfig(SMALL_FSQ, parts=(part,)), network, "half")
        assert half.fingerprint == whole.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [entry.name for entry in zoo.registry.entries().values() if entry.family == "vidtok" and not entry.embedded]
)
def test_official_sizes(name: str) -> None:
    entry = zoo.info(name)
    with torch.device("meta"):
        tokenizer = VidTok(VidTokConfig(**entry.config), name=name)
    assert 100e6 < sum(parameter.numel() for parameter in tokenizer.parameters()) < 300e6
    assert tokenizer.timing(17).latents in (3, 5, 8, 9)
