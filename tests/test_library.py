"""Networks of transformers and diffusers inside our own models."""

import pickle

import pytest
import torch
from diffusers import AutoencoderTiny, AutoencoderVidTok
from transformers import EncodecConfig, EncodecModel, HubertConfig, HubertModel, MimiConfig, MimiModel

from zoo.errors import KeysError, WeightsError
from zoo.nn.library import built, plain_config, present_names, without_captures

SMALL = dict(num_filters=4, hidden_size=8, codebook_size=16, codebook_dim=8)
SMALL_MIMI = dict(
    hidden_size=32, num_filters=4, upsample_groups=32, sliding_window=12, num_hidden_layers=1, codebook_dim=32,
    vector_quantization_hidden_dimension=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16, intermediate_size=32,
)  # fmt: skip


def random_state(model):
    torch.manual_seed(0)
    return {
        key: torch.randn_like(tensor) if tensor.is_floating_point() else tensor for key, tensor in model.state_dict().items()
    }


def test_older_names_are_brought_up_to_date():
    model = EncodecModel(EncodecConfig(**SMALL))
    state = random_state(model)
    older = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    renamed = dict(state)
    for ours, theirs in older.items():
        renamed = {key.replace(ours, theirs): tensor for key, tensor in renamed.items()}
    assert renamed.keys() != state.keys()
    found = present_names(EncodecModel, EncodecConfig(**SMALL), renamed)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("encoder.layers.0.conv.bias"), "missing: encoder.layers.0.conv.bias"),
        (lambda state: state.update(surplus=torch.zeros(1)), "unexpected: surplus"),
        (
            lambda state: state.update({"encoder.layers.0.conv.bias": torch.zeros(3)}),
            "of another shape: encoder.layers.0.conv.bias",
        ),
    ],
)
def test_what_the_library_warns_of_is_an_error(change, complaint):
    state = random_state(EncodecModel(EncodecConfig(**SMALL)))
    change(state)
    with pytest.raises(KeysError, match=complaint):
        present_names(EncodecModel, EncodecConfig(**SMALL), state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EncodecModel(EncodecConfig(**SMALL)),
        lambda: MimiModel(MimiConfig(**SMALL_MIMI)),
        lambda: AutoencoderVidTok(ch=8, num_res_blocks=1, z_channels=4, codebook_size=4096, regularizer="fsq", double_z=False),
        lambda: AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4),
    ],
)
def test_an_outline_has_the_buffers_of_the_whole(make):
    whole = make()
    draws = torch.get_rng_state()
    with torch.device("meta"):
        outline = built(make)
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(parameter.is_meta for parameter in outline.parameters())
    outline.load_state_dict(whole.state_dict(), strict=True, assign=True)
    for (name, expected), (_, found) in zip(whole.named_buffers(), outline.named_buffers(), strict=True):
        assert torch.equal(expected, found), name
    for module in outline.modules():
        assert not [key for key, value in vars(module).items() if isinstance(value, torch.Tensor) and value.is_meta]


def test_hidden_states_leave_a_model_that_can_be_pickled():
    """The library's hooks cannot be; without them the copy has the same tensors, and gives hidden states again."""
    config = HubertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=[8] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, conv_pos_batch_norm=True,
    )  # fmt: skip
    model = HubertModel(config).eval()
    sound = torch.sin(torch.arange(2000) / 9)[None]
    expected = model(sound, output_hidden_states=True).hidden_states
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(model)
    copied = pickle.loads(pickle.dumps(without_captures(model)))
    found = copied(sound, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(model(sound, output_hidden_states=True).hidden_states) == 3


def test_a_plain_configuration_says_nothing_of_programs():
    config = plain_config(MimiConfig(**SMALL_MIMI).to_dict() | {"auto_map": {"AutoModel": "modeling.Mimi"}})
    assert config["hidden_size"] == 32
    assert not config.keys() & {"auto_map", "transformers_version", "architectures", "dtype"}
    assert plain_config(MimiConfig(**config).to_dict()) == config
    with pytest.raises(WeightsError, match="plain values"):
        plain_config({"size": torch.zeros(1)})
