"""Untying: give tied weights a tensor each, where a model's class can be told so.

The weight of a norm before a head that is the transposed embedding has nowhere to go: a network with tied
heads leaves its residual stream with permutations. Untied, the stream may turn, and the checkpoint is larger
by a table.
"""

from __future__ import annotations

import copy

import torch

from fxfusion.capture import Model, tied_groups
from fxfusion.errors import OptionError


def untied(model: Model) -> torch.nn.Module:
    """Return a copy of a model whose input and output embeddings are tied no longer.

    All other tensors are the model's own. The copy's configuration says ``tie_word_embeddings=False``, and
    its weights load into its class with that.

    Parameters
    ----------
    model : torch.nn.Module
        A model of transformers; its configuration tells its class what is tied.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    OptionError
        If no configuration can say that weights are not tied: loading would tie them again.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    >>> separate = untied(model)
    >>> separate.lm_head.weight is separate.transformer.wte.weight
    False
    >>> separate.config.tie_word_embeddings, model.config.tie_word_embeddings
    (False, True)
    """
    config = getattr(model, "config", None)
    if not isinstance(model, torch.nn.Module) or not hasattr(config, "tie_word_embeddings"):
        raise OptionError(
            f"{type(model).__name__} has no configuration that says what is tied, so that loading would tie "
            "it again: leave untie out"
        )
    tensors = [*model.parameters(), *model.buffers()]
    separate = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    separate.config.tie_word_embeddings = False  # type: ignore[union-attr]
    with torch.device("meta"):
        fresh = type(separate)(copy.deepcopy(separate.config))
    kept = {name: group[0] for group in tied_groups(fresh) for name in group}
    for group in tied_groups(separate):
        own: dict[str, torch.nn.Parameter] = {}
        for name in group:
            path, _, attribute = name.rpartition(".")
            owner = separate.get_submodule(path)
            old = getattr(owner, attribute)
            if not isinstance(old, torch.nn.Parameter):
                continue
            first = kept.get(name, name)  # what the class ties in any case stays one
            if first not in own:
                fitting = old if not own else torch.nn.Parameter(old.detach().clone(), old.requires_grad)
                own[first] = fitting
            setattr(owner, attribute, own[first])
    return separate
