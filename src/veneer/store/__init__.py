"""Storage of adapter folders: a library on this machine, and remote places.

    library     names and tags of adapter folders, each stored once under the hash of its files
    catalogue   one list of adapters by name, from a folder, a library or a remote place
    remote      push to and pull from the Hugging Face hub and any file system of fsspec

In: an adapter folder, and a name or the address of a remote place. Out: an address that always
stands for the same bytes, or a folder to load. Several processes may use one library at once. If a
process is killed while it changes the library, the change is made completely or not at all.
"""

from veneer.registry import lazy_submodules

__getattr__ = lazy_submodules(__name__, ("catalogue", "library", "remote"))
