"""Storage of adapter folders: a library on this machine, and remote places.

    library     names and tags of folders, each stored once under the hash of its content
    remote      push to and pull from the Hugging Face hub and any file system of fsspec

In: an adapter folder, and a name or a place. Out: an address that always means the same bytes, or a
folder to load. Several processes may use one library at once; a crash leaves the old index or the
new one.
"""

from veneer.registry import lazy_submodules

__getattr__ = lazy_submodules(__name__, ("library", "mirror", "remote"))
