"""A plug-in for vLLM, which vLLM finds by the entry point ``vllm.general_plugins``. With it, a vLLM
server that the user starts serves the adapters of a Veneer library by name, and verifies them.

    VENEER_LIBRARY        the path or address of the library (``vllm_resolver.py``); without it, the
                          plug-in does nothing
    VENEER_VERIFY_BASE=0  do not compare the base with the hashes in the adapters' records, for
                          example because the base is quantised

With VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, vLLM asks a ``LoRAResolver`` for each model name that it
does not know. vLLM loads plug-ins in every process that it starts, but asks the resolver in only
one of them, so Veneer's other modules are imported only when the resolver is asked for the first
time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.serve.vllm_resolver import Adapters

#: a child of vLLM's logger, so that vLLM's handler prints the messages
log = logging.getLogger("vllm.veneer")


def register() -> None:
    """Register the resolver with vLLM if ``VENEER_LIBRARY`` is set. vLLM calls this when it loads
    the plug-in."""
    library_address = os.environ.get("VENEER_LIBRARY")
    if not library_address:
        return
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # pyright: ignore[reportMissingImports]

    verify_base = os.environ.get("VENEER_VERIFY_BASE", "1") != "0"

    class VeneerResolver(LoRAResolver):
        """Finds the adapter of a model name for vLLM. If there is none, or it cannot be verified,
        ``resolve_lora`` returns None, and vLLM answers 404, as for any unknown name."""

        adapters: Adapters | None = None
        lock = threading.Lock()

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            adapter = await asyncio.to_thread(self.find, base_model_name, lora_name)
            return adapter and LoRARequest(
                lora_name=lora_name, lora_int_id=adapter.lora_id, lora_path=str(adapter.path)
            )

        def find(self, base: str, name: str) -> Any:
            from veneer.errors import VeneerError
            from veneer.serve.vllm_resolver import Adapters

            with self.lock:  # one instance for all threads: it caches hashes of the base
                self.adapters = self.adapters or Adapters(library_address, verify_base=verify_base)
            try:
                return self.adapters.find(base, name)
            except (VeneerError, OSError) as error:
                log.warning("The adapter %r is not served. %s", name, error)
                return None

    LoRAResolverRegistry.register_resolver("veneer", VeneerResolver())
