"""From (model, config) to adapted layers and back, in place, on any ``nn.Module``.

    plan       which weights change, at which rank, who reads them      targets, source_analysis, weight_readers,
                                                                        shared_memory, weight_tying, refusals
    install    make the adapter parameters and put them in place        data_init: starts that look at data
    the layer  one adapted layer: its state, its change, its forward    state, adapted_module, layer_adapter, change,
                                                                        views, fused_linear, recompute, dtypes
    select     which adapter a call uses, or each row of a batch        select, select_rows, blend, method_overrides
    after      prove, describe, merge into the weights                  check, dead_weights, fresh_weights, summary,
                                                                        merge

In: a module and a ``LoraConfig``. Out: the same module, whose layers run on W + ΔW of the selected adapter, and from
``detach`` the bit-identical one. Nothing here reads or writes files, nor knows a format, a trainer or transformers.
"""
