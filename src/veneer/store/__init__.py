"""Storage of adapter folders: a library on this machine, and remote places.

    library     a folder of adapters with names and tags; equal adapters are stored once, under the
                hash of their files
    catalogue   the adapters in a folder, a library or a remote place, found by name
    remote      push to and pull from the Hugging Face hub and any file system of fsspec

To push a folder to a remote place returns an address that always stands for the same bytes. To look
up a name or pull an address returns a folder to load. Several processes may use one library at
once. If a process is killed while it changes the library, the change is made completely or not at
all.
"""

from veneer.registry import lazy_submodules

__getattr__ = lazy_submodules(__name__, ("catalogue", "library", "remote"))
