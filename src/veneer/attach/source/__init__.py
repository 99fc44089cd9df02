"""Source analysis of the model's own code: which methods read a weight without calling the module
that holds it. Also the methods of a model that adapters override.

Input: the class of a module and the path of a weight. Output: the methods that read the weight
directly. With an adapter, they run on a view: another object of the class, with the changed weight.
The analysis cannot see C code or code that is made at run time, so it may miss readers.
``veneer.check`` finds the missed ones on a live model.
"""
