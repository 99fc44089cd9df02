"""The plug-in that vLLM finds by the entry point ``vllm.general_plugins``: adapters by name,
verified.

    VENEER_LIBRARY        a library or a remote place (``vllm_resolver.py``); without it, nothing is
                          registered
    VENEER_VERIFY_BASE=0 do not compare the base with the adapters' records: for one that is
    quantised

vLLM asks a ``LoRAResolver`` for each model name that it does not know, if
VLLM_ALLOW_RUNTIME_LORA_UPDATING=1. It loads plug-ins in every process that it starts, and asks in
one of them: nothing else is imported before the first question.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.serve.vllm_resolver import Adapters

#: below vLLM's own logger, whose handler shows what is said here
log = logging.getLogger("vllm.veneer")


def register() -> None:
    """Tell vLLM of the resolver, if ``VENEER_LIBRARY`` says where adapters are."""
    place = os.environ.get("VENEER_LIBRARY")
    if not place:
        return
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # pyright: ignore[reportMissingImports]

    verify_base = os.environ.get("VENEER_VERIFY_BASE", "1") != "0"

    class VeneerResolver(LoRAResolver):
        """None for a name that is not to be served: vLLM answers 404, as it does where no resolver
        knows a name."""

        adapters: Adapters | None = None
        lock = threading.Lock()

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            found = await asyncio.to_thread(self.find, base_model_name, lora_name)
            return found and LoRARequest(
                lora_name=lora_name, lora_int_id=found.number, lora_path=str(found.path)
            )

        def find(self, base: str, name: str) -> Any:
            from veneer.errors import VeneerError
            from veneer.serve.vllm_resolver import Adapters

            with self.lock:  # one for all threads, as it remembers what it has read of the base
                self.adapters = self.adapters or Adapters(place, verify_base=verify_base)
            try:
                return self.adapters.find(base, name)
            except (VeneerError, OSError) as error:
                log.warning("The adapter %r is not served. %s", name, error)
                return None

    LoRAResolverRegistry.register_resolver("veneer", VeneerResolver())
