"""Source analysis of the model's own code: which methods read a weight past its module. Also the
methods of a model that adapters override.

In: the class of a module and the path of a weight. Out: the methods that read the weight past its
module, which then run on a view. No answer is a promise, as code in C or code that is made at run
time shows nothing: ``veneer.check`` finds the readers that are missed here.
"""
