"""Mixtral: every MLP is a mixture of experts."""

from dmi.families.mapping import Mapping

MAPPING = Mapping(name="mixtral", model_types=("mixtral",), gate=None, up=None, down=None, router="mlp.gate")
