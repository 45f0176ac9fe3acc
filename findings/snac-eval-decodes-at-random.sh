#!/usr/bin/env bash
# snac 1.2.1, the codec of Orpheus and its kin: a model in eval mode gives other audio at every decode of the same ids. Its
# decoder draws normal noise from PyTorch's global generator whatever the mode, and encode-decode metrics or caches of audio
# thus never repeat. One would expect what `eval()` gives elsewhere: the same output twice, or an argument for the noise.
# A seed in front of each call repeats the audio of a whole batch, and not that of an item: the noise of the second item
# depends on what stands before it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.11.0 numpy==2.3.5 snac==1.2.1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from snac import SNAC

torch.manual_seed(0)
model = SNAC(
    sampling_rate=24000, encoder_dim=8, encoder_rates=[2, 4, 8, 8], decoder_dim=64, decoder_rates=[8, 8, 4, 2],
    attn_window_size=None, codebook_size=256, codebook_dim=8, vq_strides=[4, 2, 1],
).eval()
for name, parameter in model.named_parameters():
    # Louder than the initial weights, which give next to silence.
    if name.endswith("original0"):
        parameter.data.mul_(2)
codes = [torch.randint(256, (2, 6 * step)) for step in (1, 2, 4)]
second = [level[1:] for level in codes]


def relative(one, other):
    return ((one - other).norm() / one.norm()).item()


with torch.inference_mode():
    twice = relative(model.decode(codes), model.decode(codes))
    torch.manual_seed(1)
    together = model.decode(codes)
    torch.manual_seed(1)
    again = model.decode(codes)
    torch.manual_seed(1)
    alone = model.decode(second)
print("eval mode, the same ids twice: relative difference", round(twice, 4))
print("with one seed, the same batch twice:", relative(together, again))
print("with one seed, the second item in the batch and alone:", round(relative(together[1:], alone), 4))
assert twice > 1e-3 and torch.equal(together, again) and relative(together[1:], alone) > 1e-3
PYTHON
