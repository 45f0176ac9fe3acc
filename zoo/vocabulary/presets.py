"""Id layouts of published language models: the size of each vocabulary, and where tokenizers lie in it."""

from __future__ import annotations

from zoo.spec import Frame
from zoo.vocabulary.sections import Grid, Naming, Section

_EMU_CODES = 131_072

# The text tokenizer of Emu3.5 has ids up to 151,642, then markers, and the codes last. Digits are tokens of their own. Rows are
# told apart by <|extra_200|>. Source: the tokenizer files of github.com/baaivision/Emu3.5.
_EMU = (
    282_926,
    (
        Section(
            "image",
            "emu3.5",
            "",
            _EMU_CODES,
            151_854,
            151_852,
            151_853,
            Naming("<|visual token {:06d}|>", "<|image start|>", "<|image end|>"),
            grid=Grid(151_851, 151_846, 9, tuple(range(15, 25)), "<|image token|>", "<|extra_200|>"),
        ),
    ),
)

# Text up to 131,071, 200 reserved slots that begin with markers, the codes of images and those of sound. A byte b is the token
# 1000 + b. Rows of the embedding table behind the last code are unused. The model reads these ids and does not write them; at
# run time placeholders stand where the codes are. Source: transformers 5.24 and github.com/swiss-ai/apertus-omni-tokenizer.
_APERTUS_BYTE = 1000
_APERTUS = (
    266_440,
    (
        Section(
            "image",
            "emu3.5",
            "",
            _EMU_CODES,
            131_272,
            131_073,
            131_074,
            Naming("<|visual token {}|>", "<|img_start|>", "<|img_end|>"),
            grid=Grid(
                131_075,
                131_076,
                _APERTUS_BYTE + ord("*"),
                tuple(_APERTUS_BYTE + ord(digit) for digit in "0123456789"),
                "<|img_token_start|>",
                "<|img_end_of_row|>",
            ),
        ),
        Section(
            "audio",
            "wavtokenizer-large-unify-40",
            "",
            4096,
            262_344,
            131_080,
            131_081,
            Naming("<|audio token {}|>", "<|audio_start|>", "<|audio_end|>"),
        ),
    ),
)

# The form in which CosyVoice 2's language model is served as one vocabulary: 151,663 ids of text, the codes, <|eos1|> to
# <|eos3|>, <|sos|> and <|task_id|>. A prompt is <|sos|>, text, <|task_id|>; then speech follows up to <|eos1|>. Source: the
# conversion in runtime/triton_trtllm of github.com/FunAudioLLM/CosyVoice. (The checkpoint itself counts its codes from 0 in a
# table of their own, behind which 6561 ends speech.)
_COSY_TEXT, _COSY_CODES = 151_663, 6561
_COSY = (
    _COSY_TEXT + _COSY_CODES + 5,
    (
        Section(
            "speech",
            "s3tokenizer-v2-25hz",
            "",
            _COSY_CODES,
            _COSY_TEXT,
            _COSY_TEXT + _COSY_CODES + 4,
            _COSY_TEXT + _COSY_CODES,
            Naming("<|s_{}|>", "<|task_id|>", "<|eos1|>"),
        ),
    ),
)

# Orpheus: 128,256 ids of Llama 3's text, then <custom_token_0> and those that follow: ten markers, and the codes of SNAC with
# the seven places of a frame side by side. 1 and 2 begin and end speech, 3 and 4 the human's turn, 5 and 6 the model's. Source:
# the decoder of github.com/canopyai/Orpheus-TTS; markers and size by third parties' notebooks, not verified.
_ORPHEUS_TEXT, _ORPHEUS_MARKERS = 128_256, 10
_SNAC_FRAME = Frame((4096,) * 3, order=(0, 1, 2, 2, 1, 2, 2))
_ORPHEUS = (
    156_940,
    (
        Section(
            "speech",
            "snac-24khz",
            "",
            _SNAC_FRAME.vocab_size,
            _ORPHEUS_TEXT + _ORPHEUS_MARKERS,
            _ORPHEUS_TEXT + 1,
            _ORPHEUS_TEXT + 2,
            Naming("<custom_token_{}>", "<custom_token_1>", "<custom_token_2>", first=_ORPHEUS_MARKERS),
            frame=_SNAC_FRAME,
        ),
    ),
)

PRESETS: dict[str, tuple[int, tuple[Section, ...]]] = {
    "emu3.5": _EMU,
    "apertus-1.5": _APERTUS,
    "cosyvoice2": _COSY,
    "orpheus": _ORPHEUS,
}
