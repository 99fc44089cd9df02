"""Where adapter folders are kept: a library of them by name on this machine, and places elsewhere.

    library     names and tags over folders that are stored once, by the hash of their content
    remote      push to and pull from the Hugging Face hub and whatever fsspec reaches

In: an adapter folder, and a name or a place. Out: a place that names these very bytes for good, or
a folder to load. Several processes may use one library at once; a crash at any moment leaves the
old index or the new one.
"""

from veneer.registry import lazy_submodules

__getattr__ = lazy_submodules(__name__, ("library", "mirror", "remote"))
