"""A plug-in that vLLM finds by the entry point ``vllm.general_plugins``. It gives vLLM the verified
adapters of a library, by name.

    VENEER_LIBRARY        the path or address of the library (``vllm_resolver.py``); without it, the
                          plug-in does nothing
    VENEER_VERIFY_BASE=0  do not compare the base with the adapters' records: for a quantised base

With VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, vLLM asks a ``LoRAResolver`` for each model name that it
does not know. vLLM loads plug-ins in every process that it starts, but asks in only one of them, so
all other imports happen at the first question.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.serve.vllm_resolver import Adapters

#: a child of vLLM's logger, whose handler prints the messages
log = logging.getLogger("vllm.veneer")


def register() -> None:
    """Register the resolver with vLLM, if ``VENEER_LIBRARY`` is set."""
    library_address = os.environ.get("VENEER_LIBRARY")
    if not library_address:
        return
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # pyright: ignore[reportMissingImports]

    verify_base = os.environ.get("VENEER_VERIFY_BASE", "1") != "0"

    class VeneerResolver(LoRAResolver):
        """Finds the adapter of a model name. None for a name that is not served: vLLM then answers
        404, as for any unknown name."""

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

            with self.lock:  # all threads share one instance, which caches the base's fingerprints
                self.adapters = self.adapters or Adapters(library_address, verify_base=verify_base)
            try:
                return self.adapters.find(base, name)
            except (VeneerError, OSError) as error:
                log.warning("The adapter %r is not served. %s", name, error)
                return None

    LoRAResolverRegistry.register_resolver("veneer", VeneerResolver())
