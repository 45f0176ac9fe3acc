"""From a name to a loaded tokenizer: entry → files → safe state dict → strict load. And back: save, push, convert."""

from zoo.hub.fetch import convert, pull
from zoo.hub.loading import load
from zoo.hub.own import embedded_path
from zoo.hub.upstream import load_upstream
from zoo.moved import names_of
from zoo.saving import push_to_hub, read_card, save_pretrained, saved_config, write_saved_file

__all__ = [
    "convert",
    "embedded_path",
    "load",
    "load_upstream",
    "pull",
    "push_to_hub",
    "read_card",
    "save_pretrained",
    "saved_config",
    "write_saved_file",
]


#: A former name, for one release.
__getattr__ = names_of(__name__, {"AnyTokenizer": "zoo.hub.build"})
