"""Codes of several codebooks as parallel streams, and back."""

import pytest
import torch

from zoo import streams
from zoo.errors import ArgumentError, InputError


@pytest.mark.parametrize("delays", [streams.musicgen(4), streams.moshi(5), streams.DIA, (3, 0, 1), (0,), (0, 0, 0)])
@pytest.mark.parametrize("frames", [1, 2, 17])
def test_streams_are_undone(delays, frames):
    codes = torch.randint(0, 50, (frames, len(delays)), generator=torch.Generator().manual_seed(frames))
    late = streams.delay(codes, delays, 50)
    assert late.shape == (frames + max(delays), len(delays))
    assert int((late == 50).sum()) == max(delays) * len(delays)
    assert torch.equal(streams.undelay(late, delays, 50), codes)


def test_delays_are_those_of_musicgen():
    from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

    model = MusicgenForCausalLM(MusicgenDecoderConfig(
        vocab_size=64, num_codebooks=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, pad_token_id=64
    ))  # fmt: skip
    codes = torch.randint(0, 64, (9, 4), generator=torch.Generator().manual_seed(0))
    # It stands one step later there: behind the token that a sequence begins with.
    begun = torch.cat([torch.full((4, 1), 64), codes.T], dim=1)
    _, pattern = model.build_delay_pattern_mask(begun, pad_token_id=64, max_length=9 + 4)
    ours = streams.delay(codes, streams.musicgen(4), 64)
    fixed = pattern[:, 1:].T
    assert torch.equal(fixed, ours[: len(fixed)])


def test_bad_streams_are_refused():
    codes = torch.zeros(5, 2, dtype=torch.int64)
    for delays in ((0,), (0, 1, 2), (0, -1)):
        with pytest.raises(ArgumentError, match="delays must be one number"):
            streams.delay(codes, delays, 9)
    late = streams.delay(codes, (0, 2), 9)
    with pytest.raises(InputError, match="2 steps hold no frame"):
        streams.undelay(late[:2], (0, 2), 9)
    late[3, 1] = 9
    with pytest.raises(InputError, match="filler 9 stands where frame 1 has its code of codebook 1"):
        streams.undelay(late, (0, 2), 9)


def test_counts_that_cannot_be():
    for wrong in (lambda: streams.moshi(-1), lambda: streams.musicgen(0), lambda: streams.offsets(2, 0)):
        with pytest.raises(ArgumentError, match="at least one codebook"):
            wrong()
    assert streams.offsets(2, 5) == (0, 5) and streams.moshi(1) == (0,)
